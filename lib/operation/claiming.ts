import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  StoredRecord,
  StoredStep,
  TransactionAcquisition
} from '../../types/index.js'
import { StoreTimeout, UnreadableAnswer } from '../errors.js'
import { clock } from '../util/clock.js'
import { kPeek, type MaybePromise, type Peekable, peek } from '../util/sync-promise.js'
import { promiseTry, withTimeout } from '../util/timeout.js'
import type { Claimant, HeldClaim } from './held-claim.js'
import { LeasedClaim } from './leased-claim.js'
import { tellFailure } from './report.js'
import { acquireAmong, type Placed } from './rotation.js'
import { isAcquisition, isClaimedKey } from './store-answers.js'
import { type StoreContext, sleep } from './store-context.js'
import type { Permit } from './store-health.js'
import { newToken } from './token.js'
import { TransactionalClaim } from './transactional-claim.js'

/* Asking the store for a key: within a limit, and never again under a token whose answer was lost. */

/** Between two looks at who is about to yield, and for how many. */
const PAUSE_MS = 5
const MOST_PAUSES = 20

async function pause(n: number): Promise<boolean> {
  if (n <= MOST_PAUSES) await sleep(PAUSE_MS)
  return n <= MOST_PAUSES
}

/** An answer of the store, from a transaction or not. */
export type Found = Placed<Acquisition | TransactionAcquisition>

/** The store failed while a key was asked for. */
export class StoreFailure extends Error {
  /** Had another request of this process the key when it was asked for? */
  readonly isTaken: boolean

  constructor(cause: unknown, isTaken = false) {
    super('The key could not be asked for', { cause })
    this.isTaken = isTaken
  }
}

/**
 * Asks the store for the key of one operation: within its limit, under a token of its own, and not at all where this
 * process knows better. A lost acknowledgement is not a lost claim: what may have been written is given back under the
 * token that it was asked for with, and the next question has another.
 */
export class Claiming {
  /** What was found last is what this process remembers: that need not be true for long. */
  isRemembered = false
  /** Is the key asked for before everything is known of the request? */
  isEarly = false
  readonly #claimant: Claimant
  readonly #context: StoreContext
  /** The key that is claimed, whatever the operation was found under. */
  readonly #key: string
  #token = newToken()
  /** When the store was last asked. Monotonic milliseconds. */
  #askedAt = 0
  #transactional: TransactionalClaim | null = null

  constructor(claimant: Claimant, context: StoreContext) {
    this.#claimant = claimant
    this.#context = context
    this.#key = claimant.storageKeys[0]
  }

  /**
   * Asks the store. With transactions, one request for each key asks at a time: it takes a connection of the pool, and the
   * owner may need the last one.
   */
  ask(takeover: boolean): MaybePromise<Found> {
    return this.#claimant.policy.transaction ? this.#askInTurn(takeover) : this.#askStore(takeover)
  }

