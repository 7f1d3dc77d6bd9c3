import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { RedisStore } from '../../index.js'
import { warnOfEviction } from '../../lib/stores/redis/eviction.js'
import { type RedisServer, startRedis } from '../support/redis.js'
import { claim, newKey } from '../support/store-fixtures.js'

/* A Redis that evicts keys when it is full would let handlers run twice. */

async function server(t: Test, ...config: string[]): Promise<RedisServer> {
  const server = await startRedis({ config })
  t.teardown(() => server.close())
  return server
}

/** The warnings of this process while a store is used. */
async function warnings(use: () => Promise<unknown>): Promise<string[]> {
  const heard: string[] = []
  const listener = (warning: Error & { code?: string }) => {
    if (warning.code === 'FST_IDEMPOTENCY_EVICTION' && warning.name === 'IdempotencyWarning')
      heard.push(warning.message)
  }
  process.on('warning', listener)
  await use()
  await sleep(50)
  process.off('warning', listener)
  return heard
}

for (const protocol of [2, 3] as const) {
  t.test(`of a Redis that evicts keys the store warns, once, in RESP${protocol}`, async (t) => {
    const redis = await server(t, '--maxmemory', '64mb', '--maxmemory-policy', 'volatile-lru')
    for (const client of [await redis.client({ protocol }), await redis.nodeRedis({ RESP: protocol })]) {
      const store = new RedisStore(client)
      const warned = once(process, 'warning')
      const heard = await warnings(async () => {
        for (let n = 0; n < 3; n++) await store.acquire(newKey(), claim())
        await warned
      })
      t.strictSame(heard, ['Redis evicts keys when it is full (maxmemory-policy volatile-lru)'])
    }
  })
}

t.test('the answer is understood in each of its forms, and one that says nothing is no reason to warn', async (t) => {
  const asked = (answer: unknown) => warnings(() => warnOfEviction({ config: async () => answer }))
  const evicts = { maxmemory: '1000', 'maxmemory-policy': 'allkeys-lru' }
  for (const answer of [evicts, new Map(Object.entries(evicts)), Object.entries(evicts).flat()]) {
    t.strictSame(await asked(answer), ['Redis evicts keys when it is full (maxmemory-policy allkeys-lru)'])
  }
  for (const answer of [null, undefined, {}, new Map(), [], ['maxmemory', '1000', 'maxmemory-policy'], 'OK']) {
    t.strictSame(await asked(answer), [])
  }
})

t.test('of a Redis that refuses writes when it is full, or has no limit, it does not', async (t) => {
  for (const config of [
    ['--maxmemory', '64mb', '--maxmemory-policy', 'noeviction'],
    ['--maxmemory-policy', 'allkeys-lru']
  ]) {
    const store = new RedisStore(await (await server(t, ...config)).client())
    t.strictSame(await warnings(() => store.acquire(newKey(), claim())), [])
  }
})

t.test('a Redis that does not tell is left alone', async (t) => {
  const redis = await server(t, '--maxmemory', '64mb', '--maxmemory-policy', 'allkeys-lru')
  const admin = await redis.client()
  await admin.call('ACL', 'SETUSER', 'default', '-config')
  const store = new RedisStore(await redis.client())
  t.strictSame(await warnings(async () => t.match(await store.acquire(newKey(), claim()), { state: 'acquired' })), [])
})

t.test('a Redis that is full and does not evict refuses new keys, and keeps what it has', async (t) => {
  const redis = await server(t, '--maxmemory', '3mb', '--maxmemory-policy', 'noeviction')
  const client = await redis.client()
  const store = new RedisStore(client)
  const key = newKey()
  t.match(await store.acquire(key, claim()), { state: 'acquired' })
  for (let size = 100_000; size >= 1; size = Math.floor(size / 10)) {
    const fill = async (n: number): Promise<boolean> =>
      client.set(`filler:${size}:${n}`, 'x'.repeat(size)).then(() => true)
    for (let n = 0; await fill(n).catch(() => false); n++) {}
  }
  const full = { code: 'FST_IDEMPOTENCY_STORE_FULL', message: /^Redis is full/, cause: { message: /OOM/ } }
  await t.rejects(store.acquire(newKey(), claim()), full)
  t.match(await store.get(key), { state: 'running' })
})
