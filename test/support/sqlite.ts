import { createRequire } from 'node:module'
import type { Test } from 'tap'
import type { SqliteConnection } from '../../index.js'

// The compiled file is in .build/test/support. The address is computed so that the compiler does not follow it.
const services: { findBetterSqlite(): Constructor | null; findNodeWithSqlite(): string | null } = await import(
  new URL('../../../scripts/services.mjs', import.meta.url).href
)

/** A connection that can be closed. */
export interface OpenSqlite extends SqliteConnection {
  prepare(text: string): { all(...values: unknown[]): Record<string, unknown>[]; run(...values: unknown[]): unknown }
  close(): unknown
}

type Constructor = new (path: string, options?: object) => OpenSqlite

export interface SqliteDriverUnderTest {
  open(path: string): OpenSqlite
  /** Integers come as bigints. */
  openWithBigints(path: string): OpenSqlite
}

const require = createRequire(import.meta.url)

/** `better-sqlite3`, and `libsql`, which has its interface. */
function driver(Database: Constructor): SqliteDriverUnderTest {
  const open = (path: string) => new Database(path)
  const openWithBigints = (path: string) => {
    const database = open(path) as OpenSqlite & { defaultSafeIntegers(on: boolean): unknown }
    database.defaultSafeIntegers(true)
    return database
  }
  return { open, openWithBigints }
}

function missing(name: string): never {
  throw new Error(`There is no ${name}: run \`node scripts/services.mjs\``)
}

function nodeSqlite(): SqliteDriverUnderTest {
  const { DatabaseSync } = require('node:sqlite') as { DatabaseSync: Constructor }
  return {
    open: (path) => new DatabaseSync(path),
    openWithBigints: (path) => new DatabaseSync(path, { readBigInts: true })
  }
}

const all: Record<string, () => SqliteDriverUnderTest> = {
  'better-sqlite3': () => driver(services.findBetterSqlite() ?? missing('better-sqlite3')),
  libsql: () => driver(require('libsql') as Constructor),
  'node:sqlite': nodeSqlite
}

/** A version of Node that has `node:sqlite`: another one than this, if need be. */
export const nodeWithSqlite = services.findNodeWithSqlite() ?? missing('newer version of Node')
const isElsewhere = nodeWithSqlite !== process.execPath

const { SQLITE_DRIVER } = process.env
const here = Object.keys(all).filter((name) => name !== 'node:sqlite' || !isElsewhere)

/** The drivers of SQLite that can be had here, or the one that is asked for. */
export const sqliteDrivers = (SQLITE_DRIVER === undefined ? here : [SQLITE_DRIVER]).map(
  (name) => [name, all[name]?.() ?? missing(`driver ${name}`)] as const
)

/** A connection of whichever driver there is. */
export function openSqlite(path: string): OpenSqlite {
  const [[, driver] = missing('SQLite')] = sqliteDrivers
  return driver.open(path)
}

/** Runs a test file of this folder's parent once more, with `node:sqlite`, where this version of Node has none. */
export function alsoWithNodeSqlite(t: Test, file: string): void {
  if (!isElsewhere || SQLITE_DRIVER !== undefined) return
  // What tap loads into its own processes has no business there.
  const { NODE_OPTIONS: _, ...env } = process.env
  t.spawn(
    nodeWithSqlite,
    ['--enable-source-maps', file],
    { env: { ...env, SQLITE_DRIVER: 'node:sqlite' } },
    'node:sqlite'
  )
}
