import { createHash, randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { inspect } from 'node:util'
import { Pool, type PoolClient, type PoolConfig } from 'pg'
import t, { type Test } from 'tap'
import { type PostgresPool, PostgresStore, type PostgresStoreOptions } from '../../index.js'
import type {
  Acquisition,
  ClaimTransaction,
  ListedKey,
  ListedKind,
  ListedPage,
  StoredRecord,
  TransactionAcquisition,
  TransactionClaim
} from '../../types/index.js'
import { build } from '../support/app.js'
import { until } from '../support/latch.js'
import { type PostgresServer, type StartOptions, startPostgres } from '../support/postgres.js'
import { claim, lapsed, newKey, reply, same, soon, take, tombstone } from '../support/store-fixtures.js'

const LONG = 60_000
const CHANNEL = 'fastify-idempotency'
const INVALID_OPTION = 'FST_IDEMPOTENCY_INVALID_OPTION'
const TRANSACTION = 'FST_IDEMPOTENCY_TRANSACTION'
const UNDECODABLE = 'A stored idempotency record could not be decoded'

const shared = await startPostgres()
t.teardown(() => shared.close())
const admin = shared.pool({ max: 3 })

/** A server that a test may stop, or count the connections of. */
async function ownServer(t: Test, options?: StartOptions): Promise<PostgresServer> {
  const server = await startPostgres(options)
  t.teardown(() => server.close())
  return server
}

const newTable = () => `keys_${randomUUID().replaceAll('-', '')}`

/** A pool that is ended with the test. */
function ownPool(t: Test, options: PoolConfig = {}, server = shared): Pool {
  const pool = server.pool(options)
  t.teardown(() => (pool.ended ? undefined : pool.end()))
  return pool
}

interface OpenOptions extends Omit<PostgresStoreOptions, 'pool'> {
  server?: PostgresServer
  /** Of both pools. */
  pool?: PoolConfig
}

/** A store on a table of its own, a second one on the same table by another pool, and a look from outside. */
async function open(t: Test, { server = shared, pool: poolOptions, table = newTable(), ...given }: OpenOptions = {}) {
  const [pool, other] = [ownPool(t, poolOptions, server), ownPool(t, poolOptions, server)]
  const operator = server === shared ? admin : server.pool({ max: 3 })
  const options = { table, sweepInterval: null, ...given }
  const [store, second] = [new PostgresStore({ ...options, pool }), new PostgresStore({ ...options, pool: other })]
  t.teardown(() => Promise.all([store.close(), second.close()]))
  await store.createTable()
  const rows = async (text: string, values: unknown[] = []) => (await operator.query(text, values)).rows
  const row = async (key: string) => (await rows(`SELECT * FROM "${table}" WHERE key = $1`, [key]))[0]
  return { store, second, pool, other, operator, table, rows, row }
}

type Rows = Awaited<ReturnType<typeof open>>['rows']

const wish = (changes: Partial<TransactionClaim> = {}): TransactionClaim => ({
  ...claim(),
  wake: false,
  timeoutMs: 10_000,
  ...changes
})

/** The transaction of a key that is free. */
function held(found: TransactionAcquisition): ClaimTransaction {
  if (found.state !== 'acquired') throw new Error(`The key should be free and is ${found.state}`)
  return found.transaction
}

async function hold(store: PostgresStore, key: string, changes?: Partial<TransactionClaim>): Promise<ClaimTransaction> {
  return held(await store.begin(key, wish(changes)))
}

async function finish(store: PostgresStore, key: string, record: StoredRecord = reply()): Promise<void> {
  await store.complete(key, await take(store, key), record, LONG)
}

async function leave(store: PostgresStore, key: string): Promise<void> {
  await finish(store, key, tombstone('too-large'))
}

async function expired(store: PostgresStore, key: string): Promise<void> {
  await store.complete(key, await take(store, key), reply(), 1)
  await until(async () => (await store.get(key)) === null)
}

/** Resolves when somebody is known to wait for the claim on the key: whoever waits listens by then. */
async function awaited(rows: Rows, table: string, key: string): Promise<void> {
  const waiting = async () => (await rows(`SELECT waiting FROM "${table}" WHERE key = $1`, [key]))[0]?.waiting
  await until(waiting, { message: 'the note that somebody waits' })
}

/** What is abandoned, without the time since when, which is not long. */
function justNow(t: Test, found: Acquisition | TransactionAcquisition): object {
  const { lapsedMs, ...others } = found as { lapsedMs: number }
  t.ok(lapsedMs >= 0 && lapsedMs < LONG, `abandoned ${lapsedMs} ms ago`)
  return others
}

const never = () => new AbortController().signal

const KINDS = ['running', 'abandoned', 'reply', 'tombstone'] as const
const SETTLEMENTS = [{ record: tombstone('settled'), ttlMs: LONG }, 'ended'] as const

/** What is listed of a store: all of it, page by page. */
async function listed(store: PostgresStore, kinds: readonly ListedKind[] = KINDS): Promise<ListedKey[]> {
  const found: ListedKey[] = []
  let cursor: string | null = null
  do {
    const page: ListedPage = await store.list(kinds, cursor)
    found.push(...page.keys)
    cursor = page.cursor
  } while (cursor !== null)
  return found
}

const listedKeys = async (store: PostgresStore) => (await listed(store)).map(({ key }) => key)

/** Brings a key of the store into a state, and gives what its owner's token was. */
const STATES: Record<string, (store: PostgresStore, key: string) => Promise<string | undefined>> = {
  free: async () => undefined,
  running: (store, key) => take(store, key),
  abandoned: (store, key) => lapsed(store, key),
  async ended(store, key) {
    await lapsed(store, key)
    const heir = claim({ takeover: true })
    await store.acquire(key, heir)
    await store.release(key, heir.token)
    return undefined
  },
  async completed(store, key) {
    await finish(store, key)
    return undefined
  },
  async released(store, key) {
    await store.release(key, await take(store, key))
    return undefined
  },
  async expired(store, key) {
    await expired(store, key)
    return undefined
  }
}

/** What is found where a key is in one of these states. */
const shown = (name: string) => (name === 'ended' ? 'abandoned' : name)

/** Hears all that is told on the channel. What was told before `heard` was called is in its result. */
async function hear(t: Test, pool = admin) {
  const client = await pool.connect()
  const messages: string[] = []
  client.on('notification', ({ channel, payload }) => {
    if (channel === CHANNEL) messages.push(payload ?? '')
  })
  await client.query(`LISTEN "${CHANNEL}"`)
  t.teardown(() => client.release(true))
  return async (): Promise<string[]> => {
    // Messages arrive in the order of the commits.
    const barrier = `barrier ${randomUUID()}`
    await pool.query('SELECT pg_notify($1, $2)', [CHANNEL, barrier])
    await until(() => messages.includes(barrier), { message: 'the barrier' })
    return messages.splice(0).filter((message) => !message.startsWith('barrier'))
  }
}

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')

/** Ends what has listened as its last statement, as an operator or a network would. Gives how many that were. */
async function terminateListeners(rows: Rows): Promise<number> {
  const found = await rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN \"fast%'")
  return found.length
}

const listeners = async (rows: Rows) =>
  (await rows("SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN \"fast%'")).length

const aborted = (signal: AbortSignal): Promise<unknown> =>
  signal.aborted ? Promise.resolve() : new Promise((resolve) => signal.addEventListener('abort', resolve))

const outcome = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => 'resolved',
    (error: Error) => `rejected: ${error.message}`
  )

/* The constructor */

t.test('a pool that takes its answers in binary is refused, and no refusal tells what is in a pool', async (t) => {
  const pool = shared.pool({ binary: true } as never)
  t.throws(() => new PostgresStore({ pool }), { code: INVALID_OPTION, message: /without binary: true/ })
  const config = { password: 'secret' } as never
  t.throws(() => new PostgresStore({ pool: config }), { message: /^(?!.*secret).*"pool" takes a pool of pg/ })
})

t.test('constructing a store sends nothing, opens nothing and starts nothing', async (t) => {
  const pool = ownPool(t)
  const { sent } = await shared.statements(async () => {
    for (const sweepInterval of [1, null]) new PostgresStore({ pool, table: newTable(), sweepInterval })
    new PostgresStore({ pool })
    await sleep(30)
  })
  t.strictSame(sent, [])
  t.equal(pool.totalCount, 0)
})

t.test('one pool may serve any number of stores, and gets no more than one listener from them', async (t) => {
  const pool = ownPool(t)
  const before = pool.listenerCount('error')
  for (let n = 0; n < 20; n++) new PostgresStore({ pool, table: newTable() })
  t.equal(pool.listenerCount('error'), before + 1)
})

t.test('an idle connection that breaks does not end the process, although the pool has no listener', async (t) => {
  const pool = new Pool({ host: shared.host, user: shared.user, database: shared.database })
  t.teardown(() => pool.end())
  const store = new PostgresStore({ pool, table: newTable(), sweepInterval: null })
  await store.createTable()
  const { rows } = await pool.query('SELECT pg_backend_pid() AS pid')
  await admin.query('SELECT pg_terminate_backend($1)', [rows[0].pid])
  await until(() => pool.totalCount === 0, { message: 'the pool to notice' })
  t.equal(await store.get(newKey()), null)
})

const PARTS = {
  table: /^PostgresStore option "table" takes a name of letters, digits and underscores, .*, got /,
  pool: /^PostgresStore option "pool" takes a pool of pg, .*, got /,
  sweepInterval:
    /^PostgresStore option "sweepInterval" takes a positive integer of milliseconds or a text such as '24h', or null .*, got /
}

const pgLike = { query() {}, connect() {}, transact() {} }
for (const [option, wrong] of [
  [
    'table',
    [
      ...[
        '',
        ' ',
        'a.b.c',
        'a"b',
        "a'; drop",
        'a; drop table b',
        '1a',
        'a.1b',
        '.a',
        'a.',
        'a b',
        'a-b',
        'é',
        'a\n',
        '"a"'
      ],
      ...['x'.repeat(60), 'x'.repeat(53), `a.${'x'.repeat(53)}`, `${'x'.repeat(64)}.a`, 'a\0b', 'a$b'],
      ...[1, null, true, {}, ['a'], Symbol('a')]
    ]
  ],
  ['pool', [undefined, null, {}, pgLike, { ...pgLike, on: true }, { query() {}, on() {} }, 5432, () => {}]],
  ['sweepInterval', [0, -1, 1.5, Number.NaN, Infinity, 2 ** 53, 'soon', true, {}, 1n]]
] as [keyof typeof PARTS, unknown[]][]) {
  t.test(`a wrong "${option}" is refused by a message that says what it takes, and what it got`, async (t) => {
    const good = { pool: ownPool(t), table: 'a', sweepInterval: null }
    for (const value of wrong) {
      const make = () => new PostgresStore({ ...good, [option]: value } as never)
      t.throws(make, { code: INVALID_OPTION, message: PARTS[option] }, inspect(value))
      try {
        make()
      } catch (error) {
        const got = String((error as Error).message.split(', got ')[1])
        const kind = value === null ? 'null' : Array.isArray(value) ? '(array)' : `(${typeof value})`
        t.ok(got.endsWith(kind), got)
        if (typeof value !== 'object' && typeof value !== 'function')
          t.ok(got.includes(inspect(value).slice(0, 80)), got)
      }
    }
  })
}

t.test('a store without any options is refused as one without a pool', async (t) => {
  for (const options of [undefined, null, {}]) {
    t.throws(() => new PostgresStore(options as never), { code: INVALID_OPTION, message: PARTS.pool })
  }
})

t.test('an option that a PostgresStore does not have is refused by its name', async (t) => {
  const pool = ownPool(t)
  for (const name of ['tableName', 'schema', 'keyPrefix', 'ttl']) {
    const message = new RegExp(`PostgresStore option "${name}" is not known`)
    t.throws(() => new PostgresStore({ pool, [name]: 'a' } as never), { code: INVALID_OPTION, message })
  }
})

t.test('what is left out, or undefined, has its default', async (t) => {
  const { pool, rows } = await open(t)
  const store = new PostgresStore({ pool, table: undefined, sweepInterval: undefined } as never)
  t.teardown(() => store.close())
  await store.createTable()
  await take(store, 'a')
  t.match(await rows('SELECT key FROM idempotency_keys'), [{ key: 'a' }])
})

/* The table */

