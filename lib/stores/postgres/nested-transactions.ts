import type { TransactionClient } from '../../../types/index.js'
import { TransactionBroken } from '../../errors.js'
import { type DatabaseError, IN_FAILED_TRANSACTION } from './errors.js'
import { statements } from './transaction-control.js'

/* Transactions in the transaction of a request: each BEGIN of its handler is a savepoint. */

const MODE =
  'isolation\\s+level\\s+(?:serializable|repeatable\\s+read|read\\s+(?:un)?committed)|read\\s+(?:only|write)|(?:not\\s+)?deferrable'
const BEGIN = new RegExp(
  `^(begin|start)(?:\\s+(?:work|transaction))?(?:\\s+((?:${MODE})(?:(?:\\s*,\\s*|\\s+)(?:${MODE}))*))?$`,
  'i'
)
const END = /^(?:(commit|end)|abort|rollback)(?:\s+(?:work|transaction))?(?:\s+and\s+no\s+chain)?$/i

/** Of a SET TRANSACTION that would change what cannot change any more. */
const ACTIVE_TRANSACTION = '25001'

/** What `pg` answers: a list of results when there were several statements. */
interface Result {
  command: string
}

/** The transactions that a handler has begun and not ended, one in the other. */
export class NestedTransactions {
  readonly #client: TransactionClient
  /** Random, so that no handler gets there. */
  readonly #prefix: string
  /** Their savepoints. What was asked for counts, not what was answered: a client may be asked for more before that. */
  readonly #open: string[] = []
  #begun = 0
  /** In one of them a text was refused that may have had a BEGIN: a ROLLBACK that is meant for that ends another. */
  #isUnclear = false

  constructor(client: TransactionClient, prefix: string) {
    this.#client = client
    this.#prefix = prefix
  }

  /** Is there one that was begun and not ended, for all one knows? */
  get isOpen(): boolean {
    return this.#open.length > 0 || this.#isUnclear
  }

  /**
   * Does what begins or ends a transaction, with a savepoint.
   * @param verb What `transactionControl` has found in the text.
   * @returns What the client would answer.
   */
  async control(text: string, verb: string): Promise<unknown> {
    const [statement = '', ...others] = statements(text)
    if (others.length > 0) {
      this.#isUnclear ||= this.isOpen
      throw new TransactionBroken(`${verb} has to be sent by itself in a nested transaction, not with other statements`)
    }
    const begin = BEGIN.exec(statement)
    if (begin !== null) return this.#begin((begin[1] as string).toUpperCase(), begin[2])
    const end = END.exec(statement)
    if (end === null) {
      this.#isUnclear ||= this.isOpen
      throw new TransactionBroken(`A nested transaction has no ${statement.toUpperCase()}`)
    }
    const savepoint = this.#open.pop()
    if (savepoint === undefined) {
      throw new TransactionBroken(
        `${verb} without a BEGIN would end the transaction of the request, which ends by itself`
      )
    }
    return end[1] === undefined ? this.#rollback(savepoint) : this.#commit(savepoint)
  }

  /** One that fails is open all the same: who has asked for it will roll it back. */
  async #begin(command: string, modes: string | undefined): Promise<unknown> {
    const savepoint = `${this.#prefix}_${++this.#begun}`
    this.#open.push(savepoint)
    // The server knows which modes are those of the transaction already, and takes back READ ONLY with the savepoint.
    const set = modes === undefined ? '' : `; SET TRANSACTION ${modes}`
    try {
      return named(command, await this.#client.query(`SAVEPOINT ${savepoint}${set}`))
    } catch (error) {
      if (modes === undefined || (error as DatabaseError).code !== ACTIVE_TRANSACTION) throw error
      const why = `A nested transaction cannot be ${modes.toUpperCase()}: ${(error as Error).message}`
      throw new TransactionBroken(why, { cause: error })
    }
  }

  /**
   * What has failed is rolled back by a COMMIT. Whether it has, the server knows, and a query may follow at once: so it is asked for
   * both. The savepoint is set anew when it could be released, and then nothing is behind it that could be rolled back.
   */
  async #commit(savepoint: string): Promise<unknown> {
    const [released, ended] = await Promise.allSettled([
      this.#client.query(`RELEASE ${savepoint}; SAVEPOINT ${savepoint}`),
      this.#client.query(`ROLLBACK TO ${savepoint}; RELEASE ${savepoint}`)
    ])
    const hasFailed = released.status === 'rejected' && released.reason.code === IN_FAILED_TRANSACTION
    if (released.status === 'rejected' && !hasFailed) throw this.#notEnded(savepoint, released.reason)
    if (ended.status === 'rejected') throw this.#notEnded(savepoint, ended.reason)
    return named(hasFailed ? 'ROLLBACK' : 'COMMIT', ended.value)
  }

  /** Who hears of that rolls back, which must not be taken for the end of another one. */
  #notEnded(savepoint: string, reason: unknown): unknown {
    this.#open.push(savepoint)
    return reason
  }

  async #rollback(savepoint: string): Promise<unknown> {
    return named('ROLLBACK', await this.#client.query(`ROLLBACK TO ${savepoint}; RELEASE ${savepoint}`))
  }
}

/** The last of the results, as that of another command. */
function named(command: string, results: unknown): unknown {
  return Object.assign([results as Result | Result[]].flat().at(-1) as Result, { command })
}
