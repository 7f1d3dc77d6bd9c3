import { createSecretKey, randomBytes, randomUUID } from 'node:crypto'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import {
  type ClaimTransaction,
  EncryptedStore,
  type IdempotencyStore,
  MemoryStore,
  PostgresStore,
  RedisStore,
  SqliteStore,
  type StoredRecord,
  type StoredReply,
  type StoredStep,
  type TransactionAcquisition,
  type TransactionClaim
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { openSqlite } from '../support/sqlite.js'
import { claim, conforms, finish, lapsed, newKey, reply, same, take, tombstone } from '../support/store-fixtures.js'

const [redis, postgres] = await Promise.all([startRedis(), startPostgres()])
t.teardown(() => Promise.all([redis.close(), postgres.close()]))

/** Half-way through a rotation: what one process writes with the new key, others read that still write with the old one. */
const keys = [randomBytes(32), randomBytes(32)]
const rotated = keys.toReversed()

/* What it promises as a store */

/** Puts a record in the place of another, without its encryption. */
async function putInClear(store: Required<Pick<IdempotencyStore, 'delete'>> & IdempotencyStore, key: string) {
  await store.delete(key)
  await finish(store, key)
}

conforms(t, 'an EncryptedStore in front of a MemoryStore keeps every promise of a store', () => {
  const inner = new MemoryStore()
  return {
    store: new EncryptedStore(inner, { keys }),
    second: new EncryptedStore(inner, { keys: rotated }),
    spoil: (key: string) => putInClear(inner, key),
    dispose: () => inner.close()
  }
})

conforms(t, 'an EncryptedStore in front of a RedisStore keeps every promise of a store', async () => {
  const keyPrefix = `${randomUUID()}:`
  const clients = [await redis.client(), await redis.client()] as const
  const inner = clients.map((client) => new RedisStore(client, { keyPrefix })) as [RedisStore, RedisStore]
  const [store, second] = [new EncryptedStore(inner[0], { keys }), new EncryptedStore(inner[1], { keys: rotated })]
  return {
    store,
    second,
    spoil: async (key: string) => {
      // In what is sealed as the fingerprint, which a list reads as well.
      const value = (await clients[0].getBuffer(keyPrefix + key)) as Buffer
      const at = value.indexOf('["') + 20
      await clients[0].setrange(keyPrefix + key, at, Buffer.from([(value[at] as number) ^ 1]))
    },
    dispose: async () => {
      await Promise.all([store.close?.(), second.close?.()])
      for (const client of clients) client.disconnect()
    }
  }
})

const pool = postgres.pool()

async function newTable() {
  const table = `keys_${randomUUID().replaceAll('-', '')}`
  const inner = new PostgresStore({ pool, table })
  await inner.createTable()
  return { table, inner }
}

const { table } = await newTable()
conforms(t, 'an EncryptedStore in front of a PostgresStore keeps every promise of a store', () => {
  const inner = [new PostgresStore({ pool, table }), new PostgresStore({ pool, table })] as const
  const [store, second] = [new EncryptedStore(inner[0], { keys }), new EncryptedStore(inner[1], { keys: rotated })]
  const spoil = (key: string) =>
    pool.query(`UPDATE ${table} SET fingerprint = reverse(fingerprint) WHERE key = $1`, [key])
  return { store, second, spoil, dispose: () => Promise.all([store.close?.(), second.close?.()]) }
})

const folder = makeFolder('encrypted')
conforms(t, 'an EncryptedStore in front of a SqliteStore keeps every promise of a store', () => {
  const path = join(folder, randomUUID())
  const databases = [openSqlite(path), openSqlite(path)] as const
  const inner = databases.map((database) => new SqliteStore({ database })) as [SqliteStore, SqliteStore]
  const [store, second] = [new EncryptedStore(inner[0], { keys }), new EncryptedStore(inner[1], { keys: rotated })]
  return {
    store,
    second,
    spoil: (key: string) => putInClear(inner[0], key),
    dispose: async () => {
      await Promise.all([store.close?.(), second.close?.()])
      for (const database of databases) database.close()
    }
  }
})

t.test('an EncryptedStore has what the store behind it has, and nothing else', async (t) => {
  const names = ['step', 'changed', 'get', 'delete', 'list', 'settle', 'begin', 'close'] as const
  const has = (store: IdempotencyStore) => names.filter((name) => store[name] !== undefined)
  const whole = new MemoryStore()
  const least = { acquire: whole.acquire, renew: whole.renew, complete: whole.complete, release: whole.release }
  t.same(has(new EncryptedStore(least, { keys })), [])
  const all = ['step', 'changed', 'get', 'delete', 'list', 'settle', 'close']
  t.same(has(new EncryptedStore(whole, { keys })), all)
  t.ok(has(new EncryptedStore(new PostgresStore({ pool }), { keys })).includes('begin'))
})

/* Confidentiality */

const SECRETS = ['4242-4242', 'x-secret', 'hidden-value', 'location']

/** Goes through all that a route does with a store: a claim, a reply, a replay, a conflict, a tombstone. */
async function useAll(t: Test, inner: IdempotencyStore) {
  const app = await build(t, { store: new EncryptedStore(inner, { keys }), maxReplySize: 100_000 })
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    const during = await send('a')
    t.equal(during.statusCode, 409)
    return reply.code(201).header('location', '/4242-4242').header('x-secret', 'hidden-value').send('card 4242-4242')
  })
  app.post('/huge', { config: { idempotency: true } }, async () => '4242-4242'.repeat(20_000))
  const send = (key: string, url = '/') =>
    inject(app, { method: 'POST', url, headers: { 'idempotency-key': key }, payload: { pin: 1234 } })
  t.equal((await send('a')).statusCode, 201)
  const replay = await send('a')
  t.equal(replay.headers[REPLAYED], 'true')
  t.match(replay, { statusCode: 201, payload: 'card 4242-4242', headers: { location: '/4242-4242' } })
  t.equal((await send('b', '/huge')).statusCode, 200)
  t.match((await send('b', '/huge')).json(), { code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE' })
  const other = await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'a' }, payload: {} })
  t.match(other.json(), { code: 'FST_IDEMPOTENCY_KEY_REUSED' })
}

