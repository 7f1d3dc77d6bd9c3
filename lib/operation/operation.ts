import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import type { Step, StoredRecord, StoredReply, StoredStep, TransactionClient } from '../../types/index.js'
import { isFull, UnreadableAnswer } from '../errors.js'
import type { Policy } from '../options.js'
import { clock } from '../util/clock.js'
import type { MaybePromise } from '../util/sync-promise.js'
import type { Transient } from '../util/transient.js'
import { Claiming, type Found, StoreFailure } from './claiming.js'
import { decide } from './decide.js'
import { PLAIN } from './hashes.js'
import type { Claimant, HeldClaim } from './held-claim.js'
import type { Host, Ongoing } from './host.js'
import { withOrigin } from './origin.js'
import { redacted } from './redact.js'
import { inProgress, refusal, tell, tellFailure, tellLost, unavailable } from './report.js'
import { type StepOwner, Steps } from './steps.js'
import { storageKey } from './storage-key.js'
import { StoreContext } from './store-context.js'
import type { Waiter } from './waiting.js'

/* The life of one keyed request, from the question for its key to the end of its claim. */

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
 * `ending`: the record is being stored, or the key given back; what the claim is doing is its own affair.
 * `unprotected`: the store failed, and the route prefers to run all the same.
 */
type Phase = 'asking' | 'undecided' | 'reserved' | 'held' | 'running' | 'ending' | 'over' | 'unprotected'

/** What is to be done with the request; `later`: ask again when all is known of it. Refusals are thrown. */
export type Verdict = 'run' | 'replay' | 'later' | 'gone'

/** Where an operation comes from: a request, or none. */
export interface Origin {
  readonly request: FastifyRequest | null
  readonly log: FastifyBaseLogger
}

/** Who sends a request, as far as it is known when its key is. */
export interface Caller {
  /** The first part of the fingerprint: what the request is for, and who asks. */
  readonly head: string
  /** Who asks; `null` where a scope says so, or nobody does. */
  readonly credentials: string | null
}

/** How many keys one process reserves at a time in one store, for requests that have not been read yet. */
const MOST_RESERVATIONS = 1_000

/** The life of one keyed request: from the claim of its key to the end of the claim. It makes no replies. */
export class Operation implements Claimant, StepOwner, Waiter, Ongoing {
  readonly request: FastifyRequest | null
  readonly log: FastifyBaseLogger
  readonly policy: Policy
  readonly key: string
  readonly storageKeys: readonly [string, ...string[]]
  /** Where the operation is, for who is told of it: the key that it claims, or the one under which it was found. */
  storageKey: string
  readonly credentials: string | null
  attempt = 0
  replayed = false
  phase: Phase = 'asking'
  previous: Transient | null = null
  next: Transient | null = null
  /** The handler asked that its reply be not stored. */
  discarded = false
  /** How long its reply is to be kept; `null` for ever. */
  ttl: number | null
  /** The reply to replay, after the verdict 'replay'. */
  reply: StoredReply | null = null
  readonly #host: Host
  readonly #context: StoreContext
  readonly #claiming: Claiming
  readonly #head: string
  readonly #scope: string | null
  #payload = ''
  #fingerprints: readonly string[] | null = null
  #found: Found | null = null
  #claim: HeldClaim | null = null
  /** Where there are some, of this attempt or of earlier ones. */
  #steps: Steps | null = null
  /** The client has left before its handler has started. */
  #isGone = false
  /** Somebody else was seen to have the key. */
  #isTaken = false
  #controller: AbortController | null = null
  /** For how many milliseconds. */
  #waited = 0
  /** When the key was last asked for. Wall-clock milliseconds. */
  #startedAt = 0
  /** `null` while nobody has asked for it since the payload was known, and the key asked for. */
  #storedFingerprint: string | null = null
  #caller: string | null = null

