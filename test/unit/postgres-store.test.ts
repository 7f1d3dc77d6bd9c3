import { EventEmitter } from 'node:events'
import { createRequire } from 'node:module'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { PostgresStore, type PostgresStoreOptions } from '../../index.js'
import { AS_TEXT } from '../../lib/stores/postgres/rows.js'
import { PostgresSql, SWEEP_ROWS } from '../../lib/stores/postgres/statements.js'
import { toKey } from '../../lib/stores/storable-text.js'
import { claim, reply, tombstone } from '../support/store-fixtures.js'

/* What a PostgresStore sends to its pool, and what it makes of the answers. */

type Query = { text: string; values?: unknown[]; name?: string; types: unknown }

const sql = new PostgresSql(null, 'idempotency_keys')
const contention = (code = '40001') => Object.assign(new Error('lost'), { code, severity: 'ERROR' })
const ACQUIRED = { found: 'acquired', attempt: '1' }
const NO_ROWS = { cursor: null, key: null }

class Pool extends EventEmitter {
  readonly queries: Query[] = []
  /** Rows for the queries to come, or errors; nothing: no row. */
  readonly answers: (object[] | Error)[] = []
  client: unknown = null
  options = {}

  async query(query: Query): Promise<{ rows: object[] }> {
    this.queries.push(query)
    const answer = this.answers.shift() ?? []
    if (answer instanceof Error) throw answer
    return { rows: answer }
  }

  connect(done: (error: unknown, client?: unknown) => void): void {
    if (this.client instanceof Error) done(this.client)
    else done(undefined, this.client)
  }
}

function open(options: Partial<PostgresStoreOptions> = {}) {
  const pool = new Pool()
  const store = new PostgresStore({ pool: pool as never, sweepInterval: null, ...options })
  return { pool, store }
}

const refuses = (options: unknown, message: string | RegExp) =>
  t.throws(() => new PostgresStore(options as never), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message })

t.test('an option that is not known is refused', async () => {
  refuses({ pool: new Pool(), tabel: 'x' }, /PostgresStore option "tabel" is not known/)
})

t.test('a pool is what can query, connect and tell of errors', async () => {
  const takes = /option "pool" takes a pool of pg, such as app\.pg\.pool of @fastify\/postgres, got /
  for (const [pool, got] of [
    [undefined, 'undefined \\(undefined\\)'],
    [null, 'null'],
    [{ password: 'secret' }, '\\[Object\\] \\(object\\)']
  ] as const) {
    refuses({ pool }, new RegExp(`${takes.source}${got}`))
  }
  refuses(undefined, takes)
  for (const missing of ['query', 'connect', 'on'])
    refuses({ pool: Object.assign(new Pool(), { [missing]: 1 }) }, takes)
  refuses({ pool: Object.assign(new Pool(), { options: { binary: true } }) }, /takes a pool without binary: true/)
})

t.test('a pool without options of its own is one as well', async (t) => {
  t.doesNotThrow(() => open({ pool: Object.assign(new Pool(), { options: undefined }) as never }))
})

t.test('a table is letters, digits and underscores, perhaps after a schema', async (t) => {
  const takes =
    /option "table" takes a name of letters, digits and underscores, at most 52, perhaps after a schema and a dot, got /
  for (const table of [
    '',
    '1a',
    'a-b',
    'a b',
    'a.b.c',
    '.a',
    'a.',
    'a;b',
    `${'a'.repeat(53)}`,
    `${'s'.repeat(64)}.a`,
    'a\n',
    '\na',
    'é'
  ]) {
    refuses({ pool: new Pool(), table }, takes)
  }
  refuses({ pool: new Pool(), table: 5 }, /got 5 \(number\)/)
  refuses({ pool: new Pool(), table: null }, /got null/)
  for (const table of ['a', '_', 'A1_b', 'a'.repeat(52), `${'S_1'.padEnd(63, 's')}.a1`, '_.b']) {
    const { pool, store } = open({ table })
    await store.get('k')
    const [name, schema] = table.split('.').toReversed() as [string, string?]
    t.equal(pool.queries[0]?.text, new PostgresSql(schema ?? null, name).get)
  }
})

