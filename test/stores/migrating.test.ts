import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency, {
  type IdempotencyStore,
  MemoryStore,
  MigratingStore,
  MysqlStore,
  PostgresStore,
  RedisStore,
  SqliteStore
} from '../../index.js'
import { build, REPLAYED } from '../support/app.js'
import { endures } from '../support/bad-network.js'
import { FlakyStore } from '../support/flaky-store.js'
import { startMariadb } from '../support/mariadb.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { newSeed, Random } from '../support/random.js'
import { startRedis } from '../support/redis.js'
import { openSqlite } from '../support/sqlite.js'
import { conforms } from '../support/store-fixtures.js'
import { exclusiveHistory, takeoverHistory } from '../support/store-histories.js'

/* What it promises as a store, alone and beside processes that have one of the two. Each rule is in unit/migrating-store. */

const [redis, postgres, mariadb] = await Promise.all([startRedis(), startPostgres(), startMariadb()])
t.teardown(() => Promise.all([redis.close(), postgres.close(), mariadb.close()]))
const [client, pool, mysql] = [await redis.client(), postgres.pool(), mariadb.pool()]

/** One of the two stores, as two processes have it. */
interface Side {
  clients: readonly [IdempotencyStore, IdempotencyStore]
  spoil?(key: string): unknown
}

/** Makes sides, each with data of its own or with keys that do not meet. */
const kinds = {
  memory: async () => () => {
    const store = new MemoryStore()
    return { clients: [store, store] as const }
  },
  redis: async () => {
    const keyPrefix = `${randomUUID()}:`
    return () => ({
      clients: [new RedisStore(client, { keyPrefix }), new RedisStore(client, { keyPrefix })] as const,
      spoil: (key: string) => client.setrange(keyPrefix + key, 3 + 36, '\x7f')
    })
  },
  postgres: async () => {
    const table = `keys_${randomUUID().replaceAll('-', '')}`
    await new PostgresStore({ pool, table }).createTable()
    return () => ({
      clients: [new PostgresStore({ pool, table }), new PostgresStore({ pool, table })] as const,
      spoil: (key: string) => pool.query(`UPDATE ${table} SET headers = '{}' WHERE key = $1`, [key])
    })
  },
  mysql: async () => {
    const table = `keys_${randomUUID().replaceAll('-', '')}`
    await new MysqlStore({ pool: mysql, table }).createTable()
    return () => ({
      clients: [new MysqlStore({ pool: mysql, table }), new MysqlStore({ pool: mysql, table })] as const,
      spoil: (key: string) => mysql.query(`UPDATE ${table} SET value = 'x' WHERE \`key\` = ?`, [key])
    })
  },
  sqlite: async () => {
    const path = join(makeFolder('migrating'), 'keys')
    const databases = [openSqlite(path), openSqlite(path)] as const
    t.teardown(() => databases.map((database) => database.close()))
    return () => ({
      clients: [new SqliteStore({ database: databases[0] }), new SqliteStore({ database: databases[1] })] as const,
      spoil: async (key: string) =>
        databases[0].prepare(`UPDATE idempotency_keys SET value = x'00' WHERE key = ? RETURNING 1`).all(key)
    })
  }
} satisfies Record<string, () => Promise<() => Side>>

type Kind = keyof typeof kinds

/** Two processes that move, on the same two stores. */
function moving(from: Side, to: Side) {
  const [store, second] = [0, 1].map((n) => new MigratingStore(from.clients[n as 0], to.clients[n as 0])) as [
    MigratingStore,
    MigratingStore
  ]
  const dispose = () => Promise.all([store.close?.(), second.close?.()])
  const { spoil } = to
  if (spoil === undefined || from.spoil === undefined) return { store, second, dispose }
  return { store, second, dispose, spoil: (key: string) => Promise.all([from.spoil?.(key), spoil(key)]) }
}

const moves: [from: Kind, to: Kind][] = [
  ['memory', 'memory'],
  ['redis', 'postgres'],
  ['postgres', 'redis'],
  ['sqlite', 'mysql'],
  ['mysql', 'sqlite']
]

for (const [from, to] of moves) {
  const [newFrom, newTo]: (() => Side)[] = await Promise.all([kinds[from](), kinds[to]()])
  const stores = () => moving((newFrom as () => Side)(), (newTo as () => Side)())
  conforms(t, `a MigratingStore from ${from} to ${to} keeps every promise of a store`, stores)
  if (from === 'memory' || from === 'redis')
    endures(t, `a MigratingStore from ${from} to ${to} behind a bad network`, stores)
}

/* In an application */

t.test('an application moves from Redis to PostgreSQL: its replies are replayed in each deploy', async (t) => {
  const server = await startRedis({ port: true })
  t.teardown(() => server.close())
  process.env.REDIS_URL = server.url
  process.env.DATABASE_URL = postgres.url
  let runs = 0
  const serve = (app: FastifyInstance) => {
    t.teardown(() => app.close())
    app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
    return (key: string) => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': key } })
  }
  const opened = async (store: IdempotencyStore) => serve(await build(t, { store }))
  const app = Fastify() as unknown as FastifyInstance
  const { run } = (await import(`../docs/snippets/${'moving'}.js`)) as { run(given: object): Promise<object> }
  const first = await opened(new RedisStore(await server.client()))
  t.same((await first('before')).json(), { run: 1 })
  await run({ app, idempotency })
  const moving = serve(app)
  const replay = await moving('before')
  t.same([replay.json(), replay.headers[REPLAYED]], [{ run: 1 }, 'true'])
  t.same((await moving('meanwhile')).json(), { run: 2 })
  t.equal((await first('meanwhile')).headers[REPLAYED], 'true', 'in the first deploy')
  const last = await opened(new PostgresStore({ pool }))
  t.equal((await last('meanwhile')).headers[REPLAYED], 'true', 'in the second deploy')
  t.same((await last('after')).json(), { run: 3 })
  t.equal((await moving('after')).headers[REPLAYED], 'true')
  t.equal(runs, 3)
})

/* Deploys */

const mixtures = {
  'use `from` alone while others move': ({ from, to }: Record<'from' | 'to', Connect>) => [
    new MigratingStore(from(), to()),
    from(),
    new MigratingStore(from(), to()),
    from()
  ],
  'use `to` alone while others move': ({ from, to }: Record<'from' | 'to', Connect>) => [
    new MigratingStore(from(), to()),
    to(),
    new MigratingStore(from(), to()),
    to()
  ],
  'all move': ({ from, to }: Record<'from' | 'to', Connect>) => [
    new MigratingStore(from(), to()),
    new MigratingStore(from(), to())
  ]
}
/** A connection, good or bad, of another process to one of the stores. */
type Connect = () => IdempotencyStore

const networks = {
  'good connections': { loss: 0, delay: 3 },
  'bad connections': { loss: 0.2, delay: 2 }
}

for (const [who, clients] of Object.entries(mixtures)) {
  for (const [how, network] of Object.entries(networks)) {
    t.test(`when some processes ${who}, by ${how}, a key`, async (t) => {
      const random = new Random(newSeed())
      t.comment(`SEED=${random.seed}`)
      const [from, to] = [new MemoryStore(), new MemoryStore()]
      t.teardown(() => Promise.all([from.close(), to.close()]))
      const by = (store: IdempotencyStore) => () => new FlakyStore(store, { random, ...network })
      await exclusiveHistory(t, clients({ from: by(from), to: by(to) }), random)
      await takeoverHistory(t, clients({ from: by(from), to: by(to) }), random)
    })
  }
}
