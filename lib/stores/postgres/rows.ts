import type {
  Acquisition,
  ListedKey,
  StoredHeader,
  StoredRecord,
  StoredStep,
  Unfinished
} from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { areHeaders, isReason, isStatus, type RecordSummary } from '../record-codec.js'
import { fromKey, fromText, sha256, toKey, toText } from '../storable-text.js'

/* Rows of the table, from and to records and answers. */

/** All columns as the server wrote them, whatever parsers the application has set for its own. */
export const AS_TEXT = { getTypeParser: () => (value: string) => value }

/** What is listed of a row, as text. */
export interface ListedRow {
  key: string
  found: 'running' | 'abandoned' | 'ended' | 'completed' | 'unknown'
  attempt: string | null
  fingerprint: string | null
  /** What is left of the lease, or of the record's life; below zero: for how long there has been no owner. */
  left_ms: string | null
  created_at: string | null
  status_code: string | null
  tombstone: string | null
}

/** What a claim or a look has found, as text. */
export interface FoundRow extends Omit<ListedRow, 'key' | 'found'> {
  found: ListedRow['found'] | 'acquired' | 'locked'
  headers: string | null
  body: string | null
  body_is_text: string | null
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
  switch (row.found) {
    case 'acquired':
      return { state: 'acquired', attempt: Number(row.attempt), ...stepsOf(row) }
    case 'locked':
      // Nobody sees into a transaction: what it looks like is not known, nor which attempt it is and how long it will take.
      return { state: 'running', fingerprint: '', leaseMs }
    case 'completed':
      return { state: 'completed', record: recordOf(row), ttlMs: ttlOf(row) }
    default:
      return { ...unfinishedOf(row), ...stepsOf(row) }
  }
}

/** `null` for a row that is not one of ours, or is damaged, or whose key was too long to be kept. */
export function listedOf(row: ListedRow): ListedKey | null {
  const key = fromKey(row.key)
  if (key === null) return null
  try {
    if (row.found !== 'completed') return { key, ...unfinishedOf(row) }
    return { key, state: 'completed', ...summaryOf(row), ttlMs: ttlOf(row) }
  } catch (error) {
    // It must not keep the rest from being seen.
    if (error instanceof UnreadableAnswer) return null
    throw error
  }
}

type Judged = Omit<ListedRow, 'key' | 'found'> & { found: FoundRow['found'] }

function unfinishedOf({ found, ...row }: Judged): Unfinished {
  const fingerprint = fromText(row.fingerprint ?? '')
  const [attempt, leftMs] = [Number(row.attempt), Number(row.left_ms ?? Number.NaN)]
  if (!(attempt >= 1 && Number.isFinite(leftMs))) throw undecodable()
  if (found === 'running') return { state: 'running', fingerprint, leaseMs: Math.max(0, Math.ceil(leftMs)), attempt }
  if (found !== 'abandoned' && found !== 'ended') throw undecodable()
  const ended = found === 'ended' && { ended: true as const }
  return { state: 'abandoned', fingerprint, attempt, ...ended, lapsedMs: Math.max(0, Math.floor(-leftMs)) }
}

function ttlOf({ left_ms }: Judged): number | null {
  return left_ms === null ? null : Math.max(0, Math.ceil(Number(left_ms)))
}

function summaryOf({ fingerprint, created_at, tombstone, status_code }: Judged): RecordSummary {
  const createdAt = Number(created_at ?? Number.NaN)
  const outcome = tombstone ?? Number(status_code)
  if (!Number.isFinite(createdAt) || !(isReason(outcome) || isStatus(outcome))) throw undecodable()
  return { fingerprint: fromText(fingerprint ?? ''), createdAt, outcome }
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

function recordOf(row: FoundRow): StoredRecord {
  const { outcome, ...common } = summaryOf(row)
  if (typeof outcome === 'string') return { kind: 'tombstone', ...common, reason: outcome }
  if (row.body === null || row.body_is_text === null) throw undecodable()
  return {
    kind: 'reply',
    ...common,
    statusCode: outcome,
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
