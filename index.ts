import fp from 'fastify-plugin'
import { idempotencyEvents } from './lib/events.js'
import { payloadFingerprint } from './lib/http/fingerprint.js'
import { openapiTransform } from './lib/openapi.js'
import { plugin } from './lib/plugin.js'
import { EncryptedStore } from './lib/stores/encrypted/encrypted-store.js'
import { LocalCache } from './lib/stores/memory/local-cache.js'
import { MemoryStore } from './lib/stores/memory/memory-store.js'
import { MigratingStore } from './lib/stores/migrating/migrating-store.js'
import { MysqlStore } from './lib/stores/mysql/mysql-store.js'
import { PostgresStore } from './lib/stores/postgres/postgres-store.js'
import { RedisStore } from './lib/stores/redis/redis-store.js'
import { SqliteStore } from './lib/stores/sqlite/sqlite-store.js'

export type { OpenapiTransform, RouteDocumentation } from './lib/openapi.js'
export type { EncryptedStoreOptions, EncryptionKey } from './lib/stores/encrypted/encrypted-store.js'
export type { LocalCacheOptions } from './lib/stores/memory/local-cache.js'
export type { MemoryStoreOptions } from './lib/stores/memory/memory-store.js'
export type { Mysql2Pool } from './lib/stores/mysql/database.js'
export type { MysqlStoreOptions } from './lib/stores/mysql/mysql-store.js'
export type { PostgresPool } from './lib/stores/postgres/pool.js'
export type { PostgresStoreOptions } from './lib/stores/postgres/postgres-store.js'
export type { RedisClient } from './lib/stores/redis/client.js'
export type { RedisStoreOptions } from './lib/stores/redis/redis-store.js'
export type { SqliteConnection } from './lib/stores/sqlite/database.js'
export type { SqliteStoreOptions } from './lib/stores/sqlite/sqlite-store.js'
export type * from './types/index.js'

const wrapped = fp(plugin, { name: 'fastify-idempotency', fastify: '^5.11.0' })
const named = {
  MemoryStore,
  RedisStore,
  PostgresStore,
  SqliteStore,
  MysqlStore,
  EncryptedStore,
  LocalCache,
  MigratingStore,
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
  MigratingStore,
  MysqlStore,
  openapiTransform,
  PostgresStore,
  payloadFingerprint,
  RedisStore,
  SqliteStore
}
