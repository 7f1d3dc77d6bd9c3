import { randomBytes } from 'node:crypto'
import { channel } from 'node:diagnostics_channel'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { FastifyInstance } from 'fastify'
import type { Pool as MysqlPool, RowDataPacket } from 'mysql2/promise'
import type { OpenAPIV3_1 } from 'openapi-types'
import type { Pool, PoolClient } from 'pg'
import t from 'tap'
import idempotency, { type IdempotencyStore, MemoryStore, PostgresStore } from '../../index.js'
import type { IdempotentResponse } from '../../lib/client.js'
import { REGISTRATION_RULES } from '../../lib/options.js'
import { PostgresSql } from '../../lib/stores/postgres/statements.js'
import { storeConformance } from '../../lib/testkit.js'
import type { SqlTransactions } from '../../lib/transactions.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { startMariadb } from '../support/mariadb.js'
import { nodeTest } from '../support/node-test.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { bare, handled, OTHERS, snippet, tried } from './snippet.js'

/* The snippets of the README, and of the pages on stores, transactions and recipes, do what is said of them. */

const here = dirname(fileURLToPath(import.meta.url))
const text = (file: string) => readFileSync(join(here, '../../..', file), 'utf8')

async function replays(app: FastifyInstance, url: string, headers: Record<string, string> = {}): Promise<boolean> {
  const request = { method: 'POST' as const, url, headers: { 'idempotency-key': 'k', ...headers } }
  const [first, second] = [await app.inject(request), await app.inject(request)]
  return first.statusCode < 400 && first.body === second.body && second.headers[REPLAYED] === 'true'
}

t.test('quick-start: the second reply is the first one', async (t) => {
  const { app } = (await snippet('quick-start')) as { app: FastifyInstance }
  t.teardown(() => app.close())
  t.equal(await replays(app, '/charges'), true)
})

t.test('commonjs: require() gives the plugin', async (t) => {
  tried.add('commonjs')
  const { app } = createRequire(import.meta.url)('../docs/snippets/commonjs.cjs') as { app: FastifyInstance }
  t.teardown(() => app.close())
  t.equal(await replays(app, '/charges'), true)
})

t.test('transaction, drizzle, kysely: the handler writes once, in the transaction of its key', async (t) => {
  const server = await startPostgres()
  t.teardown(() => server.close())
  const pool = server.pool()
  await pool.query('CREATE TABLE accounts (name text PRIMARY KEY, balance integer NOT NULL)')
  await pool.query("INSERT INTO accounts VALUES ('alice', 100), ('bob', 0)")
  const balances = async () =>
    (await pool.query('SELECT balance FROM accounts ORDER BY name')).rows.map(({ balance }) => balance)

  process.env.DATABASE_URL = server.url
  const { app } = (await snippet('transaction')) as { app: FastifyInstance }
  const transfer = {
    method: 'POST' as const,
    url: '/transfers',
    headers: { 'idempotency-key': 'k' },
    payload: { from: 'alice', to: 'bob', amount: 30 }
  }
  const replies = [await app.inject(transfer), await app.inject(transfer)]
  t.same(
    replies.map(({ statusCode, headers }) => [statusCode, headers[REPLAYED]]),
    [
      [201, undefined],
      [201, 'true']
    ]
  )
  t.same(await balances(), [70, 30])
  await app.close()

  for (const [n, name] of ['drizzle', 'kysely'].entries()) {
    const app = await bare(t)
    await app.register(idempotency, { store: new PostgresStore({ pool }) })
    await snippet(name, { app })
    const deposit = { method: 'POST' as const, url: '/deposits', headers: { 'idempotency-key': name } }
    const [first, second] = [await app.inject(deposit), await app.inject(deposit)]
    t.same(first.json(), { name: 'alice', balance: 80 + n * 10 }, name)
    t.same([second.body, second.headers[REPLAYED]], [first.body, 'true'])
    t.same(await balances(), [80 + n * 10, 30])
  }
})

