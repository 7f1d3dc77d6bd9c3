import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { type AddressInfo, connect, createServer } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { type Claim, RedisStore } from '../../index.js'
import { readLength, writeLength } from '../../lib/stores/record-codec.js'
import { build } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { type RedisServer, startRedis } from '../support/redis.js'
import {
  claim,
  conforms,
  finish,
  lapsed,
  newKey,
  reply,
  same,
  soon,
  take,
  tombstone
} from '../support/store-fixtures.js'

const LONG = 60_000

const shared = await startRedis()
t.teardown(() => shared.close())

/** A server whose connections are those of one test only. */
async function ownServer(t: Test): Promise<RedisServer> {
  const server = await startRedis()
  t.teardown(() => server.close())
  return server
}

async function connections(client: Redis): Promise<string[]> {
  return lines(await client.client('LIST'))
}

async function subscribers(client: Redis): Promise<string[]> {
  return lines(await client.call('CLIENT', 'LIST', 'TYPE', 'pubsub'))
}

function lines(text: unknown): string[] {
  return String(text).split('\n').filter(Boolean)
}

const KINDS = ['ioredis', 'node-redis'] as const
type Kind = (typeof KINDS)[number]

/** A store on keys of its own, a second one on the same keys, and clients of ioredis that look at them. */
async function open(t: Test, server: RedisServer = shared, kind: Kind = 'ioredis') {
  const keyPrefix = `${randomUUID()}:`
  const client = await server.client()
  const other = await server.client()
  const clients = kind === 'ioredis' ? [client, other] : [await server.nodeRedis(), await server.nodeRedis()]
  const stores = clients.map((client) => new RedisStore(client, { keyPrefix })) as [RedisStore, RedisStore]
  t.teardown(async () => {
    for (const store of stores) await store.close()
    for (const each of [client, other, ...clients]) each.disconnect()
  })
  return { store: stores[0], second: stores[1], client, other, keyPrefix }
}

type Open = (server?: RedisServer) => ReturnType<typeof open>

/** What is the same with every library. */
function withEach(name: string, run: (t: Test, open: Open, kind: Kind) => Promise<void>): void {
  for (const kind of KINDS) t.test(`${name} (${kind})`, (t) => run(t, (server) => open(t, server, kind), kind))
}

/** The names of the commands that were sent, in lower case. */
function names(sent: string[][]): string[] {
  return sent.map(([name]) => String(name).toLowerCase())
}

/** Sends every script once, so that the server knows them all. */
async function warm(store: RedisStore): Promise<void> {
  const key = newKey()
  const token = await lapsed(store, key)
  await store.renew(key, token, LONG)
  await store.step(key, token, ['a', 'b'])
  await store.changed(key, AbortSignal.abort())
  await store.release(key, token)
  await store.settle(key, 'fingerprint', 'ended')
  await store.delete(key)
}

withEach('a claim is one SET with NX and GET', async (t, open) => {
  const { store, keyPrefix } = await open()
  const key = newKey()
  const { result, sent, scripted } = await shared.commands(() =>
    store.acquire(key, claim({ leaseMs: 30_000, retainMs: 90_000 }))
  )
  t.strictSame(result, { state: 'acquired', attempt: 1 })
  t.strictSame(names(sent), ['set'])
  t.strictSame(
    sent[0]?.slice(1).filter((_, n) => n !== 1),
    [keyPrefix + key, 'PX', '120000', 'NX', 'GET']
  )
  t.strictSame(scripted, [])
})

for (const [name, prepare, expected] of [
  ['a claim', async () => {}, { state: 'acquired' }],
  ['a replay', async (store, key) => void (await finish(store, key)), { state: 'completed' }]
] as [string, (store: RedisStore, key: string) => Promise<void>, object][]) {
  t.test(`${name} takes one round trip`, async (t) => {
    const { store, second, client } = await open(t)
    const key = newKey()
    await prepare(second, key)
    const written = () => (client as unknown as { stream: { bytesWritten: number } }).stream.bytesWritten
    const before = written()
    await shared.pause()
    const found = store.acquire(key, claim({ withTtl: false }))
    await until(() => written() > before)
    await sleep(20)
    const asked = written()
    shared.resume()
    t.match(await found, expected)
    t.equal(written(), asked, 'nothing is asked after the first answer')
  })
}

for (const [name, prepare, expected, asking, commands] of [
  [
    'a conflict is asked like a claim, and once more by a script',
    async (store, key) => void (await take(store, key)),
    { state: 'running' },
    {},
    ['set', 'evalsha']
  ],
  [
    'a replay is asked like a claim',
    async (store, key) => void (await finish(store, key)),
    { state: 'completed', ttlMs: null },
    { withTtl: false },
    ['set']
  ],
  [
    'who wants to know what is left of a reply asks once more',
    async (store, key) => void (await finish(store, key)),
    { state: 'completed', ttlMs: Number },
    { withTtl: true },
    ['set', 'get', 'pttl']
  ]
] as [string, (store: RedisStore, key: string) => Promise<void>, object, Partial<Claim>, string[]][]) {
  withEach(`${name}, and nothing is written`, async (t, open) => {
    const { store, second, client, keyPrefix } = await open()
    const key = newKey()
    await prepare(second, key)
    const stored = () => Promise.all([client.getBuffer(keyPrefix + key), client.pexpiretime(keyPrefix + key)])
    const before = await stored()
    await warm(store)
    const { result, sent } = await shared.commands(() => store.acquire(key, claim({ takeover: true, ...asking })))
    t.match(result, expected)
    t.strictSame(names(sent), commands)
    t.strictSame(await stored(), before)
  })
}

