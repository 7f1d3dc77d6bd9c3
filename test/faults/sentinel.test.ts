import t from 'tap'
import { RedisStore } from '../../index.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { until } from '../support/latch.js'
import { ioredis, nodeRedis, startSentinel } from '../support/redis-sentinel.js'
import { newKey, reply, soon, take } from '../support/store-fixtures.js'

/* A failover by Sentinel: the master dies, its replica takes over. With `replicas: 1` no stored reply is lost. */

for (const [name, connect] of [
  ['ioredis', ioredis],
  ['node-redis', nodeRedis]
] as const) {
  t.test(
    `with ${name}, what counts as stored on a replica is replayed after a failover, and no handler of it runs again`,
    async (t) => {
      const { master, onReplica, port } = await startSentinel(t, 500)
      const store = new RedisStore(await connect(t, port), { replicas: 1, replicaTimeout: 500 })
      const app = await build(t, { store, storeTimeout: 5_000, lease: 5_000 })
      const runs = new Map<string, number>()
      app.post('/', { config: { idempotency: true } }, async (request) => {
        const key = request.idempotency?.key ?? ''
        runs.set(key, (runs.get(key) ?? 0) + 1)
        return { key, run: runs.get(key) }
      })
      const send = (key: string) => inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': key } })
      const before = Array.from({ length: 50 }, (_, n) => `before ${n}`)
      for (const key of before) t.same((await send(key)).json(), { key, run: 1 })

      await master.kill()
      const during = await send('during')
      t.ok([200, 503].includes(during.statusCode), 'an answer in any case')
      const isBack = async () => (await send(`probe ${Math.random()}`)).statusCode === 200
      await until(isBack, { timeout: 120_000, message: 'the failover' })
      t.match(await onReplica.role(), ['master'])

      for (const key of before) {
        const again = await send(key)
        t.same([again.json(), again.headers[REPLAYED]], [{ key, run: 1 }, 'true'])
      }
      const key = newKey()
      const token = await take(store, key)
      const heard = store.changed(key, new AbortController().signal)
      await until(async () => String(await onReplica.call('PUBSUB', 'NUMSUB', `idempotency:${key}`)).endsWith(',1'))
      await new RedisStore(onReplica).complete(key, token, reply(), 60_000)
      await soon(heard, 'who listens on the new master')
    }
  )
}
