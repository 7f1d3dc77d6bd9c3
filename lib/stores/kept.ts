import type { Acquisition, StoredRecord, StoredReply } from '../../types/index.js'
import { InvalidOption } from '../errors.js'
import { Item } from './shelf.js'

/** What an entry takes beside its key, headers and body, roughly. */
const ENTRY_OVERHEAD = 300
const HEADER_OVERHEAD = 60

type Headers = StoredReply['headers']

/** A finished operation in the memory of this process. Its record is nobody else's: it is copied in and out. */
export class Kept extends Item {
  /** Monotonic milliseconds; infinite for ever. */
  readonly expires: number
  readonly #record: Exclude<StoredRecord, StoredReply> | Omit<StoredReply, 'body' | 'headers'>
  /** Name, value, name, value. */
  readonly #headers: readonly Headers[number][number][]
  /** One-byte text is kept as a string, which takes less memory and collects faster than a buffer. */
  readonly #body: Buffer | string

  constructor(key: string, record: StoredRecord, expires: number) {
    super(key, sizeOf(key, record))
    this.expires = expires
    const { createdAt } = record
    const fingerprint = compact(record.fingerprint)
    if (record.kind === 'tombstone') {
      this.#record = { kind: 'tombstone', fingerprint, createdAt, reason: record.reason }
      this.#headers = []
      this.#body = ''
    } else {
      const { statusCode, text, headers, body } = record
      this.#record = { kind: 'reply', fingerprint, createdAt, statusCode, text }
      this.#headers = headers.flatMap(([name, value]) => [name, Array.isArray(value) ? [...value] : value])
      this.#body = text ? body.toString('latin1') : Buffer.from(body)
    }
  }

  get fingerprint(): string {
    return this.#record.fingerprint
  }

  /** What a store says of it at this time. */
  at(now: number): Extract<Acquisition, { state: 'completed' }> {
    const ttlMs = this.expires === Number.POSITIVE_INFINITY ? null : Math.ceil(this.expires - now)
    return { state: 'completed', record: this.#copy(), ttlMs }
  }

  #copy(): StoredRecord {
    const record = this.#record
    if (record.kind === 'tombstone') return { ...record }
    const headers: Headers = []
    for (let at = 0; at < this.#headers.length; at += 2) {
      const value = this.#headers[at + 1] as Headers[number][1]
      headers.push([this.#headers[at] as string, Array.isArray(value) ? [...value] : value])
    }
    const body = this.#body
    return { ...record, headers, body: typeof body === 'string' ? Buffer.from(body, 'latin1') : Buffer.from(body) }
  }
}

/** The same text, but not as a part of a longer one, nor made of others, which the engine would keep as well. */
function compact(text: string): string {
  const copy = Buffer.from(text, 'latin1').toString('latin1')
  return copy === text ? copy : text
}

/** Bytes, roughly. */
export function sizeOf(key: string, record: StoredRecord): number {
  let size = ENTRY_OVERHEAD + key.length + record.fingerprint.length
  if (record.kind === 'tombstone') return size
  size += record.body.length
  for (const [name, value] of record.headers) size += name.length + value.length + HEADER_OVERHEAD
  return size
}

/** @throws FST_IDEMPOTENCY_INVALID_OPTION */
export function bound(store: string, name: string, value: number): number {
  if (Number.isSafeInteger(value) && value > 0) return value
  throw new InvalidOption(`${store} option "${name}" takes a positive integer, got ${String(value)} (${typeof value})`)
}
