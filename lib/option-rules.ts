import { validateHeaderName } from 'node:http'
import { parse } from '@lukeed/ms'
import type { Duration } from '../types/index.js'
import { InvalidOption } from './errors.js'
import { describe, describeStore } from './util/describe.js'

/* How options are checked: those of a registration, of a route, and of the stores. */

/** What an option takes, in words for the message, and as a check. */
export interface Rule {
  takes: string
  accepts: (value: unknown) => boolean
  /** What is made of it, before it is looked at whether it is accepted. */
  reads?: (value: unknown) => unknown
}

/** Options that were checked: durations are milliseconds. */
export type Checked<T> = { [Name in keyof T]: Duration extends T[Name] ? Exclude<T[Name], string> : T[Name] }

export const isPositiveInteger = (value: unknown) => Number.isSafeInteger(value) && (value as number) > 0
export const isFunction = (value: unknown) => typeof value === 'function'
const isSyncFunction = (value: unknown) => typeof value === 'function' && value.constructor.name !== 'AsyncFunction'
export const isHeaderName = (value: unknown) => {
  try {
    validateHeaderName(value as string)
    return true
  } catch {
    return false
  }
}
export const listOf = (accepts: Rule['accepts']) => (value: unknown) => Array.isArray(value) && value.every(accepts)
export const oneOf = (...values: string[]): Rule => ({
  takes: values.map((value) => `'${value}'`).join(' or '),
  accepts: (value) => values.includes(value as string)
})

export const BOOLEAN: Rule = { takes: 'true or false', accepts: (value) => typeof value === 'boolean' }
const A_DURATION = "a positive integer of milliseconds or a text such as '24h'"
export const DURATION: Rule = { takes: A_DURATION, accepts: isPositiveInteger, reads: milliseconds }
/** @param otherwise What `null` is. */
export const durationOrNull = (otherwise: string): Rule => ({
  takes: `${A_DURATION}, or null ${otherwise}`,
  accepts: (value) => value === null || isPositiveInteger(value),
  reads: milliseconds
})
/** What is checked elsewhere. */
export const ANYTHING: Rule = { takes: 'anything', accepts: () => true }
export const SWEEP_INTERVAL = durationOrNull('for never')
export const TEXT: Rule = { takes: 'a string', accepts: (value) => typeof value === 'string' }
export const COUNT: Rule = { takes: 'a positive integer', accepts: isPositiveInteger }
export const BYTES: Rule = { takes: 'a positive integer of bytes', accepts: isPositiveInteger }
export const FUNCTION: Rule = { takes: 'a function', accepts: isFunction }
export const SYNC_FUNCTION: Rule = { takes: 'a function that answers at once (not async)', accepts: isSyncFunction }
export const HEADER: Rule = {
  takes: 'a header name, or false',
  accepts: (value) => value === false || isHeaderName(value)
}

/**
 * A shallow copy without the options that are `undefined`.
 * @param where Behind an option's name in messages, such as ` of POST /orders`.
 * @param owner In front of it, such as `MemoryStore `.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION, which names the option
 */
export function checked<T extends object>(
  options: object,
  rules: { readonly [Name in keyof T]-?: Rule },
  { where = '', owner = '' } = {}
): Checked<T> {
  const copy: Record<string, unknown> = {}
  for (const [name, given] of Object.entries(options)) {
    const rule = Object.hasOwn(rules, name) ? rules[name as keyof T] : undefined
    if (rule === undefined) {
      throw new InvalidOption(
        `${owner}option "${name}"${where} is not known; known are ${Object.keys(rules).join(', ')}`
      )
    }
    if (given === undefined) continue
    const value = rule.reads === undefined ? given : rule.reads(given)
    if (!rule.accepts(value)) {
      const got = name === 'store' ? describeStore(given) : describe(given)
      throw new InvalidOption(`${owner}option "${name}"${where} takes ${rule.takes}, got ${got}`)
    }
    copy[name] = copyOf(value)
  }
  return copy as Checked<T>
}

/** A text is read as those of other plugins of Fastify are; whatever is no duration stays what it is. */
export function milliseconds(value: unknown): unknown {
  if (typeof value !== 'string') return value
  const ms = parse(value)
  return ms === undefined ? value : Math.round(ms)
}

/**
 * A duration that is given elsewhere than in options.
 * @param owner What takes it.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function durationOf(given: Duration, owner: string): number {
  const ms = milliseconds(given)
  if (isPositiveInteger(ms)) return ms as number
  throw new InvalidOption(`${owner} takes ${A_DURATION}, got ${describe(given)}`)
}

/** What the user may change later must not change what was checked. */
function copyOf(value: unknown): unknown {
  if (Array.isArray(value)) return Object.freeze([...value])
  return value instanceof RegExp ? new RegExp(value, value.flags.replace('g', '')) : value
}
