import { hash } from 'node:crypto'
import type { Kept } from './once.js'

/* The statements, which PostgreSQL, MySQL, MariaDB and SQLite understand alike, and what comes back. */

/** `table` or `schema.table`. It is not quoted: databases differ in how, and in what case they read it. */
export const TABLE = /^(?:[A-Za-z_]\w{0,62}\.)?[A-Za-z_]\w{0,62}$/

export function statements(table: string, placeholders: '$1' | '?') {
  const sql = (text: string) => {
    let at = 0
    return placeholders === '?' ? text : text.replaceAll('?', () => `$${++at}`)
  }
  return {
    // The constraint is an index for the sweep: the only kind that can be made with the table everywhere. What is written without a
    // version is of the first one.
    ddl: `CREATE TABLE IF NOT EXISTS ${table} (
  operation varchar(64) NOT NULL,
  step varchar(255) NOT NULL,
  fingerprint varchar(255) NOT NULL,
  result text,
  expires_at bigint,
  version smallint NOT NULL DEFAULT 1,
  PRIMARY KEY (operation, step),
  UNIQUE (expires_at, operation, step)
)`,
    insert: sql(`INSERT INTO ${table} (operation, step, fingerprint, expires_at) VALUES (?, ?, ?, ?)`),
    update: sql(`UPDATE ${table} SET result = ? WHERE operation = ? AND step = ?`),
    find: sql(`SELECT version, result, fingerprint, expires_at FROM ${table} WHERE operation = ? AND step = ?`),
    deleteExpired: sql(`DELETE FROM ${table} WHERE operation = ? AND step = ? AND expires_at <= ?`),
    sweep: sql(`DELETE FROM ${table} WHERE expires_at <= ?`),
    steps: sql(`SELECT step FROM ${table} WHERE operation = ?`),
    forget: sql(`DELETE FROM ${table} WHERE operation = ?`)
  }
}

/** Characters that every collation tells apart. */
const PLAIN = /^[a-z0-9_.:/-]{1,255}$/
const PREFIX_LENGTH = 100

/**
 * A step's name in its column. Collations may take `A`, `a`, `á` and `a ` for the same, and the column ends somewhere: what could
 * be taken for another name, or does not fit, is told apart by its hash. The `#` is in no plain name.
 */
export function stepColumn(name: string): string {
  if (PLAIN.test(name)) return name
  const prefix = name.toLowerCase().replaceAll(/[^a-z0-9_.:/-]+/g, '-')
  // JSON escapes lone surrogates, which would otherwise all hash alike.
  return `${prefix.slice(0, PREFIX_LENGTH)}#${hash('sha256', JSON.stringify(name), 'hex')}`
}

/** JSON in ASCII, which a connection or a table of any character set keeps. */
export function asciiJson(json: string): string {
  return json.replaceAll(/[\u007f-\uffff]/g, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`)
}

type Row = Readonly<Record<string, unknown>>

/** The rows of a driver's answer: it is a list of them, or a list that begins with such a list, or has them as `rows`. */
export function rowsOf(answer: unknown): readonly Row[] {
  const { rows } = answer as { rows?: readonly Row[] }
  if (rows !== undefined) return rows
  const [first] = answer as readonly unknown[]
  return (Array.isArray(first) ? first : answer) as readonly Row[]
}

export function keptOf(answer: unknown, now: number): Kept | null {
  const [row] = rowsOf(answer)
  if (row === undefined) return null
  const { version, result, fingerprint, expires_at: expiresAt } = row
  return {
    version: numberOf(version),
    result: result === null ? null : textOf(result),
    fingerprint: textOf(fingerprint),
    expired: expiresAt !== null && numberOf(expiresAt) <= now
  }
}

/** A number, a string, a bigint, or an object that stands for one. */
function numberOf(value: unknown): number {
  return Number(textOf(value))
}

function textOf(value: unknown): string {
  return value instanceof Uint8Array ? Buffer.from(value).toString() : String(value)
}
