import type { FastifyRequest } from 'fastify'
import type {
  Acquisition,
  Claim,
  ClaimTransaction,
  Difference,
  IdempotencyEventName,
  IdempotencyStore,
  StoredRecord,
  StoredReply,
  TransactionAcquisition,
  TransactionClient,
  TransactionOutcome
} from '../../types/index.js'
import {
  Abandoned,
  InProgress,
  isFull,
  keyReused,
  NotReplayable,
  StoreTimeout,
  StoreUnavailable,
  UnreadableAnswer,
  withRetryAfter
} from '../errors.js'
import { publish, type Subject } from '../events.js'
import type { RequestSnapshot } from '../http/request-snapshot.js'
import { composeFingerprint, difference } from '../operation/fingerprint.js'
import { storageKey } from '../operation/storage-key.js'
import type { Policy } from '../options.js'
import type { Registration } from '../registration.js'
import { kPeek, type Maybe, type Peekable, reveal } from '../util/sync-promise.js'
import { promiseTry, withTimeout } from '../util/timeout.js'
import type { Timer } from '../util/timer.js'
import { cancelRenewal, type Renewable, scheduleRenewal } from './leases.js'
import { isAcquisition, isClaimedKey, toBoolean } from './store-answers.js'
import { insist, StoreInUse } from './store-context.js'
import type { Permit } from './store-health.js'
import { newToken } from './token.js'
import type { Waiter } from './waiting.js'

/**
 * Where an operation is in its life:
 *
 *   asking ───────────> held ──> running ──> ending ──> over
 *     │ ▲ ▲ └────────┐    └──────────────────────────────▲
 *     ▼ │ └──────┐   ▼                                   │
 *   undecided   reserved ────────────────────────────────┘
 *
 * `undecided`: somebody else holds or finished the key, and the verdict has to wait for the rest of the request.
 * `reserved`: the key was claimed by an early `hook`, for one lease, while the rest of the request is awaited.
 * `unprotected`: the store failed, and the route prefers to run all the same.
 */
type Phase = 'asking' | 'undecided' | 'reserved' | 'held' | 'running' | 'ending' | 'over' | 'unprotected'

/** What is to be done with the request. Refusals are thrown. */
export type Verdict = 'run' | 'replay' | 'later' | 'gone'

/** An answer of the store, from a transaction or not. */
type Found = Acquisition | TransactionAcquisition

/** How many keys one process reserves at a time in one store, for requests that have not been read yet. */
const MOST_RESERVATIONS = 1_000

/** The store failed while a key was asked for. */
class StoreFailure extends Error {}

/** The life of one keyed request: from the claim of its key to the end of the claim. Knows nothing of replies. */
export class Operation implements Subject, Waiter, Renewable {
  readonly request: FastifyRequest
  readonly policy: Policy
  readonly key: string
  readonly storageKey: string
  /** Who asks; `null` where a scope says so, or nobody does. */
  readonly credentials: string | null
  attempt = 0
  replayed = false
  phase: Phase = 'asking'
  /** The handler asked that its reply be not stored. */
  discarded = false
  renewal: Timer<Renewable> | null = null
  /** The reply to replay, after the verdict 'replay'. */
  reply: StoredReply | null = null
  readonly #registration: Registration
  readonly #store: StoreInUse
  #token = newToken()
  readonly #head: string
  #payload = ''
  #found: Acquisition | null = null
  /** What was found is what this process remembers: that need not be true for long. */
  #isRemembered = false
  /** Is the key asked for before everything is known of the request? */
  #isEarly = false
  #gone = false
  /** Somebody else was seen to have the key. */
  #taken = false
  /** The operator wants the key to be forgotten. */
  #forgotten = false
  /** The claim is being given back: it does not count any more. */
  #releasing = false
  /** What could not be stored yet. */
  #unstored: StoredRecord | null = null
  /** The attempt to store it that is under way. */
  #storing: Promise<boolean> | null = null
  /** What holds the claim, where the route has `transaction: true`. */
  #transaction: ClaimTransaction | null = null
  /** When the store was last asked to begin the lease: it ends no sooner than a lease later. Monotonic milliseconds. */
  #leasedAt = 0
  #controller: AbortController | null = null
  /** What other requests of this process are asking about the key meanwhile; one of them may leave its claim to this one. */
  #rivals: Set<Promise<unknown>> | null = null

