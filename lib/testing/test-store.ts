import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  ListedKind,
  ListedPage,
  OperationKey,
  OperationSelector,
  Settlement,
  StoredRecord,
  StoredStep
} from '../../types/index.js'
import { StoreContext } from '../operation/store-context.js'
import { newToken } from '../operation/token.js'
import { selectedKey } from '../selected-key.js'
import { innermost } from '../stores/innermost.js'
import { MemoryStore } from '../stores/memory/memory-store.js'
import { peek } from '../util/sync-promise.js'
import { claimOf, recordOf, type TestClaim, type TestRecord } from './contents.js'
import { Faults } from './faults.js'
import { settled, useTestClock } from './test-clock.js'

const EVERYTHING: readonly ListedKind[] = ['running', 'abandoned', 'reply', 'tombstone']

/**
 * A store in memory for tests of your routes: its clock can be moved, owners of claims die when they are told to, and it
 * fails, falls silent or is late. It goes with any test runner, and with `app.inject` as well as over HTTP.
 *
 * From the first one on, all that this package does in the process goes by the time of `Date`, and what `advance` has added
 * to it: mock timers that mock `Date` and `setTimeout` move it too. Enable them before the first request.
 */
export class TestStore implements IdempotencyStore {
  readonly #clock = useTestClock()
  readonly #memory = new MemoryStore()
  readonly #faults = new Faults()
  /** The newest claim on each key. */
  readonly #claims = new Map<string, Claim>()

  /**
   * Lets time pass: leases, `ttl`, `waitTimeout`, `storeTimeout` and renewals follow it, in the order in which they are due.
   * It is the time of all stores in the process, but not that of your own timers. Resolves when what was due has happened,
   * as far as that can be told: what waits for a socket or a file may still be on its way.
   * @param ms Milliseconds.
   */
  async advance(ms: number): Promise<void> {
    if (!(ms >= 0 && ms < Number.POSITIVE_INFINITY)) throw new RangeError(`advance() takes milliseconds, got ${ms}`)
    await this.#clock.advance(ms)
  }

  /**
   * Whoever runs the request with this key has died: its claim is not renewed any more, its lease has lapsed, and nothing
   * that it still does under it counts. The next request with the key is the next `attempt`, or 409 ABANDONED with
   * `onAbandoned: 'reject'`. Its handler, if it still runs in the test, is told by its `signal`. (Where an early `hook` has
   * only reserved the key, it is free.)
   * @param key As the client sends it; with the option `secret`, `{ storageKey: app.idempotency.hash(key, { scope }) }`.
   * @throws when no request with the key is running
   */
  async abandon(key: OperationKey, { scope }: OperationSelector = {}): Promise<void> {
    const storageKey = typeof key === 'string' ? selectedKey(key, scope) : key.storageKey
    const claim = this.#claims.get(storageKey)
    const found = this.#find(storageKey)
    if (claim === undefined || found?.state !== 'running') throw new Error(this.#whyNot(key, scope, found))
    // By another owner, who comes when the lease is over, and goes without having run.
    const heir = { ...claim, token: newToken(), takeover: true }
    void this.#memory.renew(storageKey, claim.token, 0)
    void this.#memory.acquire(storageKey, heir)
    void this.#memory.release(storageKey, heir.token, true)
    this.#disown(storageKey)
    await settled()
  }

  /**
   * The next calls of the plugin to the store fail: it cannot be reached. What it holds stays.
   * @param calls How many; without it, all until `recover()`. A request makes two: for its claim, and for its reply. One that
   * gives back what may have been claimed in vain fails too, and is not counted.
   */
  fail(calls = Number.POSITIVE_INFINITY): void {
    this.#faults.fail(calls)
  }

  /** Calls of the plugin to the store do nothing, and get no answer until `recover()`, when they fail. */
  hang(): void {
    this.#faults.hang()
  }

  /**
   * Calls of the plugin to the store wait: they are done, and answered, when the returned function is called, or
   * `recover()`.
   */
  hold(): () => void {
    return this.#faults.hold()
  }

  /** The store answers again, after `fail`, `hang` or `hold`. */
  recover(): void {
    this.#faults.recover()
  }

  /** What is unfinished, the oldest first. */
  claims(): TestClaim[] {
    return this.#keys().flatMap((key) => claimOf(key, this.#find(key)) ?? [])
  }

  /** What is stored, the oldest first. */
  records(): TestRecord[] {
    return this.#keys().flatMap((key) => recordOf(key, this.#find(key)) ?? [])
  }

  /** As new, but for the clock: all is forgotten, the store answers, and what still runs has lost its key. */
  clear(): void {
    this.recover()
    this.#claims.clear()
    for (const key of this.#keys()) {
      void this.#memory.delete(key)
      this.#disown(key)
    }
  }

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    return this.#ask(() => this.#acquire(key, claim))
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#ask(() => this.#memory.renew(key, token, leaseMs))
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    return this.#ask(() => this.#memory.complete(key, token, record, ttlMs))
  }

