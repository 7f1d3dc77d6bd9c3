import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { createClient } from '@libsql/client'
import { CompiledQuery, type DatabaseConnection, Kysely, SqliteDialect, SqliteDriver, type Transaction } from 'kysely'
import Libsql from 'libsql'
import t from 'tap'
import { libsqlTransactions, type SqliteDatabase, sqliteTransactions, sqlTransactions } from '../../lib/transactions.js'
import { type CommitLoss, orm } from '../support/orm-scenes.js'
import { makeFolder } from '../support/process.js'
import { ORDERS } from '../support/transaction-scenes.js'

/* Steps in transactions of drivers of SQLite, and of an ORM on one of them. */

const [version = 0] = process.versions.node.split('.').map(Number)
const folder = makeFolder('sqlite')

interface Order {
  ref: string
}
type Open = new (path: string) => SqliteDatabase & { close(): unknown }

/** Names are computed, so that the compiler does not look for their types. */
async function imported(name: string): Promise<Record<string, Open>> {
  return (await import(name)) as never
}

let next: CommitLoss | null = null
/** There is no connection that could be lost: what is lost is the answer of a commit, or the commit. */
function strike(...losses: CommitLoss[]): void {
  if (next === null || !losses.includes(next)) return
  next = null
  throw new Error('lost')
}

const sqlite = (Open: Open) => (path: string) =>
  orm(() => {
    const database = new Open(path)
    const losing: SqliteDatabase = {
      exec(text) {
        if (text === 'COMMIT') strike('unsent')
        database.exec(text)
        if (text === 'COMMIT') strike('unheard', 'cut')
      },
      prepare: (text) => database.prepare(text)
    }
    return {
      books: sqliteTransactions(losing),
      order: async (tx, ref) => tx.prepare(`INSERT INTO orders (ref) VALUES ('${ref}')`).run(),
      duplicate: { message: /UNIQUE constraint failed/ },
      close: () => database.close()
    }
  })

class LosingDriver extends SqliteDriver {
  override async commitTransaction(connection: DatabaseConnection) {
    strike('unsent')
    await super.commitTransaction(connection)
    strike('unheard', 'cut')
  }
}

const drivers = {
  // It has the interface of better-sqlite3, and runs on every version of Node.
  libsql: sqlite(Libsql),

  '@libsql/client': (path: string) =>
    orm(() => {
      const client = createClient({ url: `file:${path}` })
      const losing = {
        async transaction(mode: 'write') {
          const transaction = await client.transaction(mode)
          const commit = transaction.commit.bind(transaction)
          return Object.assign(transaction, {
            async commit() {
              strike('unsent')
              await commit()
              strike('unheard', 'cut')
            }
          })
        }
      }
      return {
        books: libsqlTransactions(losing),
        order: (tx, ref) => tx.execute({ sql: 'INSERT INTO orders (ref) VALUES (?)', args: [ref] }),
        duplicate: { code: 'SQLITE_CONSTRAINT' },
        close: () => client.close()
      }
    }),

  Kysely: (path: string) =>
    orm(() => {
      const config = { database: new Libsql(path) }
      class Dialect extends SqliteDialect {
        override createDriver() {
          return new LosingDriver(config)
        }
      }
      const db = new Kysely<{ orders: Order }>({ dialect: new Dialect(config) })
      return {
        books: sqlTransactions<Transaction<{ orders: Order }>>({
          begin: (work) => db.transaction().execute(work),
          query: (tx, text, values) => tx.executeQuery(CompiledQuery.raw(text, values)),
          placeholders: '?'
        }),
        order: (tx, ref) => tx.insertInto('orders').values({ ref }).execute(),
        duplicate: { code: 'SQLITE_CONSTRAINT_PRIMARYKEY' },
        close: () => db.destroy()
      }
    }),

  // Before that Node has none.
  ...(version >= 22 && {
    'node:sqlite': sqlite((await imported('node:sqlite')).DatabaseSync as Open)
  })
}

for (const [name, scenes] of Object.entries(drivers)) {
  t.test(name, async (t) => {
    const path = join(folder, randomUUID())
    const other = new Libsql(path)
    t.teardown(() => other.close())
    other.exec(ORDERS)
    await scenes(path)(t, {
      outside: (text) => other.prepare(text).all(),
      lose(loss) {
        next = loss
      }
    })
  })
}