t.test('steps: what is finished is not done again, and is done exactly once in the database', async (t) => {
  const server = await startPostgres()
  t.teardown(() => server.close())
  const pool = server.pool()
  await pool.query('CREATE TABLE rides (id serial, destination text); CREATE TABLE jobs (name text, charge text)')
  process.env.DATABASE_URL = server.url
  const app = await bare(t, true)
  const keys: string[] = []
  const own = (await snippet('steps', {
    app,
    chargeCard: async ({ idempotencyKey }) => {
      keys.push(idempotencyKey)
      if (keys.length === 1) throw new Error('network')
      return { id: `ch_${keys.length}` }
    }
  })) as { db: SqlTransactions<PoolClient>; pool: Pool }
  t.teardown(() => own.pool.end())
  const { db } = own
  // The third attempt fails behind the charge.
  const { once } = db
  let isAway = true
  db.once = async (step, work) => {
    if (step.name === 'receipt' && isAway) throw new Error('no database')
    return once.call(db, step, work as never)
  }
  const request = { method: 'POST' as const, url: '/rides', headers: { 'idempotency-key': 'k' }, payload: { to: 'x' } }
  for (const _ of [1, 2]) t.equal((await app.inject(request)).statusCode, 500)
  isAway = false
  const replies = [await app.inject(request), await app.inject(request)]
  t.same(
    replies.map((reply) => [reply.json(), reply.headers[REPLAYED]]),
    [
      [{ ride: 1, charge: 'ch_2' }, undefined],
      [{ ride: 1, charge: 'ch_2' }, 'true']
    ]
  )
  t.same(keys, [keys[0], keys[0]])
  t.same((await pool.query('SELECT charge FROM jobs')).rows, [{ charge: 'ch_2' }])
  t.equal((await pool.query('SELECT FROM rides')).rowCount, 1)
})

t.test('ddl: it is the one of createTable', async (t) => {
  const [, ddl] = /<!-- ddl -->\n```sql\n([\s\S]*?)\n```/.exec(text('docs/stores.md')) ?? []
  t.equal(ddl, new PostgresSql(null, 'idempotency_keys').ddl)
})

t.test('handler: the derived key is the same on a retry', async (t) => {
  const app = await bare(t, true)
  const keys: string[] = []
  await snippet('handler', {
    app,
    chargeCard: async ({ idempotencyKey }) => {
      keys.push(idempotencyKey)
      if (keys.length === 1) throw new Error('network')
      return { id: 'ch_1' }
    }
  })
  const request = { method: 'POST' as const, url: '/charges', headers: { 'idempotency-key': 'k' } }
  t.equal((await app.inject(request)).statusCode, 500)
  t.equal((await app.inject(request)).statusCode, 201)
  t.same(keys, [keys[0], keys[0]])
})

t.test('instance: a key can be looked up and forgotten', async (t) => {
  const app = await bare(t)
  await app.register(idempotency, { scope: () => 'alice' })
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  const request = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': '8e03978e' } }
  await app.inject(request)
  t.match(await snippet('instance', { app }), { found: { state: 'completed' } })
  t.equal((await app.inject(request)).headers[REPLAYED], undefined)
})

