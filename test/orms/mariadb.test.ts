import knex, { type Knex } from 'knex'
import type { RowDataPacket } from 'mysql2/promise'
import t from 'tap'
import { DataSource, type EntityManager, EntitySchema } from 'typeorm'
import { mysqlTransactions, sqlTransactions } from '../../lib/transactions.js'
import { CommitProxy } from '../support/commit-proxy.js'
import { until } from '../support/latch.js'
import { startMariadb } from '../support/mariadb.js'
import { orm, type World } from '../support/orm-scenes.js'
import { ORDERS } from '../support/transaction-scenes.js'

/* Steps in transactions of ORMs and drivers on MariaDB. */

const server = await startMariadb()
t.teardown(() => server.close())
const network = await CommitProxy.start(server.socket)
t.teardown(() => network.close())
const { socket: socketPath } = network
const [user, database] = ['root', 'test']

interface Order {
  ref: string
}

const orms = {
  mysql2: orm(() => {
    const pool = server.pool({ socketPath })
    return {
      books: mysqlTransactions(pool),
      order: (tx, ref) => tx.execute('INSERT INTO orders (ref) VALUES (?)', [ref]),
      duplicate: { code: 'ER_DUP_ENTRY' },
      close: () => pool.end()
    }
  }),

  TypeORM: orm(async () => {
    const orders = new EntitySchema<Order>({
      name: 'orders',
      columns: { ref: { type: 'varchar', length: 64, primary: true } }
    })
    const dataSource = new DataSource({ type: 'mariadb', socketPath, username: user, database, entities: [orders] })
    await dataSource.initialize()
    return {
      books: sqlTransactions<EntityManager>({
        begin: (work) => dataSource.transaction(work),
        query: (tx, text, values) => tx.query(text, values),
        placeholders: '?'
      }),
      order: (tx, ref) => tx.insert(orders, { ref }),
      duplicate: { driverError: { code: 'ER_DUP_ENTRY' } },
      nested: (tx, work) => tx.transaction(work),
      close: () => dataSource.destroy()
    }
  }),

  Knex: orm(() => {
    const db = knex({ client: 'mysql2', connection: { socketPath, user, database } })
    return {
      books: sqlTransactions<Knex.Transaction>({
        begin: (work) => db.transaction(work),
        query: (tx, text, values) => tx.raw(text, values),
        placeholders: '?'
      }),
      order: (tx, ref) => tx<Order>('orders').insert({ ref }),
      duplicate: { code: 'ER_DUP_ENTRY' },
      nested: (tx, work) => tx.transaction(work),
      close: () => db.destroy()
    }
  })
}

const observer = server.pool()
await observer.query(ORDERS)
const world: World = {
  outside: async (text) => (await observer.query<RowDataPacket[]>(text))[0],
  lose(loss) {
    network.next = loss
  },
  async waiting() {
    const [[row]] = await observer.query<RowDataPacket[]>("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
    return Number(row?.Value)
  },
  async kill() {
    // It shows what was some time ago, at first perhaps nothing.
    const open = 'SELECT trx_mysql_thread_id AS id FROM information_schema.innodb_trx'
    const transactions = async () => (await observer.query<RowDataPacket[]>(open))[0]
    const transaction = await until(async () => (await transactions())[0], { message: 'a transaction to be seen' })
    await observer.query(`KILL CONNECTION ${transaction?.id}`)
  }
}

for (const [name, scenes] of Object.entries(orms)) t.test(name, (t) => scenes(t, world))
