import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { createClientPool } from 'redis'
import t, { type Test } from 'tap'
import { type RedisClient, RedisStore, type RedisStoreOptions } from '../../index.js'
import { build, REPLAYED } from '../support/app.js'
import { until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { claim, lapsed, newKey, reply, take } from '../support/store-fixtures.js'

/* `new RedisStore(client, { replicas })`: a reply counts as stored when replicas have it. */

const LONG = 60_000

const main = await startRedis({ port: true })
t.teardown(() => main.close())
const replica = await startRedis({ config: ['--replicaof', main.host, String(main.port)] })
t.teardown(() => replica.close())
const admin = await main.client()
const onReplica = await replica.client()
const isLinked = async () => /master_link_status:up/.test(await onReplica.info('replication'))
await until(isLinked, { message: 'the replica to follow' })

type Options = RedisStoreOptions | undefined

const KINDS = {
  ioredis: async (t: Test, options: Options) => {
    const client = await main.client()
    const reconnect = async () => {
      const ready = once(client, 'ready')
      client.disconnect(true)
      await ready
    }
    return { store: storeOn(t, client, options), reconnect, commands: client, evalsha: 'evalshaBuffer' }
  },
  'node-redis': async (t: Test, options: Options) => {
    const client = await main.nodeRedis()
    const id = async () => Number(await client.sendCommand(['CLIENT', 'ID']))
    const reconnect = async () => {
      const { socketEpoch } = client
      await admin.call('CLIENT', 'KILL', 'ID', await id())
      await until(() => client.isReady && client.socketEpoch > socketEpoch)
    }
    return { store: storeOn(t, client, options), reconnect, commands: client, evalsha: 'sendCommand' }
  },
  'a pool of node-redis': async (t: Test, options: Options) => {
    const pool = createClientPool({ socket: { path: main.path, reconnectStrategy: 20 } }, { maximum: 1 })
    pool.on('error', () => {})
    await pool.connect()
    t.teardown(() => pool.destroy())
    const client = await pool.execute(async (client) => client)
    const reconnect = async () => {
      const { socketEpoch } = client
      await admin.call('CLIENT', 'KILL', 'ID', Number(await client.sendCommand(['CLIENT', 'ID'])))
      await until(() => client.isReady && client.socketEpoch > socketEpoch)
    }
    return { store: storeOn(t, pool, options), reconnect, commands: client, evalsha: 'sendCommand' }
  }
}

function storeOn(t: Test, client: RedisClient, options: RedisStoreOptions = { replicas: 1 }): RedisStore {
  const store = new RedisStore(client, options)
  t.teardown(() => store.close())
  return store
}

type Open = (
  options?: RedisStoreOptions
) => ReturnType<(typeof KINDS)['ioredis' | 'node-redis' | 'a pool of node-redis']>

function withEach(name: string, run: (t: Test, open: Open) => Promise<void>): void {
  for (const [kind, open] of Object.entries(KINDS))
    t.test(`${name} (${kind})`, (t) => run(t, (options) => open(t, options)))
}

withEach('a reply that counts as stored is on the replica', async (t, open) => {
  const { store } = await open()
  for (let n = 0; n < 20; n++) {
    const key = newKey()
    const token = await take(store, key)
    t.equal(await store.complete(key, token, reply(), LONG), true)
    const there = await onReplica.getBuffer(`idempotency:${key}`)
    t.equal(there?.toString('latin1', 0, 1), 'C', 'a record')
  }
})

withEach('a reply that no replica takes does not count as stored, until one does', async (t, open) => {
  const { store, reconnect } = await open({ replicas: 1, replicaTimeout: 50 })
  const key = newKey()
  const token = await take(store, key)
  await replica.pause()
  t.teardown(() => replica.resume())
  for (let n = 0; n < 2; n++) {
    await t.rejects(store.complete(key, token, reply(), LONG), { message: '0 of 1 replicas have the reply' })
  }
  t.match(await store.acquire(key, claim()), { state: 'completed' }, 'others may see it already')
  // A connection that has written nothing does not vouch for what others have written.
  await reconnect()
  await t.rejects(store.complete(key, token, reply(), LONG), { message: '0 of 1 replicas have the reply' })
  replica.resume()
  await until(() => store.complete(key, token, reply(), LONG).catch(() => false))
  t.ok(await onReplica.exists(`idempotency:${key}`))
})

withEach(
  'what was written before the connection changed, perhaps to another server, does not count as stored',
  async (t, open) => {
    const { store, reconnect, commands, evalsha } = await open()
    const key = newKey()
    const token = await take(store, key)
    await store.complete(key, token, reply(), LONG)
    const methods = commands as unknown as Record<string, (...args: unknown[]) => Promise<unknown>>
    const method = methods[evalsha] as (...args: unknown[]) => Promise<unknown>
    methods[evalsha] = async (...args) => {
      methods[evalsha] = method
      const answer = await method.apply(commands, args)
      await reconnect()
      return answer
    }
    await t.rejects(store.complete(key, token, reply(), LONG), { message: /connection to Redis was lost/ })
    t.equal(await store.complete(key, token, reply(), LONG), true)
  }
)

withEach('a record that settles a key counts as stored when replicas have it', async (t, open) => {
  const { store } = await open({ replicas: 1, replicaTimeout: 50 })
  const [key, other] = [newKey(), newKey()]
  for (const each of [key, other]) await lapsed(store, each)
  const settlement = { record: reply(), ttlMs: LONG }
  t.equal(await until(() => store.settle(key, 'fingerprint', settlement).catch(() => false)), true)
  t.equal((await onReplica.getBuffer(`idempotency:${key}`))?.toString('latin1', 0, 1), 'C', 'a record')
  await replica.pause()
  t.teardown(() => replica.resume())
  t.equal(await store.settle(key, 'fingerprint', settlement), false, 'what is not stored is not waited for')
  t.equal(await store.settle(other, 'fingerprint', 'ended'), true, 'nor is what is no record')
  const unsafe = store.settle(other, 'fingerprint', settlement)
  await t.rejects(unsafe, { message: '0 of 1 replicas have the reply' })
})

withEach('more replicas than there are have nothing', async (t, open) => {
  const { store } = await open({ replicas: 2, replicaTimeout: 50 })
  const key = newKey()
  const token = await take(store, key)
  await t.rejects(store.complete(key, token, reply(), LONG), { message: '1 of 2 replicas have the reply' })
})

withEach(
  'a client gets its reply although no replica takes it, and storing goes on until one does',
  async (t, open) => {
    const { store } = await open({ replicas: 1, replicaTimeout: 50 })
    const events: string[] = []
    for (const name of ['stored', 'store-error']) {
      const listener = () => void events.push(name)
      subscribe(`fastify-idempotency:${name}`, listener)
      t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
    }
    const app = await build(t, { store })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
    const request = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': newKey() } }
    await replica.pause()
    t.teardown(() => replica.resume())
    t.same((await app.inject(request)).json(), { run: 1 })
    t.same(events, ['store-error'])
    const again = await app.inject(request)
    t.same([again.json(), again.headers[REPLAYED]], [{ run: 1 }, 'true'])
    await sleep(100)
    t.notOk(events.includes('stored'))
    replica.resume()
    await until(() => events.includes('stored'), { message: 'the reply to be stored' })
  }
)

withEach('without the option nothing waits', async (t, open) => {
  const { store } = await open({})
  const key = newKey()
  const token = await take(store, key)
  const { sent } = await main.commands(() => store.complete(key, token, reply(), LONG))
  t.notOk(sent.some(([name]) => /^(wait|set)$/i.test(name ?? '')))
})

t.test('bad options are refused', async (t) => {
  const client = await main.client()
  const code = 'FST_IDEMPOTENCY_INVALID_OPTION'
  for (const replicas of [-1, 1.5, '1', null]) {
    t.throws(() => new RedisStore(client, { replicas } as never), { code, message: /"replicas" takes a number/ })
  }
  for (const replicaTimeout of [0, -1, 1.5, 'soon', null]) {
    t.throws(() => new RedisStore(client, { replicaTimeout } as never), { code, message: /"replicaTimeout" takes/ })
  }
  const cluster = Object.assign(Object.create(client), { isCluster: true })
  t.throws(() => new RedisStore(cluster, { replicas: 1 }), { code, message: /takes no Cluster/ })
})