t.test('creating the table again and again changes nothing, and keeps what is in it', async (t) => {
  const { store, second, table, rows } = await open(t)
  const key = newKey()
  await finish(store, key)
  const shape = () => rows('SELECT relname, relfilenode FROM pg_class WHERE relname LIKE $1 ORDER BY 1', [`${table}%`])
  const before = await shape()
  for (const each of [store, second, store]) await each.createTable()
  t.strictSame(await shape(), before)
  same(t, await second.acquire(key, claim()), reply())
})

t.test('20 processes can create the table at once', async (t) => {
  for (let round = 0; round < 5; round++) {
    const table = newTable()
    const stores = Array.from({ length: 20 }, () => new PostgresStore({ pool: ownPool(t, { max: 1 }), table }))
    await Promise.all(stores.map((store) => store.createTable()))
    const found = await Promise.all(stores.map((store) => store.acquire('a', claim())))
    t.equal(found.filter(({ state }) => state === 'acquired').length, 1)
  }
})

t.test('the table can be created at once by two spellings of its name', async (t) => {
  for (let round = 0; round < 5; round++) {
    const table = newTable()
    const stores = Array.from({ length: 10 }, (_, n) => {
      const spelled = n % 2 === 0 ? table : `public.${table}`
      return new PostgresStore({ pool: ownPool(t, { max: 1 }), table: spelled })
    })
    await Promise.all(stores.map((store) => store.createTable()))
    t.strictSame(await stores[0]?.acquire('a', claim()), { state: 'acquired', attempt: 1 })
  }
})

t.test('creating the table is one message, and so one transaction', async (t) => {
  const store = new PostgresStore({ pool: ownPool(t), table: newTable() })
  const { sent } = await shared.statements(() => store.createTable())
  t.equal(sent.length, 1)
})

for (const [table, schema, name] of [
  ['billing.keys', 'billing', 'keys'],
  ['Billing.Order', 'Billing', 'Order'],
  ['Order', 'public', 'Order'],
  ['order', 'public', 'order'],
  ['select.table', 'select', 'table'],
  ['_1', 'public', '_1'],
  ['x'.repeat(52), 'public', 'x'.repeat(52)],
  [`${'S'.repeat(63)}.${'T'.repeat(52)}`, 'S'.repeat(63), 'T'.repeat(52)]
] as const) {
  t.test(`the table ${table} is the table "${name}" in the schema "${schema}"`, async (t) => {
    await admin.query(`CREATE SCHEMA IF NOT EXISTS "${schema}"`)
    const { store, second } = await open2(t, table)
    await store.createTable()
    await second.createTable()
    const { rows } = await admin.query(
      `SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = $1 AND tablename = $2 ORDER BY 1`,
      [schema, name]
    )
    t.equal(rows.length, 2)
    t.ok(
      rows.some(({ indexname }) => indexname === `${name}_expires_at`),
      'the index has a name of its own'
    )
    const key = newKey()
    const token = await take(store, key, { leaseMs: 1 })
    await until(async () => (await second.acquire(key, claim())).state === 'abandoned')
    t.equal(await store.renew(key, token, LONG), true)
    const heard = second.changed(key, never())
    await until(async () => (await admin.query(`SELECT waiting FROM "${schema}"."${name}"`)).rows[0]?.waiting)
    t.equal(await store.complete(key, token, reply(), LONG), true)
    await soon(heard)
    same(t, await second.get(key), reply())
    t.equal(await second.delete(key), true)
    const transaction = await hold(store, key)
    t.match(await second.begin(key, wish()), { state: 'running' })
    t.strictSame(await transaction.complete(tombstone('hijacked'), null), { state: 'committed' })
    same(t, await second.acquire(key, claim()), tombstone('hijacked'))
    const [store2, key2] = [new PostgresStore({ pool: ownPool(t), table, sweepInterval: 1 }), newKey()]
    await expired(store2, key2)
    await until(async () => (await admin.query(`SELECT FROM "${schema}"."${name}"`)).rowCount === 1)
    await store2.close()
  })
}

/** Two stores on a table that a name leads to. */
async function open2(t: Test, table: string, secondTable = table, pool: PoolConfig = {}) {
  const [store, second] = [table, secondTable].map(
    (table) => new PostgresStore({ pool: ownPool(t, pool), table, sweepInterval: null })
  ) as [PostgresStore, PostgresStore]
  t.teardown(() => Promise.all([store.close(), second.close()]))
  return { store, second }
}

t.test('a schema that is not there is an error that names it', async (t) => {
  const { store } = await open2(t, 'nowhere.keys')
  await t.rejects(store.createTable(), { message: /"nowhere" does not exist/ })
})

t.test('the table survives a crash of the server, and expired rows are found by an index', async (t) => {
  const { table, rows } = await open(t)
  const [found] = await rows('SELECT relpersistence FROM pg_class WHERE relname = $1', [table])
  t.equal(found?.relpersistence, 'p', 'it is logged')
  const indexes = await rows('SELECT indexdef FROM pg_indexes WHERE tablename = $1', [table])
  t.equal(indexes.length, 2)
  t.ok(indexes.some(({ indexdef }) => /UNIQUE.*\(key\)$/.test(indexdef)))
  t.ok(indexes.some(({ indexdef }) => /\(expires_at\)$/.test(indexdef)))
})

t.test('what was acknowledged is still there after a crash of the server', async (t) => {
  const server = await ownServer(t)
  const { store } = await open(t, { server })
  const [running, completed] = [newKey(), newKey()]
  await take(store, running)
  await finish(store, completed)
  await server.kill()
  await server.start()
  t.match(await store.acquire(running, claim()), { state: 'running' })
  same(t, await store.acquire(completed, claim()), reply())
})

t.test("tables do not know of each other's keys", async (t) => {
  const { store } = await open(t)
  const { store: another } = await open(t)
  const key = newKey()
  const token = await take(store, key)
  t.equal(await another.complete(key, token, reply(), LONG), false)
  t.equal(await another.get(key), null)
  const [one, two] = [newKey(), newKey()]
  const transactions = [await hold(store, one), await hold(another, one)]
  t.strictSame(await another.acquire(two, claim()), { state: 'acquired', attempt: 1 })
  for (const transaction of transactions) await transaction.rollback()
})

const CALLS: [name: string, call: (store: PostgresStore, key: string) => Promise<unknown>][] = [
  ['acquire', (store, key) => store.acquire(key, claim())],
  ['renew', (store, key) => store.renew(key, 'token', LONG)],
  ['step', (store, key) => store.step(key, 'token', ['a', 'b'])],
  ['complete', (store, key) => store.complete(key, 'token', reply(), LONG)],
  ['release', (store, key) => store.release(key, 'token')],
  ['get', (store, key) => store.get(key)],
  ['delete', (store, key) => store.delete(key)],
  ['list', (store) => store.list(KINDS, null)],
  ['settle', (store, key) => store.settle(key, 'fingerprint', { record: reply(), ttlMs: LONG })],
  ['settle as ended', (store, key) => store.settle(key, 'fingerprint', 'ended')],
  ['changed', (store, key) => store.changed(key, never())],
  ['begin', (store, key) => store.begin(key, wish())]
]

for (const [name, call] of CALLS) {
  t.test(`${name} without the table is an error that tells of createTable`, async (t) => {
    const table = newTable()
    const pool = ownPool(t, { max: 1 })
    const store = new PostgresStore({ pool, table, sweepInterval: null })
    t.teardown(() => store.close())
    const message = new RegExp(`"${table}" does not exist: .*createTable\\(\\)`)
    for (let n = 0; n < 3; n++) await t.rejects(soon(call(store, newKey())), { message })
    await store.createTable()
    t.strictSame(await store.acquire(newKey(), claim()), { state: 'acquired', attempt: 1 }, 'and then it works')
  })
}

/* What is sent */

for (const [name, prepare] of Object.entries(STATES)) {
  for (const takeover of [false, true]) {
    const how = takeover ? 'that would take over' : 'that would not take over'
    const free = ['free', 'released', 'expired'].includes(name)
    const state = free || (takeover && shown(name) === 'abandoned') ? 'acquired' : shown(name)
    const isPlain = ['free', 'running', 'completed'].includes(name)
    t.test(
      `acquiring a key that is ${name}, by a claim ${how}, is ${isPlain ? 'a short statement' : 'two'}`,
      async (t) => {
        const { store, second } = await open(t)
        const key = newKey()
        await prepare(second, key)
        const { result, sent } = await shared.statements(() => store.acquire(key, claim({ takeover })))
        t.equal(sent.length, isPlain ? 1 : 2, sent.join('\n\n'))
        t.match(result, { state })
      }
    )

    t.test(`acquiring a key that is ${name}, by a claim ${how} and asks for the ttl, is one statement`, async (t) => {
      const { store, second } = await open(t)
      const key = newKey()
      await prepare(second, key)
      const asked = claim({ takeover, withTtl: true })
      const { result, sent } = await shared.statements(() => store.acquire(key, asked))
      t.equal(sent.length, 1, sent.join('\n\n'))
      t.match(result, { state })
    })
  }

  t.test(`looking at a key that is ${name}, listing it, and forgetting it, is one statement each`, async (t) => {
    const { store, second } = await open(t)
    const key = newKey()
    await prepare(second, key)
    const nothing = ['free', 'released', 'expired'].includes(name)
    const looked = await shared.statements(() => store.get(key))
    t.equal(looked.sent.length, 1)
    t.equal(looked.result?.state ?? null, nothing ? null : shown(name))
    const shows = await shared.statements(() => store.list(KINDS, null))
    t.equal(shows.sent.length, 1)
    t.strictSame(
      shows.result.keys.map(({ state }) => state),
      nothing ? [] : [shown(name)]
    )
    const tried = await shared.statements(() => store.delete(key, true))
    t.equal(tried.sent.length, 1)
    t.equal(tried.result, !nothing && name !== 'running')
    const forgotten = await shared.statements(() => store.delete(key))
    t.equal(forgotten.sent.length, 1)
    t.equal(forgotten.result, name === 'running')
  })
}

for (const settlement of SETTLEMENTS) {
  const how = settlement === 'ended' ? 'as ended' : 'by a record'
  t.test(`settling ${how} is one statement, and so that nobody has it any more`, async (t) => {
    const { store, second, row } = await open(t)
    for (const prepare of [STATES.abandoned, STATES.ended]) {
      const key = newKey()
      await prepare?.(second, key)
      const before = await row(key)
      const { result, sent } = await shared.statements(() => store.settle(key, 'fingerprint', settlement))
      t.equal(result, true)
      t.equal(sent.length, 1, sent.join('\n\n'))
      const after = await row(key)
      t.not(after.token, before.token)
      t.strictSame([after.found_state, after.found_fingerprint], [null, null])
    }
  })
}

for (const [name, step] of [
  ['renewing', (store, key, token) => store.renew(key, token, LONG)],
  ['keeping a step of', (store, key, token) => store.step(key, token, ['a', 'b'])],
  ['completing', (store, key, token) => store.complete(key, token, reply(), LONG)],
  ['leaving a tombstone on', (store, key, token) => store.complete(key, token, tombstone('too-large'), null)],
  ['releasing', (store, key, token) => store.release(key, token)],
  [
    'claiming again',
    async (store, key, token) => (await store.acquire(key, claim({ token, withTtl: true }))).state === 'acquired'
  ]
] as [string, (store: PostgresStore, key: string, token: string) => Promise<boolean>][]) {
  t.test(`${name} what one holds is one statement, whether the lease has lapsed or not`, async (t) => {
    const { store } = await open(t)
    for (const prepare of [take, lapsed]) {
      const key = newKey()
      const token = await prepare(store, key)
      const { result, sent } = await shared.statements(() => step(store, key, token))
      t.equal(result, true)
      t.equal(sent.length, 1, sent.join('\n\n'))
    }
  })

  if (name === 'renewing' || name === 'claiming again') continue
  const isCompletion = name === 'completing' || name === 'leaving a tombstone on'
  t.test(
    `${name} a second time what one has held is ${isCompletion ? 'two statements' : 'one statement'}`,
    async (t) => {
      const { store } = await open(t)
      const key = newKey()
      const token = await take(store, key)
      await step(store, key, token)
      const { result, sent } = await shared.statements(() => step(store, key, token))
      t.equal(result, true)
      t.equal(sent.length, isCompletion ? 2 : 1, sent.join('\n\n'))
    }
  )
}

