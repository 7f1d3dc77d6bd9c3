import { randomUUID } from 'node:crypto'
import { createClientPool } from 'redis'
import t from 'tap'
import { type RedisClient, RedisStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { type NodeRedisOptions, startRedis } from '../support/redis.js'
import { conforms } from '../support/store-fixtures.js'

/** Where the length of a record's head is: after the kind, the version, and a token of 36 bytes. */
const AFTER_TOKEN = 3 + 36

const server = await startRedis()
t.teardown(() => server.close())
const admin = await server.client()

interface Opened {
  client: RedisClient
  end(): void
}

async function ioredis(...options: Parameters<typeof server.client>): Promise<Opened> {
  const client = await server.client(...options)
  return { client, end: () => client.disconnect() }
}

async function nodeRedis(options: NodeRedisOptions): Promise<Opened> {
  const client = await server.nodeRedis(options)
  return { client, end: () => client.destroy() }
}

/** Two stores with clients of their own, on keys of their own. */
async function stores(open: () => Promise<Opened> = ioredis, openSecond = open) {
  const keyPrefix = `${randomUUID()}:`
  const clients = [await open(), await openSecond()] as const
  const [store, second] = clients.map(({ client }) => new RedisStore(client, { keyPrefix })) as [RedisStore, RedisStore]
  const dispose = async () => {
    await Promise.all([store.close(), second.close()])
    for (const client of clients) client.end()
  }
  const interrupt = async () => {
    await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
    await admin.call('CLIENT', 'KILL', 'TYPE', 'normal')
  }
  const spoil = (key: string) => admin.setrange(keyPrefix + key, AFTER_TOKEN, '\x7f')
  return { store, second, dispose, interrupt, spoil }
}

conforms(t, 'a RedisStore keeps every promise of a store', () => stores())

endures(t, 'a RedisStore behind a bad network', () => stores())

conforms(t, 'a RedisStore keeps every promise with a client that pipelines by itself', () =>
  stores(() => ioredis({ enableAutoPipelining: true }))
)

for (const protocol of [2, 3] as const) {
  conforms(t, `a RedisStore keeps every promise with a client that speaks RESP${protocol}`, () =>
    stores(() => ioredis({ protocol }))
  )
}

for (const RESP of [2, 3] as const) {
  const open = () => nodeRedis({ RESP })
  conforms(t, `a RedisStore keeps every promise with node-redis, by RESP${RESP}`, () => stores(open))
  endures(t, `a RedisStore with node-redis behind a bad network, by RESP${RESP}`, () => stores(open))
}

conforms(t, 'a RedisStore keeps every promise with a pool of node-redis', () =>
  stores(async () => {
    const pool = createClientPool({ socket: { path: server.path, reconnectStrategy: 20 } }, { maximum: 3 })
    pool.on('error', () => {})
    await pool.connect()
    return { client: pool, end: () => pool.destroy() }
  })
)

conforms(t, 'a RedisStore keeps every promise where one process has ioredis and another node-redis', () =>
  stores(ioredis, () => nodeRedis({}))
)

endures(t, 'a RedisStore with ioredis here and node-redis there behind a bad network', () =>
  stores(() => nodeRedis({}), ioredis)
)
