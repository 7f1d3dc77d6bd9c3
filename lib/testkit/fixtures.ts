import { AssertionError } from 'node:assert'
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  StoredRecord,
  StoredReply,
  StoredStep,
  Tombstone
} from '../../types/index.js'
import { Rejection, shown, within } from './harness.js'

/** Longer than any case: what has this lease does not lapse. */
export const LONG = 60_000
/** So short that waiting for its end costs nothing. */
export const SHORT = 20
export const DAY = 86_400_000
/** How much two clocks, and a rounded number of milliseconds, may differ in a case. */
export const SLACK = 10

/** What a key gives that is as if it had never been claimed. */
export const FRESH = { state: 'acquired', attempt: 1 } as const

/** A key that nothing else has. */
export function newKey(): string {
  return randomUUID()
}

/** A claim by a new token that does not lapse during a case, as the plugin makes it. */
export function claim(changes: Partial<Claim> = {}): Claim {
  return {
    token: randomUUID(),
    fingerprint: 'fingerprint',
    leaseMs: LONG,
    retainMs: LONG,
    takeover: false,
    withTtl: false,
    ...changes
  }
}

export function reply(changes: Partial<StoredReply> = {}): StoredReply {
  return {
    kind: 'reply',
    fingerprint: 'fingerprint',
    createdAt: 1_700_000_000_000,
    statusCode: 201,
    headers: [['content-type', 'application/json; charset=utf-8']],
    body: Buffer.from('{"done":true}'),
    text: true,
    ...changes
  }
}

export function tombstone(reason: Tombstone['reason']): Tombstone {
  return { kind: 'tombstone', fingerprint: 'fingerprint', createdAt: 1_700_000_000_000, reason }
}

/** Claims a free key, and returns the owner's token. */
export async function take(store: IdempotencyStore, key: string, changes: Partial<Claim> = {}): Promise<string> {
  const mine = claim(changes)
  answers(await store.acquire(key, mine), FRESH, 'a key that should be free')
  return mine.token
}

/** Claims a free key, and returns the owner's token when the lease has lapsed. */
export async function lapsed(store: IdempotencyStore, key: string, changes: Partial<Claim> = {}): Promise<string> {
  const token = await take(store, key, { leaseMs: SHORT, ...changes })
  await abandoned(store, key)
  return token
}

/** Waits for the lease to lapse, and returns what is found then. */
export function abandoned(store: IdempotencyStore, key: string): Promise<Acquisition> {
  const lapse = async () => {
    const found = await store.acquire(key, claim())
    if (found.state === 'running') return null
    answers(found, { state: 'abandoned' }, 'a key whose lease has lapsed')
    return found
  }
  return until(lapse, { message: 'a lease to lapse' }) as Promise<Acquisition>
}

/** A claim that has lapsed, and another that took it over and is running. */
export async function overtaken(
  store: IdempotencyStore,
  second: IdempotencyStore,
  key: string
): Promise<{ token: string; heir: string }> {
  const token = await lapsed(store, key)
  const heir = claim({ fingerprint: 'the heir', takeover: true })
  answers(await second.acquire(key, heir), { state: 'acquired', attempt: 2 }, 'an abandoned key')
  return { token, heir: heir.token }
}

/** Claims a free key and completes it, and returns the owner's token. */
export async function finish(
  store: IdempotencyStore,
  key: string,
  record: StoredRecord = reply(),
  ttlMs: number | null = LONG
): Promise<string> {
  const token = await take(store, key)
  equal(await store.complete(key, token, record, ttlMs), true, 'complete by the owner')
  return token
}

/** A value that can be compared with `Object.is`. */
export function equal<T>(actual: T, expected: T, what: string): void {
  if (!Object.is(actual, expected)) throw differing(what, actual, expected)
}

export function ok(holds: boolean, otherwise: string): void {
  if (!holds) throw new AssertionError({ message: otherwise })
}

/** What a key gives says so, whatever it says besides. */
export function answers(found: Acquisition | null, expected: Partial<Acquisition>, what = 'the key'): void {
  const names = Object.keys(expected) as (keyof Acquisition)[]
  if (found === null || !names.every((name) => isDeepStrictEqual(found[name], expected[name]))) {
    throw differing(what, found, expected)
  }
}

/** What a key gives is this record. */
export function replays(found: Acquisition | null, record: StoredRecord, what = 'the key'): void {
  answers(found, { state: 'completed' }, what)
  const actual = (found as { record: StoredRecord }).record as object as Record<string, unknown>
  for (const [name, value] of Object.entries(record)) {
    if (!isDeepStrictEqual(actual[name], value)) throw differing(`the ${name} of ${what}`, actual[name], value)
  }
}