t.test('completing what somebody waits for is two statements', async (t) => {
  const { store, second, table, rows } = await open(t)
  const key = newKey()
  const token = await take(store, key)
  const waiter = second.changed(key, never())
  await awaited(rows, table, key)
  const { result, sent } = await shared.statements(() => store.complete(key, token, reply(), LONG))
  t.equal(result, true)
  t.equal(sent.length, 2, sent.join('\n\n'))
  await soon(waiter)
})

/* Prepared statements */

const PREPARED = "SELECT name FROM pg_prepared_statements WHERE name LIKE 'fastify-idempotency-%' ORDER BY name"

/** A key that is claimed, finished and replayed. */
async function live(t: Test, store: PostgresStore): Promise<void> {
  const key = newKey()
  const token = await take(store, key)
  t.equal(await store.renew(key, token, LONG), true)
  t.equal(await store.complete(key, token, reply(), LONG), true)
  same(t, await store.acquire(key, claim()), reply())
}

t.test('statements are prepared once on each connection, under names that are the same in all processes', async (t) => {
  const table = newTable()
  const found: unknown[] = []
  for (let process = 0; process < 2; process++) {
    const { store, pool } = await open(t, { table, pool: { max: 1 } })
    for (let n = 0; n < 3; n++) await live(t, store)
    const { rows } = await pool.query(PREPARED)
    t.equal(rows.length, 3, 'to claim, to renew, to complete')
    found.push(rows)
  }
  t.strictSame(found[0], found[1])
})

for (const [name, spoil] of Object.entries({
  'have been dropped by DISCARD ALL': (pool: Pool) => pool.query('DISCARD ALL'),
  'were prepared for a table that has been changed since': (pool: Pool, table: string) =>
    pool.query(`ALTER TABLE "${table}" ALTER COLUMN tombstone TYPE varchar(100)`)
})) {
  t.test(`statements that ${name} are repeated, and are not prepared any more`, async (t) => {
    const { store, pool, table } = await open(t, { pool: { max: 1 } })
    await live(t, store)
    await spoil(pool, table)
    for (let n = 0; n < 3; n++) await live(t, store)
    t.strictSame((await pool.query(PREPARED)).rows, [], 'the pool has let go of the connection that failed')
  })
}

t.test('statements whose names somebody else has prepared on the connection are not, as behind a pooler', async (t) => {
  const { store, pool, table } = await open(t, { pool: { max: 1 } })
  await live(t, store)
  const names = (await pool.query(PREPARED)).rows.map(({ name }) => name)
  const another = ownPool(t, { max: 1 })
  for (const name of names) await another.query(`PREPARE "${name}" AS SELECT 1`)
  const behind = new PostgresStore({ pool: another, table, sweepInterval: null })
  t.teardown(() => behind.close())
  for (let n = 0; n < 3; n++) await live(t, behind)
})

t.test('a transaction is one message to begin, one to complete, and COMMIT; telling is one more', async (t) => {
  const { store, pool } = await open(t)
  for (const wake of [false, true]) {
    const { sent } = await shared.statements(async () => {
      const transaction = await hold(store, newKey(), { wake })
      t.strictSame(await transaction.complete(reply(), LONG), { state: 'committed' })
      await until(() => pool.idleCount === pool.totalCount)
    })
    t.equal(sent.length, wake ? 4 : 3, sent.join('\n\n'))
    t.match(sent[0], /^BEGIN;/)
    t.equal(sent[2], 'COMMIT')
  }
})

t.test('a transaction that finds its key taken is one message to begin, and ROLLBACK', async (t) => {
  const { store, second, pool } = await open(t)
  for (const [name, prepare] of Object.entries(STATES)) {
    if (['free', 'released', 'expired'].includes(name)) continue
    const key = newKey()
    await prepare(second, key)
    const { result, sent } = await shared.statements(async () => {
      const found = await store.begin(key, wish())
      await until(() => pool.idleCount === pool.totalCount)
      return found
    })
    t.equal(result.state, shown(name))
    t.equal(sent.length, 2, sent.join('\n\n'))
    t.equal(sent[1], 'ROLLBACK')
  }
})

for (const [name, prepare] of Object.entries(STATES)) {
  if (['free', 'released', 'expired'].includes(name)) continue
  t.test(`whoever finds a key ${name} and leaves it so writes nothing`, async (t) => {
    const { store, second, pool, table, rows } = await open(t)
    const key = newKey()
    await prepare(second, key)
    const stored = () => rows(`SELECT ctid, xmin, xmax, * FROM "${table}"`)
    const before = await stored()
    t.equal(before.length, 1)
    const looks: [string, () => Promise<Acquisition | TransactionAcquisition | null>][] = [
      ['acquire', () => store.acquire(key, claim())],
      ['get', () => store.get(key)],
      ['begin', () => store.begin(key, wish())]
    ]
    if (shown(name) !== 'abandoned') {
      looks.push(['a takeover', () => store.acquire(key, claim({ takeover: true }))])
      looks.push(['a takeover by begin', () => store.begin(key, wish({ takeover: true }))])
    }
    for (const [what, look] of looks) {
      t.equal((await look())?.state, shown(name), what)
      await until(() => pool.idleCount === pool.totalCount)
      t.strictSame(await stored(), before, what)
    }
    t.equal(await store.renew(key, 'another', LONG), false)
    t.equal(await store.step(key, 'another', ['a', 'b']), false)
    t.equal(await store.complete(key, 'another', reply(), LONG), false)
    t.equal(await store.release(key, 'another'), false)
    t.strictSame(await stored(), before, 'nor does whoever does not own it')
    if (name === 'running') return
    await soon(store.changed(key, never()))
    t.strictSame(await stored(), before, 'nor does whoever would wait')
  })
}

t.test('completing again writes nothing', async (t) => {
  const { store, second, table, rows } = await open(t)
  const key = newKey()
  const token = await take(store, key)
  await store.complete(key, token, reply(), LONG)
  const stored = () => rows(`SELECT ctid, xmin, xmax, * FROM "${table}"`)
  const before = await stored()
  t.equal(await second.complete(key, token, tombstone('too-large'), null), true)
  t.strictSame(await stored(), before)
})

/* Wake-ups */

t.test('nothing is told when nobody waits', async (t) => {
  const { store, second } = await open(t)
  const heard = await hear(t)
  const [completed, released, forgotten] = [newKey(), newKey(), newKey()]
  await finish(store, completed)
  await store.release(released, await take(store, released))
  await take(store, forgotten)
  await store.delete(forgotten)
  await store.delete(completed)
  const key = newKey()
  await lapsed(store, key)
  const heir = claim({ takeover: true })
  await second.acquire(key, heir)
  await second.renew(key, heir.token, LONG)
  await second.complete(key, heir.token, tombstone('hijacked'), null)
  await soon(second.changed(key, never()))
  t.strictSame(await heard(), [])
})

t.test('nothing is told of a transaction when nobody is to be told', async (t) => {
  const { store, pool } = await open(t)
  const heard = await hear(t)
  await (await hold(store, newKey())).complete(reply(), LONG)
  await (await hold(store, newKey())).rollback()
  await until(() => pool.idleCount === pool.totalCount)
  t.strictSame(await heard(), [])
})

for (const [name, end] of [
  ['completion', (store, key, token) => store.complete(key, token, reply(), LONG)],
  ['release', (store, key, token) => store.release(key, token)],
  ['deletion', (store, key) => store.delete(key)]
] as [string, (store: PostgresStore, key: string, token: string) => Promise<boolean>][]) {
  t.test(`a ${name} is told once, however many wait, by a hash of the key`, async (t) => {
    const { store, second, pool, other, table, rows } = await open(t)
    const heard = await hear(t)
    const key = newKey()
    const token = await take(store, key)
    const waiters = [store, second, second].map((each) => each.changed(key, never()))
    await awaited(rows, table, key)
    t.strictSame(await heard(), [], 'nothing before')
    t.equal(await end(store, key, token), true)
    t.strictSame(await heard(), [sha256(key)])
    await soon(Promise.all(waiters))
    // Who was woken early has perhaps not noted yet that it waits.
    await until(() => [pool, other].every(({ idleCount, totalCount }) => idleCount === totalCount))
    const next = await take(store, newKey())
    t.equal(await store.complete(key, next, reply(), LONG), false)
    if (name !== 'completion') {
      t.equal(await store.complete(key, await take(store, key), reply(), LONG), true)
      t.strictSame(await heard(), [], 'and nothing of the next claim, for which nobody has waited yet')
    } else {
      t.equal(await end(store, key, token), true)
      t.strictSame(await heard(), [], 'and nothing of its repetition')
    }
  })
}

t.test('who waits for a claim that lapses, and is settled, is told', async (t) => {
  const { store, second, table, rows } = await open(t)
  const heard = await hear(t)
  for (const settlement of SETTLEMENTS) {
    const key = newKey()
    await take(store, key)
    const waiter = second.changed(key, never())
    await awaited(rows, table, key)
    await rows(`UPDATE "${table}" SET lease_end = clock_timestamp() WHERE key = $1`, [key])
    t.equal(await store.settle(key, 'fingerprint', settlement), true)
    await soon(waiter)
    t.strictSame(await heard(), [sha256(key)])
  }
})

t.test('who waits for a claim that is taken over is told of the end of the takeover', async (t) => {
  const { store, second, table, rows } = await open(t)
  const heard = await hear(t)
  const key = newKey()
  await take(store, key)
  const waiter = second.changed(key, never())
  await awaited(rows, table, key)
  await rows(`UPDATE "${table}" SET lease_end = clock_timestamp() WHERE key = $1`, [key])
  const heir = claim({ takeover: true })
  t.strictSame(await store.acquire(key, heir), { state: 'acquired', attempt: 2 })
  t.strictSame(await heard(), [])
  await store.complete(key, heir.token, reply(), LONG)
  t.strictSame(await heard(), [sha256(key)])
  await soon(waiter)
})

for (const [name, end] of [
  ['commit', async (transaction) => void (await transaction.complete(reply(), LONG))],
  ['rollback', (transaction) => transaction.rollback()]
] as [string, (transaction: ClaimTransaction) => Promise<void>][]) {
  t.test(`a ${name} is told once, after it has happened, when somebody is to be told`, async (t) => {
    const { store, second, pool, rows } = await open(t)
    const heard = await hear(t)
    const key = newKey()
    const transaction = await hold(store, key, { wake: true })
    const found: string[] = []
    const waiters = [store, second].map(async (each) => {
      await each.changed(key, never())
      found.push((await each.get(key))?.state ?? 'free')
    })
    await until(async () => (await listeners(rows)) >= 3)
    await sleep(20)
    t.strictSame(await heard(), [])
    await end(transaction)
    await soon(Promise.all(waiters))
    const state = name === 'commit' ? 'completed' : 'free'
    t.strictSame(found, [state, state])
    await until(() => pool.idleCount === pool.totalCount)
    t.strictSame(await heard(), [sha256(key)])
  })
}

t.test('a transaction that finds its key taken tells nobody, because nothing is over', async (t) => {
  const { store, second, other } = await open(t)
  const heard = await hear(t)
  const [open_, running, completed] = [newKey(), newKey(), newKey()]
  const transaction = await hold(store, open_, { wake: true })
  await take(store, running)
  await finish(store, completed)
  for (const key of [open_, running, completed]) {
    t.not((await second.begin(key, wish({ wake: true }))).state, 'acquired')
  }
  await until(() => other.idleCount === other.totalCount)
  t.strictSame(await heard(), [])
  await transaction.rollback()
})

t.test('however many keys are waited for, there is one more connection, which is not of the pool', async (t) => {
  const server = await ownServer(t)
  const { store, second, pool, table, rows } = await open(t, { server, pool: { max: 1 } })
  const keys = Array.from({ length: 50 }, newKey)
  const tokens: string[] = []
  for (const key of keys) tokens.push(await take(second, key))
  t.equal(await listeners(rows), 0, 'none when nobody has waited')
  const { result: waiters, sent } = await server.statements(async () => {
    const waiters = [...keys, ...keys].map((key) => store.changed(key, never()))
    for (const key of keys) await awaited(rows, table, key)
    return waiters
  })
  t.equal(sent.filter((statement) => /^LISTEN/i.test(statement)).length, 1)
  t.equal(await listeners(rows), 1)
  t.equal(pool.totalCount, 1)
  await until(() => pool.idleCount === 1, { message: 'the connection of the pool, to work with' })
  t.strictSame(await store.acquire(newKey(), claim()), { state: 'acquired', attempt: 1 })
  for (const [n, key] of keys.entries()) await second.complete(key, tokens[n] as string, reply(), LONG)
  await soon(Promise.all(waiters))
  t.equal(await listeners(rows), 1, 'kept for those to come')
  await store.close()
  await until(async () => (await listeners(rows)) === 0)
})