t.test('sweeping has an interval of whole milliseconds, or none', async (t) => {
  const takes =
    /option "sweepInterval" takes a positive integer of milliseconds or a text such as '24h', or null for never, got /
  for (const sweepInterval of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 'soon', true]) {
    refuses({ pool: new Pool(), sweepInterval }, takes)
  }
  t.doesNotThrow(() => open({ sweepInterval: 1 }))
})

t.test('a pool whose connections break does not end the process, and gets one listener', async (t) => {
  const { pool } = open()
  new PostgresStore({ pool: pool as never, sweepInterval: null })
  t.equal(pool.listenerCount('error'), 1)
  t.doesNotThrow(() => pool.emit('error', new Error('terminated')))
})

t.test('each step is one statement with its values, read as text', async (t) => {
  const { pool, store } = open()
  const long = 'l'.repeat(600)
  const { acquire, renew, step, release, watch, get, remove, list, settle, settleAsEnded, createTable } = sql
  const { acquireAtOnce, completeUnheard } = sql
  const yes = [{}]
  pool.answers.push(
    [ACQUIRED],
    [ACQUIRED],
    yes,
    yes,
    yes,
    yes,
    [],
    [{ existed: 't' }],
    [{ existed: 't' }],
    [NO_ROWS],
    yes,
    yes,
    []
  )
  t.strictSame(
    await store.acquire(long, claim({ token: 't\0', fingerprint: 'f\\', leaseMs: 5, retainMs: 6, takeover: true })),
    {
      state: 'acquired',
      attempt: 1
    }
  )
  t.match(await store.acquire('k', claim({ token: 't', fingerprint: 'f', leaseMs: 5, retainMs: 6, withTtl: true })), {
    state: 'acquired'
  })
  t.equal(await store.renew('k', 't', 5), true)
  t.equal(await store.complete('k', 't', reply({ headers: [], body: Buffer.from('b'), fingerprint: 'f' }), null), true)
  t.equal(await store.step('k', 't\0', ['"a"', '\0\n']), true)
  t.equal(await store.release('k', 't'), true)
  t.equal(await store.get('k'), null)
  t.equal(await store.delete('k'), true)
  t.equal(await store.delete('k', true), true)
  t.strictSame(await store.list(['reply', 'running'], 'a'), { keys: [], cursor: null })
  t.equal(await store.settle(long, 'f\\', { record: tombstone('settled'), ttlMs: 5 }), true)
  t.equal(await store.settle('k', 'f\\', 'ended'), true)
  await store.createTable()
  const nobodies = pool.queries.slice(-3, -1).map(({ values }) => values?.[1])
  t.ok(nobodies.every((token) => String(token).length === 36) && nobodies[0] !== nobodies[1], 'nobody has these tokens')
  const unnamed = pool.queries.map(({ name: _, ...query }) => query)
  t.strictSame(unnamed, [
    { text: acquireAtOnce, values: [toKey(long), 't\\0', 'f\\\\', 5, 6], types: AS_TEXT },
    { text: acquire, values: ['k', 't', 'f', 5, 6, false], types: AS_TEXT },
    { text: renew, values: ['k', 't', 5], types: AS_TEXT },
    {
      text: completeUnheard,
      values: ['k', 't', 'f', 1_700_000_000_000, 201, '[]', Buffer.from('b'), true, null, null],
      types: AS_TEXT
    },
    { text: step, values: ['k', 't\\0', '["\\"a\\"",', '["\\"a\\"","\\u0000\\n"]\n'], types: AS_TEXT },
    { text: release, values: ['k', 't', 60_000, false], types: AS_TEXT },
    { text: get, values: ['k'], types: AS_TEXT },
    { text: remove, values: ['k', false], types: AS_TEXT },
    { text: remove, values: ['k', true], types: AS_TEXT },
    { text: list, values: ['a', ['reply', 'running']], types: AS_TEXT },
    {
      text: settle,
      values: [
        toKey(long),
        nobodies[0],
        'fingerprint',
        1_700_000_000_000,
        null,
        null,
        null,
        null,
        'settled',
        5,
        'f\\\\'
      ],
      types: AS_TEXT
    },
    { text: settleAsEnded, values: ['k', nobodies[1], 'f\\\\'], types: AS_TEXT },
    { text: createTable, types: AS_TEXT }
  ])
  t.ok(watch)
})

