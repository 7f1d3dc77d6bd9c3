import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { RowDataPacket } from 'mysql2/promise'
import t from 'tap'
import {
  type Acquisition,
  EncryptedStore,
  type IdempotencyOptions,
  type IdempotencyStore,
  MemoryStore,
  MysqlStore,
  PostgresStore,
  RedisStore,
  SqliteStore
} from '../../index.js'
import { markOf, originOf, withOrigin, withoutOrigin } from '../../lib/operation/origin.js'
import { deriveKey, storageKey } from '../../lib/operation/storage-key.js'
import { sqliteTransactions } from '../../lib/transactions.js'
import { build } from '../support/app.js'
import { startMariadb } from '../support/mariadb.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { openSqlite } from '../support/sqlite.js'

/*
 * What a version has written, every later one reads: keys, fingerprints, claims and records, as they are in test/fixtures. A
 * change of what is written is a new file there, `WRITE_FORMATS=1` makes it, and the old ones stay.
 */

const FIXTURE = new URL('../../../test/fixtures/formats-1.json', import.meta.url)
const SECOND = 1_000
const HOUR = 3_600_000
const DAY = 86_400_000

/** A row of a compare-and-set store; times count from now. */
interface CasRow {
  state: string
  token: string
  value: string
  leaseIn: number
  expiresIn: number | null
}

interface Formats {
  /** By scope and key: the storage key, the mark of the caller, and what is derived from it. */
  keys: [scope: string | null, key: string, storageKey: string, mark: string, derived: string][]
  /** By the names of the requests below. */
  fingerprints: Record<string, string>
  /** What `get` gives, by key, without what is left of times. */
  answers: Record<string, object | null>
  redis: Record<string, { value: string; px: number | null }>
  rows: Record<string, CasRow>
  postgres: Record<string, Record<string, unknown>>
  /** What the store behind an EncryptedStore has. */
  sealed: Record<string, Acquisition | null>
  /** The table of steps in transactions. */
  steps: Record<string, unknown>[]
}

const formats: Formats = JSON.parse(readFileSync(FIXTURE, 'utf8'))
const written: Partial<Formats> = {}
const isWriting = process.env.WRITE_FORMATS === '1'
t.teardown(() => {
  if (isWriting) writeFileSync(FIXTURE, `${JSON.stringify(written, null, 1)}\n`)
})

const key = (name: string) => storageKey('alice', name)
const fingerprint = withOrigin('head.payload', { startedAt: 1_764_000_000_000, caller: 'mark', route: '/orders/:id' })

/** One key for each way in which a key can be. */
const ways: Record<string, (store: IdempotencyStore, key: string) => Promise<unknown>> = {
  running: (store, key) => claim(store, key, 'running'),
  'running, with steps, after a takeover': async (store, key) => {
    await abandoned(store, key)
    await claim(store, key, 'heir')
    await store.step?.(key, 'heir', ['charge', '{"id":"ch_1"}'])
    await store.step?.(key, 'heir', ['näme 2', '"ü"'])
  },
  'given back, with steps': async (store, key) => {
    await claim(store, key, 'ended')
    await store.step?.(key, 'ended', ['charge', '1'])
    await store.release(key, 'ended')
  },
  'given back as it was found': async (store, key) => {
    await abandoned(store, key)
    await claim(store, key, 'unused')
    await store.release(key, 'unused', true)
  },
  'given back, and free': async (store, key) => {
    await claim(store, key, 'released')
    await store.release(key, 'released')
  },
  'a text': (store, key) => record(store, key, Buffer.from('{"done":"ü"}'), true, DAY),
  bytes: (store, key) => record(store, key, Buffer.from([0, 255, 10, 13]), false, null),
  'a tombstone': async (store, key) => {
    await claim(store, key, 'tombstone')
    const tombstone = { kind: 'tombstone', reason: 'hijacked', fingerprint, createdAt: 1_764_000_000_001 } as const
    await store.complete(key, 'tombstone', tombstone, DAY)
  }
}

async function claim(store: IdempotencyStore, key: string, token: string, leaseMs = HOUR): Promise<void> {
  await store.acquire(key, { token, fingerprint, leaseMs, retainMs: DAY, takeover: true })
}