/** Every fingerprint that goes through a store, in the clear. */
function fingerprints(store: IdempotencyStore): { seen: Set<string>; store: IdempotencyStore } {
  const seen = new Set<string>()
  return {
    seen,
    store: {
      ...store,
      acquire: (key, claim) => {
        seen.add(claim.fingerprint)
        return store.acquire(key, claim)
      },
      renew: (...args) => store.renew(...args),
      complete: (key, token, record, ttl) => {
        seen.add(record.fingerprint)
        return store.complete(key, token, record, ttl)
      },
      release: (...args) => store.release(...args)
    }
  }
}

t.test('nothing of a reply, and no fingerprint, is sent to Redis or kept there in the clear', async (t) => {
  const client = await redis.client()
  await client.flushall()
  const { sent, scripted } = await redis.commands(() => useAll(t, new RedisStore(client)))
  const kept: string[] = []
  for (const key of await client.keys('*')) kept.push(((await client.getBuffer(key)) as Buffer).toString('latin1'))
  t.equal(kept.length, 2)
  const all = [...sent, ...scripted].flat().concat(kept).join('\n')
  t.ok(all.length > 1_000)
  for (const secret of SECRETS) t.notOk(all.includes(secret), secret)
})

t.test('the fingerprints of a claim and of a record do not reach the store behind', async (t) => {
  const inner = fingerprints(new MemoryStore())
  const outer = new EncryptedStore(inner.store, { keys })
  for (const record of [reply(), tombstone('hijacked')]) {
    const [key, mine] = [newKey(), claim({ fingerprint: 'same' })]
    await outer.acquire(key, mine)
    await outer.acquire(key, mine)
    await outer.complete(key, mine.token, { ...record, fingerprint: 'same' }, 60_000)
  }
  t.equal(inner.seen.size, 6, 'none is like another')
  for (const seen of inner.seen) t.match(seen, /^[\w-]{60,}$/)
})

t.test('nothing of a reply, and no fingerprint, is in the table of PostgreSQL in the clear', async (t) => {
  const { table, inner } = await newTable()
  t.teardown(() => inner.close())
  await useAll(t, inner)
  const { rows } = await pool.query(`SELECT *, encode(body, 'escape') AS bytes FROM ${table}`)
  t.equal(rows.length, 2)
  const all = JSON.stringify(rows)
  for (const secret of [...SECRETS, '201']) {
    t.notOk(secret === '201' ? rows.some((row) => row.status_code === 201) : all.includes(secret), secret)
  }
})

