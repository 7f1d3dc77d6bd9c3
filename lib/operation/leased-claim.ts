import type { Acquisition, Claim, IdempotencyStore, Loss, StoredRecord, StoredStep } from '../../types/index.js'
import { UnreadableAnswer } from '../errors.js'
import { clock } from '../util/clock.js'
import { type MaybePromise, peek } from '../util/sync-promise.js'
import { promiseTry } from '../util/timeout.js'
import type { Claimant, HeldClaim } from './held-claim.js'
import { cancelRenewal, type Renewable, scheduleRenewal } from './leases.js'
import { tell, tellFailure, tellStored, unavailable } from './report.js'
import { isElsewhere } from './rotation.js'
import { StepKeeper } from './step-keeper.js'
import { isAcquisition, toBoolean } from './store-answers.js'
import { retryUntil, type StoreContext } from './store-context.js'
import type { Waiting } from './store-health.js'

/**
 * A claim under a lease, by an owner's token. It is renewed until its operation has ended, stored or given back; what
 * the store does not take goes on in the background, and counts in this process until another may have the key.
 */
export class LeasedClaim implements HeldClaim, Renewable, Waiting {
  readonly client = null
  loss: Loss = 'unknown'
  renewal: Renewable['renewal'] = null
  isReleasing = false
  /** What could not be stored yet. */
  unstored: StoredRecord | null = null
  /** What it ends with. */
  #record: StoredRecord | null = null
  readonly #claimant: Claimant
  readonly #context: StoreContext
  /** `null` until there is one: most operations have none. */
  #steps: StepKeeper | null = null
  #token: string
  /** When the store was last asked to begin the lease: it ends no sooner than a lease later. Monotonic milliseconds. */
  #leasedAt: number
  /** Claimed anew, and it was not seen yet whether somebody has claimed it under another secret meanwhile. */
  #mayBeElsewhere = false
  /** The attempt to store what could not be stored that is under way. */
  #storing: Promise<boolean> | null = null
  /** The operator wants the key to be forgotten. */
  #isForgotten = false
  /** What other requests of this process are asking about the key meanwhile; one of them may leave its claim to this one. */
  #rivals: Set<Promise<unknown>> | null = null

  /** @param steps Those that earlier attempts have finished. */
  constructor(
    claimant: Claimant,
    context: StoreContext,
    token: string,
    leasedAt: number,
    steps: readonly StoredStep[]
  ) {
    this.#claimant = claimant
    this.#context = context
    this.#token = token
    this.#leasedAt = leasedAt
    if (steps.length > 0) this.#steps = this.#keeper(steps)
  }

  get lease(): number {
    return this.#claimant.policy.lease
  }

  /** The store cannot have let the lease lapse yet: the key is this operation's. */
  get isLeased(): boolean {
    return clock.now() - this.#leasedAt < this.lease
  }

  get keepStep(): HeldClaim['keepStep'] {
    return this.#claimant.policy.store.step === undefined ? null : (step) => this.#keepStep(step)
  }

  get sharesLocks(): boolean {
    return this.#claimant.policy.store.sharesLocks === true
  }

  /** Does the handler run, or its reply wait to be stored, under a claim that counts? */
  get isOwner(): boolean {
    return !this.isReleasing && this.#isWanted()
  }

  hold(): void {
    scheduleRenewal(this)
  }

