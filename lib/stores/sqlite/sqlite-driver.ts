import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises'
import type { CasDriver, Content, Lasting, Row, RowPage, RowState } from '../cas/driver.js'
import { type Columns, claimFailure, Database, type SqliteConnection } from './database.js'

/* Rows in a table of SQLite. Its clock is that of the machine, which all processes on the file share. */

/** Deleting holds up the process, so it ends after this time, and goes on after a pause. */
const SWEEP_MS = 1
const SWEEP_PAUSE_MS = 10
const SWEEP_ROWS = 100
/** Reading holds up the process as well. */
const PAGE_ROWS = 200

export class SqliteDriver implements CasDriver {
  readonly claimFailure = claimFailure
  readonly #database: Database
  readonly #name: string
  readonly #table: string
  #created: Promise<unknown> | null = null

  constructor(connection: SqliteConnection, table: string) {
    this.#database = new Database(connection)
    this.#name = table
    this.#table = `"${table}"`
  }

  /** Sets up the connection, and creates the table where it is missing. */
  create(): Promise<unknown> {
    this.#created ??= this.#create().catch((error) => {
      this.#created = null
      throw error
    })
    return this.#created
  }

  // Times are REAL, as node:sqlite reads no integer above 2^53, where the longest ttl ends.
  async #create(): Promise<void> {
    await this.#database.open()
    await this.#database.exec(`
CREATE TABLE IF NOT EXISTS ${this.#table} (
  key TEXT NOT NULL UNIQUE,
  state TEXT NOT NULL,
  token TEXT NOT NULL,
  revision TEXT NOT NULL,
  lease_end REAL NOT NULL,
  expires_at REAL,
  value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS "${this.#name}_expires_at" ON ${this.#table} (expires_at)`)
  }

  async insert(key: string, revision: string, claim: Lasting): Promise<boolean> {
    await this.create()
    const { token, value, leaseEnd, expiresAt } = lasting(claim, Date.now())
    return this.#database.change(
      `INSERT INTO ${this.#table} (key, state, token, revision, lease_end, expires_at, value)
VALUES (?, 'running', ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING 1`,
      ...[key, token, revision, leaseEnd, expiresAt, value]
    )
  }

  async find(key: string): Promise<Row | null> {
    await this.create()
    const [row] = await this.#database.kept(
      `SELECT state, token, revision, lease_end, expires_at, value FROM ${this.#table} WHERE key = ?`,
      key
    )
    return row === undefined ? null : rowOf(row, Date.now())
  }

  async replace(key: string, found: string, revision: string, content: Content): Promise<boolean> {
    const { state, token, value, leaseEnd, expiresAt } = content
    return this.#database.change(
      `UPDATE ${this.#table} SET state = ?, token = ?, revision = ?, lease_end = ?, expires_at = ?, value = ?
WHERE key = ? AND revision = ? RETURNING 1`,
      ...[state, token, revision, leaseEnd, expiresAt, value, key, found]
    )
  }

  async complete(key: string, revision: string, record: Lasting): Promise<boolean> {
    await this.create()
    const now = Date.now()
    const { token, value, leaseEnd, expiresAt } = lasting(record, now)
    return this.#database.change(
      `UPDATE ${this.#table} SET state = 'completed', revision = ?, lease_end = ?, expires_at = ?, value = ?
WHERE key = ? AND token = ? AND state = 'running' AND expires_at > ? RETURNING 1`,
      ...[revision, leaseEnd, expiresAt, value, key, token, now]
    )
  }

  async remove(key: string, found: string): Promise<boolean> {
    const text = `DELETE FROM ${this.#table} WHERE key = ? AND revision = ? RETURNING 1`
    return this.#database.change(text, key, found)
  }

  async running(keys: readonly string[]): Promise<readonly string[]> {
    await this.create()
    const rows = await this.#database.all(
      `SELECT key FROM ${this.#table}
WHERE key IN (SELECT value FROM json_each(?)) AND state = 'running' AND lease_end > ?`,
      ...[JSON.stringify(keys), Date.now()]
    )
    return rows.map(({ key }) => String(key))
  }

  async page(after: string | null, states: readonly RowState[], recordBytes: number): Promise<RowPage> {
    await this.create()
    const rows = await this.#database.kept(
      `SELECT key, state, token, revision, lease_end, expires_at, CASE
  WHEN state NOT IN (SELECT value FROM json_each(?)) THEN x'' WHEN state = 'completed' THEN substr(value, 1, ?) ELSE value
END AS value
FROM ${this.#table} WHERE key > ? ORDER BY key LIMIT ${PAGE_ROWS}`,
      ...[JSON.stringify(states), recordBytes, after ?? '']
    )
    const found = rows.map((row) => ({ ...rowOf(row, Date.now()), key: String(row.key) }))
    const last = rows.length === PAGE_ROWS ? (found.at(-1)?.key ?? null) : null
    return { rows: found.filter(({ state }) => states.includes(state)), last }
  }

  close(): Promise<void> {
    return this.#database.close()
  }

  async sweep(): Promise<boolean> {
    const isMore = await this.#database.transaction((all) => {
      const end = performance.now() + SWEEP_MS
      const old = `SELECT rowid AS id FROM ${this.#table} WHERE expires_at <= ? ORDER BY expires_at LIMIT ${SWEEP_ROWS}`
      const expired = all(old, Date.now())
      for (const { id } of expired) {
        // Bodies take their time, so that it cannot be told before how many there is time for.
        all(`DELETE FROM ${this.#table} WHERE rowid = ? RETURNING 1`, Number(id))
        if (performance.now() > end) return true
      }
      return expired.length === SWEEP_ROWS
    })
    if (isMore) {
      await sleep(SWEEP_PAUSE_MS, undefined, { ref: false })
      // On a busy machine the pause is over before the loop has come to anything else.
      await turn(undefined, { ref: false })
    }
    return isMore
  }
}

function lasting({ token, value, leaseMs, keepMs }: Lasting, now: number): Omit<Content, 'state'> {
  return { token, value, leaseEnd: now + leaseMs, expiresAt: keepMs === null ? null : now + keepMs }
}

/** Numbers may come as bigints. */
function rowOf(row: Columns, now: number): Row {
  const { state, token, revision, lease_end: leaseEnd, expires_at: expiresAt, value } = row
  return {
    state: state as RowState,
    token: token as string,
    revision: revision as string,
    leaseEnd: Number(leaseEnd),
    expiresAt: expiresAt === null ? null : Number(expiresAt),
    value: bytesOf(value as Uint8Array<ArrayBuffer> | ArrayBuffer),
    now
  }
}

/** `better-sqlite3` gives a Buffer, `node:sqlite` a Uint8Array, `libsql` an ArrayBuffer. */
function bytesOf(value: Uint8Array<ArrayBuffer> | ArrayBuffer): Buffer {
  if (!ArrayBuffer.isView(value)) return Buffer.from(value)
  return Buffer.from(value.buffer, value.byteOffset, value.byteLength)
}
