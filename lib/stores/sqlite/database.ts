import { setTimeout as sleep } from 'node:timers/promises'
import { StoreFull } from '../../errors.js'
import { Log } from './log.js'

/* A database of SQLite as drivers have it, which are synchronous: what they do holds up the process. */

/** What a `SqliteStore` needs of a connection: that of `better-sqlite3`, `node:sqlite` or `libsql`. */
export interface SqliteConnection {
  exec(text: string): unknown
  prepare(text: string): { all(...values: never[]): unknown[] }
}

export type Value = string | number | Buffer | null
/** Columns by their names. */
export type Columns = Readonly<Record<string, unknown>>

interface Statement {
  all(...values: Value[]): Columns[]
}

/**
 * How long another process may keep the database locked. It writes for a millisecond or a few, unless it is stopped in the
 * middle of it.
 */
const BUSY_MS = 5_000
/** The pauses between two attempts, in milliseconds: any number below. */
const MOST_PAUSE_MS = 10

/** Statements on one connection, each a transaction of its own. */
export class Database {
  readonly #connection: SqliteConnection
  readonly #statements = new Map<string, Statement>()
  /** Where what is changed is on its way to the disk; `null` where SQLite sees to that itself, or there is no file. */
  #log: Log | null = null

  constructor(connection: SqliteConnection) {
    this.#connection = connection
  }

  /**
   * Sets up the connection: a log beside the file (WAL), with which reading and writing do not stop one another; and no waiting
   * inside of SQLite, neither for locks nor for the disk.
   */
  async open(): Promise<void> {
    await this.exec('PRAGMA busy_timeout = 0')
    const [mode] = await this.all('PRAGMA journal_mode = WAL')
    // A database in memory has another, and so has one on a file system without shared memory.
    if (mode?.journal_mode !== 'wal') return
    const [main] = await this.all("SELECT file FROM pragma_database_list WHERE name = 'main'")
    await this.exec('PRAGMA synchronous = NORMAL')
    this.#log ??= new Log(`${main?.file}-wal`)
  }

  /** The rows of a statement that changes nothing. */
  all(text: string, ...values: Value[]): Promise<Columns[]> {
    return this.#patiently(() => {
      this.#refuseTransactions()
      return this.#prepared(text).all(...values)
    })
  }

  /** The same when they are on the disk, as far as this process has written them: a verdict rests on what is found. */
  async kept(text: string, ...values: Value[]): Promise<Columns[]> {
    const rows = await this.all(text, ...values)
    await this.#log?.written()
    return rows
  }

  /** Changes something, for which the statement has to return rows: drivers differ in the rest. `true` when it did, and that is on the disk. */
  async change(text: string, ...values: Value[]): Promise<boolean> {
    const changed = await this.#patiently(() => {
      this.#refuseTransactions()
      const changed = this.#prepared(text).all(...values).length > 0
      // At once: who reads it next has to know.
      if (changed) this.#log?.grown()
      return changed
    })
    if (changed) await this.#log?.written()
    return changed
  }

  /** Several statements without values and rows. */
  exec(text: string): Promise<unknown> {
    return this.#patiently(() => {
      this.#refuseTransactions()
      return this.#connection.exec(text)
    })
  }

  async close(): Promise<void> {
    await this.#log?.close()
  }

  /** What `work` does with statements is one transaction. It must not wait for anything. */
  transaction<T>(work: (all: (text: string, ...values: Value[]) => Columns[]) => T): Promise<T> {
    return this.#patiently(() => {
      this.#refuseTransactions()
      this.#connection.exec('BEGIN IMMEDIATE')
      try {
        const result = work((text, ...values) => this.#prepared(text).all(...values))
        this.#connection.exec('COMMIT')
        return result
      } catch (error) {
        try {
          this.#connection.exec('ROLLBACK')
        } catch {
          // After some errors, such as a full disk, SQLite has rolled back already.
        }
        throw error
      }
    })
  }

  /** Tries again, after a pause in which the process does other things, what another process has kept from being done. */
  async #patiently<T>(attempt: () => T): Promise<T> {
    const start = performance.now()
    for (;;) {
      try {
        return attempt()
      } catch (error) {
        if (!isBusy(error) || performance.now() - start > BUSY_MS) throw error
      }
      await sleep(Math.random() * MOST_PAUSE_MS)
    }
  }

  #prepared(text: string): Statement {
    let statement = this.#statements.get(text)
    if (statement === undefined) {
      statement = this.#connection.prepare(text) as Statement
      this.#statements.set(text, statement)
    }
    return statement
  }

  /** What is written in somebody's transaction is undone with it. */
  #refuseTransactions(): void {
    const { inTransaction, isTransaction } = this.#connection as { inTransaction?: unknown; isTransaction?: unknown }
    if (inTransaction !== true && isTransaction !== true) return
    throw new Error('SqliteStore takes a connection of its own: this one is in a transaction of somebody else')
  }
}

// https://www.sqlite.org/rescode.html: the lower byte of an extended code is the code.
const BUSY = 5
const LOCKED = 6
const FULL = 13

/** `better-sqlite3` and `libsql` give codes by name, `node:sqlite` by number. */
function isCode(error: unknown, name: string, number: number): boolean {
  const { code, errcode } = error as { code?: unknown; errcode?: unknown }
  if (typeof errcode === 'number') return (errcode & 0xff) === number
  return typeof code === 'string' && (code === name || code.startsWith(`${name}_`))
}

function isBusy(error: unknown): boolean {
  return isCode(error, 'SQLITE_BUSY', BUSY) || isCode(error, 'SQLITE_LOCKED', LOCKED)
}

/** What a claim is told: a disk without room is there, and refuses. */
export function claimFailure(error: unknown): unknown {
  if (!isCode(error, 'SQLITE_FULL', FULL)) return error
  const { message } = error as Error
  return new StoreFull(`SQLite has no room, and takes no further claim (${message})`, { cause: error })
}
