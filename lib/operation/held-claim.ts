import type { Acquisition, Loss, StoredRecord, StoredStep, TransactionClient } from '../../types/index.js'
import type { Subject } from '../events.js'
import type { Policy } from '../options.js'
import type { MaybePromise } from '../util/sync-promise.js'

/* What an operation and its claim are to each other. */

/** What a claim needs of the operation that holds it. */
export interface Claimant extends Subject {
  readonly policy: Policy
  /** The storage keys of its key: the one that is claimed, and those under the other secrets in use. */
  readonly storageKeys: readonly [string, ...string[]]
  /** As stores keep it. */
  readonly storedFingerprint: string
  readonly phase: string
  /** How long its record is to be kept; `null` for ever. */
  readonly ttl: number | null
  /** May the handler start under the claim, or does it run? */
  readonly isHeld: boolean
  /** The server has closed: nothing is repeated any more. */
  readonly isClosed: boolean
  /** Another has the key now: whatever the handler still does, it does for the second time. */
  lost(): void
  /** The claim needs no care any more. */
  end(): void
}

/** A claim that an operation holds: under a lease, or in a transaction. */
export interface HeldClaim {
  /** What the handler may use of the transaction; `null` where there is none. */
  readonly client: TransactionClient | null
  /** What is known of how it was lost. */
  readonly loss: Loss
  /** Not any more, while it is being given back. */
  readonly isReleasing: boolean
  /**
   * Is the key still this operation's? The store is asked only when it may have let the lease lapse.
   * @throws 503 when that cannot be known, unless the route runs without protection then
   */
  isOurs(): MaybePromise<boolean>
  /**
   * Keeps a finished step; `null` where none can be kept. `false`: the key is another's now. What the store does not take at
   * once goes on in the background, and is `true`.
   */
  readonly keepStep: ((step: StoredStep) => Promise<boolean>) | null
  /** May the store have to wait for the end of a transaction of the handler? Then it is not asked in the middle of one. */
  readonly sharesLocks: boolean
  /** From now on it is kept. */
  hold(): void
  /** Ends it with a record. See `Operation.complete`. */
  complete(record: StoredRecord, failed: boolean): MaybePromise<void>
  /**
   * Gives the key back: nothing is stored, and a retry runs.
   * @param unused The handler has not run under it.
   */
  release(unused: boolean): Promise<void>
  /** Tells the store that this process is alive, and keeps on doing so. */
  renew(): void
  /** The server has closed, or the operation is over: nothing more is done for it. */
  letGo(): void
  /** The key was deleted on purpose: it is not to be claimed anew. */
  forget(): void
  /** What another request of this process finds. */
  asFound(): Acquisition
  /** The same where the store does not answer; `null` when it alone knows, because another may have had the key. */
  asKnown(): Acquisition | null
}
