import type { Acquisition, Claim, IdempotencyStore, StoredRecord, StoredReply } from '../../types/index.js'
import { atHand } from '../at-hand.js'
import { InvalidOption } from '../errors.js'
import { RELEASE_MEMORY_MS } from './released.js'

/** Bounds of a `MemoryStore`. */
export interface MemoryStoreOptions {
  /**
   * How many keys are held at most, claims included.
   * @default 100_000
   */
  maxEntries?: number
  /**
   * How many bytes the kept replies take at most, roughly.
   * @default 67_108_864
   */
  maxBytes?: number
}

/** An unfinished operation. All times are monotonic milliseconds. */
interface ClaimEntry {
  token: string
  fingerprint: string
  attempt: number
  leaseEnd: number
  retainMs: number
}

/** A finished operation. */
interface DoneEntry {
  token: string
  record: KeptRecord
  expires: number
  size: number
}

/** Who released a key, which is free. */
interface ReleasedEntry {
  token: string
  expires: number
}

/** One-byte text is kept as a string, which takes less memory and collects faster than a buffer. */
type KeptRecord = Exclude<StoredRecord, StoredReply> | (Omit<StoredReply, 'body'> & { body: Buffer | string })

/** What an entry takes beside its key, headers and body, roughly. */
const ENTRY_OVERHEAD = 200
/** More releases than these are not remembered. */
const MAX_RELEASED = 10_000
const SWEEP_EVERY_MS = 1_000
const SWEEP_AT_ONCE = 2_000

/**
 * Claims and replies in the memory of this process: for one process, for development, for tests. A restart
 * forgets everything, and when the store is full it forgets the oldest replies, never a running claim.
 */
export class MemoryStore implements IdempotencyStore {
  readonly #maxEntries: number
  readonly #maxBytes: number
  readonly #claims = new Map<string, ClaimEntry>()
  readonly #done = new Map<string, DoneEntry>()
  readonly #released = new Map<string, ReleasedEntry>()
  readonly #listeners = new Map<string, Set<() => void>>()
  #bytes = 0
  #sweeper: NodeJS.Timeout | null = null
  // Kept over calls: a new iterator would walk over everything that was deleted before.
  #oldest: MapIterator<[string, DoneEntry]> | null = null
  #swept: MapIterator<[string, DoneEntry]> | null = null

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(options: MemoryStoreOptions = {}) {
    for (const name of Object.keys(options)) {
      if (name !== 'maxEntries' && name !== 'maxBytes') throw new InvalidOption(`MemoryStore has no option "${name}"`)
    }
    this.#maxEntries = bound('maxEntries', options.maxEntries ?? 100_000)
    this.#maxBytes = bound('maxBytes', options.maxBytes ?? 67_108_864)
  }

  // Promises are for the outside only: nothing is awaited, so each method is one atomic step, and its answer at hand.

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    try {
      return atHand(this.#acquire(key, claim))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    const now = performance.now()
    const held = this.#claimOf(key, now)
    if (held?.token !== token) return false
    held.leaseEnd = now + leaseMs
    return true
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    try {
      return atHand(this.#complete(key, token, record, ttlMs))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  async release(key: string, token: string): Promise<boolean> {
    const now = performance.now()
    if (this.#claimOf(key, now)?.token !== token) {
      const released = this.#released.get(key)
      return released?.token === token && released.expires > now
    }
    this.#claims.delete(key)
    this.#released.set(key, { token, expires: now + RELEASE_MEMORY_MS })
    if (this.#released.size > MAX_RELEASED) this.#released.delete(firstOf(this.#released))
    this.#startSweeping()
    this.#wake(key)
    return true
  }

  changed(key: string, signal: AbortSignal): Promise<void> {
    const now = performance.now()
    const held = this.#claimOf(key, now)
    if (signal.aborted || held === undefined || held.leaseEnd <= now) return Promise.resolve()
    return new Promise((resolve) => {
      const listeners = this.#listeners.get(key) ?? new Set()
      const done = () => {
        listeners.delete(done)
        if (listeners.size === 0 && this.#listeners.get(key) === listeners) this.#listeners.delete(key)
        signal.removeEventListener('abort', done)
        resolve()
      }
      listeners.add(done)
      this.#listeners.set(key, listeners)
      signal.addEventListener('abort', done)
    })
  }

  async get(key: string): Promise<Acquisition | null> {
    const now = performance.now()
    const held = this.#claimOf(key, now)
    if (held !== undefined) return state(held, now)
    const done = this.#doneOf(key, now)
    return done === undefined ? null : completed(done.record, done.expires, now)
  }

  async delete(key: string): Promise<boolean> {
    const now = performance.now()
    const existed = this.#claimOf(key, now) !== undefined || this.#doneOf(key, now) !== undefined
    this.#claims.delete(key)
    this.#drop(key)
    this.#wake(key)
    return existed
  }

  /** Stops the sweeping of expired entries until the store is used again. What it holds stays. */
  async close(): Promise<void> {
    if (this.#sweeper !== null) clearInterval(this.#sweeper)
    this.#sweeper = null
  }

  #acquire(key: string, claim: Claim): Acquisition {
    const now = performance.now()
    const held = this.#claimOf(key, now)
    if (held === undefined) {
      const done = this.#doneOf(key, now)
      if (done !== undefined) return completed(done.record, done.expires, now)
      this.#makeRoom()
      this.#released.delete(key)
      this.#claims.set(key, newClaim(claim, 1, now))
      return { state: 'acquired', attempt: 1 }
    }
    if (held.token === claim.token) {
      held.leaseEnd = now + claim.leaseMs
      return { state: 'acquired', attempt: held.attempt }
    }
    if (held.leaseEnd > now || !claim.takeover) return state(held, now)
    const attempt = held.attempt + 1
    this.#claims.set(key, newClaim(claim, attempt, now))
    return { state: 'acquired', attempt }
  }

  #complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): boolean {
    const now = performance.now()
    if (this.#claimOf(key, now)?.token !== token) {
      return this.#doneOf(key, now)?.token === token
    }
    this.#claims.delete(key)
    let kept = keep(record)
    let size = sizeOf(key, kept)
    if (size > this.#maxBytes) {
      kept = { kind: 'tombstone', reason: 'too-large', fingerprint: record.fingerprint, createdAt: record.createdAt }
      size = sizeOf(key, kept)
    }
    this.#put(key, { token, record: kept, expires: ttlMs === null ? Infinity : now + ttlMs, size })
    this.#wake(key)
    return true
  }

  #claimOf(key: string, now: number): ClaimEntry | undefined {
    const held = this.#claims.get(key)
    if (held === undefined || held.leaseEnd + held.retainMs > now) return held
    this.#claims.delete(key)
    return undefined
  }

  #doneOf(key: string, now: number): DoneEntry | undefined {
    const done = this.#done.get(key)
    if (done === undefined || done.expires > now) return done
    this.#drop(key)
    return undefined
  }

  #put(key: string, entry: DoneEntry): void {
    this.#drop(key)
    while (this.#bytes + entry.size > this.#maxBytes && this.#evict()) {}
    this.#done.set(key, entry)
    this.#bytes += entry.size
    this.#startSweeping()
  }

  #startSweeping(): void {
    this.#sweeper ??= setInterval(() => this.#sweep(), SWEEP_EVERY_MS).unref()
  }

  #drop(key: string): void {
    const done = this.#done.get(key)
    if (done === undefined) return
    this.#done.delete(key)
    this.#bytes -= done.size
  }