async function abandoned(store: IdempotencyStore, key: string): Promise<void> {
  await claim(store, key, 'dead', 1)
  await new Promise((resolve) => setTimeout(resolve, 10))
}

async function record(store: IdempotencyStore, key: string, body: Buffer, text: boolean, ttlMs: number | null) {
  await claim(store, key, 'done')
  const headers: [string, string | string[]][] = [
    ['content-type', 'application/json'],
    ['link', ['</a>', '</b>']]
  ]
  const reply = {
    kind: 'reply',
    fingerprint,
    createdAt: 1_764_000_000_001,
    statusCode: 201,
    headers,
    body,
    text
  } as const
  await store.complete(key, 'done', reply, ttlMs)
}

/** Without what is left of times. */
function essence(found: Acquisition | null): object | null {
  if (found === null) return null
  const { leaseMs, lapsedMs, ttlMs, ...rest } = found as unknown as Record<string, unknown>
  return JSON.parse(JSON.stringify({ ...rest, lasts: ttlMs === null ? 'for ever' : 'a while' }))
}

interface Backend {
  store: IdempotencyStore
  /** What is there under the names of the ways. */
  dump(): Promise<object>
  restore(): Promise<unknown>
}

const [redis, postgres, mariadb] = await Promise.all([startRedis(), startPostgres(), startMariadb()])
t.teardown(() => Promise.all([redis.close(), postgres.close(), mariadb.close()]))
const folder = makeFolder('formats')
const rounded = (ms: number) => Math.round(ms / SECOND) * SECOND

async function redisBackend(): Promise<Backend> {
  const client = await redis.client()
  return {
    store: new RedisStore(client),
    async dump() {
      const found: Formats['redis'] = {}
      for (const name of Object.keys(ways)) {
        const value = await client.getBuffer(`idempotency:${key(name)}`)
        const px = await client.pttl(`idempotency:${key(name)}`)
        if (value !== null) found[name] = { value: value.toString('hex'), px: px < 0 ? null : rounded(px) }
      }
      return { redis: found }
    },
    async restore() {
      for (const [name, { value, px }] of Object.entries(formats.redis)) {
        await client.set(`idempotency:${key(name)}`, Buffer.from(value, 'hex'))
        if (px !== null) await client.pexpire(`idempotency:${key(name)}`, px)
      }
    }
  }
}

async function sqliteBackend(): Promise<Backend> {
  const database = openSqlite(join(folder, 'keys.db'))
  t.teardown(() => database.close())
  const store = new SqliteStore({ database })
  await store.get('x')
  return {
    store,
    async dump() {
      const rows: Formats['rows'] = {}
      for (const name of Object.keys(ways)) {
        const [row] = database.prepare('SELECT * FROM idempotency_keys WHERE key = ?').all(key(name))
        const { state, token, lease_end: end, expires_at: expires, value } = row as Record<string, unknown>
        rows[name] = {
          state: String(state),
          token: String(token),
          value: Buffer.from(value as Uint8Array).toString('hex'),
          leaseIn: rounded(Number(end) - Date.now()),
          expiresIn: expires === null ? null : rounded(Number(expires) - Date.now())
        }
      }
      return { rows }
    },
    async restore() {
      for (const [name, row] of Object.entries(formats.rows)) {
        const values = [key(name), row.state, row.token, name, ...timesOf(row), Buffer.from(row.value, 'hex')]
        database.prepare('INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?, ?, ?)').run(...values)
      }
    }
  }
}

function timesOf({ leaseIn, expiresIn }: CasRow): [number, number | null] {
  return [Date.now() + leaseIn, expiresIn === null ? null : Date.now() + expiresIn]
}

/** Its rows are those of SQLite. */
async function mysqlBackend(): Promise<Backend> {
  const pool = mariadb.pool()
  const store = new MysqlStore({ pool })
  await store.createTable()
  return {
    store,
    dump: async () => ({}),
    async restore() {
      const [[row]] = await pool.query<RowDataPacket[]>('SELECT COUNT(*) AS count FROM idempotency_keys')
      t.equal(Number(row?.count), 0)
      for (const [name, found] of Object.entries(formats.rows)) {
        const values = [key(name), found.state, found.token, name, ...timesOf(found), Buffer.from(found.value, 'hex')]
        await pool.query('INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?, ?, ?)', values)
      }
    }
  }
}

