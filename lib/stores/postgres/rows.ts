import type { Acquisition, StoredHeader, StoredRecord, StoredStep } from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { areHeaders, isReason, isStatus } from '../record-codec.js'
import { fromText, sha256, toKey, toText } from '../storable-text.js'

/* Rows of the table, from and to records and answers. */

/** All columns as the server wrote them, whatever parsers the application has set for its own. */
export const AS_TEXT = { getTypeParser: () => (value: string) => value }

/** What a claim or a look has found, as text. */
export interface FoundRow {
  found: 'acquired' | 'running' | 'abandoned' | 'ended' | 'completed' | 'locked' | 'unknown'
  attempt: string | null
  fingerprint: string | null
  left_ms: string | null
  created_at: string | null
  status_code: string | null
  headers: string | null
  body: string | null
  body_is_text: string | null
  tombstone: string | null
  steps: string | null
}

/** What is sent to those who wait for a key. */
export function messageOf(key: string): string {
  return sha256(toKey(key))
}

/** The parameters of a completion: fingerprint, created_at, status_code, headers, body, body_is_text, tombstone. */
export function recordValues(record: StoredRecord): unknown[] {
  const { fingerprint, createdAt } = record
  const common = [toText(fingerprint), createdAt]
  if (record.kind === 'tombstone') return [...common, null, null, null, null, record.reason]
  const headers = record.headers.map(([name, value]) => [
    toText(name),
    Array.isArray(value) ? value.map(toText) : toText(value)
  ])
  // The body is copied, because it is sent later: perhaps there is no connection free yet.
  return [...common, record.statusCode, JSON.stringify(headers), Buffer.from(record.body), record.text, null]
}

/** A step: how it begins, up to its result, which no other step does, and all of it. JSON has no newlines of its own, and no NUL. */
export function stepValues([name, result]: StoredStep): [start: string, step: string] {
  return [`[${JSON.stringify(name)},`, `${JSON.stringify([name, result])}\n`]
}

/** @throws when the row is not one of ours. */
export function acquisitionOf(row: FoundRow, leaseMs: number): Acquisition {
  const fingerprint = fromText(row.fingerprint ?? '')
  const attempt = Number(row.attempt)
  switch (row.found) {
    case 'acquired':
      return { state: 'acquired', attempt, ...stepsOf(row) }
    case 'locked':
      // Nobody sees into a transaction: what it looks like is not known, nor how long it will take.
      return { state: 'running', fingerprint: '', leaseMs }
    case 'running':
      return { state: 'running', fingerprint, leaseMs: Math.max(0, Math.ceil(Number(row.left_ms))), ...stepsOf(row) }
    case 'abandoned':
      return { state: 'abandoned', fingerprint, attempt, ...stepsOf(row) }
    case 'ended':
      return { state: 'abandoned', fingerprint, attempt, ended: true, ...stepsOf(row) }
    case 'completed': {
      const ttlMs = row.left_ms === null ? null : Math.max(0, Math.ceil(Number(row.left_ms)))
      return { state: 'completed', record: recordOf(row, fingerprint), ttlMs }
    }
    default:
      throw undecodable()
  }
}

/** What an answer says of steps: nothing where there are none. */
function stepsOf({ steps: lines }: FoundRow): { steps?: StoredStep[] } {
  if (!lines) return {}
  if (!lines.endsWith('\n')) throw undecodable()
  return { steps: lines.slice(0, -1).split('\n').map(stepOf) }
}

function stepOf(json: string): StoredStep {
  const step = parsed(json)
  if (!Array.isArray(step) || step.length !== 2 || !step.every((text) => typeof text === 'string')) throw undecodable()
  return step as unknown as StoredStep
}

function recordOf(row: FoundRow, fingerprint: string): StoredRecord {
  const createdAt = Number(row.created_at ?? Number.NaN)
  if (!Number.isFinite(createdAt)) throw undecodable()
  if (row.tombstone !== null) {
    if (!isReason(row.tombstone)) throw undecodable()
    return { kind: 'tombstone', fingerprint, createdAt, reason: row.tombstone }
  }
  const statusCode = Number(row.status_code)
  if (!isStatus(statusCode) || row.body === null || row.body_is_text === null) throw undecodable()
  return {
    kind: 'reply',
    fingerprint,
    createdAt,
    statusCode,
    headers: headersOf(row.headers),
    body: Buffer.from(row.body, 'base64'),
    text: row.body_is_text === 't'
  }
}

function headersOf(json: string | null): StoredHeader[] {
  const headers = parsed(json ?? '')
  if (!areHeaders(headers)) throw undecodable()
  return headers.map(([name, value]) => [fromText(name), Array.isArray(value) ? value.map(fromText) : fromText(value)])
}

function parsed(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    throw undecodable()
  }
}

function undecodable(): Error {
  return new UnreadableAnswer('A stored idempotency record could not be decoded')
}