  #makeRoom(): void {
    if (this.#claims.size + this.#done.size < this.#maxEntries || this.#evict()) return
    for (const [other, held] of this.#claims) {
      if (held.leaseEnd <= performance.now()) {
        this.#claims.delete(other)
        return
      }
    }
    throw new Error(`MemoryStore is full: all of its ${this.#maxEntries} entries are running claims`)
  }

  /** Forgets the oldest reply. `false` when there is none. */
  #evict(): boolean {
    for (let fresh = this.#oldest === null; ; fresh = true) {
      this.#oldest ??= this.#done.entries()
      const { value, done } = this.#oldest.next()
      if (!done) {
        this.#drop(value[0])
        return true
      }
      this.#oldest = null
      if (fresh) return false
    }
  }

  #sweep(): void {
    const now = performance.now()
    this.#swept ??= this.#done.entries()
    for (let looked = 0; looked < SWEEP_AT_ONCE; looked++) {
      const { value, done } = this.#swept.next()
      if (done) {
        this.#swept = null
        break
      }
      if (value[1].expires <= now) this.#drop(value[0])
    }
    for (const [key, held] of this.#claims) {
      if (held.leaseEnd + held.retainMs <= now) this.#claims.delete(key)
    }
    for (const [key, released] of this.#released) {
      if (released.expires > now) break
      this.#released.delete(key)
    }
    if (this.#done.size === 0 && this.#released.size === 0) void this.close()
  }

  #wake(key: string): void {
    const listeners = this.#listeners.get(key)
    if (listeners === undefined) return
    this.#listeners.delete(key)
    for (const listener of [...listeners]) listener()
  }
}

function firstOf(map: Map<string, unknown>): string {
  for (const key of map.keys()) return key
  throw new RangeError('The map is empty')
}

function bound(name: string, value: number): number {
  if (Number.isSafeInteger(value) && value > 0) return value
  throw new InvalidOption(
    `MemoryStore option "${name}" takes a positive integer, got ${String(value)} (${typeof value})`
  )
}

function newClaim({ token, fingerprint, leaseMs, retainMs }: Claim, attempt: number, now: number): ClaimEntry {
  return { token, fingerprint, attempt, leaseEnd: now + leaseMs, retainMs }
}

function state({ fingerprint, attempt, leaseEnd }: ClaimEntry, now: number): Acquisition {
  return leaseEnd > now
    ? { state: 'running', fingerprint, leaseMs: Math.ceil(leaseEnd - now) }
    : { state: 'abandoned', fingerprint, attempt }
}

function completed(kept: KeptRecord, expires: number, now: number): Acquisition {
  return { state: 'completed', record: give(kept), ttlMs: expires === Infinity ? null : Math.ceil(expires - now) }
}

/** A copy that nobody else can change. */
function keep(record: StoredRecord): KeptRecord {
  if (record.kind === 'tombstone') return { ...record }
  const { body } = record
  return { ...record, headers: copyHeaders(record.headers), body: record.text ? textOf(body) : Buffer.from(body) }
}

function give(kept: KeptRecord): StoredRecord {
  if (kept.kind === 'tombstone') return { ...kept }
  const body = typeof kept.body === 'string' ? Buffer.from(kept.body, 'latin1') : Buffer.from(kept.body)
  return { ...kept, headers: copyHeaders(kept.headers), body }
}

function textOf(body: Buffer): string {
  return body.toString('latin1')
}

function copyHeaders(headers: StoredReply['headers']): StoredReply['headers'] {
  return headers.map(([name, value]) => [name, Array.isArray(value) ? [...value] : value])
}

function sizeOf(key: string, record: KeptRecord): number {
  let size = ENTRY_OVERHEAD + key.length + record.fingerprint.length
  if (record.kind === 'tombstone') return size
  size += record.body.length
  for (const [name, value] of record.headers) size += name.length + value.length + 40
  return size
}
