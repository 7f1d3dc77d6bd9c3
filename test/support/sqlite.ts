import { createRequire } from 'node:module'
import type { SqliteConnection } from '../../index.js'

/** A connection that can be closed. */
export interface OpenSqlite extends SqliteConnection {
  prepare(text: string): { all(...values: unknown[]): Record<string, unknown>[] }
  close(): unknown
}

export type OpenFile = (path: string) => OpenSqlite

const require = createRequire(import.meta.url)
type Constructor = new (path: string) => OpenSqlite

/** The drivers of SQLite that this version of Node has. */
export const sqliteDrivers: Record<string, OpenFile> = {
  // It has the interface of better-sqlite3, and need not be compiled.
  libsql: (path) => new (require('libsql') as Constructor)(path)
}
if (process.env.BS)
  sqliteDrivers['better-sqlite3'] = (path) => new (require(process.env.BS as string) as Constructor)(path)
const [major = 0] = process.versions.node.split('.').map(Number)
if (major >= 24) {
  const { DatabaseSync } = require('node:sqlite') as { DatabaseSync: Constructor }
  sqliteDrivers['node:sqlite'] = (path) => new DatabaseSync(path)
}
