import cors from '@fastify/cors'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type StoredReply } from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

const one = 'https://one.example'
const two = 'https://two.example'

async function server(t: Test, order: Order) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency, { global: true }),
    () =>
      app.register(cors, {
        origin: [one, two],
        credentials: true,
        exposedHeaders: ['Idempotent-Replayed', 'Retry-After']
      })
  )
  let runs = 0
  app.post('/', async (_request, reply) => {
    reply.header('vary', [reply.getHeader('vary') ?? [], 'x-tenant'].flat().join(', '))
    return { run: ++runs }
  })
  return { app, runs: () => runs }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/cors`, async (t) => {
    t.test('each origin is allowed by its own replay, and none by the reply of another', async (t) => {
      const { app, runs } = await server(t, order)
      const from = (origin: string) => post(app, { key: 'key', headers: { origin } })
      t.equal((await from(one)).headers['access-control-allow-origin'], one)
      for (const origin of [two, one]) {
        const reply = await from(origin)
        t.ok(isReplay(reply))
        t.equal(reply.headers['access-control-allow-origin'], origin)
        t.equal(reply.headers['access-control-allow-credentials'], 'true')
      }
      const stranger = await from('https://three.example')
      t.ok(isReplay(stranger))
      t.equal(stranger.headers['access-control-allow-origin'], undefined)
      t.equal(runs(), 1)
    })

    t.test('nothing of the first origin is stored, but what the handler added is', async (t) => {
      const { app } = await server(t, order)
      await post(app, { key: 'key', headers: { origin: one } })
      const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
      t.notOk(record.headers.some(([name]) => name.startsWith('access-control-')))
      t.match((await post(app, { key: 'key', headers: { origin: two } })).headers.vary, /x-tenant/)
    })

    t.test('a browser may read that a reply is a replay', async (t) => {
      const { app } = await server(t, order)
      await post(app, { key: 'key', headers: { origin: one } })
      const reply = await post(app, { key: 'key', headers: { origin: two } })
      t.equal(reply.headers['idempotent-replayed'], 'true')
      t.match(reply.headers['access-control-expose-headers'], /Idempotent-Replayed/)
    })

    t.test("a browser may read the plugin's refusals", async (t) => {
      const { app } = await server(t, order)
      await post(app, { key: 'key', headers: { origin: one } })
      const reply = await post(app, { key: 'key', headers: { origin: one }, payload: { other: true } })
      t.equal(reply.statusCode, 422)
      t.equal(reply.headers['access-control-allow-origin'], one)
    })

    t.test('a preflight request for the key is not a request with a key', async (t) => {
      const { app, runs } = await server(t, order)
      const preflight = await app.inject({
        method: 'OPTIONS',
        url: '/',
        headers: {
          origin: one,
          'access-control-request-method': 'POST',
          'access-control-request-headers': 'idempotency-key'
        }
      })
      t.equal(preflight.statusCode, 204)
      t.match(preflight.headers['access-control-allow-headers'], /idempotency-key/i)
      t.equal(runs(), 0)
    })
  })
}
