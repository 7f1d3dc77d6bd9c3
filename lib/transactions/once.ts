import type { CommittedStep } from '../../types/index.js'

/* How a step comes to be committed once, in any database with unique keys. */

/** Which form a row has. Those of another one, which an older process may meet in a deploy, are told apart by it. */
export const VERSION = 1

/** What a database has of a step. */
export interface Kept {
  readonly version: number
  /** `null` is in a row that was committed without its result, which no transaction does. */
  readonly result: string | null
  readonly fingerprint: string
  readonly expired: boolean
}

/** A step's row. */
export interface Memo<Tx> {
  /**
   * In one transaction: inserts the row without a result, calls `work`, adds the result. Where another has the row already, it
   * waits for that one's end, and fails if it was committed. `replacing`: deletes it first if it has expired.
   */
  commit(work: (tx: Tx) => Promise<string>, replacing: boolean): Promise<string>
  /** In a transaction of its own, so that it sees what has been committed by now. */
  find(): Promise<Kept | null>
}

/** A deadlock, or a row that has expired, is worth another try. More than these are no accident. */
const TRIES = 3

/**
 * Whatever goes wrong, the row decides: no error of any driver has to be understood. The row is inserted before anything else is
 * done, so two never work at the same time, and `work` meets no traces of the other, such as a violated constraint of the user's.
 */
export async function once<Tx>(
  memo: Memo<Tx>,
  fingerprint: string,
  work: (tx: Tx) => Promise<string>
): Promise<CommittedStep> {
  let started = false
  let replacing = false
  const start = (tx: Tx) => {
    started = true
    return work(tx)
  }
  for (let left = TRIES - 1; ; left--) {
    try {
      return { result: await memo.commit(start, replacing), fingerprint, resumed: false }
    } catch (error) {
      // Where nobody answers, what went wrong first says more.
      const kept = await memo.find().catch(() => {
        throw error
      })
      // Once the row was inserted, one that is there now is younger than that: a winner's, or ours, whose commit was not acknowledged.
      const counts = kept !== null && (started || !kept.expired)
      if (counts && kept.version !== VERSION) {
        throw new Error('The row of this step was written by another version of fastify-idempotency', { cause: error })
      }
      if (counts && kept.result !== null) {
        return { result: kept.result, fingerprint: kept.fingerprint, resumed: true }
      }
      if (started || (left === 0 && kept === null)) throw error
      if (left === 0)
        throw new Error('The row of this step has no result: it was not written in a transaction', { cause: error })
      replacing = kept?.expired ?? false
    }
  }
}
