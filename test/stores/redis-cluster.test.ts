import { randomUUID } from 'node:crypto'
import t from 'tap'
import { type RedisClient, RedisStore } from '../../index.js'
import type { ListedKind } from '../../types/index.js'
import { endures } from '../support/bad-network.js'
import { until } from '../support/latch.js'
import { slotOf, startCluster } from '../support/redis-cluster.js'
import { claim, conforms, lapsed, newKey, reply, same, soon, take } from '../support/store-fixtures.js'

/** Where the length of a record's head is: after the kind, the version, and a token of 36 bytes. */
const AFTER_TOKEN = 3 + 36

const cluster = await startCluster()
t.teardown(() => cluster.close())
const admins = await Promise.all(cluster.nodes.map((node) => node.client()))
const [ioredis, other] = [await cluster.client(), await cluster.client()]
const nodeRedis = await cluster.nodeRedis()
const CLIENTS: [name: string, clients: readonly [RedisClient, RedisClient]][] = [
  ['a Cluster', [ioredis, other]],
  ['a Cluster with node-redis', [nodeRedis, await cluster.nodeRedis({ RESP: 2, minimizeConnections: true })]],
  ['a Cluster with ioredis here and node-redis there', [ioredis, nodeRedis]]
]

/** Two stores on keys of their own. */
async function stores(clients: readonly [RedisClient, RedisClient]) {
  const prefix = `${randomUUID()}:`
  const [store, second] = clients.map((client) => new RedisStore(client, { keyPrefix: prefix })) as [
    RedisStore,
    RedisStore
  ]
  const dispose = async () => {
    await Promise.all([store.close(), second.close()])
  }
  const interrupt = async () => {
    // Not those that listen: ioredis replaces them, and tells nobody what was missed meanwhile.
    for (const admin of admins) await admin.call('CLIENT', 'KILL', 'TYPE', 'normal')
  }
  const spoil = (key: string) => ioredis.setrange(prefix + key, AFTER_TOKEN, '\x7f')
  return { store, second, dispose, interrupt, spoil, prefix }
}

for (const [name, clients] of CLIENTS) {
  conforms(t, `a RedisStore on ${name} keeps every promise of a store`, () => stores(clients))

  endures(t, `a RedisStore on ${name} behind a bad network`, () => stores(clients))

  t.test(
    `on ${name} every step of an operation works in each range of slots, before and after its scripts were flushed`,
    async (t) => {
      const { store, second, dispose, prefix } = await stores(clients)
      t.teardown(dispose)
      for (const flushed of [false, true]) {
        const keys = Array.from({ length: 60 }, newKey)
        if (flushed) {
          for (const node of cluster.nodes) await (await node.client()).script('FLUSH')
        }
        await Promise.all(
          keys.map(async (key, n) => {
            const token = await take(store, key, { fingerprint: key })
            t.match(await second.acquire(key, claim()), { state: 'running', fingerprint: key })
            t.equal(await second.renew(key, token, 60_000), true)
            const heard = second.changed(key, new AbortController().signal)
            const record = reply({ fingerprint: key })
            t.equal(
              n % 2 === 0 ? await store.release(key, token) : await store.complete(key, token, record, 60_000),
              true
            )
            await soon(heard, `the end of ${key}`)
            if (n % 2 === 0) t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
            else same(t, await second.acquire(key, claim()), record)
            t.equal(await store.delete(key), true)
            await lapsed(store, key)
            t.strictSame(await second.acquire(key, claim({ takeover: true })), { state: 'acquired', attempt: 2 })
          })
        )
        for (const node of cluster.nodes) {
          const client = await node.client()
          const own = await client.keys(`${prefix}*`)
          t.ok(own.length > 0, `${own.length} keys are on the node at port ${node.port}`)
        }
      }
    }
  )

  t.test(`on ${name} those who listen hear of keys on all nodes`, async (t) => {
    const { store, second, dispose } = await stores(clients)
    t.teardown(dispose)
    const keys = Array.from({ length: 60 }, newKey)
    const tokens = await Promise.all(keys.map((key) => take(store, key)))
    const heard = keys.map((key) => second.changed(key, new AbortController().signal))
    await Promise.all(keys.map((key, n) => store.complete(key, tokens[n] as string, reply(), 60_000)))
    await soon(Promise.all(heard))
  })
}

const ALL: ListedKind[] = ['running', 'abandoned', 'reply', 'tombstone']

/** The keys on all pages, each once. */
async function listed(store: RedisStore, from: string | null = null): Promise<string[]> {
  const found = new Set<string>()
  let cursor = from
  do {
    const page: Awaited<ReturnType<typeof store.list>> = await store.list(ALL, cursor)
    for (const { key } of page.keys) found.add(key)
    cursor = page.cursor
  } while (cursor !== null)
  return [...found].sort()
}