/** What a key gives has these steps, or none. */
export function hasSteps(found: Acquisition | null, expected: readonly StoredStep[], what = 'the key'): void {
  const { steps } = found as { steps?: readonly StoredStep[] }
  if (expected.length === 0) ok(steps === undefined, `${what} has ${shown(steps)}, where there are no steps`)
  else if (!isDeepStrictEqual(steps, expected)) throw differing(`the steps of ${what}`, steps, expected)
}

/** What is left of a time, given when it began at the earliest. A cache counts from its question on: its way counts twice then. */
export function left(ms: unknown, whole: number, since: number): void {
  const passed = performance.now() - since
  const isLeft = typeof ms === 'number' && ms <= whole + SLACK && ms >= whole - 2 * passed - SLACK
  ok(isLeft, `${shown(ms)} ms are left of ${whole} after at most ${passed} ms`)
}

/** So much time has passed, at least. */
export function passed(ms: number, since: number, what: string): void {
  const actual = performance.now() - since
  ok(actual >= ms - SLACK, `${what} after ${actual} ms, not after ${ms}`)
}

/** The store does not answer, and says so. */
export async function refuses(call: Promise<unknown>, what: string): Promise<void> {
  let answer: unknown
  try {
    answer = await call
  } catch (error) {
    if (error instanceof Rejection) return
    throw error
  }
  throw new AssertionError({ message: `${what} answered ${shown(answer)}, where it has to reject` })
}

/** Repeats a call for as long as the store rejects. */
export function answered<T>(call: () => Promise<T>): Promise<T> {
  const attempt = async () => {
    try {
      return { answer: await call() }
    } catch (error) {
      if (error instanceof Rejection) return null
      throw error
    }
  }
  return until(attempt, { message: 'the store to answer again' }).then((got) => (got as { answer: T }).answer)
}

/**
 * Tries what has to be done within a time, and returns how much that was. A machine that was too slow for it has more
 * time with the next try.
 * @param step Does it on a new key, and says whether the store agreed.
 */
export async function inTime(step: (ms: number) => Promise<boolean>, what: string): Promise<number> {
  for (let ms = 100; ; ms *= 3) {
    const before = performance.now()
    if (await step(ms)) return ms
    const passed = performance.now() - before
    ok(passed >= ms, `${what} after ${passed} ms, although there were ${ms}`)
  }
}

/** A promise that is awaited later, or not at all when the case has failed before. */
export function later<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}

/** The answers to many calls at the same time, by both clients in turn. */
export function parallel<S extends IdempotencyStore, T>(
  count: number,
  [store, second]: readonly [S, S],
  call: (store: S, n: number) => Promise<T>
): Promise<T[]> {
  return Promise.all(Array.from({ length: count }, (_, n) => call(n % 2 === 0 ? store : second, n)))
}

/** Of many who claimed a key, one has it in this attempt, and it is running for all others. */
export function oneAcquired(found: Acquisition[], attempt: number): void {
  const acquired = found.filter(({ state }) => state === 'acquired')
  ok(acquired.length === 1, `${acquired.length} of ${found.length} claims at the same time were acquired`)
  for (const each of found) {
    answers(each, each === acquired[0] ? { state: 'acquired', attempt } : { state: 'running' }, 'the contended key')
  }
}

export interface UntilOptions {
  /** In milliseconds. @default 10_000 */
  timeout?: number
  /** What was waited for; the error says it. */
  message?: string
}

/** Polls every 5 ms until `predicate` gives something truthy, and returns that. What it throws is thrown at once. */
export async function until<T>(
  predicate: () => T | Promise<T>,
  { timeout = 10_000, message = 'the condition' }: UntilOptions = {}
): Promise<T> {
  const deadline = performance.now() + timeout
  for (;;) {
    const value = await predicate()
    if (value) return value
    if (performance.now() >= deadline)
      throw new AssertionError({ message: `Waited ${timeout} ms in vain for ${message}` })
    await sleep(5)
  }
}

/** Rejects when the promise takes longer than anything may take here. */
export function soon<T>(promise: Promise<T>, message = 'the promise'): Promise<T> {
  return within(10_000, promise, () => message)
}

function differing(what: string, actual: unknown, expected: unknown): AssertionError {
  return new AssertionError({ message: `${what}: ${shown(actual)} instead of ${shown(expected)}`, actual, expected })
}