t.test('times that have no date are as long as one can be', async (t) => {
  const { pool, store } = open()
  pool.answers.push([ACQUIRED], [{}])
  await store.acquire('k', claim({ leaseMs: 1e300, retainMs: Number.POSITIVE_INFINITY }))
  await store.renew('k', 't', 1e300)
  t.strictSame(pool.queries[0]?.values?.slice(3, 5), [4e15, 4e15])
  t.equal(pool.queries[1]?.values?.[2], 4e15)
})

t.test('what is found is read from its row', async (t) => {
  const { pool, store } = open()
  pool.answers.push([{ found: 'running', attempt: '2', fingerprint: 'f', left_ms: '5' }])
  t.strictSame(await store.get('k'), { state: 'running', fingerprint: 'f', leaseMs: 5, attempt: 2 })
  pool.answers.push([{ found: 'locked' }])
  t.strictSame(await store.get('k'), { state: 'running', fingerprint: '', leaseMs: 0 })
  pool.answers.push([{ found: 'locked' }])
  t.strictSame(await store.acquire('k', claim({ leaseMs: 7 })), { state: 'running', fingerprint: '', leaseMs: 7 })
})

t.test('a page is what can be read of its rows, and its cursor is where they end', async (t) => {
  const { pool, store } = open()
  const row = { found: 'running', attempt: '1', fingerprint: 'f', left_ms: '5' }
  const keys = ['a', toKey('l'.repeat(501)), 'b']
  pool.answers.push(keys.map((key) => ({ ...row, key, found: key === 'b' ? 'unknown' : 'running', cursor: 'c' })))
  const listed = { key: 'a', state: 'running', attempt: 1, fingerprint: 'f', leaseMs: 5 }
  t.same(await store.list(['running'], null), { keys: [listed], cursor: 'c' })
  pool.answers.push([{ ...NO_ROWS, cursor: 'c' }])
  t.strictSame(await store.list(['running'], null), { keys: [], cursor: 'c' }, 'there may be more on the next one')
})

t.test('what was not there was not deleted', async (t) => {
  const { pool, store } = open()
  pool.answers.push([{ existed: 'f' }], [])
  t.equal(await store.delete('k'), false)
  t.equal(await store.delete('k'), false, 'nor what a transaction holds')
})

t.test('what cannot be said at once is asked with more care', async (t) => {
  const { pool, store } = open()
  for (const atOnce of [[], [{ found: null, fingerprint: 'f' }]]) {
    pool.answers.push(atOnce, [ACQUIRED], [], [{}])
    t.match(await store.acquire('k', claim()), { state: 'acquired' })
    t.equal(await store.complete('k', 't', reply(), 5), true)
    t.strictSame(
      pool.queries.splice(0).map(({ text }) => text),
      [sql.acquireAtOnce, sql.acquire, sql.completeUnheard, sql.complete]
    )
  }
  pool.answers.push([{ found: 'running', attempt: '2', fingerprint: 'f', left_ms: '5' }])
  t.strictSame(await store.acquire('k', claim()), { state: 'running', fingerprint: 'f', leaseMs: 5, attempt: 2 })
  t.equal(pool.queries.length, 1)
})

t.test('a claim that could not see who was faster asks again, twenty times', async (t) => {
  const { pool, store } = open()
  pool.answers.push(...Array.from({ length: 20 }, () => []), [ACQUIRED])
  t.match(await store.acquire('k', claim()), { state: 'acquired' })
  t.equal(pool.queries.length, 21)
  await t.rejects(store.acquire('k', claim()), { message: 'The idempotency key changes hands too fast' })
  t.equal(pool.queries.length, 42)
})

