import { randomUUID } from 'node:crypto'
import t from 'tap'
import { RedisStore } from '../../index.js'
import { until } from '../support/latch.js'
import { ioredis, nodeRedis, startSentinel } from '../support/redis-sentinel.js'
import { claim, conforms, newKey, reply, soon, take } from '../support/store-fixtures.js'

/* Clients of node-redis that ask a Sentinel for the master. Of ioredis they are like any other: see test/faults/sentinel.test.ts. */

const { master, onReplica, observer, port } = await startSentinel(t)
const admin = await master.client()

for (const options of [{ reserveClient: true }, { masterPoolSize: 3, RESP: 2 as const }]) {
  const clients = [await nodeRedis(t, port, options), ioredis(t, port)] as const
  conforms(t, `a RedisStore by Sentinel keeps every promise of a store, ${JSON.stringify(options)}`, () => {
    const keyPrefix = `${randomUUID()}:`
    const [store, second] = clients.map((client) => new RedisStore(client, { keyPrefix })) as [RedisStore, RedisStore]
    const interrupt = async () => {
      await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
      await admin.call('CLIENT', 'KILL', 'TYPE', 'normal')
    }
    const dispose = async () => {
      await Promise.all([store.close(), second.close()])
    }
    return { store, second, interrupt, dispose }
  })
}

t.test('nobody waits for others, however many commands are under way at all times', async (t) => {
  const client = await nodeRedis(t, port)
  const store = new RedisStore(client)
  const stop = new AbortController()
  const busy = Array.from({ length: 20 }, async () => {
    while (!stop.signal.aborted) await store.acquire(newKey(), claim())
  })
  await soon(Promise.all(Array.from({ length: 50 }, () => store.acquire(newKey(), claim()))))
  stop.abort()
  await Promise.all(busy)
})

t.test('stores share what they know of the master, so that none takes a connection from another', async (t) => {
  for (const masterPoolSize of [1, 3]) {
    const client = await nodeRedis(t, port, { masterPoolSize })
    const stores = Array.from(
      { length: 8 },
      (_, n) => new RedisStore(n % 2 === 0 ? client : client.withTypeMapping({}))
    )
    await soon(Promise.all(stores.map((store) => store.acquire(newKey(), claim()))))
    await soon(client.use((lease) => lease.ping()))
  }
})

t.test('the store goes on with the new master when Sentinel makes another one', async (t) => {
  const client = await nodeRedis(t, port)
  const store = new RedisStore(client)
  const key = newKey()
  const token = await take(store, key)
  const others = admin.pipeline()
  for (let n = 0; n < 2_000; n++) others.set(`other:${n}`, '')
  await others.exec()
  const { cursor } = await store.list(['running'], null)
  await observer.call('SENTINEL', 'FAILOVER', 'main')
  await until(async () => /role:master/.test(await onReplica.info('replication')), { timeout: 60_000 })
  await until(() => store.complete(key, token, reply(), 60_000).catch(() => false), { timeout: 60_000 })
  t.match(await store.acquire(key, claim()), { state: 'completed' })
  t.type(cursor, 'string')
  // The new master has its keys in another order. The old one may still answer for a moment.
  const isRefused = () =>
    store.list(['running'], cursor).then(
      () => false,
      (error) => /server that this cursor is from is gone/.test(error.message)
    )
  await until(isRefused, { message: 'the cursor to be refused' })
})
