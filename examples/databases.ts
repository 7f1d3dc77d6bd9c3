import { createRequire } from 'node:module'
import type { FastifyInstance } from 'fastify'
// In a project of your own: from 'fastify-idempotency' and 'fastify-idempotency/transactions'
import { type IdempotencyStore, MemoryStore, MysqlStore, PostgresStore, RedisStore, SqliteStore } from '../index.js'
import { mysqlTransactions, sqliteTransactions } from '../lib/transactions.js'
import { books } from './books.js'
import { type Ledger, memoryLedger, postgresLedger } from './ledger.js'
import { memoryOrders, type Orders, postgresOrders } from './orders.js'

/** Where the keys are, and what the application writes. */
export interface Databases {
  store: IdempotencyStore
  ledger: Ledger
  orders: Orders
  /** Is a charge one transaction with its key? */
  transaction: boolean
}

/** `sqlite:file`, `mysql://…`, `postgresql://…`, or `memory:`. What the application writes is in there as well. */
export async function openDatabase(app: FastifyInstance, url: string): Promise<Databases> {
  const [, scheme, rest = ''] = /^(\w+):(.*)$/s.exec(url) ?? []
  switch (scheme) {
    case 'sqlite':
      return openSqlite(app, rest)
    case 'mysql':
      return openMysql(app, url)
    case 'postgres':
    case 'postgresql':
      return openPostgres(app, url)
    case 'memory':
      return inMemory()
    default:
      throw new Error('DATABASE_URL begins with sqlite:, mysql: or postgresql:, or is memory:')
  }
}

/** For one process: a restart forgets everything. */
export function inMemory(): Databases {
  return { store: new MemoryStore(), ledger: memoryLedger(), orders: memoryOrders(), transaction: false }
}

/** The keys in Redis, the rest in memory. */
export async function openRedis(app: FastifyInstance, url: string): Promise<Databases> {
  await app.register(import('@fastify/redis'), { url })
  return { ...inMemory(), store: new RedisStore(app.redis) }
}

async function openPostgres(app: FastifyInstance, connectionString: string): Promise<Databases> {
  await app.register(import('@fastify/postgres'), { connectionString })
  const { pool } = app.pg
  const store = new PostgresStore({ pool, table: 'example_keys' })
  await store.createTable()
  return { store, ledger: await postgresLedger(pool), orders: await postgresOrders(pool), transaction: true }
}

async function openMysql(app: FastifyInstance, url: string): Promise<Databases> {
  const { createPool } = await import('mysql2/promise')
  const pool = createPool(url)
  app.addHook('onClose', () => pool.end())
  const store = new MysqlStore({ pool, table: 'example_keys' })
  await store.createTable()
  const written = await books({
    transactions: mysqlTransactions(pool, { table: 'example_steps' }),
    async query(tx, text, values = []) {
      const [rows] = await (tx ?? pool).execute(text, values)
      return Array.isArray(rows) ? (rows as Record<string, unknown>[]) : []
    },
    serial: 'bigint AUTO_INCREMENT PRIMARY KEY',
    lastSerial: 'LAST_INSERT_ID()'
  })
  return { store, ...written, transaction: false }
}

interface Sqlite {
  exec(text: string): unknown
  prepare(text: string): { all(...values: unknown[]): unknown[]; run(...values: unknown[]): unknown }
  close(): unknown
}

type OpenFile = new (path: string) => Sqlite

const require = createRequire(import.meta.url)

/** Since when Node has SQLite without a warning. */
const NODE_WITH_SQLITE = 24
const hasSqlite = Number(process.versions.node.split('.')[0]) >= NODE_WITH_SQLITE

/**
 * The SQLite of Node, or what `npm ci` has installed for an older one.
 * @throws where libsql has nothing for this kind of machine.
 */
function findSqlite(): OpenFile {
  if (!hasSqlite) return require('libsql') as OpenFile
  return (require('node:sqlite') as { DatabaseSync: OpenFile }).DatabaseSync
}

/** Can keys be kept in a file? */
export function canOpenFiles(): boolean {
  try {
    findSqlite()
    return true
  } catch {
    return false
  }
}

/** In a project of your own: `new DatabaseSync(path)` of node:sqlite, or `new Database(path)` of better-sqlite3. */
function openFile(path: string): Sqlite {
  return new (findSqlite())(path)
}

/** Keys, steps and reading have a connection each: what is asked of one in a transaction is part of that. */
async function openSqlite(app: FastifyInstance, path: string): Promise<Databases> {
  const [keys, writing, reading] = [openFile(path), openFile(path), openFile(path)]
  app.addHook('onClose', async () => {
    for (const connection of [keys, writing, reading]) connection.close()
  })
  const store = new SqliteStore({ database: keys, table: 'example_keys' })
  await store.createTable()
  for (const connection of [writing, reading]) connection.exec('PRAGMA busy_timeout = 5000')
  const written = await books({
    transactions: sqliteTransactions(writing, { table: 'example_steps' }),
    async query(tx, text, values = []) {
      const statement = (tx ?? reading).prepare(text)
      if (text.startsWith('SELECT')) return statement.all(...values) as Record<string, unknown>[]
      statement.run(...values)
      return []
    },
    serial: 'integer PRIMARY KEY',
    lastSerial: 'last_insert_rowid()'
  })
  return { store, ...written, transaction: false }
}
