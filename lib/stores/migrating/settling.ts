import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import type { Acquisition, Claim, IdempotencyStore, Settlement, StoredRecord } from '../../../types/index.js'
import { type Abandoned, copyOf, seen } from './answers.js'
import { COMPLETION_MS, DAY_MS, PATIENCE_MS, PAUSE_MS } from './claiming.js'

/*
 * The end of an operation that nobody is running, in two stores. What is settled is what `get` shows of both, and it is settled
 * when both have the record, or both have ended.
 *
 * A record goes the way of a completion. `from` is claimed first, or has a record: that keeps out all who ask `from`. Then `to`
 * gets the record in the place of just what was looked at, which decides against those who claim there alone; `from` gets it
 * last. Nobody who asks `from` is shown a record that `to` does not have, and what is not to be settled is given back as it
 * was. A store in which the key is free, or abandoned by an earlier attempt, because processes that have only the other one
 * went on, gets the record as well.
 *
 * A process that dies between the two leaves a record that only `to` has, and `from` claimed for ten seconds at most; a call
 * that fails gives it back at once. Who claims in both puts the record into `from` before it is shown; only a tombstone that is
 * there stays what it says. Who settles again finishes it: that is true for the same reply, and false for another one, as `to`
 * may have shown the first. Who claims in `from` alone may take over before, as after any completion that was interrupted.
 *
 * `ended` needs no claim: it is said in `from`, which decides against all who ask there, then in `to`. In between the key has
 * not ended for who asks both; to settle again finishes it.
 */

type Settling = IdempotencyStore & Required<Pick<IdempotencyStore, 'get' | 'settle'>>
/** What `get` gives. */
type Found = Exclude<Acquisition, { state: 'acquired' }> | null
type Both = [inFrom: Found, inTo: Found]
type Mine = Pick<Claim, 'token' | 'fingerprint'>
type Completed = Extract<Acquisition, { state: 'completed' }>
type Result = Exclude<Settlement, 'ended'>

/** Settles what two stores have of a key. */
export class DoubleSettlements {
  readonly #from: Settling
  readonly #to: Settling

  constructor(from: Settling, to: Settling) {
    this.#from = from
    this.#to = to
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    if (settlement === 'ended') return this.#end(key, fingerprint)
    const { record, ttlMs } = settlement
    return this.#finish(key, fingerprint, { record: copyOf(record), ttlMs })
  }

