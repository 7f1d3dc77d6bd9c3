import type { OperationSelector } from './request.js'

/** What a step may use. */
export interface StepContext {
  /**
   * For the service that the step calls: a UUID that is the same on every attempt of this operation, and another for each
   * step. It is `deriveKey(name)`.
   */
  readonly key: string
  /** Aborts when the claim was lost to another owner: what this attempt still does is done twice. */
  readonly signal: AbortSignal
}

type Unkeepable =
  | bigint
  | symbol
  | ((...args: never) => unknown)
  | ArrayBufferView
  | ArrayBuffer
  | Error
  | Promise<unknown>
  | ReadonlyMap<unknown, unknown>
  | ReadonlySet<unknown>
  | RegExp

/**
 * What JSON makes of a value, which is what a step gives on every attempt: a `Date` is a string, members that are methods
 * are not there. What JSON would lose is `never`, and a step that gives it fails.
 */
export type Stored<T> = unknown extends T
  ? T
  : // biome-ignore lint/suspicious/noConfusingVoidType: a step that returns nothing is of this type
    T extends void | null | string | number | boolean
    ? T
    : T extends Unkeepable
      ? never
      : T extends { toJSON(...args: never): infer Shown }
        ? Stored<Shown>
        : T extends readonly unknown[]
          ? { [At in keyof T]: Stored<T[At]> }
          : { [Name in keyof T as KeptName<Name, T[Name]>]: Stored<T[Name]> }

type KeptName<Name, Value> = Value extends (...args: never) => unknown ? never : Exclude<Name, symbol>

/** Does something once for an operation, whatever the attempt, and gives what was kept of the first time. */
export interface Step {
  /**
   * Runs `run` if no attempt has finished a step of this name, and keeps what it gives with the claim. It runs at least
   * once: after a crash between its end and the storing it runs again, so give its `key` to the service that it calls.
   *
   * What `run` throws is passed on, and nothing is kept.
   * @param name Tells the steps of an operation apart: at most 255 bytes. New code with the name of an old step gets its
   * result.
   * @throws FST_IDEMPOTENCY_STEP (500) for a name used twice in one attempt, a result that JSON cannot keep, a store or a
   * route without steps, and after the reply.
   * @throws FST_IDEMPOTENCY_CLAIM_LOST (409 with Retry-After) when another owner has the key now.
   */
  <T>(name: string, run: (step: StepContext) => T | Promise<T>): Promise<Stored<T>>
  /**
   * The same in a transaction of yours, with which its result is committed: what it does there is done exactly once.
   * @param transactions See `fastify-idempotency/transactions`.
   * @throws FST_IDEMPOTENCY_KEY_REUSED (422) when another request has committed a step of this name under the key.
   */
  <T, Tx>(
    name: string,
    transactions: Transactions<Tx>,
    run: (tx: Tx, step: StepContext) => T | Promise<T>
  ): Promise<Stored<T>>
}

/** A step that is committed together with what it does. */
export interface TransactionalStep {
  /** Names its operation: a hash of its scope and key, the same whatever the option `secret` is. */
  readonly operation: string
  readonly name: string
  /** What the request looks like. Opaque, like the result. */
  readonly fingerprint: string
  /** Milliseconds since the epoch, from which on it may be forgotten; `null` for never. */
  readonly expiresAt: number | null
}

/** What was committed of a step, now or by an earlier attempt. */
export interface CommittedStep {
  /** The same JSON that `work` gave, though it may be spelled otherwise: in ASCII, for instance. */
  result: string
  fingerprint: string
  /** It was there already: nothing has been done. Or the acknowledgement of its commit was lost, and it was found. */
  resumed: boolean
}

/** The transactions of a database, each of which can commit a step together with what it does there. */
export interface Transactions<Tx> {
  /**
   * Opens a transaction, calls `work` in it, and commits what it did and the result that it gives, together. If the step
   * has been committed before, nothing is done, and `work` is not called; of several at a time one does it, and the others
   * get its result. It may call `work` again when it had to roll back, as drivers do after conflicts.
   *
   * Rejects when nothing was committed, or when it is not known whether it was.
   */
  once(step: TransactionalStep, work: (tx: Tx) => Promise<string>): Promise<CommittedStep>
  /** Forgets all steps of an operation that are kept here. `true` when there was one. */
  forget(key: string, selector?: OperationSelector): Promise<boolean>
}
