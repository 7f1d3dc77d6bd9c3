import formbody from '@fastify/formbody'
import view from '@fastify/view'
import Fastify, { type FastifyInstance } from 'fastify'
import handlebars from 'handlebars'
import t, { type Test } from 'tap'
import idempotency from '../../index.js'
import { inject } from '../support/app.js'
import { isReplay, orders, register } from './kit.js'

/** Pages that are no files, which the types of @fastify/view do not know. */
const page = (raw: string) => ({ raw }) as unknown as string

const form = page('<form method="post" action="/orders">{{{hiddenInput}}}<input name="title"></form>')
const done = page('<p>Order {{number}}: {{title}}</p>')

/** A shop whose pages are rendered, and whose forms carry their key. */
async function shop(t: Test, order: (typeof orders)[number]) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(formbody)
  await register(
    order,
    () => app.register(idempotency, { field: '__idempotent_key', onConflict: 'wait' }),
    () =>
      app.register(view, {
        engine: { handlebars },
        includeViewExtension: false,
        defaultContext: { hiddenInput: () => app.idempotency.hiddenInput() }
      })
  )
  let orders = 0
  app.get('/', async (_request, reply) => reply.view(form))
  app.post<{ Body: { title: string } }>(
    '/orders',
    { config: { idempotency: { required: true } } },
    async ({ body: { title } }, reply) => reply.code(201).view(done, { number: ++orders, title })
  )
  const submit = (html: string, title: string) => {
    const [, name, value] = /name="(\w+)" value="([^"]+)"/.exec(html) ?? []
    return inject(app, {
      method: 'POST',
      url: '/orders',
      headers: { 'content-type': 'application/x-www-form-urlencoded' },
      payload: new URLSearchParams({ ...(name && { [name]: value as string }), title }).toString()
    })
  }
  return { app, submit, orders: () => orders }
}

for (const order of orders) {
  t.test(`a rendered form orders once, however often it is sent, registered ${order} @fastify/view`, async (t) => {
    const { app, submit, orders } = await shop(t, order)
    const { body: html } = await app.inject('/')
    t.match(html, /<input type="hidden" name="__idempotent_key" value="[0-9a-f-]{36}">/)
    const replies = [
      ...(await Promise.all([submit(html, '<Dune>'), submit(html, '<Dune>')])),
      await submit(html, '<Dune>')
    ]
    for (const reply of replies) {
      t.match(reply, { statusCode: 201, headers: { 'content-type': /^text\/html/ } })
      t.equal(reply.body, '<p>Order 1: &lt;Dune&gt;</p>')
    }
    t.equal(replies.filter(isReplay).length, 2)
    t.equal(orders(), 1)
    const { body: next } = await app.inject('/')
    t.not(next, html, 'each page has its own key')
    t.equal((await submit(next, 'Emma')).body, '<p>Order 2: Emma</p>')
    t.equal((await submit('', 'Emma')).statusCode, 400)
  })
}
