import { randomUUID } from 'node:crypto'
import { createClientPool } from 'redis'
import t, { type Test } from 'tap'
import { type RedisClient, RedisStore } from '../../index.js'
import type { ListedKey, ListedKind } from '../../types/index.js'
import { until } from '../support/latch.js'
import { type RedisServer, type StartOptions, startRedis } from '../support/redis.js'
import { finish, lapsed, newKey, reply, take } from '../support/store-fixtures.js'

/* What a RedisStore lists on one server. What all stores promise of a list is in the conformance kit. */

const ALL: ListedKind[] = ['running', 'abandoned', 'reply', 'tombstone']

async function start(t: Test, options?: StartOptions): Promise<RedisServer> {
  const server = await startRedis(options)
  t.teardown(() => server.close())
  return server
}

const shared = await start(t)
const admin = await shared.client()

const KINDS = {
  ioredis: (_: Test, server: RedisServer) => server.client(),
  'node-redis': (_: Test, server: RedisServer) => server.nodeRedis(),
  'a pool of node-redis': async (t: Test, server: RedisServer) => {
    const pool = createClientPool({ socket: { path: server.path, reconnectStrategy: 20 } }, { maximum: 3 })
    pool.on('error', () => {})
    await pool.connect()
    t.teardown(() => pool.destroy())
    return pool
  }
}

type Open = (server?: RedisServer) => Promise<RedisClient>

function withEach(name: string, run: (t: Test, open: Open) => Promise<void>): void {
  for (const [kind, open] of Object.entries(KINDS)) {
    t.test(`${name} (${kind})`, (t) => run(t, async (server = shared) => open(t, server)))
  }
}

/** What all pages say. */
async function list(store: RedisStore, kinds = ALL): Promise<ListedKey[]> {
  const found: ListedKey[] = []
  let cursor: string | null = null
  do {
    const page: Awaited<ReturnType<typeof store.list>> = await store.list(kinds, cursor)
    found.push(...page.keys)
    cursor = page.cursor
  } while (cursor !== null)
  return found
}

/** Each once: SCAN may tell of a key twice. */
const keysOf = (found: readonly ListedKey[]) => [...new Set(found.map(({ key }) => key))].sort()
const names = (commands: string[][]) => commands.map(([name]) => String(name).toLowerCase())

withEach('a page is a SCAN and one look at its keys, which reads no bodies and changes nothing', async (t, open) => {
  const server = await start(t)
  const store = new RedisStore(await open(server))
  const keys = Array.from({ length: 50 }, newKey)
  for (const key of keys) await finish(store, key, reply({ body: Buffer.alloc(100_000, 'x') }))
  await list(store)
  const { result, sent, scripted } = await server.commands(() => list(store))
  t.strictSame(keysOf(result), [...keys].sort())
  t.strictSame(names(sent), ['scan', 'info', 'evalsha'])
  t.strictSame([...new Set(names(scripted))].sort(), ['getrange', 'pttl'])
  const lengths = scripted.filter(([name]) => name?.toLowerCase() === 'getrange').map(([, , , last]) => Number(last))
  t.ok(Math.max(...lengths) < 2_048, `${Math.max(...lengths) + 1} bytes of each`)
})

withEach('all keys of the store are listed, be there many others or more than fit on a page', async (t, open) => {
  const server = await start(t)
  const store = new RedisStore(await open(server), { keyPrefix: 'mine:' })
  const client = await server.client()
  const keys = Array.from({ length: 1_200 }, newKey)
  await Promise.all(keys.map((key) => take(store, key)))
  const others = client.pipeline()
  for (let n = 0; n < 3_000; n++) others.set(`other:${n}`, 'P')
  await others.exec()
  let pages = 0
  let cursor: string | null = null
  const found = new Set<string>()
  do {
    const page: Awaited<ReturnType<typeof store.list>> = await store.list(ALL, cursor)
    t.ok(page.keys.length < 1_000, `${page.keys.length} keys on a page`)
    for (const { key } of page.keys) found.add(key)
    cursor = page.cursor
    pages++
  } while (cursor !== null)
  t.strictSame([...found].sort(), keys.sort())
  t.ok(pages >= 4, `${pages} pages`)
})

t.test('a prefix with glob characters is that prefix, and no pattern', async (t) => {
  for (const [keyPrefix, other] of [
    ['a*b:', 'axxb:'],
    ['a?b:', 'axb:'],
    ['[ab]:', 'a:'],
    ['[^a]:', 'b:'],
    ['a\\*:', 'a*:'],
    ['a\\', 'a*'],
    ['*', 'x'],
    ['{a}[', '{a}b']
  ] as const) {
    const [mine, theirs] = [keyPrefix, other].map((keyPrefix) => new RedisStore(admin, { keyPrefix })) as [
      RedisStore,
      RedisStore
    ]
    const key = newKey()
    await take(mine, key)
    await take(theirs, newKey())
    t.strictSame(keysOf(await list(mine)), [key], keyPrefix)
    await admin.flushdb()
  }
})

