import { once } from 'node:events'
import { createRequire } from 'node:module'
import { Redis } from 'ioredis'
import { Pool } from 'pg'

// That of the plugin: a peer has brought an older one here.
const { createClient } = createRequire(new URL('../../package.json', import.meta.url))('redis')

/**
 * The client of all subjects that take one of ioredis: with auto pipelining, unless it is that which is compared, because
 * without it most of them cost a third more, and a comparison would be one of client settings.
 */
export async function redisClient({ path, db }, enableAutoPipelining = true) {
  const client = new Redis({ path, db, enableAutoPipelining })
  client.on('error', () => {})
  await once(client, 'ready')
  return client
}

/** As it comes: it writes together what is sent in one turn of the event loop. */
export async function nodeRedisClient({ path, db }) {
  const client = createClient({ socket: { path }, database: db })
  client.on('error', () => {})
  return client.connect()
}

export function postgresPool({ host, user, database }) {
  const pool = new Pool({ host, user, database, max: 10, idleTimeoutMillis: 0 })
  pool.on('error', () => {})
  return pool
}
