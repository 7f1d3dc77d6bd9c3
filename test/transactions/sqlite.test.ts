import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Client, createClient } from '@libsql/client'
import Libsql from 'libsql'
import t, { type Test } from 'tap'
import { libsqlTransactions, type SqliteDatabase, sqliteTransactions } from '../../lib/transactions.js'
import { latch } from '../support/latch.js'
import { makeFolder } from '../support/process.js'
import { alsoWithNodeSqlite, type OpenSqlite, sqliteDrivers } from '../support/sqlite.js'
import { ORDERS, scenes, stepOf, type TestDatabase } from '../support/transaction-scenes.js'

/* Steps in transactions of SQLite, with each of its drivers. */

const folder = makeFolder('sqlite')

type Database = OpenSqlite
type Open = (path: string) => Database

for (const [name, { open }] of sqliteDrivers) {
  t.test(name, async (t) => {
    const path = join(folder, randomUUID())
    const database = opened(t, open, path)
    const other = opened(t, open, path)
    database.exec(ORDERS)
    await scenes<SqliteDatabase>(t, {
      steps: (table, loss) => sqliteTransactions<SqliteDatabase>(loss ? losing(database, loss) : database, { table }),
      send: (tx, text) => tx.prepare(text).run(),
      outside: (text) => other.prepare(text).all()
    })

    t.test('what a step does may be synchronous, and use savepoints', async (t) => {
      const steps = sqliteTransactions(database, { table: 'steps' })
      const { operation } = stepOf()
      const committed = await steps.once(stepOf({ operation }), async (tx) => {
        tx.exec('SAVEPOINT a')
        tx.exec(`INSERT INTO orders (ref) VALUES ('${operation}')`)
        tx.exec('ROLLBACK TO a')
        tx.exec(`INSERT INTO orders (ref) VALUES ('${operation}b')`)
        return '1'
      })
      t.equal(committed.resumed, false)
      const found = other.prepare(`SELECT ref FROM orders WHERE ref LIKE '${operation}%'`).all()
      t.same(
        found.map(({ ref }) => ref),
        [`${operation}b`]
      )
    })

    t.test('those of two tables take turns as well', async (t) => {
      const [one, two] = [
        sqliteTransactions(database, { table: 'steps' }),
        sqliteTransactions(database, { table: 'two' })
      ]
      await two.createTable()
      const leave = latch()
      const held = one.once(stepOf(), async () => {
        await leave.promise
        return '1'
      })
      const next = two.once(stepOf(), async () => '2')
      leave.open()
      t.match(await Promise.all([held, next]), [{ result: '1' }, { result: '2' }])
    })
  })
}

alsoWithNodeSqlite(t, fileURLToPath(import.meta.url))

t.test('@libsql/client', async (t) => {
  const path = join(folder, randomUUID())
  const client = createClient({ url: `file:${path}` })
  t.teardown(() => client.close())
  const other = opened(t, (path) => new Libsql(path) as unknown as Database, path)
  await client.execute(ORDERS)
  type Tx = Awaited<ReturnType<Client['transaction']>>
  const database: TestDatabase<Tx> = {
    steps: (table, loss) => libsqlTransactions(loss ? losingClient(client, loss) : client, { table }),
    send: (tx, text) => tx.execute(text),
    outside: (text) => other.prepare(text).all()
  }
  await scenes(t, database)
})

function opened(t: Test, open: Open, path: string): Database {
  const database = open(path)
  t.teardown(() => database.close())
  return database
}

/** There is no connection that could be lost: what is lost is the answer, or the statement. */
function losing(database: Database, loss: string): SqliteDatabase {
  let losses = 1
  return {
    exec(text) {
      if (text !== 'COMMIT' || losses-- <= 0) return database.exec(text)
      if (loss !== 'before the commit') database.exec(text)
      throw new Error('lost')
    },
    prepare: (text) => database.prepare(text)
  }
}

function losingClient(client: Client, loss: string): Pick<Client, 'transaction'> {
  let losses = 1
  return {
    async transaction() {
      const transaction = await client.transaction('write')
      if (losses-- <= 0) return transaction
      const { commit } = transaction
      transaction.commit = async () => {
        if (loss !== 'before the commit') await commit.call(transaction)
        throw new Error('lost')
      }
      return transaction
    }
  }
}
