import { randomUUID } from 'node:crypto'
import { createClientPool, createCluster, createSentinel, RESP_TYPES } from 'redis'
import t from 'tap'
import { type RedisClient, RedisStore } from '../../index.js'
import { build } from '../support/app.js'
import { until } from '../support/latch.js'
import { type NodeRedisOptions, startRedis } from '../support/redis.js'
import { claim, finish, lapsed, newKey, reply, same, soon, take } from '../support/store-fixtures.js'

/* What is peculiar to clients of node-redis. What is not is tried with them where it is with ioredis. */

const LONG = 60_000
const NOT_CONNECTED = { message: /not connected: call `await client\.connect\(\)`/ }

const server = await startRedis({ port: true })
t.teardown(() => server.close())
const admin = await server.client()

const address = { host: server.host, port: server.port }
const unconnected: [string, () => RedisClient][] = [
  ['createClient', () => server.nodeRedis({ lazyConnect: true }) as never],
  ['createClientPool', () => createClientPool({ socket: address })],
  ['createSentinel', () => createSentinel({ name: 'main', sentinelRootNodes: [address] })],
  ['createCluster', () => createCluster({ rootNodes: [{ socket: address }] })]
]

for (const [kind, create] of unconnected) {
  t.test(`what ${kind} gives has to be connected, and every call says so until then`, async (t) => {
    const store = new RedisStore(await create())
    const never = new AbortController().signal
    const calls: (() => Promise<unknown>)[] = [
      () => store.acquire('k', claim()),
      () => store.renew('k', 't', LONG),
      () => store.step('k', 't', ['a', 'b']),
      () => store.complete('k', 't', reply(), LONG),
      () => store.release('k', 't'),
      () => store.get('k'),
      () => store.delete('k'),
      () => store.list(['reply'], null),
      () => store.settle('k', 'f', 'ended'),
      () => store.changed('k', never)
    ]
    for (const call of calls) await t.rejects(soon(call()), NOT_CONNECTED)
    await store.close()
  })
}

t.test('no handler runs without protection because a client is not connected, or not any more', async (t) => {
  const client = await server.nodeRedis({ lazyConnect: true })
  const store = new RedisStore(client, { keyPrefix: `${randomUUID()}:` })
  const app = await build(t, { store })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  const send = async () => {
    const headers = { 'idempotency-key': newKey() }
    return (await app.inject({ method: 'POST', url: '/', headers })).statusCode
  }
  t.equal(await send(), 503)
  t.equal(runs, 0)
  await client.connect()
  await until(async () => (await send()) === 200)
  client.destroy()
  const before = runs
  t.equal(await send(), 503)
  t.equal(runs, before)
})

t.test('replicas: an unconnected client is told of by complete as well', async (t) => {
  const store = new RedisStore(await server.nodeRedis({ lazyConnect: true }), { replicas: 1 })
  await t.rejects(store.complete('k', 't', reply(), LONG), NOT_CONNECTED)
})

t.test('without an offline queue calls fail while the server is away, and go on afterwards', async (t) => {
  const own = await startRedis({ persist: true })
  t.teardown(() => own.close())
  const client = await own.nodeRedis({ disableOfflineQueue: true })
  const store = new RedisStore(client)
  const key = newKey()
  const token = await take(store, key)
  await own.kill()
  await until(() => !client.isReady)
  await t.rejects(store.acquire(newKey(), claim()), { message: 'The client is offline' })
  await t.rejects(store.changed(key, new AbortController().signal), Error)
  await own.start()
  await until(() => client.isReady)
  t.equal(await store.complete(key, token, reply(), LONG), true)
})

t.test('a question whose answer is lost fails, and may be asked again with the same token', async (t) => {
  const client = await server.nodeRedis()
  const store = new RedisStore(client)
  const key = newKey()
  const mine = claim()
  await server.pause()
  const asked = store.acquire(key, mine)
  const refused = t.rejects(asked, Error)
  await until(() => pendingOf(client) > 0)
  await server.kill()
  await refused
  await server.start()
  await until(() => client.isReady)
  t.strictSame(await store.acquire(key, mine), { state: 'acquired', attempt: 1 })
})

