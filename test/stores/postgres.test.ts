import { randomUUID } from 'node:crypto'
import t from 'tap'
import { PostgresStore } from '../../index.js'
import { FlakyStore, persistent } from '../support/flaky-store.js'
import { startPostgres } from '../support/postgres.js'
import { newSeed, Random } from '../support/random.js'
import { exclusiveHistory, takeoverHistory } from '../support/store-histories.js'
import { ownershipSpec, storeSpec } from '../support/store-spec.js'

const server = await startPostgres()
t.teardown(() => server.close())

/** Two stores with pools of their own, on a table of their own. */
async function stores(options: object = {}) {
  const table = `keys_${randomUUID().replaceAll('-', '')}`
  const pools = [server.pool(options), server.pool(options)] as const
  const [store, second] = [
    new PostgresStore({ pool: pools[0], table }),
    new PostgresStore({ pool: pools[1], table })
  ] as const
  await store.createTable()
  const dispose = async () => {
    await Promise.all([store.close(), second.close()])
    await Promise.all(pools.map((pool) => pool.end()))
  }
  return { store, second, dispose }
}

storeSpec(t, 'a PostgresStore keeps every promise of a store', stores)

for (const level of ['repeatable\\ read', 'serializable']) {
  storeSpec(t, `a PostgresStore keeps every promise where transactions are ${level}`, () =>
    stores({ options: `-c default_transaction_isolation=${level}` })
  )
}

t.test('a PostgresStore behind a bad network', async (t) => {
  const random = new Random(newSeed())
  t.comment(`SEED=${random.seed}`)
  await ownershipSpec(t, 'belongs to its tokens for a caller who repeats what got lost', async () => {
    const { store, second, dispose } = await stores()
    const flaky = (store: PostgresStore) => persistent(new FlakyStore(store, { random }))
    return { store: flaky(store), second: flaky(second), dispose }
  })
  const { store, second, dispose } = await stores()
  t.teardown(dispose)
  const clients = [new FlakyStore(store, { random }), new FlakyStore(second, { random })]
  await exclusiveHistory(t, clients, random)
  await takeoverHistory(t, clients, random)
})