t.test('a store that nobody waits on has no connection of its own', async (t) => {
  const server = await ownServer(t)
  const { store, rows } = await open(t, { server })
  const key = newKey()
  await finish(store, key)
  await store.acquire(key, claim())
  await soon(store.changed(key, AbortSignal.abort()))
  t.equal(await listeners(rows), 0)
})

t.test('when the listening connection is cut everybody wakes, and the next who waits hears again', async (t) => {
  const server = await ownServer(t)
  const { store, second, table, rows } = await open(t, { server })
  for (let round = 0; round < 3; round++) {
    const keys = [newKey(), newKey(), newKey()]
    for (const key of keys) await take(store, key)
    const waiters = keys.map((key) => store.changed(key, never()))
    for (const key of keys) await awaited(rows, table, key)
    t.equal(await terminateListeners(rows), 1)
    await soon(Promise.all(waiters), 'the waiters to wake')

    const key = newKey()
    const token = await take(store, key)
    const heard = store.changed(key, never())
    await awaited(rows, table, key)
    t.equal(await listeners(rows), 1)
    await second.complete(key, token, reply(), LONG)
    await soon(heard, 'the completion to be heard')
  }
})

t.test('who waits for a transaction wakes when the listening connection is cut', async (t) => {
  const server = await ownServer(t)
  const { store, second, rows } = await open(t, { server })
  const key = newKey()
  const transaction = await hold(store, key)
  const waiter = second.changed(key, never())
  await until(async () => (await listeners(rows)) === 1)
  await terminateListeners(rows)
  await soon(waiter)
  await transaction.rollback()
})

t.test('when the server goes down everybody wakes', async (t) => {
  const server = await ownServer(t)
  const { store, table, rows } = await open(t, { server })
  const key = newKey()
  await take(store, key)
  const waiter = store.changed(key, never())
  await awaited(rows, table, key)
  await server.stop()
  t.match(await soon(outcome(waiter)), /^resolved|^rejected/)
})

t.test('changed rejects while the server is down', async (t) => {
  const server = await ownServer(t)
  const { store } = await open(t, { server })
  await server.stop()
  for (let n = 0; n < 3; n++) t.match(await soon(outcome(store.changed(newKey(), never()))), /^rejected/)
})

t.test('changed hears again when the server is back', async (t) => {
  const server = await ownServer(t)
  const { store, second, table, rows } = await open(t, { server })
  const key = newKey()
  const token = await take(store, key)
  const waiter = outcome(store.changed(key, never()))
  await awaited(rows, table, key)
  await server.stop()
  await soon(waiter)
  await outcome(store.changed(key, never()))
  await server.start()
  await rows(`UPDATE "${table}" SET waiting = false`)
  const stop = new AbortController()
  let heard = false
  const waiting = until(() => outcome(store.changed(key, stop.signal)).then((end) => end === 'resolved')).then(() => {
    heard = true
  })
  await awaited(rows, table, key)
  t.notOk(heard)
  await second.complete(key, token, reply(), LONG)
  await soon(waiting)
})

t.test('a connection that cannot be opened is not tried by each who waits', async (t) => {
  const server = await ownServer(t)
  const { store } = await open(t, { server })
  await server.stop()
  let opened = 0
  const { pool } = await open(t)
  const Client = (pool as unknown as { Client: new (options: object) => object }).Client
  class Counted extends Client {
    constructor(options: object) {
      super(options)
      opened++
    }
  }
  const down = ownPool(t, {}, server)
  Object.assign(down, { Client: Counted })
  const counted = new PostgresStore({ pool: down, sweepInterval: null })
  await Promise.all(Array.from({ length: 20 }, () => outcome(counted.changed(newKey(), never()))))
  const pooled = opened - 1
  t.ok(pooled >= 0 && pooled <= 20, `one to listen, and ${pooled} of the pool`)
  const before = opened
  for (let n = 0; n < 5; n++) await outcome(counted.changed(newKey(), never()))
  t.equal(opened, before)
  await Promise.all([counted.close(), store.close()])
})

t.test('waiting ends when the signal aborts, also before the connection listens', async (t) => {
  const { store, table, rows } = await open(t)
  const key = newKey()
  await take(store, key)
  const early = new AbortController()
  const first = store.changed(key, early.signal)
  early.abort()
  await soon(first)
  const late = new AbortController()
  const second = store.changed(key, late.signal)
  await awaited(rows, table, key)
  late.abort()
  await soon(second)
})

t.test('waiting with a signal that has aborted sends nothing', async (t) => {
  const { store } = await open(t)
  const { sent } = await shared.statements(() => store.changed(newKey(), AbortSignal.abort()))
  t.strictSame(sent, [])
})

/* Closing */

t.test('close ends the listening connection and nothing else, and the store works again afterwards', async (t) => {
  const server = await ownServer(t)
  const { store, second, pool, table, rows } = await open(t, { server })
  for (let round = 0; round < 3; round++) {
    const key = newKey()
    const token = await take(store, key)
    const waiter = store.changed(key, never())
    await awaited(rows, table, key)
    t.equal(await listeners(rows), 1)
    await store.close()
    await soon(waiter, 'who waits on a closed store')
    await until(async () => (await listeners(rows)) === 0, { message: 'the connection to end' })
    t.notOk(pool.ended)
    t.match(await store.acquire(key, claim()), { state: 'running' })
    const again = store.changed(key, never())
    await until(async () => (await listeners(rows)) === 1)
    await second.complete(key, token, reply(), LONG)
    await soon(again)
  }
})

t.test('closing a store that was not used, twice, or while it connects, is no error', async (t) => {
  const server = await ownServer(t)
  const { store, second, table, rows } = await open(t, { server })
  await store.close()
  await Promise.all([store.close(), store.close()])
  const key = newKey()
  const token = await take(second, key)
  const waiter = outcome(store.changed(key, never()))
  await store.close()
  await soon(waiter)
  const heard = store.changed(key, never())
  await awaited(rows, table, key)
  await second.complete(key, token, reply(), LONG)
  await soon(heard)
  await store.close()
  await until(async () => (await listeners(rows)) === 0)
})

t.test('closing a store whose server is gone is no error', async (t) => {
  const server = await ownServer(t)
  const { store, table, rows } = await open(t, { server, sweepInterval: 1 })
  const key = newKey()
  await take(store, key)
  const waiter = outcome(store.changed(key, never()))
  await awaited(rows, table, key)
  await server.kill()
  await soon(store.close())
  await soon(waiter)
})

/* Sweeping */

/** Rows that have expired, and such as have not. */
async function fill(rows: Rows, table: string, expired: number): Promise<void> {
  await rows(`
    INSERT INTO "${table}" (key, token, fingerprint, attempt, state, lease_end, retain_ms, expires_at)
    SELECT 'expired ' || n, 'token', '', 1, (ARRAY['running', 'completed', 'released'])[n % 3 + 1],
      now() - interval '2 hours', 0, now() - n * interval '1 second'
    FROM generate_series(1, ${expired}) AS n`)
}

const left = async (rows: Rows, table: string): Promise<number> =>
  Number((await rows(`SELECT count(*) FROM "${table}" WHERE key LIKE 'expired %'`))[0]?.count)

/** How many rows each statement deleted that deleted any. */
async function batches(rows: Rows, table: string): Promise<() => Promise<number[]>> {
  const name = `gone_${randomUUID().replaceAll('-', '')}`
  await rows(`CREATE TABLE ${name} (at serial, deleted bigint)`)
  await rows(`
    CREATE FUNCTION ${name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO ${name} (deleted) SELECT count(*) FROM old_rows HAVING count(*) > 0;
      RETURN NULL;
    END $$`)
  await rows(`
    CREATE TRIGGER ${name} AFTER DELETE ON "${table}" REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION ${name}()`)
  return async () => (await rows(`SELECT deleted FROM ${name} ORDER BY at`)).map(({ deleted }) => Number(deleted))
}

/** Sweeps get stuck at their first row until `release` is called. */
async function stickSweeps(t: Test, rows: Rows, table: string) {
  const name = `stuck_${randomUUID().replaceAll('-', '')}`
  const lock = Math.floor(Math.random() * 2 ** 31)
  const holder = await admin.connect()
  t.teardown(() => holder.release(true))
  await holder.query('SELECT pg_advisory_lock($1)', [lock])
  await rows(`
    CREATE FUNCTION ${name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      PERFORM pg_advisory_xact_lock_shared(${lock});
      RETURN OLD;
    END $$`)
  await rows(`CREATE TRIGGER ${name} BEFORE DELETE ON "${table}" FOR EACH ROW EXECUTE FUNCTION ${name}()`)
  return {
    stuck: async () =>
      (await rows("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = $1", [lock])).length,
    release: () => holder.query('SELECT pg_advisory_unlock($1)', [lock])
  }
}

/** How many sweeps of a pool have ended, and how. */
function watchSweeps(pool: Pool): { done: number; failed: number } {
  const sweeps = { done: 0, failed: 0 }
  const query = pool.query.bind(pool) as (config: { text: string }) => Promise<unknown>
  pool.query = (async (config: { text: string }) => {
    const sweep = /DELETE FROM .* USING/.test(config.text)
    try {
      const result = await query(config)
      if (sweep) sweeps.done++
      return result
    } catch (error) {
      if (sweep) sweeps.failed++
      throw error
    }
  }) as never
  return sweeps
}

t.test('expired rows are deleted in batches of 500 at most, and what has not expired stays', async (t) => {
  const { store, pool, table, rows } = await open(t, { sweepInterval: 10 })
  const sweeps = watchSweeps(pool)
  await fill(rows, table, 1_300)
  const [live, forever, running, abandoned, released] = [newKey(), newKey(), newKey(), newKey(), newKey()]
  const gone = await batches(rows, table)
  await store.acquire(running, claim())
  await finish(store, live)
  await store.complete(forever, await take(store, forever), reply(), null)
  await lapsed(store, abandoned)
  await store.release(released, await take(store, released))
  const transaction = await hold(store, newKey())
  await until(async () => (await left(rows, table)) === 0, { message: 'the expired rows to go' })
  const { done } = sweeps
  await until(() => sweeps.done > done + 2, { message: 'some rounds more' })
  t.strictSame(await gone(), [500, 500, 300])
  t.strictSame(
    (await rows(`SELECT key FROM "${table}"`)).map(({ key }) => key).sort(),
    [live, forever, running, abandoned, released].sort()
  )
  t.strictSame(await transaction.complete(reply(), LONG), { state: 'committed' }, 'nor does a transaction notice')
})

t.test('a round goes on until nothing is left to delete', async (t) => {
  const { setTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout }))
  let rounds = 0
  Object.assign(globalThis, {
    // The first pause is over at once, and the others never.
    setTimeout: (callback: () => void, ms: number) => setTimeout(callback, ms > 1e8 && rounds++ === 0 ? 0 : ms)
  })
  const { store, table, rows } = await open(t, { sweepInterval: 1e9 })
  await fill(rows, table, 1_300)
  await store.acquire(newKey(), claim())
  await until(async () => (await left(rows, table)) === 0)
  await until(() => rounds === 2, { message: 'the end of the round' })
})

t.test('what expires is deleted when its time has come: records, forgotten claims and releases', async (t) => {
  const { store, table, rows } = await open(t, { sweepInterval: 5 })
  await store.complete(newKey(), await take(store, newKey()), reply(), 1)
  const key = newKey()
  await store.complete(key, await take(store, key), reply(), 50)
  await take(store, newKey(), { leaseMs: 1, retainMs: 50 })
  const [kept, released] = [newKey(), newKey()]
  await take(store, kept)
  await store.release(released, await take(store, released))
  await rows(`UPDATE "${table}" SET expires_at = clock_timestamp() + interval '50 ms' WHERE key = $1`, [released])
  await until(async () => {
    const found = (await rows(`SELECT key, retain_ms FROM "${table}"`)).filter(({ retain_ms }) => retain_ms < LONG)
    return found.length === 0 && (await store.get(key)) === null
  })
  await until(async () => (await rows(`SELECT FROM "${table}" WHERE key = ANY ($1)`, [[key, released]])).length === 0)
  t.match(await store.get(kept), { state: 'running' })
})