t.test('the results of steps do not reach the store behind, and their names do', async (t) => {
  const inner = new MemoryStore()
  const store = new EncryptedStore(inner, { keys })
  const [key, mine] = [newKey(), claim()]
  await store.acquire(key, mine)
  t.equal(await store.step?.(key, mine.token, ['charge', '{"card":"4242"}']), true)
  t.equal(await store.step?.(key, mine.token, ['again', '{"card":"4242"}']), true)
  const { steps = [] } = (await inner.get(key)) as { steps?: StoredStep[] }
  t.strictSame(
    steps.map(([name]) => name),
    ['charge', 'again']
  )
  for (const [, sealed] of steps) t.match(sealed, /^[\w-]{80,}$/)
  t.equal(new Set(steps.map(([, sealed]) => sealed)).size, 2, 'none is like another')
  await inner.release(key, mine.token)
  t.strictSame(await store.acquire(key, claim({ takeover: true })), {
    state: 'acquired',
    attempt: 2,
    steps: [
      ['charge', '{"card":"4242"}'],
      ['again', '{"card":"4242"}']
    ]
  })
})

/* Integrity */

t.test('the result of a step that is moved to another key, or to another step, is refused', async (t) => {
  const inner = new MemoryStore()
  const store = new EncryptedStore(inner, { keys })
  const theirs = newKey()
  const token = await take(store, theirs)
  await store.step?.(theirs, token, ['charge', '"theirs"'])
  const { steps = [] } = (await inner.get(theirs)) as { steps?: StoredStep[] }
  const [[, sealed]] = steps as [StoredStep]
  for (const [key, step] of [
    [newKey(), ['charge', sealed]],
    [newKey(), ['charge', '"in the clear"']],
    [theirs, ['refund', sealed]]
  ] as const) {
    const owner = key === theirs ? token : await take(store, key)
    t.equal(await inner.step(key, owner, step), true)
    for (const ask of [
      () => store.get?.(key),
      () => store.acquire(key, claim()),
      () => store.acquire(key, claim({ token: owner }))
    ]) {
      await t.rejects(async () => ask(), { isFree: false, message: /belongs to another key|not encrypted/ })
    }
  }
})

t.test('a record that is moved to another key is refused', async (t) => {
  const inner = new MemoryStore()
  t.teardown(() => inner.close())
  const store = new EncryptedStore(inner, { keys })
  const [mine, theirs] = [newKey(), newKey()]
  await finish(store, theirs, reply({ body: Buffer.from('their secret') }))
  const found = await inner.get(theirs)
  if (found?.state !== 'completed') throw new Error('There is no record')
  await finish(inner, mine, found.record)
  for (const ask of [() => store.get?.(mine), () => store.acquire(mine, claim({ takeover: true }))]) {
    await t.rejects(async () => ask(), { message: /belongs to another key/ })
  }
  same(t, await store.acquire(theirs, claim()), reply({ body: Buffer.from('their secret') }))
})

t.test('the fingerprint of a claim that is moved to another key is refused', async (t) => {
  const inner = new MemoryStore()
  t.teardown(() => inner.close())
  const store = new EncryptedStore(inner, { keys })
  const [mine, theirs] = [newKey(), newKey()]
  await take(store, theirs)
  const found = await inner.get(theirs)
  if (found?.state !== 'running') throw new Error('There is no claim')
  await take(inner, mine, { fingerprint: found.fingerprint })
  await t.rejects(store.acquire(mine, claim()), { message: /belongs to another key/ })
  t.match(await store.acquire(theirs, claim()), { state: 'running', fingerprint: 'fingerprint' })
})

t.test('a claim whose fingerprint was taken away is not taken over', async (t) => {
  const inner = new MemoryStore()
  t.teardown(() => inner.close())
  const store = new EncryptedStore(inner, { keys })
  const key = newKey()
  await lapsed(inner, key, { fingerprint: '' })
  await t.rejects(store.acquire(key, claim()), { message: /not encrypted/ })
})