  constructor(
    request: FastifyRequest,
    policy: Policy,
    registration: Registration,
    key: string,
    scope: string | null,
    { head, credentials }: RequestSnapshot
  ) {
    this.request = request
    this.policy = policy
    this.key = key
    this.storageKey = storageKey(scope, key)
    this.credentials = credentials
    this.#registration = registration
    this.#store = StoreInUse.of(policy.store)
    this.#head = head
  }

  get fingerprint(): string {
    return composeFingerprint(this.#head, this.#payload)
  }

  get lease(): number {
    return this.policy.lease
  }

  get takesOver(): boolean {
    return this.policy.reruns
  }

  get waitTimeout(): number {
    return this.policy.waitTimeout
  }

  get signal(): AbortSignal {
    this.#controller ??= new AbortController()
    return this.#controller.signal
  }

  /** What the handler may use of the transaction. */
  get transaction(): TransactionClient | null {
    return this.#transaction?.client ?? null
  }

  /** The payload's hash is known now. */
  learn(payload: string): void {
    this.#payload = payload
  }

  // What can be decided at once is decided at once: a promise is paid for only where there is something to wait for.

  /**
   * Claims the key before the request has been read, for one lease, so that duplicates are refused before theirs are. It
   * is forgotten when that has passed, and never takes over: nothing is lost with a request that does not come to its
   * handler. `'later'`: ask `claim` when everything is known.
   */
  reserve(): Maybe<Verdict> {
    this.#registration.operations.add(this)
    if (this.#gone) return this.#judged('gone')
    // Anybody can make reservations: those who run must not have to stand back behind them.
    if (this.#store.reservations >= MOST_RESERVATIONS) return this.#postpone(null)
    this.#isEarly = true
    return this.#judge(this.#acquire(false), false)
  }

  /** Claims the key, and gives the verdict: everything that can be known of the request is known. */
  claim(): Maybe<Verdict> {
    this.#registration.operations.add(this)
    if (this.#gone) return this.#judged('gone')
    const found = this.#found
    this.#found = null
    this.#isEarly = false
    if (this.phase === 'undecided') this.phase = 'asking'
    return this.#judge(found === null || this.#isRemembered ? this.#acquire(false) : found, true)
  }

  /** The handler starts. `false`: it must not, because the client has left, and the claim with it. */
  start(): boolean {
    if (this.phase === 'held') {
      this.phase = 'running'
      return true
    }
    return this.#gone ? false : this.refuseLost()
  }

  /** The claim was lost before the handler could start: with its connection, or to another. */
  refuseLost(): never {
    if (this.#transaction !== null) throw this.#unavailable(new Error('The connection of the transaction was lost'))
    throw this.#conflict(withRetryAfter(new InProgress(), 1))
  }

  /**
   * Ends the claim with a record. Resolves when it is stored; or when the store fails, and goes on in the
   * background, while the claim is kept. Rejects for a transaction only: when it was refused, or its outcome is
   * not known.
   * @param failed The reply is that of an error: of a transaction nothing but the record is committed.
   */
  complete(record: StoredRecord, failed = false): Maybe<void> {
    if (this.phase === 'over' || this.phase === 'ending') return
    if (this.discarded) return this.release()
    this.phase = 'ending'
    if (this.#transaction !== null) return this.#commit(this.#transaction, record, failed)
    const stored = reveal(this.#call(() => this.#complete(record)))
    if (stored instanceof Promise) return this.#completeLater(stored, record)
    this.#completed(stored, record)
  }

  async #completeLater(answer: Promise<boolean>, record: StoredRecord): Promise<void> {
    let stored: boolean
    try {
      stored = await answer
    } catch (error) {
      this.#report(error)
      // What is to be forgotten is no answer to anybody.
      if (!this.#forgotten) {
        this.#unstored = record
        scheduleRenewal(this)
      }
      const isPointless = () => this.#registration.closed || this.phase === 'over'
      void insist(() => this.#completeAgain(record), isPointless).then((stored) => this.#completed(stored, record))
      return
    }
    this.#completed(stored, record)
  }

  /** Gives the key back: nothing is stored, and a retry runs. */
  async release(): Promise<void> {
    if (this.phase === 'over' || this.phase === 'ending') return
    const unused = this.phase === 'held'
    this.phase = 'ending'
    this.#releasing = true
    cancelRenewal(this)
    const { store, storeTimeout } = this.policy
    try {
      const transaction = this.#transaction
      const released =
        transaction === null
          ? toBoolean(await this.#call(() => store.release(this.storageKey, this.#token, unused)))
          : await withTimeout(storeTimeout, () => transaction.rollback().then(() => true))
      if (released) this.#tell('released')
      else this.#lost()
    } catch (error) {
      this.#report(error)
      if (this.#transaction === null) {
        // Where a lapsed claim is not taken over it would be called abandoned, which it is not.
        if (!this.takesOver) scheduleRenewal(this)
        void this.#giveBack(this.#token, unused).then((given) => {
          this.#end()
          if (given) this.#tell('released')
        })
        return
      }
      // A transaction needs no more than that its connection ends.
      this.#transaction.abandon()
      this.#tell('released')
    }
    this.#end()
  }

  /** The request has ended before its handler started, or its client has. Nothing is stored. */
  async cancel(): Promise<void> {
    this.#gone = true
    this.#store.waiting.leave(this)
    if (this.phase === 'held') await this.release()
    else if (this.phase === 'reserved') await this.#unreserve()
    else if (this.phase === 'undecided') this.#end()
  }

  /** Gives back what was reserved: nobody is told, because nothing has begun. */
  async #unreserve(): Promise<void> {
    const { store, storeTimeout } = this.policy
    this.#end()
    try {
      await withTimeout(storeTimeout, () => store.release(this.storageKey, this.#token, true))
    } catch (error) {
      this.#report(error)
      void this.#giveBack(this.#token, true)
    }
  }

  /** The server closes: a duplicate that waits gets its answer now. */
  stopWaiting(): void {
    this.#store.waiting.leave(this)
  }

  /** The server has closed: nothing more is done for this operation. */
  abandon(): void {
    cancelRenewal(this)
    if (this.phase !== 'ending') this.#transaction?.abandon()
  }

  /** Tells the store that this process is alive, and keeps on doing so. */
  renew(): void {
    if (this.#transaction === null) {
      void this.#renew()
    } else if (this.#isHeld()) {
      this.#transaction.keepAlive()
      scheduleRenewal(this)
    }
  }

  /** The key was deleted on purpose: it is not to be claimed anew. */
  forget(): void {
    this.#forgotten = true
    this.#unstored = null
  }

  /** Asks the store once for a duplicate that waits. */
  async look(): Promise<Found> {
    return this.#acquire(false)
  }

  /** The claim may have been written, but is not needed. */
  disown(): void {
    if (this.#transaction === null) {
      void this.#giveBack(this.#token, true)
    } else {
      void this.#transaction.rollback()
      this.#store.live.delete(this.storageKey)
    }
  }

  /** What all ways to a verdict have in common: a failing store, and a client that has left meanwhile. */
  #judge(found: Maybe<Found>, final: boolean): Maybe<Verdict> {
    if (found instanceof Promise) return this.#judgeLater(found, final)
    try {
      const verdict = this.#decide(found, final)
      return verdict instanceof Promise ? this.#judgeLater(verdict, final) : this.#judged(verdict)
    } catch (error) {
      return this.#judgedFailed(error)
    }
  }

  async #judgeLater(pending: Promise<Found | Verdict>, final: boolean): Promise<Verdict> {
    try {
      const found = await pending
      const verdict = typeof found === 'string' ? found : this.#decide(found, final)
      return this.#judged(verdict instanceof Promise ? await verdict : verdict)
    } catch (error) {
      return this.#judgedFailed(error)
    }
  }

  #judged(verdict: Verdict): Verdict {
    if (verdict === 'replay' || verdict === 'gone') this.#end()
    return verdict
  }

  #judgedFailed(error: unknown): Verdict {
    // Whether to run all the same, and whether there is room for it, is decided when everything is known.
    const mayComeLater = error instanceof StoreFailure && (this.policy.bypasses || isFull(error.cause))
    if (this.#isEarly && mayComeLater && !this.#gone) return this.#postpone(null)
    this.#end()
    if (!(error instanceof StoreFailure)) throw error
    if (this.#gone) return 'gone'
    // To run unprotected is one thing, to run beside another that is known to run is quite another, and so it is to run
    // once more what may have run. A store that is full is there.
    const { cause } = error
    const isTaken =
      this.#taken || this.#store.live.has(this.storageKey) || (cause instanceof UnreadableAnswer && !cause.isFree)
    if (!this.policy.bypasses || isTaken || isFull(cause)) throw this.#unavailable(cause)
    this.phase = 'unprotected'
    this.#tell('bypassed', error.cause)
    return 'run'
  }

  /** `final`: everything that can be known of this request is known. */
  #decide(found: Acquisition, final: boolean): Maybe<Verdict> {
    if (found.state === 'acquired') return final ? this.#hold(found.attempt) : this.#reserved()
    if (this.#gone) return 'gone'
    this.#leaveReserved()
    this.#taken = found.state !== 'abandoned'
    const theirs = found.state === 'completed' ? found.record.fingerprint : found.fingerprint
    const differs = difference(theirs, this.fingerprint)
    if (differs !== null) throw this.#mismatch(differs)
    switch (found.state) {
      case 'completed':
        if (!final) return this.#postpone(found)
        if (found.record.kind === 'tombstone') throw this.#conflict(new NotReplayable())
        return this.#replay(found.record)
      case 'running':
        if (!this.policy.waits) throw this.#conflict(withRetryAfter(new InProgress(), 1))
        if (!final) return this.#postpone(found)
        return this.#wait()
      case 'abandoned':
        // What its owner has given back is nobody's unknown outcome.
        if (!this.policy.reruns && !found.ended) throw this.#conflict(new Abandoned())
        if (!final) return this.#postpone(found)
        return this.#takeOver()
    }
  }

  async #wait(): Promise<Verdict> {
    const result = this.#registration.closing ? 'left' : await this.#store.waiting.wait(this)
    if (result === 'left' && this.#gone) return 'gone'
    if (result === 'timeout' || result === 'left') throw this.#conflict(withRetryAfter(new InProgress(), 1))
    return this.#decide(result, true)
  }

  async #takeOver(): Promise<Verdict> {
    const found = await this.#acquire(true)
    // Asked again and again, it would say so for ever.
    if (found.state === 'abandoned') {
      const cause = new UnreadableAnswer('The idempotency store does not give what nobody has')
      this.#report(cause)
      throw new StoreFailure('The key could not be asked for', { cause })
    }
    return this.#decide(found, true)
  }

  #postpone(found: Acquisition | null): Verdict {
    this.phase = 'undecided'
    this.#found = found
    return 'later'
  }

  #reserved(): Maybe<Verdict> {
    this.phase = 'reserved'
    this.#store.reservations++
    return this.#gone ? this.#unreserve().then(() => 'gone') : 'later'
  }

  #leaveReserved(): void {
    if (this.phase !== 'reserved') return
    this.phase = 'asking'
    this.#store.reservations--
  }

  #hold(attempt: number): Maybe<Verdict> {
    this.#leaveReserved()
    if (this.#transaction?.lost.aborted) throw new StoreFailure('The key was lost again')
    this.attempt = attempt
    this.phase = 'held'
    this.#store.live.set(this.storageKey, this)
    this.#transaction?.lost.addEventListener('abort', this)
    scheduleRenewal(this)
    this.#tell('acquired')
    if (attempt > 1) this.#tell('takeover')
    return this.#gone ? this.release().then(() => 'gone') : 'run'
  }

  #replay(reply: StoredReply): Verdict {
    this.reply = reply
    this.replayed = true
    this.#tell('replayed')
    return 'replay'
  }

