import { randomUUID } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import { parseItem } from 'structured-headers'
import { KeyInvalid, KeyMissing } from '../errors.js'
import { isMultipart } from './content-type.js'
import { isStream } from './kinds-of-values.js'
import { isField } from './multipart.js'

/* Where a key may be, what is one, and who may leave it out. */

/** Where a route looks for its key, and what it accepts as one. */
export interface KeyRules {
  /** Lower-case name of the header, or `null`. */
  readonly header: string | null
  readonly field: string | null
  readonly keyFormat: 'any' | 'uuid' | 'structured' | RegExp
  readonly maxKeyLength: number
}

/** RFC 9562 §5.4 and §5.7: version 4 or 7 in the third group, variant 10xx in the fourth. */
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/i

/** Parameters of a quoted key are ignored, but parsed. */
const MAX_PARAMETERS = 1_024

const MALFORMED = 'is not a well-formed quoted string (RFC 9651)'

const NON_ASCII = /[\u0080-\uffff]/
const utf8 = new TextDecoder('utf-8', { fatal: true })

/**
 * The key that can be seen before there is a body, `undefined` for none.
 * @throws FST_IDEMPOTENCY_KEY_INVALID
 */
export function keyInHead(request: FastifyRequest, rules: KeyRules): string | undefined {
  const raw = keyInHeader(request, rules) ?? keyInQuery(request, rules)
  return raw === undefined ? undefined : parseKey(raw, rules)
}

/**
 * The key wherever it may be, such as one that a hook has provided since; `undefined` for none.
 * @throws FST_IDEMPOTENCY_KEY_INVALID
 */
export function keyAnywhere(request: FastifyRequest, rules: KeyRules): string | undefined {
  const raw = keyInHeader(request, rules) ?? keyInQuery(request, rules) ?? keyInBody(request, rules)
  return raw === undefined ? undefined : parseKey(raw, rules)
}

/** @throws FST_IDEMPOTENCY_KEY_MISSING where a key is required; it says where there may be one. */
export function missKey(rules: KeyRules & { required: boolean; getKey: unknown }): void {
  const { required, header, field, getKey } = rules
  if (!required) return
  const places: string[] = []
  if (getKey === null && header !== null) places.push(`the header ${header}`)
  if (getKey === null && field !== null) places.push(`the field ${field}`)
  throw new KeyMissing(places.join(' or ') || 'see the documentation of this service')
}

/** The raw key in the header; `undefined` for none. */
export function keyInHeader(request: FastifyRequest, rules: KeyRules): string | undefined {
  if (rules.header === null) return undefined
  const value: unknown = request.headers[rules.header]
  if (value === undefined) return undefined
  // Decoded before anything is trimmed: a byte of a letter can look like a space in Latin-1.
  const key = trim(decodeLatin1(Array.isArray(value) ? value.join() : String(value)))
  return key.includes(',') ? onlyOne(key) : key
}

/** Node, and who else passes headers on, joins repeated ones with commas: one key that was sent twice is one key. */
function onlyOne(list: string): string {
  const isQuoted = list.startsWith('"')
  const keys = new Set<string>()
  let start = 0
  let inQuotes = false
  for (let at = 0; at < list.length; at++) {
    const char = list[at]
    if (inQuotes && char === '\\') at++
    else if (isQuoted && char === '"') inQuotes = !inQuotes
    else if (char === ',' && !inQuotes) {
      keys.add(trim(list.slice(start, at)))
      start = at + 1
    }
  }
  const key = trim(list.slice(start))
  if (keys.add(key).size === 1) return key
  // What is wrong with a list of quoted keys, `parseKey` says.
  if (isQuoted) return list
  throw new KeyInvalid('was sent more than once')
}

/** The raw key in the query string; `undefined` for none. */
export function keyInQuery(request: FastifyRequest, rules: KeyRules): string | undefined {
  return rules.field === null ? undefined : asKey(ownField(request.query, rules.field))
}

/** The raw key in a parsed body: JSON, form or multipart; `undefined` for none. */
export function keyInBody(request: FastifyRequest, rules: KeyRules): string | undefined {
  if (rules.field === null) return undefined
  const value = ownField(request.body, rules.field)
  return asKey(isField(value) && isMultipart(request) ? value.value : value)
}

