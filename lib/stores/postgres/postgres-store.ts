import { randomUUID } from 'node:crypto'
import type { EventEmitter } from 'node:events'
import type {
  Acquisition,
  Claim,
  Duration,
  IdempotencyStore,
  ListedKind,
  ListedPage,
  Settlement,
  StoredRecord,
  StoredStep,
  TransactionAcquisition,
  TransactionClaim,
  TransactionClient
} from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { ANYTHING, type Checked, checked, SWEEP_INTERVAL } from '../../option-rules.js'
import { describe } from '../../util/describe.js'
import { limited } from '../longest-time.js'
import { RELEASE_MEMORY_MS } from '../release-memory.js'
import { sha256, toKey, toText } from '../storable-text.js'
import { Sweeper } from '../sweeper.js'
import { claimFailure, explain, isContention, isUnprepared } from './errors.js'
import { PostgresNotifications } from './notifications.js'
import type { PostgresPool } from './pool.js'
import { AS_TEXT, acquisitionOf, type FoundRow, type ListedRow, listedOf, recordValues, stepValues } from './rows.js'
import { PostgresSql, SWEEP_ROWS } from './statements.js'
import { PostgresTransaction } from './transaction.js'

/** Options of a `PostgresStore`. */
export interface PostgresStoreOptions {
  /** A pool of `pg`, such as `app.pg.pool` of @fastify/postgres. It stays the caller's: it is never closed. */
  pool: PostgresPool
  /**
   * The table, or `schema.table`: letters, digits and underscores, in the case that they are written in.
   * @default 'idempotency_keys'
   */
  table?: string
  /**
   * How often expired rows are deleted; `null` when something else does it. Of many processes
   * one at a time does it.
   * @default 60_000
   */
  sweepInterval?: Duration | null
}

interface QueryConfig {
  text: string
  values?: unknown[]
  /** The statement is prepared under this name, once on each connection. */
  name?: string
  types: typeof AS_TEXT
}

type Query = (config: QueryConfig) => Promise<{ rows: object[] }>

/** A row that has to be judged with more care. */
type NotFound = { found: null }

/** A row of a page, which may have none but its cursor. */
type ListedPageRow = { cursor: string | null } & (ListedRow | { key: null })

/** `schema.table` or `table`; what is derived from the table's name must not exceed PostgreSQL's 63 bytes. */
const TABLE = /^(?:([A-Za-z_][A-Za-z0-9_]{0,62})\.)?([A-Za-z_][A-Za-z0-9_]{0,51})$/

const RULES = {
  pool: ANYTHING,
  table: {
    takes: 'a name of letters, digits and underscores, at most 52, perhaps after a schema and a dot',
    accepts: (value: unknown) => typeof value === 'string' && TABLE.test(value)
  },
  sweepInterval: SWEEP_INTERVAL
}

const WANTED = 'new PostgresStore({ pool: new Pool({ connectionString }) }), with Pool of "pg"'

function checkedOptions(options: PostgresStoreOptions): Checked<PostgresStoreOptions> {
  // Never what is in a text, which may be a password.
  if (typeof options === 'string') throw new InvalidOption(`PostgresStore takes a pool, not a URL: ${WANTED}`)
  const { pool, ...others } = options ?? {}
  if (pool === undefined && 'connectionString' in others) {
    throw new InvalidOption(`PostgresStore has no option "connectionString", it takes a pool: ${WANTED}`)
  }
  if (typeof (options as { connect?: unknown } | undefined)?.connect === 'function') {
    throw new InvalidOption(`PostgresStore takes its pool as an option: ${WANTED}`)
  }
  return checked<PostgresStoreOptions>(options ?? {}, RULES, { owner: 'PostgresStore ' })
}

