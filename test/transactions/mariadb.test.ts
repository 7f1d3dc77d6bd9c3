import type { Pool, PoolConnection, RowDataPacket } from 'mysql2/promise'
import t from 'tap'
import { mysqlTransactions } from '../../lib/transactions.js'
import { startMariadb } from '../support/mariadb.js'
import { type Loss, ORDERS, scenes, stepOf } from '../support/transaction-scenes.js'

/* Steps in transactions of MariaDB, which speaks MySQL's protocol and has its locks. */

const server = await startMariadb()
t.teardown(() => server.close())

// The server's character set is latin1, in which its collation takes `A` and `a` for the same.
for (const isolation of ['REPEATABLE READ', 'READ COMMITTED', 'SERIALIZABLE']) {
  t.test(isolation, async (t) => {
    const name = isolation.replace(' ', '_')
    await server.pool().query(`CREATE DATABASE ${name}`)
    const pool = server.pool({ database: name, connectionLimit: 20 })
    pool.on('connection', (connection) => {
      ;(connection as unknown as { query(text: string): void }).query(
        `SET SESSION TRANSACTION ISOLATION LEVEL ${isolation}`
      )
    })
    const other = server.pool({ database: name })
    const outside = async (text: string) => (await other.query<RowDataPacket[]>(text))[0]
    const kill = async ({ threadId }: PoolConnection) => void (await other.query(`KILL CONNECTION ${threadId}`))
    await outside(ORDERS)

    await scenes<PoolConnection>(t, {
      steps: (table, loss) => mysqlTransactions(loss ? losing(pool, loss, kill) : pool, { table }),
      send: (tx, text) => tx.query(text),
      outside,
      kill,
      async waiting() {
        // Not from innodb_trx, which stands still while it is read more often than ten times a second.
        const [row] = await outside("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
        return Number(row?.Value)
      }
    })

    t.test('savepoints are for the step', async (t) => {
      const steps = mysqlTransactions(pool, { table: 'steps' })
      const { operation } = stepOf()
      await steps.once(stepOf({ operation }), async (tx) => {
        await tx.query('SAVEPOINT a')
        await tx.query('INSERT INTO orders (ref) VALUES (?)', [operation])
        await tx.query('ROLLBACK TO a')
        return '1'
      })
      t.same(await outside(`SELECT ref FROM orders WHERE ref = '${operation}'`), [])
    })

    t.test('no connection is kept, and none that is broken is given back', async (t) => {
      const small = server.pool({ database: name, connectionLimit: 1 })
      const steps = mysqlTransactions(small, { table: 'steps' })
      const killed = steps.once(stepOf(), async (tx) => {
        await kill(tx)
        return '1'
      })
      await t.rejects(killed)
      t.match(await steps.once(stepOf(), async () => '1'), { resumed: false })
      ;(await small.getConnection()).release()
    })
  })
}

t.test('numbers that come as text or as BigInt', async (t) => {
  const database = { database: 'test', bigNumberStrings: true, supportBigNumbers: true }
  const steps = mysqlTransactions(server.pool(database))
  await steps.createTable()
  const expired = stepOf({ expiresAt: Date.now() - 1 })
  await steps.once(expired, async () => '1')
  t.match(await steps.once({ ...expired, expiresAt: null }, async () => '2'), { result: '2', resumed: false })
  t.match(await steps.once(expired, async () => '3'), { result: '2', resumed: true })
})

t.test('a pool with callbacks is refused', async (t) => {
  t.throws(() => mysqlTransactions(server.pool().pool as never), {
    code: 'FST_IDEMPOTENCY_INVALID_OPTION',
    message: /pool\.promise\(\)/
  })
})

/** A pool whose first connection is lost around its commit, or does not get its rollback. */
function losing(
  pool: Pool,
  loss: Loss,
  kill: (connection: PoolConnection) => Promise<void>
): Pick<Pool, 'getConnection'> {
  let losses = 1
  return {
    async getConnection() {
      const connection = await pool.getConnection()
      if (losses-- <= 0) return connection
      return new Proxy(connection, {
        get(target, name) {
          const value = Reflect.get(target, name)
          if (name === 'rollback' && loss === 'before the rollback') return () => Promise.reject(new Error('lost'))
          if (name !== 'commit') return typeof value === 'function' ? value.bind(target) : value
          return async () => {
            if (loss === 'before the commit') await kill(connection)
            const [committed] = await Promise.allSettled([
              target.commit(),
              loss === 'in the commit' ? kill(connection) : undefined
            ])
            if (loss === 'after the commit') throw new Error('lost')
            if (committed.status === 'rejected') throw committed.reason
          }
        }
      })
    }
  }
}
