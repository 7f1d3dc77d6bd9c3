import { randomBytes } from 'node:crypto'
import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  ListedKey,
  ListedKind,
  ListedPage,
  Settlement,
  StoredRecord,
  StoredStep
} from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { limited } from '../longest-time.js'
import { fromKey, toKey, toText } from '../storable-text.js'
import { Sweeper } from '../sweeper.js'
import { encodeClaim, encodeValue } from './claim-codec.js'
import {
  type Decision,
  isCompletedBy,
  isFree,
  isRunning,
  onAcquire,
  onGet,
  onList,
  onRelease,
  onRenew,
  onSettle,
  onStep,
  statesOf
} from './decisions.js'
import type { CasDriver, Lasting, Row, RowPage } from './driver.js'
import { Watch } from './watch.js'

/** How often a decision is made anew because the row has changed meanwhile. */
const MOST_TRIES = 20

/** In how many bytes of a record all but its body mostly is. */
const HEAD_BYTES = 2_048

/**
 * A store on a table of rows that are replaced as a whole, and only by who has seen them: for databases that can insert, find and
 * update, and nothing else that they would have in common. One trip for a first claim and one to complete it, two for a
 * replay and for whatever else; each trip is one statement, so that no lock outlives it.
 */
export class CompareAndSetStore implements IdempotencyStore {
  readonly #driver: CasDriver
  readonly #watch: Watch
  readonly #sweeper: Sweeper | null
  /** Two revisions are never the same: not of two stores, nor of one. */
  readonly #origin = randomBytes(9).toString('base64url')
  #revisions = 0

  /** @param sweepInterval milliseconds between two rounds of deleting what has expired; `null` for never */
  constructor(driver: CasDriver, sweepInterval: number | null) {
    this.#driver = driver
    this.#watch = new Watch(driver)
    this.#sweeper = sweepInterval === null ? null : new Sweeper(sweepInterval, () => driver.sweep())
  }

  // What is the caller's is read before anything is waited for: it may change meanwhile.
  async acquire(key: string, claim: Claim): Promise<Acquisition> {
    this.#sweeper?.start()
    const token = toText(claim.token)
    const wanted = { ...claim, leaseMs: limited(claim.leaseMs), retainMs: limited(claim.retainMs) }
    const { fingerprint, leaseMs, retainMs } = wanted
    const value = encodeClaim({ attempt: 1, retainMs, fingerprint, found: null, steps: [] })
    const name = toKey(key)
    const first = { token, value, leaseMs, keepMs: leaseMs + retainMs }
    try {
      for (let tries = 1; tries <= MOST_TRIES; tries++) {
        if (await this.#driver.insert(name, this.#revision(), first)) return { state: 'acquired', attempt: 1 }
        const found = await this.#decide(name, (row) => onAcquire(row, wanted, token))
        // It was deleted between the two.
        if (found !== null) return found
      }
    } catch (error) {
      throw this.#driver.claimFailure(error)
    }
    throw changesHands()
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    const ms = limited(leaseMs)
    return (await this.#decide(toKey(key), (row) => onRenew(row, toText(token), ms))) ?? false
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const [name, owner, value] = [toKey(key), toText(token), encodeValue(record)]
    const { fingerprint, createdAt } = record
    try {
      return await this.#complete(name, { token: owner, value, leaseMs: 0, keepMs: ttlMs })
    } catch (error) {
      if (!(await this.#driver.isTooLarge?.(value, error))) throw error
      const instead = encodeValue({ kind: 'tombstone', reason: 'too-large', fingerprint, createdAt })
      return this.#complete(name, { token: owner, value: instead, leaseMs: 0, keepMs: ttlMs })
    }
  }

  async step(key: string, token: string, [name, result]: StoredStep): Promise<boolean> {
    const step: StoredStep = [name, result]
    return (await this.#decide(toKey(key), (row) => onStep(row, toText(token), step))) ?? false
  }

  async release(key: string, token: string, unused = false): Promise<boolean> {
    const name = toKey(key)
    const released = (await this.#decide(name, (row) => onRelease(row, toText(token), unused))) ?? false
    if (released) this.#watch.wake(name)
    return released
  }

  changed(key: string, signal: AbortSignal): Promise<void> {
    return this.#watch.changed(toKey(key), signal)
  }

  async get(key: string): Promise<Acquisition | null> {
    const row = await this.#driver.find(toKey(key))
    return row === null || isFree(row) ? null : onGet(row)
  }

  async delete(key: string, unlessRunning = false): Promise<boolean> {
    const name = toKey(key)
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      const row = await this.#driver.find(name)
      if (row === null || (unlessRunning && isRunning(row))) return false
      if (!(await this.#driver.remove(name, row.revision))) continue
      this.#watch.wake(name)
      return !isFree(row)
    }
    throw changesHands()
  }

  async list(kinds: readonly ListedKind[], cursor: string | null): Promise<ListedPage> {
    const wanted = [...kinds]
    const { rows, last } = await this.#driver.page(cursor, statesOf(wanted), HEAD_BYTES)
    const keys: ListedKey[] = []
    for (const row of rows) {
      const key = fromKey(row.key)
      const listed = key === null ? null : await this.#listed(row, wanted)
      if (key !== null && listed !== null) keys.push({ ...listed, key })
    }
    return { keys, cursor: last }
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    const name = toKey(key)
    const nobody = this.#revision()
    return (await this.#decide(name, (row) => onSettle(row, fingerprint, settlement, nobody))) ?? false
  }

  /** Stops deleting, and all waiting, until the store is used again. The database stays open: it is the caller's. */
  async close(): Promise<void> {
    this.#watch.close()
    await this.#sweeper?.stop()
  }

  async #complete(name: string, record: Lasting): Promise<boolean> {
    if (await this.#driver.complete(name, this.#revision(), record)) {
      this.#watch.wake(name)
      return true
    }
    const row = await this.#driver.find(name)
    return row !== null && isCompletedBy(row, record.token)
  }

  async #listed(row: RowPage['rows'][number], kinds: readonly ListedKind[]): Promise<ListedKey | null> {
    try {
      const listed = onList(row, kinds)
      if (listed !== 'unknown') return listed
      const whole = await this.#driver.find(row.key)
      const found = whole && onList({ ...whole, key: row.key }, kinds)
      return found === 'unknown' ? null : found
    } catch (error) {
      // What is damaged must not keep the rest from being seen.
      if (error instanceof UnreadableAnswer) return null
      throw error
    }
  }

  /** Decides on the row that is there, and carries it out while it is the same. `null` where there is no row. */
  async #decide<Answer>(name: string, decide: (row: Row) => Decision<Answer>): Promise<Answer | null> {
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      const row = await this.#driver.find(name)
      if (row === null) return null
      const { change, answer } = decide(row)
      if (change === null) return answer
      if (await this.#driver.replace(name, row.revision, this.#revision(), change)) return answer
    }
    throw changesHands()
  }

  #revision(): string {
    return `${this.#origin}${(this.#revisions++).toString(36)}`
  }
}

function changesHands(): Error {
  return new Error('The idempotency key changes hands too fast')
}