function checkedPool(pool: PostgresPool): PostgresPool {
  const refused = (takes: string) => new InvalidOption(`PostgresStore option "pool" takes ${takes}`)
  if (typeof pool === 'string') throw refused(`a pool of pg, not a URL: ${WANTED}`)
  if (typeof pool === 'object' && pool !== null && 'connectionParameters' in pool) {
    throw refused(`a pool of pg, not a single client: ${WANTED}`)
  }
  const given = pool as Partial<PostgresPool> | undefined | null
  if (![given?.query, given?.connect, given?.on].every((method) => typeof method === 'function')) {
    throw refused(`a pool of pg, such as app.pg.pool of @fastify/postgres, got ${describe(pool)}`)
  }
  if ((pool as { options?: { binary?: unknown } }).options?.binary) throw refused('a pool without binary: true')
  // Its statements cannot be several in one trip, and its notifications have another form.
  if (isNative(pool)) throw refused(`a pool of pg itself, not of pg.native: ${WANTED}`)
  return pool
}

/** How often a statement is repeated that has lost against others. */
const MOST_TRIES = 20

/**
 * Claims and replies in a table of PostgreSQL (12 and newer). One statement to acquire and one to complete, a second one where
 * there is an old claim, or somebody waits; the lease is decided by the server's clock. With `transaction: true` on a route,
 * the claim, the handler's writes and the stored reply are one transaction.
 */
export class PostgresStore implements IdempotencyStore {
  readonly #pool: { query: Query; connect(done: (error: unknown, client?: TransactionClient) => void): void }
  readonly #sql: PostgresSql
  readonly #notifications: PostgresNotifications
  readonly #sweeper: Sweeper | null
  /**
   * Are statements prepared? Not any more once a connection has lost one: behind a pooler that gives out another connection
   * for each statement, or where somebody says DISCARD ALL.
   */
  #prepares = true

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(options: PostgresStoreOptions) {
    const { table = 'idempotency_keys', sweepInterval = 60_000, pool: given } = checkedOptions(options)
    const pool = checkedPool(given)
    const [, schema, name] = TABLE.exec(table) as RegExpExecArray
    survive(pool)
    this.#pool = pool as never
    this.#sql = new PostgresSql(schema ?? null, name as string)
    this.#notifications = new PostgresNotifications(pool)
    this.#sweeper = sweepInterval === null ? null : new Sweeper(sweepInterval, this.#sweep)
  }

  /** Creates the table and its index where they are missing. Any number of processes may call it at once. */
  async createTable(): Promise<void> {
    await this.#query(this.#sql.createTable)
  }

