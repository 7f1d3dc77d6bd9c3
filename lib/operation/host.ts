import type { Transient, TransientSet } from '../util/transient.js'
import type { HashesInUse } from './hashes.js'

/* What an operation and its registration are to each other. */

/** What a registration knows of an operation that is going on. */
export interface Ongoing extends Transient {
  /** The server closes: a duplicate that waits gets its answer now. */
  stopWaiting(): void
  /** The server has closed: nothing more is done for it. */
  abandon(): void
}

/** What an operation asks of its registration. */
export interface Host {
  readonly hashes: HashesInUse
  /** The operations that hold a claim, wait for one, or still have a reply to store. */
  readonly operations: TransientSet<Ongoing>
  /** The server takes no requests any more. */
  readonly closing: boolean
  /** Nothing is waited for any more, and nothing is repeated. */
  readonly closed: boolean
  ended(operation: Ongoing): void
}