t.test('a statement is prepared under a name of its own, and what has no values is not', async (t) => {
  const [one, two] = [open(), open()]
  for (const { store } of [one, two]) {
    await store.get('k')
    await store.get('l')
    await store.renew('k', 't', 5)
    await store.createTable()
  }
  const [get, again, renew, , createTable] = one.pool.queries.map(({ name }) => name)
  t.match(get, /^fastify-idempotency-[\da-f]{32}$/)
  t.ok(Buffer.byteLength(get as string) < 64, 'longer ones are cut')
  t.equal(again, get)
  t.not(renew, get)
  t.equal(createTable, undefined)
  t.strictSame(
    two.pool.queries.map(({ name }) => name),
    one.pool.queries.map(({ name }) => name),
    'of which another process knows that it is the same statement'
  )
})

t.test('a statement that a connection has lost is repeated as it is, and none is prepared any more', async (t) => {
  for (const code of ['26000', '42P05', '0A000']) {
    const { pool, store } = open()
    pool.answers.push(contention(code))
    t.equal(await store.get('k'), null)
    await store.get('k')
    const { name, ...query } = pool.queries[0] as Query
    t.ok(name)
    t.strictSame(pool.queries.slice(1), [query, query])
    pool.answers.push(contention(code))
    await t.rejects(store.get('k'), { code }, 'where it was not prepared it is an error')
  }
})

t.test('a statement that loses against others is repeated, twenty times', async (t) => {
  for (const code of ['40001', '40P01']) {
    const { pool, store } = open()
    pool.answers.push(...Array.from({ length: 19 }, () => contention(code)))
    t.equal(await store.get('k'), null)
    t.equal(pool.queries.length, 20)
    pool.answers.push(...Array.from({ length: 20 }, () => contention(code)))
    await t.rejects(store.get('k'), { message: 'lost', code })
    t.equal(pool.queries.length, 40)
  }
})

t.test('any other error is the answer, without what it carries', async (t) => {
  const { pool, store } = open()
  pool.answers.push(Object.assign(new Error('duplicate'), { code: '23505', detail: 'secret' }))
  const error = await store.get('k').catch((error) => error)
  t.match(error, { message: 'duplicate', code: '23505' })
  t.notOk('detail' in error)
  t.equal(pool.queries.length, 1)
})

t.test('a server without room takes no claim, and says so by a code; other steps have its error', async (t) => {
  const { pool, store } = open()
  const full = () => Object.assign(new Error('could not extend file'), { code: '53100', severity: 'ERROR' })
  pool.answers.push(full())
  await t.rejects(store.acquire('k', claim()), { code: 'FST_IDEMPOTENCY_STORE_FULL', cause: { code: '53100' } })
  pool.answers.push(full())
  await t.rejects(store.complete('k', 't', reply(), 5), { code: '53100' })
  pool.client = Object.assign(new EventEmitter(), {
    escapeLiteral: (text: string) => `'${text}'`,
    query: () => Promise.reject(full()),
    release: () => {}
  })
  const begun = store.begin('k', { ...claim(), wake: false, timeoutMs: 100 })
  await t.rejects(begun, { code: 'FST_IDEMPOTENCY_STORE_FULL', cause: { code: '53100' } })
})

t.test('no is said twice', async (t) => {
  const { pool, store } = open()
  pool.answers.push([], [{}])
  t.equal(await store.renew('k', 't', 5), true)
  t.equal(await store.release('k', 't'), false)
  t.equal(await store.complete('k', 't', reply(), 5), false)
  t.equal(await store.settle('k', 'f', 'ended'), false)
  t.equal(pool.queries.length, 9, 'and a completion once more, because somebody may wait')
  t.strictSame(pool.queries[0], pool.queries[1])
})

t.test('who waits looks whether there is a claim that runs', async (t) => {
  const { pool, store } = open()
  const listeners: Record<string, (message: object) => void> = {}
  Object.assign(pool, {
    Client: class {
      on = (event: string, listener: (message: object) => void) => {
        listeners[event] = listener
      }
      connect = async () => {}
      query = async () => {}
      end = async () => {}
    }
  })
  const { signal } = new AbortController()
  await store.changed('k', signal)
  t.match(pool.queries, [{ text: sql.watch, values: ['k'], types: AS_TEXT }])
  pool.answers.push([{}])
  let isOver = false
  const waiting = store.changed('k', signal).then(() => {
    isOver = true
  })
  await sleep(5)
  t.equal(isOver, false)
  await store.close()
  await waiting
})

