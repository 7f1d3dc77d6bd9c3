import type { Pool, PoolClient } from 'pg'
import t from 'tap'
import { pgTransactions } from '../../lib/transactions.js'
import { startPostgres } from '../support/postgres.js'
import { type Loss, ORDERS, scenes, stepOf } from '../support/transaction-scenes.js'

/* Steps in transactions of PostgreSQL. */

const ISOLATIONS = ['read committed', 'repeatable read', 'serializable']

for (const isolation of ISOLATIONS) {
  t.test(isolation, async (t) => {
    const server = await startPostgres({ config: { default_transaction_isolation: isolation } })
    t.teardown(() => server.close())
    const pool = server.pool({ max: 20 })
    const other = server.pool()
    const outside = async (text: string) => (await other.query(text)).rows
    const terminate = async (pid: unknown) => void (await other.query('SELECT pg_terminate_backend($1)', [pid]))
    await outside(ORDERS)

    await scenes<PoolClient>(t, {
      steps: (table, loss) => pgTransactions(loss ? losing(pool, loss, terminate) : pool, { table }),
      send: (tx, text) => tx.query(text),
      outside,
      kill: (tx) => terminate((tx as unknown as { processID: number }).processID),
      async waiting() {
        const [row] = await outside(
          "SELECT count(*) AS waiting FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'"
        )
        return Number(row.waiting)
      }
    })

    t.test('savepoints are for the step', async (t) => {
      const steps = pgTransactions(pool, { table: 'steps' })
      const { operation } = stepOf()
      await steps.once(stepOf({ operation }), async (tx) => {
        await tx.query('INSERT INTO orders (ref) VALUES ($1)', [operation])
        await tx.query('SAVEPOINT a')
        await t.rejects(tx.query('INSERT INTO orders (ref) VALUES ($1)', [operation]), { code: '23505' })
        await tx.query('ROLLBACK TO a')
        return '1'
      })
      t.equal((await outside(`SELECT ref FROM orders WHERE ref = '${operation}'`)).length, 1)
    })

    t.test('a step that goes on after a failed statement is undone, though it says nothing', async (t) => {
      const steps = pgTransactions(pool, { table: 'steps' })
      const { operation } = stepOf()
      const failed = steps.once(stepOf({ operation }), async (tx) => {
        await tx.query('INSERT INTO orders (ref) VALUES ($1)', [operation])
        await tx.query('SELECT 1 / 0').catch(() => {})
        return '1'
      })
      await t.rejects(failed, { code: '25P02' })
      t.same(await outside(`SELECT ref FROM orders WHERE ref = '${operation}'`), [])
    })

    t.test('no client is kept, and none that is broken is given back', async (t) => {
      const small = server.pool({ max: 1 })
      const steps = pgTransactions(small, { table: 'steps' })
      const killed = steps.once(stepOf(), async (tx) => {
        await terminate((tx as unknown as { processID: number }).processID)
        return '1'
      })
      await t.rejects(killed)
      await t.rejects(
        steps.once(stepOf(), async () => {
          throw new Error('no')
        }),
        { message: 'no' }
      )
      t.match(await steps.once(stepOf(), async () => '1'), { resumed: false })
      const client = await small.connect()
      t.equal(client.listenerCount('error'), 0)
      client.release()
    })
  })
}

t.test('a schema, and a role that may not create tables', async (t) => {
  const server = await startPostgres()
  t.teardown(() => server.close())
  const pool = server.pool()
  await pool.query('CREATE SCHEMA own')
  const steps = pgTransactions(pool, { table: 'own.steps' })
  await steps.createTable()
  await pool.query('CREATE ROLE app LOGIN; GRANT USAGE ON SCHEMA own TO app; GRANT ALL ON own.steps TO app')
  const app = pgTransactions(server.pool({ user: 'app' }), { table: 'own.steps' })
  await app.createTable()
  t.match(await app.once(stepOf(), async () => '1'), { resumed: false })
  await t.rejects(pgTransactions(server.pool({ user: 'app' }), { table: 'own.other' }).createTable(), { code: '42501' })
})

/** A pool whose first client loses its connection around its commit, or its rollback before that is sent. */
function losing(pool: Pool, loss: Loss, terminate: (pid: unknown) => Promise<void>): Pool {
  let losses = 1
  const connect = async () => {
    const client = await pool.connect()
    if (losses-- <= 0) return client
    const pid = (client as unknown as { processID: number }).processID
    return new Proxy(client, {
      get(target, name) {
        const value = Reflect.get(target, name)
        if (name !== 'query') return typeof value === 'function' ? value.bind(target) : value
        return async (text: string, values?: unknown[]) => {
          if (text === 'ROLLBACK' && loss === 'before the rollback') throw new Error('lost')
          if (text !== 'COMMIT') return target.query(text, values)
          if (loss === 'before the commit') await terminate(pid)
          const [committed] = await Promise.allSettled([
            target.query(text),
            loss === 'in the commit' ? terminate(pid) : undefined
          ])
          if (loss === 'after the commit') throw new Error('lost')
          if (committed.status === 'rejected') throw committed.reason
          return committed.value
        }
      }
    })
  }
  return { connect } as unknown as Pool
}