t.test('a transaction starts the sweeping as well', async (t) => {
  const { store, table, rows } = await open(t, { sweepInterval: 5 })
  await fill(rows, table, 3)
  await (await hold(store, newKey())).rollback()
  await until(async () => (await left(rows, table)) === 0)
})

t.test('of two stores one at a time sweeps, and the other does not wait', async (t) => {
  const { store, second, pool, other, table, rows } = await open(t, { sweepInterval: 5 })
  const sweeps = [watchSweeps(pool), watchSweeps(other)] as const
  await fill(rows, table, 1_300)
  const gone = await batches(rows, table)
  const { stuck, release } = await stickSweeps(t, rows, table)
  await store.acquire(newKey(), claim())
  await second.acquire(newKey(), claim())
  await until(async () => (await stuck()) > 0, { message: 'a sweep' })
  await until(() => sweeps[0].done + sweeps[1].done >= 3, { message: 'the other store to have its turns' })
  t.equal(await stuck(), 1)
  t.ok(sweeps[0].done === 0 || sweeps[1].done === 0, 'and the one that is at it does not begin again')
  t.equal(await left(rows, table), 1_300)
  await release()
  await until(async () => (await left(rows, table)) === 0, { message: 'the expired rows to go' })
  const counts = await gone()
  t.equal(
    counts.reduce((sum, count) => sum + count),
    1_300
  )
  t.ok(counts.every((count) => count <= 500))
})

t.test('while one table is swept, others are as well', async (t) => {
  const [one, other] = [await open(t, { sweepInterval: 5 }), await open(t, { sweepInterval: 5 })]
  for (const { rows, table } of [one, other]) await fill(rows, table, 10)
  const { stuck, release } = await stickSweeps(t, one.rows, one.table)
  await one.store.acquire(newKey(), claim())
  await until(async () => (await stuck()) === 1, { message: 'a sweep' })
  await other.store.acquire(newKey(), claim())
  await until(async () => (await left(other.rows, other.table)) === 0)
  t.equal(await stuck(), 1)
  await release()
  await until(async () => (await left(one.rows, one.table)) === 0)
})

t.test('a row that somebody has locked is left for later, and not waited for', async (t) => {
  const { store, table, rows } = await open(t, { sweepInterval: 5 })
  await fill(rows, table, 20)
  const holder = await admin.connect()
  t.teardown(() => holder.release(true))
  await holder.query('BEGIN')
  await holder.query(`SELECT FROM "${table}" WHERE key = 'expired 7' FOR UPDATE`)
  await store.acquire(newKey(), claim())
  await until(async () => (await left(rows, table)) === 1, { message: 'the other rows to go' })
  t.match(await rows(`SELECT key FROM "${table}" WHERE key LIKE 'expired %'`), [{ key: 'expired 7' }])
  await holder.query('ROLLBACK')
  await until(async () => (await left(rows, table)) === 0, { message: 'the last row to go' })
})

t.test('an expired row that a transaction is taking over is not deleted', async (t) => {
  const { store, second, pool, table, rows, row } = await open(t, { sweepInterval: 5 })
  const sweeps = watchSweeps(pool)
  await fill(rows, table, 5)
  const key = newKey()
  await expired(second, key)
  const transaction = await hold(second, key)
  await store.acquire(newKey(), claim())
  await until(() => sweeps.done >= 3)
  t.strictSame(await transaction.complete(reply({ fingerprint: 'new' }), LONG), { state: 'committed' })
  const { done } = sweeps
  await until(() => sweeps.done >= done + 3)
  t.equal((await row(key))?.fingerprint, 'new')
})

t.test('without an interval nothing is ever deleted', async (t) => {
  const { store, table, rows } = await open(t, { sweepInterval: null })
  await fill(rows, table, 3)
  const { sent } = await shared.statements(async () => {
    const key = newKey()
    await finish(store, key)
    await (await hold(store, newKey())).rollback()
    await sleep(30)
  })
  t.notOk(sent.some((statement) => /DELETE/i.test(statement)))
  t.equal(await left(rows, table), 3)
})

t.test('sweeping goes on after an error, which nobody hears of', async (t) => {
  const { store, pool, table, rows } = await open(t, { sweepInterval: 5 })
  const sweeps = watchSweeps(pool)
  await store.acquire(newKey(), claim())
  await until(() => sweeps.done > 0)
  await rows(`ALTER TABLE "${table}" RENAME TO "${table}_away"`)
  await until(() => sweeps.failed >= 2)
  await rows(`ALTER TABLE "${table}_away" RENAME TO "${table}"`)
  await fill(rows, table, 3)
  await until(async () => (await left(rows, table)) === 0)
})

t.test('close stops the sweeping, and the next claim starts it again', async (t) => {
  const { store, pool, table, rows } = await open(t, { sweepInterval: 1 })
  const sweeps = watchSweeps(pool)
  for (let round = 0; round < 2; round++) {
    await store.acquire(newKey(), claim())
    await until(() => sweeps.done > 0)
    await store.close()
    await fill(rows, table, 3)
    sweeps.done = 0
    await store.get(newKey())
    await sleep(20)
    t.equal(sweeps.done, 0)
    t.equal(await left(rows, table), 3)
    await store.acquire(newKey(), claim())
    await until(async () => (await left(rows, table)) === 0)
  }
})

/* What the application has set for itself */

const RICH = reply({
  fingerprint: 'ü:\\0"\'\0',
  createdAt: 1_763_012_345_678,
  headers: [
    ['x-text', 'ü 🚲 "quoted" \'single\' \\ \\x \0 \n'],
    ['x-list', ['a\\', "'b'"]]
  ],
  body: Buffer.from(Array.from({ length: 256 }, (_, byte) => byte)),
  text: false
})

const parsers = { getTypeParser: () => () => 'spoilt' } as never
for (const [name, pool] of [
  ['type parsers', { types: parsers }],
  ['bytea_output', { options: '-c bytea_output=escape' }],
  ['more digits', { options: '-c extra_float_digits=3' }],
  ['no extra digits', { options: '-c extra_float_digits=0' }],
  ['fewer digits', { options: '-c extra_float_digits=-15' }],
  ['dates', { options: '-c DateStyle=German -c TimeZone=Asia/Kathmandu -c IntervalStyle=sql_standard' }],
  ['dates before Christ', { options: '-c DateStyle=SQL,DMY -c TimeZone=America/St_Johns -c IntervalStyle=iso_8601' }],
  ['literals with backslashes', { options: '-c standard_conforming_strings=off -c escape_string_warning=on' }],
  ['plans', { options: '-c plan_cache_mode=force_generic_plan -c enable_indexscan=off -c enable_bitmapscan=off' }],
  ['timeouts', { options: '-c lock_timeout=5000 -c statement_timeout=5000 -c idle_in_transaction_session_timeout=1' }],
  ['read-only transactions that are deferrable', { options: '-c default_transaction_deferrable=on' }]
] as [string, PoolConfig][]) {
  t.test(`the application's own settings do not matter: ${name}`, async (t) => {
    const { store, second, table, rows } = await open(t, { pool })
    const key = newKey()
    const mine = claim({ fingerprint: RICH.fingerprint })
    t.strictSame(await store.acquire(key, mine), { state: 'acquired', attempt: 1 })
    const running = await second.acquire(key, claim())
    t.match(running, { state: 'running', fingerprint: RICH.fingerprint })
    const { leaseMs } = running as { leaseMs: number }
    t.ok(leaseMs > LONG / 2 && leaseMs <= LONG, `${leaseMs} ms are left`)
    t.equal(await store.renew(key, mine.token, LONG), true)
    const heard = second.changed(key, never())
    await awaited(rows, table, key)
    t.equal(await store.complete(key, mine.token, RICH, LONG), true)
    await soon(heard)
    same(t, await second.acquire(key, claim()), RICH)
    const found = await second.get(key)
    same(t, found, RICH)
    const { ttlMs } = found as { ttlMs: number }
    t.ok(ttlMs > LONG / 2 && ttlMs <= LONG, `${ttlMs} ms are left`)
    t.equal(await second.delete(key), true)
    t.equal(await second.delete(key), false)
    const dead = newKey()
    await lapsed(store, dead, { fingerprint: RICH.fingerprint })
    t.equal(await second.settle(dead, RICH.fingerprint, 'ended'), true)
    const [shows] = await listed(second)
    t.match(shows, { key: dead, state: 'abandoned', ended: true, fingerprint: RICH.fingerprint })
    const { lapsedMs } = shows as { lapsedMs: number }
    t.ok(lapsedMs < LONG, `settled ${lapsedMs} ms ago`)
    t.strictSame(await second.acquire(dead, claim({ takeover: true })), { state: 'acquired', attempt: 2 })

    const hostile = `k\\'"\0${newKey()}`
    const found2 = await store.begin(hostile, wish({ fingerprint: RICH.fingerprint, token: "t\\'\0" }))
    t.equal((found2 as { attempt?: number }).attempt, 1)
    const transaction = held(found2)
    t.match(await second.get(hostile), { state: 'running' })
    t.match(await second.begin(hostile, wish()), { state: 'running', fingerprint: '' })
    t.strictSame(await transaction.complete(RICH, null), { state: 'committed' })
    const kept = await second.begin(hostile, wish())
    same(t, kept as Acquisition, RICH)
    t.equal((kept as { ttlMs: unknown }).ttlMs, null)
  })
}

t.test('a table is found by the search path, as everywhere', async (t) => {
  const [schema, table] = [`tenant_${newTable()}`, newTable()]
  await admin.query(`CREATE SCHEMA "${schema}"`)
  const { store, second } = await open2(t, table, `${schema}.${table}`, { options: `-c search_path=${schema}` })
  await store.createTable()
  const key = newKey()
  await finish(store, key)
  const { rows } = await admin.query(`SELECT key FROM "${schema}"."${table}"`)
  t.strictSame(rows, [{ key }])
  same(t, await second.acquire(key, claim()), reply())
})

t.test("two spellings of one table see each other's claims and transactions", async (t) => {
  const table = newTable()
  const { store, second } = await open2(t, table, `public.${table}`)
  await store.createTable()
  await second.createTable()
  for (const [one, other] of [
    [store, second],
    [second, store]
  ] as const) {
    const key = newKey()
    const transaction = await hold(one, key, { wake: true })
    const running = { state: 'running', fingerprint: '' }
    t.match(await other.begin(key, wish()), running)
    t.match(await other.acquire(key, claim()), running)
    t.match(await other.get(key), running)
    t.equal(await other.delete(key), false)
    const waiter = other.changed(key, never())
    await transaction.complete(reply(), LONG)
    await soon(waiter)
    same(t, await other.acquire(key, claim()), reply())
  }
})

/* Pages */

/** Puts rows into the table, with keys in the order of their numbers, and others around them. */
const insert = (rows: Rows, table: string, count: number, state = 'running') =>
  rows(
    `INSERT INTO "${table}" (key, token, fingerprint, attempt, state, lease_end, retain_ms, expires_at)
      SELECT to_char(n, 'FM0000000'), 'token', 'fingerprint', 1, $2, 'now'::timestamptz + '1 hour', 1000,
        'now'::timestamptz + '2 hours'
      FROM generate_series(1, $1) AS n`,
    [count, state]
  )

t.test('a page looks at 500 rows, in the order of their keys, and may have none', async (t) => {
  const { store, table, rows } = await open(t)
  await insert(rows, table, 1_200)
  await rows(`UPDATE "${table}" SET state = 'released' WHERE key <= '0000600'`)
  await rows(`UPDATE "${table}" SET state = 'ended' WHERE key = '0000700'`)
  const pages: string[][] = []
  let cursor: string | null = null
  do {
    const page: ListedPage = await store.list(['running'], cursor)
    pages.push(page.keys.map(({ key }) => key))
    cursor = page.cursor
  } while (cursor !== null)
  t.same(
    pages.map((keys) => [keys.length, keys[0], keys.at(-1)]),
    [
      [0, undefined, undefined],
      [399, '0000601', '0001000'],
      [200, '0001001', '0001200']
    ]
  )
  t.strictSame(await store.list(['abandoned'], '0000500'), {
    keys: [{ key: '0000700', state: 'abandoned', fingerprint: 'fingerprint', attempt: 1, ended: true, lapsedMs: 0 }],
    cursor: '0001000'
  })
})