  async acquire(key: string, claim: Claim): Promise<Acquisition> {
    this.#sweeper?.start()
    const { token, fingerprint, leaseMs, retainMs, takeover, withTtl } = claim
    const values: unknown[] = [toKey(key), toText(token), toText(fingerprint), limited(leaseMs), limited(retainMs)]
    if (withTtl === false) {
      const [row] = await this.#query<FoundRow | NotFound>(this.#sql.acquireAtOnce, values, claimFailure)
      if (row !== undefined && row.found !== null) return acquisitionOf(row, leaseMs)
    }
    values.push(takeover)
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      const [row] = await this.#query(this.#sql.acquire, values, claimFailure)
      if (row !== undefined) return acquisitionOf(row, leaseMs)
      // Another was faster, so recently that this statement could not see it yet: the next one can.
    }
    throw new Error('The idempotency key changes hands too fast')
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#test(this.#sql.renew, [toKey(key), toText(token), limited(leaseMs)])
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const values = [toKey(key), toText(token), ...recordValues(record), ttlMs]
    if ((await this.#query(this.#sql.completeUnheard, values)).length > 0) return true
    return this.#test(this.#sql.complete, values)
  }

  async step(key: string, token: string, step: StoredStep): Promise<boolean> {
    return this.#test(this.#sql.step, [toKey(key), toText(token), ...stepValues(step)])
  }

  release(key: string, token: string, unused = false): Promise<boolean> {
    return this.#test(this.#sql.release, [toKey(key), toText(token), RELEASE_MEMORY_MS, unused])
  }

  changed(key: string, signal: AbortSignal): Promise<void> {
    const watch = async () => (await this.#query(this.#sql.watch, [toKey(key)])).length > 0
    return this.#notifications.changed(key, watch, signal)
  }

  async get(key: string): Promise<Acquisition | null> {
    const [row] = await this.#query(this.#sql.get, [toKey(key)])
    return row === undefined ? null : acquisitionOf(row, 0)
  }

  /**
   * Does not forget what an open transaction holds: that gives `false`. With `unlessRunning` nor a row that another version has
   * written, or in a state that is not known: it may be a claim that is running.
   */
  async delete(key: string, unlessRunning = false): Promise<boolean> {
    const [row] = await this.#query<{ existed: string }>(this.#sql.remove, [toKey(key), unlessRunning])
    return row?.existed === 't'
  }

  async list(kinds: readonly ListedKind[], cursor: string | null): Promise<ListedPage> {
    const rows = await this.#query<ListedPageRow>(this.#sql.list, [cursor, [...kinds]])
    const keys = rows.map((row) => (row.key === null ? null : listedOf(row))).filter((listed) => listed !== null)
    return { keys, cursor: rows[0]?.cursor ?? null }
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    const [name, asked, nobody] = [toKey(key), toText(fingerprint), randomUUID()]
    if (settlement === 'ended') return this.#test(this.#sql.settleAsEnded, [name, nobody, asked])
    const { record, ttlMs } = settlement
    return this.#test(this.#sql.settle, [name, nobody, ...recordValues(record), ttlMs, asked])
  }

  async begin(key: string, claim: TransactionClaim): Promise<TransactionAcquisition> {
    this.#sweeper?.start()
    const { leaseMs, retainMs } = claim
    const within = { ...claim, leaseMs: limited(leaseMs), retainMs: limited(retainMs) }
    const transaction = await this.#connect((client) => new PostgresTransaction(client, this.#sql, key, within))
    return transaction.begin(within)
  }

  /** Closes the connection that listens for changes, and stops deleting, until the store is used again. */
  async close(): Promise<void> {
    await Promise.all([this.#notifications.close(), this.#sweeper?.stop()])
  }

  /** The callback form on purpose: with a promise there is a gap before our 'error' listener is attached. */
  #connect<T>(use: (client: TransactionClient) => T): Promise<T> {
    return new Promise((resolve, reject) => {
      this.#pool.connect((error, client) => {
        if (client === undefined) reject(explain(error))
        else resolve(use(client))
      })
    })
  }

  readonly #sweep = async (): Promise<boolean> => {
    return (await this.#query(this.#sql.sweep)).length === SWEEP_ROWS
  }

  /** Runs a statement that says yes by a row. */
  async #test(text: string, values: unknown[]): Promise<boolean> {
    const done = async () => (await this.#query(text, values)).length > 0
    // Re-check a negative result: under READ COMMITTED this statement's snapshot may predate a concurrent write by the
    // same token.
    return (await done()) || done()
  }

  async #query<Row = FoundRow>(text: string, values?: unknown[], failure = explain): Promise<Row[]> {
    for (let tries = 1; ; tries++) {
      const prepared = values !== undefined && this.#prepares
      try {
        const config = { text, types: AS_TEXT, ...(values && { values }), ...(prepared && { name: nameOf(text) }) }
        const { rows } = await this.#pool.query(config)
        return rows as Row[]
      } catch (error) {
        if (prepared && isUnprepared(error)) this.#prepares = false
        else if (tries === MOST_TRIES || !isContention(error)) throw failure(error)
      }
    }
  }
}

const names = new Map<string, string>()

/** The same name is the same statement everywhere: a pooler may have prepared it for another process. */
function nameOf(text: string): string {
  let name = names.get(text)
  if (name === undefined) {
    name = `fastify-idempotency-${sha256(text).slice(0, 32)}`
    names.set(text, name)
  }
  return name
}

/** The queries of pg-native hear nothing of the protocol. */
function isNative(pool: unknown): boolean {
  const { Client } = pool as { Client?: { Query?: { prototype: object } } }
  return Client?.Query !== undefined && !('handleReadyForQuery' in Client.Query.prototype)
}

const survivors = new WeakSet<PostgresPool>()

/** A server that restarts breaks idle connections, of which the pool tells by an event that ends a process without a listener. */
function survive(pool: PostgresPool): void {
  if (survivors.has(pool)) return
  survivors.add(pool)
  ;(pool as unknown as EventEmitter).on('error', () => {})
}
