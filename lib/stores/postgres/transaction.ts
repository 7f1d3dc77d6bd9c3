import { randomBytes } from 'node:crypto'
import type {
  ClaimTransaction,
  StoredRecord,
  TransactionAcquisition,
  TransactionClaim,
  TransactionClient,
  TransactionOutcome
} from '../../../types/index.js'
import { TransactionBroken } from '../../errors.js'
import { waitAtMost, withTimeout } from '../../util/timeout.js'
import { LONGEST_DELAY } from '../../util/timer.js'
import { toKey, toText } from '../storable-text.js'
import { Guard } from './client-guard.js'
import {
  claimFailure,
  type DatabaseError,
  explain,
  IN_FAILED_TRANSACTION,
  isAnswer,
  isContention,
  isRefusal
} from './errors.js'
import { NestedTransactions } from './nested-transactions.js'
import { AS_TEXT, acquisitionOf, type FoundRow, recordValues } from './rows.js'
import { KEEP_ALIVE, type PostgresSql } from './statements.js'

/* A claim, the handler's writes and the record in one transaction of PostgreSQL. */

/** How often a key is asked for that others take and give back meanwhile. */
const MOST_TRIES = 20

/**
 * A handler that has locked a row, and then asks for it by another connection of its pool, waits for itself: no server
 * can see that. After so many signs of life in a row, a third of a lease apart, at which its transaction stood still and
 * somebody like it waited for that, it is ended. That is a lease, as for a process that is gone; and a handler that holds a
 * lock for longer than that without asking for anything is ended as well when another one waits for it.
 */
const MOST_BLOCKED = 4

const REPLIED = 'The transaction is over: its handler has replied. Await every query before the reply'
const UNAWAITED =
  'The handler has replied before its queries have ended, and all is undone: await every query of a transaction'
const UNENDED =
  'The handler has replied before a transaction that it has begun was ended, or after one was refused, and all is undone: end ' +
  'each by COMMIT or ROLLBACK'
const BLOCKED =
  'The transaction was ended: for a lease it has stood still, and another connection has waited for what it had locked. ' +
  'Ask for everything by the client of the transaction, not by its pool'

type Result = { command: string; rows: object[] }

/** An open transaction on a client of the pool that holds a key, and gives the client back when it is over. */
export class PostgresTransaction implements ClaimTransaction {
  readonly #client: TransactionClient
  /** For the table in the schema where the claim has found it, whatever the handler does to the search path. */
  #sql: PostgresSql
  readonly #key: string
  readonly #token: string
  readonly #timeoutMs: number
  /** Does somebody perhaps wait for the end of this transaction? */
  #wake = false
  readonly #guard: Guard
  readonly #lost = new AbortController()
  /** Random, so that no handler gets there. */
  readonly #savepoint = `s${randomBytes(12).toString('hex')}`
  #undone = false
  #returned = false
  #pinging = false
  /** At how many signs of life in a row somebody was blocked, and what the handler had asked for by then. */
  #blocked = 0
  #asked = 0