withEach('completing, renewing, keeping a step and releasing is one EVALSHA each', async (t, open) => {
  const { store } = await open()
  await warm(store)
  for (const step of [
    (key: string, token: string) => store.complete(key, token, reply(), LONG),
    (key: string, token: string) => store.renew(key, token, LONG),
    (key: string, token: string) => store.step(key, token, ['a', 'b']),
    (key: string, token: string) => store.release(key, token)
  ]) {
    const key = newKey()
    const token = await take(store, key)
    const { result, sent } = await shared.commands(() => step(key, token))
    t.equal(result, true)
    t.strictSame(names(sent), ['evalsha'])
  }
})

withEach('deleting and settling what nobody is running is one EVALSHA each', async (t, open) => {
  const { store } = await open()
  await warm(store)
  const key = newKey()
  await lapsed(store, key)
  for (const call of [
    () => store.settle(key, 'fingerprint', 'ended'),
    () => store.settle(key, 'fingerprint', { record: tombstone('settled'), ttlMs: LONG }),
    () => store.settle(key, 'fingerprint', { record: reply(), ttlMs: LONG }),
    () => store.delete(key, true)
  ]) {
    const { result, sent } = await shared.commands(call)
    t.equal(result, true)
    t.strictSame(names(sent), ['evalsha'])
  }
})

withEach('claims that are due together are renewed by one EVALSHA, each for itself', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  await warm(store)
  const own = await Promise.all(
    Array.from({ length: 40 }, newKey).map(async (key) => ({ key, token: await take(store, key) }))
  )
  const lists = newKey()
  await client.lpush(keyPrefix + lists, 'a list')
  const { result, sent } = await shared.commands(() =>
    Promise.allSettled([
      ...own.map(({ key, token }) => store.renew(key, token, LONG)),
      store.renew(newKey(), 'nobody', LONG),
      store.renew((own[0] as { key: string }).key, 'somebody else', LONG),
      store.renew(lists, 'nobody', LONG)
    ])
  )
  t.strictSame(names(sent), ['evalsha'])
  const told = result.map((renewal) => (renewal.status === 'fulfilled' ? renewal.value : renewal.reason.message))
  t.strictSame(told.slice(0, -1), [...own.map(() => true), false, false])
  t.match(told.at(-1), /WRONGTYPE/)
  for (const { key } of own) t.ok((await client.pttl(keyPrefix + key)) > LONG)
})

t.test('a connection that is lost between the answers to many claims costs none of them', async (t) => {
  let allowance = Number.POSITIVE_INFINITY
  const proxy = createServer((socket) => {
    const upstream = connect(shared.path)
    const end = () => {
      upstream.destroy()
      socket.destroy()
    }
    upstream.on('error', end).on('close', end)
    socket.on('error', end).on('close', end)
    socket.pipe(upstream)
    upstream.on('data', (chunk) => {
      const passed = chunk.subarray(0, allowance)
      allowance -= passed.length
      socket.write(passed)
      if (allowance > 0) return
      allowance = Number.POSITIVE_INFINITY
      end()
    })
  })
  proxy.listen(0, '127.0.0.1')
  await once(proxy, 'listening')
  t.teardown(() => proxy.close())
  const client = new Redis({ host: '127.0.0.1', port: (proxy.address() as AddressInfo).port })
  client.on('error', () => {})
  t.teardown(() => client.disconnect())
  const store = new RedisStore(client, { keyPrefix: `${randomUUID()}:` })
  await warm(store)
  allowance = 60
  const found = await Promise.all(Array.from({ length: 100 }, () => store.acquire(newKey(), claim())))
  t.strictSame(
    found,
    found.map(() => ({ state: 'acquired', attempt: 1 }))
  )
  t.equal(allowance, Number.POSITIVE_INFINITY, 'it was lost')
})

t.test('a renewal on a server that only reads is an error of the server, of which its client hears', async (t) => {
  const server = await ownServer(t)
  const heard: string[] = []
  const client = await server.client({
    reconnectOnError: ({ message }) => {
      heard.push(message)
      return false
    }
  })
  const store = new RedisStore(client)
  await warm(store)
  const key = newKey()
  const token = await take(store, key)
  heard.length = 0
  await client.replicaof('127.0.0.1', '1')
  await t.rejects(store.renew(key, token, LONG), { message: /READONLY/ })
  t.match(heard, [/READONLY/])
  await client.replicaof('NO', 'ONE')
  t.equal(await store.renew(key, token, LONG), true)
})