  /** The claim that was acquired, with the steps that earlier attempts have finished. */
  take(steps: readonly StoredStep[]): HeldClaim {
    if (this.#transactional === null) {
      return new LeasedClaim(this.#claimant, this.#context, this.#token, this.#askedAt, steps)
    }
    if (this.#transactional.isLost) {
      this.#context.live.delete(this.#key)
      throw new StoreFailure(new Error('The connection of the transaction was lost'))
    }
    return this.#transactional
  }

  /** Gives back what was acquired for who does not come to a handler: nobody is told, because nothing has begun. */
  async release(): Promise<void> {
    const { policy } = this.#claimant
    try {
      await withTimeout(policy.storeTimeout, () => policy.store.release(this.#key, this.#token, true))
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      this.#giveBack(this.#token)
    }
  }

  /** The same in the background. */
  drop(): void {
    if (this.#transactional === null) {
      this.#giveBack(this.#token)
    } else {
      this.#transactional.drop()
      this.#context.live.delete(this.#key)
    }
  }

  async #askInTurn(takeover: boolean): Promise<Found> {
    const storageKey = this.#key
    const { asking } = this.#context
    // An answer that was under way before this request came may be older than it: only what is final is still true.
    let isOld = true
    for (let asked = asking.get(storageKey); asked !== undefined; asked = asking.get(storageKey)) {
      const found = await asked
      if (found !== null && (!isOld || found.state === 'completed')) return found
      isOld = false
    }
    const answer = Promise.resolve(this.#askStore(takeover))
    const forOthers = answer.then((found) => (found.state === 'acquired' ? null : found))
    forOthers.catch(() => {})
    asking.set(storageKey, forOthers)
    try {
      return await answer
    } finally {
      asking.delete(storageKey)
    }
  }

  #askStore(takeover: boolean): MaybePromise<Found> {
    const { health, live } = this.#context
    const other = live.get(this.#key)
    // The reply is there, only the store does not have it yet.
    if (other instanceof LeasedClaim && other.unstored !== null) return this.#askOwner(other, other.unstored, takeover)
    if (other instanceof TransactionalClaim && other.isHidden) return other.asFound()
    const owner = other?.isReleasing ? undefined : other
    const permit = health.admit()
    if (permit === null) return this.#knownHere() ?? this.#goWithout(owner, health.error)
    const answer = promiseTry(() => this.#acquire(takeover))
    const found = peek(answer)
    if (found instanceof Promise || !isAcquisition(found)) {
      const asked = this.#awaitAnswer(answer, owner, permit)
      if (owner instanceof LeasedClaim) owner.meet(asked)
      return asked
    }
    health.answered()
    return this.#understand(found, owner)
  }

  async #awaitAnswer(answer: Promise<Found>, owner: HeldClaim | undefined, permit: Permit): Promise<Found> {
    const { policy } = this.#claimant
    const token = this.#token
    let found: Found
    try {
      found = await this.#context.health.ask(this.#key, policy.storeTimeout, () => answer, permit)
      if (!isAcquisition(found)) throw new UnreadableAnswer(undefined, !isClaimedKey(found))
    } catch (error) {
      // The claim may have been written all the same, or be about to be.
      if (policy.transaction) {
        void answer.then((late) => ('transaction' in late ? late.transaction.rollback() : undefined)).catch(() => {})
      } else {
        if (error instanceof StoreTimeout) this.#giveBack(token)
        void answer.then(
          (late) => (late?.state === 'acquired' ? this.#giveBack(token) : undefined),
          () => this.#giveBack(token)
        )
      }
      // A fresh token for the next attempt: the old one may be given back in the background at any time.
      this.#token = newToken()
      return this.#goWithout(owner, error)
    }
    return this.#understand(found, owner)
  }

  /** What the answer means to this process, which knows more than the store. `owner`: who had the key here before. */
  #understand(found: Found, owner: HeldClaim | undefined): MaybePromise<Found> {
    const { live } = this.#context
    if ('transaction' in found) {
      // The owner, on a route without transactions, is alive: it claims the key anew as soon as the transaction has let go of
      // it, before another process can.
      if (owner instanceof LeasedClaim && owner.isOwner) {
        const renew = () => owner.renew()
        void found.transaction.rollback().then(renew, renew)
        return owner.asFound()
      }
      this.#transactional = new TransactionalClaim(this.#claimant, this.#context, found.transaction, this.#askedAt)
      live.set(this.#key, this.#transactional)
    }
    // Others cannot see into a transaction, but this process can, if it is its own.
    if (found.state === 'running' && found.fingerprint === '') return live.get(this.#key)?.asFound() ?? found
    if (owner === undefined) return found
    // The owner is alive in this very process, whatever the store says: it has lost its data, or the process has stalled
    // for longer than the lease.
    if (found.state === 'acquired' && owner instanceof LeasedClaim && owner.isOwner) return this.#cede(owner)
    if (found.state !== 'abandoned') return found
    owner.renew()
    return owner.asFound()
  }

  /** Leaves a claim that the store has given to this operation to its living owner, under the token that it has now. */
  async #cede(owner: LeasedClaim): Promise<Found> {
    const token = this.#token
    this.#token = newToken()
    await owner.adopt(token)
    return owner.asFound()
  }

  /** The owner's reply counts for as long as nobody else can have the key: after that the store has to take it first. */
  #askOwner(owner: LeasedClaim, record: StoredRecord, takeover: boolean): MaybePromise<Found> {
    this.isRemembered = owner.isLeased
    return this.isRemembered ? owner.asStored(record) : this.#askBoth(owner, record, takeover)
  }

  async #askBoth(owner: LeasedClaim, record: StoredRecord, takeover: boolean): Promise<Found> {
    const { health } = this.#context
    const { policy } = this.#claimant
    const permit = health.admit()
    let stored: boolean
    try {
      if (permit === null) throw health.error
      stored = await withTimeout(Math.min(policy.storeTimeout, permit.patience), () => owner.storeAgain(record))
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      if (!policy.bypasses) throw new StoreFailure(error)
      // Rather than to run once more.
      stored = true
    }
    return stored ? owner.asStored(record) : this.#askStore(takeover)
  }

  /** What a store in this process knows of the key without asking another that is down. */
  #knownHere(): Acquisition | null {
    const { policy, storageKeys } = this.#claimant
    for (const key of storageKeys) {
      const known = (policy.store as Partial<Peekable>)[kPeek]?.(key)
      if (known) return known
    }
    return null
  }

  /** The store has failed, or is known to be down. */
  async #goWithout(owner: HeldClaim | undefined, error: unknown): Promise<Found> {
    tellFailure(this.#claimant, this.#context.health, error)
    const known = owner?.asKnown() ?? null
    this.isRemembered = known !== null
    if (known === null) throw new StoreFailure(error, owner !== undefined)
    return known
  }

  #acquire(takeover: boolean): Promise<Found> {
    const { storageKeys: keys, policy, phase } = this.#claimant
    const { store, transaction, nested, waits, storeTimeout: timeoutMs } = policy
    const claim = this.#claim(takeover)
    this.#askedAt = clock.now()
    if (keys.length > 1) {
      const giveBack = (key: string) => this.#giveBack(claim.token, key)
      return acquireAmong({ store, keys, claim, isHolder: phase === 'reserved', giveBack, pause })
    }
    if (!transaction) return store.acquire(this.#key, claim)
    return (store as Required<IdempotencyStore>).begin(this.#key, { ...claim, wake: waits, nested, timeoutMs })
  }

  #claim(takeover: boolean): Claim {
    const { storedFingerprint: fingerprint, policy } = this.#claimant
    return {
      token: this.#token,
      fingerprint,
      leaseMs: policy.lease,
      // What comes to no handler leaves nothing to be remembered.
      retainMs: this.isEarly ? 0 : policy.retain,
      takeover,
      withTtl: false
    }
  }

  #giveBack(token: string, key = this.#key): void {
    const { policy } = this.#claimant
    void this.#context.giveBack(key, token, policy.storeTimeout, true)
  }
}
