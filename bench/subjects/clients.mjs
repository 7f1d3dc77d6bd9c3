import { once } from 'node:events'
import { Redis } from 'ioredis'
import { Pool } from 'pg'

/**
 * The client of all subjects that take one of ioredis: with auto pipelining, because without it each of them costs
 * more than a third more, and a comparison would be one of client settings.
 */
export async function redisClient({ path, db }, options = {}) {
  const client = new Redis({ path, db, enableAutoPipelining: true, ...options })
  client.on('error', () => {})
  await once(client, 'ready')
  return client
}

export function postgresPool({ host, user, database }) {
  const pool = new Pool({ host, user, database, max: 10, idleTimeoutMillis: 0 })
  pool.on('error', () => {})
  return pool
}
