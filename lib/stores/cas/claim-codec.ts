import type { StoredRecord, StoredStep } from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { decodeRecord, decodeSummary, encodeRecord, type RecordSummary } from '../record-codec.js'

/*
 * The value of a row. Its first byte is the version, '1'. Behind it:
 *
 *   claim    JSON: [attempt, retainMs, fingerprint, found, steps]
 *            found: 0 for a first attempt, else [fingerprint, 1 when that had ended, else 0]
 *            steps: [[name, result], …], left out where there are none
 *   record   as in record-codec.ts
 */

const VERSION = Buffer.from('1')

/** An unfinished operation. */
export interface StoredClaim {
  readonly attempt: number
  /** For how many milliseconds it is remembered behind its lease. */
  readonly retainMs: number
  readonly fingerprint: string
  /** What it took over; `null` for a first attempt. */
  readonly found: Found | null
  readonly steps: readonly StoredStep[]
}

/** What a claim is given back to when its handler never ran. */
export interface Found {
  readonly fingerprint: string
  /** Had it been given back after its handler had run? */
  readonly ended: boolean
}

export function encodeClaim({ attempt, retainMs, fingerprint, found, steps }: StoredClaim): Buffer {
  const before = found === null ? 0 : [found.fingerprint, found.ended ? 1 : 0]
  const claim: unknown[] = [attempt, retainMs, fingerprint, before]
  if (steps.length > 0) claim.push(steps)
  return Buffer.from(`1${JSON.stringify(claim)}`)
}

/** @throws when the bytes are not those of a claim. */
export function decodeClaim(value: Buffer): StoredClaim {
  let claim: unknown
  try {
    claim = value[0] === VERSION[0] ? JSON.parse(value.toString('utf8', 1)) : undefined
  } catch {
    // What cannot be read is no array either.
  }
  if (!Array.isArray(claim) || claim.length < 4 || claim.length > 5) throw undecodable()
  const [attempt, retainMs, fingerprint, before, steps = []] = claim as unknown[]
  if (!isCount(attempt) || !isCount(retainMs) || typeof fingerprint !== 'string') throw undecodable()
  if (!Array.isArray(steps) || !steps.every(isStep)) throw undecodable()
  return { attempt, retainMs, fingerprint, found: foundIn(before), steps }
}

export function encodeValue(record: StoredRecord): Buffer {
  return encodeRecord(record, VERSION)
}

/** @throws when the bytes are not those of a record. */
export function decodeValue(value: Buffer): StoredRecord {
  if (value[0] !== VERSION[0]) throw undecodable()
  return decodeRecord(value, VERSION.length)
}

/** Of a record of which the first bytes alone are at hand; `null` where these are too few. */
export function decodeValueSummary(value: Buffer): RecordSummary | null {
  if (value[0] !== VERSION[0]) throw undecodable()
  return decodeSummary(value, VERSION.length)
}

function foundIn(before: unknown): Found | null {
  if (before === 0) return null
  const [fingerprint, ended] = Array.isArray(before) ? before : []
  if (typeof fingerprint !== 'string' || (ended !== 0 && ended !== 1)) throw undecodable()
  return { fingerprint, ended: ended === 1 }
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && value >= 0
}

function isStep(step: unknown): step is StoredStep {
  return Array.isArray(step) && step.length === 2 && step.every((text) => typeof text === 'string')
}

function undecodable(): Error {
  return new UnreadableAnswer('A stored idempotency claim could not be decoded')
}
