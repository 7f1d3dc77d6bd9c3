import { hash } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import { InvalidOption } from './errors.js'

/**
 * A fingerprint is `<head>.<payload>`: two hashes, of which the second may be missing while the payload is not
 * known. The head is known as soon as the request has headers.
 */
const SEPARATOR = '.'

/** Characters of base64url: 128 bits are enough against a second preimage, and keep stored records small. */
const HASH_LENGTH = 22

/** What a payload's hash is made of starts with its kind, so that the kinds never meet. */
const NO_BODY = '-'
const VALUE = 'v'

export function constraintsOf(constraints: object | undefined): string {
  return constraints === undefined ? '' : JSON.stringify(Object.entries(constraints).map(([n, v]) => [n, String(v)]))
}
export function credentialsOf(request: FastifyRequest): string | null {
  return request.headers.authorization ?? request.headers.cookie ?? null
}
export function headOf(
  request: FastifyRequest,
  rules: { route: string; constraints: string; target: ((request: FastifyRequest) => string) | null },
  credentials: string | null
): string {
  const target = JSON.stringify(
    rules.target
      ? [request.method, rules.target(request)]
      : [request.method, request.host, rules.route, rules.constraints, request.params, request.query]
  )
  return digest(target + credentials) + digest(target).slice(0, 4)
}
export function join(head: string, payload: string): string {
  return `${head}${SEPARATOR}${payload}`
}
export function difference(a: string, b: string): 'target' | 'credentials' | 'payload' | null {
  if (a === b || a === '' || b === '') return null
  const [ha, hb] = [headIn(a), headIn(b)]
  if (ha !== hb) return ha.slice(22) === hb.slice(22) ? 'credentials' : 'target'
  return knowsPayload(a) && knowsPayload(b) ? 'payload' : null
}
function headIn(fingerprint: string): string {
  return fingerprint.slice(0, fingerprint.indexOf(SEPARATOR))
}

/** Does the fingerprint say anything of the payload? */
export function knowsPayload(fingerprint: string): boolean {
  return fingerprint !== '' && !fingerprint.endsWith(SEPARATOR)
}

/**
 * The hash of what a user's function made of a request; empty for an empty result.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION for anything else, which would compare nothing and not say so.
 */
export function payloadOf(result: unknown): string {
  if (typeof result === 'string') return result === '' ? '' : digest(result)
  if (isBytes(result)) return result.byteLength === 0 ? '' : digest(bytes(result))
  throw new InvalidOption(`option "fingerprint" must return a string or a Buffer, got ${typeof result}`)
}

/**
 * The payload by value: parsed JSON and forms without regard to member order and white space, other bodies by
 * their bytes, multipart bodies by fields and file contents. Empty when the body is not at hand, as with a
 * stream that the handler reads itself.
 */
export function payloadOfBody(request: FastifyRequest): string | Promise<string> {
  const body: unknown = request.body
  if (body === undefined || body === null) {
    if (!hasBody(request)) return digest(NO_BODY)
    return body === null && isJson(request) ? digest(VALUE + canonicalJson(null)) : ''
  }
  if (typeof body !== 'object' || isBytes(body)) return byValue(body)
  if (isStream(body)) return ''
  return isMultipart(request) ? multipart(body) : byValue(body)
}

/** Empty where a part of the value does not show what is in it. */
function byValue(value: unknown): string {
  try {
    return digest(VALUE + canonicalJson(value))
  } catch (error) {
    if (error === OPAQUE) return ''
    throw error
  }
}

function digest(data: string | Uint8Array): string {
  return hash('sha256', data, 'base64url').slice(0, HASH_LENGTH)
}

function isBytes(value: unknown): value is NodeJS.ArrayBufferView {
  return ArrayBuffer.isView(value)
}

function bytes(view: NodeJS.ArrayBufferView): Uint8Array {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength)
}

function hasBody(request: FastifyRequest): boolean {
  const length = request.headers['content-length']
  return request.headers['transfer-encoding'] !== undefined || (length !== undefined && length !== '0')
}

function isJson(request: FastifyRequest): boolean {
  return /^application\/(?:[^;]*\+)?json\b/i.test(request.headers['content-type'] ?? '')
}

export function isMultipart(request: FastifyRequest): boolean {
  return /^multipart\//i.test(request.headers['content-type'] ?? '')
}

/** A part of @fastify/multipart with `attachFieldsToBody: true`. */
interface Part {
  type?: 'file' | 'field'
  value?: unknown
  filename?: string
  mimetype?: string
  file?: { bytesRead: number }
  toBuffer?: () => Promise<Buffer>
}

async function multipart(body: object): Promise<string> {
  const fields: [string, unknown[]][] = []
  try {
    for (const [name, value] of Object.entries(body)) {
      const parts: unknown[] = []
      for (const part of Array.isArray(value) ? value : [value]) parts.push(await contentOf(part))
      fields.push([name, parts])
    }
  } catch {
    // Somebody has read and dropped the file: its content is not known.
    return ''
  }
  return byValue(Object.fromEntries(fields))
}

async function contentOf(part: unknown): Promise<unknown> {
  const { type, value, filename, mimetype, file, toBuffer } = (part ?? {}) as Part
  if (type === 'field') return value
  if (typeof toBuffer !== 'function') return part
  const content = await toBuffer.call(part)
  if (content.length === 0 && file?.bytesRead) throw new Error('The file was read by others')
  return [filename, mimetype, content]
}

