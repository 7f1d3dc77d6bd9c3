import { isAscii } from 'node:buffer'
import { randomBytes } from 'node:crypto'
import type {
  Acquisition,
  Claim,
  Duration,
  IdempotencyStore,
  ListedKind,
  ListedPage,
  Settlement,
  StoredRecord,
  StoredStep
} from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { checked, DURATION, TEXT } from '../../option-rules.js'
import { encodeRecord, headStart } from '../record-codec.js'
import { RELEASE_MEMORY_MS } from '../release-memory.js'
import type { RedisClient } from './client.js'
import type { Argument, Link, RedisConnection } from './connection.js'
import { claimFailure, discreet, isSyntaxError, isWrongType } from './errors.js'
import { warnOfEviction } from './eviction.js'
import { Listing } from './listing.js'
import { connectionOf } from './recognise.js'
import { Renewals } from './renewals.js'
import { runScript } from './run-script.js'
import { ACQUIRE, COMPLETE, DELETE, RELEASE, type Script, SETTLE, STEP, WATCH } from './scripts.js'
import { RedisSubscriptions } from './subscriptions.js'
import { CLAIM, decode, ENDED, isClaim, lapsed, ownerOf, RECORD, RELEASED, stepsIn } from './values.js'

type Evaluator = Pick<Link, 'evaluate'>

/** Options of a `RedisStore`. */
export interface RedisStoreOptions {
  /**
   * Put before every key, and before every channel.
   * @default 'idempotency:'
   */
  keyPrefix?: string
  /**
   * How many replicas must have a reply before it counts as stored (`WAIT`). Not for a Cluster. It takes a write and
   * a wait more per reply, for which the connection stands still.
   * @default 0
   */
  replicas?: number
  /**
   * How long to wait for them. Should be less than `storeTimeout`.
   * @default 1_000
   */
  replicaTimeout?: Duration
}