t.test('own-store: it keeps its rules', async (t) => {
  const app = await bare(t)
  const { MapStore } = (await snippet('own-store', { app })) as { MapStore: new () => IdempotencyStore }
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  t.equal(await replays(app, '/'), true)
  const store = new MapStore()
  const claim = { fingerprint: 'f', leaseMs: 60_000, retainMs: 60_000, takeover: true }
  t.same(await store.acquire('k', { ...claim, token: 'a' }), { state: 'acquired', attempt: 1 })
  t.same(await store.acquire('k', { ...claim, token: 'a' }), { state: 'acquired', attempt: 1 })
  t.match(await store.acquire('k', { ...claim, token: 'b' }), { state: 'running', fingerprint: 'f' })
  t.same([await store.release('k', 'b'), await store.renew('k', 'b', 1)], [false, false])
  t.same([await store.renew('k', 'a', 0), await store.renew('k', 'a', 0)], [true, true])
  const waiting = await store.acquire('k', { ...claim, token: 'b', takeover: false })
  t.same(waiting, { state: 'abandoned', fingerprint: 'f', attempt: 1 })
  t.same(await store.acquire('k', { ...claim, token: 'b' }), { state: 'acquired', attempt: 2 })
  const record = { kind: 'tombstone', reason: 'hijacked', fingerprint: 'f', createdAt: 0 } as const
  t.equal(await store.complete('k', 'a', record, 1000), false)
  t.same([await store.release('k', 'b'), await store.release('k', 'b')], [true, true])
  t.equal(await store.complete('k', 'b', record, 1000), false)
  const left = await store.acquire('k', { ...claim, token: 'c', takeover: false })
  t.same(left, { state: 'abandoned', fingerprint: 'f', attempt: 2, ended: true })
  t.same(await store.acquire('k', { ...claim, token: 'c' }), { state: 'acquired', attempt: 3 })
  t.same([await store.complete('k', 'c', record, 1000), await store.complete('k', 'c', record, 1000)], [true, true])
  t.match(await store.acquire('k', { ...claim, token: 'd' }), { state: 'completed', record })
})

t.test('testkit: the store of docs/your-own-store.md keeps every promise', async (t) => {
  tried.add('testkit')
  const { code, output } = await nodeTest(`
    import Fastify from ${JSON.stringify(import.meta.resolve('fastify'))}
    import idempotency from ${JSON.stringify(new URL('../../index.js', import.meta.url).href)}
    import * as ownStore from ${JSON.stringify(new URL('../docs/snippets/own-store.js', import.meta.url).href)}
    import * as testkit from ${JSON.stringify(new URL('../docs/snippets/testkit.js', import.meta.url).href)}
    const { MapStore } = await ownStore.run({ app: Fastify(), idempotency })
    await testkit.run({ MapStore })
  `)
  t.equal(code, 0, code === 0 ? 'it ends well' : output)
  t.match(output, new RegExp(`^# pass ${storeConformance(() => new MemoryStore()).length}$`, 'm'))
})

t.test('node-redis: replies are in Redis', async (t) => {
  const server = await startRedis({ port: true })
  t.teardown(() => server.close())
  process.env.REDIS_URL = server.url
  const app = await bare(t)
  await snippet('node-redis', { app, idempotency })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  t.equal(await replays(app, '/'), true)
  const client = await server.client()
  t.equal((await client.keys('idempotency:*')).length, 1)
})

t.test('local-cache, encrypted: a reply on Redis is replayed from here, or cannot be read there', async (t) => {
  const redis = await startRedis()
  t.teardown(() => redis.close())
  const client = await redis.client()
  process.env.IDEMPOTENCY_KEYS = [randomBytes(32).toString('base64'), randomBytes(32).toString('hex')].join()
  for (const name of ['local-cache', 'encrypted']) {
    await client.flushall()
    const app = await bare(t)
    await snippet(name, { app, redis: client })
    app.post('/', { config: { idempotency: true } }, async () => 'a secret')
    t.equal(await replays(app, '/'), true, name)
    const [key = ''] = await client.keys('idempotency:*')
    t.equal(String(await client.get(key)).includes('a secret'), name === 'local-cache')
    await client.flushall()
    const again = await inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
    t.equal(again.headers[REPLAYED] === 'true', name === 'local-cache')
  }
})

t.test('mysql: a reply in MariaDB is replayed', async (t) => {
  const server = await startMariadb()
  t.teardown(() => server.close())
  process.env.DATABASE_URL = server.url
  const app = await bare(t)
  const { pool } = (await snippet('mysql', { app })) as { pool: MysqlPool }
  t.teardown(() => pool.end())
  app.post('/', { config: { idempotency: true } }, async () => 'kept')
  t.equal(await replays(app, '/'), true)
  const [[row] = []] = await pool.query<RowDataPacket[]>('SELECT state FROM idempotency_keys')
  t.match(row, { state: 'completed' })
})

