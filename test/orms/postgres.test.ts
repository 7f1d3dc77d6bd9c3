import { EntitySchema as MikroSchema } from '@mikro-orm/core'
import { type EntityManager, MikroORM } from '@mikro-orm/postgresql'
import { PrismaPg } from '@prisma/adapter-pg'
import { sql } from 'drizzle-orm'
import { drizzle } from 'drizzle-orm/node-postgres'
import { pgTable, varchar } from 'drizzle-orm/pg-core'
import knex, { type Knex } from 'knex'
import { CompiledQuery, Kysely, type Transaction as KyselyTransaction, PostgresDialect } from 'kysely'
import type { Pool } from 'pg'
import postgres, { type TransactionSql } from 'postgres'
import {
  type CreationOptional,
  DataTypes,
  type InferAttributes,
  type InferCreationAttributes,
  Model,
  Sequelize,
  type Transaction as SequelizeTransaction
} from 'sequelize'
import t from 'tap'
import { DataSource, type EntityManager as TypeormManager, EntitySchema as TypeormSchema } from 'typeorm'
import { pgTransactions, sqlTransactions } from '../../lib/transactions.js'
import { type CommitLoss, orm, type World } from '../support/orm-scenes.js'
import { startPostgres } from '../support/postgres.js'
import { PostgresProxy } from '../support/postgres-proxy.js'
import { ORDERS } from '../support/transaction-scenes.js'
import { type Prisma, PrismaClient } from './prisma/client.js'

/* Steps in transactions of ORMs and drivers on PostgreSQL. */

const server = await startPostgres()
t.teardown(() => server.close())
const network = await PostgresProxy.start(server)
t.teardown(() => network.close())
const { user, database } = server
const { host } = network

interface Order {
  ref: string
}