withEach('a completed operation costs a SET and an EVALSHA, and its replay a SET', async (t, open) => {
  const { store } = await open()
  await warm(store)
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async (_, reply) => reply.code(201).send({ done: true }))
  await app.ready()
  const send = () => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'wire' } })
  const first = await shared.commands(send)
  t.equal(first.result.statusCode, 201)
  t.strictSame(names(first.sent), ['set', 'evalsha'])
  const replay = await shared.commands(send)
  t.equal(replay.result.headers['idempotent-replayed'], 'true')
  t.strictSame(names(replay.sent), ['set'])
})

withEach('nothing is published when nobody listens', async (t, open) => {
  const { store } = await open()
  await warm(store)
  for (const end of ends(store)) {
    const key = newKey()
    const token = await take(store, key)
    const { scripted } = await shared.commands(() => end(key, token))
    t.ok(scripted.length > 0)
    t.notOk(names(scripted).includes('publish'), 'no PUBLISH')
  }
})

withEach(
  'the end of a claim is published once when somebody listens, on a channel with the prefix',
  async (t, open) => {
    const { store, second, other, keyPrefix } = await open()
    for (const end of ends(store)) {
      const key = newKey()
      const token = await take(store, key)
      const heard = [0, 1, 2].map(() => second.changed(key, new AbortController().signal))
      await marked(other, keyPrefix + key)
      const { scripted } = await shared.commands(() => end(key, token))
      const published = scripted.filter(([name]) => name?.toLowerCase() === 'publish')
      t.equal(published.length, 1)
      t.ok(published[0]?.[1]?.startsWith(keyPrefix), `published on ${published[0]?.[1]}`)
      await soon(Promise.all(heard))
    }
  }
)

withEach('who waits for a claim that has lapsed meanwhile hears when it is settled', async (t, open) => {
  const { store, second, other, keyPrefix } = await open()
  for (const settlement of ['ended', { record: reply(), ttlMs: LONG }] as const) {
    const key = newKey()
    await take(store, key)
    const heard = second.changed(key, new AbortController().signal)
    await marked(other, keyPrefix + key)
    await other.pexpire(keyPrefix + key, LONG)
    const { scripted } = await shared.commands(() => store.settle(key, 'fingerprint', settlement))
    t.equal(names(scripted).filter((name) => name === 'publish').length, 1)
    await soon(heard)
  }
})

withEach('a script that the server has forgotten is sent again', async (t, open) => {
  const { store, client } = await open()
  const key = newKey()
  const flush = () => client.script('FLUSH')
  await flush()
  const token = await take(store, key, { leaseMs: 20 })
  await until(async () => (await store.get(key))?.state === 'abandoned')
  await flush()
  const heir = claim({ takeover: true })
  t.strictSame(await store.acquire(key, heir), { state: 'acquired', attempt: 2 })
  await flush()
  t.equal(await store.renew(key, token, LONG), false)
  await flush()
  t.equal(await store.renew(key, heir.token, LONG), true)
  await flush()
  const heard = store.changed(key, new AbortController().signal)
  await sleep(20)
  await flush()
  t.equal(await store.complete(key, heir.token, reply(), LONG), true)
  await soon(heard)
  await flush()
  t.type((await store.list(['reply'], null)).keys, Array)
  await flush()
  t.equal(await store.settle(key, 'fingerprint', 'ended'), false)
  await flush()
  t.equal(await store.delete(key), true)
  await flush()
  const { sent } = await shared.commands(async () => {
    await store.release(key, heir.token)
    await store.release(key, heir.token)
  })
  t.strictSame(names(sent), ['evalsha', 'eval', 'evalsha'], 'and known from then on')
})

/** A server before Redis 7.0: its answer to SET with both NX and GET is a syntax error. */
function before70(client: Redis): Redis {
  client.setBuffer = ((key: string, value: Buffer, ...options: string[]) => {
    const both = options.includes('NX') && options.includes('GET')
    return client.callBuffer('set', key, value, ...options, ...(both ? ['NOT-UNDERSTOOD'] : []))
  }) as never
  return client
}

t.test('a RedisStore on a server that does not take NX and GET together (Redis 6.2)', async (t) => {
  const clients = [before70(await shared.client()), before70(await shared.client())] as const
  await conforms(t, 'keeps every promise of a store', () => {
    const options = { keyPrefix: `${randomUUID()}:` }
    return { store: new RedisStore(clients[0], options), second: new RedisStore(clients[1], options) }
  })

  await t.test('claims by one script call, once it knows', async (t) => {
    const store = new RedisStore(before70(await shared.client()), { keyPrefix: `${randomUUID()}:` })
    await take(store, newKey())
    const { sent } = await shared.commands(() => take(store, newKey()))
    t.strictSame(names(sent), ['evalsha'])
  })
})

withEach('an error of the server other than a syntax error is not taken for an old server', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  await client.lpush(keyPrefix + key, 'a')
  await t.rejects(store.acquire(key, claim()), { message: /WRONGTYPE/ })
  const { sent } = await shared.commands(() => store.acquire(newKey(), claim()))
  t.strictSame(names(sent), ['set'])
})