/** Is there a body that may hold the field, but is not parsed, so that nobody can tell? */
export function isInUnparsedBody(request: FastifyRequest): boolean {
  const { body } = request
  if (body === undefined || body === null) return isMultipart(request)
  if (typeof body === 'string') return !/^text\//i.test(request.headers['content-type'] ?? '')
  return typeof body === 'object' && (ArrayBuffer.isView(body) || isStream(body))
}

function ownField(fields: unknown, name: string): unknown {
  if (typeof fields !== 'object' || fields === null || Array.isArray(fields) || !Object.hasOwn(fields, name))
    return undefined
  return (fields as Record<string, unknown>)[name]
}

function asKey(value: unknown): string | undefined {
  if (value === undefined) return undefined
  if (Array.isArray(value)) throw new KeyInvalid('was sent more than once')
  if (typeof value !== 'string') throw new KeyInvalid('must be a string')
  return value
}

/**
 * The client's key without quotes and parameters. `"abc"` and `abc` are the same key.
 * @throws FST_IDEMPOTENCY_KEY_INVALID
 */
export function parseKey(raw: unknown, rules: Pick<KeyRules, 'keyFormat' | 'maxKeyLength'>): string {
  if (typeof raw !== 'string') throw new KeyInvalid('must be a single string')
  const { keyFormat, maxKeyLength } = rules
  const value = trim(raw)
  const isQuoted = value.startsWith('"')
  if (keyFormat === 'structured' && !isQuoted && value !== '') {
    throw new KeyInvalid('must be a quoted string (RFC 9651)')
  }
  // Measured before anything else looks at it: in a body it may be as large as that.
  const key = isQuoted ? unquote(value, maxKeyLength) : value
  // A UTF-16 code unit is one to three bytes of UTF-8: most keys need not be measured.
  if (key.length > maxKeyLength || (key.length * 3 > maxKeyLength && Buffer.byteLength(key) > maxKeyLength)) {
    throw tooLong(maxKeyLength)
  }
  if (key.trim() === '') throw new KeyInvalid('must not be blank')
  if (keyFormat === 'uuid') {
    if (!UUID.test(key)) throw new KeyInvalid('must be a UUID, version 4 or 7')
    // RFC 9562 §4: they are the same in upper and lower case.
    return key.toLowerCase()
  }
  if (keyFormat instanceof RegExp) {
    keyFormat.lastIndex = 0
    if (!keyFormat.test(key)) throw new KeyInvalid('does not have the required form')
  }
  return key
}

function tooLong(maxKeyLength: number): Error {
  return new KeyInvalid(`must not be longer than ${maxKeyLength} bytes`)
}

/** The string of a structured field with one item (RFC 9651 §3.3). The parser takes no other parameter behind a date. */
function unquote(value: string, maxKeyLength: number): string {
  // With an escape, a byte of the key takes two.
  const most = 2 * maxKeyLength + 2 + MAX_PARAMETERS
  if (value.length > most) throw new KeyInvalid(`must not be longer than ${most} bytes, with quotes and parameters`)
  try {
    // What begins with a quote is a string.
    return parseItem(value)[0] as string
  } catch {
    throw new KeyInvalid(MALFORMED)
  }
}

/** RFC 9110 §5.5: without the spaces and tabs around it. */
function trim(value: string): string {
  // Not by an expression, which would try each blank of a long row of them for the last.
  let [start, end] = [0, value.length]
  while (start < end && isBlank(value.charCodeAt(start))) start++
  while (end > start && isBlank(value.charCodeAt(end - 1))) end--
  return value.slice(start, end)
}

function isBlank(code: number): boolean {
  return code === 0x20 || code === 0x09
}

/** Node reads header bytes as Latin-1; a key is the same key in a header and in a body. */
function decodeLatin1(value: string): string {
  if (!NON_ASCII.test(value)) return value
  try {
    return utf8.decode(Buffer.from(value, 'latin1'))
  } catch {
    return value
  }
}

export function generateKey(): string {
  return randomUUID()
}