t.test('expired rows are deleted once the store is in use, a batch at a time, until it is closed', async (t) => {
  for (const use of ['acquire', 'begin']) {
    const { pool, store } = open({ sweepInterval: 4 })
    const swept = () => pool.queries.filter(({ text }) => text === sql.sweep).length
    await sleep(12)
    t.equal(swept(), 0)
    pool.client = Object.assign(new EventEmitter(), {
      escapeLiteral: (text: string) => `'${text}'`,
      query: () => Promise.reject(new Error('x')),
      release: () => {}
    })
    const full = Array.from({ length: SWEEP_ROWS }, () => ({}))
    if (use === 'acquire') {
      pool.answers.push([ACQUIRED], full)
      await store.acquire('k', claim())
    } else {
      pool.answers.push(full)
      await store.begin('k', { ...claim(), wake: false, timeoutMs: 100 }).catch(() => {})
    }
    while (swept() < 2) await sleep(1)
    t.strictSame(pool.queries.at(-1), { text: sql.sweep, types: AS_TEXT })
    await store.close()
    const before = swept()
    await sleep(20)
    t.equal(swept(), before)
  }
})

t.test('without an interval nothing is deleted', async (t) => {
  const { pool, store } = open({ sweepInterval: null })
  pool.answers.push([ACQUIRED])
  await store.acquire('k', claim())
  await sleep(20)
  t.equal(pool.queries.length, 1)
})

t.test('a transaction is begun on a client of the pool, for no longer than has a date', async (t) => {
  const { pool, store } = open()
  const texts: string[] = []
  pool.client = Object.assign(new EventEmitter(), {
    escapeLiteral: (text: string) => `'${text}'`,
    query: async ({ text }: Query) => {
      texts.push(text)
      return [
        { command: 'SELECT', rows: [ACQUIRED] },
        { command: 'SELECT', rows: [{ schema: 'public' }] }
      ]
    },
    release: () => {}
  })
  const found = await store.begin('k', { ...claim({ leaseMs: 1e300, retainMs: 1e301 }), wake: true, timeoutMs: 100 })
  t.match(found, { state: 'acquired', attempt: 1 })
  t.match(texts[0], '4000000000000000::float8')
  t.notMatch(texts[0], '1e+30')
})

t.test('a pool that has no client says why', async (t) => {
  const { pool, store } = open()
  pool.client = Object.assign(new Error('timeout exceeded'), { detail: 'secret' })
  const error = await store.begin('k', { ...claim(), wake: true, timeoutMs: 100 }).catch((error) => error)
  t.match(error, { message: 'timeout exceeded' })
  t.notOk('detail' in error)
})

/** A pool as pg.native has it, whose own binding need not be there. */
const nativePool = Object.assign(new Pool(), {
  Client: { Query: createRequire(import.meta.url)('pg/lib/native/query') }
})

t.test('what is no pool is refused with what to do, and no password is told', (t) => {
  const url = 'postgres://user:secret@host/db'
  for (const [given, what] of [
    [url, /takes a pool, not a URL: new PostgresStore\(\{ pool/],
    [new Pool(), /PostgresStore takes its pool as an option: new PostgresStore\(\{ pool/],
    [{ pool: url }, /"pool" takes a pool of pg, not a URL/],
    [{ connectionString: url }, /no option "connectionString", it takes a pool/],
    [
      { pool: Object.assign(new EventEmitter(), { connectionParameters: { password: 'secret' } }) },
      /not a single client/
    ],
    [{ pool: nativePool }, /a pool of pg itself, not of pg.native/]
  ] as const) {
    const error = t.throws(() => new PostgresStore(given as never), { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
    t.match((error as Error).message, what)
    t.notMatch((error as Error).message, /secret/)
  }
  t.end()
})
