import type { Duration } from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { ANYTHING, type Checked, checked, SWEEP_INTERVAL } from '../../option-rules.js'
import { describe } from '../../util/describe.js'
import { CompareAndSetStore } from '../cas/compare-and-set-store.js'
import type { SqliteConnection } from './database.js'
import { SqliteDriver } from './sqlite-driver.js'

/** Options of a `SqliteStore`. */
export interface SqliteStoreOptions {
  /**
   * A connection of `better-sqlite3`, `node:sqlite` or `libsql`, which nothing else uses: what is written while somebody has a
   * transaction open on it is undone with that, so it is refused. It stays the caller's: it is never closed.
   */
  database: SqliteConnection
  /**
   * The table: letters, digits and underscores.
   * @default 'idempotency_keys'
   */
  table?: string
  /**
   * How often expired rows are deleted; `null` when something else does it.
   * @default 60_000
   */
  sweepInterval?: Duration | null
}

const TABLE = /^[A-Za-z_][A-Za-z0-9_]{0,62}$/

const RULES = {
  database: ANYTHING,
  table: {
    takes: 'a name of letters, digits and underscores, at most 63',
    accepts: (value: unknown) => typeof value === 'string' && TABLE.test(value) && !/^sqlite_/i.test(value)
  },
  sweepInterval: SWEEP_INTERVAL
}

const WANTED =
  'new SqliteStore({ database: new Database(path) }), with Database of "better-sqlite3" or DatabaseSync of "node:sqlite"'

function checkedOptions(options: SqliteStoreOptions): Checked<SqliteStoreOptions> {
  if (typeof options === 'string') throw new InvalidOption(`SqliteStore takes a database, not a path: ${WANTED}`)
  if (isConnection(options)) throw new InvalidOption(`SqliteStore takes its database as an option: ${WANTED}`)
  const { database, ...others } = checked<SqliteStoreOptions>(options ?? {}, RULES, { owner: 'SqliteStore ' })
  if (!isConnection(database)) {
    const got = typeof database === 'string' ? 'a path' : describe(database)
    throw new InvalidOption(`SqliteStore option "database" takes an open database, got ${got}: ${WANTED}`)
  }
  return { database, ...others }
}

/** A database that answers by promises, as that of `sqlite` does, is none. */
function isConnection(value: unknown): value is SqliteConnection {
  const { exec, prepare, all } = (value ?? {}) as { exec?: unknown; prepare?: unknown; all?: unknown }
  return typeof exec === 'function' && typeof prepare === 'function' && all === undefined
}

/**
 * Claims and replies in a file of SQLite (3.35 and newer): for applications on one machine, of one process or several. It
 * survives restarts, and needs no server. The table is created at first use.
 *
 * What was answered survives a crash of the process and a loss of power. SQLite works inside of the process, which does nothing
 * else meanwhile; answers wait for the disk beside it, once for all that is written at the same time. Leases are decided by the
 * clock of the machine. Not for network file systems, on which SQLite cannot have a log (WAL).
 */
export class SqliteStore extends CompareAndSetStore {
  readonly sharesLocks = true
  readonly #driver: SqliteDriver

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(options: SqliteStoreOptions) {
    const { database, table = 'idempotency_keys', sweepInterval = 60_000 } = checkedOptions(options)
    const driver = new SqliteDriver(database, table)
    super(driver, sweepInterval)
    this.#driver = driver
  }

  override async close(): Promise<void> {
    await super.close()
    await this.#driver.close()
  }

  /** Creates the table and its index where they are missing, so that what is wrong with the file shows at boot. */
  async createTable(): Promise<void> {
    await this.#driver.create()
  }
}