t.test('whatever bit of a stored record is flipped, the answer is an error or the very same', async (t) => {
  const client = await redis.client()
  await client.flushall()
  const store = new EncryptedStore(new RedisStore(client), { keys })
  const record = reply({ body: Buffer.from('ok'), headers: [['x-a', 'b']] })
  const key = newKey()
  const token = await finish(store, key, record)
  const name = `idempotency:${key}`
  const value = (await client.getBuffer(name)) as Buffer
  const head = 3 + Buffer.byteLength(token)
  let refused = 0
  for (let bit = 0; bit < value.length * 8; bit++) {
    const damaged = Buffer.from(value)
    damaged[bit >> 3] = (damaged[bit >> 3] as number) ^ (1 << (bit % 8))
    await client.set(name, damaged, 'PX', 60_000)
    try {
      same(t, (await store.get?.(key)) ?? null, record)
      if (bit >= head * 8) t.fail(`bit ${bit} was not seen`)
    } catch (error) {
      if (!(error instanceof Error) || error instanceof TypeError) t.fail(`bit ${bit}: ${error}`)
      refused++
    }
  }
  t.ok(refused >= (value.length - head) * 8, 'every one behind the owner, whom Redis keeps for itself')
  await client.set(name, value)
  same(t, await store.acquire(key, claim()), record)
})

const wrong: [name: string, spoil: (inner: MemoryStore, key: string) => Promise<unknown>][] = [
  ['in the clear', (inner, key) => finish(inner, key, reply({ body: Buffer.from('in the clear') }))],
  ['of another key', (inner, key) => finish(new EncryptedStore(inner, { keys: [randomBytes(32)] }), key)],
  [
    'that is a tombstone of another key',
    (inner, key) => finish(new EncryptedStore(inner, { keys: [randomBytes(32)] }), key, tombstone('hijacked'))
  ],
  [
    'that was abandoned by another key',
    (inner, key) => lapsed(new EncryptedStore(inner, { keys: [randomBytes(32)] }), key)
  ],
  ['of no length', (inner, key) => finish(inner, key, reply({ body: Buffer.alloc(0) }))]
]
for (const [name, spoil] of wrong) {
  t.test(`a record ${name} is 503: no replay, and the handler does not run`, async (t) => {
    const inner = new MemoryStore()
    const app = await build(t, { store: new EncryptedStore(inner, { keys }) })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => ++runs)
    await spoil(inner, storageKey(null, 'k'))
    const answer = await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
    t.equal(answer.statusCode, 503)
    t.match(answer.json(), { code: 'FST_IDEMPOTENCY_STORE_UNAVAILABLE' })
    t.notOk(answer.headers[REPLAYED])
    t.equal(runs, 0)
    t.not(await inner.get(storageKey(null, 'k')), null, 'it is left where it is')
  })
}

t.test('a record that was added to, where the store behind can be read, is refused', async (t) => {
  const inner = new MemoryStore()
  const outer = new EncryptedStore(inner, { keys })
  const key = newKey()
  await finish(outer, key)
  const found = await inner.get(key)
  if (found?.state !== 'completed') return t.fail('no record')
  const { record } = found
  for (const change of [{ headers: [['x-evil', '1']] }, { statusCode: 201 }, { text: true }, { createdAt: 1 }, {}]) {
    await inner.delete(key)
    await finish(inner, key, { ...record, ...change } as StoredRecord)
    if (Object.keys(change).length > 0) await t.rejects(outer.acquire(key, claim()), { message: /damaged/ })
    else same(t, await outer.acquire(key, claim()), reply())
  }
})

t.test('all replies look alike from outside, tombstones show their reasons, and nothing shows a time', async (t) => {
  const inner = new MemoryStore()
  const store = new EncryptedStore(inner, { keys })
  const alike = { kind: 'reply', createdAt: 0, statusCode: 200, headers: [], text: false }
  for (const [record, expected] of [
    [reply(), alike],
    [reply({ statusCode: 402, text: false }), alike],
    [tombstone('hijacked'), { kind: 'tombstone', createdAt: 0, reason: 'hijacked' }],
    [tombstone('settled'), { kind: 'tombstone', createdAt: 0, reason: 'settled' }]
  ] as const) {
    const key = newKey()
    await finish(store, key, record)
    const found = await inner.get(key)
    if (found?.state !== 'completed') return t.fail('it is no record')
    const { fingerprint, body, ...outside } = found.record as StoredReply
    t.strictSame(outside, expected)
    t.match(fingerprint, /^[\w-]{60,}$/)
    same(t, await store.acquire(key, claim()), record)
  }
})