t.test('where PUBLISH is not permitted, completing and releasing count all the same', async (t) => {
  const admin = await shared.client()
  await admin.acl('SETUSER', 'silent', 'on', '>secret', '~*', '&*', '+@all', '-publish')
  const client = await shared.client({ username: 'silent', password: 'secret' })
  await t.rejects(client.publish('a', 'b'), { message: /NOPERM/ })
  const keyPrefix = `${randomUUID()}:`
  const store = new RedisStore(client, { keyPrefix })
  t.teardown(() => store.close())
  const [completed, released, deleted] = [newKey(), newKey(), newKey()]
  const stop = new AbortController()
  const tokens: string[] = []
  const listeners: Promise<void>[] = []
  for (const key of [completed, released, deleted]) {
    tokens.push(await take(store, key))
    listeners.push(store.changed(key, stop.signal))
    await marked(admin, keyPrefix + key)
  }
  t.equal(await store.complete(completed, tokens[0] as string, reply(), LONG), true)
  same(t, await store.acquire(completed, claim()), reply())
  t.equal(await store.release(released, tokens[1] as string), true)
  t.strictSame(await store.acquire(released, claim()), { state: 'acquired', attempt: 1 })
  t.equal(await store.delete(deleted), true)
  t.equal(await store.get(deleted), null)
  stop.abort()
  await soon(Promise.all(listeners))
})

t.test('where SUBSCRIBE is not permitted, a duplicate that waits still gets the reply', async (t) => {
  const admin = await shared.client()
  await admin.acl('SETUSER', 'deaf', 'on', '>secret', '~*', '&*', '+@all', '-subscribe')
  const client = await shared.client({ username: 'deaf', password: 'secret' })
  const store = new RedisStore(client, { keyPrefix: `${randomUUID()}:` })
  const app = await build(t, { store, onConflict: 'wait' })
  const [started, go] = [latch(), latch()]
  app.post('/', { config: { idempotency: true } }, async () => {
    started.open()
    await go.promise
    return 'done'
  })
  const send = () => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'deaf' } })
  const first = send()
  await started.promise
  const duplicate = send()
  await sleep(50)
  go.open()
  t.equal((await first).payload, 'done')
  const replay = await duplicate
  t.equal(replay.payload, 'done')
  t.equal(replay.headers['idempotent-replayed'], 'true')
})

withEach('however many keys are listened to, there is one more connection, which close() ends', async (t, open) => {
  const { store, second, client } = await open(await ownServer(t))
  const before = (await connections(client)).length
  const keys = Array.from({ length: 50 }, newKey)
  const tokens = await Promise.all(keys.map((key) => take(store, key)))
  t.equal((await connections(client)).length, before, 'none when nobody has listened')
  const heard = [...keys, ...keys].map((key) => store.changed(key, new AbortController().signal))
  const all = async () => (await subscribers(client)).some((line) => line.includes(' sub=50 '))
  await until(all, { message: 'the subscription of 50 channels' })
  t.equal((await subscribers(client)).length, 1)
  t.equal((await connections(client)).length, before + 1)
  await Promise.all(keys.map((key, n) => second.complete(key, tokens[n] as string, reply(), LONG)))
  await soon(Promise.all(heard))
  await until(async () => (await subscribers(client)).length === 0, { message: 'the channels to be left' })

  const key = newKey()
  await take(store, key)
  const listened = store.changed(key, new AbortController().signal)
  await until(async () => (await subscribers(client)).length === 1)
  await store.close()
  await until(async () => (await connections(client)).length === before, { message: 'the connection to end' })
  await soon(listened, 'the listener of a closed store')
  t.equal(await client.ping(), 'PONG', "the caller's client goes on")
  t.match(await store.acquire(key, claim()), { state: 'running' })
})

withEach('a store that was closed listens again when it is asked to', async (_t, open) => {
  const { store, second } = await open()
  const key = newKey()
  const token = await take(store, key)
  await store.close()
  const heard = store.changed(key, new AbortController().signal)
  await second.complete(key, token, reply(), LONG)
  await soon(heard)
})

withEach('listening ends when the signal aborts, also while the client is held up', async (t, open) => {
  const { store, client, other } = await open(await ownServer(t))
  const key = newKey()
  await take(store, key)
  const heldUp = client.blpop(newKey(), 0).catch(() => 'disconnected')
  const stop = new AbortController()
  const listened = store.changed(key, stop.signal).then(
    () => 'resolved',
    () => 'rejected'
  )
  await until(async () => (await subscribers(other)).length === 1)
  await sleep(50)
  stop.abort()
  t.equal(await Promise.race([listened, sleep(500, 'pending')]), 'resolved')
  client.disconnect()
  await heldUp
  await listened
})

