import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { type IdempotencyEvent, type ListedOperation, SqliteStore } from '../../index.js'
import { build } from '../support/app.js'
import { until } from '../support/latch.js'
import { launch, makeFolder } from '../support/process.js'
import { openSqlite } from '../support/sqlite.js'

/*
 * A night on call: a worker dies in the middle of a payout, retries are refused because nobody knows whether it went through,
 * and somebody has to find out which it was, and to say so.
 */

const script = fileURLToPath(new URL('../support/payout-worker.js', import.meta.url))

t.test('from the alert to the reply that the client gets', async (t) => {
  const folder = makeFolder('payouts')
  const path = join(folder, 'keys.db')
  const worker = await launch(process.execPath, [script, path], { env: { HANG: '1' }, log: join(folder, 'worker') })
  const address = await until(() => /listening on (\S+)/.exec(worker.output())?.[1])
  const request = {
    method: 'POST' as const,
    url: '/payouts',
    headers: { 'idempotency-key': 'payout-42', customer: 'acme', 'content-type': 'application/json' },
    payload: '{"amount":100}'
  }
  const { headers, payload: body } = request
  const paying = fetch(`${address}/payouts`, { method: 'POST', headers, body })
  await until(() => worker.output().includes('paid out'))
  worker.signal('SIGKILL')
  await t.rejects(paying)

  // The next process, and who watches it.
  const database = openSqlite(path)
  t.teardown(() => database.close())
  const app = await build(t, {
    store: new SqliteStore({ database }),
    lease: 600,
    storeTimeout: 200,
    onAbandoned: 'reject',
    target: ({ url }) => url,
    scope: ({ headers }) => String(headers.customer)
  })
  let payouts = 0
  app.post('/payouts', { config: { idempotency: { required: true } } }, async () => {
    payouts++
    return 'paid twice'
  })
  const alerts: IdempotencyEvent[] = []
  const alert = (message: unknown) => alerts.push(message as IdempotencyEvent)
  subscribe('fastify-idempotency:conflict', alert)
  t.teardown(() => unsubscribe('fastify-idempotency:conflict', alert))

  // The client retries; after the lease nobody knows what has become of its payout.
  await until(async () => (await app.inject(request)).json().code === 'FST_IDEMPOTENCY_ABANDONED')

  // The alert's event leads to the key.
  const event = alerts.find(({ error }) => (error as { code?: string }).code === 'FST_IDEMPOTENCY_ABANDONED')
  t.equal(event?.key, app.idempotency.hash('payout-42', { scope: 'acme' }))

  // It is the one payout that was interrupted, a while ago.
  const abandoned: ListedOperation[] = []
  for await (const operation of app.idempotency.list({ state: 'abandoned', route: '/payouts' }))
    abandoned.push(operation)
  t.match(abandoned, [{ storageKey: event?.key, attempt: 1 }])
  t.equal(abandoned.length, 1)

  // The bank says that it went through. So every retry gets what the first request should have got.
  const reply = { statusCode: 201, body: { amount: 100 } }
  await app.idempotency.settle({ storageKey: String(event?.key) }, { reply })
  const retry = await app.inject(request)
  t.match(retry, { statusCode: 201, body: '{"amount":100}', headers: { 'idempotent-replayed': 'true' } })
  t.equal(payouts, 0)
})