const orms = {
  pg: orm(() => {
    const pool = server.pool({ host })
    return {
      books: pgTransactions(pool),
      order: (tx, ref) => tx.query('INSERT INTO orders (ref) VALUES ($1)', [ref]),
      duplicate: { code: '23505' }
    }
  }),

  'postgres.js': orm(() => {
    const sql = postgres({ host, user, database, max: 5, onnotice() {} })
    return {
      books: sqlTransactions<TransactionSql>({
        begin: (work) => sql.begin(work),
        query: (tx, text, values) => tx.unsafe(text, values)
      }),
      order: (tx, ref) => tx`INSERT INTO orders ${tx({ ref })}`,
      duplicate: { code: '23505' },
      nested: (tx, work) => tx.savepoint(work),
      // It throws where nobody can catch it: https://github.com/porsager/postgres/issues/1208
      dies: true,
      close: () => sql.end({ timeout: 0 })
    }
  }),

  Prisma: orm(() => {
    const prisma = new PrismaClient({ adapter: new PrismaPg({ host, user, database }) })
    return {
      books: sqlTransactions<Prisma.TransactionClient>({
        begin: (work) => prisma.$transaction(work, { timeout: 30_000 }),
        query: (tx, text, values) => tx.$queryRawUnsafe(text, ...values)
      }),
      order: (tx, ref) => tx.order.create({ data: { ref } }),
      duplicate: { code: 'P2002' },
      nested: (tx, work) => tx.$transaction(work),
      close: () => prisma.$disconnect()
    }
  }),

  TypeORM: orm(async () => {
    const orders = new TypeormSchema<Order>({
      name: 'orders',
      columns: { ref: { type: 'varchar', length: 64, primary: true } }
    })
    const dataSource = new DataSource({ type: 'postgres', host, username: user, database, entities: [orders] })
    await dataSource.initialize()
    return {
      books: sqlTransactions<TypeormManager>({
        begin: (work) => dataSource.transaction(work),
        query: (tx, text, values) => tx.query(text, values)
      }),
      order: (tx, ref) => tx.insert(orders, { ref }),
      duplicate: { driverError: { code: '23505' } },
      nested: (tx, work) => tx.transaction(work),
      close: () => dataSource.destroy()
    }
  }),

  Sequelize: orm(() => {
    const sequelize = new Sequelize({ dialect: 'postgres', host, username: user, database, logging: false })
    class Order extends Model<InferAttributes<Order>, InferCreationAttributes<Order>> {
      declare ref: CreationOptional<string>
    }
    const ref = { type: DataTypes.STRING(64), primaryKey: true }
    Order.init({ ref }, { sequelize, tableName: 'orders', timestamps: false })
    return {
      books: sqlTransactions<SequelizeTransaction>({
        begin: (work) => sequelize.transaction(work),
        query: (tx, text, values) => sequelize.query(text, { bind: values, transaction: tx })
      }),
      order: (tx, ref) => Order.create({ ref }, { transaction: tx }),
      duplicate: { name: 'SequelizeUniqueConstraintError', parent: { code: '23505' } },
      nested: (tx, work) => sequelize.transaction({ transaction: tx }, work),
      close: () => sequelize.close()
    }
  }),

  Knex: orm(() => {
    const db = knex({ client: 'pg', connection: { host, user, database } })
    return {
      books: sqlTransactions<Knex.Transaction>({
        begin: (work) => db.transaction(work),
        query: (tx, text, values) => tx.raw(text, values),
        placeholders: '?'
      }),
      order: (tx, ref) => tx<Order>('orders').insert({ ref }),
      duplicate: { code: '23505' },
      nested: (tx, work) => tx.transaction(work),
      close: () => db.destroy()
    }
  }),

  MikroORM: orm(async () => {
    const orders = new MikroSchema<Order>({
      name: 'Order',
      tableName: 'orders',
      properties: { ref: { type: 'string', primary: true } }
    })
    const mikro = await MikroORM.init({ host, user, dbName: database, entities: [orders] })
    return {
      books: sqlTransactions<EntityManager>({
        begin: (work) => mikro.em.fork().transactional(work),
        query: (tx, text, values) => tx.getConnection().execute(text, values, 'all', tx.getTransactionContext()),
        placeholders: '?'
      }),
      order: (tx, ref) => tx.insert(orders, { ref }),
      duplicate: { name: 'UniqueConstraintViolationException', code: '23505' },
      nested: (tx, work) => tx.transactional(work),
      close: () => mikro.close()
    }
  }),

  Drizzle: orm(() => {
    const orders = pgTable('orders', { ref: varchar({ length: 64 }).primaryKey() })
    const db = drizzle(quiet(server.pool({ host })))
    type Transaction = Parameters<Parameters<typeof db.transaction>[0]>[0]
    return {
      books: sqlTransactions<Transaction>({
        begin: (work) => db.transaction(work),
        query(tx, text, values) {
          const parts = text.split(/\$\d+/).flatMap((part, n) => [sql.param(values[n - 1]), sql.raw(part)])
          return tx.execute(sql.join(parts.slice(1)))
        }
      }),
      order: (tx, ref) => tx.insert(orders).values({ ref }),
      duplicate: { cause: { code: '23505' } },
      nested: (tx, work) => tx.transaction(work)
    }
  }),

  Kysely: orm(() => {
    const db = new Kysely<{ orders: Order }>({ dialect: new PostgresDialect({ pool: quiet(server.pool({ host })) }) })
    return {
      books: sqlTransactions<KyselyTransaction<{ orders: Order }>>({
        begin: (work) => db.transaction().execute(work),
        query: (tx, text, values) => tx.executeQuery(CompiledQuery.raw(text, values))
      }),
      order: (tx, ref) => tx.insertInto('orders').values({ ref }).execute(),
      duplicate: { code: '23505' },
      close: () => db.destroy()
    }
  })
}

/** Neither a pool nor these ORMs listen to a client that is in use, whose loss would end the process. */
function quiet(pool: Pool): Pool {
  return pool.on('connect', (client) => client.on('error', () => {}))
}

let next: CommitLoss | null = null
/** Names of prepared statements. */
const commits = new Set<string>()
network.loss = (statement) => {
  const [, prepared] = /P[\s\S]{4}(\w+)\0commit\0/.exec(statement) ?? []
  if (prepared) commits.add(prepared)
  if (!/\bcommit\b/i.test(statement) && ![...commits].some((name) => statement.includes(name))) return null
  const loss = next
  next = null
  return loss
}

const observer = server.pool()
await observer.query(ORDERS)
const world: World = {
  outside: async (text) => (await observer.query(text)).rows,
  lose(loss) {
    next = loss
  },
  async waiting() {
    const { rows } = await observer.query(
      "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'"
    )
    return rows.length
  },
  async kill() {
    await observer.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
  }
}

for (const [name, scenes] of Object.entries(orms)) t.test(name, (t) => scenes(t, world))
