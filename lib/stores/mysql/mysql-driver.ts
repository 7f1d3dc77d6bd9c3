import type { CasDriver, Content, Lasting, Row, RowPage, RowState } from '../cas/driver.js'
import { type Columns, type CorePool, Database } from './database.js'
import { claimFailure, isDuplicate, isTooLarge } from './errors.js'

/*
 * Rows in a table of MySQL or MariaDB. What is compared is bytes, so that no collation has a say; times are those of the server,
 * as numbers, so that no time zone has one.
 */

/** The server's clock, in milliseconds since the epoch. The divisor makes it a DOUBLE, which every pool reads alike. */
const NOW = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) / 1e3"

/**
 * For statements that look at `expires_at` too: by its index, or reading the table from end to end, they would lock the gaps that
 * claims are inserted into.
 */
const BY_KEY = 'FORCE INDEX (PRIMARY)'

const SWEEP_ROWS = 100
const PAGE_ROWS = 500

/** What a statement may have beside the value that it stores: keys and tokens, and what they are wrapped in. */
const BESIDE_VALUE = 2_000

/** What 255 bytes of a token can become in `toText`, and what the column holds. */
const LONGEST_TOKEN = 510

export class MysqlDriver implements CasDriver {
  readonly claimFailure = claimFailure
  /** What makes the table. Times are DOUBLE: the longest ttl ends beyond what an integer of JavaScript can be. */
  readonly ddl: string
  readonly #database: Database
  readonly #table: string

  /** @param table as it was checked: what would have to be escaped is not in it */
  constructor(pool: CorePool, table: string) {
    this.#database = new Database(pool)
    this.#table = `\`${table.replace('.', '`.`')}\``
    this.ddl = `CREATE TABLE IF NOT EXISTS ${this.#table} (
  \`key\`      VARBINARY(500) NOT NULL PRIMARY KEY,
  state      VARCHAR(9) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  token      VARBINARY(${LONGEST_TOKEN}) NOT NULL,
  revision   VARBINARY(40) NOT NULL,
  lease_end  DOUBLE NOT NULL,
  expires_at DOUBLE,
  value      LONGBLOB NOT NULL,
  INDEX expires_at (expires_at)
) ENGINE = InnoDB`
  }

  async create(): Promise<void> {
    await this.#database.changes(this.ddl)
  }