async function postgresBackend(): Promise<Backend> {
  const pool = postgres.pool()
  const store = new PostgresStore({ pool })
  await store.createTable()
  return {
    store,
    async dump() {
      const found: Formats['postgres'] = {}
      for (const name of Object.keys(ways)) {
        const { rows } = await pool.query('SELECT to_jsonb(k) AS row FROM idempotency_keys k WHERE key = $1', [
          key(name)
        ])
        const row = rows[0]?.row as Record<string, string>
        const from = (time: string | undefined) =>
          time?.includes('infinity') ? time : rounded(Date.parse(time ?? '') - Date.now())
        found[name] = { ...row, lease_end: from(row.lease_end), expires_at: from(row.expires_at) }
      }
      return { postgres: found }
    },
    async restore() {
      for (const row of Object.values(formats.postgres)) {
        const to = (time: unknown) => (typeof time === 'number' ? new Date(Date.now() + time).toISOString() : time)
        const restored = { ...row, lease_end: to(row.lease_end), expires_at: to(row.expires_at) }
        const text = 'INSERT INTO idempotency_keys SELECT * FROM jsonb_populate_record(NULL::idempotency_keys, $1)'
        await pool.query(text, [JSON.stringify(restored)])
      }
    }
  }
}

t.test('what the first version has encrypted is read', async (t) => {
  const keys = [Buffer.alloc(32, 7)]
  if (isWriting) {
    const inner = new MemoryStore()
    const store = new EncryptedStore(inner, { keys })
    for (const [name, write] of Object.entries(ways)) await write(store, key(name))
    written.sealed = {}
    for (const name of Object.keys(ways)) written.sealed[name] = await inner.get(key(name))
    return
  }
  const found = new Map(Object.entries(formats.sealed).map(([name, sealed]) => [key(name), revived(sealed)]))
  const inner = Object.assign(new MemoryStore(), { get: async (key: string) => found.get(key) ?? null })
  const store = new EncryptedStore(inner, { keys })
  for (const name of Object.keys(ways)) {
    t.strictSame(essence((await store.get?.(key(name))) ?? null), formats.answers[name], name)
  }
})

/** With its body as bytes. */
function revived(sealed: Acquisition | null): Acquisition | null {
  if (sealed?.state !== 'completed' || sealed.record.kind !== 'reply') return sealed
  return { ...sealed, record: { ...sealed.record, body: Buffer.from(sealed.record.body) } }
}

const backends = { redisBackend, sqliteBackend, mysqlBackend, postgresBackend }
for (const [name, open] of Object.entries(backends)) {
  t.test(
    `claims and records that the first version has written are read: ${name.replace('Backend', '')}`,
    async (t) => {
      const { store, dump, restore } = await open()
      t.teardown(() => store.close?.())
      if (isWriting) {
        for (const [name, write] of Object.entries(ways)) await write(store, key(name))
        Object.assign(written, await dump())
        written.answers ??= {}
        for (const name of Object.keys(ways)) written.answers[name] = essence((await store.get?.(key(name))) ?? null)
        return
      }
      await restore()
      for (const name of Object.keys(ways)) {
        t.strictSame(essence((await store.get?.(key(name))) ?? null), formats.answers[name], name)
      }
      // Whose they are is known as well: the owner goes on, and nobody else.
      t.equal(await store.renew(key('running'), 'another', HOUR), false)
      t.equal(await store.renew(key('running'), 'running', HOUR), true)
      t.match(await store.acquire(key('given back, and free'), wanted()), { state: 'acquired', attempt: 1 })
      const heir = await store.acquire(key('given back, with steps'), wanted())
      t.match(heir, { state: 'acquired', attempt: 2, steps: [['charge', '1']] })
    }
  )
}

function wanted() {
  return { token: 'later', fingerprint, leaseMs: HOUR, retainMs: DAY, takeover: true }
}