  step(key: string, token: string, step: StoredStep): Promise<boolean> {
    return this.#ask(() => this.#memory.step(key, token, step))
  }

  release(key: string, token: string, unused?: boolean): Promise<boolean> {
    return this.#ask(() => this.#memory.release(key, token, unused), !unused)
  }

  // A failing store is noticed by who asks, and need not be by who only listens.
  changed(key: string, signal: AbortSignal): Promise<void> {
    return this.#memory.changed(key, signal)
  }

  get(key: string): Promise<Acquisition | null> {
    return this.#ask(() => this.#memory.get(key))
  }

  delete(key: string, unlessRunning?: boolean): Promise<boolean> {
    return this.#ask(() => this.#memory.delete(key, unlessRunning))
  }

  list(kinds: readonly ListedKind[]): Promise<ListedPage> {
    return this.#ask(() => this.#memory.list(kinds))
  }

  settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    return this.#ask(() => this.#memory.settle(key, fingerprint, settlement))
  }

  close(): Promise<void> {
    return this.#memory.close()
  }

  #ask<T>(call: () => Promise<T>, counts?: boolean): Promise<T> {
    return this.#faults.ask(() => {
      const answer = call()
      // Nothing has to be swept, for which mock timers would ring every second of a day.
      void this.#memory.close()
      return answer
    }, counts)
  }

  #acquire(key: string, claim: Claim): Promise<Acquisition> {
    const answer = this.#memory.acquire(key, claim)
    const found = peek(answer)
    if (!(found instanceof Promise) && found.state === 'acquired') this.#claims.set(key, { ...claim })
    return answer
  }

  #keys(): string[] {
    return atHand(this.#memory.list(EVERYTHING)).keys.map(({ key }) => key)
  }

  #find(storageKey: string): Acquisition | null {
    return atHand(this.#memory.get(storageKey))
  }

  /** What runs under the key in this process lets go of it, also where the plugin has this store behind others. */
  #disown(storageKey: string): void {
    for (const context of StoreContext.inUse) {
      if (innermost(context.store).includes(this)) context.disown(storageKey)
    }
  }

  #whyNot(key: OperationKey, scope: string | undefined, found: Acquisition | null): string {
    const caller = scope === undefined ? 'without a scope' : `of the scope "${scope}"`
    const which = typeof key === 'string' ? `the key "${key}" ${caller}` : `the storage key "${key.storageKey}"`
    const isNot = `No request with ${which} is running: `
    if (found?.state === 'completed') return `${isNot}its reply is stored already`
    if (found !== null) return `${isNot}it is abandoned already`
    const running = this.claims().filter(({ state }) => state === 'running')
    if (running.length === 0) return `${isNot}none is. Wait until its handler has started`
    return `${isNot}others are, on ${running.map(({ route }) => route).join(', ')}. Is it another key, or another scope?`
  }
}

/** What the store in memory says, which it does at once. */
function atHand<T>(answer: Promise<T>): T {
  return peek(answer) as T
}