t.test('a table without rows is a page without keys, and keys of any text are on one', async (t) => {
  const { store } = await open(t)
  t.strictSame(await store.list(KINDS, null), { keys: [], cursor: null })
  const keys = ['', '\0', ' ', 'A', '\\', 'a', 'a\0', 'ä', '😀']
  for (const key of keys) await finish(store, key)
  await finish(store, 'l'.repeat(501))
  t.strictSame(new Set(await listedKeys(store)), new Set(keys), 'but for one that is too long to be kept')
  t.equal((await store.list(KINDS, '')).keys.length, keys.length - 1, 'a page begins behind its cursor')
})

t.test('a page is found by the primary key, and reads no more than its rows, and no bodies', async (t) => {
  const { store, pool, table, rows, operator } = await open(t)
  await insert(rows, table, 10_000, 'completed')
  await rows(`UPDATE "${table}" SET status_code = 201, created_at = 1, headers = '[]', body = 'x', body_is_text = true`)
  await rows(`VACUUM ANALYZE "${table}"`)
  const { sent } = await shared.statements(() => store.list(KINDS, null))
  const client = await operator.connect()
  t.teardown(() => client.release(true))
  await client.query(`PREPARE page (text, text[]) AS ${sent[0]}`)
  for (const mode of ['force_generic_plan', 'force_custom_plan']) {
    await client.query(`SET plan_cache_mode = ${mode}`)
    for (const cursor of ['NULL', "'0005000'"]) {
      const explained = await client.query(
        `EXPLAIN (ANALYZE, VERBOSE, FORMAT JSON) EXECUTE page (${cursor}, '{reply,tombstone}')`
      )
      const scans = nodesOf(explained.rows[0]['QUERY PLAN'][0].Plan).filter((node) => node['Relation Name'] === table)
      t.match(scans, [{ 'Index Name': `${table}_pkey`, 'Index Cond': /key/, 'Actual Rows': 500 }], `${mode}, ${cursor}`)
      t.equal(scans.length, 1)
    }
  }
  t.equal((await store.list(['reply'], '0005000')).keys.length, 500)
  t.notMatch(JSON.stringify((await pool.query(sent[0] as string, [null, KINDS])).fields), /body|headers|steps/)
})

interface PlanNode {
  Plans?: PlanNode[]
  [property: string]: unknown
}

function nodesOf(node: PlanNode): PlanNode[] {
  return [node, ...(node.Plans ?? []).flatMap(nodesOf)]
}

/* Rows that are not ours */

for (const [what, changes] of [
  ['a status that is none', 'status_code = 42'],
  ['a status of four digits', 'status_code = 1000'],
  ['a negative status', 'status_code = -200'],
  ['no status', 'status_code = NULL'],
  ['headers that are an object', "headers = '{}'"],
  ['headers that are a string', `headers = '"a"'`],
  ['headers that are null', "headers = 'null'"],
  ['no headers', 'headers = NULL'],
  ['a header without a value', `headers = '[["a"]]'`],
  ['a header of three', `headers = '[["a", "b", "c"]]'`],
  ['a header whose name is a number', `headers = '[[1, "b"]]'`],
  ['a header whose value is a number', `headers = '[["a", 1]]'`],
  ['a header whose values are numbers', `headers = '[["a", ["b", 1]]]'`],
  ['a header that is a string', `headers = '["ab"]'`],
  ['no body', 'body = NULL'],
  ['a body of unknown kind', 'body_is_text = NULL'],
  ['a tombstone for no reason', "tombstone = 'x'"],
  ['a tombstone for an empty reason', "tombstone = ''"],
  ['no date', 'created_at = NULL'],
  ['a date that is none', "created_at = 'NaN'"],
  ['nothing', 'status_code = NULL, headers = NULL, body = NULL, body_is_text = NULL']
] as const) {
  t.test(`a record with ${what} is an error, never a wrong record`, async (t) => {
    const { store, second, pool, table, rows } = await open(t)
    const [key, other] = [newKey(), newKey()]
    await finish(store, key)
    await finish(store, other)
    await rows(`UPDATE "${table}" SET ${changes} WHERE key = $1`, [key])
    const stored = () => rows(`SELECT ctid, xmax, * FROM "${table}" WHERE key = $1`, [key])
    const before = await stored()
    const error = { message: UNDECODABLE }
    await t.rejects(store.acquire(key, claim()), error)
    await t.rejects(store.acquire(key, claim({ takeover: true })), error)
    await t.rejects(store.get(key), error)
    await t.rejects(store.begin(key, wish({ takeover: true })), error)
    t.strictSame(await listedKeys(store), [other], 'it is not listed, and the rest is')
    t.equal(await store.renew(key, 'token', LONG), false)
    t.equal(await store.complete(key, 'token', reply(), LONG), false)
    t.equal(await store.release(key, 'token'), false)
    await soon(store.changed(key, never()))
    t.strictSame(await stored(), before, 'it is left as it is')
    same(t, await second.acquire(other, claim()), reply())
    await until(() => pool.idleCount === pool.totalCount, { message: 'the clients to be back' })
    t.equal(await store.delete(key), true, 'and can be deleted')
    t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
  })
}

for (const [what, changes] of [
  ['no attempt', 'attempt = 0'],
  ['an attempt below zero', 'attempt = -1'],
  ['no time for which it is remembered', "retain_ms = 'NaN'"],
  ['an endless time for which it is remembered', "retain_ms = 'Infinity'"],
  ['no end at all', "expires_at = 'infinity'"]
] as const) {
  t.test(`what was given back, with ${what}, is an error, and is not listed`, async (t) => {
    const { store, table, rows } = await open(t)
    const [key, other] = [newKey(), newKey()]
    for (const each of [key, other]) await STATES.ended?.(store, each)
    await rows(`UPDATE "${table}" SET ${changes} WHERE key = $1`, [key])
    await t.rejects(store.get(key), { isFree: false, message: UNDECODABLE })
    t.strictSame(await listedKeys(store), [other])
  })
}

for (const [what, steps] of [
  ['no text of ours', 'x'],
  ['no JSON', 'x\n'],
  ['an object', '{}\n'],
  ['a name alone', '["a"]\n'],
  ['three of something', '["a","b","c"]\n'],
  ['a result that is no text', '["a",{}]\n'],
  ['one that is not whole', '["a","b"]\n["c","d'],
  ['an empty line', '["a","b"]\n\n']
] as const) {
  t.test(`a claim whose steps are ${what} is an error, never a wrong step`, async (t) => {
    const { store, table, rows } = await open(t)
    for (const bring of [take, lapsed]) {
      const key = newKey()
      const token = await bring(store, key)
      await rows(`UPDATE "${table}" SET steps = $2 WHERE key = $1`, [key, steps])
      const error = { isFree: false, message: UNDECODABLE }
      await t.rejects(store.get(key), error)
      await t.rejects(store.acquire(key, claim()), error)
      await t.rejects(store.begin(key, wish()), error)
      await t.rejects(store.acquire(key, claim({ token })), error, 'also of its own token')
      t.equal(await store.complete(key, token, reply(), LONG), true, 'the owner can complete it')
      same(t, await store.acquire(key, claim()), reply())
    }
  })
}