t.test("a client's own prefix is looked for, and is no part of the keys that are listed", async (t) => {
  for (const outer of ['outer:', 'glob [*] é:']) {
    const clients: [string, RedisClient][] = [
      ['ioredis', await shared.client({ keyPrefix: outer })],
      ['node-redis', await shared.nodeRedis({ keyPrefix: outer })],
      ['node-redis, as bytes', await shared.nodeRedis({ keyPrefix: Buffer.from(outer) })]
    ]
    for (const [kind, client] of clients) {
      const store = new RedisStore(client)
      const [running, done, dead] = [newKey(), newKey(), newKey()]
      await take(store, running)
      await finish(store, done)
      await lapsed(store, dead)
      // Under the same prefix of a store, and that of no client or of another.
      await take(new RedisStore(admin), newKey())
      await take(new RedisStore(admin, { keyPrefix: 'glob x é:idempotency:' }), newKey())
      t.strictSame(keysOf(await list(store)), [running, done, dead].sort(), `${kind}, ${outer}`)
      t.equal(await store.delete(dead, true), true, 'and is found by what is listed')
      await admin.flushdb()
    }
  }
})

withEach('what others have under the prefix is left out, whatever it is', async (t, open) => {
  const keyPrefix = `${randomUUID()}:`
  const store = new RedisStore(await open(), { keyPrefix })
  const key = newKey()
  await take(store, key)
  await admin.lpush(`${keyPrefix}list`, 'P')
  await admin.hset(`${keyPrefix}hash`, 'P', 'C')
  await admin.sadd(`${keyPrefix}set`, 'P')
  await admin.zadd(`${keyPrefix}sorted`, 1, 'P')
  await admin.xadd(`${keyPrefix}stream`, '*', 'P', 'C')
  await admin.set(`${keyPrefix}empty`, '')
  for (const value of ['P', 'C', 'E1', 'A1\x05', 'Paid', 'C1\x01t', '{"a":1}', `C1${'x'.repeat(5_000)}`]) {
    await admin.set(`${keyPrefix}${newKey()}`, value)
  }
  const mine = (await admin.getBuffer(keyPrefix + key)) as Buffer
  await admin.set(Buffer.concat([Buffer.from(keyPrefix), Buffer.from([0xff, 0xfe])]), mine)
  t.strictSame(keysOf(await list(store)), [key])
})

withEach('claims with long steps, and replies with long heads, are listed like others', async (t, open) => {
  const store = new RedisStore(await open(), { keyPrefix: `${randomUUID()}:` })
  const [done, stepped] = [newKey(), newKey()]
  await finish(store, done, reply({ headers: [['x-long', 'x'.repeat(5_000)]], fingerprint: 'f'.repeat(5_000) }))
  const token = await take(store, stepped)
  await store.step(stepped, token, ['charge', JSON.stringify('x'.repeat(10_000))])
  const found = new Map((await list(store)).map((listed) => [listed.key, listed]))
  t.match(found.get(done), { state: 'completed', outcome: 201, fingerprint: 'f'.repeat(5_000) })
  t.match(found.get(stepped), { state: 'running', attempt: 1, fingerprint: 'fingerprint' })
  t.notOk('steps' in (found.get(stepped) as object))
})

t.test('a key that goes between SCAN and the look at it is left out, and the rest is there', async (t) => {
  const keyPrefix = `${randomUUID()}:`
  const client = await shared.client()
  const store = new RedisStore(client, { keyPrefix })
  const keys = Array.from({ length: 6 }, newKey) as [string, string, ...string[]]
  for (const key of keys) await take(store, key)
  await list(store)
  const methods = client as unknown as Record<'evalshaBuffer', (...args: unknown[]) => Promise<unknown>>
  const evalsha = methods.evalshaBuffer.bind(client)
  methods.evalshaBuffer = async (...args) => {
    await admin.del(keyPrefix + keys[0])
    await admin
      .multi()
      .del(keyPrefix + keys[1])
      .lpush(keyPrefix + keys[1], 'a list by now')
      .exec()
    return evalsha(...args)
  }
  t.strictSame(keysOf(await list(store)), keys.slice(2).sort())
})

withEach('a server that was started anew is told from the one that a cursor is from', async (t, open) => {
  const server = await start(t, { persist: true })
  const client = await server.client()
  const store = new RedisStore(await open(server))
  const others = client.pipeline()
  for (let n = 0; n < 2_000; n++) others.set(`other:${n}`, '')
  await others.exec()
  const { cursor } = await store.list(ALL, null)
  t.type(cursor, 'string')
  await store.list(ALL, cursor)
  await server.stop()
  await server.start()
  await until(
    () =>
      store.list(ALL, null).then(
        () => true,
        () => false
      ),
    { message: 'the client to be back' }
  )
  const gone = { message: /The Redis server that this cursor is from is gone.*list from the beginning/ }
  await t.rejects(store.list(ALL, cursor), gone)
})

withEach('a user who may not ask for INFO can list', async (t, open) => {
  const server = await start(t)
  const client = await server.client()
  const store = new RedisStore(await open(server))
  const keys = Array.from({ length: 1_200 }, newKey)
  await Promise.all(keys.map((key) => take(store, key)))
  await client.acl('SETUSER', 'default', '-info')
  t.strictSame(keysOf(await list(store)), keys.sort())
  await client.acl('SETUSER', 'default', '-scan')
  await t.rejects(list(store), { message: /NOPERM/ })
})
