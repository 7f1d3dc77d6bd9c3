import type { CommittedStep, OperationSelector, TransactionalStep, Transactions } from '../../types/index.js'
import { InvalidOption, StepFailed } from '../errors.js'
import { checked, FUNCTION, oneOf } from '../option-rules.js'
import { selectedKey } from '../selected-key.js'
import { clock } from '../util/clock.js'
import { describe } from '../util/describe.js'
import { once } from './once.js'
import { asciiJson, keptOf, rowsOf, statements, stepColumn, TABLE } from './statements.js'

/** What all of them take. */
export interface StepsTableOptions {
  /**
   * The table, or `schema.table`: letters, digits and underscores, not quoted.
   * @default 'idempotency_steps'
   */
  table?: string
}

/** Options of `sqlTransactions`: how a driver or an ORM does what all of them do. */
export interface SqlTransactionsOptions<Tx> extends StepsTableOptions {
  /**
   * Opens a transaction, calls `work` with it, commits when it resolves, and rolls back when it rejects. It may begin anew, and
   * call `work` again, when it had to roll back. What it resolves with does not matter.
   */
  begin<T>(work: (tx: Tx) => Promise<T>): Promise<unknown>
  /**
   * Sends one statement in the transaction, and gives its rows as the driver does: as a list, a list that begins with the list of them,
   * or an object that has them as `rows`.
   */
  query(tx: Tx, text: string, values: (string | number | null)[]): unknown
  /**
   * How the driver writes parameters: `$1, $2, …` or `?, ?, …`.
   * @default '$1'
   */
  placeholders?: '$1' | '?'
}

/** The transactions of a SQL database, in which steps are committed together with what they do. */
export interface SqlTransactions<Tx> extends Transactions<Tx> {
  /** What creates the table where it is not there, for a migration. */
  readonly ddl: string
  /** Creates the table where it is not there. Any number of processes may do so at once. */
  createTable(): Promise<void>
  /** Deletes the steps that have expired. Happens by itself as well: with a step, once a minute at most. */
  sweep(): Promise<void>
}

const RULES = {
  begin: FUNCTION,
  query: FUNCTION,
  placeholders: oneOf('$1', '?'),
  table: {
    takes: 'a name of letters, digits and underscores, perhaps after a schema and a dot',
    accepts: (value: unknown) => typeof value === 'string' && TABLE.test(value)
  }
}
const OWNER = { owner: 'sqlTransactions ' }
const SWEEP_INTERVAL_MS = 60_000
/** What a `text` of MySQL holds. A server that is not strict would cut off what is longer. */
const MAX_RESULT_BYTES = 65_535

/**
 * Transactions of PostgreSQL, MySQL, MariaDB or SQLite, through any driver or ORM. They are to be isolated by READ COMMITTED at least.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function sqlTransactions<Tx>(options: SqlTransactionsOptions<Tx>): SqlTransactions<Tx> {
  const {
    begin,
    query,
    placeholders = '$1',
    table = 'idempotency_steps'
  } = checked<SqlTransactionsOptions<Tx>>(options, RULES, OWNER)
  for (const [name, given] of Object.entries({ begin, query })) {
    if (given === undefined)
      throw new InvalidOption(`sqlTransactions option "${name}" takes a function, got ${describe(given)}`)
  }
  return new SqlSteps(begin, query, statements(table, placeholders))
}

class SqlSteps<Tx> implements SqlTransactions<Tx> {
  readonly ddl: string
  readonly #begin: SqlTransactionsOptions<Tx>['begin']
  readonly #query: SqlTransactionsOptions<Tx>['query']
  readonly #sql: ReturnType<typeof statements>
  #sweptAt = Number.NEGATIVE_INFINITY

  constructor(
    begin: SqlTransactionsOptions<Tx>['begin'],
    query: SqlTransactionsOptions<Tx>['query'],
    sql: ReturnType<typeof statements>
  ) {
    this.#begin = begin
    this.#query = query
    this.#sql = sql
    this.ddl = sql.ddl
  }

  async once(step: TransactionalStep, work: (tx: Tx) => Promise<string>): Promise<CommittedStep> {
    const { fingerprint, expiresAt } = step
    const id = [step.operation, stepColumn(step.name)]
    const committed = await once<Tx>(
      {
        commit: (work, replacing) =>
          this.#transact(async (tx) => {
            if (replacing) await this.#query(tx, this.#sql.deleteExpired, [...id, clock.date()])
            await this.#query(tx, this.#sql.insert, [...id, fingerprint, expiresAt])
            const result = asciiJson(await work(tx))
            if (result.length > MAX_RESULT_BYTES) {
              const bytes = `${result.length} bytes as ASCII, of ${MAX_RESULT_BYTES} allowed`
              throw new StepFailed(`the step "${step.name}" is undone: its result takes ${bytes}`)
            }
            await this.#query(tx, this.#sql.update, [result, ...id])
            return result
          }),
        find: async () => keptOf(await this.#alone(this.#sql.find, id), clock.date())
      },
      fingerprint,
      work
    )
    this.#sweepSometimes()
    return committed
  }

  async forget(key: string, { scope }: OperationSelector = {}): Promise<boolean> {
    const operation = selectedKey(key, scope)
    // How many rows were deleted, each driver says in its own way.
    return this.#transact(async (tx) => {
      const found = rowsOf(await this.#query(tx, this.#sql.steps, [operation]))
      await this.#query(tx, this.#sql.forget, [operation])
      return found.length > 0
    })
  }

  async createTable(): Promise<void> {
    try {
      await this.#alone(this.ddl, [])
    } catch (error) {
      // Of several at once PostgreSQL fails all but one. And who may not create tables may find one.
      await this.#alone(this.#sql.steps, ['']).catch(() => {
        throw error
      })
    }
  }

  async sweep(): Promise<void> {
    await this.#alone(this.#sql.sweep, [clock.date()])
  }

  #sweepSometimes(): void {
    const now = performance.now()
    if (now - this.#sweptAt < SWEEP_INTERVAL_MS) return
    this.#sweptAt = now
    // What could not be deleted now is deleted in a minute, and does not count meanwhile.
    this.sweep().catch(() => {})
  }

  /** One statement, in a transaction of its own. */
  #alone(text: string, values: (string | number | null)[]): Promise<unknown> {
    return this.#transact(async (tx) => this.#query(tx, text, values))
  }

  /** What `work` gave when it was called last: not every `begin` passes it on. */
  async #transact<T>(work: (tx: Tx) => Promise<T>): Promise<T> {
    let outcome: { value: T } | null = null
    await this.#begin(async (tx) => {
      outcome = null
      const value = await work(tx)
      outcome = { value }
      return value
    })
    if (outcome === null) throw new Error('sqlTransactions: begin() has resolved before its work was done')
    return (outcome as { value: T }).value
  }
}
