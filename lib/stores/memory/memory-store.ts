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
import { StoreFull } from '../../errors.js'
import { BYTES, COUNT, checked } from '../../option-rules.js'
import { clock } from '../../util/clock.js'
import { resolved } from '../../util/sync-promise.js'
import { RELEASE_MEMORY_MS } from '../release-memory.js'
import { acquired, type ClaimEntry, giveBack, listedAt, newClaim, state } from './claim-entry.js'
import { MemoryEntry, sizeOf } from './entry.js'
import { LinkedMap, Node } from './linked-map.js'

/** Bounds of a `MemoryStore`. */
export interface MemoryStoreOptions {
  /**
   * How many replies are kept at most; the oldest go first. So many claims may run beside them, and none of them costs
   * a reply its place. What was interrupted counts as a claim, and goes when there is no room for another.
   * @default 100_000
   */
  maxEntries?: number
  /**
   * How many bytes the kept replies and the steps of unfinished operations take at most, roughly. A step costs the oldest
   * replies their place, but no other step: when there is no room for it, it is refused.
   * @default 67_108_864
   */
  maxBytes?: number
}

/** A finished operation, and who finished it. */
class CompletedEntry extends MemoryEntry {
  readonly token: string | null

  constructor(key: string, token: string | null, record: StoredRecord, expires: number) {
    super(key, record, expires)
    this.token = token
  }
}

/** Who released a key, which is free. */
class Released extends Node {
  readonly token: string
  readonly expires: number

  constructor(key: string, token: string, expires: number) {
    super(key)
    this.token = token
    this.expires = expires
  }

  /** There are never so many that they count. */
  get size(): number {
    return 0
  }
}

/** Who finishes what nobody is running: no owner of before takes it for its own. */
const NOBODY = null
/** More releases than these are not remembered. */
const MAX_RELEASED = 10_000
/** What a step takes beside its name and its result, roughly. */
const STEP_OVERHEAD = 100
const SWEEP_EVERY_MS = 1_000
const SWEEP_AT_ONCE = 2_000

/**
 * Claims and replies in the memory of this process: for one process, for development, for tests. A restart
 * forgets everything. It is bounded: when it is full, the oldest replies make room for new ones, and further claims and
 * steps are refused; a running claim is never forgotten, and a claim never costs a reply.
 */
export class MemoryStore implements IdempotencyStore {
  readonly #maxEntries: number
  readonly #maxBytes: number
  readonly #claims = new Map<string, ClaimEntry>()
  readonly #done = new LinkedMap<CompletedEntry>()
  readonly #released = new LinkedMap<Released>()
  readonly #listeners = new Map<string, Set<() => void>>()
  /** What the steps of all claims take. */
  #stepBytes = 0
  /** No lease ends before. Leases are looked through only when one of them may have ended. */
  #leasesHold = Number.POSITIVE_INFINITY
  #sweeper: NodeJS.Timeout | null = null

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(options: MemoryStoreOptions = {}) {
    const rules = { maxEntries: COUNT, maxBytes: BYTES }
    const { maxEntries, maxBytes } = checked<MemoryStoreOptions>(options, rules, { owner: 'MemoryStore ' })
    this.#maxEntries = maxEntries ?? 100_000
    this.#maxBytes = maxBytes ?? 67_108_864
  }

