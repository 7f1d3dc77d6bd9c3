import rateLimit from '@fastify/rate-limit'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type StoredReply } from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

/** Where @fastify/rate-limit counts. */
const places = ['onRequest', 'preHandler'] as const

interface Limited {
  order: Order
  place: (typeof places)[number]
  max: number
}

/** Each `x-client` may send `max` requests. */
async function server(t: Test, { order, place, max }: Limited) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency),
    () =>
      app.register(rateLimit, {
        hook: place,
        max,
        timeWindow: '1 hour',
        keyGenerator: (request) => String(request.headers['x-client'])
      })
  )
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  app.post('/own', { config: { idempotency: true } }, async (_request, reply) => {
    runs++
    return reply.code(runs === 1 ? 429 : 201).send({ run: runs })
  })
  const send = (client: string, key: string, url = '/') => post(app, { url, key, headers: { 'x-client': client } })
  return { app, send, runs: () => runs }
}

for (const order of orders) {
  for (const place of places) {
    t.test(`registered ${order} @fastify/rate-limit, which counts in ${place}`, async (t) => {
      t.test('a 429 leaves the key free, and is not stored', async (t) => {
        const { app, send, runs } = await server(t, { order, place, max: 1 })
        await send('eager', 'first key')
        const limited = await send('eager', 'second key')
        t.equal(limited.statusCode, 429)
        t.equal(await app.idempotency.get('second key'), null)
        t.equal(runs(), 1)
        const later = await send('patient', 'second key')
        t.equal(later.statusCode, 200)
        t.notOk(isReplay(later))
        t.equal(runs(), 2)
      })

      t.test('a duplicate over the limit gets 429, and the stored reply is there afterwards', async (t) => {
        const { send, runs } = await server(t, { order, place, max: 1 })
        const first = await send('eager', 'key')
        const limited = await send('eager', 'key')
        t.equal(limited.statusCode, 429)
        t.notOk(isReplay(limited))
        const retry = await send('patient', 'key')
        t.ok(isReplay(retry))
        t.equal(retry.body, first.body)
        t.equal(runs(), 1)
      })

      t.test('a replay counts as a request, and its counters are those of its own request', async (t) => {
        const { app, send } = await server(t, { order, place, max: 10 })
        t.equal((await send('one', 'key')).headers['x-ratelimit-remaining'], '9')
        for (const remaining of ['8', '7']) {
          const reply = await send('one', 'key')
          t.ok(isReplay(reply))
          t.equal(reply.headers['x-ratelimit-remaining'], remaining)
        }
        t.equal((await send('two', 'key')).headers['x-ratelimit-remaining'], '9')
        const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
        t.notOk(record.headers.some(([name]) => name.startsWith('x-ratelimit-')))
      })

      t.test('a 429 of the handler itself is not final either', async (t) => {
        const { send, runs } = await server(t, { order, place, max: 10 })
        t.equal((await send('one', 'key', '/own')).statusCode, 429)
        const retry = await send('one', 'key', '/own')
        t.equal(retry.statusCode, 201)
        t.notOk(isReplay(retry))
        t.ok(isReplay(await send('one', 'key', '/own')))
        t.equal(runs(), 2)
      })
    })
  }
}
