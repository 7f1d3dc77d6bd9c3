import type { Step, Stored } from './steps.js'
import type { Acquisition, IdempotencyStore, TransactionClient } from './store.js'

/** `request.idempotency` of a covered request with a key. */
export interface RequestIdempotency {
  /** The client's key, without quotes and parameters. */
  readonly key: string
  /**
   * Which run of the operation this is: 1 for the first, one more each time that the owner of the claim died
   * before it finished, or gave it back with finished steps. 0 where nothing was claimed: a replay, or a request that bypassed a failing store.
   */
  readonly attempt: number
  /** `true` when the reply comes from the store. */
  readonly replayed: boolean
  /**
   * Aborts when the claim was lost to another owner: what this handler still does is done twice. In a transaction:
   * when its connection is lost, and with it all that was done.
   */
  readonly signal: AbortSignal
  /**
   * In a route with `transaction`: a `pg` client with an open transaction, which is committed together with
   * the reply, or rolled back. `null` elsewhere.
   * @throws FST_IDEMPOTENCY_TRANSACTION from its methods, for statements and calls that would end the transaction,
   * and when it is over. With `'nested'`, `BEGIN`, `COMMIT` and `ROLLBACK` are savepoints.
   */
  readonly transaction: TransactionClient | null
  /**
   * Does something once for this operation, whatever the attempt: a rerun goes on behind the last finished step. May be
   * taken out of its object.
   */
  readonly step: Step
  /**
   * Do not store this reply, whatever it is: the key is released, a transaction is rolled back, and a retry runs
   * the handler again, behind the steps that are finished.
   */
  discard(): void
  /**
   * A UUID that is the same on every attempt of this operation, for calls to other services. It has the form
   * of a version 4 UUID, for services that insist on one.
   * @param label Tells several downstream calls of one operation apart.
   */
  deriveKey(label: string): string
}

/** Names one operation from outside of its request. */
export interface OperationSelector {
  /** What the `scope` option returned for the caller; left out where there is no `scope`. */
  scope?: string
}

/** How `app.idempotency.run` treats a key. What is left out is as the registration has it. */
export interface RunOptions extends OperationSelector {
  /**
   * What the operation is about, compared by value: the same key with another is FST_IDEMPOTENCY_KEY_REUSED. Anything that
   * `payloadFingerprint` takes.
   */
  fingerprint?: unknown
  /** How long its result is kept, in milliseconds; `null` for ever. */
  ttl?: number | null
  /** What becomes of a call while another runs: rejected with FST_IDEMPOTENCY_IN_PROGRESS, or held until the result is there. */
  onConflict?: 'reject' | 'wait'
}

/** What the function of `app.idempotency.run` may use: see `RequestIdempotency`. */
export type RunContext = Pick<RequestIdempotency, 'attempt' | 'signal' | 'step' | 'deriveKey'>

/** `app.idempotency`. */
export interface InstanceIdempotency {
  /** The store of this registration. */
  readonly store: IdempotencyStore
  /** A new random key (UUID, version 4). */
  generateKey(): string
  /**
   * `<input type="hidden" …>` with a new key, for an HTML form that posts to a covered route.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION where no `field` is configured.
   */
  hiddenInput(): string
  /**
   * What is known of a client's key; `null` for nothing.
   * @throws when the store has no `get`.
   */
  get(key: string, selector?: OperationSelector): Promise<Acquisition | null>
  /**
   * Forgets a client's key, unless an open transaction holds it: the next request with it runs. `true` when there was something to forget. A handler
   * that still runs in another process claims its key anew with its next renewal, if nobody else was faster.
   * @throws when the store has no `delete`.
   */
  delete(key: string, selector?: OperationSelector): Promise<boolean>
  /**
   * Runs a function once for a key, outside of any request: for queue consumers, cron jobs, stored webhooks. Its result is
   * kept, and given to every later call. An error of it is passed on, and the next call runs it again, behind the
   * steps that are finished. Keys are those of requests too: choose a `scope` of its own.
   * @returns What JSON makes of the result.
   * @throws FST_IDEMPOTENCY_KEY_REUSED, FST_IDEMPOTENCY_IN_PROGRESS, FST_IDEMPOTENCY_ABANDONED,
   * FST_IDEMPOTENCY_NOT_REPLAYABLE and FST_IDEMPOTENCY_STORE_UNAVAILABLE, as requests are refused with; and
   * FST_IDEMPOTENCY_STEP where JSON cannot keep the result, on this call and all later ones.
   */
  run<T>(key: string, options: RunOptions, fn: (run: RunContext) => T | Promise<T>): Promise<Stored<T>>
}
