import { join } from 'node:path'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { type IdempotencyOptions, MemoryStore, PostgresStore, RedisStore, SqliteStore } from '../../index.js'
import { conform, type RuleOutcome } from '../../lib/conform.js'
import { build } from '../support/app.js'
import { PROFILE } from '../support/broken-endpoint.js'
import { listening } from '../support/latch.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { openSqlite } from '../support/sqlite.js'

// The suite, run against this plugin over HTTP: with each kind of store, and with settings that change what clients see.

// Most of the time is waited for.
t.jobs = 4

interface Charge {
  amount: number
  currency: string
  processingMs?: number
  fail?: boolean
}

/** The API of the profile, on Fastify with the plugin. */
async function api(t: Test, options: IdempotencyOptions): Promise<string> {
  const app = await build(t, {
    required: true,
    problemDetails: true,
    scope: (request) => String(request.headers.authorization),
    ...options
  })
  app.addHook('onRequest', async (request, reply) => {
    if (request.method === 'POST' && !/^Bearer (alice|bob)$/.test(request.headers.authorization ?? '')) {
      return reply.code(401).send({ message: 'Who are you?' })
    }
  })
  let executions = 0
  app.get('/executions', async () => ({ count: executions }))
  app.get('/docs', async () => 'Idempotency-Key: expires after a day')
  for (const path of ['/charges', '/refunds', '/receipts', '/exports', '/reports', '/expiring']) {
    const idempotency = path === '/expiring' ? { ttl: PROFILE.expiryMs as number } : true
    app.post<{ Body: Charge }>(path, { config: { idempotency } }, async (request, reply) => {
      const { amount, currency, processingMs = 0, fail } = request.body
      const id = ++executions
      await sleep(processingMs)
      if (fail) throw new Error('The bank does not answer')
      reply.code(201).header('location', `${path}/${id}`)
      switch (path) {
        case '/receipts':
          return reply.type('application/octet-stream').send(Buffer.from([...Array(256).keys(), id % 256]))
        case '/exports':
          return reply.type('text/csv').send(Readable.from(['id,amount\n', `${id},${amount}\n`]))
        case '/reports':
          return { id, rows: 'x'.repeat(300_000) }
        default:
          return { id, amount, currency }
      }
    })
  }
  return listening(app)
}

/** What does not hold, and what does not count. */
async function exceptions(t: Test, options: IdempotencyOptions): Promise<Record<string, RuleOutcome>> {
  const report = await conform(await api(t, options), { profile: PROFILE })
  for (const { id, outcome, reason } of report.rules) t.not(outcome, 'failed', `${id} ${reason}`)
  return Object.fromEntries(report.rules.flatMap(({ id, outcome }) => (outcome === 'passed' ? [] : [[id, outcome]])))
}

const refusing = { waiting: 'not-applicable' }

t.test('in memory, every rule is kept', async (t) => {
  t.strictSame(await exceptions(t, { store: new MemoryStore() }), refusing)
})

t.test('in Redis, every rule is kept', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  t.strictSame(await exceptions(t, { store: new RedisStore(await server.client()) }), refusing)
})

t.test('in PostgreSQL, every rule is kept', async (t) => {
  const server = await startPostgres()
  t.teardown(() => server.close())
  const store = new PostgresStore({ pool: server.pool() })
  await store.createTable()
  t.strictSame(await exceptions(t, { store }), refusing)
})

t.test('in SQLite, every rule is kept', async (t) => {
  const database = openSqlite(join(makeFolder('conform'), 'keys'))
  t.teardown(() => database.close())
  t.strictSame(await exceptions(t, { store: new SqliteStore({ database }) }), refusing)
})

t.test("onConflict 'wait': duplicates get the reply, and every other rule is kept", async (t) => {
  t.strictSame(await exceptions(t, { onConflict: 'wait' }), {
    'conflict-keeps-reply': 'not-applicable',
    'in-progress-409': 'not-applicable',
    'retry-after': 'not-applicable'
  })
})

t.test('claims before the body is read: every rule is kept', async (t) => {
  t.strictSame(await exceptions(t, { hook: 'onRequest' }), refusing)
})

t.test('replies of failures that are kept: every rule is kept', async (t) => {
  t.strictSame(await exceptions(t, { shouldStore: () => true }), refusing)
})

t.test('without a scope, by the credentials: every rule is kept', async (t) => {
  t.strictSame(await exceptions(t, { scope: undefined as never }), refusing)
})