  constructor(
    { request, log }: Origin,
    policy: Policy,
    host: Host,
    key: string,
    scope: string | null,
    { head, credentials }: Caller
  ) {
    this.request = request
    this.log = log
    this.policy = policy
    this.ttl = policy.ttl
    this.key = key
    const [first, ...others] = host.hashes
    const claimed = first.storageKey(scope, key)
    this.storageKeys =
      others.length === 0 ? [claimed] : [claimed, ...others.map((hashes) => hashes.storageKey(scope, key))]
    this.storageKey = claimed
    this.credentials = credentials
    this.#host = host
    this.#context = StoreContext.of(policy.store)
    this.#claiming = new Claiming(this, this.#context)
    this.#head = head
    this.#scope = scope
  }

  /** Names the operation where no store is concerned: the same on every attempt, whatever the secrets. */
  get id(): string {
    return this.#host.hashes[0] === PLAIN ? this.storageKeys[0] : storageKey(this.#scope, this.key)
  }

  /** What the request looks like: as it is kept from now on, and as it may have been kept before, under other secrets. */
  get fingerprints(): readonly string[] {
    this.#fingerprints ??= this.#host.hashes.map((hashes, n) =>
      hashes.fingerprint(this.storageKeys[n] as string, this.#head, this.#payload)
    )
    return this.#fingerprints
  }

