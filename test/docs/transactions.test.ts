import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { type SqlTransactions, sqlTransactions } from '../../lib/transactions.js'
import { build } from '../support/app.js'
import { startMariadb } from '../support/mariadb.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { ORDERS, stepOf } from '../support/transaction-scenes.js'
import type { Given } from './given.js'

/* The snippets of docs/transactions.md, and those of docs/orms.md that are about steps. */

const [postgres, mariadb] = await Promise.all([startPostgres(), startMariadb()])
t.teardown(() => Promise.all([postgres.close(), mariadb.close()]))
process.env.DATABASE_URL = postgres.url
process.env.MYSQL_URL = mariadb.url
process.env.LIBSQL_URL = `file:${join(makeFolder('libsql'), 'database')}`
const tried = new Set<string>()

async function snippet<T>(name: string, given: Partial<Given> = {}): Promise<T> {
  tried.add(name)
  const { run } = (await import(`./snippets/transactions-${name}.js`)) as { run(given: Partial<Given>): Promise<T> }
  return run(given)
}

/** Ten at once do a step once; one that fails is undone. */
async function proves<Tx>(t: Test, books: SqlTransactions<Tx>, send: (tx: Tx, text: string) => unknown) {
  await books.createTable()
  const step = stepOf()
  const order = (tx: Tx, ref: string) => send(tx, `INSERT INTO orders (ref) VALUES ('${ref}')`)
  const work = async (tx: Tx) => {
    await order(tx, step.operation)
    return '1'
  }
  const all = await Promise.all(Array.from({ length: 10 }, () => books.once(step, work)))
  t.equal(all.filter(({ resumed }) => !resumed).length, 1)
  const other = stepOf()
  const failed = books.once(other, async (tx) => {
    await order(tx, other.operation)
    await order(tx, step.operation)
    return '1'
  })
  await t.rejects(failed)
  const orderAgain = async (tx: Tx) => String(await order(tx, other.operation))
  t.equal((await books.once(other, orderAgain)).resumed, false, 'it was undone')
}

t.test('pg: an order is placed once, whatever becomes of the replies', async (t) => {
  const outside = postgres.pool()
  await outside.query('CREATE TABLE orders (id serial, item text)')
  const app = await build(t)
  const { pool } = await snippet<{ pool: { end(): Promise<void> } }>('pg', { app })
  t.teardown(() => pool.end())
  const headers = (key: string) => ({ 'idempotency-key': key })
  const post = async (key: string) =>
    (await app.inject({ method: 'POST', url: '/orders', headers: headers(key), payload: { item: 'tea' } })).json()
  t.same([await post('a'), await post('a'), await post('b')], [{ id: '1' }, { id: '1' }, { id: '2' }])
  t.equal((await outside.query('SELECT FROM orders')).rowCount, 2)
  await outside.query('DROP TABLE orders')
  await outside.query(ORDERS)
})

for (const name of ['drizzle', 'kysely']) {
  t.test(name, async (t) => {
    type Pool = { end(): Promise<void> }
    type Declared = { books: SqlTransactions<object>; pool?: Pool; db: { $client: Pool } }
    const { books, pool, db } = await snippet<Declared>(name)
    const end = pool ?? db.$client
    t.teardown(() => end.end())
    const kysely = await import('kysely')
    const drizzle = await import('drizzle-orm')
    await proves(t, books, (tx, text) =>
      'executeQuery' in tx
        ? (tx as { executeQuery(query: object): unknown }).executeQuery(kysely.CompiledQuery.raw(text))
        : (tx as { execute(query: object): unknown }).execute(drizzle.sql.raw(text))
    )
  })
}

t.test('mysql', async (t) => {
  type Tx = { query(text: string): unknown }
  const { books, pool } = await snippet<{ books: SqlTransactions<Tx>; pool: Tx & { end(): Promise<void> } }>('mysql')
  t.teardown(() => pool.end())
  await pool.query(ORDERS)
  await proves(t, books, (tx, text) => tx.query(text))
})

t.test('libsql', async (t) => {
  type Tx = { execute(text: string): unknown }
  const { books, client } = await snippet<{ books: SqlTransactions<Tx>; client: Tx & { close(): void } }>('libsql')
  t.teardown(() => client.close())
  await client.execute(ORDERS)
  await proves(t, books, (tx, text) => tx.execute(text))
})

t.test('no snippet was left out, and the table is the one that is created', async (t) => {
  const all = readdirSync(new URL('snippets/', import.meta.url)).filter((file) => /^transactions-.*\.js$/.test(file))
  t.same([...tried].sort(), all.map((file) => file.slice('transactions-'.length, -'.js'.length)).sort())
  const { ddl } = sqlTransactions({ begin: (work) => work(null), query: () => [] })
  const page = readFileSync(new URL('../../../docs/transactions.md', import.meta.url), 'utf8')
  t.ok(page.includes(`\`\`\`sql\n${ddl}\n\`\`\``))
})