const RULES = {
  keyPrefix: TEXT,
  replicas: {
    takes: 'a number of replicas',
    accepts: (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0
  },
  replicaTimeout: DURATION
}

const LONGEST_STRING = 16_384
/** What PTTL says of what does not expire. */
const FOR_EVER = -1

/**
 * Claims and replies in Redis (6.2 and newer, Valkey), by a client of `ioredis`, `iovalkey` or `redis` (node-redis, 5 and
 * newer): single, Sentinel, Cluster, or a pool. One round trip to acquire and one to complete, a second one to tell whose claim
 * a key is that is not free; the lease is decided by the clock of Redis alone. The client stays the caller's: it is never connected or closed here. Processes may have different
 * ones.
 *
 * A list walks over all keys of the server, be they the store's or not, 300 at a time (`SCAN`), and reads the beginning of those
 * with its prefix; in a Cluster it does so on one master after the other. It ends with an error when the server is started anew,
 * or another takes its place, before the list has come to its end: list from the beginning then.
 */
export class RedisStore implements IdempotencyStore {
  readonly #connection: RedisConnection
  readonly #prefix: string
  readonly #replicas: number
  readonly #replicaTimeout: number
  readonly #subscriptions: RedisSubscriptions
  readonly #renewals: Renewals
  readonly #listing: Listing
  /** Does the server take SET with NX and GET together? Redis does from 7.0 on. */
  #setNxGet = true
  /** Has it been looked at whether the server may evict what is stored? */
  #eviction: Promise<void> | null = null

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(client: RedisClient, options: RedisStoreOptions = {}) {
    const connection = connectionOf(client)
    const { keyPrefix, replicas, replicaTimeout } = checked<RedisStoreOptions>(options, RULES, { owner: 'RedisStore ' })
    if (replicas && connection.isCluster) {
      throw new InvalidOption(
        'RedisStore option "replicas" takes no Cluster, where WAIT has no one connection to go to'
      )
    }
    this.#connection = connection
    this.#prefix = keyPrefix ?? 'idempotency:'
    this.#replicas = replicas ?? 0
    this.#replicaTimeout = replicaTimeout ?? 1_000
    this.#subscriptions = new RedisSubscriptions(connection)
    this.#renewals = new Renewals(connection)
    this.#listing = new Listing(connection, this.#prefix)
  }

  // What is the caller's is read before anything is waited for: it may change meanwhile.
  async acquire(
    key: string,
    { token, fingerprint, leaseMs, retainMs, takeover, withTtl }: Claim
  ): Promise<Acquisition> {
    try {
      this.#eviction ??= warnOfEviction(this.#connection)
      const owner = ownerOf(CLAIM, token)
      const expiry = String(retainMs + leaseMs)
      if (this.#setNxGet) {
        const found = await this.#setOrGet(key, join(owner, `01:${retainMs}::${fingerprint}`), expiry)
        if (found === null) return { state: 'acquired', attempt: 1 }
        if (Buffer.isBuffer(found) && found[0] === RECORD) {
          if (withTtl === false) return decode(found, FOR_EVER, false)
          const whole = await this.get(key)
          if (whole?.state === 'completed') return whole
        }
      }
      return await this.#acquireCarefully(key, owner, String(retainMs), fingerprint, expiry, takeover)
    } catch (error) {
      throw claimFailure(error)
    }
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#renewals.renew(this.#prefix + key, ownerOf(CLAIM, token), leaseMs)
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    try {
      const name = this.#prefix + key
      const args = [ownerOf(CLAIM, token), recordedBy(record, token), expiryOf(ttlMs), name]
      return this.#store((link) => runScript(link, COMPLETE, [name], args).then(isOne))
    } catch (error) {
      return Promise.reject(error)
    }
  }

  async step(key: string, token: string, [name, result]: StoredStep): Promise<boolean> {
    return this.#testClaim(STEP, key, ownerOf(CLAIM, token), name, result)
  }

  async release(key: string, token: string, unused = false): Promise<boolean> {
    const memory = String(RELEASE_MEMORY_MS)
    return this.#testClaim(RELEASE, key, ownerOf(CLAIM, token), unused ? '1' : '0', memory, this.#prefix + key)
  }

  changed(key: string, signal: AbortSignal): Promise<void> {
    const watch = () => this.#test(WATCH, key)
    return this.#subscriptions.changed(this.#prefix + key, watch, signal)
  }

  async get(key: string): Promise<Acquisition | null> {
    const [get, pttl] = await this.#connection.getWithTtl(this.#prefix + key)
    const error = get?.[0] ?? pttl?.[0]
    if (error) throw discreet(error)
    const value = get?.[1]
    if (!Buffer.isBuffer(value) || value[0] === RELEASED) return null
    const left = Number(pttl?.[1])
    return decode(value, left, isClaim(value) && lapsed(value, left))
  }

  async delete(key: string, unlessRunning = false): Promise<boolean> {
    return this.#test(DELETE, key, this.#prefix + key, ...(unlessRunning ? ['1'] : []))
  }

  async list(kinds: readonly ListedKind[], cursor: string | null): Promise<ListedPage> {
    return this.#listing.page([...kinds], cursor)
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    // No owner of before finds itself in what is put there.
    const nobody = randomBytes(12).toString('base64url')
    const name = this.#prefix + key
    if (settlement === 'ended') return this.#testClaim(SETTLE, key, fingerprint, name, ownerOf(ENDED, nobody))
    const { record, ttlMs } = settlement
    const args = [fingerprint, name, recordedBy(record, nobody), headStart(fingerprint), expiryOf(ttlMs)]
    return this.#store((link) => runScript(link, SETTLE, [name], args).then(isOne, noWhenWrongType))
  }

  /** Closes the connection that listens for changes; the next duplicate that waits opens another. */
  close(): Promise<void> {
    return this.#subscriptions.close()
  }

  /** `null` for a free key, which is taken; else what is there. `undefined` where a server before Redis 7 does not understand. */
  async #setOrGet(key: string, value: Argument, expiry: string): Promise<unknown> {
    try {
      return await this.#connection.setOrGet(this.#prefix + key, value, expiry)
    } catch (error) {
      if (!isSyntaxError(error as Error)) throw error
      this.#setNxGet = false
      return undefined
    }
  }

  /** What one command does not show: whose claim it is, whether its lease has lapsed, and what comes with it. */
  async #acquireCarefully(
    key: string,
    owner: Argument,
    retainMs: string,
    fingerprint: string,
    expiry: string,
    takeover: boolean
  ): Promise<Acquisition> {
    const reply = await this.#run(ACQUIRE, key, owner, retainMs, fingerprint, expiry, takeover ? '1' : '0')
    // Numbers may come as strings: ioredis has an option for that.
    const [attempt, value, left, abandoned] = reply as [unknown, Buffer, unknown, unknown]
    if (Number(attempt) > 0) return { state: 'acquired', attempt: Number(attempt), ...stepsIn(value) }
    return decode(value, Number(left), Number(abandoned) === 1)
  }

  /** Puts a record where it says, and waits until as many replicas have it as it takes. */
  #store(put: (link: Evaluator) => Promise<boolean>): Promise<boolean> {
    if (this.#replicas === 0) return put(this.#connection)
    return this.#connection.hold(async (link) => {
      const { identity } = link
      const stored = await put(link)
      if (stored) await this.#replicated(link, identity)
      return stored
    })
  }

  /** Rejects when not enough replicas have what was written until now, or when it was written by another connection. */
  async #replicated(link: Link, identity: unknown): Promise<void> {
    // WAIT is about the writes of its own connection, so there is one right before it: the record may have come by another.
    const results = await link.setAndWait(`${this.#prefix}replicated`, this.#replicas, this.#replicaTimeout)
    for (const [error] of results) if (error) throw discreet(error)
    if (link.identity !== identity) throw new Error('The connection to Redis was lost while replicas were waited for')
    const reached = Number(results[1]?.[1])
    if (!(reached >= this.#replicas)) throw new Error(`${reached} of ${this.#replicas} replicas have the reply`)
  }

  /** Runs a script that answers yes or no. */
  #test(script: Script, key: string, ...args: Argument[]): Promise<boolean> {
    return this.#run(script, key, ...args).then(isOne)
  }

  /** The same of a claim. */
  #testClaim(script: Script, key: string, ...args: Argument[]): Promise<boolean> {
    return this.#test(script, key, ...args).catch(noWhenWrongType)
  }

  #run(script: Script, key: string, ...args: Argument[]): Promise<unknown> {
    return runScript(this.#connection, script, [this.#prefix + key], args)
  }
}

function isOne(result: unknown): boolean {
  return Number(result) === 1
}

/** A list, say, is nobody's claim. Asking again would not make it one. */
function noWhenWrongType(error: unknown): false {
  if (isWrongType(error)) return false
  throw error
}

function expiryOf(ttlMs: number | null): string {
  return ttlMs === null ? '' : String(ttlMs)
}

function recordedBy(record: StoredRecord, token: string): Argument {
  return cheapest(encodeRecord(record, Buffer.from(ownerOf(RECORD, token))))
}

function join(owner: Argument, rest: string): Argument {
  return typeof owner === 'string' ? owner + rest : Buffer.concat([owner, Buffer.from(rest)])
}

/** A record of ASCII text as a string, unless it is so long that bytes are cheaper after all. */
function cheapest(value: Buffer): Argument {
  return value.length <= LONGEST_STRING && isAscii(value) ? value.toString('latin1') : value
}