  #mismatch(differs: Difference): Error {
    const error = keyReused(differs)
    publish('mismatch', this, undefined, differs)
    this.request.log.debug({ ...this.#bindings(), differs }, 'idempotency mismatch')
    return error
  }

  #conflict<E extends Error>(error: E): E {
    this.#tell('conflict', error)
    return error
  }

  /**
   * Asks the store. Of those in this process who want the same key in a transaction one at a time does: it takes a
   * connection to ask, and the owner may have the last one.
   */
  #acquire(takeover: boolean): Maybe<Found> {
    return this.policy.transaction ? this.#acquireInTurn(takeover) : this.#askStore(takeover)
  }

  async #acquireInTurn(takeover: boolean): Promise<Found> {
    const { asking } = this.#store
    // The answer to who has asked before may be older than this request: only what is final is still true.
    let isOld = true
    for (let asked = asking.get(this.storageKey); asked !== undefined; asked = asking.get(this.storageKey)) {
      const found = await asked
      if (found !== null && (!isOld || found.state === 'completed')) return found
      isOld = false
    }
    const answer = Promise.resolve(this.#askStore(takeover))
    const forOthers = answer.then((found) => (found.state === 'acquired' ? null : found))
    forOthers.catch(() => {})
    asking.set(this.storageKey, forOthers)
    try {
      return await answer
    } finally {
      asking.delete(this.storageKey)
    }
  }

  #askStore(takeover: boolean): Maybe<Found> {
    const other = this.#store.live.get(this.storageKey)
    if (other !== undefined) {
      // The reply is there, only the store does not have it yet.
      if (other.#unstored !== null) return this.#askOwner(other, other.#unstored, takeover)
      if (other.#isHidden()) return other.#asRunning()
    }
    const owner = other === undefined || other.#releasing ? undefined : other
    const { health } = this.#store
    const permit = health.admit()
    if (permit === null) return this.#knownHere() ?? this.#goWithout(owner, health.error)
    const answer = promiseTry(() => this.#ask(takeover))
    const found = reveal(answer)
    if (found instanceof Promise || !isAcquisition(found)) {
      const asked = this.#awaitAnswer(answer, owner, permit)
      if (owner !== undefined) owner.#meet(asked)
      return asked
    }
    health.answered()
    return this.#understand(found, owner)
  }

  #meet(rival: Promise<unknown>): void {
    const rivals = this.#rivals ?? new Set()
    this.#rivals = rivals.add(rival)
    const forget = () => rivals.delete(rival)
    rival.then(forget, forget)
  }

  /** What a store in this process knows of the key without asking another that is down. */
  #knownHere(): Acquisition | null {
    return (this.policy.store as Partial<Peekable>)[kPeek]?.(this.storageKey) ?? null
  }

  /** The store has failed, or is known to be down. */
  async #goWithout(owner: Operation | undefined, error: unknown): Promise<Found> {
    this.#report(error)
    if (owner !== undefined) return owner.#asRunning()
    throw new StoreFailure('The key could not be asked for', { cause: error })
  }

  /** The owner's reply counts for as long as nobody else can have the key: after that the store has to take it first. */
  #askOwner(owner: Operation, record: StoredRecord, takeover: boolean): Maybe<Found> {
    this.#isRemembered = owner.#isLeased()
    if (!this.#isRemembered) return this.#askBoth(owner, record, takeover)
    return { state: 'completed', record, ttlMs: owner.policy.ttl }
  }

  async #askBoth(owner: Operation, record: StoredRecord, takeover: boolean): Promise<Found> {
    let stored: boolean
    const { health } = this.#store
    const permit = health.admit()
    try {
      if (permit === null) throw health.error
      stored = await withTimeout(Math.min(this.policy.storeTimeout, permit.patience), () =>
        owner.#completeAgain(record)
      )
    } catch (error) {
      this.#report(error)
      if (!this.policy.bypasses) throw new StoreFailure('The key could not be asked for', { cause: error })
      // Rather than to run once more.
      stored = true
    }
    return stored ? { state: 'completed', record, ttlMs: owner.policy.ttl } : this.#askStore(takeover)
  }

  /** What the answer means to this process, which knows more than the store. `owner`: who had the key here before. */
  #understand(found: Found, owner: Operation | undefined): Maybe<Found> {
    if ('transaction' in found) {
      this.#transaction = found.transaction
      this.#store.live.set(this.storageKey, this)
    }
    // Others cannot see into a transaction, but this process can, if it is its own.
    if (found.state === 'running' && found.fingerprint === '') {
      const holder = this.#store.live.get(this.storageKey)
      return holder === undefined ? found : holder.#asRunning()
    }
    if (owner === undefined) return found
    // The owner is alive in this very process, whatever the store says: it has lost its data, or the process has stalled
    // for longer than the lease.
    if (found.state === 'acquired' && owner.#isOwner()) return this.#cede(owner)
    if (found.state !== 'abandoned') return found
    owner.renew()
    return owner.#asRunning()
  }

  /** Leaves a claim that the store has given to this operation to its living owner, under the token that it has now. */
  async #cede(owner: Operation): Promise<Found> {
    const token = this.#token
    this.#token = newToken()
    owner.#token = token
    const askedAt = performance.now()
    try {
      // By the same token, so that nobody comes between: from now on it is the owner's fingerprint that is compared.
      await owner.#call(() => owner.policy.store.acquire(owner.storageKey, owner.#claimOf(false)))
      owner.#leasedAt = askedAt
    } catch (error) {
      owner.#report(error)
    }
    return owner.#asRunning()
  }

  async #awaitAnswer(answer: Promise<Found>, owner: Operation | undefined, permit: Permit): Promise<Found> {
    const token = this.#token
    let found: Found
    try {
      found = await this.#call(() => answer, permit)
      if (!isAcquisition(found)) throw new UnreadableAnswer(undefined, !isClaimedKey(found))
    } catch (error) {
      // The claim may have been written all the same, or be about to be.
      if (this.policy.transaction) {
        void answer.then((late) => ('transaction' in late ? late.transaction.rollback() : undefined)).catch(() => {})
      } else {
        if (error instanceof StoreTimeout) void this.#giveBack(token, true)
        void answer.then(
          (late) => (late?.state === 'acquired' ? this.#giveBack(token, true) : undefined),
          () => this.#giveBack(token, true)
        )
      }
      // Who asks again does so under another name: the old one may be given back at any time.
      this.#token = newToken()
      return this.#goWithout(owner, error)
    }
    return this.#understand(found, owner)
  }

  /** What the store says, within its limit. */
  #call<T>(call: () => Promise<T>, permit?: Permit): Promise<T> {
    return this.#store.health.ask(this.storageKey, this.policy.storeTimeout, call, permit)
  }

  #ask(takeover: boolean): Promise<Found> {
    const { store, transaction, waits, storeTimeout: timeoutMs } = this.policy
    const claim = this.#claimOf(takeover)
    this.#leasedAt = performance.now()
    if (!transaction) return store.acquire(this.storageKey, claim)
    return (store as Required<IdempotencyStore>).begin(this.storageKey, { ...claim, wake: waits, timeoutMs })
  }

  #asRunning(): Acquisition {
    return { state: 'running', fingerprint: this.fingerprint, leaseMs: this.lease }
  }

  /** @param unused The handler has not run under this claim. */
  #giveBack(token: string, unused: boolean): Promise<boolean> {
    return this.#store.disown(this.storageKey, token, this.policy.storeTimeout, unused)
  }

  #claimOf(takeover: boolean): Claim {
    const { lease: leaseMs, retain } = this.policy
    return {
      token: this.#token,
      fingerprint: this.fingerprint,
      leaseMs,
      retainMs: this.#isEarly ? 0 : retain,
      takeover
    }
  }

  #complete(record: StoredRecord): Promise<boolean> {
    const { store, ttl } = this.policy
    const stored = promiseTry(() => store.complete(this.storageKey, this.#token, record, ttl))
    return reveal(stored) === true ? stored : this.#completeAnew(stored, record)
  }

  /** Tries once more to store what could not be stored. All who need to know at the same time share one attempt. */
  #completeAgain(record: StoredRecord): Promise<boolean> {
    this.#storing ??= this.#storeAgain(record)
    return this.#storing
  }

  async #storeAgain(record: StoredRecord): Promise<boolean> {
    const { storeTimeout, lease } = this.policy
    try {
      const limit = Math.max(lease / 3, storeTimeout)
      const stored = await this.#store.health.ask(this.storageKey, limit, () => this.#complete(record))
      this.#completed(stored, record)
      return stored
    } finally {
      this.#storing = null
    }
  }

  async #completeAnew(stored: Promise<boolean>, record: StoredRecord): Promise<boolean> {
    const { store, ttl } = this.policy
    const token = this.#token
    if (toBoolean(await stored)) return true
    // Under another name now, another request of this process has left the claim to this one.
    const isOwner = token !== this.#token || (await this.#reclaim(token))
    return isOwner && toBoolean(await store.complete(this.storageKey, this.#token, record, ttl))
  }

  /**
   * The last step of a transaction.
   * @throws the database's error when it refused, as if the handler had met it; 503 when the outcome is not known.
   */
  async #commit(transaction: ClaimTransaction, record: StoredRecord, undo: boolean): Promise<void> {
    const { ttl } = this.policy
    cancelRenewal(this)
    let outcome: TransactionOutcome
    try {
      outcome = await this.#call(() => transaction.complete(record, ttl, undo))
    } catch (error) {
      this.#report(error)
      // One that does not answer must not keep its connection for ever.
      transaction.abandon()
      // Whatever has become of it, the key is no longer this operation's. Perhaps that has been noticed before.
      if (!this.signal.aborted) this.#lost()
      throw this.#unavailable(error)
    } finally {
      this.#end()
    }
    if (outcome.state === 'committed') {
      this.#stored(record)
    } else {
      publish('released', this)
      const bindings = { ...this.#bindings(), err: outcome.error }
      this.request.log.warn(bindings, 'idempotency transaction rolled back at its end')
      throw outcome.error
    }
  }

  #completed(stored: boolean | null, record: StoredRecord): void {
    this.#unstored = null
    if (this.phase === 'over') return
    this.#end()
    if (stored === null) return
    if (stored) this.#stored(record)
    else this.#lost()
  }

  #stored(record: StoredRecord): void {
    this.#tell(record.kind === 'reply' ? 'stored' : 'tombstoned')
  }

  async #renew(): Promise<void> {
    if (this.phase === 'over' || (this.#releasing && this.takesOver)) return
    const { store, lease } = this.policy
    try {
      const askedAt = performance.now()
      const token = this.#token
      const isRenewed = toBoolean(await this.#call(() => store.renew(this.storageKey, token, lease)))
      const renewed = isRenewed || token !== this.#token
      this.#leasedAt = renewed ? askedAt : Number.NEGATIVE_INFINITY
      // Once the claim is ending, the last step finds out by itself.
      if (!renewed && this.#isHeld() && !(await this.#call(() => this.#reclaim(token))) && this.#isHeld()) {
        this.#end()
        this.#lost()
      }
    } catch (error) {
      if (!this.#isOver()) this.#report(error)
    }
    const isEnding = this.#unstored !== null || (this.#releasing && !this.takesOver)
    if (!this.#registration.closed && !this.#isOver() && (this.#isHeld() || isEnding)) scheduleRenewal(this)
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
    const { store } = this.policy
    if (store.get === undefined || (await store.get(this.storageKey)) !== null || !this.#isWanted()) return false
    const askedAt = performance.now()
    const found = await store.acquire(this.storageKey, this.#claimOf(false))
    if (!isAcquisition(found)) throw new UnreadableAnswer()
    if (found.state !== 'acquired') return false
    this.#leasedAt = askedAt
    if (!this.#isWanted()) void this.#giveBack(this.#token, false)
    return this.#isWanted()
  }

  /** An attempt that takes long may come to its end when its claim is needed no more: stored, or deleted on purpose. */
  #isWanted(): boolean {
    return !this.#forgotten && !this.#isOver()
  }

  /** The connection of the transaction is lost. An operation listens itself, so that none has to carry a listener. */
  handleEvent(): void {
    if (!this.#isHeld()) return
    if (this.phase === 'held') this.#end()
    this.#lost()
  }

  /** Another has the key now: whatever the handler still does, it does for the second time. */
  #lost(): void {
    publish('lease-lost', this)
    const how = this.#transaction === null ? 'to another owner' : 'with the connection of its transaction'
    this.request.log.warn(this.#bindings(), `idempotency claim lost ${how}`)
    this.#controller ??= new AbortController()
    this.#controller.abort()
  }

  /** The claim needs no care any more. */
  #end(): void {
    this.#leaveReserved()
    this.phase = 'over'
    cancelRenewal(this)
    if (this.#store.live.get(this.storageKey) === this) this.#store.live.delete(this.storageKey)
    this.#registration.ended(this)
  }

  // Methods, because the phase changes while others are awaited, which the compiler does not see.
  #isHeld(): boolean {
    return this.phase === 'held' || this.phase === 'running'
  }

  /** Does the handler run, or its reply wait to be stored, under a claim that counts? */
  #isOwner(): boolean {
    return this.#transaction === null && !this.#releasing && !this.#forgotten && !this.#isOver()
  }

  /** The store cannot have let the lease lapse yet: the key is this operation's. */
  #isLeased(): boolean {
    return performance.now() - this.#leasedAt < this.lease
  }

  /**
   * Nobody else sees what a transaction holds before its commit is sent, nor can it be lost to another unnoticed, as
   * long as the server waits for a connection that has fallen silent. It holds the key before its operation has come to
   * its verdict: who asked at the same moment must not ask for a connection, of which there may be no other.
   */
  #isHidden(): boolean {
    return this.#transaction !== null && this.phase !== 'ending' && !this.#isOver() && this.#isLeased()
  }

  #isOver(): boolean {
    return this.phase === 'over'
  }

  /** A step has failed, or was not tried because the store is known to be down: each is an event, an outage one error. */
  #report(error: unknown): void {
    publish('store-error', this, error)
    this.#store.health.report(error, this.request.log, this.#bindings())
  }

  #unavailable(cause: unknown): Error {
    return withRetryAfter(new StoreUnavailable({ cause }), Math.ceil(this.policy.storeTimeout / 1_000))
  }

  #tell(event: IdempotencyEventName, error?: unknown): void {
    publish(event, this, error)
    this.request.log.debug(this.#bindings(), `idempotency ${event}`)
  }

  #bindings(): object {
    return { idempotency: { key: this.storageKey, route: this.policy.route, attempt: this.attempt } }
  }
}