t.test('a tombstone whose reason or time was changed is refused', async (t) => {
  const inner = new MemoryStore()
  const store = new EncryptedStore(inner, { keys })
  const key = newKey()
  await finish(store, key, tombstone('hijacked'))
  const found = await inner.get(key)
  if (found?.state !== 'completed') return t.fail('no record')
  for (const change of [{ reason: 'stream-failed' }, { createdAt: 1 }] as const) {
    await inner.delete(key)
    await finish(inner, key, { ...found.record, ...change } as StoredRecord)
    await t.rejects(store.acquire(key, claim()), { message: /damaged/ })
  }
})

t.test('a tombstone that somebody else has put there is refused', async (t) => {
  const inner = new MemoryStore()
  const store = new EncryptedStore(inner, { keys })
  const key = newKey()
  await finish(store, key)
  const found = await inner.get(key)
  if (found?.state !== 'completed') return t.fail('no record')
  const { fingerprint } = found.record
  await inner.delete(key)
  await finish(inner, key, { ...tombstone('hijacked'), fingerprint })
  await t.rejects(store.acquire(key, claim()), { message: /damaged/ })
})

t.test('a reply that is too large for the store behind is a tombstone, which knows its request', async (t) => {
  const inner = new MemoryStore({ maxBytes: 2_000 })
  t.teardown(() => inner.close())
  const store = new EncryptedStore(inner, { keys })
  const key = newKey()
  await finish(store, key, reply({ body: Buffer.alloc(3_000), fingerprint: 'mine' }))
  const { createdAt } = reply()
  const record: StoredRecord = { kind: 'tombstone', reason: 'too-large', fingerprint: 'mine', createdAt }
  same(t, await store.acquire(key, claim()), record)
})

/* Rotation */

t.test('keys are rotated without a reply being lost', async (t) => {
  const inner = new MemoryStore()
  t.teardown(() => inner.close())
  const [first, next] = [randomBytes(32), randomBytes(32)]
  const before = new EncryptedStore(inner, { keys: [first] })
  const learning = new EncryptedStore(inner, { keys: [first, next] })
  const after = new EncryptedStore(inner, { keys: [next, first] })
  const done = new EncryptedStore(inner, { keys: [next] })
  const pairs = [
    [before, learning],
    [learning, before],
    [learning, after],
    [after, learning],
    [after, done],
    [done, after]
  ] as const
  for (const [writer, reader] of pairs) {
    const [completed, running] = [newKey(), newKey()]
    await finish(writer, completed)
    same(t, await reader.acquire(completed, claim()), reply())
    const token = await take(writer, running)
    t.match(await reader.acquire(running, claim()), { state: 'running', fingerprint: 'fingerprint' })
    t.equal(await reader.complete(running, token, reply(), 60_000), true)
  }
  const old = newKey()
  await finish(before, old)
  await t.rejects(done.acquire(old, claim({ takeover: true })), { message: /not among the keys/ })
})

/* Transactions */

t.test('a transaction stores its reply encrypted, and rolls back like any other', async (t) => {
  const { table, inner } = await newTable()
  await pool.query(`CREATE TABLE effects_of_${table} (what text)`)
  const store = new EncryptedStore(inner, { keys })
  const app = await build(t, { store, transaction: true, required: true })
  let fail = true
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    await request.idempotency?.transaction?.query(`INSERT INTO effects_of_${table} VALUES ('done')`)
    if (fail) throw new Error('not yet')
    return reply.code(201).send('4242-4242')
  })
  const send = (payload = {}) => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' }, payload })
  const effects = async () => (await pool.query(`SELECT FROM effects_of_${table}`)).rowCount
  t.equal((await send()).statusCode, 500)
  t.equal(await effects(), 0)
  fail = false
  t.equal((await send()).statusCode, 201)
  const replay = await send()
  t.match(replay, { statusCode: 201, payload: '4242-4242' })
  t.equal(replay.headers[REPLAYED], 'true')
  t.equal(await effects(), 1)
  t.equal((await send({ other: true })).statusCode, 422)
  const { rows } = await pool.query(`SELECT *, encode(body, 'escape') AS bytes FROM ${table}`)
  t.equal(rows.length, 1)
  t.notOk(JSON.stringify(rows).includes('4242'))
})

