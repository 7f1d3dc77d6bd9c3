import { createHash } from 'node:crypto'

/* Text as databases take it. */

/** The longest key that is stored as it is, in bytes; an index has no room for much longer ones. */
const LONGEST_KEY = 500

/** Text without NUL, and without lone surrogates, which PostgreSQL does not take. */
export function toText(text: string): string {
  const wellFormed = text.replace(/\p{Surrogate}/gu, '\ufffd')
  return /[\\\0]/.test(wellFormed) ? wellFormed.replaceAll('\\', '\\\\').replaceAll('\0', '\\0') : wellFormed
}

/** The reverse of `toText`. */
export function fromText(text: string): string {
  return text.includes('\\') ? text.replace(/\\(.)/gs, (_, escaped) => (escaped === '0' ? '\0' : escaped)) : text
}

/** A key as it is stored. What starts with `\h` is no escaped text, so no key can be taken for the hash of another. */
export function toKey(key: string): string {
  const text = toText(key)
  return Buffer.byteLength(text) <= LONGEST_KEY ? text : `\\h${sha256(text)}`
}

/** The reverse of `toKey`; `null` for what was too long to be stored as it is. */
export function fromKey(stored: string): string | null {
  return stored.startsWith('\\h') ? null : fromText(stored)
}

export function sha256(text: string): string {
  return createHash('sha256').update(text).digest('hex')
}