  async insert(key: string, revision: string, claim: Lasting): Promise<boolean> {
    const { token, value, leaseMs, keepMs } = claim
    try {
      // Not INSERT IGNORE, which makes warnings of all errors.
      return await this.#database.changes(
        `INSERT INTO ${this.#table} (\`key\`, state, token, revision, lease_end, expires_at, value)
VALUES (?, 'running', ?, ?, ${NOW} + ?, ${NOW} + ?, ?)`,
        ...[bytes(key), tokenBytes(token), bytes(revision), leaseMs, keepMs, value]
      )
    } catch (error) {
      if (isDuplicate(error)) return false
      throw error
    }
  }

  /** Verdicts rest on it, so it is a locking read: in a transaction that somebody has left open, another one is of the past. */
  async find(key: string): Promise<Row | null> {
    const [row] = await this.#database.rows(
      `SELECT state, token, revision, lease_end, expires_at, value, ${NOW} AS looked_at
FROM ${this.#table} WHERE \`key\` = ? LOCK IN SHARE MODE`,
      bytes(key)
    )
    return row === undefined ? null : rowOf(row)
  }

  async replace(key: string, found: string, revision: string, content: Content): Promise<boolean> {
    const { state, token, value, leaseEnd, expiresAt } = content
    return this.#database.changes(
      `UPDATE ${this.#table} SET state = ?, token = ?, revision = ?, lease_end = ?, expires_at = ?, value = ?
WHERE \`key\` = ? AND revision = ?`,
      ...[state, tokenBytes(token), bytes(revision), leaseEnd, expiresAt, value, bytes(key), bytes(found)]
    )
  }

  async complete(key: string, revision: string, record: Lasting): Promise<boolean> {
    const { token, value, leaseMs, keepMs } = record
    return this.#database.changes(
      `UPDATE ${this.#table} ${BY_KEY}
SET state = 'completed', revision = ?, lease_end = ${NOW} + ?, expires_at = ${NOW} + ?, value = ?
WHERE \`key\` = ? AND token = ? AND state = 'running' AND expires_at > ${NOW}`,
      ...[bytes(revision), leaseMs, keepMs, value, bytes(key), bytes(token)]
    )
  }

  /** Some servers say so; others end the connection, as if for any other reason. */
  async isTooLarge(value: Buffer, error: unknown): Promise<boolean> {
    if (isTooLarge(error)) return true
    try {
      const [row] = await this.#database.rows('SELECT @@max_allowed_packet / 1e0 AS most')
      return value.length + BESIDE_VALUE > (row?.most as number)
    } catch {
      return false
    }
  }

  remove(key: string, found: string): Promise<boolean> {
    const text = `DELETE FROM ${this.#table} WHERE \`key\` = ? AND revision = ?`
    return this.#database.changes(text, bytes(key), bytes(found))
  }

  async running(keys: readonly string[]): Promise<readonly string[]> {
    // Each number of keys is a statement that the server keeps, so there are few of them.
    const asked = padded(keys.map(bytes), 2 ** Math.ceil(Math.log2(keys.length)))
    const rows = await this.#database.rows(
      `SELECT \`key\` AS found FROM ${this.#table}
WHERE \`key\` IN (${places(asked)}) AND state = 'running' AND lease_end > ${NOW}`,
      ...asked
    )
    return rows.map(({ found }) => textOf(found))
  }

  async page(after: string | null, states: readonly RowState[], recordBytes: number): Promise<RowPage> {
    const rows = await this.#database.rows(
      `SELECT \`key\` AS found, state, token, revision, lease_end, expires_at, CASE
  WHEN state NOT IN (?, ?, ?, ?) THEN '' WHEN state = 'completed' THEN SUBSTRING(value, 1, ?) ELSE value
END AS value, ${NOW} AS looked_at
FROM ${this.#table} ${BY_KEY} WHERE \`key\` > ? ORDER BY \`key\` LIMIT ${PAGE_ROWS}`,
      ...[...padded(states, 4), recordBytes, bytes(after ?? '')]
    )
    const found = rows.map((row) => ({ ...rowOf(row), key: textOf(row.found) }))
    const last = rows.length === PAGE_ROWS ? (found.at(-1)?.key ?? null) : null
    return { rows: found.filter(({ state }) => states.includes(state)), last }
  }

  /** Locks what it deletes, and nothing else. */
  async sweep(): Promise<boolean> {
    const expired = await this.#database.rows(
      `SELECT \`key\` AS found FROM ${this.#table} WHERE expires_at <= ${NOW} ORDER BY expires_at LIMIT ${SWEEP_ROWS}`
    )
    if (expired.length === 0) return false
    const keys = padded(
      expired.map(({ found }) => found as Buffer),
      SWEEP_ROWS
    )
    await this.#database.changes(
      `DELETE old FROM ${this.#table} AS old ${BY_KEY}
WHERE old.\`key\` IN (${places(keys)}) AND old.expires_at <= ${NOW}`,
      ...keys
    )
    return expired.length === SWEEP_ROWS
  }
}

function bytes(text: string): Buffer {
  return Buffer.from(text)
}

/** A server that is not strict would cut off what is too long, and know the owner no more. */
function tokenBytes(token: string): Buffer {
  const given = bytes(token)
  if (given.length > LONGEST_TOKEN) throw new RangeError('A token has at most 255 bytes')
  return given
}

function textOf(value: unknown): string {
  return (value as Buffer).toString()
}

function padded<T>(values: readonly T[], count: number): T[] {
  const last = values.at(-1) as T
  return [...values, ...Array<T>(count - values.length).fill(last)]
}

function places(values: readonly unknown[]): string {
  return values.map(() => '?').join(', ')
}

function rowOf(row: Columns): Row {
  return {
    state: row.state as RowState,
    token: textOf(row.token),
    revision: textOf(row.revision),
    leaseEnd: row.lease_end as number,
    expiresAt: row.expires_at as number | null,
    value: row.value as Buffer,
    now: row.looked_at as number
  }
}
