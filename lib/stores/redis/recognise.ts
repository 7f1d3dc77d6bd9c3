import { InvalidOption } from '../../errors.js'
import type { IoredisClient, NodeRedisClient, RedisClient } from './client.js'
import type { RedisConnection } from './connection.js'
import { IoredisConnection } from './ioredis.js'
import { NodeRedisConnection } from './node-redis.js'
import * as routes from './node-redis-routes.js'

/* Which library a client is from is told by what it can do: none of them is a dependency. */

/** @throws FST_IDEMPOTENCY_INVALID_OPTION */
export function connectionOf(client: RedisClient): RedisConnection {
  if (can(client, 'pipeline', 'setBuffer', 'evalshaBuffer', 'evalBuffer', 'duplicate')) {
    return new IoredisConnection(client as IoredisClient)
  }
  const route = routeOf(client)
  if (route !== null) return new NodeRedisConnection(client as NodeRedisClient, route)
  throw new InvalidOption(
    'RedisStore takes a client of ioredis, iovalkey or node-redis ("redis" 5 and newer), such as app.redis of ' +
      `@fastify/redis: new RedisStore(new Redis(url)), with Redis of "ioredis"; got ${whatItIs(client)}`
  )
}

/** Scripts and modules of the caller's are methods as well, of any name. */
function routeOf(client: unknown): routes.Route | null {
  if (!can(client, 'sendCommand', 'withTypeMapping', 'connect')) return null
  const { masters, totalClients } = client as { masters?: unknown; totalClients?: unknown }
  if (Array.isArray(masters) && can(client, 'nodeClient')) return routes.cluster(client as routes.Cluster)
  if (can(client, 'getSentinelNode', '_execute')) return routes.sentinel(client as routes.Sentinel)
  if (typeof totalClients === 'number' && can(client, 'execute')) return routes.pool(client as routes.Pool)
  return can(client, 'duplicate', 'subscribe', 'destroy') ? routes.single(client as routes.Single) : null
}

/** Not what is in it, which may be a password. */
function whatItIs(client: unknown): string {
  if (can(client, 'customCommand', 'invokeScript')) return 'one that looks like a client of valkey-glide'
  if (can(client, 'pipeline', 'evalsha', 'createScript')) {
    return 'one that looks like the HTTP client of Upstash: connect by its rediss:// address instead'
  }
  if (can(client, 'sendCommand')) return 'one that looks like node-redis 4, or like its legacy() interface'
  return `a value of type ${typeof client}`
}

function can(client: unknown, ...methods: string[]): boolean {
  const given = client as Partial<Record<string, unknown>> | undefined | null
  return methods.every((method) => typeof given?.[method] === 'function')
}
