import type { Acquisition, Claim, StoredStep, Unfinished } from '../../../types/index.js'

// What a MemoryStore knows of an unfinished operation, and what it tells of it.

/** An unfinished operation. All times are monotonic milliseconds. */
export interface ClaimEntry {
  token: string
  fingerprint: string
  attempt: number
  leaseEnd: number
  retainMs: number
  /** The token no longer owns it, but has given it back. */
  givenBack: boolean
  /** Was that after its handler had run? */
  ended: boolean
  /** What it took over; `null` for a first attempt. */
  found: Found | null
  /** Names and results, in order. Not there before the first one: most claims have none, and pay nothing for it. */
  steps?: Map<string, string>
}

/** What a claim is given back to when its handler never ran. */
interface Found {
  fingerprint: string
  ended: boolean
}

export function newClaim({ token, fingerprint, retainMs }: Claim, abandoned?: ClaimEntry): ClaimEntry {
  const claimed: ClaimEntry = {
    token,
    fingerprint,
    attempt: abandoned === undefined ? 1 : abandoned.attempt + 1,
    leaseEnd: 0,
    retainMs,
    givenBack: false,
    ended: false,
    found: abandoned === undefined ? null : { fingerprint: abandoned.fingerprint, ended: abandoned.ended }
  }
  if (abandoned?.steps !== undefined) claimed.steps = abandoned.steps
  return claimed
}

export function giveBack(held: ClaimEntry, unused: boolean): void {
  const { found } = held
  held.givenBack = true
  held.ended = true
  if (!unused || found === null) return
  held.attempt--
  held.fingerprint = found.fingerprint
  held.ended = found.ended
}

export function acquired({ attempt, steps }: ClaimEntry): Acquisition {
  if (steps === undefined) return { state: 'acquired', attempt }
  return { state: 'acquired', attempt, steps: [...steps] }
}

export function state(
  { fingerprint, attempt, leaseEnd, ended, steps: held }: ClaimEntry,
  now: number
): Unfinished & { steps?: StoredStep[] } {
  const steps = held && { steps: [...held] }
  if (leaseEnd > now) return { state: 'running', fingerprint, leaseMs: Math.ceil(leaseEnd - now), attempt, ...steps }
  const lapsedMs = Math.floor(now - leaseEnd)
  return { state: 'abandoned', fingerprint, attempt, ...(ended && { ended }), lapsedMs, ...steps }
}

export function listedAt(key: string, held: ClaimEntry, now: number): Unfinished & { key: string } {
  const { steps, ...found } = state(held, now)
  return { ...found, key }
}
