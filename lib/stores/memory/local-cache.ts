import type {
  Acquisition,
  Claim,
  Duration,
  IdempotencyStore,
  StoredRecord,
  TransactionAcquisition,
  TransactionClaim
} from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { BYTES, COUNT, checked, DURATION } from '../../option-rules.js'
import { clock } from '../../util/clock.js'
import { describeStore } from '../../util/describe.js'
import { kPeek, resolved } from '../../util/sync-promise.js'
import { isInFrontOf } from '../innermost.js'
import { A_STORE, isStore } from '../is-store.js'
import { MemoryEntry, sizeOf } from './entry.js'
import { LinkedMap } from './linked-map.js'

/** Bounds of a `LocalCache`. */
export interface LocalCacheOptions {
  /**
   * How many replies are kept at most.
   * @default 10_000
   */
  maxEntries?: number
  /**
   * How many bytes they take at most, roughly.
   * @default 33_554_432
   */
  maxBytes?: number
  /**
   * For how long a reply is replayed without asking the store again. It is how long a key that was
   * deleted or settled by another process may still be replayed by this one.
   * @default 10_000
   */
  maxAge?: Duration
}

/** A finished operation, and when the store is to be asked for it again, in monotonic milliseconds. */
class CachedEntry extends MemoryEntry {
  readonly stale: number

  constructor(key: string, record: StoredRecord, expires: number, stale: number) {
    super(key, record, expires)
    this.stale = stale
  }
}

/** When the store was asked, and what was known then. */
interface Asked {
  readonly at: number
  readonly changes: number
}

const MOST_CLAIMS = 100_000

type Completed = Extract<Acquisition, { state: 'completed' }>

/**
 * Keeps finished replies in this process, in front of any store: a replay needs no round trip then. Only what is
 * final is kept; who holds a key is always asked of the store. What is used least goes first.
 *
 * A record never outlives its ttl here. A key that this process deletes or settles is forgotten at once; what another
 * process deletes or settles may be replayed for `maxAge` milliseconds more.
 */
