import type { Acquisition, ListedKey, StoredRecord, StoredReply, TombstoneReason } from '../../../types/index.js'
import { Node } from './linked-map.js'

/* A finished operation in the memory of this process, in as few bytes as can be. */

/** What an entry takes beside its key, headers and body, roughly. */
const ENTRY_OVERHEAD = 300
const HEADER_OVERHEAD = 60

type Headers = StoredReply['headers']
/** Name, value, name, value. */
type FlatHeaders = readonly (string | string[])[]

/** What comes behind the last one, in the fingerprint that stores are given, is the same for all requests to a route. */
const SEPARATOR = '~'

const NONE: FlatHeaders = []
const NO_HEADERS: Headers = []

// V8 stores small integers (Smis) inline: times are whole milliseconds since the start of the process.
const EPOCH = Date.now()

/** What many entries have in common, and which is kept once. */
interface Head {
  /** The status code, or why there is a tombstone. */
  readonly outcome: number | TombstoneReason
  readonly headers: FlatHeaders
  /** Of the fingerprint: in those of one route, its name. */
  readonly end: string
  /** Bytes of the headers and the end, roughly. */
  readonly size: number
}

/** A finished operation in the memory of this process. Its record is nobody else's: it is copied in and out. */
export class MemoryEntry extends Node {
  /** Monotonic milliseconds; infinite for ever. */
  readonly expires: number
  /** Of the fingerprint. */
  readonly #start: string
  readonly #createdAt: number
  readonly #head: Head
  /** Text is kept as a string of its bytes, which takes less memory and collects faster than a buffer. */
  readonly #body: Buffer | string

  constructor(key: string, record: StoredRecord, expires: number) {
    super(key)
    this.expires = Math.floor(expires)
    const end = record.fingerprint.lastIndexOf(SEPARATOR) + 1
    this.#start = compact(record.fingerprint.slice(0, end))
    this.#createdAt = record.createdAt - EPOCH
    if (record.kind === 'tombstone') {
      this.#head = headOf(record.reason, NO_HEADERS, record.fingerprint.slice(end))
      this.#body = ''
    } else {
      this.#head = headOf(record.statusCode, record.headers, record.fingerprint.slice(end))
      this.#body = record.text ? record.body.toString('latin1') : Buffer.from(record.body)
    }
  }

  get fingerprint(): string {
    return this.#start + this.#head.end
  }

  get size(): number {
    return ENTRY_OVERHEAD + this.key.length + this.#start.length + this.#body.length + this.#head.size
  }

  /** What a store says of it at this time. */
  at(now: number): Extract<Acquisition, { state: 'completed' }> {
    return { state: 'completed', record: this.#copy(), ttlMs: this.#ttlAt(now) }
  }

  /** The same without headers and body. */
  listedAt(now: number): ListedKey {
    const { key, fingerprint } = this
    const createdAt = this.#createdAt + EPOCH
    return { key, state: 'completed', fingerprint, createdAt, outcome: this.#head.outcome, ttlMs: this.#ttlAt(now) }
  }

  get isReply(): boolean {
    return typeof this.#head.outcome === 'number'
  }

  #ttlAt(now: number): number | null {
    return this.expires === Number.POSITIVE_INFINITY ? null : Math.ceil(this.expires - now)
  }

  #copy(): StoredRecord {
    const { fingerprint } = this
    const createdAt = this.#createdAt + EPOCH
    const { outcome, headers: flat } = this.#head
    if (typeof outcome === 'string') return { kind: 'tombstone', fingerprint, createdAt, reason: outcome }
    const text = typeof this.#body === 'string'
    const body = typeof this.#body === 'string' ? Buffer.from(this.#body, 'latin1') : Buffer.from(this.#body)
    return { kind: 'reply', fingerprint, createdAt, statusCode: outcome, headers: unflatten(flat), body, text }
  }
}

let last: Head = { outcome: 0, headers: NONE, end: '', size: 0 }

/** Replies one after the other are mostly of the same route, and have the same status and headers. */
function headOf(outcome: number | TombstoneReason, headers: Headers, end: string): Head {
  const isSame = headers.length * 2 === last.headers.length && headers.every(isLike)
  if (isSame && outcome === last.outcome && end === last.end) return last
  const size = sizeOfHeaders(headers) + end.length
  last = { outcome, headers: isSame ? last.headers : flatten(headers), end: compact(end), size }
  return last
}

function flatten(headers: Headers): FlatHeaders {
  return headers.flatMap(([name, value]) => [name, Array.isArray(value) ? [...value] : value])
}

function isLike([name, value]: Headers[number], at: number): boolean {
  return name === last.headers[2 * at] && value === last.headers[2 * at + 1]
}

function unflatten(flat: FlatHeaders): Headers {
  const headers: Headers = []
  for (let at = 0; at < flat.length; at += 2) {
    const value = flat[at + 1] as string | string[]
    headers.push([flat[at] as string, Array.isArray(value) ? [...value] : value])
  }
  return headers
}

/** The same text, but not as a part of a longer one, nor made of others, which the engine would keep as well. */
function compact(text: string): string {
  const copy = Buffer.from(text, 'latin1').toString('latin1')
  return copy === text ? copy : text
}

/** Bytes, roughly. */
export function sizeOf(key: string, record: StoredRecord): number {
  const size = ENTRY_OVERHEAD + key.length + record.fingerprint.length
  return record.kind === 'tombstone' ? size : size + record.body.length + sizeOfHeaders(record.headers)
}

function sizeOfHeaders(headers: Headers): number {
  let size = 0
  for (const [name, value] of headers) size += name.length + value.length + HEADER_OVERHEAD
  return size
}
