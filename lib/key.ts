import { hash, randomUUID } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import { KeyInvalid } from './errors.js'
import { isMultipart, isStream } from './fingerprint.js'

/** Where a route looks for its key, and what it accepts as one. */
export interface KeyRules {
  /** Lower-case name of the header, or `null`. */
  readonly header: string | null
  readonly field: string | null
  readonly keyFormat: 'any' | 'uuid' | 'structured' | RegExp
  readonly maxKeyLength: number
}

/** RFC 9562 §5.4: version 4 in the third group, variant 10xx in the fourth. */
const UUID_V4 = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/i

/** RFC 9651 §3.3.3: printable ASCII in quotes, in which only `"` and `\` are escaped. */
const QUOTED = String.raw`"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"`

/** A character in a display string, as the bytes of its UTF-8 (RFC 3629 §4): what is none fails (RFC 9651 §4.2.10). */
const PERCENT_ENCODED = [
  '%[0-7]H',
  '%(?:c[2-9a-f]|dH)T',
  '%(?:e0%[ab]H|e[1-9abcef]T|ed%[89]H)T',
  '%(?:f0%[9ab]H|f[1-3]T|f4%8H)TT'
]
  .join('|')
  .replaceAll('T', '%[89ab]H')
  .replaceAll('H', '[0-9a-f]')

/** RFC 9651 §3.3: integers and decimals, tokens, byte sequences, booleans, dates and display strings. */
const BARE_ITEM = [
  QUOTED,
  String.raw`-?\d{1,12}\.\d{1,3}`,
  String.raw`@?-?\d{1,15}`,
  String.raw`[A-Za-z*][\w!#$%&'*+.^\x60|~:/-]*`,
  ':[A-Za-z0-9+/=]*:',
  String.raw`\?[01]`,
  String.raw`%"(?:[\x20-\x21\x23-\x24\x26-\x7e]|${PERCENT_ENCODED})*"`
].join('|')

/** RFC 9651 §4.2.3: a string, with the parameters of §3.1.2 behind it. */
const STRUCTURED_STRING = new RegExp(`^(${QUOTED})(?:; *[a-z*][a-z0-9_.*-]*(?:=(?:${BARE_ITEM}))?)*$`)

const NON_ASCII = /[\u0080-\uffff]/
const utf8 = new TextDecoder('utf-8', { fatal: true })

/** The raw key in the header; `undefined` for none. */
export function keyInHeader(request: FastifyRequest, rules: KeyRules): string | undefined {
  if (rules.header === null) return undefined
  const value = request.headers[rules.header]
  if (value === undefined) return undefined
  if (typeof value !== 'string') throw new KeyInvalid('was sent more than once')
  // Decoded before anything is trimmed: a byte of a letter can look like a space in Latin-1.
  const key = trim(decodeLatin1(value))
  // Node joins repeated headers with a comma: a bare key with one is two keys.
  if (key.includes(',') && !key.startsWith('"')) throw new KeyInvalid('was sent more than once')
  return key
}

/** The raw key in the query string; `undefined` for none. */
export function keyInQuery(request: FastifyRequest, rules: KeyRules): string | undefined {
  return rules.field === null ? undefined : asKey(ownField(request.query, rules.field))
}

/** The raw key in a parsed body: JSON, form or multipart; `undefined` for none. */
export function keyInBody(request: FastifyRequest, rules: KeyRules): string | undefined {
  if (rules.field === null) return undefined
  const value = ownField(request.body, rules.field)
  return asKey(isPart(value) && isMultipart(request) ? value.value : value)
}

/** Is there a body that may hold the field, but is not parsed, so that nobody can tell? */
export function isInUnparsedBody(request: FastifyRequest): boolean {
  const { body } = request
  if (body === undefined || body === null) return isMultipart(request)
  if (typeof body === 'string') return !/^text\//i.test(request.headers['content-type'] ?? '')
  return ArrayBuffer.isView(body) || isStream(body)
}

function ownField(fields: unknown, name: string): unknown {
  if (typeof fields !== 'object' || fields === null || Array.isArray(fields) || !Object.hasOwn(fields, name))
    return undefined
  return (fields as Record<string, unknown>)[name]
}

/** @fastify/multipart with `attachFieldsToBody: true` wraps each field. Anybody's JSON may look like that as well. */
function isPart(value: unknown): value is { value: unknown } {
  return typeof value === 'object' && value !== null && 'fieldname' in value && 'value' in value
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
  const key = unquote(raw, rules.keyFormat === 'structured')
  if (key.trim() === '') throw new KeyInvalid('must not be blank')
  // A UTF-16 code unit is at most three bytes of UTF-8: short keys need not be measured.
  if (key.length * 3 > rules.maxKeyLength && Buffer.byteLength(key) > rules.maxKeyLength) {
    throw new KeyInvalid(`must not be longer than ${rules.maxKeyLength} bytes`)
  }
  if (rules.keyFormat === 'uuid') {
    if (!UUID_V4.test(key)) throw new KeyInvalid('must be a UUID, version 4')
  } else if (rules.keyFormat instanceof RegExp) {
    rules.keyFormat.lastIndex = 0
    if (!rules.keyFormat.test(key)) throw new KeyInvalid('does not have the required form')
  }
  return key
}

function unquote(raw: string, mustBeQuoted: boolean): string {
  const value = trim(raw)
  if (!value.startsWith('"')) {
    if (mustBeQuoted && value !== '') throw new KeyInvalid('must be a quoted string (RFC 9651)')
    return value
  }
  const quoted = STRUCTURED_STRING.exec(value)?.[1]
  if (quoted === undefined) throw new KeyInvalid('is not a well-formed quoted string (RFC 9651)')
  return quoted.slice(1, -1).replaceAll(/\\(["\\])/g, '$1')
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

/**
 * The key under which a store keeps an operation. JSON frames scope and key unambiguously, and escapes lone
 * surrogates that would otherwise all hash alike.
 */
export function storageKey(scope: string | null, key: string): string {
  return hash('sha256', JSON.stringify([scope, key]), 'base64url')
}

export function generateKey(): string {
  return randomUUID()
}

/** A UUID made of the storage key and a label, with the version and variant bits of a version 4 UUID. */
export function deriveKey(storageKey: string, label: string, credentials: string | null): string {
  const hex = hash('sha256', JSON.stringify([storageKey, label, credentials]), 'hex')
  const variant = ((Number.parseInt(hex.charAt(16), 16) & 0x3) | 0x8).toString(16)
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-${variant}${hex.slice(17, 20)}-${hex.slice(20, 32)}`
}