t.test('two requests at once in transactions: one runs, and the other gets its 409 or its reply', async (t) => {
  const { inner } = await newTable()
  const stores = [0, 1].map(() => new EncryptedStore(inner, { keys }))
  let runs = 0
  const apps = await Promise.all(
    stores.map(async (store) => {
      const app = await build(t, { store, transaction: true, onConflict: 'wait' })
      app.post('/', { config: { idempotency: true } }, async () => `run ${++runs}`)
      return app
    })
  )
  const replies = await Promise.all(
    [0, 1, 0, 1].map((n) => inject(apps[n] as never, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } }))
  )
  t.same(
    replies.map(({ statusCode, payload }) => [statusCode, payload]),
    Array(4).fill([200, 'run 1'])
  )
  t.equal(runs, 1)
})

t.test('a transaction behind it is renewed, cut and given up like any other, and its loss is heard', async (t) => {
  const told: string[] = []
  const lost = new AbortController()
  const client = {} as never
  class Transactional extends MemoryStore {
    async begin(key: string, claim: TransactionClaim): Promise<TransactionAcquisition> {
      await this.acquire(key, claim)
      const transaction: ClaimTransaction = {
        client,
        lost: lost.signal,
        complete: async () => ({ state: 'committed' }),
        rollback: async () => told.push('rollback') > 0,
        keepAlive: () => void told.push('keepAlive'),
        abandon: () => void told.push('abandon')
      }
      return { state: 'acquired', attempt: 1, transaction }
    }
  }
  const store = new EncryptedStore(new Transactional(), { keys })
  const begun = await store.begin?.(newKey(), { ...claim(), wake: false, timeoutMs: 1_000 })
  if (begun?.state !== 'acquired') throw new Error('The key is free')
  const { transaction } = begun
  t.equal(transaction.client, client)
  transaction.keepAlive()
  transaction.abandon()
  t.equal(await transaction.rollback(), true)
  t.same(told, ['keepAlive', 'abandon', 'rollback'])
  lost.abort()
  t.ok(transaction.lost.aborted)
})

/* Options */

t.test('what an EncryptedStore cannot take is named at construction, and no key is shown', (t) => {
  const store = new MemoryStore()
  const secret = randomBytes(32)
  const short = 'hunter2-hunter2'
  const cases: [args: unknown[], message: RegExp][] = [
    [[undefined, { keys }], /takes an IdempotencyStore .*got undefined/],
    [[{ acquire() {} }, { keys }], /takes an IdempotencyStore .*acquire, renew, complete and release/],
    [[store], /"keys" takes an array of keys, got undefined/],
    [[store, null], /"keys" takes an array of keys/],
    [[store, {}], /"keys" takes an array of keys/],
    [[store, { keys: [] }], /"keys" takes an array of keys, got an array of 0/],
    [[store, { keys: secret }], /"keys" takes an array of keys, got 32 bytes/],
    [[store, { keys: { a: secret } }], /"keys" takes an array of keys/],
    [[store, { keys: [secret, short] }], /keys\[1\] is a string of 15 characters/],
    [[store, { keys: [secret.subarray(16)] }], /keys\[0\] is 16 bytes/],
    [[store, { keys: [undefined] }], /keys\[0\] is undefined/],
    [[store, { keys: [createSecretKey(randomBytes(16))] }], /32 bytes.*keys\[0\] is/],
    [[store, { keys: [secret, secret.toString('base64')] }], /each key once; keys\[1\] is there already/],
    [[store, { keys, key: secret }], /EncryptedStore option "key" is not known/]
  ]
  for (const [args, message] of cases) {
    const make = () => Reflect.construct(EncryptedStore, args)
    const error = t.throws(make, { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message }) as unknown as Error
    for (const part of [short, secret.toString('base64').slice(0, 10), secret.toString('hex').slice(0, 10)]) {
      t.notOk(error.message.includes(part))
    }
  }
  t.end()
})
