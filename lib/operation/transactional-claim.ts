import type {
  Acquisition,
  ClaimTransaction,
  StoredRecord,
  TransactionClient,
  TransactionOutcome
} from '../../types/index.js'
import { clock } from '../util/clock.js'
import { withTimeout } from '../util/timeout.js'
import type { Claimant, HeldClaim } from './held-claim.js'
import { cancelRenewal, type Renewable, scheduleRenewal } from './leases.js'
import { tell, tellFailure, tellStored, tellUndone, unavailable } from './report.js'
import type { StoreContext } from './store-context.js'

/**
 * A claim in an open transaction: the key, the handler's writes and the record are committed together, or not at all. It
 * is lost with its connection.
 */
export class TransactionalClaim implements HeldClaim, Renewable {
  readonly loss = 'connection'
  renewal: Renewable['renewal'] = null
  isReleasing = false
  /** They would be rolled back with the rest. */
  readonly keepStep = null
  readonly sharesLocks = false
  readonly #claimant: Claimant
  readonly #context: StoreContext
  readonly #transaction: ClaimTransaction
  /** When the store was asked for it. Monotonic milliseconds. */
  readonly #askedAt: number
  #isLossTold = false

  constructor(claimant: Claimant, context: StoreContext, transaction: ClaimTransaction, askedAt: number) {
    this.#claimant = claimant
    this.#context = context
    this.#transaction = transaction
    this.#askedAt = askedAt
  }

  get client(): TransactionClient {
    return this.#transaction.client
  }

  get lease(): number {
    return this.#claimant.policy.lease
  }

  /** Its connection was lost: nothing more can be done in it. */
  get isLost(): boolean {
    return this.#transaction.lost.aborted
  }

  /**
   * Nobody else sees what a transaction holds before its commit is sent, nor can it be lost to another unnoticed, as
   * long as the server waits for a connection that has fallen silent. It holds the key before its operation has come to
   * its verdict: who asked at the same moment must not ask for a connection, of which there may be no other.
   */
  get isHidden(): boolean {
    const { phase } = this.#claimant
    const isOpen = phase !== 'ending' && phase !== 'over' && !this.isLost
    return isOpen && clock.now() - this.#askedAt < this.lease
  }

  hold(): void {
    // It listens itself, so that none has to carry a listener.
    this.#transaction.lost.addEventListener('abort', this)
    scheduleRenewal(this)
  }

  /** @throws the database's error when it refused, as if the handler had met it; 503 when the outcome is not known. */
  async complete(record: StoredRecord, failed: boolean): Promise<void> {
    const { policy, storageKey } = this.#claimant
    cancelRenewal(this)
    let outcome: TransactionOutcome
    try {
      const commit = () => this.#transaction.complete(record, this.#claimant.ttl, failed)
      outcome = await this.#context.health.ask(storageKey, policy.storeTimeout, commit)
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      // One that does not answer must not keep its connection for ever.
      this.#transaction.abandon()
      // Whatever has become of it, the key is no longer this operation's. Perhaps that has been noticed before.
      if (!this.#isLossTold) this.#claimant.lost()
      throw unavailable(policy, error)
    } finally {
      this.#claimant.end()
    }
    if (outcome.state === 'committed') {
      tellStored(this.#claimant, record)
    } else {
      tellUndone(this.#claimant, outcome.error)
      throw outcome.error
    }
  }

  async release(): Promise<void> {
    this.isReleasing = true
    cancelRenewal(this)
    try {
      await withTimeout(this.#claimant.policy.storeTimeout, () => this.#transaction.rollback())
    } catch (error) {
      tellFailure(this.#claimant, this.#context.health, error)
      // It needs no more than that its connection ends.
      this.#transaction.abandon()
    }
    tell(this.#claimant, 'released')
    this.#claimant.end()
  }

  renew(): void {
    if (!this.#claimant.isHeld) return
    this.#transaction.keepAlive()
    scheduleRenewal(this)
  }

  letGo(): void {
    cancelRenewal(this)
    const { phase } = this.#claimant
    if (phase !== 'ending' && phase !== 'over') this.#transaction.abandon()
  }

  /** What is not committed cannot be deleted. */
  forget(): void {}

  isOurs(): boolean {
    return !this.isLost
  }

  asFound(): Acquisition {
    return { state: 'running', fingerprint: this.#claimant.storedFingerprint, leaseMs: this.lease }
  }

  asKnown(): Acquisition | null {
    return this.isHidden ? this.asFound() : null
  }

  /** Nobody needs it. */
  drop(): void {
    void this.#transaction.rollback()
  }

  /** The connection is lost. */
  handleEvent(): void {
    if (!this.#claimant.isHeld) return
    if (this.#claimant.phase === 'held') this.#claimant.end()
    this.#isLossTold = true
    this.#claimant.lost()
  }
}
