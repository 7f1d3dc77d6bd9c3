import type { EventEmitter } from 'node:events'
import { StoreTimeout } from '../../errors.js'
import { withTimeout } from '../../util/timeout.js'
import { explain, isContention, isReadOnly, isTooLarge } from './errors.js'

/* Statements on connections of a pool of mysql2, each a transaction of its own. */

/** What a `MysqlStore` needs of a pool of `mysql2` or `mysql2/promise`. */
export interface Mysql2Pool {
  execute(...args: never[]): unknown
  getConnection(...args: never[]): unknown
  on(...args: never[]): unknown
}

/** The pool of `mysql2`, which that of `mysql2/promise` has inside. */
export interface CorePool extends Mysql2Pool {
  promise(): { getConnection(): Promise<Connection> }
}

interface Connection {
  execute(options: object): Promise<[Columns[] | Header, unknown]>
  release(): void
  destroy(): void
}

/** What a statement without rows is answered. */
interface Header {
  affectedRows: number | string
  /** https://dev.mysql.com/doc/dev/mysql-server/latest/mysql__com_8h.html: SERVER_STATUS_flags_enum */
  serverStatus: number
}

const IN_TRANSACTION = 1
const AUTOCOMMIT = 2

export type Value = string | number | Buffer | null
/** Columns by their names. */
export type Columns = Readonly<Record<string, unknown>>

/** How often a statement is repeated that has lost against others, if it does not take too long. */
const MOST_TRIES = 20

/**
 * How long an answer is waited for: longer than the server waits for a lock, by default. Callers have given up long before; it
 * is the pool that would never have a connection back whose other end is gone without a word.
 */
const MOST_MS = 60_000

/** Against what a pool may be set to, which would change what is read. */
const AS_IT_IS = {
  namedPlaceholders: false,
  rowsAsArray: false,
  nestTables: false,
  // A function of the pool's gives way to a function only.
  typeCast: (_field: unknown, next: () => unknown) => next()
}

export class Database {
  readonly #pool: ReturnType<CorePool['promise']>

  constructor(pool: CorePool) {
    survive(pool)
    this.#pool = pool.promise()
  }

  rows(text: string, ...values: Value[]): Promise<Columns[]> {
    return this.#execute(text, values) as Promise<Columns[]>
  }

  /** Has the statement changed a row, or more? */
  async changes(text: string, ...values: Value[]): Promise<boolean> {
    const { affectedRows } = (await this.#execute(text, values)) as Header
    return Number(affectedRows) > 0
  }

  async #execute(sql: string, values: Value[]): Promise<Columns[] | Header> {
    const start = performance.now()
    for (let tries = 1; ; tries++) {
      try {
        return await this.#attempt({ ...AS_IT_IS, sql, values })
      } catch (error) {
        const isOver = tries === MOST_TRIES || performance.now() - start > MOST_MS
        if (isOver || !isContention(error)) throw explain(error)
      }
    }
  }

  async #attempt(statement: object): Promise<Columns[] | Header> {
    const connection = await this.#pool.getConnection()
    let end = () => connection.release()
    try {
      const [result] = await withTimeout(MOST_MS, () => connection.execute(statement))
      if ('serverStatus' in result) refuseTransaction(result)
      return result
    } catch (error) {
      if (UNUSABLE.some((isSo) => isSo(error))) end = () => connection.destroy()
      throw error
    } finally {
      end()
    }
  }
}

class OpenTransaction extends Error {}

/** Errors behind which a connection is not given back to the pool. */
const UNUSABLE = [
  (error: unknown) => error instanceof OpenTransaction || error instanceof StoreTimeout,
  isReadOnly,
  isTooLarge
]

/**
 * What was written in a transaction that somebody has left open would be undone with it, or never be committed. Whoever is handed
 * a connection by a pool is alone with it: closing it undoes what was written for certain, and the pool makes another one.
 */
function refuseTransaction({ serverStatus }: Header): void {
  if ((serverStatus & IN_TRANSACTION) === 0) return
  const why =
    (serverStatus & AUTOCOMMIT) === 0
      ? 'its connections have autocommit off, so that nothing would be committed; give the store a pool of its own'
      : 'somebody has given back a connection with an open transaction, which was closed, and undone'
  throw new OpenTransaction(`MysqlStore cannot use this pool: ${why}`)
}

const survivors = new WeakSet<CorePool>()

/** A pool listens for the first error of a connection only; a second one, as it is being closed, would end the process. */
function survive(pool: CorePool): void {
  if (survivors.has(pool)) return
  survivors.add(pool)
  const listen = (connection: EventEmitter) => connection.on('error', () => {})
  ;(pool as unknown as EventEmitter).on('connection', listen)
}