/** Runs while a slot is on its way from one master to the other, and after it has arrived there. */
async function whileMoving(slot: number, from: number, to: number, run: (arrived: boolean) => Promise<void>) {
  const ids = await Promise.all(admins.map((admin) => admin.cluster('MYID') as Promise<string>))
  await admins[to]?.cluster('SETSLOT', slot, 'IMPORTING', ids[from] as string)
  await admins[from]?.cluster('SETSLOT', slot, 'MIGRATING', ids[to] as string)
  await run(false)
  for (const admin of admins) await admin.cluster('SETSLOT', slot, 'NODE', ids[to] as string)
  await run(true)
}

// A pipeline of ioredis does not follow ASK each time: such a claim is refused (503) until the slot has moved.
for (const [name, clients] of CLIENTS.slice(1)) {
  t.test(`on ${name} keys of a slot that moves are followed (ASK, MOVED)`, async (t) => {
    const { store, second, dispose, prefix } = await stores(clients)
    t.teardown(dispose)
    // A slot in which other tests have left something cannot be given away.
    const isEmpty = async (slot: number) => {
      const counts = await Promise.all(admins.map((admin) => admin.cluster('COUNTKEYSINSLOT', slot)))
      return counts.every((count) => count === 0)
    }
    let key = newKey()
    while (!(await isEmpty(slotOf(prefix + key)))) key = newKey()
    const slot = slotOf(prefix + key)
    const ranges = (await ioredis.cluster('SLOTS')) as unknown as [number, number, [string, number]][]
    const port = ranges.find(([first, last]) => first <= slot && slot <= last)?.[2][1]
    const source = cluster.nodes.findIndex((node) => node.port === port)
    let token = ''
    let cursor: string | null = null
    await whileMoving(slot, source, (source + 1) % 3, async (arrived) => {
      if (!arrived) {
        token = await take(store, key)
        t.match(await second.acquire(key, claim()), { state: 'running' })
        t.match(await store.get(key), { state: 'running' })
        t.equal(await second.renew(key, token, 60_000), true)
        for (const each of [store, second]) t.strictSame(await listed(each), [key])
        cursor = (await store.list(ALL, null)).cursor
      } else {
        const moved = { message: /masters of the Redis Cluster, or their slots.*list from the beginning/ }
        await t.rejects(store.list(ALL, cursor), moved)
        for (const each of [store, second]) t.strictSame(await listed(each), [key])
        t.equal(await store.complete(key, token, reply(), 60_000), true)
        same(t, await second.acquire(key, claim()), reply())
      }
    })
  })
}

for (const [name, clients] of CLIENTS) {
  t.test(`on ${name} keys of all masters are listed, also right after the connections to them were lost`, async (t) => {
    const { store, second, dispose, interrupt, prefix } = await stores(clients)
    t.teardown(dispose)
    const keys = Array.from({ length: 60 }, newKey).sort()
    await Promise.all(keys.map((key) => take(store, key)))
    for (const admin of admins) {
      const own = (await admin.keys(`${prefix}*`)).length
      t.ok(own > 0 && own < keys.length, `${own} of them on one master`)
    }
    for (const each of [store, second]) {
      t.strictSame(await listed(each), keys)
      for (let n = 0; n < 5; n++) {
        await interrupt()
        t.strictSame(await until(() => listed(each).catch(() => null)), keys)
      }
    }
  })

  t.test(`on ${name} a prefix with braces has all keys on one master, and no other is walked`, async (t) => {
    const prefix = `{${randomUUID()}}:`
    const [store] = clients.map((client) => new RedisStore(client, { keyPrefix: prefix })) as [RedisStore, RedisStore]
    t.teardown(() => store.close())
    const keys = Array.from({ length: 20 }, newKey).sort()
    await Promise.all(keys.map((key) => take(store, key)))
    t.strictSame(await listed(store), keys)
    const walked = await Promise.all(
      cluster.nodes.map(async (node) => {
        const { scripted } = await node.commands(() => listed(store))
        return scripted.some(([name]) => name?.toLowerCase() === 'scan')
      })
    )
    t.equal(walked.filter(Boolean).length, 1)
  })
}

t.test("in a Cluster a client's own prefix is looked for, and is no part of the keys that are listed", async (t) => {
  const keyPrefix = `${randomUUID()} [*]:`
  for (const client of [
    await cluster.client({ keyPrefix }),
    await cluster.client({ redisOptions: { keyPrefix } }),
    await cluster.nodeRedis({ keyPrefix })
  ]) {
    const store = new RedisStore(client)
    t.teardown(() => store.close())
    const keys = Array.from({ length: 20 }, newKey).sort()
    await Promise.all(keys.map((key) => take(store, key)))
    t.strictSame(await listed(store), keys)
    for (const key of keys) t.equal(await store.delete(key), true)
  }
})