t.test('sqlite: a reply in a file is replayed after a restart', async (t) => {
  process.env.IDEMPOTENCY_FILE = join(makeFolder('readme'), 'file')
  const replies = []
  for (const run of ['first', 'second']) {
    const app = await bare(t)
    await snippet('sqlite', { app })
    app.post('/', { config: { idempotency: true } }, async () => run)
    replies.push((await inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })).body)
    await app.close()
  }
  t.same(replies, ['first', 'first'])
})

t.test('client: one operation, whatever its client has to repeat', async (t) => {
  const app = await bare(t, true)
  app.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => done(null, body))
  app.post('/charges', { config: { idempotency: true } }, async (_request, reply) => {
    if (++handled.runs < 2) return reply.code(503).header('retry-after', '0').send()
    return { runs: handled.runs }
  })
  const server = await app.listen({ host: '127.0.0.1', port: 0 })
  const { response } = (await snippet('client', { server })) as { response: IdempotentResponse }
  t.match(response.idempotency, { attempts: 2, replayed: false })
  t.same(await response.json(), { runs: 2 })
})

t.test('openapi: documents show the key', async (t) => {
  const app = await bare(t, true)
  await snippet('openapi', { app })
  app.post('/charges', { config: { idempotency: true } }, async () => 'x')
  await app.ready()
  const { parameters } = (app.swagger() as OpenAPIV3_1.Document).paths?.['/charges']?.post ?? {}
  t.match(parameters, [{ in: 'header', name: 'Idempotency-Key' }])
})

t.test('forms: a double click goes to the same page, whatever cookies have changed meanwhile', async (t) => {
  const app = await bare(t)
  await snippet('forms', { app })
  const key = /value="([^"]+)"/.exec((await app.inject('/')).body)?.[1]
  const submit = (cookie: string) =>
    inject(app, {
      method: 'POST',
      url: '/orders',
      headers: { 'content-type': 'application/x-www-form-urlencoded', cookie },
      payload: `__idempotent_key=${key}`
    })
  const replies = await Promise.all([submit('visits=1'), submit('visits=2')])
  t.same(
    replies.map((reply) => reply.statusCode),
    [303, 303]
  )
  t.equal(replies.filter((reply) => reply.headers[REPLAYED] === 'true').length, 1)
})

t.test('stripe: a 500 is final', async (t) => {
  const app = await bare(t)
  await snippet('stripe', { app })
  app.post('/', { config: { idempotency: true } }, async () => Promise.reject(new Error(String(++handled.runs))))
  const request = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }
  t.equal((await app.inject(request)).body, (await app.inject(request)).body)
})

t.test('abandoned: the outcome of a dead owner is not known', async (t) => {
  const app = await bare(t, true)
  await snippet('abandoned', { app })
  t.equal(await replays(app, '/payouts'), true)
})

// What a browser makes of it is tried in browser/cross-origin.test.ts.
t.test('cors: scripts of another origin see the mark of a replay', async (t) => {
  const app = await bare(t)
  await snippet('cors', { app })
  app.get('/', async () => 'x')
  const { headers } = await app.inject({ url: '/', headers: { origin: 'https://example.com' } })
  t.match(headers['access-control-expose-headers'], /Idempotent-Replayed/)
})

t.test('metrics: events are counted by their name and route, and can be scraped', async (t) => {
  const app = await build(t)
  await snippet('metrics', { app })
  app.post('/orders', { config: { idempotency: true } }, async () => 'made')
  app.post('/strict', { config: { idempotency: { required: true } } }, async () => 'made')
  const send = () => app.inject({ method: 'POST', url: '/orders', headers: { 'idempotency-key': 'k' } })
  await send()
  await send()
  await app.inject({ method: 'POST', url: '/strict' })
  const { headers, payload } = await app.inject('/metrics')
  t.match(headers['content-type'], 'text/plain')
  t.match(payload, 'idempotency_events_total{event="stored",route="/orders",code=""} 1')
  t.match(payload, 'idempotency_events_total{event="replayed",route="/orders",code=""} 1')
  t.match(payload, 'idempotency_events_total{event="refused",route="/strict",code="FST_IDEMPOTENCY_KEY_MISSING"} 1')
})