  /** The same as stores keep it: with where it comes from. */
  get storedFingerprint(): string {
    if (this.#storedFingerprint !== null) return this.#storedFingerprint
    const [claimed] = this.storageKeys
    this.#caller ??= this.#host.hashes[0].mark(claimed, this.#scope)
    const origin = { startedAt: this.#startedAt, caller: this.#caller, route: this.policy.route }
    this.#storedFingerprint = withOrigin(this.fingerprints[0] as string, origin)
    return this.#storedFingerprint
  }

  get takesOver(): boolean {
    return this.policy.reruns
  }

  /** What is left of it, for who has to wait again because another was faster. */
  get waitTimeout(): number {
    return Math.max(this.policy.waitTimeout - this.#waited, 0)
  }

  get signal(): AbortSignal {
    this.#controller ??= new AbortController()
    return this.#controller.signal
  }

  /** What the handler may use of the transaction. */
  get transaction(): TransactionClient | null {
    return this.#claim?.client ?? null
  }

  get held(): HeldClaim | null {
    return this.#claim
  }

  /** What the handler does once, whatever the attempt. */
  get step(): Step {
    this.#steps ??= new Steps(this)
    return this.#steps.step
  }

  get isHeld(): boolean {
    return this.phase === 'held' || this.phase === 'running'
  }

  get isClosed(): boolean {
    return this.#host.closed
  }

  /** The payload's hash is known now. */
  learn(payload: string): void {
    if (payload === this.#payload) return
    this.#payload = payload
    this.#fingerprints = null
    this.#storedFingerprint = null
  }

  // What can be decided at once is decided at once: a promise is paid for only where there is something to wait for.

  /**
   * Claims the key before the request has been read, so that duplicates are refused before their bodies are read. The
   * reservation expires after one lease, and never takes over an abandoned key: nothing is lost with a request that does
   * not come to its handler. `'later'`: ask `claim` when everything is known.
   */
  reserve(): MaybePromise<Verdict> {
    this.#host.operations.add(this)
    if (this.#isGone) return this.#judged('gone')
    // Anybody can make reservations: those who run must not have to stand back behind them.
    if (this.#context.reservations >= MOST_RESERVATIONS) return this.#postpone(null)
    this.#claiming.isEarly = true
    return this.#judge(this.#ask(false), false)
  }

  /** Claims the key, and gives the verdict: everything that can be known of the request is known. */
  claim(): MaybePromise<Verdict> {
    this.#host.operations.add(this)
    if (this.#isGone) return this.#judged('gone')
    const found = this.#found
    this.#found = null
    this.#claiming.isEarly = false
    if (this.phase === 'undecided') this.phase = 'asking'
    return this.#judge(found === null || this.#claiming.isRemembered ? this.#ask(false) : found, true)
  }

  /** The handler starts. `false`: it must not, because the client has left, and the claim with it. */
  start(): boolean {
    if (this.phase === 'held') {
      this.phase = 'running'
      return true
    }
    return this.#isGone ? false : this.refuseLost()
  }

  /** The claim was lost before the handler could start: with its connection, or to another. */
  refuseLost(): never {
    if (this.transaction !== null)
      throw unavailable(this.policy, new Error('The connection of the transaction was lost'))
    throw inProgress(this)
  }

  /**
   * Ends the claim with a record. Resolves when it is stored; or when the store fails, and goes on in the
   * background, while the claim is kept. Rejects for a transaction only: when it was refused, or its outcome is
   * not known.
   * @param failed The reply is that of an error: of a transaction nothing but the record is committed.
   */
  complete(record: StoredRecord, failed = false): MaybePromise<void> {
    if (!this.isHeld) return
    if (this.discarded) return this.release()
    this.#steps?.end()
    this.phase = 'ending'
    const { redact } = this.policy
    const kept = redact !== null && record.kind === 'reply' ? redacted(record, redact, this.log) : record
    return this.#claim?.complete(kept, failed)
  }

  /**
   * Gives the key back: nothing is stored, and a retry runs. What steps are doing is waited for in the background: a retry
   * must not run beside them, and is to find what they have done.
   */
  async release(): Promise<void> {
    if (!this.isHeld) return
    const unfinished = this.#steps?.drain()
    if (unfinished) {
      void unfinished.then(() => this.release())
      return
    }
    const unused = this.phase === 'held'
    this.phase = 'ending'
    await this.#claim?.release(unused)
  }

  /** The request has ended before its handler started, or its client has. Nothing is stored. */
  async cancel(): Promise<void> {
    this.#isGone = true
    this.#context.waiting.leave(this)
    if (this.phase === 'held') await this.release()
    else if (this.phase === 'reserved') await this.#unreserve()
    else if (this.phase === 'undecided') this.end()
  }

  stopWaiting(): void {
    this.#context.waiting.leave(this)
  }

  abandon(): void {
    this.#claim?.letGo()
  }

  /* For duplicates that wait */

  async poll(): Promise<Found> {
    return this.#ask(false)
  }

  drop(): void {
    this.#claiming.drop()
  }

  /* For the claim */

  lost(): void {
    tellLost(this, this.#claim?.loss ?? 'unknown')
    this.#controller ??= new AbortController()
    this.#controller.abort()
  }

  end(): void {
    this.#leaveReserved()
    this.phase = 'over'
    this.#claim?.letGo()
    const { live } = this.#context
    if (this.#claim !== null && live.get(this.storageKeys[0]) === this.#claim) live.delete(this.storageKeys[0])
    this.#host.ended(this)
  }

  /* Verdicts */

  #ask(takeover: boolean): MaybePromise<Found> {
    this.#startedAt = clock.date()
    this.#storedFingerprint = null
    return this.#claiming.ask(takeover)
  }

  /** What all ways to a verdict have in common: a failing store, and a client that has left meanwhile. */
  #judge(found: MaybePromise<Found>, knowsAll: boolean): MaybePromise<Verdict> {
    if (found instanceof Promise) return this.#judgeLater(found, knowsAll)
    try {
      const verdict = this.#decide(found, knowsAll)
      return verdict instanceof Promise ? this.#judgeLater(verdict, knowsAll) : this.#judged(verdict)
    } catch (error) {
      return this.#judgeFailure(error)
    }
  }

  async #judgeLater(pending: Promise<Found | Verdict>, knowsAll: boolean): Promise<Verdict> {
    try {
      const found = await pending
      const verdict = typeof found === 'string' ? found : this.#decide(found, knowsAll)
      return this.#judged(verdict instanceof Promise ? await verdict : verdict)
    } catch (error) {
      return this.#judgeFailure(error)
    }
  }

  #judged(verdict: Verdict): Verdict {
    if (verdict === 'replay' || verdict === 'gone') this.end()
    return verdict
  }

  #judgeFailure(error: unknown): Verdict {
    // Whether to run all the same, and whether there is room for it, is decided when everything is known.
    const mayComeLater = error instanceof StoreFailure && (this.policy.bypasses || isFull(error.cause))
    if (this.#claiming.isEarly && mayComeLater && !this.#isGone) return this.#postpone(null)
    this.end()
    if (!(error instanceof StoreFailure)) throw error
    if (this.#isGone) return 'gone'
    // Never bypass a key that is known to be running, or may have run already. A store that is full is not down.
    const { cause } = error
    const isUnreadable = cause instanceof UnreadableAnswer && !cause.isFree
    const isTaken = error.isTaken || this.#isTaken || this.#context.live.has(this.storageKeys[0]) || isUnreadable
    if (!this.policy.bypasses || isTaken || isFull(cause)) throw unavailable(this.policy, cause)
    this.phase = 'unprotected'
    tell(this, 'bypassed', cause)
    return 'run'
  }

  #decide(found: Found, knowsAll: boolean): MaybePromise<Verdict> {
    this.storageKey = found.storageKey ?? this.storageKeys[0]
    if (found.state !== 'acquired') {
      if (this.#isGone) return 'gone'
      this.#leaveReserved()
      this.#isTaken = found.state !== 'abandoned'
    }
    const decision = decide(found, this.fingerprints, knowsAll, this.policy)
    switch (decision.do) {
      case 'hold':
        return this.#hold(decision.attempt, decision.steps)
      case 'reserve':
        return this.#reserved()
      case 'postpone':
        return this.#postpone(found)
      case 'replay':
        return this.#replay(decision.reply)
      case 'wait':
        return this.#wait()
      case 'take over':
        return this.#takeOver()
      case 'refuse':
        throw refusal(this, decision)
    }
  }

  #hold(attempt: number, steps: readonly StoredStep[]): MaybePromise<Verdict> {
    this.#leaveReserved()
    const claim = this.#claiming.take(steps)
    if (steps.length > 0) this.#steps = new Steps(this, steps)
    this.#claim = claim
    this.attempt = attempt
    this.phase = 'held'
    this.#context.live.set(this.storageKeys[0], claim)
    claim.hold()
    tell(this, 'acquired')
    if (attempt > 1) tell(this, 'takeover')
    return this.#isGone ? this.release().then(() => 'gone') : 'run'
  }

  #reserved(): MaybePromise<Verdict> {
    this.phase = 'reserved'
    this.#context.reservations++
    return this.#isGone ? this.#unreserve().then(() => 'gone') : 'later'
  }

  #leaveReserved(): void {
    if (this.phase !== 'reserved') return
    this.phase = 'asking'
    this.#context.reservations--
  }

  async #unreserve(): Promise<void> {
    this.end()
    await this.#claiming.release()
  }

  #postpone(found: Found | null): Verdict {
    this.phase = 'undecided'
    this.#found = found
    return 'later'
  }

  #replay(reply: StoredReply): Verdict {
    this.reply = reply
    this.replayed = true
    tell(this, 'replayed')
    return 'replay'
  }

  async #wait(): Promise<Verdict> {
    const from = clock.now()
    const result = this.#host.closing ? 'left' : await this.#context.waiting.wait(this)
    this.#waited += Math.floor(clock.now() - from)
    if (result === 'left' && this.#isGone) return 'gone'
    if (result === 'timeout' || result === 'left') throw inProgress(this)
    return this.#decide(result, true)
  }

  async #takeOver(): Promise<Verdict> {
    const found = await this.#ask(true)
    // Asked again and again, it would say so for ever.
    if (found.state === 'abandoned') {
      const cause = new UnreadableAnswer('The idempotency store refused the takeover of an abandoned key')
      tellFailure(this, this.#context.health, cause)
      throw new StoreFailure(cause)
    }
    return this.#decide(found, true)
  }
}