t.test(
  'a listening connection that was cut is opened again, although the client itself does not reconnect',
  async (t) => {
    const server = await ownServer(t)
    const admin = await server.client()
    const store = new RedisStore(await server.client({ retryStrategy: () => null }))
    t.teardown(() => store.close())
    const keys = [newKey(), newKey()] as const
    const tokens = [await take(store, keys[0]), await take(store, keys[1])] as const
    const stop = new AbortController()
    const cut = store.changed(keys[0], stop.signal).catch(() => {})
    await until(async () => (await subscribers(admin)).length === 1)
    await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
    await until(async () => (await subscribers(admin)).length === 0)
    await sleep(50)
    const heard = store.changed(keys[1], new AbortController().signal).then(
      () => 'heard',
      (error: Error) => error.message
    )
    await sleep(50)
    await store.complete(keys[1], tokens[1], reply(), LONG)
    t.equal(await soon(heard), 'heard')
    stop.abort()
    await soon(cut)
  }
)

t.test('closing the app ends the connection that listens, and leaves the client alone', async (t) => {
  const server = await ownServer(t)
  const [client, admin] = [await server.client(), await server.client()]
  const store = new RedisStore(client)
  const app = await build(t, { store })
  await app.ready()
  const key = newKey()
  await take(store, key)
  const listened = store.changed(key, new AbortController().signal)
  await until(async () => (await subscribers(admin)).length === 1)
  await app.close()
  await soon(listened)
  await until(async () => (await subscribers(admin)).length === 0)
  t.equal(await client.ping(), 'PONG')
})

t.test("the client's own keyPrefix and the store's are both put before keys, and waiting works", async (t) => {
  const outer = `${randomUUID()}:`
  const plain = await shared.client()
  const client = await shared.client({ keyPrefix: outer })
  const store = new RedisStore(client, { keyPrefix: 'inner:' })
  const second = new RedisStore(await shared.client({ keyPrefix: outer }), { keyPrefix: 'inner:' })
  t.teardown(() => Promise.all([store.close(), second.close()]))
  const key = newKey()
  const token = await take(store, key)
  t.strictSame(await plain.keys(`*${key}`), [`${outer}inner:${key}`])
  const heard = second.changed(key, new AbortController().signal)
  await sleep(20)
  t.equal(await store.complete(key, token, reply(), LONG), true)
  await soon(heard)
  same(t, await second.acquire(key, claim()), reply())
})

t.test("stores with different prefixes do not know of each other's keys", async (t) => {
  const { store } = await open(t)
  const { store: another } = await open(t)
  const key = newKey()
  const token = await take(store, key)
  t.strictSame(await another.acquire(key, claim()), { state: 'acquired', attempt: 1 })
  t.equal(await another.complete(key, token, reply(), LONG), false)
})

t.test('an empty keyPrefix puts nothing before the key, and the default is idempotency:', async (t) => {
  const client = await shared.client()
  const key = newKey()
  await take(new RedisStore(client, { keyPrefix: '' }), key)
  await take(new RedisStore(client), key)
  t.strictSame((await client.keys(`*${key}`)).sort(), [key, `idempotency:${key}`].sort())
})

t.test('there is one key per operation, always with the prefix, and none without a ttl', async (t) => {
  const own = await ownServer(t)
  const client = await own.client()
  const store = new RedisStore(client, { keyPrefix: 'mine:' })
  t.teardown(() => store.close())
  const keys = { running: '1', renewed: '2', abandoned: '3', overtaken: '4', released: '5', completed: '6', ever: '7' }
  await take(store, keys.running)
  await store.renew(keys.renewed, await take(store, keys.renewed), LONG)
  await lapsed(store, keys.abandoned)
  await lapsed(store, keys.overtaken)
  await store.acquire(keys.overtaken, claim({ takeover: true }))
  await store.release(keys.released, await take(store, keys.released))
  await store.complete(keys.completed, await take(store, keys.completed), reply(), LONG)
  await store.complete(keys.ever, await take(store, keys.ever), reply(), null)
  const stop = new AbortController()
  const listened = store.changed(keys.running, stop.signal)
  await marked(client, `mine:${keys.running}`)
  stop.abort()
  await listened
  t.strictSame(
    (await client.keys('*')).sort(),
    Object.values(keys).map((key) => `mine:${key}`)
  )
  for (const [name, key] of Object.entries(keys)) {
    const ttl = await client.pttl(`mine:${key}`)
    t.ok(name === 'ever' ? ttl === -1 : ttl > 0, `${name}: ${ttl} ms`)
  }
})

/** What is stored of a claim, with nothing in it that differs from one to the other. */
async function stored(client: Redis, name: string, ...tokens: string[]): Promise<string> {
  let value = ((await client.getBuffer(name)) as Buffer).toString('latin1')
  for (const [n, token] of tokens.entries()) value = value.replace(`$${token}`, `(${n})`)
  return value
}

withEach('a claim is stored as it always was until it has a step', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  const name = keyPrefix + key
  const [mine, heir] = [claim({ leaseMs: 1 }), claim({ fingerprint: 'of the heir', takeover: true })]
  await store.acquire(key, mine)
  t.equal(await stored(client, name, mine.token), 'P1(0)01:60000::fingerprint')
  await until(async () => (await store.get(key))?.state === 'abandoned')
  await store.acquire(key, heir)
  t.equal(await stored(client, name, heir.token), 'P1(0)02:60000:A11:fingerprintof the heir')
  await store.acquire(key, { ...heir, fingerprint: 'again' })
  t.equal(await stored(client, name, heir.token), 'P1(0)02:60000:A11:fingerprintagain')
  await store.release(key, heir.token)
  t.equal(await stored(client, name, heir.token), 'E1(0)02:60000::again')
})

