import type {
  Acquisition,
  Claim,
  Finished,
  ListedKey,
  ListedKind,
  Settlement,
  StoredStep,
  Unfinished
} from '../../../types/index.js'
import { kindOf } from '../listed-kind.js'
import { RELEASE_MEMORY_MS } from '../release-memory.js'
import {
  decodeClaim,
  decodeValue,
  decodeValueSummary,
  encodeClaim,
  encodeValue,
  type StoredClaim
} from './claim-codec.js'
import type { Content, Row, RowState } from './driver.js'

/*
 * What becomes of a row, decided from the row alone and from the time at which the database gave it. Nothing here waits or
 * asks: who carries a decision out replaces the row that it was made on, and decides anew where there is another one.
 */

/** `change` is what to put in the row's place before `answer` is true; `null` when it is true already. */
export interface Decision<Answer> {
  readonly change: Content | null
  readonly answer: Answer
}

const NOTHING = Buffer.alloc(0)

/** Does the row no longer count? */
export function isOver({ expiresAt, now }: Row): boolean {
  return expiresAt !== null && expiresAt <= now
}

/** Nobody holds the key, and nothing is known of it. */
export function isFree(row: Row): boolean {
  return row.state === 'released' || isOver(row)
}

/** Who may have the key, when somebody asks for it. */
export function onAcquire(row: Row, claim: Claim, token: string): Decision<Acquisition> {
  if (isFree(row)) return taken(row, claim, token, { attempt: 1, found: null, steps: [] })
  if (row.state === 'completed') return { change: null, answer: completed(row) }
  const held = decodeClaim(row.value)
  if (row.state === 'running' && row.token === token) return taken(row, claim, token, held)
  if (isAlive(row) || !claim.takeover) return { change: null, answer: unfinished(row, held) }
  const found = { fingerprint: held.fingerprint, ended: row.state === 'ended' }
  return taken(row, claim, token, { attempt: held.attempt + 1, found, steps: held.steps })
}

export function onRenew(row: Row, token: string, leaseMs: number): Decision<boolean> {
  if (!isOwned(row, token)) return { change: null, answer: false }
  return { change: leased(row, token, decodeClaim(row.value), leaseMs), answer: true }
}

/** The first result of a name stays. */
export function onStep(row: Row, token: string, step: StoredStep): Decision<boolean> {
  if (!isOwned(row, token)) return { change: null, answer: false }
  const held = decodeClaim(row.value)
  const [name] = step
  if (held.steps.some(([known]) => known === name)) return { change: null, answer: true }
  return { change: { ...contentOf(row), value: encodeClaim({ ...held, steps: [...held.steps, step] }) }, answer: true }
}

/** @param unused its handler never ran */
export function onRelease(row: Row, token: string, unused: boolean): Decision<boolean> {
  if (!isOwned(row, token)) return { change: null, answer: row.token === token && !isOver(row) && isGivenBack(row) }
  const { now } = row
  const held = decodeClaim(row.value)
  const { found, steps, retainMs } = held
  if ((found === null && steps.length === 0) || retainMs === 0) {
    const expiresAt = now + RELEASE_MEMORY_MS
    return { change: { state: 'released', token, value: NOTHING, leaseEnd: now, expiresAt }, answer: true }
  }
  const isAsFound = unused && found !== null
  const state = isAsFound && !found.ended ? 'abandoned' : 'ended'
  const back = isAsFound ? { attempt: held.attempt - 1, fingerprint: found.fingerprint } : held
  const { attempt, fingerprint } = back
  const value = encodeClaim({ attempt, retainMs, fingerprint, found: null, steps })
  return { change: { state, token, value, leaseEnd: now, expiresAt: now + retainMs }, answer: true }
}

/** Has this token completed the key before? */
export function isCompletedBy(row: Row, token: string): boolean {
  return row.state === 'completed' && row.token === token && !isOver(row)
}

/** What is known of a key that is not free. */
export function onGet(row: Row): Acquisition {
  return row.state === 'completed' ? completed(row) : unfinished(row, decodeClaim(row.value))
}

/** Of a key that nobody is running, with that fingerprint. `token` is nobody's: no owner of before finds itself in the row. */
export function onSettle(row: Row, fingerprint: string, settlement: Settlement, token: string): Decision<boolean> {
  const no = { change: null, answer: false }
  if (isFree(row) || isAlive(row)) return no
  const { now } = row
  if (row.state === 'completed') {
    const record = decodeValue(row.value)
    if (settlement === 'ended' || record.kind === 'reply' || record.fingerprint !== fingerprint) return no
    return { change: settled(now, settlement, token), answer: true }
  }
  const held = decodeClaim(row.value)
  if (held.fingerprint !== fingerprint) return no
  if (settlement !== 'ended') return { change: settled(now, settlement, token), answer: true }
  const { attempt, retainMs, steps } = held
  const value = encodeClaim({ attempt, retainMs, fingerprint, found: null, steps })
  return { change: { state: 'ended', token, value, leaseEnd: now, expiresAt: now + retainMs }, answer: true }
}

