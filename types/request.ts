import type { Duration } from './options.js'
import type { Step, Stored } from './steps.js'
import type { Acquisition, IdempotencyStore, TombstoneReason, TransactionClient } from './store.js'

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
   * Keeps this reply for so long, in place of the route's `ttl`; `null` for ever. May be taken out of its object.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION
   */
  keepFor(duration: Duration | null): void
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

/** An operation: its client's key, or the storage key by which logs, events and tables name it. */
export type OperationKey = string | { readonly storageKey: string }

/** What a claim or a record says of itself. What another store than those of this package keeps may say nothing. */
export interface OperationOrigin {
  storageKey: string
  /** The URL pattern of its route; `'run'` for `app.idempotency.run`. */
  route?: string
  /** When its attempt began: wall-clock milliseconds since the epoch. */
  startedAt?: number
}

/** When the owner of an abandoned operation was last known to be alive, or gave it back: wall-clock milliseconds, roughly. */
export interface OwnerSeen {
  ownerSeenAt?: number
}

type Running = Extract<Acquisition, { state: 'running' }>
type AbandonedOperation = Extract<Acquisition, { state: 'abandoned' }>
type Completed = Extract<Acquisition, { state: 'completed' }>

/** What is known of an operation. A finished one has its record, with status, headers and body; `ttlMs` is what is left of it. */
export type KnownOperation = OperationOrigin & (Running | (AbandonedOperation & OwnerSeen) | Completed)

/** An operation in a list: the same without fingerprint, steps, headers and body. */
export type ListedOperation = OperationOrigin &
  (
    | { state: 'running'; attempt: number; leaseMs: number }
    | ({ state: 'abandoned'; attempt: number; ended?: true } & OwnerSeen)
    /** A reply has a `statusCode`, a tombstone a `reason`. */
    | { state: 'completed'; createdAt: number; statusCode?: number; reason?: TombstoneReason; ttlMs: number | null }
  )

/** Which operations are listed. */
export interface ListOptions {
  /** `'completed'` is `'reply'` and `'tombstone'`. Left out: all of them. */
  state?: 'running' | 'abandoned' | 'completed' | 'reply' | 'tombstone'
  /** The URL pattern of their route. */
  route?: string
  /** Since when they have been so: running since their attempt began, abandoned since their owner was last seen. */
  olderThan?: Duration
  /** How many at most. */
  limit?: number
}

/** Which operations are forgotten: those of which all that is given is true. */
export interface PurgeOptions extends OperationSelector {
  route?: string
  /** See `ListOptions`. */
  olderThan?: Duration
}

/**
 * What somebody has found out about an operation: the reply that every retry gets; `'rerun'`, that the next one runs the
 * handler; or `'never'`, that none ever does, and each gets FST_IDEMPOTENCY_NOT_REPLAYABLE.
 */
export type Outcome =
  | {
      reply: {
        statusCode: number
        headers?: Readonly<Record<string, string | readonly string[]>>
        /** Text, bytes, or what JSON can say. */
        body?: unknown
      }
    }
  | 'rerun'
  | 'never'

/** How `app.idempotency.run` treats a key. What is left out is as the registration has it. */
export interface RunOptions extends OperationSelector {
  /**
   * What the operation is about, compared by value: the same key with another is FST_IDEMPOTENCY_KEY_REUSED. Anything that
   * `payloadFingerprint` takes.
   */
  fingerprint?: unknown
  /** How long its result is kept; `null` for ever. */
  ttl?: Duration | null
  /** What becomes of a call while another runs: rejected with FST_IDEMPOTENCY_IN_PROGRESS, or held until the result is there. */
  onConflict?: 'reject' | 'wait'
}

/** What the function of `app.idempotency.run` may use: see `RequestIdempotency`. */
export type RunContext = Pick<RequestIdempotency, 'attempt' | 'signal' | 'step' | 'deriveKey' | 'keepFor'>

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
  /** The storage key of a client's key: what it is called in logs, events and tables. Of several secrets, under the first. */
  hash(key: string, selector?: OperationSelector): string
  /**
   * What is known of an operation; `null` for nothing.
   * @throws when the store has no `get`.
   */
  get(key: OperationKey, selector?: OperationSelector): Promise<KnownOperation | null>
  /**
   * The operations that there are, in no order. It walks over all that the stores of this registration have, page by page; it
   * changes nothing, and sees most of what changes meanwhile. What is in both stores of a `MigratingStore` is in it twice.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION, and where a store has no `list`.
   */
  list(options?: ListOptions): AsyncIterable<ListedOperation>
  /**
   * Records what has become of an operation that nobody is running: one that is abandoned, or that has a tombstone.
   * @throws FST_IDEMPOTENCY_SETTLE when there is nothing to settle: it is running, it has a reply, or nothing is known of it.
   */
  settle(key: OperationKey, selector: OperationSelector, outcome: Outcome): Promise<void>
  settle(key: OperationKey, outcome: Outcome): Promise<void>
  /**
   * Forgets operations, but for those that are running: when a customer is deleted, for instance. It takes as long as `list`.
   * @returns How many there were.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION without anything to choose them by, and where a store has no `list`.
   */
  purge(options: PurgeOptions): Promise<number>
  /** Do all stores of this registration answer, within `storeTimeout`? For health probes; it never rejects. */
  healthy(): Promise<boolean>
  /**
   * Forgets an operation, unless an open transaction holds it: the next request with it runs. `true` when there was something to forget. A handler
   * that still runs in another process claims its key anew with its next renewal, if nobody else was faster.
   * @throws when the store has no `delete`.
   */
  delete(key: OperationKey, selector?: OperationSelector): Promise<boolean>
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
