import type { Duration } from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { ANYTHING, type Checked, checked, SWEEP_INTERVAL } from '../../option-rules.js'
import { describe } from '../../util/describe.js'
import { CompareAndSetStore } from '../cas/compare-and-set-store.js'
import type { CorePool, Mysql2Pool } from './database.js'
import { MysqlDriver } from './mysql-driver.js'

/** Options of a `MysqlStore`. */
export interface MysqlStoreOptions {
  /**
   * A pool of `mysql2` or `mysql2/promise`, such as `app.mysql.pool` of @fastify/mysql. It stays the caller's: it is never
   * closed.
   */
  pool: Mysql2Pool
  /**
   * The table, or `database.table`: letters, digits and underscores.
   * @default 'idempotency_keys'
   */
  table?: string
  /**
   * How often expired rows are deleted; `null` when something else does it.
   * @default 60_000
   */
  sweepInterval?: Duration | null
}

/** `database.table` or `table`, of at most 64 characters each: https://dev.mysql.com/doc/refman/8.0/en/identifier-length.html */
const TABLE = /^(?:[A-Za-z_][A-Za-z0-9_]{0,63}\.)?[A-Za-z_][A-Za-z0-9_]{0,63}$/

const RULES = {
  pool: ANYTHING,
  table: {
    takes: 'a name of letters, digits and underscores, at most 64, perhaps after a database and a dot',
    accepts: (value: unknown) => typeof value === 'string' && TABLE.test(value)
  },
  sweepInterval: SWEEP_INTERVAL
}

const WANTED = 'new MysqlStore({ pool: createPool(uri) }), with createPool of "mysql2"'

function checkedOptions(options: MysqlStoreOptions): Checked<MysqlStoreOptions> {
  // Never what is in a text, which may be a password.
  if (typeof options === 'string') throw new InvalidOption(`MysqlStore takes a pool, not a URL: ${WANTED}`)
  const { pool, ...others } = options ?? {}
  if (pool === undefined && ('uri' in others || 'host' in others)) {
    throw new InvalidOption(`MysqlStore has no options of a connection, it takes a pool: ${WANTED}`)
  }
  if (has(options, 'getConnection')) throw new InvalidOption(`MysqlStore takes its pool as an option: ${WANTED}`)
  return checked<MysqlStoreOptions>(options ?? {}, RULES, { owner: 'MysqlStore ' })
}

function checkedPool(pool: unknown): CorePool {
  const refused = (takes: string) => new InvalidOption(`MysqlStore option "pool" takes ${takes}`)
  if (typeof pool === 'string') throw refused(`a pool of mysql2, not a URL: ${WANTED}`)
  if (has(pool, 'execute') && !has(pool, 'getConnection')) {
    throw refused(`a pool of mysql2, not a single connection: ${WANTED}`)
  }
  if (has(pool, 'getConnection', 'query') && !has(pool, 'execute')) {
    throw refused(`a pool of mysql2, not of mysql: ${WANTED}`)
  }
  const core = has(pool, 'promise') ? pool : (pool as { pool?: unknown } | null | undefined)?.pool
  if (!has(core, 'promise', 'getConnection', 'execute', 'on')) {
    throw refused(`a pool of mysql2, such as app.mysql.pool of @fastify/mysql, got ${describe(pool)}`)
  }
  return core as CorePool
}

function has(value: unknown, ...methods: string[]): boolean {
  const object = (value ?? {}) as Record<string, unknown>
  return methods.every((name) => typeof object[name] === 'function')
}

/**
 * Claims and replies in a table of MySQL 8 and newer, or MariaDB 10.6 and newer. One statement for a first claim and one to
 * complete it, two for a replay; the lease is decided by the server's clock.
 */
export class MysqlStore extends CompareAndSetStore {
  readonly #driver: MysqlDriver

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(options: MysqlStoreOptions) {
    const { pool, table = 'idempotency_keys', sweepInterval = 60_000 } = checkedOptions(options)
    const driver = new MysqlDriver(checkedPool(pool), table)
    super(driver, sweepInterval)
    this.#driver = driver
  }

  /** Creates the table and its index where they are missing. Any number of processes may call it at once. */
  async createTable(): Promise<void> {
    await this.#driver.create()
  }
}