function settled(now: number, { record, ttlMs }: Exclude<Settlement, 'ended'>, token: string): Content {
  const expiresAt = ttlMs === null ? null : now + ttlMs
  return { state: 'completed', token, value: encodeValue(record), leaseEnd: now, expiresAt }
}

/** Is a claim running that counts? */
export function isRunning(row: Row): boolean {
  return isAlive(row) && !isOver(row)
}

const STATES: Record<ListedKind, readonly RowState[]> = {
  running: ['running'],
  abandoned: ['running', 'ended', 'abandoned'],
  reply: ['completed'],
  tombstone: ['completed']
}

/** The states of the rows in which something of these kinds may be. */
export function statesOf(kinds: readonly ListedKind[]): readonly RowState[] {
  return [...new Set(kinds.flatMap((kind) => STATES[kind]))]
}

/**
 * What a list says of a row, the value of which may be cut off; `null` for nothing of these kinds, `'unknown'` where more of
 * the value is needed.
 */
export function onList(
  row: Row & { readonly key: string },
  kinds: readonly ListedKind[]
): ListedKey | null | 'unknown' {
  if (isFree(row) || !statesOf(kinds).includes(row.state)) return null
  const { key } = row
  const found = row.state === 'completed' ? finished(row) : withoutSteps(unfinished(row, decodeClaim(row.value)))
  if (found === null) return 'unknown'
  return kinds.includes(kindOf(found)) ? { ...found, key } : null
}

function finished(row: Row): Finished | null {
  const summary = decodeValueSummary(row.value)
  return summary && { state: 'completed', ...summary, ttlMs: ttlOf(row) }
}

function withoutSteps({ steps, ...found }: Unfinished & Steps): Unfinished {
  return found
}

function isAlive({ state, leaseEnd, now }: Row): boolean {
  return state === 'running' && leaseEnd > now
}

/** A lapsed lease that nobody has taken over is its owner's still. */
function isOwned(row: Row, token: string): boolean {
  return row.state === 'running' && row.token === token && !isOver(row)
}

function isGivenBack({ state }: Row): boolean {
  return state === 'released' || state === 'ended' || state === 'abandoned'
}

function taken(
  row: Row,
  { fingerprint, leaseMs, retainMs }: Claim,
  token: string,
  { attempt, found, steps }: Pick<StoredClaim, 'attempt' | 'found' | 'steps'>
): Decision<Acquisition> {
  const change = leased(row, token, { attempt, retainMs, fingerprint, found, steps }, leaseMs)
  return { change, answer: { state: 'acquired', attempt, ...stepsOf(steps) } }
}

/** From when the row was looked at: who is paused before the row is replaced has less of the lease, never more. */
function leased({ now }: Row, token: string, claim: StoredClaim, leaseMs: number): Content {
  const leaseEnd = now + leaseMs
  return { state: 'running', token, value: encodeClaim(claim), leaseEnd, expiresAt: leaseEnd + claim.retainMs }
}

function contentOf({ state, token, value, leaseEnd, expiresAt }: Row): Content {
  return { state, token, value, leaseEnd, expiresAt }
}

function completed(row: Row): Acquisition {
  return { state: 'completed', record: decodeValue(row.value), ttlMs: ttlOf(row) }
}

function ttlOf({ expiresAt, now }: Row): number | null {
  return expiresAt === null ? null : expiresAt - now
}

function unfinished(row: Row, { fingerprint, attempt, steps }: StoredClaim): Unfinished & Steps {
  const { leaseEnd, now } = row
  if (isAlive(row)) return { state: 'running', fingerprint, leaseMs: leaseEnd - now, attempt, ...stepsOf(steps) }
  const ended = row.state === 'ended' && { ended: true as const }
  // What was given back since `now` was read has ended later than that.
  return {
    state: 'abandoned',
    fingerprint,
    attempt,
    ...ended,
    lapsedMs: Math.max(0, now - leaseEnd),
    ...stepsOf(steps)
  }
}

interface Steps {
  steps?: readonly StoredStep[]
}

/** What an answer says of steps: nothing where there are none. */
function stepsOf(steps: readonly StoredStep[]): Steps {
  return steps.length === 0 ? {} : { steps }
}