t.test('events: a lost claim is logged by its request', async (t) => {
  await snippet('events')
  const warned: unknown[] = []
  const request = { log: { warn: (...args: unknown[]) => warned.push(args) } }
  channel('fastify-idempotency:lease-lost').publish({ request, key: 'hash', route: '/orders', attempt: 1 })
  t.match(warned, [[{ key: 'hash', route: '/orders', attempt: 1 }, /two owners/]])
})

t.test('no snippet was left out', async (t) => {
  t.same([...tried].sort(), [...OTHERS].sort())
})

t.test('the table of options names every option there is, and no other', async (t) => {
  for (const page of ['README.md', 'docs/options.md']) {
    const [, table = ''] = /\n\| option \|.*\n([\s\S]*?)\n\n/.exec(text(page)) ?? []
    const rows = [...table.matchAll(/^\| `(\w+)` \|.*?\|(.*?)\|/gm)]
    t.same(rows.map(([, name]) => name).sort(), Object.keys(REGISTRATION_RULES).sort(), page)
    if (page !== 'README.md') continue
    const ofRoutes = rows.filter(([, , perRoute]) => perRoute?.includes('✔')).map(([, name]) => name)
    const app = await bare(t, true)
    const isKnown = (name: string) => {
      try {
        app.post(`/${name}`, { config: { idempotency: { [name]: Symbol(name) } as object } }, async () => {})
      } catch (error) {
        return !String(error).includes('is not known')
      }
      return true
    }
    t.same(ofRoutes.sort(), Object.keys(REGISTRATION_RULES).filter(isKnown).sort(), 'and which ones a route may set')
  }
})

t.test('the table of errors names every code there is', async (t) => {
  const readme = text('README.md')
  t.match(readme, /Each code begins with `FST_IDEMPOTENCY_`/)
  const codes = new Set(readFileSync(join(here, '../../lib/errors.js'), 'utf8').match(/FST_IDEMPOTENCY_\w+/g))
  const isNamed = (code: string) => readme.includes(`\`${code}\``)
  for (const code of codes) t.ok(isNamed(code) || isNamed(code.replace('FST_IDEMPOTENCY_', '')), code)
})

t.test('mistakes at boot look as the README says', async (t) => {
  const rows = text('README.md').matchAll(/^\| .* \| `(FST_IDEMPOTENCY_\w+)`: (.*) \|$/gm)
  const said = new Map([...rows].map(([, code = '', message = '']) => [code, message]))
  const declare = (app: FastifyInstance) => app.post('/charges', { config: { idempotency: true } }, async () => 'x')
  const mistakes: Record<string, (app: FastifyInstance) => Promise<unknown>> = {
    async FST_IDEMPOTENCY_ROUTE_TOO_EARLY(app) {
      app.register(idempotency)
      declare(app)
    },
    async FST_IDEMPOTENCY_NOT_COVERED(app) {
      app.register(async (own) => void (await own.register(idempotency)))
      app.register(async (own) => void declare(own))
    },
    async FST_IDEMPOTENCY_ALREADY_REGISTERED(app) {
      await app.register(idempotency)
      await app.register(idempotency)
    },
    async FST_IDEMPOTENCY_INVALID_OPTION(app) {
      await app.register(idempotency, { tll: 1 } as object)
    }
  }
  t.same([...said.keys()].sort(), Object.keys(mistakes).sort())
  for (const [code, make] of Object.entries(mistakes)) {
    const app = await bare(t)
    const boot = async () => {
      await make(app)
      await app.ready()
    }
    const error = await boot().catch((error: Error & { code?: string }) => error)
    t.equal(error?.code, code)
    const message = said.get(code) ?? ''
    if (message.endsWith('…')) t.ok(error?.message.startsWith(message.slice(0, -1)), String(error))
    else t.equal(error?.message, message)
  }
})
