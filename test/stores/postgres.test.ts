import { randomUUID } from 'node:crypto'
import t from 'tap'
import { PostgresStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { startPostgres } from '../support/postgres.js'
import { conforms } from '../support/store-fixtures.js'

const server = await startPostgres()
t.teardown(() => server.close())

const admin = server.pool({ max: 1 })

/** Makes two stores at a time, with a pool for each, on a table of their own. */
async function newStores(options: object = {}) {
  const table = `keys_${randomUUID().replaceAll('-', '')}`
  const pools = [server.pool(options), server.pool(options)] as const
  await new PostgresStore({ pool: pools[0], table }).createTable()
  const interrupt = () =>
    admin.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
       WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()`
    )
  const spoil = (key: string) => admin.query(`UPDATE ${table} SET headers = '{}' WHERE key = $1`, [key])
  return () => {
    const [store, second] = [
      new PostgresStore({ pool: pools[0], table }),
      new PostgresStore({ pool: pools[1], table })
    ] as const
    const dispose = () => Promise.all([store.close(), second.close()])
    return { store, second, dispose, interrupt, spoil }
  }
}

const stores = await newStores()
conforms(t, 'a PostgresStore keeps every promise of a store', stores)

for (const level of ['repeatable\\ read', 'serializable']) {
  const options = { options: `-c default_transaction_isolation=${level}` }
  conforms(t, `a PostgresStore keeps every promise where transactions are ${level}`, await newStores(options))
}

endures(t, 'a PostgresStore behind a bad network', stores)