t.test('a key has the storage key, the mark and the derived keys that it has always had', (t) => {
  const asked: [string | null, string][] = [
    [null, 'k'],
    ['alice', 'k'],
    ['alice', '8e03978e-40d5-43dd-bc93-6894a57f9324'],
    ['ünïcode 😀', 'a"b\\c\u0000'],
    ['lone \ud800', '\udfff']
  ]
  const found = asked.map(([scope, key]): Formats['keys'][number] => {
    const name = storageKey(scope, key)
    return [scope, key, name, markOf(name, scope), deriveKey(name, 'charge', scope === null ? 'Bearer x' : null)]
  })
  written.keys = found
  if (!isWriting) t.strictSame(found, formats.keys)
  t.end()
})

t.test(
  'a request has the fingerprint that it has always had, so that a retry after an upgrade is a retry',
  async (t) => {
    const json = { 'content-type': 'application/json' }
    const requests: Record<string, [options: IdempotencyOptions, request: object]> = {
      json: [{}, { headers: json, payload: '{"b":[1,"ü",null,true,1.5e21],"a":{"x":{}}}' }],
      'json, in another order': [
        {},
        { headers: json, payload: '{ "a": {"x":{}}, "b": [1, "ü", null, true, 1.5e21] }' }
      ],
      text: [{}, { headers: { 'content-type': 'text/plain' }, payload: 'text' }],
      'no body': [{}, {}],
      query: [{}, { url: '/orders/7?b=2&a=1&a=3' }],
      bearer: [{}, { headers: { authorization: 'Bearer token' } }],
      cookie: [{}, { headers: { cookie: 'session=1' } }],
      'api key': [{}, { headers: { 'x-api-key': '1' } }],
      scope: [{ scope: () => 'alice' }, { headers: { authorization: 'Bearer token' } }],
      target: [{ target: () => 'this' }, {}],
      'own fingerprint': [{ fingerprint: () => 'this' }, {}],
      'no fingerprint': [{ fingerprint: false }, { headers: json, payload: '{}' }]
    }
    const found: Record<string, string> = {}
    for (const [name, [options, request]] of Object.entries(requests)) {
      let claimed = ''
      const store: IdempotencyStore = {
        acquire: async (_, claim) => {
          claimed = claim.fingerprint
          return { state: 'acquired', attempt: 1 }
        },
        renew: async () => true,
        complete: async () => true,
        release: async () => true
      }
      const app = await build(t, { store, ...options })
      app.post('/orders/:id', { config: { idempotency: true } }, async () => 'x')
      const { headers } = request as { headers?: object }
      await app.inject({
        method: 'POST',
        url: '/orders/7',
        ...request,
        headers: { ...headers, 'idempotency-key': 'k' }
      })
      t.equal(originOf(claimed)?.route, '/orders/:id')
      found[name] = withoutOrigin(claimed)
    }
    written.fingerprints = found
    if (!isWriting) t.strictSame(found, formats.fingerprints)
  }
)

t.test('steps in transactions that the first version has written are read', async (t) => {
  const database = openSqlite(join(folder, 'steps.db'))
  t.teardown(() => database.close())
  const steps = sqliteTransactions(database)
  await steps.createTable()
  const step = (name: string) => ({ operation: key('k'), name, fingerprint: 'head.payload', expiresAt: null })
  const names = ['charge', 'Näme 2', 'x'.repeat(200)]
  if (isWriting) {
    for (const name of names) await steps.once(step(name), async () => JSON.stringify({ name, ü: 1 }))
    written.steps = database
      .prepare('SELECT * FROM idempotency_steps')
      .all()
      .map((row) => ({ ...row }))
    return
  }
  for (const row of formats.steps) {
    const columns = Object.keys(row)
    const places = columns.map(() => '?').join(', ')
    database
      .prepare(`INSERT INTO idempotency_steps (${columns.join(', ')}) VALUES (${places})`)
      .run(...Object.values(row))
  }
  for (const name of names) {
    const committed = await steps.once(step(name), () => Promise.reject(new Error('It was done before')))
    t.match(committed, { resumed: true, fingerprint: 'head.payload' })
    t.same(JSON.parse(committed.result), { name, ü: 1 })
  }
})
