import fp from 'fastify-plugin'
import { plugin } from './lib/plugin.js'
import { MemoryStore } from './lib/stores/memory.js'
import { RedisStore } from './lib/stores/redis.js'

export type { MemoryStoreOptions } from './lib/stores/memory.js'
export type { RedisClient, RedisStoreOptions } from './lib/stores/redis.js'
export type * from './types/index.js'

const wrapped = fp(plugin, { name: 'fastify-idempotency', fastify: '^5.11.0' })

/** The plugin. Everything else hangs on it too, for those who `require()` it. */
const idempotency = Object.assign(wrapped, { default: wrapped, idempotency: wrapped, MemoryStore, RedisStore })

export { idempotency, idempotency as default, idempotency as 'module.exports', MemoryStore, RedisStore }