withEach('steps stand behind the fingerprint, whose length is told from the first one on', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  const name = keyPrefix + key
  const [mine, heir] = [claim(), claim({ fingerprint: 'of the heir', takeover: true })]
  await store.acquire(key, mine)
  await client.pexpire(name, 100_000)
  const first = '\0\0\0\x06\0\0\0\x02charge{}'
  const second = '\0\0\0\x02\0\0\0\0\xc3\xa9'
  await store.step(key, mine.token, ['charge', '{}'])
  t.equal(await stored(client, name, mine.token), `P1(0)01:60000:,11:fingerprint${first}`)
  await store.step(key, mine.token, ['é', ''])
  await store.step(key, mine.token, ['charge', 'another'])
  t.equal(await stored(client, name, mine.token), `P1(0)01:60000:,11:fingerprint${first}${second}`)
  const left = await client.pttl(name)
  t.ok(left > 60_000 && left <= 100_000, `it expires as before, in ${left} ms`)
  const stop = new AbortController()
  const listened = store.changed(key, stop.signal)
  await marked(client, name)
  t.equal(await stored(client, name, mine.token), `P1(0)11:60000:,11:fingerprint${first}${second}`, 'somebody waits')
  stop.abort()
  await listened
  await store.acquire(key, { ...mine, fingerprint: 'again' })
  t.equal(await stored(client, name, mine.token), `P1(0)11:60000:,5:again${first}${second}`)
  await store.release(key, mine.token)
  t.equal(await stored(client, name, mine.token), `E1(0)01:60000:,5:again${first}${second}`)
  await store.acquire(key, heir)
  t.equal(await stored(client, name, heir.token), `P1(0)02:60000:E5,11:againof the heir${first}${second}`)
  await store.step(key, heir.token, ['3', '4'])
  const all = `${first}${second}\0\0\0\x01\0\0\0\x0134`
  t.equal(await stored(client, name, heir.token), `P1(0)02:60000:E5,11:againof the heir${all}`)
  await store.release(key, heir.token, true)
  t.equal(await stored(client, name, heir.token), `E1(0)01:60000:,5:again${all}`)
  t.strictSame(await client.keys(`${keyPrefix}*`), [name], 'all in one key')
})

withEach('steps that are not whole are an error, whoever asks, and are left as they are', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  const mine = claim({ leaseMs: 2 * LONG })
  await store.acquire(key, mine)
  await store.step(key, mine.token, ['charge', 'paid'])
  const whole = (await client.getBuffer(keyPrefix + key)) as Buffer
  const start = whole.length - 'charge'.length - 'paid'.length - 8
  for (let length = start; length < whole.length; length++) {
    const cut = Buffer.from(whole.subarray(0, length))
    // The owner asks as well, while its lease runs, and whoever takes over when it has lapsed.
    for (const left of [2 * LONG, LONG]) {
      await client.set(keyPrefix + key, cut, 'PX', left)
      const error = { isFree: false, message: /could not be decoded/ }
      await t.rejects(store.acquire(key, claim({ takeover: true })), error)
      await t.rejects(store.acquire(key, mine), error)
      await t.rejects(store.get(key), error)
      await t.rejects(store.step(key, mine.token, ['charge', 'again']), Error)
      t.strictSame(await client.getBuffer(keyPrefix + key), cut, `${length} bytes are left as they are`)
    }
    t.equal(await store.complete(key, mine.token, reply(), LONG), true, 'the owner can complete it')
  }
})

withEach('settling what has ended leaves all but the kind and the token as it is', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  const name = keyPrefix + key
  const mine = claim({ fingerprint: 'first' })
  await store.acquire(key, mine)
  await store.step(key, mine.token, ['charge', '{}'])
  await client.pexpire(name, LONG)
  const heir = claim({ fingerprint: 'heir', takeover: true, retainMs: 90_000 })
  await store.acquire(key, heir)
  await client.pexpire(name, 50_000)
  const settled = async () =>
    ((await client.getBuffer(name)) as Buffer).toString('latin1').replace(/^(..).{17}/s, '$1(nobody)')
  const steps = '\0\0\0\x06\0\0\0\x02charge{}'
  for (let n = 0; n < 2; n++) {
    t.equal(await store.settle(key, 'heir', 'ended'), true)
    t.equal(await settled(), `E1(nobody)02:90000:,4:heir${steps}`)
    const left = await client.pttl(name)
    t.ok(left > 80_000 && left <= 90_000, `it is kept from now on, for ${left} ms`)
    t.equal(await store.release(key, heir.token), false)
    await client.pexpire(name, 10_000)
  }
})