  async #end(key: string, fingerprint: string): Promise<boolean> {
    for (const until = performance.now() + PATIENCE_MS; performance.now() < until; await sleep(PAUSE_MS)) {
      const found = await this.#look(key)
      if (!isUnsettled(found) || !isMeant(found, fingerprint) || seen(...found)?.state !== 'abandoned') return false
      // Each is abandoned, or free.
      const [inFrom, inTo] = found as [inFrom: Abandoned | null, inTo: Abandoned | null]
      if ((await hasEnded(this.#from, key, inFrom)) && (await hasEnded(this.#to, key, inTo))) return true
    }
    return false
  }

  async #finish(key: string, fingerprint: string, { record, ttlMs }: Result): Promise<boolean> {
    const token = randomUUID()
    let isOurs = false
    for (const until = performance.now() + PATIENCE_MS; performance.now() < until; await sleep(PAUSE_MS)) {
      const found = await this.#look(key)
      const [inFrom, inTo] = found
      // Who claims in both has brought it from `to` to `from`.
      if (isOurs && inFrom?.state === 'completed' && isDeepStrictEqual(inFrom.record, record)) return true
      const isInTo = inTo?.state === 'completed' && isSame(inTo.record, record)
      // What was begun and given up is known again by its record: what it has replaced took its fingerprint with it.
      const isBegun = isInTo && inFrom?.state !== 'completed'
      if (!isUnsettled(found) || !(isBegun || isMeant(found, fingerprint))) break
      const result = isReply(inTo) ? { record: inTo.record, ttlMs: wholeMs(inTo.ttlMs) } : { record, ttlMs }
      const got = await this.#put(key, { token, fingerprint }, result, found)
      isOurs ||= got !== 'none' && !isReply(inTo)
      if (got === 'both') return isOurs || isInTo
    }
    if (isOurs) throw new Error('The idempotency key was taken while it was being settled')
    return false
  }

  /** Puts a record where it is missing, for as long as everything is as it was looked at, and tells who has got it. */
  async #put(key: string, mine: Mine, result: Result, [inFrom, inTo]: Both): Promise<'none' | 'to' | 'both'> {
    const { token } = mine
    try {
      if (!(await this.#claim(key, mine, inFrom))) return 'none'
      if (!(await this.#putIntoTo(key, mine, result, inTo))) {
        await this.#from.release(key, token, true)
        return 'none'
      }
      return (await this.#putIntoFrom(key, token, result, inFrom)) ? 'both' : 'to'
    } catch (error) {
      // It may be settled again at once.
      await Promise.allSettled([this.#from, this.#to].map((store) => store.release(key, token, true)))
      throw error
    }
  }

  async #look(key: string): Promise<Both> {
    return Promise.all([this.#from.get(key) as Promise<Found>, this.#to.get(key) as Promise<Found>])
  }

  /** Keeps out who asks `from`, if it is as it was looked at; a record that is there does so by itself. */
  async #claim(key: string, mine: Mine, inFrom: Found): Promise<boolean> {
    if (inFrom?.state === 'completed') return true
    const taken = { ...mine, leaseMs: COMPLETION_MS, retainMs: DAY_MS, takeover: true }
    const found = await this.#from.acquire(key, taken)
    if (found.state !== 'acquired') return false
    // Each takeover is another attempt.
    if (found.attempt === 1 + (inFrom?.state === 'abandoned' ? inFrom.attempt : 0)) return true
    await this.#from.release(key, mine.token, true)
    return false
  }

  /** Puts the record into `to`, if that is as it was looked at. */
  async #putIntoTo(key: string, mine: Mine, result: Result, inTo: Found): Promise<boolean> {
    if (isReply(inTo)) return true
    if (inTo !== null) return this.#to.settle(key, fingerprintOf(inTo), result)
    // A claim that leaves nothing behind.
    const reserved = { ...mine, leaseMs: COMPLETION_MS, retainMs: 0, takeover: false }
    const found = await this.#to.acquire(key, reserved)
    return found.state === 'acquired' && this.#to.complete(key, mine.token, result.record, result.ttlMs)
  }

  #putIntoFrom(key: string, token: string, result: Result, inFrom: Found): Promise<boolean> {
    return inFrom?.state === 'completed'
      ? this.#from.settle(key, inFrom.record.fingerprint, result)
      : this.#from.complete(key, token, result.record, result.ttlMs)
  }
}

/** Is nobody running it, and is there no reply that is shown by all? */
function isUnsettled([inFrom, inTo]: Both): boolean {
  const isRunning = inFrom?.state === 'running' || inTo?.state === 'running'
  return !isRunning && !isReply(inFrom) && (inFrom !== null || inTo !== null)
}

/**
 * Is it what both together say of the key? A reply in `to` alone is what somebody has begun to settle, or to complete, and is
 * brought to its end by any of the fingerprints that there are.
 */
function isMeant([inFrom, inTo]: Both, fingerprint: string): boolean {
  const known = isReply(inTo) ? [inFrom, inTo] : [seen(inFrom, inTo) as Found]
  return known.some((each) => each !== null && fingerprintOf(each) === fingerprint)
}

/** What is free stays so. */
async function hasEnded(store: Settling, key: string, found: Abandoned | null): Promise<boolean> {
  return found === null || store.settle(key, found.fingerprint, 'ended')
}

function isReply(found: Found): found is Completed {
  return found?.state === 'completed' && found.record.kind === 'reply'
}

function fingerprintOf(found: NonNullable<Found>): string {
  return found.state === 'completed' ? found.record.fingerprint : found.fingerprint
}

/** Whenever they were made. */
function isSame(a: StoredRecord, b: StoredRecord): boolean {
  return isDeepStrictEqual({ ...a, createdAt: 0 }, { ...b, createdAt: 0 })
}

/** What is left may be less than a millisecond, which is no time to a store. */
function wholeMs(ttlMs: number | null): number | null {
  return ttlMs === null ? null : Math.max(1, Math.ceil(ttlMs))
}