for (const [became, changes] of [
  ...['paused', 'RUNNING', 'acquired', 'locked', 'unknown', ''].map((state) => [
    `the state "${state}"`,
    `state = '${state}'`
  ]),
  ...[0, 2, -1].map((version) => [`the version ${version}`, `version = ${version}`])
] as [became: string, changes: string][]) {
  const brings = { running: take, abandoned: lapsed, completed: finish, released: STATES.released, lost: leave }
  for (const [what, bring] of Object.entries(brings)) {
    if (what === 'released' && became.startsWith('the state')) continue
    t.test(`a ${what} row that is of ${became} is an error, whoever asks, and is left as it is`, async (t) => {
      const { store, table, rows } = await open(t)
      const key = newKey()
      const token = (await bring?.(store, key)) ?? 'token'
      await rows(`UPDATE "${table}" SET ${changes} WHERE key = $1`, [key])
      const stored = () => rows(`SELECT ctid, xmax, * FROM "${table}" WHERE key = $1`, [key])
      const before = await stored()
      const error = { isFree: false, message: UNDECODABLE }
      for (const takeover of [false, true]) {
        await t.rejects(store.acquire(key, claim({ takeover })), error)
        await t.rejects(store.acquire(key, claim({ takeover, token })), error, 'also of its own token')
        await t.rejects(store.begin(key, wish({ takeover })), error)
      }
      await t.rejects(store.get(key), error)
      t.strictSame(await listed(store), [])
      t.equal(await store.renew(key, token, LONG), false)
      t.equal(await store.step(key, token, ['a', 'b']), false)
      t.equal(await store.complete(key, token, reply(), LONG), false)
      t.equal(await store.release(key, token), false)
      for (const settlement of SETTLEMENTS) t.equal(await store.settle(key, 'fingerprint', settlement), false)
      t.equal(await store.delete(key, true), false, 'it may be running')
      await soon(store.changed(key, never()))
      t.strictSame(await stored(), before)
      t.equal(await store.delete(key), true, 'it can be deleted')
      t.strictSame(await store.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })
  }
}

t.test('a row of another version that has expired is as good as none, and what replaces it is of ours', async (t) => {
  const { store, table, rows, row } = await open(t)
  const [key, other] = [newKey(), newKey()]
  for (const each of [key, other]) await store.step(each, await lapsed(store, each), ['of another', 'version'])
  await rows(`UPDATE "${table}" SET version = 2, attempt = 7, expires_at = clock_timestamp()`)
  t.equal(await store.get(key), null)
  t.strictSame(await store.acquire(key, claim({ takeover: true })), { state: 'acquired', attempt: 1 })
  t.equal((await row(key))?.version, 1)
  t.strictSame(await (await hold(store, other)).complete(reply(), LONG), { state: 'committed' })
  same(t, await store.get(other), reply())
})

t.test('a request whose row is in an unknown state gets 503, and its handler does not run', async (t) => {
  const { store, rows, table } = await open(t)
  const app = await build(t, { store })
  let runs = 0
  const handler = async () => ++runs
  app.post('/', { config: { idempotency: true } }, handler)
  app.post('/transaction', { config: { idempotency: { transaction: true } } }, handler)
  for (const url of ['/', '/transaction']) {
    const send = () => app.inject({ method: 'POST', url, headers: { 'idempotency-key': url } })
    t.equal((await send()).statusCode, 200)
    await rows(`UPDATE "${table}" SET state = 'archived'`)
    const refused = await send()
    t.same([refused.statusCode, refused.json().code], [503, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE'])
    await rows(`UPDATE "${table}" SET state = 'completed'`)
    t.equal((await send()).headers['idempotent-replayed'], 'true')
  }
  t.equal(runs, 2)
})

/* Errors */

const SECRETS = ['secret-body', 'secret-header', 'secret-fingerprint', 'secret-token']

/** Whether anything of a record, in any spelling, is in what would be logged of an error. */
function leaks(error: unknown): string[] {
  const own = Object.fromEntries(Object.getOwnPropertyNames(error).map((name) => [name, (error as never)[name]]))
  const shown = `${inspect(error, { depth: 10, showHidden: true })} ${inspect(own, { depth: 10 })}`
  const spellings = (text: string) => [text, Buffer.from(text).toString('hex'), Buffer.from(text).toString('base64')]
  return SECRETS.filter((secret) => spellings(secret).some((spelling) => shown.includes(spelling)))
}

const secretClaim = { fingerprint: 'secret-fingerprint', token: 'secret-token' }
const secretReply = reply({
  fingerprint: 'secret-fingerprint',
  headers: [['x', 'secret-header']],
  body: Buffer.from('secret-body')
})

t.test('an error of the database does not carry the values of a claim or of a record', async (t) => {
  const { store, pool, table, rows } = await open(t)
  const errors: [string, unknown][] = []
  const failing = async (what: string, promise: Promise<unknown>) => {
    errors.push([
      what,
      await promise.then(
        () => t.fail(`${what} should fail`),
        (error) => error
      )
    ])
  }
  const [key, other] = [newKey(), newKey()]
  await store.acquire(key, claim(secretClaim))
  await rows(`ALTER TABLE "${table}" ADD CONSTRAINT full_up CHECK (state <> 'completed') NOT VALID`)
  await failing('complete', store.complete(key, 'secret-token', secretReply, LONG))
  await failing(
    'a status out of range',
    store.complete(key, 'secret-token', { ...secretReply, statusCode: 99_999 }, LONG)
  )
  await rows(`ALTER TABLE "${table}" ADD CONSTRAINT shut CHECK (attempt = 0) NOT VALID`)
  await failing('acquire', store.acquire(other, claim(secretClaim)))
  await failing('begin', store.begin(other, wish(secretClaim)))
  for (const [what, error] of errors) {
    t.ok(error instanceof Error, what)
    t.strictSame(leaks(error), [], what)
  }
  t.match(errors[0]?.[1], { message: /violates check constraint "full_up"/, code: '23514' }, 'it says what is wrong')
  await until(() => pool.idleCount === pool.totalCount)
})

t.test('an error of a transaction that could not be completed does not carry the values of the record', async (t) => {
  const { store, table, rows } = await open(t)
  await rows(`ALTER TABLE "${table}" ADD CONSTRAINT full_up CHECK (state <> 'completed')`)
  const transaction = await hold(store, newKey(), secretClaim)
  const error = await transaction.complete(secretReply, LONG).then(
    (outcome) => (outcome.state === 'refused' ? outcome.error : t.fail('it should fail')),
    (error) => error
  )
  t.match(error, { message: /violates check constraint "full_up"/ })
  t.strictSame(leaks(error), [])
})

t.test('a pool that has ended gives errors, whatever is asked, and nothing else happens', async (t) => {
  const { store, pool } = await open(t, { sweepInterval: 1 })
  await take(store, newKey())
  await pool.end()
  for (const [name, call] of CALLS) {
    await t.rejects(soon(call(store, newKey())), { message: /pool/ }, name)
  }
  await t.rejects(store.createTable(), { message: /pool/ })
  await sleep(10)
  await store.close()
})

t.test('a server that is down gives errors, whatever is asked, and everything works when it is back', async (t) => {
  const server = await ownServer(t)
  const { store } = await open(t, { server, sweepInterval: 1 })
  const key = newKey()
  await finish(store, key)
  await server.stop()
  for (const [name, call] of CALLS) if (name !== 'changed') await t.rejects(soon(call(store, key)), Error, name)
  await server.start()
  same(t, await store.acquire(key, claim()), reply())
  same(t, (await store.begin(key, wish())) as Acquisition, reply())
})

/* Transactions */

const PID = 'SELECT pg_backend_pid() AS pid'
const pidOf = async (transaction: ClaimTransaction): Promise<number> =>
  ((await transaction.client.query(PID)) as { rows: { pid: number }[] }).rows[0]?.pid as number

/** What is left of a key, wherever it could have left something. */
async function traces(rows: Rows, table: string, key: string): Promise<unknown[]> {
  const stored = await rows(`SELECT * FROM "${table}" WHERE key = $1`, [key])
  const locks = await rows(
    `SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
      AND (classid::bigint << 32) | objid::bigint = hashtextextended($1, '"${table}"'::regclass::oid::bigint)`,
    [key]
  )
  const open = await rows(
    `SELECT state FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND query LIKE '%${table}%'`
  )
  return [...stored, ...locks, ...open]
}

for (const name of ['free', 'released', 'expired']) {
  t.test(`a transaction takes a key that is ${name}, with attempt 1, and completes it`, async (t) => {
    const { store, second } = await open(t)
    const key = newKey()
    await STATES[name]?.(store, key)
    const found = await store.begin(key, wish())
    t.match(found, { state: 'acquired', attempt: 1 })
    t.strictSame(await held(found).complete(reply(), LONG), { state: 'committed' })
    same(t, await second.acquire(key, claim()), reply())
    same(t, (await second.begin(key, wish())) as Acquisition, reply())
  })
}

t.test('a transaction takes over a key that is abandoned, with the next attempt, if it may', async (t) => {
  const { store, second, row } = await open(t)
  const key = newKey()
  const token = await lapsed(store, key, { fingerprint: 'the dead' })
  const before = await row(key)
  const abandoned = { state: 'abandoned', fingerprint: 'the dead', attempt: 1 }
  t.strictSame(justNow(t, await second.begin(key, wish())), abandoned)
  const undone = await second.begin(key, wish({ takeover: true }))
  t.match(undone, { state: 'acquired', attempt: 2 })
  await held(undone).rollback()
  t.strictSame(await row(key), before, 'and leaves it as it was when it is rolled back')
  const found = await second.begin(key, wish({ takeover: true, fingerprint: 'the heir' }))
  t.match(found, { state: 'acquired', attempt: 2 })
  await held(found).complete(reply({ fingerprint: 'the heir' }), LONG)
  t.equal(await store.renew(key, token, LONG), false)
  t.equal(await store.complete(key, token, reply({ fingerprint: 'late' }), LONG), false)
  same(t, await store.acquire(key, claim()), reply({ fingerprint: 'the heir' }))
})

t.test(
  'a transaction takes over a key that was given back, with the next attempt, and a rollback gives it back as it was',
  async (t) => {
    const { store, second, row } = await open(t)
    for (const unused of [false, true]) {
      const key = newKey()
      await lapsed(store, key, { fingerprint: 'the dead' })
      const heir = claim({ fingerprint: 'the heir', takeover: true })
      await store.acquire(key, heir)
      const { sent } = await shared.statements(() => store.release(key, heir.token, unused))
      t.equal(sent.length, 1, 'it was given back by one statement')
      const before = await row(key)
      const attempt = unused ? 1 : 2
      const left = unused ? { fingerprint: 'the dead', attempt } : { fingerprint: 'the heir', attempt, ended: true }
      t.strictSame(justNow(t, await second.begin(key, wish())), { state: 'abandoned', ...left })
      const undone = await second.begin(key, wish({ takeover: true }))
      t.match(undone, { state: 'acquired', attempt: attempt + 1 })
      await held(undone).rollback()
      t.strictSame(await row(key), before)
      const found = await second.begin(key, wish({ takeover: true }))
      t.strictSame(await held(found).complete(reply(), LONG), { state: 'committed' })
      same(t, await store.acquire(key, claim()), reply())
    }
  }
)

t.test('a transaction finds a key running that somebody holds without one', async (t) => {
  const { store, second } = await open(t)
  const key = newKey()
  await take(store, key, { fingerprint: 'the first' })
  for (const takeover of [false, true]) {
    const found = await second.begin(key, wish({ takeover }))
    t.match(found, { state: 'running', fingerprint: 'the first' })
    const { leaseMs } = found as { leaseMs: number }
    t.ok(leaseMs > 0 && leaseMs <= LONG, `${leaseMs} ms are left`)
  }
})

t.test('of two transactions on a key one has it, and the other finds it running at once', async (t) => {
  const { store, second, other } = await open(t)
  const key = newKey()
  const first = await hold(store, key, { fingerprint: 'the first' })
  for (const takeover of [false, true]) {
    const found = await soon(second.begin(key, wish({ takeover, leaseMs: 1_234 })), 'an answer')
    t.strictSame(found, { state: 'running', fingerprint: '', leaseMs: 1_234 })
  }
  await until(() => other.idleCount === other.totalCount, { message: 'the client to be back' })
  t.strictSame(await first.complete(reply(), LONG), { state: 'committed' })
  same(t, (await second.begin(key, wish())) as Acquisition, reply())
})

t.test('of many transactions at once by two pools exactly one has the key', async (t) => {
  const { store, second } = await open(t)
  for (const prepare of [STATES.free, STATES.abandoned, STATES.ended, STATES.released, STATES.expired]) {
    const key = newKey()
    await prepare?.(store, key)
    const found = await Promise.all(
      Array.from({ length: 40 }, (_, n) =>
        (n % 2 === 0 ? store : second).begin(key, wish({ takeover: true })).then(async (found) => {
          if (found.state === 'acquired') await found.transaction.complete(reply(), LONG)
          return found.state
        })
      )
    )
    t.equal(found.filter((state) => state === 'acquired').length, 1)
    t.strictSame(
      found.filter((state) => !['acquired', 'running', 'completed'].includes(state)),
      []
    )
    same(t, await store.acquire(key, claim()), reply())
  }
})

t.test('of many claims at once, with and without a transaction, exactly one has the key', async (t) => {
  const { store, second } = await open(t)
  for (const prepare of [STATES.free, STATES.abandoned, STATES.ended, STATES.released, STATES.expired]) {
    const key = newKey()
    await prepare?.(store, key)
    const open: ClaimTransaction[] = []
    const found = await Promise.all(
      Array.from({ length: 16 }, async (_, n) => {
        const each = n % 4 < 2 ? store : second
        if (n % 2 === 0) return (await each.acquire(key, claim({ takeover: true }))).state
        const found = await each.begin(key, wish({ takeover: true }))
        if (found.state === 'acquired') open.push(found.transaction)
        return found.state
      })
    )
    const acquired = found.filter((state) => state === 'acquired').length
    // Each may turn the other away at the door; then nobody has it, and whoever asks again will.
    t.ok(acquired <= 1, `${acquired} have it`)
    t.ok(open.length <= 1)
    for (const transaction of open) await transaction.rollback()
  }
})

t.test(
  'while a transaction holds a key, the key is running for those without one, and cannot be deleted',
  async (t) => {
    const { store, second, table, rows } = await open(t)
    const key = newKey()
    const transaction = await hold(store, key, { fingerprint: 'the first' })
    for (const takeover of [false, true]) {
      const found = await soon(second.acquire(key, claim({ takeover, leaseMs: 1_234 })))
      t.strictSame(found, { state: 'running', fingerprint: '', leaseMs: 1_234 })
    }
    t.match(await second.get(key), { state: 'running', fingerprint: '' })
    t.equal(await second.delete(key), false)
    t.equal(await second.release(key, 'token'), false)
    t.strictSame(await rows(`SELECT key FROM "${table}"`), [])
    await transaction.rollback()
    t.equal(await second.get(key), null)
    t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
  }
)

t.test('a key that a transaction is taking over from the dead is running for all who would', async (t) => {
  const { store, second } = await open(t)
  const key = newKey()
  await lapsed(store, key)
  const transaction = await hold(store, key, { takeover: true })
  t.match(await soon(second.acquire(key, claim({ takeover: true }))), { state: 'running' })
  t.match(await soon(second.begin(key, wish({ takeover: true }))), { state: 'running' })
  t.equal(await soon(second.delete(key)), false, 'nor can it be deleted')
  await transaction.rollback()
  t.match(
    await second.begin(key, wish({ takeover: true })).then((found) => {
      void held(found).rollback()
      return found
    }),
    { state: 'acquired', attempt: 2 }
  )
})

t.test('what a transaction holds is not listed, not settled, and not deleted, until it is over', async (t) => {
  const { store, second } = await open(t)
  for (const name of ['free', 'released', 'expired', 'abandoned', 'ended']) {
    const key = newKey()
    await STATES[name]?.(store, key)
    const before = await second.get(key)
    const transaction = await hold(store, key, { takeover: true })
    t.strictSame(await listed(second), [], name)
    for (const settlement of SETTLEMENTS)
      t.equal(await soon(second.settle(key, 'fingerprint', settlement)), false, name)
    t.equal(await soon(second.delete(key, true)), false, name)
    await transaction.rollback()
    t.equal((await second.get(key))?.state, before?.state, 'nothing of it was changed')
    t.strictSame(await listedKeys(second), before === null ? [] : [key], name)
    t.equal(await second.settle(key, 'fingerprint', SETTLEMENTS[0]), before !== null, name)
    t.equal(await second.delete(key, true), before !== null, name)
  }
})

t.test(
  'a transaction that comes while a key is settled or deleted finds it running, or what became of it',
  async (t) => {
    const { store, second } = await open(t)
    for (let round = 0; round < 20; round++) {
      const key = newKey()
      await lapsed(store, key)
      const record = tombstone('settled')
      const [isDone, found] = await Promise.all([
        round % 2 === 0 ? second.settle(key, 'fingerprint', { record, ttlMs: LONG }) : second.delete(key, true),
        store.begin(key, wish({ takeover: true }))
      ])
      if (found.state === 'acquired') await found.transaction.complete(reply(), LONG)
      if (found.state === 'acquired' && found.attempt === 2) t.equal(isDone, false, 'it was taken over')
      if (isDone && round % 2 === 0) same(t, await store.get(key), record)
      t.ok(isDone || found.state === 'acquired', 'one of them has it')
    }
  }
)

t.test('what waits for a row judges it as it is then', async (t) => {
  const { store, second, table, operator } = await open(t)
  const waits: [string, (key: string) => Promise<boolean>][] = [
    ['settle by a record', (key) => second.settle(key, 'fingerprint', SETTLEMENTS[0])],
    ['settle as ended', (key) => second.settle(key, 'fingerprint', 'ended')],
    ['delete unless it is running', (key) => second.delete(key, true)]
  ]
  const client = await operator.connect()
  t.teardown(() => client.release(true))
  for (const [what, change] of waits) {
    const key = newKey()
    const token = await lapsed(store, key)
    await client.query('BEGIN')
    await client.query(`UPDATE "${table}" SET lease_end = lease_end + interval '1 hour' WHERE key = $1`, [key])
    const changed = change(key)
    const isWaiting = async () =>
      (
        await operator.query("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1", [
          `%${table}%`
        ])
      ).rowCount
    await until(isWaiting, { message: `${what} to wait for the row` })
    await client.query('COMMIT')
    t.equal(await changed, false, what)
    t.equal(await store.complete(key, token, reply(), LONG), true, 'its owner has it, who has renewed it meanwhile')
  }
})

t.test('a transaction that was rolled back leaves no trace', async (t) => {
  const { store, second, pool, table, rows } = await open(t)
  await rows(`CREATE TABLE "${table}_books" (amount int)`)
  for (const wake of [false, true]) {
    const key = newKey()
    const transaction = await hold(store, key, { wake })
    await transaction.client.query(`INSERT INTO "${table}_books" VALUES (1)`)
    t.not((await traces(rows, table, key)).length, 0, 'there is something to leave')
    await transaction.rollback()
    await until(() => pool.idleCount === pool.totalCount)
    t.strictSame(await traces(rows, table, key), [])
    t.strictSame(await rows(`SELECT * FROM "${table}_books"`), [])
    t.equal(transaction.lost.aborted, false)
    const found = await second.begin(key, wish())
    t.match(found, { state: 'acquired', attempt: 1 })
    await held(found).rollback()
  }
})

t.test(
  'an operation without steps has none in its row, and one with them has a line for each until it is completed',
  async (t) => {
    const { store, second, row } = await open(t)
    const key = newKey()
    const token = await take(store, key)
    t.equal((await row(key))?.steps, null)
    await store.step(key, token, ['a"\0', 'first\n'])
    await second.step(key, token, ['b', '\ud800'])
    await second.step(key, token, ['b', 'again'])
    t.equal((await row(key))?.steps, '["a\\"\\u0000","first\\n"]\n["b","\\ud800"]\n')
    const steps = [
      ['a"\0', 'first\n'],
      ['b', '\ud800']
    ]
    t.match(await store.acquire(key, claim()), { state: 'running', steps })
    await store.complete(key, token, reply(), LONG)
    t.equal((await row(key))?.steps, null)
  }
)

t.test('a step that was committed while a takeover waited for the row is in its answer', async (t) => {
  const { store, second, table, operator } = await open(t)
  const key = newKey()
  const token = await lapsed(store, key)
  const client = await operator.connect()
  t.teardown(() => client.release(true))
  await client.query('BEGIN')
  await client.query(`UPDATE "${table}" SET steps = '["charge","paid"]' || E'\\n' WHERE key = $1`, [key])
  const takeover = second.acquire(key, claim({ takeover: true }))
  const isWaiting = async () =>
    (
      await operator.query("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1", [
        `%${table}%`
      ])
    ).rowCount
  await until(isWaiting, { message: 'the takeover to wait for the row' })
  await client.query('COMMIT')
  t.strictSame(await takeover, { state: 'acquired', attempt: 2, steps: [['charge', 'paid']] })
  t.equal(await store.step(key, token, ['late', '']), false)
})

t.test('a transaction that takes over leaves the steps until it is committed', async (t) => {
  const { store, second, row } = await open(t)
  const key = newKey()
  const token = await take(store, key)
  await store.step(key, token, ['a', 'b'])
  await store.release(key, token)
  const steps = [['a', 'b']]
  t.strictSame(justNow(t, await second.begin(key, wish())), {
    state: 'abandoned',
    fingerprint: 'fingerprint',
    attempt: 1,
    ended: true,
    steps
  })
  const undone = await second.begin(key, wish({ takeover: true }))
  t.match(undone, { state: 'acquired', attempt: 2 })
  await held(undone).rollback()
  t.match(await store.get(key), { state: 'abandoned', attempt: 1, ended: true, steps })
  await (await hold(second, key, { takeover: true })).complete(reply(), LONG)
  t.equal((await row(key))?.steps, null)
  same(t, await store.acquire(key, claim()), reply())
})

t.test('what is written in a transaction and its record appear together', async (t) => {
  const { store, table, rows } = await open(t)
  await rows(`CREATE TABLE "${table}_books" (amount int)`)
  const key = newKey()
  const transaction = await hold(store, key)
  await transaction.client.query(`INSERT INTO "${table}_books" VALUES (1)`)
  const seen = async () => (await rows(`SELECT FROM "${table}_books" UNION ALL SELECT FROM "${table}"`)).length
  t.equal(await seen(), 0)
  await transaction.complete(reply(), LONG)
  t.equal(await seen(), 2)
  const [record, write] = await rows(`SELECT xmin FROM "${table}" UNION ALL SELECT xmin FROM "${table}_books"`)
  t.equal(record?.xmin, write?.xmin, 'by one transaction')
})

t.test('the client of a transaction that is over is refused, and back in its pool', async (t) => {
  const { store, pool } = await open(t, { pool: { max: 1 } })
  for (const end of [
    (transaction: ClaimTransaction) => transaction.complete(reply(), LONG),
    (transaction: ClaimTransaction) => transaction.rollback()
  ]) {
    const transaction = await hold(store, newKey())
    const { client } = transaction
    await client.query('SELECT 1')
    await t.rejects(client.query('COMMIT'), { code: TRANSACTION })
    await end(transaction)
    await t.rejects(client.query('SELECT 1'), { code: TRANSACTION })
    t.throws(() => client.release(), { code: TRANSACTION })
    await until(() => pool.idleCount === 1)
  }
})

t.test('when the connection of a transaction is cut, its lease does not count, and the owner knows', async (t) => {
  const { store, second, pool, table, rows } = await open(t)
  const key = newKey()
  const transaction = await hold(store, key)
  const lost = aborted(transaction.lost)
  t.equal(transaction.lost.aborted, false)
  await rows('SELECT pg_terminate_backend($1)', [await pidOf(transaction)])
  await soon(lost, 'the loss to be noticed')
  // The server says goodbye a moment before it lets go.
  await until(async () => {
    const found = await second.begin(key, wish())
    if (found.state !== 'acquired') return false
    t.equal(found.attempt, 1)
    return await found.transaction.rollback().then(() => true)
  })
  await t.rejects(transaction.complete(reply(), LONG))
  await soon(transaction.rollback())
  transaction.keepAlive()
  transaction.abandon()
  await until(async () => (await traces(rows, table, key)).length === 0, { message: 'the traces to go' })
  t.equal(pool.totalCount, 0, 'the client does not come back')
  t.strictSame(await store.acquire(key, claim()), { state: 'acquired', attempt: 1 })
})

t.test('a transaction that is abandoned is undone, whatever its client is doing', async (t) => {
  const { store, second, pool, table, rows } = await open(t)
  const key = newKey()
  const transaction = await hold(store, key)
  const lost = aborted(transaction.lost)
  const query = outcome(Promise.resolve(transaction.client.query('SELECT pg_sleep(0.2)')))
  transaction.abandon()
  await soon(lost)
  t.match(await soon(query), /^rejected/)
  t.equal(pool.totalCount, 0)
  await until(async () => (await traces(rows, table, key)).length === 0)
  t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
})

t.test('a transaction that is kept alive outlives its lease', async (t) => {
  const { store, second } = await open(t)
  const key = newKey()
  const leaseMs = 800
  const transaction = await hold(store, key, { leaseMs })
  const start = performance.now()
  while (performance.now() - start < 2 * leaseMs) {
    transaction.keepAlive()
    await sleep(10)
  }
  t.equal(transaction.lost.aborted, false)
  t.match(await second.begin(key, wish()), { state: 'running' })
  t.strictSame(await transaction.complete(reply(), LONG), { state: 'committed' })
  same(t, await second.acquire(key, claim()), reply())
})

t.test('a transaction that is not kept alive is ended by the server, and the key is free', async (t) => {
  const { store, second, pool, table, rows } = await open(t)
  const key = newKey()
  const transaction = await hold(store, key, { leaseMs: 50 })
  await soon(aborted(transaction.lost), 'the end of the transaction')
  await t.rejects(transaction.complete(reply(), LONG))
  await until(async () => (await traces(rows, table, key)).length === 0, { message: 'the traces to go' })
  t.equal(pool.totalCount, 0)
  t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
})

t.test('a connection is not ended for being idle when its transaction is over', async (t) => {
  const { store, pool } = await open(t, { pool: { max: 1 } })
  const client = await pool.connect()
  const before = (await client.query('SHOW idle_in_transaction_session_timeout')).rows
  client.release()
  for (const end of ['complete', 'rollback'] as const) {
    const transaction = await hold(store, newKey(), { leaseMs: 60_000 })
    await (end === 'complete' ? transaction.complete(reply(), LONG) : transaction.rollback())
    t.strictSame((await pool.query('SHOW idle_in_transaction_session_timeout')).rows, before)
  }
})

t.test(
  'however often a transaction is kept alive, one statement is on its way, and none when it is over',
  async (t) => {
    const { store } = await open(t)
    const transaction = await hold(store, newKey())
    const pinged = await shared.statements(async () => {
      for (let n = 0; n < 100; n++) transaction.keepAlive()
      await transaction.client.query('SELECT 1')
    })
    t.equal(pinged.sent.length, 2)
    await transaction.rollback()
    const over = await shared.statements(async () => {
      for (let n = 0; n < 100; n++) transaction.keepAlive()
      await store.get(newKey())
    })
    t.equal(over.sent.length, 1)
  }
)

t.test('keeping alive a transaction in which a statement has failed is no error', async (t) => {
  const { store } = await open(t)
  const transaction = await hold(store, newKey())
  await t.rejects(transaction.client.query('SELECT nothing'))
  transaction.keepAlive()
  transaction.keepAlive()
  await transaction.rollback()
  t.equal(transaction.lost.aborted, false)
})

t.test('listeners do not pile up on the clients of the pool', async (t) => {
  const { store, second, pool } = await open(t, { pool: { max: 2 } })
  const clients = new Set<PoolClient>()
  pool.on('acquire', (client) => clients.add(client))
  const warnings: Error[] = []
  const onWarning = (warning: Error) => warnings.push(warning)
  process.on('warning', onWarning)
  t.teardown(() => process.off('warning', onWarning))
  const count = () =>
    [...clients].map((client) => client.eventNames().map((name) => [name, client.listenerCount(name)]))
  const taken = newKey()
  await finish(second, taken)
  const rounds = async (from: number, to: number) => {
    for (let n = from; n < to; n++) {
      const transaction = await hold(store, newKey(), { wake: n % 4 < 2 })
      if (n % 2 === 0) await transaction.complete(reply(), LONG)
      else await transaction.rollback()
      await store.begin(taken, wish({ takeover: true }))
    }
    await until(() => pool.idleCount === pool.totalCount)
  }
  await Promise.all([rounds(0, 2), rounds(2, 4)])
  const before = count()
  await Promise.all([rounds(0, 100), rounds(100, 200)])
  t.ok(clients.size <= 2, `${clients.size} clients`)
  t.strictSame(count(), before)
  t.strictSame(warnings, [])
})

t.test('a begin that fails gives its client back', async (t) => {
  const table = newTable()
  const pool = ownPool(t, { max: 1 })
  const store = new PostgresStore({ pool: pool as PostgresPool, table, sweepInterval: null })
  for (let n = 0; n < 5; n++) await t.rejects(soon(store.begin(newKey(), wish())), { message: /createTable/ })
  await store.createTable()
  await (await hold(store, newKey())).rollback()
})
