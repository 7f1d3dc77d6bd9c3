import fp from 'fastify-plugin'
import { idempotencyEvents } from './lib/events.js'
import { payloadFingerprint } from './lib/fingerprint.js'
import { openapiTransform } from './lib/openapi.js'
import { plugin } from './lib/plugin.js'
import { EncryptedStore } from './lib/stores/encrypted.js'
import { LocalCache } from './lib/stores/local-cache.js'
import { MemoryStore } from './lib/stores/memory.js'
import { PostgresStore } from './lib/stores/postgres.js'
import { RedisStore } from './lib/stores/redis.js'

export type { OpenapiTransform, RouteDocumentation } from './lib/openapi.js'
export type { EncryptedStoreOptions, EncryptionKey } from './lib/stores/encrypted.js'
export type { LocalCacheOptions } from './lib/stores/local-cache.js'
export type { MemoryStoreOptions } from './lib/stores/memory.js'
export type { PostgresPool, PostgresStoreOptions } from './lib/stores/postgres.js'
export type { RedisClient, RedisStoreOptions } from './lib/stores/redis.js'
export type * from './types/index.js'

const wrapped = fp(plugin, { name: 'fastify-idempotency', fastify: '^5.11.0' })
const named = {
  MemoryStore,
  RedisStore,
  PostgresStore,
  EncryptedStore,
  LocalCache,
  idempotencyEvents,
  openapiTransform,
  payloadFingerprint
}

/** The plugin. Everything else hangs on it too, for those who `require()` it. */
const idempotency = Object.assign(wrapped, { default: wrapped, idempotency: wrapped, ...named })

export {
  EncryptedStore,
  idempotency,
  idempotency as default,
  idempotency as 'module.exports',
  idempotencyEvents,
  LocalCache,
  MemoryStore,
  openapiTransform,
  PostgresStore,
  payloadFingerprint,
  RedisStore
}
