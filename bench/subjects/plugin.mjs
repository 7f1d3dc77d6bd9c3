import { randomUUID } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import Fastify from 'fastify'
import { createPool } from 'mysql2/promise'
import * as idempotency from '../../.build/index.js'
import { openSqlite } from '../../.build/test/support/sqlite.js'
import { nodeRedisClient, postgresPool, redisClient } from './clients.mjs'
import { COVERED, UNCOVERED, WAITING } from './route.mjs'
import { served } from './served.mjs'

const { idempotency: plugin, MemoryStore, RedisStore, PostgresStore, SqliteStore, MysqlStore, LocalCache } = idempotency

export const hasLocalCache = LocalCache !== undefined

/** This plugin as it comes: all options at their defaults, but the store. */
async function build(route, store, close) {
  const app = Fastify()
  await app.register(plugin, { store })
  app.post(COVERED, { config: { idempotency: true } }, route.handle)
  app.post(WAITING, { config: { idempotency: { onConflict: 'wait' } } }, route.handle)
  app.post(UNCOVERED, route.handle)
  await app.ready()
  return { ...served(app, close), store }
}

/** With room for all that a run stores, so that none of it measures eviction. */
export async function inMemory({ route }) {
  return build(route, new MemoryStore({ maxEntries: 4_000_000, maxBytes: 4 * 2 ** 30 }))
}

export async function onRedis({ route, redis }) {
  const client = await redisClient(redis)
  return build(route, new RedisStore(client), async () => client.disconnect())
}

export async function onRedisUnpipelined({ route, redis }) {
  const client = await redisClient(redis, false)
  return build(route, new RedisStore(client), async () => client.disconnect())
}

export async function onNodeRedis({ route, redis }) {
  const client = await nodeRedisClient(redis)
  return build(route, new RedisStore(client), async () => client.destroy())
}

export async function onRedisWithCache({ route, redis }) {
  const client = await redisClient(redis)
  const store = new LocalCache(new RedisStore(client), { maxEntries: 10_000, maxBytes: 2 ** 28 })
  return build(route, store, async () => client.disconnect())
}

export async function onPostgres({ route, postgres }) {
  const pool = postgresPool(postgres)
  const store = new PostgresStore({ pool })
  await store.createTable()
  return build(route, store, () => pool.end())
}

/** `better-sqlite3`, or `node:sqlite` if that is what is asked for. What is answered is on the disk. */
export async function onSqlite({ route }) {
  const folder = await mkdtemp(join(tmpdir(), 'bench-'))
  const database = openSqlite(join(folder, 'keys'))
  return build(route, new SqliteStore({ database }), async () => {
    database.close()
    await rm(folder, { recursive: true })
  })
}

export async function onMysql({ route, mysql }) {
  const pool = createPool({ ...mysql, connectionLimit: 10 })
  const store = new MysqlStore({ pool, table: `keys_${randomUUID().replaceAll('-', '')}` })
  await store.createTable()
  return build(route, store, () => pool.end())
}