withEach(
  'a tombstone is told by its fingerprint to the letter, and a reply is never taken for one',
  async (t, open) => {
    const { store } = await open()
    const texts = ['', '"', '\\', '\\"', 'a","b', '%d+.', ']', 'é\0\n', '",1,"x"]', '\ud800', '\ufffd', 'x'.repeat(300)]
    for (const fingerprint of texts) {
      const [lost, done] = [newKey(), newKey()]
      const record = reply({ fingerprint, headers: [], body: Buffer.from(',"settled"]') })
      await finish(store, lost, { ...tombstone('settled'), fingerprint })
      await finish(store, done, record)
      const settlement = { record: { ...tombstone('hijacked'), fingerprint }, ttlMs: LONG }
      for (const another of [...texts, `${fingerprint}x`].filter((text) => text !== fingerprint)) {
        t.equal(await store.settle(lost, another, settlement), false)
        t.equal(await store.settle(done, another, settlement), false)
      }
      t.equal(await store.settle(done, fingerprint, settlement), false)
      same(t, await store.get(done), record)
      t.equal(await store.settle(lost, fingerprint, settlement), true, JSON.stringify(fingerprint))
      same(t, await store.get(lost), settlement.record)
    }
  }
)

t.test('a client that repeats what it has lost the answer to has settled a key all the same', async (t) => {
  const { store, client } = await open(t)
  await warm(store)
  const methods = client as unknown as Record<'evalshaBuffer', (...args: unknown[]) => Promise<unknown>>
  const evalsha = methods.evalshaBuffer.bind(client)
  for (const settlement of ['ended', { record: reply(), ttlMs: LONG }] as const) {
    const key = newKey()
    await lapsed(store, key)
    methods.evalshaBuffer = async (...args) => {
      await evalsha(...args)
      return evalsha(...args)
    }
    t.equal(await store.settle(key, 'fingerprint', settlement), true)
    methods.evalshaBuffer = evalsha
  }
})

t.test('nothing of a request is in the name of its key', async (t) => {
  const own = await ownServer(t)
  const client = await own.client()
  const app = await build(t, { store: new RedisStore(client), scope: () => 'user@example.org' })
  app.post('/secret-path', { config: { idempotency: true } }, async () => 'done')
  for (const key of ['my-secret-key', '8e03978e-40d5-43e8-bc93-6894a57f9324', 'ключ']) {
    const headers = { 'idempotency-key': Buffer.from(key).toString('latin1') }
    const { statusCode } = await app.inject({ method: 'POST', url: '/secret-path', headers, payload: { a: 1 } })
    t.equal(statusCode, 200)
  }
  const names = await client.keys('*')
  t.equal(names.length, 3)
  for (const name of names) t.match(name, /^idempotency:[A-Za-z0-9_-]{43}$/)
})

withEach(
  'what is under a key and cannot be decoded is an error, whatever is asked, and others go on',
  async (t, open) => {
    const { store, client, keyPrefix } = await open()
    const key = newKey()
    const token = await take(store, key)
    const running = (await client.getBuffer(keyPrefix + key)) as Buffer
    const [done, buried] = [newKey(), newKey()]
    await finish(store, done)
    await store.complete(buried, await take(store, buried), tombstone('hijacked'), LONG)
    const completed = (await client.getBuffer(keyPrefix + done)) as Buffer
    const bodyLength = reply().body.length
    const grave = (await client.getBuffer(keyPrefix + buried)) as Buffer
    const cut = (value: Buffer, tail = 0) => Array.from({ length: value.length - tail }, (_, n) => value.subarray(0, n))
    const garbage = [
      ...cut(completed, bodyLength),
      ...cut(grave),
      ...cut(running, 'fingerprint'.length),
      longerHead(grave, 3 + 36),
      longerHead(completed, 3 + 36, bodyLength + 1),
      Buffer.from('garbage'),
      Buffer.from('{"status":"done"}'),
      Buffer.from([0, 0, 0, 0]),
      Buffer.alloc(100, 'P'),
      Buffer.alloc(100, 'C'),
      Buffer.concat([Buffer.from('P2'), running.subarray(2)]),
      Buffer.concat([Buffer.from('C2'), completed.subarray(2)]),
      Buffer.concat([completed.subarray(0, 3 + 36), Buffer.from([0, 0, 0, 2]), Buffer.from('{}')]),
      Buffer.concat([completed.subarray(0, 3 + 36), Buffer.from([0, 0, 0, 2]), Buffer.from('[]')])
    ].map((value) => Buffer.from(value))
    for (const value of garbage) {
      await client.set(keyPrefix + key, value, 'PX', LONG)
      const shown = JSON.stringify(value.subarray(0, 60).toString('latin1'))
      await t.rejects(store.acquire(key, claim({ takeover: true })), Error, `acquire of ${shown}`)
      await t.rejects(store.get(key), Error, `get of ${shown}`)
      for (const step of [
        () => store.renew(key, randomUUID(), LONG),
        () => store.complete(key, randomUUID(), reply(), LONG),
        () => store.release(key, randomUUID()),
        () => store.settle(key, 'fingerprint', 'ended'),
        () => store.settle(key, 'fingerprint', { record: reply(), ttlMs: LONG })
      ]) {
        t.not(await step().catch(() => 'an error'), true, `nobody owns ${shown}`)
      }
      const stop = AbortSignal.timeout(20)
      await soon(store.changed(key, stop).catch(() => {}))
      t.strictSame(await client.getBuffer(keyPrefix + key), value, 'it is left as it is')
    }
    t.equal(await store.delete(key), true, 'and can be deleted')
    t.strictSame(await store.acquire(key, claim({ token })), { state: 'acquired', attempt: 1 })
  }
)

