import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Pool } from 'pg'
import t, { type Test } from 'tap'
import { type IdempotencyStore, MemoryStore, PostgresStore, RedisStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { until } from '../support/latch.js'
import { startPostgres } from '../support/postgres.js'
import { newSeed } from '../support/random.js'
import { startRedis } from '../support/redis.js'
import { Soak } from '../support/soak.js'

// Every kind of request at once, for a while, on every store; then the books must balance and nothing may be left.
// A few seconds for each store as part of the suite; minutes by SOAK_SECONDS=300.

const SECONDS = Number(process.env.SOAK_SECONDS) || 4
/** Only what has run for so long has warmed up in its first third. */
const LONG_SECONDS = 20
const MOST_GROWTH = 16 * 2 ** 20
/** For what takes as long as the machine is slow. */
const patience = { timeout: 60_000 }

t.setTimeout((4 * SECONDS + 400) * 1_000)

const seed = newSeed()
t.comment(`SEED=${seed}`)

setFlagsFromString('--expose-gc')
const gc: () => void = globalThis.gc ?? runInNewContext('gc')

function heapUsed(): number {
  gc()
  return process.memoryUsage().heapUsed
}

/** What a test brings along. */
interface Ground {
  stores: IdempotencyStore[]
  transaction?: boolean
  /** What is to be seen in the store itself, when all is quiet. */
  inspect?(soak: Soak): Promise<void>
  /** Lets go of what the test has opened. */
  leave?(): Promise<void>
}

function soaked(name: string, prepare: (t: Test) => Promise<Ground>): void {
  t.test(name, { timeout: (SECONDS + 300) * 1_000 }, async (t) => {
    const trouble = watchProcess(t)
    const before = resources()
    const { stores, transaction = false, inspect, leave } = await prepare(t)
    const soak = new Soak({ stores, transaction, seed, seconds: SECONDS })
    let closed = false
    const close = async () => {
      if (!closed) await soak.close()
      closed = true
    }
    t.teardown(close)
    await soak.run(heapUsed)

    await until(() => soak.unsettled === 0 && soak.remembered === 0, { ...patience, message: 'quiet' }).catch(() => {})
    soak.audit()
    const { numbers, answers, events } = soak
    t.comment(JSON.stringify({ ...numbers, answers, events }))
    t.strictSame(soak.violations, [], 'no promise was broken')
    t.strictSame(soak.log, [], 'the plugin had nothing to complain of')
    t.equal(soak.unsettled, 0, 'every claim was stored, released or made a tombstone, once')
    t.equal(soak.remembered, 0, 'the plugin holds on to no request')
    const { takeover, bypassed } = events
    const unwanted = { takeover, bypassed, lost: events['lease-lost'], failed: events['store-error'] }
    t.strictSame(unwanted, { takeover: 0, bypassed: 0, lost: 0, failed: 0 }, 'no claim was in danger')
    const { runs, shortRuns, replays, hangUps } = numbers
    const { conflict, mismatch, stored, released, tombstoned } = events
    const happened = { runs, shortRuns, replays, hangUps, conflict, mismatch, stored, released, tombstoned }
    for (const [what, count] of Object.entries(happened)) t.ok(count > 0, `there were some: ${what}`)
    t.strictSame(await claimsIn(stores, soak), [], 'no claim is left')
    await inspect?.(soak)
    growth(t, soak)

    await close()
    await leave?.()
    const more = () => Object.entries(resources()).filter(([type, count]) => count > (before[type] ?? 0))
    await until(() => more().length === 0, patience).catch(() => {})
    t.strictSame(more(), [], 'nothing that was opened is open')
    t.strictSame(trouble, [], 'no rejection, exception or warning escaped')
  })
}

const server = { redis: await startRedis(), postgres: await startPostgres({ config: { log_statement: 'none' } }) }
t.teardown(() => server.redis.close())
t.teardown(() => server.postgres.close())
const redis = await server.redis.client()
/** Sees what is committed, and nothing else. */
const outside = server.postgres.pool({ max: 2, idleTimeoutMillis: 0 })
await outside.query('SELECT')

soaked('in memory, every promise is kept under load, and nothing is left of it', async () => ({
  stores: [new MemoryStore({ maxEntries: 1_000 })]
}))

soaked('on Redis, every promise is kept under load, by two apps, and nothing is left of it', async (t) => {
  const clients = [await server.redis.client(), await server.redis.client()]
  return {
    stores: clients.map((client) => new RedisStore(client)),
    inspect: async () => {
      const kinds = new Set<string>()
      for (const value of await redisValues()) kinds.add(value.subarray(0, 2).toString())
      t.notOk(kinds.has('P1'), 'no value is a claim')
      t.ok(kinds.has('C1'), 'there are records')
    },
    leave: async () => {
      for (const client of clients) client.disconnect()
      const left = async () =>
        String(await redis.client('LIST'))
          .trim()
          .split('\n').length
      await until(async () => (await left()) === 1, { ...patience, message: 'all connections to be closed' })
    }
  }
})

for (const transaction of [false, true]) {
  const how = transaction ? 'in transactions' : 'by leases'
  soaked(`in PostgreSQL, ${how}, every promise is kept under load, by two apps, and nothing is left`, async (t) => {
    const name = transaction ? 'transactions' : 'leases'
    await outside.query('DROP TABLE IF EXISTS ledger')
    await outside.query('CREATE TABLE ledger (key text, run integer)')
    const pools = [1, 2].map((): Pool => server.postgres.pool({ max: 10, application_name: name }))
    const table = `keys_${name}`
    const stores = pools.map((pool) => new PostgresStore({ pool, table, sweepInterval: 500 }))
    await stores[0]?.createTable()
    return {
      stores,
      transaction,
      inspect: async (soak) => {
        const isBack = (pool: Pool) => pool.totalCount === pool.idleCount && pool.waitingCount === 0
        await until(() => pools.every(isBack), patience).catch(() => {})
        for (const pool of pools) t.ok(isBack(pool), 'all clients are back in their pool')
        const open = `SELECT state, query FROM pg_stat_activity WHERE application_name = $1 AND xact_start IS NOT NULL`
        const isQuiet = async () => (await outside.query(open, [name])).rowCount === 0
        await until(isQuiet, patience).catch(() => {})
        t.strictSame((await outside.query(open, [name])).rows, [], 'no transaction is open')
        const running = `SELECT * FROM ${table} WHERE state = 'running'`
        t.strictSame((await outside.query(running)).rows, [], 'no row is a claim')
        if (!transaction) return
        const long = "SELECT key, count(*)::int FROM ledger WHERE key LIKE 'long-%' GROUP BY key"
        const { rows } = await outside.query<{ key: string; count: number }>(long)
        t.strictSame(rows.filter(({ count }) => count !== 1).slice(0, 10), [], 'no key has had two effects')
        const keys = new Set(rows.map(({ key }) => key))
        const without = [...soak.longKeys()].filter((key) => !keys.has(key))
        t.strictSame(without.slice(0, 10), [], 'every key has had its effect')
      },
      leave: async () => {
        await Promise.all(pools.map((pool) => pool.end()))
        const left = 'SELECT pid, query FROM pg_stat_activity WHERE application_name = $1'
        const isAlone = async () => (await outside.query(left, [name])).rowCount === 0
        await until(isAlone, { ...patience, message: 'all connections to be closed' })
      }
    }
  })
}

/** Keys that are neither free nor done with. */
async function claimsIn(stores: IdempotencyStore[], soak: Soak): Promise<string[]> {
  const store = stores.at(-1) as Required<IdempotencyStore>
  const left: string[] = []
  const keys = soak.keys()
  const look = async () => {
    for (const key of keys) {
      const held = await store.get(storageKey(null, key))
      if (held !== null && held.state !== 'completed') left.push(`${key}: ${held.state}`)
    }
  }
  await Promise.all(Array.from({ length: 16 }, look))
  return left
}

async function redisValues(): Promise<Buffer[]> {
  const values: Buffer[] = []
  let cursor = '0'
  do {
    const [next, keys] = await redis.scan(cursor, 'MATCH', 'idempotency:*', 'COUNT', 500)
    cursor = String(next)
    const heads = await Promise.all(keys.map((key) => redis.getrangeBuffer(String(key), 0, 1)))
    values.push(...heads)
  } while (cursor !== '0')
  return values
}

/** How much more memory the last third needed than the first one. */
function growth(t: Test, { heap }: Soak): void {
  const least = (samples: typeof heap) => Math.min(...samples.map(({ used }) => used))
  const first = least(heap.filter(({ at }) => at <= 1 / 3))
  const grown = least(heap.filter(({ at }) => at > 2 / 3)) - first
  const told = `the heap grew by ${(grown / 2 ** 20).toFixed(1)} MiB, from ${(first / 2 ** 20).toFixed(1)} MiB`
  if (SECONDS < LONG_SECONDS) t.comment(told)
  else t.ok(grown < MOST_GROWTH, told)
}

/** What keeps the process alive, by type. */
function resources(): Record<string, number> {
  const counts: Record<string, number> = {}
  for (const type of process.getActiveResourcesInfo()) counts[type] = (counts[type] ?? 0) + 1
  return counts
}

/** What nobody has caught. */
function watchProcess(t: Test): string[] {
  const trouble: string[] = []
  const note = (what: string) => (error: unknown) => {
    // A short ttl is meant.
    if ((error as { code?: unknown } | null)?.code === 'FST_IDEMPOTENCY_DURATION') return
    if (trouble.length < 20) trouble.push(`${what}: ${error instanceof Error ? error.stack : error}`)
  }
  const listeners = {
    warning: note('warning'),
    unhandledRejection: note('unhandled rejection'),
    uncaughtExceptionMonitor: note('uncaught exception')
  }
  for (const [name, listener] of Object.entries(listeners)) process.on(name, listener)
  t.teardown(() => {
    for (const [name, listener] of Object.entries(listeners)) process.off(name, listener)
  })
  return trouble
}
