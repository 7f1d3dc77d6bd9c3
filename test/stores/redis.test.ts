import { randomUUID } from 'node:crypto'
import t from 'tap'
import { RedisStore } from '../../index.js'
import { FlakyStore, persistent } from '../support/flaky-store.js'
import { newSeed, Random } from '../support/random.js'
import { startRedis } from '../support/redis.js'
import { exclusiveHistory, takeoverHistory } from '../support/store-histories.js'
import { ownershipSpec, storeSpec } from '../support/store-spec.js'

const server = await startRedis()
t.teardown(() => server.close())

/** Two stores with clients of their own, on keys of their own. */
async function stores() {
  const options = { keyPrefix: `${randomUUID()}:` }
  const clients = [await server.client(), await server.client()] as const
  const [store, second] = [new RedisStore(clients[0], options), new RedisStore(clients[1], options)]
  const dispose = async () => {
    await Promise.all([store.close(), second.close()])
    for (const client of clients) client.disconnect()
  }
  return { store, second, dispose }
}

storeSpec(t, 'a RedisStore keeps every promise of a store', stores)

t.test('a RedisStore behind a bad network', async (t) => {
  const random = new Random(newSeed())
  t.comment(`SEED=${random.seed}`)
  await ownershipSpec(t, 'belongs to its tokens for a caller who repeats what got lost', async () => {
    const { store, second, dispose } = await stores()
    const flaky = (store: RedisStore) => persistent(new FlakyStore(store, { random }))
    return { store: flaky(store), second: flaky(second), dispose }
  })
  const { store, second, dispose } = await stores()
  t.teardown(dispose)
  const clients = [new FlakyStore(store, { random }), new FlakyStore(second, { random })]
  await exclusiveHistory(t, clients, random)
  await takeoverHistory(t, clients, random)
})

t.test('a RedisStore with a client that pipelines by itself', async (t) => {
  await storeSpec(t, 'keeps every promise of a store', async () => {
    const options = { keyPrefix: `${randomUUID()}:` }
    const client = await server.client({ enableAutoPipelining: true })
    const store = new RedisStore(client, options)
    return { store, dispose: () => store.close() }
  })
})

for (const protocol of [2, 3] as const) {
  t.test(`a RedisStore with a client that speaks RESP${protocol}`, async (t) => {
    await storeSpec(t, 'keeps every promise of a store', async () => {
      const options = { keyPrefix: `${randomUUID()}:` }
      const store = new RedisStore(await server.client({ protocol }), options)
      return { store, dispose: () => store.close() }
    })
  })
}
