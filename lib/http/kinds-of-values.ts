import { types } from 'node:util'

/* What a value is that a body parser may have made, and what can be seen of it. */

/**
 * Above this number of containers somebody looks out for those that are met again and again, which costs more than all
 * the rest. A megabyte of JSON, Fastify's limit, has fewer.
 */
export const SUSPICIOUS_COUNT = 524_288

/** Thrown where a value hides what is in it: two of them can be equal to the eye, and not be the same. */
export const OPAQUE = Symbol('opaque')

/** What has to be waited for before its content is known. */
export interface FileLike {
  readonly name?: unknown
  readonly type: string
  arrayBuffer(): Promise<ArrayBuffer>
}

/** What JSON makes, and Fastify for parameters and queries. */
export function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return (
    (prototype === Object.prototype || prototype === null || Object.getPrototypeOf(prototype) === null) &&
    !(Symbol.iterator in value)
  )
}

/** Of whatever realm or package it is. No client's JSON has functions. */
function nameOf(value: object): unknown {
  return (value as { [Symbol.toStringTag]?: unknown })[Symbol.toStringTag]
}

export function isFile(value: object): value is FileLike {
  const { arrayBuffer, type } = value as Partial<FileLike>
  return (
    typeof arrayBuffer === 'function' && typeof type === 'string' && ['Blob', 'File'].includes(nameOf(value) as string)
  )
}

type Form = Iterable<[string, unknown]>

export function isForm(value: object): value is Form {
  return ['FormData', 'URLSearchParams'].includes(nameOf(value) as string) && Symbol.iterator in value
}

/** The values of each field: their order counts, that of the fields does not. */
export function grouped(form: Form): Record<string, unknown[]> {
  const fields: Record<string, unknown[]> = Object.create(null)
  for (const [name, value] of form) {
    fields[name] ??= []
    fields[name].push(value)
  }
  return fields
}

/** With names for keys the order does not count: then a map is what others make an object of. */
export function entriesOf(map: ReadonlyMap<unknown, unknown>): unknown[] {
  const entries = [...map]
  if (entries.every(([key]) => typeof key === 'string')) {
    entries.sort(([a], [b]) => ((a as string) < (b as string) ? -1 : 1))
  }
  return entries.flat(1)
}

/** A member of that name is not enough: what is in a JSON body, its client decides. */
export function isStream(value: object): boolean {
  const { pipe, getReader } = value as { pipe?: unknown; getReader?: unknown }
  return typeof pipe === 'function' || typeof getReader === 'function'
}

export function shown(value: object): unknown[] {
  if (types.isBoxedPrimitive(value)) return [value.valueOf()]
  if (types.isRegExp(value)) return [String(value)]
  const { toJSON, [Symbol.iterator]: iterator } = value as { toJSON?: unknown; [Symbol.iterator]?: unknown }
  if (typeof toJSON === 'function') return [toJSON.call(value)]
  if (typeof iterator === 'function') return iterated(value as Iterable<unknown>)
  throw OPAQUE
}

/** Who can be asked only once is not asked: the handler wants to. */
function iterated(value: Iterable<unknown>): unknown[] {
  const iterator = value[Symbol.iterator]()
  if ((iterator as unknown) === value) throw OPAQUE
  const items: unknown[] = []
  for (let result = iterator.next(); result.done !== true; result = iterator.next()) {
    if (items.push(result.value) > SUSPICIOUS_COUNT) throw OPAQUE
  }
  return items
}
