import t from 'tap'
import { LocalCache, MemoryStore, RedisStore } from '../../index.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { startRedis } from '../support/redis.js'
import { conforms, newKey } from '../support/store-fixtures.js'

// What a LocalCache does of its own is in unit/local-cache.

conforms(
  t,
  'a LocalCache in front of a MemoryStore keeps every promise of a store',
  () => new LocalCache(new MemoryStore())
)

const server = await startRedis()
t.teardown(() => server.close())
const client = await server.client()

conforms(t, 'a LocalCache in front of a RedisStore keeps every promise of a store', () => {
  const store = new LocalCache(new RedisStore(client))
  return { store, dispose: () => store.close?.() }
})

t.test('a replay of a reply on Redis sends no command', async (t) => {
  const redis = new RedisStore(client, { keyPrefix: `${newKey()}:` })
  const app = await build(t, { store: new LocalCache(redis) })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  const send = () => inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'key' } })
  t.same((await send()).json(), { run: 1 })
  const { result, sent } = await server.commands(send)
  t.same([result.json(), result.headers[REPLAYED]], [{ run: 1 }, 'true'])
  t.strictSame(sent, [])
})