/** One level of nesting that is being written. */
interface Level {
  readonly value: object
  readonly close: string
  /** Member names in order; `null` for an array. */
  readonly names: string[] | null
  readonly items: readonly unknown[]
  next: number
}

/** A member of that name is not enough: what is in a JSON body, its client decides. */
export function isStream(body: object): boolean {
  const { pipe, getReader } = body as { pipe?: unknown; getReader?: unknown }
  return typeof pipe === 'function' || typeof getReader === 'function'
}

/** Below this depth nobody pays for looking out for cycles. */
const SUSPICIOUS_DEPTH = 64
/** Below this number of objects nobody pays for looking out for those that are met again and again. */
const SUSPICIOUS_COUNT = 100_000

/** Thrown where a value hides what is in it: two of them can be equal to the eye, and not be the same. */
const OPAQUE = Symbol('opaque')

/** Thrown for what JSON cannot say, or is suspiciously deep or large. */
const UNFIT = Symbol('unfit')

/**
 * JSON with the members of every object in order. Of ordinary bodies an ordered copy is made, which the engine writes
 * faster than anybody else; how deep or large a body is, however, is its client's choice.
 */
export function canonicalJson(root: unknown): string {
  budget = SUSPICIOUS_COUNT
  try {
    return JSON.stringify(ordered(root, 0))
  } catch {
    return writeCarefully(root)
  }
}

/** How many more objects are copied without suspicion. */
let budget = 0

/** The same value with the members of its objects in order. (Names that are numbers come first, as in every object.) */
function ordered(value: unknown, depth: number): unknown {
  if (typeof value === 'string' || typeof value === 'boolean' || value === null) return value
  if (typeof value === 'number' && Number.isFinite(value)) return value
  if (typeof value !== 'object' || depth === SUSPICIOUS_DEPTH || budget-- === 0) throw UNFIT
  if (Array.isArray(value)) {
    const items: unknown[] = []
    for (let at = 0; at < value.length; at++) items.push(ordered(value[at], depth + 1))
    return items
  }
  if (!isPlain(value) || Symbol.iterator in value) throw UNFIT
  const members: Record<string, unknown> = {}
  for (const name of sort(Object.keys(value))) {
    // To set it would be to set the copy's prototype.
    if (name === '__proto__') throw UNFIT
    members[name] = ordered((value as Record<string, unknown>)[name], depth + 1)
  }
  return members
}

/**
 * The same for all else, without recursion. A custom parser can make what JSON cannot: a cycle is written as a mark, and
 * who meets the same objects too often is opaque, because there may be no end to it.
 */
function writeCarefully(root: unknown): string {
  const levels: Level[] = []
  let ancestors: Set<object> | null = null
  let opened = 0
  const met = new Set<object>()
  let out = ''
  let value: unknown = root
  for (;;) {
    const scalar = scalarJson(value)
    if (scalar !== null) {
      out += scalar
    } else if (ancestors?.has(value as object)) {
      out += '*'
    } else {
      if (++opened > SUSPICIOUS_COUNT && met.size === met.add(value as object).size) throw OPAQUE
      const level = open(value as object)
      out += level.names === null ? '[' : '{'
      levels.push(level)
      if (ancestors !== null) ancestors.add(level.value)
      else if (levels.length === SUSPICIOUS_DEPTH) ancestors = new Set(levels.map(({ value }) => value))
    }
    let level = levels.at(-1)
    while (level !== undefined && level.next === level.items.length) {
      out += level.close
      levels.pop()
      ancestors?.delete(level.value)
      level = levels.at(-1)
    }
    if (level === undefined) return out
    if (level.next > 0) out += ','
    if (level.names !== null) out += `${JSON.stringify(level.names[level.next])}:`
    value = level.items[level.next++]
  }
}

function scalarJson(value: unknown): string | null {
  switch (typeof value) {
    case 'string':
      return JSON.stringify(value)
    case 'object':
      if (value === null) return 'null'
      if (isBytes(value)) return `#${digest(bytes(value))}`
      if (value instanceof ArrayBuffer) return `#${digest(new Uint8Array(value))}`
      if (value instanceof Date) return `@${value.getTime()}`
      return null
    case 'bigint':
      return `${value}n`
    default:
      return String(value)
  }
}

function open(value: object): Level {
  const names = Array.isArray(value) ? null : namesOf(value)
  if (names === null) {
    const items = Array.isArray(value) ? value : [...(value as Iterable<unknown>)]
    return { value, close: ']', names, items, next: 0 }
  }
  const members = value as Record<string, unknown>
  return { value, close: '}', names, items: names.map((name) => members[name]), next: 0 }
}

/** The names of an object's members in order; `null` for Map, Set, URLSearchParams, FormData. */
function namesOf(value: object): string[] | null {
  if (Symbol.iterator in value) return null
  const names = Object.keys(value)
  if (names.length === 0 && !isPlain(value)) throw OPAQUE
  return sort(names)
}

function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return prototype === null || Object.getPrototypeOf(prototype) === null
}

/** Above this number of names insertion is slower than the engine's sort, which needs memory of its own. */
const FEW_NAMES = 32

function sort(names: string[]): string[] {
  if (names.length > FEW_NAMES) return names.sort()
  for (let end = 1; end < names.length; end++) {
    const name = names[end] as string
    let at = end
    for (; at > 0 && (names[at - 1] as string) > name; at--) names[at] = names[at - 1] as string
    names[at] = name
  }
  return names
}
