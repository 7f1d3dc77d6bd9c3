import { InvalidOption } from '../../errors.js'
import type { RedisClient } from './client.js'
import type { RedisConnection } from './connection.js'
import { IoredisConnection } from './ioredis.js'

/* Which library a client is from is told by what it can do: none of them is a dependency. */

const IOREDIS = ['pipeline', 'evalshaBuffer', 'evalBuffer', 'duplicate']

/** @throws FST_IDEMPOTENCY_INVALID_OPTION */
export function connectionOf(client: RedisClient): RedisConnection {
  const given = client as unknown as Partial<Record<string, unknown>> | undefined | null
  const can = (...methods: string[]) => methods.every((method) => typeof given?.[method] === 'function')
  if (can(...IOREDIS)) return new IoredisConnection(client)
  // Not what is in it, which may be a password.
  const got = can('sendCommand') ? 'one that looks like a client of node-redis' : `a value of type ${typeof client}`
  throw new InvalidOption(
    'RedisStore takes an ioredis client, such as app.redis of @fastify/redis: new RedisStore(new Redis(url)), with ' +
      `Redis of "ioredis"; got ${got}`
  )
}