  // Promises are for the outside only: nothing is awaited, so each method is one atomic step, and its answer at hand.

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    try {
      return resolved(this.#acquire(key, claim))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    const now = clock.now()
    const held = this.#ownedBy(token, key, now)
    if (held === undefined) return false
    this.#lease(held, now + leaseMs)
    return true
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    try {
      return resolved(this.#complete(key, token, record, ttlMs))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  step(key: string, token: string, step: StoredStep): Promise<boolean> {
    try {
      return resolved(this.#step(key, token, step))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  async release(key: string, token: string, unused = false): Promise<boolean> {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    if (held?.token !== token) {
      const released = this.#released.get(key)
      return released?.token === token && released.expires > now
    }
    if (held.givenBack) return true
    if (held.found === null && held.steps === undefined) this.#forget(key, token, now)
    else {
      giveBack(held, unused)
      this.#lease(held, now)
    }
    this.#wake(key)
    return true
  }

  changed(key: string, signal: AbortSignal): Promise<void> {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    if (signal.aborted || held === undefined || held.leaseEnd <= now) return Promise.resolve()
    return new Promise((resolve) => {
      const listeners = this.#listeners.get(key) ?? new Set()
      const done = () => {
        listeners.delete(done)
        if (listeners.size === 0) this.#listeners.delete(key)
        signal.removeEventListener('abort', done)
        resolve()
      }
      listeners.add(done)
      this.#listeners.set(key, listeners)
      signal.addEventListener('abort', done)
    })
  }

  get(key: string): Promise<Acquisition | null> {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    if (held !== undefined) return resolved<Acquisition>(state(held, now))
    return resolved(this.#doneOf(key, now)?.at(now) ?? null)
  }

  async delete(key: string, unlessRunning = false): Promise<boolean> {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    if (unlessRunning && held !== undefined && held.leaseEnd > now) return false
    const existed = held !== undefined || this.#doneOf(key, now) !== undefined
    this.#drop(key)
    const done = this.#done.get(key)
    if (done !== undefined) this.#done.remove(done)
    this.#wake(key)
    return existed
  }

  /** All of it is one page. */
  list(kinds: readonly ListedKind[]): Promise<ListedPage> {
    const now = clock.now()
    const keys: ListedKey[] = []
    for (const [key, held] of this.#claims) {
      const listed = listedAt(key, held, now)
      if (kinds.includes(listed.state) && held.leaseEnd + held.retainMs > now) keys.push(listed)
    }
    for (const done of this.#done.values()) {
      if (kinds.includes(done.isReply ? 'reply' : 'tombstone') && done.expires > now) keys.push(done.listedAt(now))
    }
    return resolved<ListedPage>({ keys, cursor: null })
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    const done = held === undefined ? this.#doneOf(key, now) : undefined
    if ((held ?? done)?.fingerprint !== fingerprint) return false
    if (settlement === 'ended') {
      if (held === undefined || held.leaseEnd > now) return false
      giveBack(held, false)
      this.#lease(held, now)
    } else {
      if (held === undefined ? done?.isReply : held.leaseEnd > now) return false
      this.#finish(key, NOBODY, settlement.record, settlement.ttlMs, now)
    }
    return true
  }

  /** Stops the sweeping of expired entries until the store is used again. What it holds stays. */
  async close(): Promise<void> {
    if (this.#sweeper !== null) clearInterval(this.#sweeper)
    this.#sweeper = null
  }

  #acquire(key: string, claim: Claim): Acquisition {
    const now = clock.now()
    const held = this.#claimOf(key, now)
    if (held === undefined) {
      const done = this.#doneOf(key, now)
      if (done !== undefined) return done.at(now)
      this.#makeRoom(claim, now)
      this.#forgetRelease(key)
      return this.#claim(key, newClaim(claim), now + claim.leaseMs)
    }
    if (held.token === claim.token && !held.givenBack) {
      this.#lease(held, now + claim.leaseMs)
      held.retainMs = claim.retainMs
      held.fingerprint = claim.fingerprint
      return acquired(held)
    }
    if (held.leaseEnd > now || !claim.takeover) return state(held, now)
    return this.#claim(key, newClaim(claim, held), now + claim.leaseMs)
  }

  #claim(key: string, claimed: ClaimEntry, leaseEnd: number): Acquisition {
    this.#lease(claimed, leaseEnd)
    this.#claims.set(key, claimed)
    return acquired(claimed)
  }

  #lease(held: ClaimEntry, end: number): void {
    held.leaseEnd = end
    this.#leasesHold = Math.min(this.#leasesHold, end)
  }

  #complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): boolean {
    const now = clock.now()
    if (this.#ownedBy(token, key, now) === undefined) return this.#doneOf(key, now)?.token === token
    this.#finish(key, token, record, ttlMs, now)
    this.#wake(key)
    return true
  }

  #finish(key: string, token: string | null, record: StoredRecord, ttlMs: number | null, now: number): void {
    this.#drop(key)
    const { fingerprint, createdAt } = record
    const isTooLarge = sizeOf(key, record) > this.#maxBytes - this.#stepBytes
    const kept: StoredRecord = isTooLarge ? { kind: 'tombstone', reason: 'too-large', fingerprint, createdAt } : record
    this.#put(new CompletedEntry(key, token, kept, ttlMs === null ? Number.POSITIVE_INFINITY : now + ttlMs))
  }

  /** @throws StoreFull */
  #step(key: string, token: string, [name, result]: StoredStep): boolean {
    const now = clock.now()
    const held = this.#ownedBy(token, key, now)
    if (held === undefined) return false
    if (held.steps?.has(name)) return true
    const size = stepSize(name, result)
    if (this.#stepBytes + size > this.#maxBytes) this.#dropForgotten(now)
    if (this.#stepBytes + size > this.#maxBytes) {
      throw new StoreFull(`MemoryStore is full: the steps of unfinished operations take ${this.#stepBytes} bytes`)
    }
    held.steps ??= new Map()
    held.steps.set(name, result)
    this.#stepBytes += size
    this.#evict(0, 0)
    this.#startSweeping()
    return true
  }

  /** Forgets a claim, with its steps. */
  #drop(key: string): void {
    for (const [name, result] of this.#claims.get(key)?.steps ?? NO_STEPS) this.#stepBytes -= stepSize(name, result)
    this.#claims.delete(key)
  }

  #dropForgotten(now: number): void {
    for (const [key, held] of this.#claims) {
      if (held.leaseEnd + held.retainMs <= now) this.#drop(key)
    }
  }

  #claimOf(key: string, now: number): ClaimEntry | undefined {
    const held = this.#claims.get(key)
    if (held === undefined || held.leaseEnd + held.retainMs > now) return held
    this.#drop(key)
    return undefined
  }

