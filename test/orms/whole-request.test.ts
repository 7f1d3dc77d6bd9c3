import { readdirSync } from 'node:fs'
import t from 'tap'
import { PostgresStore } from '../../index.js'
import type { Given } from '../docs/given.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { startPostgres } from '../support/postgres.js'
import { ORDERS } from '../support/transaction-scenes.js'

/* ORMs that join the transaction of a whole request, as in the snippets of docs/orms.md. Drizzle and Kysely: readme/readme.test.ts. */

const server = await startPostgres()
t.teardown(() => server.close())
process.env.DATABASE_URL = server.url
const pool = server.pool()
await pool.query(ORDERS)
const store = new PostgresStore({ pool })
await store.createTable()

interface Declared {
  dataSource?: { destroy(): unknown }
  sequelize?: { close(): unknown }
  db?: { destroy(): unknown }
}

const snippets = new URL('../docs/snippets/', import.meta.url)
for (const file of readdirSync(snippets).filter((file) => /^whole-request-.*\.js$/.test(file))) {
  const name = file.slice('whole-request-'.length, -'.js'.length)
  t.test(name, async (t) => {
    const app = await build(t, { store })
    const { run } = (await import(new URL(file, snippets).href)) as {
      run(given: Partial<Given>): Promise<Declared>
    }
    const { dataSource, sequelize, db } = await run({ app: app as never })
    t.teardown(() => Promise.all([dataSource?.destroy(), sequelize?.close(), db?.destroy()]))
    const post = async (key: string, ref: string) => {
      const headers = { 'idempotency-key': `${name} ${key}` }
      const reply = await inject(app, { method: 'POST', url: '/orders', headers, payload: { ref: `${name} ${ref}` } })
      return [reply.statusCode, reply.headers[REPLAYED] === 'true' ? 'replay' : 'fresh']
    }
    const ordered = async () => {
      const { rows } = await pool.query('SELECT ref FROM orders WHERE ref LIKE $1 ORDER BY ref', [`${name} %`])
      return rows.map(({ ref }) => ref.slice(name.length + 1))
    }

    t.same(await post('1', 'tea'), [200, 'fresh'])
    t.same(await post('1', 'tea'), [200, 'replay'])
    t.same(await ordered(), ['tea', 'tea, gift wrap'])

    // What fails second undoes what was done first, and gives the key back.
    await pool.query('INSERT INTO orders VALUES ($1)', [`${name} milk, gift wrap`])
    t.same(await post('2', 'milk'), [500, 'fresh'])
    t.same(await ordered(), ['milk, gift wrap', 'tea', 'tea, gift wrap'])
    await pool.query('DELETE FROM orders WHERE ref = $1', [`${name} milk, gift wrap`])
    t.same(await post('2', 'milk'), [200, 'fresh'])
    t.same(await ordered(), ['milk', 'milk, gift wrap', 'tea', 'tea, gift wrap'])
    t.equal(pool.totalCount, pool.idleCount, 'all connections are back')
  })
}
