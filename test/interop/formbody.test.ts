import formbody from '@fastify/formbody'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { isReplay, type Order, orders, register } from './kit.js'

async function server(t: Test, order: Order, options: IdempotencyOptions = {}) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency, { field: '__idempotent_key', ...options }),
    () => app.register(formbody)
  )
  let runs = 0
  app.get('/order', async (_request, reply) =>
    reply.type('text/html').send(`<form method="post">${app.idempotency.hiddenInput()}<input name="amount"></form>`)
  )
  app.post('/order', { config: { idempotency: true } }, async (request) => ({ run: ++runs, body: request.body }))
  const submit = (fields: Record<string, string> | string, { url = '/order', headers = {} } = {}) =>
    app.inject({
      method: 'POST',
      url,
      headers: { 'content-type': 'application/x-www-form-urlencoded', ...headers },
      payload: new URLSearchParams(fields).toString()
    })
  return { app, submit, runs: () => runs }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/formbody`, async (t) => {
    t.test('a form that is submitted twice is one operation', async (t) => {
      const { app, submit, runs } = await server(t, order)
      const { body: html } = await app.inject({ url: '/order' })
      const [, name = '', value = ''] = /name="([^"]+)" value="([^"]+)"/.exec(html) ?? []
      const first = await submit({ [name]: value, amount: '1' })
      t.equal(first.statusCode, 200)
      t.notOk(isReplay(first))
      const again = await submit({ [name]: value, amount: '1' })
      t.ok(isReplay(again))
      t.equal(again.body, first.body)
      t.equal(runs(), 1)
    })

    t.test('each rendered form is an operation of its own', async (t) => {
      const { app } = await server(t, order)
      t.not((await app.inject({ url: '/order' })).body, (await app.inject({ url: '/order' })).body)
    })

    t.test('the same key with other fields is 422', async (t) => {
      const { submit, runs } = await server(t, order)
      await submit({ __idempotent_key: 'key', amount: '1' })
      const reply = await submit({ __idempotent_key: 'key', amount: '2' })
      t.equal(reply.statusCode, 422)
      t.equal(reply.json().code, 'FST_IDEMPOTENCY_KEY_REUSED')
      t.ok(isReplay(await submit({ __idempotent_key: 'key', amount: '1' })))
      t.equal(runs(), 1)
    })

    t.test('neither the order of the fields nor their encoding matters', async (t) => {
      const { app, submit } = await server(t, order)
      await submit({ __idempotent_key: 'key', amount: '1', note: 'a b' })
      const retry = await app.inject({
        method: 'POST',
        url: '/order',
        headers: { 'content-type': 'application/x-www-form-urlencoded; charset=utf-8' },
        payload: 'note=a%20b&amount=1&__idempotent_key=k%65y'
      })
      t.ok(isReplay(retry))
    })

    t.test('the key may come as a query parameter', async (t) => {
      const { submit, runs } = await server(t, order)
      const url = '/order?__idempotent_key=key'
      t.notOk(isReplay(await submit({ amount: '1' }, { url })))
      t.ok(isReplay(await submit({ amount: '1' }, { url })))
      t.equal((await submit({ amount: '2' }, { url })).statusCode, 422)
      t.equal(runs(), 1)
    })

    t.test('the header goes before the field', async (t) => {
      const { app, submit } = await server(t, order)
      await submit({ __idempotent_key: 'in the form' }, { headers: { 'idempotency-key': 'in the header' } })
      t.ok(await app.idempotency.get('in the header'))
      t.equal(await app.idempotency.get('in the form'), null)
    })

    t.test('a blank or a repeated field is 422, and a missing one 400 where a key is required', async (t) => {
      const { submit, runs } = await server(t, order, { required: true })
      for (const form of ['__idempotent_key=&amount=1', '__idempotent_key=a&__idempotent_key=b']) {
        const reply = await submit(form)
        t.equal(reply.statusCode, 422)
        t.equal(reply.json().code, 'FST_IDEMPOTENCY_KEY_INVALID')
      }
      const reply = await submit({ amount: '1' })
      t.equal(reply.statusCode, 400)
      t.equal(reply.json().code, 'FST_IDEMPOTENCY_KEY_MISSING')
      t.equal(runs(), 0)
    })
  })
}
