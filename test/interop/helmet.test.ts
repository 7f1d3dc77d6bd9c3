import helmet from '@fastify/helmet'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type StoredReply } from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

async function server(t: Test, order: Order) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency),
    () => app.register(helmet, { enableCSPNonces: true })
  )
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  app.post('/framed', { config: { idempotency: true } }, async (_request, reply) => {
    reply.header('x-frame-options', 'DENY')
    return { run: ++runs }
  })
  return { app, runs: () => runs }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/helmet`, async (t) => {
    t.test('a replay has the security headers of its own request, nonces included', async (t) => {
      const { app, runs } = await server(t, order)
      const first = await post(app, { key: 'key' })
      const retry = await post(app, { key: 'key' })
      t.ok(isReplay(retry))
      const policies = [first, retry].map(({ headers }) => String(headers['content-security-policy']))
      for (const policy of policies) t.match(policy, /nonce-/)
      t.not(policies[0], policies[1])
      t.equal(retry.headers['x-frame-options'], 'SAMEORIGIN')
      t.equal(runs(), 1)
    })

    t.test('no security header is stored', async (t) => {
      const { app } = await server(t, order)
      await post(app, { key: 'key' })
      const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
      t.same(
        record.headers.map(([name]) => name),
        ['content-type']
      )
    })

    t.test('a security header that the handler changed is replayed as the handler left it', async (t) => {
      const { app } = await server(t, order)
      for (const expected of [false, true]) {
        const reply = await post(app, { url: '/framed', key: 'key' })
        t.equal(isReplay(reply), expected)
        t.equal(reply.headers['x-frame-options'], 'DENY')
      }
    })

    t.test("the plugin's refusals have security headers, too", async (t) => {
      const { app } = await server(t, order)
      await post(app, { key: 'key' })
      const refusal = await post(app, { key: 'key', payload: { other: true } })
      t.equal(refusal.statusCode, 422)
      t.equal(refusal.headers['x-content-type-options'], 'nosniff')
    })
  })
}
