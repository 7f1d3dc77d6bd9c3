import type { Acquisition, Finished, StoredStep, Unfinished } from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { decodeRecord, decodeSummary } from '../record-codec.js'
import type { Argument } from './connection.js'

/* What is under a key, as bytes: scripts.ts says what they mean. Here they are made, and understood. */

export const CLAIM = 0x50 // P
export const RECORD = 0x43 // C
export const RELEASED = 0x52 // R
export const ENDED = 0x45 // E
export const ABANDONED = 0x41 // A

const VERSION = '1'
const LONGEST_TOKEN = 255
/** The bytes of a step before its name. */
const STEP_HEAD = 8

/** Kind, version, length and token: what stands before everything else. */
export function ownerOf(kind: number, token: string): Argument {
  const length = Buffer.byteLength(token)
  if (length === 0 || length > LONGEST_TOKEN) throw new RangeError('A token is 1 to 255 bytes long')
  // ioredis sends strings for less than bytes.
  if (length < 0x80) return String.fromCharCode(kind) + VERSION + String.fromCharCode(length) + token
  const owner = Buffer.allocUnsafe(3 + length)
  owner[0] = kind
  owner.write(VERSION, 1)
  owner[2] = length
  owner.write(token, 3)
  return owner
}

/** What an acquire or a look has found. */
export function decode(value: Buffer, left: number, abandoned: boolean): Acquisition {
  if (value[0] === RECORD) {
    return { state: 'completed', record: decodeRecord(value, afterToken(value)), ttlMs: ttlOf(left) }
  }
  const claim = parseClaim(value)
  return { ...unfinished(value, claim, left, abandoned), ...(claim.steps && { steps: claim.steps }) }
}

/**
 * The same without what may be large.
 * @param value Its first bytes, unless it is whole. `null` when these are too few.
 */
export function summarise(value: Buffer, left: number, isWhole: boolean): Unfinished | Finished | null {
  if (value[0] === RECORD) {
    const start = afterToken(value)
    const summary = decodeSummary(value, start)
    if (summary === null && isWhole) throw undecodable()
    return summary && { state: 'completed', ...summary, ttlMs: ttlOf(left) }
  }
  const { retainMs } = headOf(value)
  return isWhole ? unfinished(value, parseClaim(value), left, isLapsed(retainMs, left)) : null
}

export function isClaim(value: Buffer): boolean {
  return value[0] === CLAIM || value[0] === ENDED || value[0] === ABANDONED
}

export function lapsed(claim: Buffer, left: number): boolean {
  return isLapsed(headOf(claim).retainMs, left)
}

/** What an answer says of steps: nothing where there are none. */
export function stepsIn(bytes: Buffer | null | undefined): { steps?: StoredStep[] } {
  if (!bytes) return {}
  const steps: StoredStep[] = []
  for (let at = 0; at < bytes.length; ) {
    if (at + STEP_HEAD > bytes.length) throw undecodable()
    const name = at + STEP_HEAD
    const result = name + bytes.readUInt32BE(at)
    const end = result + bytes.readUInt32BE(at + 4)
    if (end > bytes.length) throw undecodable()
    steps.push([bytes.toString('utf8', name, result), bytes.toString('utf8', result, end)])
    at = end
  }
  return { steps }
}

interface ParsedClaim {
  attempt: number
  retainMs: number
  fingerprint: string
  steps?: StoredStep[]
}

function isLapsed(retainMs: number, left: number): boolean {
  return retainMs > 0 && left <= retainMs
}

function unfinished(
  value: Buffer,
  { attempt, retainMs, fingerprint }: ParsedClaim,
  left: number,
  abandoned: boolean
): Unfinished {
  if (!abandoned) return { state: 'running', fingerprint, leaseMs: Math.max(0, left - retainMs), attempt }
  const ended = value[0] === ENDED && { ended: true as const }
  // It expires after retainMs from then on. What is gone by now has less than nothing left.
  return { state: 'abandoned', fingerprint, attempt, ...ended, lapsedMs: Math.max(0, retainMs - Math.max(0, left)) }
}

function ttlOf(left: number): number | null {
  return left === -1 ? null : Math.max(0, left)
}

/** Where the bytes behind the token start. */
function afterToken(value: Buffer): number {
  if (value.length < 3 || value[1] !== VERSION.charCodeAt(0)) throw undecodable()
  return 3 + (value[2] as number)
}

/** Of a claim, or of what one has left behind. */
function parseClaim(value: Buffer): ParsedClaim {
  const { attempt, retainMs, own, steps } = headOf(value)
  const claim = { attempt, retainMs, fingerprint: value.toString('utf8', own, steps ?? value.length) }
  if (steps === null) return claim
  if (steps >= value.length) throw undecodable()
  return { ...claim, ...stepsIn(value.subarray(steps)) }
}

/** The same without what is text. It says where the claim's own fingerprint starts, and where the steps do if there are some. */
function headOf(value: Buffer): { attempt: number; retainMs: number; own: number; steps: number | null } {
  if (!isClaim(value)) throw undecodable()
  const start = afterToken(value)
  // What may be text comes behind it, and is not looked at. The longest there is takes four numbers of 16 digits.
  const match = /^[01](\d+):(\d+):[AE]?(\d*)(?:,(\d+))?:/.exec(value.toString('latin1', start, start + 80))
  if (match === null) throw undecodable()
  const [head, attempt, retainMs, length, ours] = match as unknown as [string, string, string, string, string?]
  const own = start + head.length + Number(length)
  const steps = ours === undefined ? null : own + Number(ours)
  return { attempt: Number(attempt), retainMs: Number(retainMs), own, steps }
}

function undecodable(): Error {
  return new UnreadableAnswer('A stored idempotency claim could not be decoded')
}
