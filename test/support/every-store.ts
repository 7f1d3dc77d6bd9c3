import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import {
  EncryptedStore,
  type IdempotencyStore,
  LocalCache,
  MemoryStore,
  MigratingStore,
  MysqlStore,
  PostgresStore,
  RedisStore,
  SqliteStore
} from '../../index.js'
import { startMariadb } from './mariadb.js'
import { startPostgres } from './postgres.js'
import { makeFolder } from './process.js'
import { startRedis } from './redis.js'
import { openSqlite } from './sqlite.js'

/** Something with a teardown: a tap test. */
interface Owner {
  teardown(fn: () => unknown): void
}

type MakeStore = (t: Owner) => IdempotencyStore | Promise<IdempotencyStore>

/** Every kind of store, on servers that are closed when the test ends. Each that is made is empty. */
export async function everyStore(t: Owner): Promise<Record<string, MakeStore>> {
  const folder = makeFolder('stores')
  const [redis, postgres, mariadb] = await Promise.all([startRedis(), startPostgres(), startMariadb()])
  t.teardown(() => Promise.all([redis.close(), postgres.close(), mariadb.close()]))
  const client = await redis.client()
  const pools = { postgres: postgres.pool(), mariadb: mariadb.pool() }
  let count = 0
  const inRedis = () => new RedisStore(client, { keyPrefix: `${count++}:` })
  return {
    MemoryStore: () => new MemoryStore(),
    SqliteStore: (t) => {
      const database = openSqlite(join(folder, String(count++)))
      t.teardown(() => database.close())
      return new SqliteStore({ database })
    },
    RedisStore: inRedis,
    PostgresStore: async () => {
      const store = new PostgresStore({ pool: pools.postgres, table: `keys_${count++}` })
      await store.createTable()
      return store
    },
    LocalCache: () => new LocalCache(inRedis()),
    EncryptedStore: () => new EncryptedStore(new MemoryStore(), { keys: [randomBytes(32)] }),
    MigratingStore: () => new MigratingStore(new MemoryStore(), inRedis()),
    MysqlStore: async () => {
      const store = new MysqlStore({ pool: pools.mariadb, table: `keys_${count++}` })
      await store.createTable()
      return store
    }
  }
}
