import type { Step, StepContext, StoredStep, Transactions } from '../../types/index.js'
import { StepFailed } from '../errors.js'
import type { Subject } from '../events.js'
import { clock } from '../util/clock.js'
import { closestDifference } from './fingerprint.js'
import type { HeldClaim } from './held-claim.js'
import { claimLost, reused, tellStep, tellUnfinishedSteps } from './report.js'
import { decodeResult, encodeResult, IN_TRANSACTION, textOrReason, Unkeepable } from './step-result.js'
import { deriveKey } from './storage-key.js'

/* The steps of an operation: each is done once, whatever the attempt, and what was kept of it is its result. */

/** What the steps need of their operation. */
export interface StepOwner extends Subject {
  readonly policy: {
    readonly route: string
    readonly transaction: boolean
    readonly lease: number
    readonly ttl: number | null
    readonly maxStepsSize: number
  }
  /** Of `Operation.id`. */
  readonly id: string
  readonly credentials: string | null
  readonly fingerprints: readonly string[]
  readonly signal: AbortSignal
  readonly phase: string
  /** The claim under which they run; `null` where the store has failed, and the handler runs unprotected. */
  readonly held: HeldClaim | null
}

type Run = (step: StepContext) => unknown
type RunInTransaction = (tx: unknown, step: StepContext) => unknown

const LONGEST_NAME = 255

/** The steps of one attempt, and what earlier ones have left. */
export class Steps {
  readonly #owner: StepOwner
  /** The results of those that are finished, by name. */
  readonly #kept: Map<string, string>
  /** The names that this attempt has used. */
  readonly #used = new Set<string>()
  readonly #running = new Map<string, Promise<unknown>>()
  /** Bytes of the names and results that are kept. */
  #size = 0
  #isClosed = false

  /** @param kept What the store had when the key was claimed. */
  constructor(owner: StepOwner, kept: readonly StoredStep[] = []) {
    this.#owner = owner
    this.#kept = new Map(kept)
    for (const step of kept) this.#size += sizeOf(step)
  }

  /** The operation ends with a final reply: what still runs does so for nobody. */
  end(): void {
    if (this.#running.size > 0) tellUnfinishedSteps(this.#owner, [...this.#running.keys()])
  }

  /**
   * The handler has failed, and none begins any more. Those that run are at work on the operation: a retry must not run
   * beside them, and is to find what they have done.
   * @returns `null` where nothing is to be waited for.
   */
  drain(): Promise<unknown> | null {
    this.#isClosed = true
    return this.#running.size === 0 ? null : Promise.allSettled(this.#running.values())
  }

  readonly step = ((name: string, ...rest: [RunInTransaction] | [Transactions<unknown>, RunInTransaction]) => {
    // By their number: transactions that turn out to be undefined are a mistake, not a step without.
    return rest.length > 1 ? this.#step(name, true, rest[0], rest[1]) : this.#step(name, false, null, rest[0])
  }) as Step

  async #step(name: string, isTransactional: boolean, transactions: unknown, run: unknown): Promise<unknown> {
    this.#check(name, run)
    if (isTransactional) checkTransactions(name, transactions)
    else this.#checkStore(name)
    this.#used.add(name)
    const result = isTransactional
      ? this.#runInTransaction(name, transactions as Transactions<unknown>, run as RunInTransaction)
      : this.#run(name, run as Run)
    this.#running.set(name, result)
    try {
      return decodeResult(name, await result)
    } catch (error) {
      // Nothing of it is kept: it may be tried again.
      if (!isResult(this.#kept.get(name))) this.#used.delete(name)
      throw error
    } finally {
      this.#running.delete(name)
    }
  }

  /** @throws FST_IDEMPOTENCY_STEP before anything is done */
  #check(name: string, run: unknown): void {
    if (!isName(name)) throw new StepFailed(`a step takes a name of 1 to ${LONGEST_NAME} bytes of well-formed text`)
    if (typeof run !== 'function') throw new StepFailed(`the step "${name}" takes a function`)
    const { phase, signal } = this.#owner
    if (signal.aborted) throw claimLost()
    if (this.#isClosed || !(phase === 'running' || phase === 'unprotected')) {
      throw new StepFailed(`the step "${name}" comes when the request is over: was an await forgotten?`)
    }
    if (this.#used.has(name)) {
      throw new StepFailed(`the name "${name}" is used for two steps: what is done several times needs a name for each`)
    }
  }

  /** @throws FST_IDEMPOTENCY_STEP where steps cannot be kept with the claim */
  #checkStore(name: string): void {
    const { held, policy } = this.#owner
    if (held === null) return
    if (policy.transaction) {
      throw new StepFailed(
        `the step "${name}" would be forgotten when the route's transaction is rolled back: a step here takes transactions of its own`
      )
    }
    if (held.keepStep === null) {
      throw new StepFailed(`the step "${name}" needs a store that can keep steps: this one has no method "step"`)
    }
  }