/** How many commands have been written that are not answered yet. */
function pendingOf(client: object): number {
  const { _getQueue } = client as { _getQueue(): { pendingCount: number; isWaitingToWrite(): boolean } }
  const queue = _getQueue.call(client)
  return queue.isWaitingToWrite() ? 0 : queue.pendingCount
}

t.test("the client's own keyPrefix is put before keys as ioredis puts it, and not before channels", async (t) => {
  const outer = `${randomUUID()}:é`
  for (const keyPrefix of [outer, Buffer.from(outer)]) {
    const store = new RedisStore(await server.nodeRedis({ keyPrefix }))
    const second = new RedisStore(await server.client({ keyPrefix: outer }))
    t.teardown(() => Promise.all([store.close(), second.close()]))
    const key = newKey()
    const token = await take(store, key)
    t.strictSame(await admin.keys(`*${key}`), [`${outer}idempotency:${key}`])
    t.match(await second.acquire(key, claim()), { state: 'running' })
    const heard = [store, second].map((each) => each.changed(key, new AbortController().signal))
    await until(async () => String(await admin.call('PUBSUB', 'NUMSUB', `idempotency:${key}`)).endsWith(',2'))
    t.equal(await store.complete(key, token, reply(), LONG), true)
    await soon(Promise.all(heard))
    same(t, await second.acquire(key, claim()), reply())
    same(t, await store.get(key), reply())
    t.equal(await store.delete(key), true)
  }
})

t.test('what the caller chooses for all commands does not change what is stored, or how it is read', async (t) => {
  for (const commandOptions of [
    { asap: true },
    { typeMapping: { [RESP_TYPES.NUMBER]: String, [RESP_TYPES.BLOB_STRING]: String } },
    { typeMapping: { [RESP_TYPES.SIMPLE_STRING]: Buffer, [RESP_TYPES.MAP]: Map } }
  ] as NonNullable<NodeRedisOptions['commandOptions']>[]) {
    const client = await server.nodeRedis({ commandOptions })
    const store = new RedisStore(client, { keyPrefix: `${randomUUID()}:` })
    const key = newKey()
    const token = await lapsed(store, key)
    const { sent } = await server.commands(() => store.acquire(key, claim()))
    t.strictSame(
      sent.map(([name]) => name),
      ['SET', 'EVALSHA'],
      JSON.stringify(commandOptions)
    )
    t.equal(await store.renew(key, token, LONG), true)
    const found = await store.acquire(key, claim())
    t.ok(found.state === 'running' && found.leaseMs > LONG - 10_000, JSON.stringify(found))
    const record = reply({ body: Buffer.from([0, 255, 128, 10]) })
    t.equal(await store.complete(key, token, record, LONG), true)
    same(t, await store.acquire(key, claim()), record)
  }
})

t.test('a client with options of its own for some commands serves as well', async (t) => {
  const client = await server.nodeRedis()
  for (const given of [client.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: String }), client.duplicate()]) {
    if (!given.isOpen) await given.connect()
    const store = new RedisStore(given)
    const key = newKey()
    await finish(store, key)
    same(t, await store.acquire(key, claim()), reply())
    if (given.isReady && given !== (client as unknown)) given.destroy()
  }
})

t.test('limits of the caller do not end the listening', async (t) => {
  const own = await startRedis()
  t.teardown(() => own.close())
  const watcher = await own.client()
  const socket = { reconnectStrategy: false as const, socketTimeout: 300 }
  const client = await own.nodeRedis({ socket, pingInterval: 50, commandsQueueMaxLength: 4 })
  const store = new RedisStore(client)
  t.teardown(() => store.close())
  const listening = async () => String(await watcher.call('CLIENT', 'LIST', 'TYPE', 'pubsub')).split('\n')[0] ?? ''
  const key = newKey()
  const token = await take(store, key)
  const cut = store.changed(key, new AbortController().signal)
  await until(async () => (await listening()) !== '')
  const idOf = (line: string) => /^id=(\d+)/.exec(line)?.[1]
  const first = idOf(await listening())
  await until(async () => Number(/ age=(\d+)/.exec(await listening())?.[1]) >= 1)
  t.equal(idOf(await listening()), first, 'the same connection after a second')
  await watcher.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
  await soon(cut)
  const heard = store.changed(key, new AbortController().signal)
  await until(async () => (await listening()) !== '')
  t.equal(await store.complete(key, token, reply(), LONG), true)
  await soon(heard)
})