export class LocalCache implements IdempotencyStore {
  // What a store need not have, this one has where the other has it.
  readonly sharesLocks: boolean
  readonly step?: NonNullable<IdempotencyStore['step']>
  readonly changed?: NonNullable<IdempotencyStore['changed']>
  readonly get?: NonNullable<IdempotencyStore['get']>
  readonly delete?: NonNullable<IdempotencyStore['delete']>
  readonly list?: NonNullable<IdempotencyStore['list']>
  readonly settle?: NonNullable<IdempotencyStore['settle']>
  readonly begin?: NonNullable<IdempotencyStore['begin']>
  readonly close?: NonNullable<IdempotencyStore['close']>
  readonly #store: IdempotencyStore
  readonly #maxEntries: number
  readonly #maxBytes: number
  readonly #maxAge: number
  /** In the order of their last use. */
  readonly #cached = new LinkedMap<CachedEntry>()
  /** The claims that were made here, by their key: the record of one that has not been completed before is known. */
  readonly #claimed = new Map<string, string>()
  /** Changes whenever a key is deleted or settled: what was asked before may be from before. */
  #changes = 0

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(store: IdempotencyStore, options: LocalCacheOptions = {}) {
    if (!isStore(store)) throw new InvalidOption(`LocalCache takes ${A_STORE}, got ${describeStore(store)}`)
    const rules = { maxEntries: COUNT, maxBytes: BYTES, maxAge: DURATION }
    const { maxEntries, maxBytes, maxAge } = checked<LocalCacheOptions>(options, rules, { owner: 'LocalCache ' })
    this.#store = store
    isInFrontOf(this, store)
    this.#maxEntries = maxEntries ?? 10_000
    this.#maxBytes = maxBytes ?? 33_554_432
    this.#maxAge = maxAge ?? 10_000
    const { step, changed, get, delete: forget, list, settle, begin, close } = store
    this.sharesLocks = store.sharesLocks === true
    if (step) this.step = (key, token, done) => step.call(store, key, token, done)
    if (changed) this.changed = (key, signal) => changed.call(store, key, signal)
    // Who looks, an operator for instance, wants to see what is there.
    if (get) this.get = (key) => get.call(store, key)
    if (forget) this.delete = (key, unlessRunning) => this.#change(key, () => forget.call(store, key, unlessRunning))
    if (list) this.list = (kinds, cursor) => list.call(store, kinds, cursor)
    if (settle) {
      this.settle = (key, fingerprint, settlement) =>
        this.#change(key, () => settle.call(store, key, fingerprint, settlement))
    }
    if (begin) this.begin = (key, claim) => this.#begin(key, claim, begin.bind(store))
    if (close) this.close = () => close.call(store)
  }

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    const cached = this.#find(key)
    return cached === null ? this.#acquire(key, claim, claim.token) : resolved<Acquisition>(cached)
  }

  /** What is kept here is replayed while the store is down, too. */
  [kPeek](key: string): Acquisition | null {
    return this.#find(key)
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#store.renew(key, token, leaseMs)
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const asked = this.#asked()
    const isFirst = this.#claimed.get(key) === token
    this.#claimed.delete(key)
    // Copied before anything is waited for, because it is the caller's. A repeated completion may bring another record
    // than the one that counts.
    const cached = isFirst ? this.#copy(key, record, ttlMs, asked.at) : null
    const stored = await this.#store.complete(key, token, record, ttlMs)
    if (stored && cached !== null) this.#put(cached, asked)
    return stored
  }

  release(key: string, token: string, unused?: boolean): Promise<boolean> {
    this.#claimed.delete(key)
    return this.#store.release(key, token, unused)
  }

  async #acquire(key: string, claim: Claim, token: string): Promise<Acquisition> {
    const asked = this.#asked()
    // What is kept here must not outlive its ttl.
    const found = await this.#store.acquire(key, claim.withTtl === false ? { ...claim, withTtl: true } : claim)
    if (found.state === 'completed') this.#learn(key, found, asked)
    else if (found.state === 'acquired') this.#claim(key, token)
    return found
  }

  async #begin(
    key: string,
    claim: TransactionClaim,
    begin: NonNullable<IdempotencyStore['begin']>
  ): Promise<TransactionAcquisition> {
    const cached = this.#find(key)
    if (cached !== null) return cached
    const asked = this.#asked()
    const found = await begin(key, claim)
    if (found.state === 'completed') this.#learn(key, found, asked)
    return found
  }

  /** What is kept of the key may be wrong as soon as it is asked for, and whatever becomes of that. */
  async #change(key: string, change: () => Promise<boolean>): Promise<boolean> {
    this.#forget(key)
    try {
      return await change()
    } finally {
      this.#forget(key)
    }
  }

  #forget(key: string): void {
    this.#changes++
    const cached = this.#cached.get(key)
    if (cached !== undefined) this.#cached.remove(cached)
  }

  #claim(key: string, token: string): void {
    // Who never ends its claim is forgotten some day: it costs a cached reply, no more.
    if (this.#claimed.size >= MOST_CLAIMS) this.#claimed.clear()
    this.#claimed.set(key, token)
  }

  #find(key: string): Completed | null {
    const cached = this.#cached.get(key)
    if (cached === undefined) return null
    const now = clock.now()
    if (now >= cached.expires || now >= cached.stale) {
      this.#cached.remove(cached)
      return null
    }
    this.#cached.touch(cached)
    return cached.at(now)
  }

  #asked(): Asked {
    return { at: clock.now(), changes: this.#changes }
  }

  #learn(key: string, { record, ttlMs }: Completed, asked: Asked): void {
    const cached = this.#copy(key, record, ttlMs, asked.at)
    if (cached !== null) this.#put(cached, asked)
  }

  /** `null` for what is too large. What the store says of time counts from when it was asked, at the earliest. */
  #copy(key: string, record: StoredRecord, ttlMs: number | null, now: number): CachedEntry | null {
    if (sizeOf(key, record) > this.#maxBytes) return null
    const expires = ttlMs === null ? Number.POSITIVE_INFINITY : now + ttlMs
    return new CachedEntry(key, record, expires, now + this.#maxAge)
  }

  #put(cached: CachedEntry, asked: Asked): void {
    // What was deleted or settled meanwhile must not come back.
    if (asked.changes !== this.#changes) return
    this.#cached.set(cached)
    for (let { oldest } = this.#cached; oldest !== null && this.#isFull(); oldest = this.#cached.oldest) {
      this.#cached.remove(oldest)
    }
  }

  #isFull(): boolean {
    return this.#cached.length > this.#maxEntries || this.#cached.bytes > this.#maxBytes
  }
}
