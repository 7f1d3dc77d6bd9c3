import Fastify from 'fastify'
import t from 'tap'
import idempotency from '../../index.js'
import { isReplay, post } from './kit.js'

for (const own of [false, true]) {
  t.test(
    `callNotFound() in a handler, with ${own ? 'a not-found handler of the service' : 'the default one'}`,
    async (t) => {
      t.test('makes a 404 that is stored and replayed', async (t) => {
        const app = Fastify()
        t.teardown(() => app.close())
        await app.register(idempotency)
        let asked = 0
        if (own) {
          app.setNotFoundHandler(async (_request, reply) => {
            asked++
            return reply.code(404).header('x-own', 'yes').send({ nothing: 'here' })
          })
        }
        let runs = 0
        app.post('/', { config: { idempotency: true } }, (_request, reply) => {
          runs++
          reply.callNotFound()
        })
        const first = await post(app, { key: 'key' })
        t.equal(first.statusCode, 404)
        const retry = await post(app, { key: 'key' })
        t.ok(isReplay(retry))
        t.equal(retry.statusCode, 404)
        t.equal(retry.body, first.body)
        t.equal(retry.headers['x-own'], first.headers['x-own'])
        t.equal(runs, 1)
        t.equal(asked, own ? 1 : 0)
      })

      t.test('does the same in an async handler', async (t) => {
        const app = Fastify()
        t.teardown(() => app.close())
        await app.register(idempotency)
        if (own) app.setNotFoundHandler(async (_request, reply) => reply.code(404).send('none'))
        let runs = 0
        app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
          runs++
          reply.callNotFound()
          return reply
        })
        const first = await post(app, { key: 'key' })
        t.equal(first.statusCode, 404)
        const retry = await post(app, { key: 'key' })
        t.ok(isReplay(retry))
        t.equal(retry.body, first.body)
        t.equal(runs, 1)
      })
    }
  )
}

t.test('a not-found handler with a preHandler of its own makes a 404 that is replayed', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  let checked = 0
  const preHandler = async () => {
    checked++
  }
  app.setNotFoundHandler({ preHandler }, async (_request, reply) => reply.code(404).send('none'))
  let runs = 0
  app.post('/', { config: { idempotency: true } }, (_request, reply) => {
    runs++
    reply.callNotFound()
  })
  t.equal((await post(app, { key: 'key' })).body, 'none')
  t.equal(checked, 1)
  t.ok(isReplay(await post(app, { key: 'key' })))
  t.equal(checked, 1)
  t.equal(runs, 1)
})

t.test('the not-found handler of a prefix is the one that answers, and its 404 is replayed', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  app.setNotFoundHandler(async (_request, reply) => reply.code(404).send('root'))
  app.register(
    async (child) => {
      child.setNotFoundHandler(async (_request, reply) => reply.code(404).send('child'))
      child.post('/', { config: { idempotency: true } }, (_request, reply) => reply.callNotFound())
    },
    { prefix: '/child' }
  )
  t.equal((await post(app, { url: '/child', key: 'key' })).body, 'child')
  const retry = await post(app, { url: '/child', key: 'key' })
  t.ok(isReplay(retry))
  t.equal(retry.body, 'child')
})

t.test('what no route answers is not covered, global or not', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, { global: true, required: true })
  let asked = 0
  app.setNotFoundHandler(async (_request, reply) => {
    asked++
    return reply.code(404).send('none')
  })
  for (let i = 0; i < 2; i++) {
    const reply = await post(app, { url: '/nowhere', key: 'key' })
    t.equal(reply.statusCode, 404)
    t.notOk(isReplay(reply))
  }
  t.equal((await app.inject({ method: 'POST', url: '/nowhere' })).statusCode, 404, 'and needs no key')
  t.equal(asked, 3)
  t.equal(await app.idempotency.get('key'), null)
})