  async #run(name: string, run: Run): Promise<string> {
    const { held: claim } = this.#owner
    const kept = this.#kept.get(name)
    if (kept === IN_TRANSACTION) {
      throw new StepFailed(`the step "${name}" took transactions in an earlier attempt: give it another name`)
    }
    if (kept !== undefined) return this.#resume(name, kept)
    if (claim !== null && !(await claim.isOurs())) throw claimLost()
    const value = await run(this.#context(name))
    // What was done cannot be undone.
    const result = textOrReason(() => this.#encode(name, value))
    if (this.#owner.signal.aborted) throw claimLost()
    if (claim === null || this.#owner.phase !== 'running') return result
    await this.#keep(claim, name, result)
    tellStep(this.#owner, 'step-stored', name)
    return result
  }

  async #runInTransaction(name: string, transactions: Transactions<unknown>, run: RunInTransaction): Promise<string> {
    const { fingerprints, id: operation, policy } = this.#owner
    const fingerprint = fingerprints[0] as string
    const kept = this.#kept.get(name)
    if (isResult(kept)) return this.#resume(name, kept)
    const expiresAt = policy.ttl === null ? null : clock.date() + policy.lease + policy.ttl
    const committed = await transactions.once({ operation, name, fingerprint, expiresAt }, async (tx) => {
      const result = this.#encodeUndoing(name, await run(tx, this.#context(name)))
      await this.#fence(name)
      return result
    })
    const differs = closestDifference(committed.fingerprint, fingerprints)
    if (differs !== null) throw reused(this.#owner, differs)
    if (this.#owner.held?.sharesLocks) await this.#mark(name)
    if (committed.resumed) return this.#resume(name, committed.result)
    tellStep(this.#owner, 'step-stored', name)
    return committed.result
  }

  /** A step is about to be committed: another attempt may be at it. The claim knows of it from now on. */
  async #fence(name: string): Promise<void> {
    const { held: claim, signal } = this.#owner
    if (signal.aborted) throw claimLost()
    // The store would have to wait for the end of this transaction: it knows of the step afterwards.
    if (!claim?.sharesLocks && (await this.#mark(name))) return
    if (claim !== null && this.#owner.phase === 'running' && !(await claim.isOurs())) throw claimLost()
  }

  /**
   * Tells the claim of a step whose result is in the database, so that a release does not forget the attempt.
   * @returns whether the store was asked
   */
  async #mark(name: string): Promise<boolean> {
    const { held: claim, phase } = this.#owner
    if (claim === null || claim.keepStep === null || phase !== 'running') return false
    if (this.#kept.get(name) === IN_TRANSACTION) return false
    await this.#keep(claim, name, IN_TRANSACTION)
    return true
  }

  async #keep(claim: HeldClaim, name: string, result: string): Promise<void> {
    if (!(await claim.keepStep?.([name, result]))) throw claimLost()
    this.#kept.set(name, result)
    this.#size += sizeOf([name, result])
  }

  #resume(name: string, result: string): string {
    tellStep(this.#owner, 'step-resumed', name)
    return result
  }

  /** In a transaction, a result that cannot be kept undoes what was done. */
  #encodeUndoing(name: string, value: unknown): string {
    try {
      return this.#encode(name, value)
    } catch (error) {
      throw new StepFailed(`the step "${name}" is undone: ${(error as Unkeepable).message}`)
    }
  }

  /** @throws Unkeepable, and nothing else */
  #encode(name: string, value: unknown): string {
    const { maxStepsSize } = this.#owner.policy
    const result = encodeResult(value)
    const size = this.#size + sizeOf([name, result])
    if (size <= maxStepsSize) return result
    throw new Unkeepable(
      `the results of all steps take ${size} bytes, of ${maxStepsSize} allowed: return ids, not objects`
    )
  }

  #context(name: string): StepContext {
    const { credentials, id, signal } = this.#owner
    return { key: deriveKey(id, name, credentials), signal }
  }
}

/** A lone surrogate is another character in some stores, and so the name another's. */
function isName(name: unknown): boolean {
  return (
    typeof name === 'string' && name !== '' && Buffer.byteLength(name) <= LONGEST_NAME && !/\p{Surrogate}/u.test(name)
  )
}

function checkTransactions(name: string, transactions: unknown): void {
  if (typeof (transactions as Partial<Transactions<unknown>> | null | undefined)?.once === 'function') return
  throw new StepFailed(`the step "${name}" takes transactions, as those of sqlTransactions(), in front of its function`)
}

/** Is it the result of a step, and not only known of that there was one in a transaction? */
function isResult(kept: string | undefined): kept is string {
  return kept !== undefined && kept !== IN_TRANSACTION
}

function sizeOf([name, result]: StoredStep): number {
  return Buffer.byteLength(name) + Buffer.byteLength(result)
}
