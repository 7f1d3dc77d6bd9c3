import type {
  ClaimTransaction,
  StoredRecord,
  TransactionAcquisition,
  TransactionClaim,
  TransactionClient,
  TransactionOutcome
} from '../../types/index.js'
import { LONGEST_DELAY } from '../deadlines.js'
import { TransactionBroken } from '../errors.js'
import { within } from '../within.js'
import { claimFailure, type DatabaseError, explain, isAnswer, isContention, isRefusal } from './postgres-errors.js'
import { Guard } from './postgres-guard.js'
import { AS_TEXT, acquisitionOf, type FoundRow, recordValues, toKey, toText } from './postgres-rows.js'
import { type PostgresSql, SAVEPOINT } from './postgres-sql.js'

/** How often a key is asked for that others take and give back meanwhile. */
const MOST_TRIES = 20

const IN_FAILED_TRANSACTION = '25P02'

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
  #returned = false
  #pinging = false

  /** Takes a client fresh from the pool, in the very moment: nobody else hears when its connection is lost. */
  constructor(client: TransactionClient, sql: PostgresSql, key: string, { token, timeoutMs }: TransactionClaim) {
    this.#client = client
    this.#sql = sql
    this.#key = toKey(key)
    this.#token = toText(token)
    this.#timeoutMs = timeoutMs
    this.#guard = new Guard(client)
    client.on('error', this.#onLost)
    client.on('end', this.#onLost)
  }

  /** Begins the transaction and claims the key in it. Without the key it is over at once. */
  async begin(claim: TransactionClaim): Promise<TransactionAcquisition> {
    try {
      const found = acquisitionOf(await this.#claim(claim), claim.leaseMs)
      if (found.state === 'acquired') {
        this.#wake = claim.wake
        return { ...found, transaction: this }
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
    this.#guard.over = true
    await this.#guard.idle
    try {
      const refusal = await this.#write(record, ttlMs, undo)
      if (refusal !== null) return this.#refuse(refusal)
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
    this.#guard.over = true
    await this.#guard.idle
    try {
      await within(this.#timeoutMs, () => this.#client.query('ROLLBACK'))
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
    const done = () => {
      this.#pinging = false
    }
    this.#client.query('SELECT').then(done, done)
  }

  abandon(): void {
    this.#guard.over = true
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
      Math.min(claim.leaseMs, LONGEST_DELAY)
    )
    let prefix = ''
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      try {
        const query = { text: prefix + begin, types: AS_TEXT }
        const results = (await within(this.#timeoutMs, () => this.#client.query(query))) as unknown as Result[]
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
      if (record.kind !== 'reply' || record.statusCode < 400) {
        return new TransactionBroken(
          'The handler has replied as if all was well, but a statement of its transaction has failed, and all is undone: ' +
            'let the error through, or use SAVEPOINT'
        )
      }
    }
    await this.#client.query(`ROLLBACK TO ${SAVEPOINT}`)
    return write()
  }

  async #refuse(error: Error): Promise<TransactionOutcome> {
    await this.rollback()
    return { state: 'refused', error }
  }

  /** The transaction is over: tells those who wait, and gives the client back. */
  async #end(): Promise<void> {
    try {
      if (this.#wake) await within(this.#timeoutMs, () => this.#client.query(this.#sql.wake, [this.#key]))
      this.#return()
    } catch (error) {
      this.#return(error)
    }
  }

  readonly #onLost = (error?: unknown) => {
    this.#return(error ?? new Error('The connection of the transaction has ended'))
    this.#lost.abort()
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
