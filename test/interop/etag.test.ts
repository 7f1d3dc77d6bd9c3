import etag from '@fastify/etag'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

async function server(t: Test, order: Order) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency),
    () => app.register(etag)
  )
  let runs = 0
  const config = { idempotency: true }
  app.post('/computed', { config }, async (_request, reply) => {
    reply.code(201)
    return { run: ++runs, text: 'the same' }
  })
  app.post('/own', { config }, async (_request, reply) => {
    reply.code(201).header('etag', '"of the handler"').header('location', '/things/1')
    return { run: ++runs }
  })
  return { app, runs: () => runs }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/etag`, async (t) => {
    t.test('a replay has the etag of the first reply', async (t) => {
      for (const url of ['/computed', '/own']) {
        const { app, runs } = await server(t, order)
        const first = await post(app, { url, key: 'key' })
        t.equal(first.statusCode, 201)
        t.ok(first.headers.etag)
        const retry = await post(app, { url, key: 'key' })
        t.ok(isReplay(retry))
        t.equal(retry.headers.etag, first.headers.etag)
        t.equal(retry.headers.location, first.headers.location)
        t.equal(retry.headers['content-length'], first.headers['content-length'])
        t.equal(retry.body, first.body)
        t.equal(runs(), 1)
      }
    })

    t.test('an etag of the handler is kept as it is', async (t) => {
      const { app } = await server(t, order)
      t.equal((await post(app, { url: '/own', key: 'key' })).headers.etag, '"of the handler"')
      t.equal((await post(app, { url: '/own', key: 'key' })).headers.etag, '"of the handler"')
    })

    t.test('a retry that knows the etag gets the whole reply, not a 304', async (t) => {
      for (const url of ['/computed', '/own']) {
        const { app, runs } = await server(t, order)
        const first = await post(app, { url, key: 'key' })
        const headers = { 'if-none-match': String(first.headers.etag) }
        const retry = await post(app, { url, key: 'key', headers })
        t.ok(isReplay(retry))
        t.equal(retry.statusCode, 201)
        t.equal(retry.body, first.body)
        t.equal(retry.headers.etag, first.headers.etag)
        t.equal(runs(), 1)
      }
    })

    t.test("the plugin's own refusals do not get the etag of the stored reply", async (t) => {
      const { app } = await server(t, order)
      const first = await post(app, { url: '/own', key: 'key' })
      const refusal = await post(app, { url: '/own', key: 'key', payload: { other: true } })
      t.equal(refusal.statusCode, 422)
      t.not(refusal.headers.etag, first.headers.etag)
    })
  })
}
