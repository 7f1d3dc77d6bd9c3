import { validateHeaderName } from 'node:http'
import { InvalidOption } from './errors.js'
import { describe, describeStore } from './util/describe.js'

/* How options are checked: those of a registration, of a route, and of the stores. */

/** What an option takes, in words for the message, and as a check. */
export interface Rule {
  takes: string
  accepts: (value: unknown) => boolean
}

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
export const DURATION: Rule = { takes: 'a positive integer of milliseconds', accepts: isPositiveInteger }
/** What is checked elsewhere. */
export const ANYTHING: Rule = { takes: 'anything', accepts: () => true }
export const SWEEP_INTERVAL: Rule = {
  takes: 'a positive integer of milliseconds, or null for never',
  accepts: (value) => value === null || isPositiveInteger(value)
}
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
): T {
  const copy: Record<string, unknown> = {}
  for (const [name, value] of Object.entries(options)) {
    const rule = Object.hasOwn(rules, name) ? rules[name as keyof T] : undefined
    if (rule === undefined) {
      throw new InvalidOption(
        `${owner}option "${name}"${where} is not known; known are ${Object.keys(rules).join(', ')}`
      )
    }
    if (value === undefined) continue
    if (!rule.accepts(value)) {
      const got = name === 'store' ? describeStore(value) : describe(value)
      throw new InvalidOption(`${owner}option "${name}"${where} takes ${rule.takes}, got ${got}`)
    }
    copy[name] = copyOf(value)
  }
  return copy as T
}

/** What the user may change later must not change what was checked. */
function copyOf(value: unknown): unknown {
  if (Array.isArray(value)) return Object.freeze([...value])
  return value instanceof RegExp ? new RegExp(value, value.flags.replace('g', '')) : value
}