  #ownedBy(token: string, key: string, now: number): ClaimEntry | undefined {
    const held = this.#claimOf(key, now)
    return held?.token === token && !held.givenBack ? held : undefined
  }

  #doneOf(key: string, now: number): CompletedEntry | undefined {
    const done = this.#done.get(key)
    if (done === undefined || done.expires > now) return done
    this.#done.remove(done)
    return undefined
  }

  #forget(key: string, token: string, now: number): void {
    this.#drop(key)
    this.#released.set(new Released(key, token, now + RELEASE_MEMORY_MS))
    const { oldest } = this.#released
    if (this.#released.length > MAX_RELEASED && oldest !== null) this.#released.remove(oldest)
    this.#startSweeping()
  }

  #forgetRelease(key: string): void {
    const released = this.#released.get(key)
    if (released !== undefined) this.#released.remove(released)
  }

  #put(done: CompletedEntry): void {
    this.#evict(1, done.size)
    this.#done.set(done)
    this.#startSweeping()
  }

  /** The oldest replies make room for so many others, of so many bytes. */
  #evict(entries: number, bytes: number): void {
    const most = this.#maxBytes - this.#stepBytes - bytes
    const isFull = () => this.#done.length + entries > this.#maxEntries || this.#done.bytes > most
    for (let { oldest } = this.#done; oldest !== null && isFull(); oldest = this.#done.oldest) this.#done.remove(oldest)
  }

  #startSweeping(): void {
    this.#sweeper ??= setInterval(() => this.#sweep(), SWEEP_EVERY_MS).unref()
  }

  /** @throws StoreFull */
  #makeRoom({ retainMs }: Claim, now: number): void {
    // Claims with which nothing is lost can be made by anybody: half of the room stays for those that count.
    const room = retainMs > 0 ? this.#maxEntries : Math.ceil(this.#maxEntries / 2)
    if (this.#claims.size < room) return
    if (this.#leasesHold <= now) {
      this.#leasesHold = Number.POSITIVE_INFINITY
      for (const [key, { leaseEnd }] of this.#claims) {
        this.#leasesHold = Math.min(this.#leasesHold, leaseEnd)
        if (leaseEnd > now) continue
        this.#drop(key)
        return
      }
    }
    throw new StoreFull(`MemoryStore is full: ${this.#claims.size} claims are running`)
  }

  #sweep(): void {
    const now = clock.now()
    this.#done.scan(SWEEP_AT_ONCE, (done) => {
      if (done.expires <= now) this.#done.remove(done)
    })
    this.#dropForgotten(now)
    for (let { oldest } = this.#released; oldest !== null && oldest.expires <= now; oldest = this.#released.oldest) {
      this.#released.remove(oldest)
    }
    if (this.#done.length === 0 && this.#released.length === 0 && this.#stepBytes === 0) void this.close()
  }

  #wake(key: string): void {
    const listeners = this.#listeners.get(key)
    if (listeners === undefined) return
    this.#listeners.delete(key)
    for (const listener of [...listeners]) listener()
  }
}

const NO_STEPS: ReadonlyMap<string, string> = new Map()

function stepSize(name: string, result: string): number {
  return name.length + result.length + STEP_OVERHEAD
}