  complete(record: StoredRecord): MaybePromise<void> {
    this.#record = record
    const stored = peek(this.#call(() => this.#complete(record)))
    if (stored instanceof Promise) return this.#completeInBackground(stored, record)
    this.#completed(stored, record)
  }

  async isOurs(): Promise<boolean> {
    if (this.isLeased) return true
    const { policy } = this.#claimant
    try {
      return await this.#renewOnce()
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      if (policy.bypasses) return true
      throw unavailable(policy, error)
    }
  }

  async release(unused: boolean): Promise<void> {
    const { policy } = this.#claimant
    this.isReleasing = true
    cancelRenewal(this)
    try {
      const released = toBoolean(await this.#call(() => this.#release(unused)))
      if (released) tell(this.#claimant, 'released')
      else this.#claimant.lost()
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      // With `onAbandoned: 'reject'` a lapsed lease would make retries fail as abandoned: renewed until it is released.
      if (!policy.reruns) scheduleRenewal(this)
      void this.#releaseInBackground(unused)
      return
    }
    this.#claimant.end()
  }

  renew(): void {
    void this.#renew()
  }

  letGo(): void {
    cancelRenewal(this)
  }

  forget(): void {
    this.#isForgotten = true
    this.loss = 'deleted'
    this.unstored = null
  }

  asFound(): Acquisition {
    return { state: 'running', fingerprint: this.#claimant.storedFingerprint, leaseMs: this.lease }
  }

  asKnown(): Acquisition | null {
    if (!this.isOwner || !this.isLeased) return null
    return this.#record === null ? this.asFound() : this.asStored(this.#record)
  }

  /** The record that could not be stored, as the store would give it. */
  asStored(record: StoredRecord): Acquisition {
    return { state: 'completed', record, ttlMs: this.#claimant.ttl }
  }

  /** Tries once more to store what could not be stored. All who need to know at the same time share one attempt. */
  storeAgain(record: StoredRecord): Promise<boolean> {
    this.#storing ??= this.#storeAgain(record)
    return this.#storing
  }

  /** Another request of this process is asking for the key. */
  meet(rival: Promise<unknown>): void {
    const rivals = this.#rivals ?? new Set()
    this.#rivals = rivals.add(rival)
    const forget = () => rivals.delete(rival)
    rival.then(forget, forget)
  }

  /** Another request of this process has got the key, and leaves it to this claim, under the token that it has now. */
  async adopt(token: string): Promise<void> {
    const { policy, storageKey } = this.#claimant
    this.#token = token
    const askedAt = clock.now()
    try {
      // By the same token, so that nobody comes between: from now on it is this fingerprint that is compared.
      await this.#call(() => policy.store.acquire(storageKey, this.#claim()))
      this.#leasedAt = askedAt
      await this.#steps?.restore()
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      // It is there in any case, without steps.
      this.#steps?.retryAll()
    }
  }

  async #completeInBackground(answer: Promise<boolean>, record: StoredRecord): Promise<void> {
    let stored: boolean
    try {
      stored = await answer
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      // The key was deleted: its record is not replayed to duplicates any more.
      if (!this.#isForgotten) {
        this.unstored = record
        scheduleRenewal(this)
      }
      const { health } = this.#context
      const isPointless = () => this.#claimant.isClosed || this.#isOver()
      void retryUntil(health, () => this.storeAgain(record), isPointless).then((stored) =>
        this.#completed(stored, record)
      )
      return
    }
    this.#completed(stored, record)
  }

  #completed(stored: boolean | null, record: StoredRecord): void {
    this.unstored = null
    this.#record = null
    if (this.#isOver()) return
    this.#claimant.end()
    if (stored === null) return
    if (stored) tellStored(this.#claimant, record)
    else this.#claimant.lost()
  }

  #complete(record: StoredRecord): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    const stored = promiseTry(() => policy.store.complete(storageKey, this.#token, record, this.#claimant.ttl))
    return peek(stored) === true ? stored : this.#completeOrReclaim(stored, record)
  }

  async #completeOrReclaim(stored: Promise<boolean>, record: StoredRecord): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    const token = this.#token
    if (toBoolean(await stored)) return true
    // Under another token now, another request of this process has left the claim to this one.
    const isOwner = token !== this.#token || (await this.#reclaim(token))
    return isOwner && toBoolean(await policy.store.complete(storageKey, this.#token, record, this.#claimant.ttl))
  }

  async #storeAgain(record: StoredRecord): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    try {
      const limit = Math.max(policy.lease / 3, policy.storeTimeout)
      const stored = await this.#context.health.ask(storageKey, limit, () => this.#complete(record))
      this.#completed(stored, record)
      return stored
    } finally {
      this.#storing = null
    }
  }

  async #keepStep(step: StoredStep): Promise<boolean> {
    const steps = this.#steps ?? this.#keeper([])
    this.#steps = steps
    steps.add(step)
    const token = this.#token
    try {
      const isKept =
        (await this.#askToKeep(step)) || token !== this.#token || (await this.#call(() => this.#reclaim(token)))
      if (!isKept && this.#isHeld()) this.#lose()
      return isKept
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      steps.retry(step)
      return true
    }
  }

  /** A release stands for what was done under it: the steps that the store does not have yet go first. */
  async #release(unused: boolean): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    if (this.#steps !== null && !(await this.#steps.flush())) return false
    return policy.store.release(storageKey, this.#token, unused)
  }

  async #releaseInBackground(unused: boolean): Promise<void> {
    // Once the server has closed, nothing is given back any more.
    const given = (await this.#flushInBackground()) && (await this.#orphan(unused))
    this.#claimant.end()
    if (given) tell(this.#claimant, 'released')
  }

  async #flushInBackground(): Promise<boolean> {
    const steps = this.#steps
    if (steps === null) return true
    const isPointless = () => this.#claimant.isClosed
    return (await retryUntil(this.#context.health, () => steps.flush(), isPointless)) !== null
  }

  #keeper(steps: readonly StoredStep[]): StepKeeper {
    const isPointless = () => this.#claimant.isClosed || this.#isOver()
    return new StepKeeper(this.#context.health, steps, (step) => this.#askToKeep(step), isPointless)
  }

  async #askToKeep(step: StoredStep): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    const { store } = policy
    if (store.step === undefined) return false
    return toBoolean(await this.#call(() => (store as Required<IdempotencyStore>).step(storageKey, this.#token, step)))
  }

  async #renew(): Promise<void> {
    const { policy } = this.#claimant
    if (this.#isOver() || (this.isReleasing && policy.reruns)) return
    try {
      await this.#renewOnce()
    } catch (error) {
      if (!this.#isOver()) tellFailure(this.#claimant, this.#context.health, error)
    }
    const isEnding = this.unstored !== null || (this.isReleasing && !policy.reruns)
    if (this.#claimant.isClosed || this.#isOver() || !(this.#isHeld() || isEnding)) return
    scheduleRenewal(this)
    this.#context.health.tellWhenBack(this)
  }

  /** Its lease has gone on while the store was down. */
  storeIsBack(): void {
    if (this.renewal === null) return
    cancelRenewal(this)
    this.renew()
  }

  /** Tells the store once that the owner lives, or finds out that there is another. */
  async #renewOnce(): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    const askedAt = clock.now()
    const token = this.#token
    const isRenewed = toBoolean(await this.#call(() => policy.store.renew(storageKey, token, policy.lease)))
    let renewed = isRenewed || token !== this.#token
    if (renewed && this.#mayBeElsewhere) renewed = await this.#call(() => this.#isAlone())
    this.#leasedAt = renewed ? askedAt : Number.NEGATIVE_INFINITY
    if (renewed) return true
    // If its record is on the way to the store, that step notices the loss by itself.
    if (!this.#isHeld()) return false
    if (await this.#call(() => this.#reclaim(token))) return true
    if (this.#isHeld()) this.#lose()
    return false
  }

  #lose(): void {
    this.#claimant.end()
    this.#claimant.lost()
  }

  /**
   * A store that lost its data does not know the claim any more, although nobody else has taken it: then it is
   * claimed anew, in one atomic step that fails if anybody else was faster. If that was another request of this process,
   * it leaves its claim to this one.
   * @param token Of the claim that the store does not know.
   */
  async #reclaim(token: string): Promise<boolean> {
    if (await this.#claimAnew()) return true
    if (this.#rivals !== null) await Promise.allSettled(this.#rivals)
    return token !== this.#token && this.#isWanted()
  }

  async #claimAnew(): Promise<boolean> {
    const { policy, storageKeys } = this.#claimant
    const [storageKey, ...others] = storageKeys
    const { store } = policy
    if (store.get === undefined) return false
    if ((await store.get(storageKey)) !== null || (await isElsewhere(store, others))) return this.#taken()
    if (!this.#isWanted()) return false
    const askedAt = clock.now()
    // Also where no answer comes, to the claim or to the look behind it: see `acquireAmong`.
    this.#mayBeElsewhere = others.length > 0
    let found: Acquisition
    try {
      found = await store.acquire(storageKey, this.#claim())
      if (!isAcquisition(found)) throw new UnreadableAnswer()
    } catch (error) {
      // It may be there all the same, without steps, and is renewed then as if nothing had happened.
      this.#steps?.retryAll()
      throw error
    }
    if (found.state !== 'acquired') return this.#taken()
    try {
      if (!(await this.#isAlone())) return this.#taken()
    } catch (error) {
      this.#steps?.retryAll()
      throw error
    }
    this.#leasedAt = askedAt
    await this.#steps?.restore()
    if (!this.#isWanted()) void this.#orphan(false)
    return this.#isWanted()
  }

  /** Has nobody claimed the key under another secret? Else the claim that was made anew is given back. */
  async #isAlone(): Promise<boolean> {
    const { policy, storageKeys } = this.#claimant
    this.#mayBeElsewhere = await isElsewhere(policy.store, storageKeys.slice(1))
    if (this.#mayBeElsewhere) void this.#orphan(true)
    return !this.#mayBeElsewhere
  }

  /** Somebody else has the key, or has had it. */
  #taken(): false {
    if (!this.#isForgotten) this.loss = 'taken'
    return false
  }

  #claim(): Claim {
    const { storedFingerprint: fingerprint, policy } = this.#claimant
    return {
      token: this.#token,
      fingerprint,
      leaseMs: policy.lease,
      retainMs: policy.retain,
      takeover: false,
      withTtl: false
    }
  }

  #orphan(unused: boolean): Promise<boolean> {
    const { policy, storageKey } = this.#claimant
    return this.#context.giveBack(storageKey, this.#token, policy.storeTimeout, unused)
  }

  /** What the store says, within its limit. */
  #call<T>(call: () => Promise<T>): Promise<T> {
    const { policy, storageKey } = this.#claimant
    return this.#context.health.ask(storageKey, policy.storeTimeout, call)
  }

  // Methods, because these change while others are awaited, which the compiler does not see.

  /** An attempt that takes long may come to its end when its claim is needed no more: stored, or deleted on purpose. */
  #isWanted(): boolean {
    return !this.#isForgotten && !this.#isOver()
  }

  #isHeld(): boolean {
    return this.#claimant.isHeld
  }

  #isOver(): boolean {
    return this.#claimant.phase === 'over'
  }
}