withEach('a value of another type under the key is an error, whatever is asked', async (t, open) => {
  const { store, client, keyPrefix } = await open()
  const key = newKey()
  await client.lpush(keyPrefix + key, 'a', 'list')
  const wrong = { message: /WRONGTYPE/ }
  await t.rejects(store.acquire(key, claim()), wrong)
  await t.rejects(store.get(key), wrong)
  await t.rejects(store.renew(key, 'token', LONG), wrong)
  await t.rejects(store.complete(key, 'token', reply(), LONG), wrong)
  t.equal(await store.release(key, 'token'), false, "it is nobody's claim, so there is nothing to give back")
  t.equal(await store.settle(key, 'fingerprint', 'ended'), false)
  t.equal(await store.settle(key, 'fingerprint', { record: reply(), ttlMs: LONG }), false)
  await t.rejects(store.changed(key, new AbortController().signal), wrong)
  t.strictSame(await client.lrange(keyPrefix + key, 0, -1), ['list', 'a'], 'it is left as it is')
})

t.test('a request whose record cannot be decoded gets 503, and the server goes on', async (t) => {
  const { store, client, keyPrefix } = await open(t)
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const send = (key: string) => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': key } })
  t.equal((await send('a')).payload, 'done')
  const [name] = await client.keys(`${keyPrefix}*`)
  await client.set(name as string, 'garbage')
  const refused = await send('a')
  t.equal(refused.statusCode, 503)
  t.equal(refused.json().code, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  t.equal((await send('b')).payload, 'done')
})

t.test('options that a RedisStore does not have, and a keyPrefix that is not text, are refused', async (t) => {
  const client = await shared.client()
  const code = 'FST_IDEMPOTENCY_INVALID_OPTION'
  t.throws(() => new RedisStore(client, { prefix: 'a' } as never), { code, message: /prefix/ })
  for (const keyPrefix of [1, null, true]) {
    t.throws(() => new RedisStore(client, { keyPrefix } as never), { code, message: /keyPrefix.*string/ })
  }
})

t.test('a token that is too long for the store is refused, and nothing is stored', async (t) => {
  const { store, client, keyPrefix } = await open(t)
  for (const token of ['', 'x'.repeat(256), 'é'.repeat(128)]) {
    await t.rejects(store.acquire(newKey(), claim({ token })), RangeError)
  }
  t.strictSame(await client.keys(`${keyPrefix}*`), [])
})

for (const headers of [{}, { location: '/charges/1' }, { location: '/charges/1', etag: '"1"', vary: 'accept' }]) {
  const count = Object.keys(headers).length + 1
  t.test(`a reply of 500 bytes and ${count} headers takes no more than 170 bytes beyond those`, async (t) => {
    const { store, client, keyPrefix } = await open(t)
    const app = await build(t, { store })
    app.post('/', { config: { idempotency: true } }, async (_, reply) =>
      reply
        .code(201)
        .headers(headers)
        .send({ text: 'x'.repeat(489) })
    )
    const request = { 'idempotency-key': 'a', authorization: 'Bearer token' }
    const { body } = await app.inject({ method: 'POST', url: '/', headers: request, payload: { amount: 1 } })
    t.equal(body.length, 500)
    const [name] = await client.keys(`${keyPrefix}*`)
    const found = await store.get(String(name).slice(keyPrefix.length))
    if (found?.state !== 'completed' || found.record.kind !== 'reply') return t.fail('a reply is stored')
    t.equal(found.record.headers.length, count)
    const taken = found.record.headers.reduce((sum, [name, value]) => sum + name.length + value.length, body.length)
    const overhead = (await client.strlen(name as string)) - taken
    t.ok(overhead > 0 && overhead <= 170, `${overhead} bytes`)
  })
}

/** A record that says that its head is longer than it is. */
function longerHead(record: Buffer, at: number, by = 1): Buffer {
  const changed = Buffer.from(record)
  writeLength(changed, readLength(record, at) + by, at)
  return changed
}

function ends(store: RedisStore) {
  return [
    (key: string, token: string) => store.complete(key, token, reply(), LONG),
    (key: string, token: string) => store.release(key, token)
  ]
}

/** Resolves when the claim is marked as one that somebody waits for: the subscription stands by then. */
async function marked(client: Redis, name: string): Promise<void> {
  const tokenLength = (await client.getBuffer(name))?.[2] as number
  const isMarked = async () => (await client.getBuffer(name))?.[3 + tokenLength] === '1'.charCodeAt(0)
  await until(isMarked, { message: 'the mark' })
}