  /** Takes a client fresh from the pool, in the very moment: nobody else hears when its connection is lost. */
  constructor(
    client: TransactionClient,
    sql: PostgresSql,
    key: string,
    { token, timeoutMs, nested = false }: TransactionClaim
  ) {
    this.#client = client
    this.#sql = sql
    this.#key = toKey(key)
    this.#token = toText(token)
    this.#timeoutMs = timeoutMs
    this.#guard = new Guard(client, nested ? new NestedTransactions(client, this.#savepoint) : null)
    client.on('error', this.#onLost)
    client.on('end', this.#onLost)
  }

  /** Begins the transaction and claims the key in it. Without the key it is over at once. */
  async begin(claim: TransactionClaim): Promise<TransactionAcquisition> {
    try {
      const found = acquisitionOf(await this.#claim(claim), claim.leaseMs)
      if (found.state === 'acquired') {
        this.#wake = claim.wake
        // Without steps: there are none in a transaction, which undoes them with all else.
        return { state: 'acquired', attempt: found.attempt, transaction: this }
      }
      void this.rollback()
      return found
    } catch (error) {
      this.#return(error)
      throw claimFailure(error)
    }
  }

  get client(): TransactionClient {
    return this.#guard.client
  }

  get lost(): AbortSignal {
    return this.#lost.signal
  }

  async complete(record: StoredRecord, ttlMs: number | null, undo = false): Promise<TransactionOutcome> {
    const wasBusy = await this.#closed()
    const isUnended = this.#guard.hasBegun
    if ((wasBusy || isUnended) && !undo && isSuccess(record)) {
      return this.#refuse(new TransactionBroken(wasBusy ? UNAWAITED : UNENDED))
    }
    try {
      // What was not committed must not be, and a refusal is true without its writes.
      const refusal = await this.#write(record, ttlMs, undo || isUnended)
      if (refusal !== null) return this.#refuse(refusal)
      // What came too late is not in it. Where nothing is, nothing is missing.
      if (this.#guard.wasLate && !this.#undone) return this.#refuse(new TransactionBroken(UNAWAITED))
    } catch (error) {
      // Nothing was committed, that is sure: the command has not been sent.
      const isAlive = await this.rollback()
      if (isAlive && isContention(error)) return { state: 'refused', error: error as Error }
      if (!isAlive || !isRefusal(error)) throw explain(error)
      const why = `What its handler has done keeps the reply from being stored in the transaction: ${explain(error).message}`
      return { state: 'refused', error: new TransactionBroken(why, { cause: explain(error) }) }
    }
    let command: string
    try {
      command = (await this.#client.query('COMMIT')).command
    } catch (error) {
      // A server that refuses has rolled back, and goes on talking. From one that falls silent, nobody knows what it has done.
      if (isAnswer(error) && (await this.rollback())) return { state: 'refused', error }
      this.#return(error)
      throw explain(error)
    }
    if (command !== 'COMMIT') return this.#refuse(new TransactionBroken('The transaction could not be committed'))
    void this.#end()
    return { state: 'committed' }
  }

  async rollback(): Promise<boolean> {
    await this.#closed()
    try {
      await withTimeout(this.#timeoutMs, () => this.#client.query('ROLLBACK'))
    } catch (error) {
      this.#return(error)
      return false
    }
    void this.#end()
    return true
  }

  keepAlive(): void {
    // While a query is under way, nobody takes the connection for idle.
    if (this.#pinging || this.#returned || this.#guard.busy) return
    this.#pinging = true
    const { asked } = this.#guard
    if (asked !== this.#asked) this.#blocked = 0
    this.#asked = asked
    const done = (isBlocking: boolean) => {
      this.#pinging = false
      this.#blocked = isBlocking ? this.#blocked + 1 : 0
      if (this.#blocked >= MOST_BLOCKED && this.#guard.asked === asked && this.#guard.over === null) {
        this.#guard.over = BLOCKED
        this.#onLost(new TransactionBroken(BLOCKED))
      }
    }
    this.#client.query(KEEP_ALIVE).then(
      (results) => done((results as unknown as Result[])[1]?.rows.length === 1),
      () => done(false)
    )
  }

  abandon(): void {
    this.#guard.over ??= REPLIED
    this.#return(new Error('The transaction was abandoned'))
  }

  async #claim(claim: TransactionClaim): Promise<FoundRow> {
    const quoted = (text: string) => this.#client.escapeLiteral(text)
    const begin = this.#sql.begin(
      {
        key: quoted(this.#key),
        token: quoted(this.#token),
        fingerprint: quoted(toText(claim.fingerprint)),
        leaseMs: `${claim.leaseMs}::float8`,
        retainMs: `${claim.retainMs}::float8`,
        takeover: String(claim.takeover)
      },
      this.#savepoint,
      Math.min(claim.leaseMs, LONGEST_DELAY)
    )
    let prefix = ''
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      try {
        const query = { text: prefix + begin, types: AS_TEXT }
        const results = (await withTimeout(this.#timeoutMs, () => this.#client.query(query))) as unknown as Result[]
        const [found, table] = results.filter(({ command }) => command === 'SELECT').map(({ rows }) => rows[0])
        if (found !== undefined) {
          this.#sql = this.#sql.in((table as { schema: string }).schema)
          return found as FoundRow
        }
      } catch (error) {
        if (!isContention(error)) throw error
      }
      prefix = 'ROLLBACK;'
    }
    throw new Error('The idempotency key changes hands too fast')
  }

  /** Writes the record where the claim was; or says why the handler's reply cannot be true. */
  async #write(record: StoredRecord, ttlMs: number | null, undo: boolean): Promise<Error | null> {
    const write = async () => {
      const values = [this.#key, this.#token, ...recordValues(record), ttlMs]
      const { rowCount } = await this.#client.query(this.#sql.completeInTransaction, values)
      return rowCount === 1 ? null : new TransactionBroken('The transaction was ended by its handler')
    }
    if (!undo) {
      try {
        return await write()
      } catch (error) {
        if ((error as DatabaseError).code !== IN_FAILED_TRANSACTION) throw error
      }
      // A statement of the handler has failed, and it has replied all the same. A refusal is true without its writes.
      if (isSuccess(record)) {
        return new TransactionBroken(
          'The handler has replied as if all was well, but a statement of its transaction has failed, and all is undone: ' +
            'let the error through, or use SAVEPOINT'
        )
      }
    }
    await this.#client.query(`ROLLBACK TO ${this.#savepoint}`)
    this.#undone = true
    return write()
  }

  /**
   * Resolves when the handler can ask for nothing more; with whether it still did. What follows from that is let through: all
   * of it shares one fate, and a query that was refused would end the process of whoever has forgotten to wait for it.
   */
  async #closed(): Promise<boolean> {
    const { busy } = this.#guard
    if (busy) await waitAtMost(this.#timeoutMs, this.#guard.dry())
    this.#guard.over ??= REPLIED
    await this.#guard.idle
    return busy
  }

  async #refuse(error: Error): Promise<TransactionOutcome> {
    await this.rollback()
    return { state: 'refused', error }
  }

  /** The transaction is over: tells those who wait, and gives the client back. */
  async #end(): Promise<void> {
    try {
      if (this.#wake) await withTimeout(this.#timeoutMs, () => this.#client.query(this.#sql.wake, [this.#key]))
      this.#return()
    } catch (error) {
      this.#return(error)
    }
  }

  readonly #onLost = (error?: unknown) => {
    const reason = error ?? new Error('The connection of the transaction has ended')
    this.#return(reason)
    this.#lost.abort(reason)
  }

  /** Gives the client back to its pool, which closes its connection when there was an error. */
  #return(error?: unknown): void {
    if (this.#returned) return
    this.#returned = true
    if (error !== undefined) {
      this.#client.release(error instanceof Error ? error : true)
      return
    }
    this.#client.off('error', this.#onLost)
    this.#client.off('end', this.#onLost)
    this.#client.release()
  }
}

/** Does the record say that all was done? */
function isSuccess(record: StoredRecord): boolean {
  return record.kind !== 'reply' || record.statusCode < 400
}
