import type { StoredHeader, StoredRecord, StoredReply, Tombstone, TombstoneReason } from '../../types/index.js'
import { UnreadableAnswer } from '../errors.js'

/*
 * A record as bytes: four bytes for the length of the head and four for that of the body, the head as JSON, and
 * the body as it is. A byte of a length holds seven bits of it, so that a record of ASCII text is ASCII text itself, which
 * clients send for less than bytes.
 *
 *   reply      [fingerprint, createdAt, statusCode, text (1 or 0), [[name, value], …]]
 *   tombstone  [fingerprint, createdAt, reason]
 */

const LENGTH_BYTES = 8
/** What fits into 28 bits, which is more than most servers take. */
const LONGEST = 2 ** 28 - 1
const REASONS: readonly unknown[] = [
  'too-large',
  'stream-failed',
  'hijacked',
  'redact-failed',
  'settled'
] satisfies TombstoneReason[]

/** The bytes of a record, behind `prefix`. The body is copied once, into the place that it is sent from. */
export function encodeRecord(record: StoredRecord, prefix: Buffer): Buffer {
  const { fingerprint, createdAt } = record
  const head = JSON.stringify(
    record.kind === 'tombstone'
      ? [fingerprint, createdAt, record.reason]
      : [fingerprint, createdAt, record.statusCode, record.text ? 1 : 0, record.headers]
  )
  const headLength = Buffer.byteLength(head)
  const body = record.kind === 'reply' ? record.body : null
  const start = prefix.length + LENGTH_BYTES
  const bodyLength = body?.length ?? 0
  if (headLength > LONGEST || bodyLength > LONGEST) throw new RangeError('The reply is too large to be stored')
  const bytes = Buffer.allocUnsafe(start + headLength + bodyLength)
  prefix.copy(bytes)
  writeLength(bytes, headLength, prefix.length)
  writeLength(bytes, bodyLength, prefix.length + 4)
  bytes.write(head, start)
  body?.copy(bytes, start + headLength)
  return bytes
}

/** How the head of every record of this fingerprint begins, and that of no other. */
export function headStart(fingerprint: string): string {
  return `[${JSON.stringify(fingerprint)},`
}

/**
 * The record in `bytes`, which starts at `offset`.
 * @throws when the bytes are not those of a record.
 */
export function decodeRecord(bytes: Buffer, offset: number): StoredRecord {
  const end = headEnd(bytes, offset)
  if (bytes.length !== end + readLength(bytes, offset + 4)) throw undecodable()
  const head = decodeHead(bytes, offset, end)
  return head.kind === 'reply' ? { ...head, body: bytes.subarray(end) } : head
}

/** Of a record, what can be told in a few bytes: its reply has a status, its tombstone a reason. */
export interface RecordSummary {
  readonly fingerprint: string
  readonly createdAt: number
  readonly outcome: number | TombstoneReason
}

/**
 * The same of a record of which the first bytes alone are at hand; `null` where these are too few.
 * @throws when they are not those of a record.
 */
export function decodeSummary(bytes: Buffer, offset: number): RecordSummary | null {
  const end = headEnd(bytes, offset)
  return bytes.length < end ? null : summaryOf(decodeHead(bytes, offset, end))
}

export function summaryOf(record: Head): RecordSummary {
  const { fingerprint, createdAt } = record
  return { fingerprint, createdAt, outcome: record.kind === 'reply' ? record.statusCode : record.reason }
}

type Head = Tombstone | Omit<StoredReply, 'body'>

function headEnd(bytes: Buffer, offset: number): number {
  return offset + LENGTH_BYTES + readLength(bytes, offset)
}

function decodeHead(bytes: Buffer, offset: number, end: number): Head {
  let head: unknown
  try {
    head = JSON.parse(bytes.toString('utf8', offset + LENGTH_BYTES, end))
  } catch {
    // What cannot be read is no array either.
  }
  if (!Array.isArray(head) || typeof head[0] !== 'string' || !Number.isFinite(head[1])) throw undecodable()
  const [fingerprint, createdAt, third, text, headers] = head as [string, number, ...unknown[]]
  if (head.length === 3 && isReason(third)) return { kind: 'tombstone', fingerprint, createdAt, reason: third }
  if (head.length !== 5 || !isStatus(third) || (text !== 0 && text !== 1) || !areHeaders(headers)) throw undecodable()
  return { kind: 'reply', fingerprint, createdAt, statusCode: third, headers, text: text === 1 }
}

/** Four bytes of seven bits each, the highest first. */
export function writeLength(bytes: Buffer, length: number, offset: number): void {
  for (let at = 0; at < 4; at++) bytes[offset + at] = (length >>> (21 - 7 * at)) & 0x7f
}

/** Not a number where the bytes end before the length does. */
export function readLength(bytes: Buffer, offset: number): number {
  let length = 0
  for (let at = 0; at < 4; at++) length = length * 128 + (bytes[offset + at] as number)
  return length
}

export function isReason(value: unknown): value is TombstoneReason {
  return REASONS.includes(value)
}

export function isStatus(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 100 && (value as number) <= 599
}

export function areHeaders(value: unknown): value is StoredHeader[] {
  return Array.isArray(value) && value.every(isHeader)
}

function isHeader(value: unknown): value is StoredHeader {
  if (!Array.isArray(value) || value.length !== 2 || typeof value[0] !== 'string') return false
  return typeof value[1] === 'string' || (Array.isArray(value[1]) && value[1].every((item) => typeof item === 'string'))
}

function undecodable(): Error {
  return new UnreadableAnswer('A stored idempotency record could not be decoded')
}
