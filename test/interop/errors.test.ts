import Fastify, { type FastifyError, type FastifyReply, type FastifyRequest } from 'fastify'
import t from 'tap'
import idempotency, { MemoryStore } from '../../index.js'
import { latch, until } from '../support/latch.js'
import { isReplay, orders, post } from './kit.js'

class Declined extends Error {
  readonly statusCode = 402
}

/** An error handler in the manner of many services: a shape of its own, and it remembers what it was given. */
function recorder(statusCode?: number) {
  const seen: FastifyError[] = []
  const handler = (error: FastifyError, _request: FastifyRequest, reply: FastifyReply) => {
    seen.push(error)
    const status = statusCode ?? error.statusCode ?? 500
    return reply.code(status).header('x-handled', 'yes').send({ oops: error.message })
  }
  return { seen, handler }
}

const levels = ['setErrorHandler', 'errorHandler of the route', 'setErrorHandler of a child'] as const

for (const level of levels) {
  t.test(`an error that went through ${level}`, async (t) => {
    async function server(statusCode?: number) {
      const app = Fastify()
      t.teardown(() => app.close())
      await app.register(idempotency)
      const { seen, handler } = recorder(statusCode)
      let runs = 0
      const goOn = latch()
      const declare = (instance: typeof app) => {
        const own = level === levels[1] ? { errorHandler: handler } : {}
        instance.post('/', { config: { idempotency: true }, ...own }, async (request) => {
          const { how } = request.body as { how?: string }
          runs++
          if (how === 'wait') await goOn.promise
          if (how === 'throw') throw new Declined('declined')
          if (how === 'crash') throw new Error('crashed')
          return { run: runs }
        })
      }
      if (level === levels[0]) app.setErrorHandler(handler)
      if (level === levels[2]) {
        app.register(async (child) => {
          child.setErrorHandler(handler)
          declare(child as typeof app)
        })
      } else {
        declare(app)
      }
      await app.ready()
      return { app, seen, goOn, runs: () => runs }
    }

    t.test('is replayed as the error handler sent it, and the handler is not asked again', async (t) => {
      const { app, seen, runs } = await server()
      const payload = { how: 'throw' }
      const first = await post(app, { key: 'key', payload })
      t.equal(first.statusCode, 402)
      const retry = await post(app, { key: 'key', payload })
      t.ok(isReplay(retry))
      t.equal(retry.statusCode, 402)
      t.same(retry.json(), { oops: 'declined' })
      t.equal(retry.headers['x-handled'], 'yes')
      t.equal(retry.headers['content-type'], first.headers['content-type'])
      t.equal(seen.length, 1)
      t.equal(runs(), 1)
    })

    t.test('is not final when the error handler makes a 500 of it', async (t) => {
      const { app, runs } = await server()
      const payload = { how: 'crash' }
      t.equal((await post(app, { key: 'key', payload })).statusCode, 500)
      t.equal(await app.idempotency.get('key'), null)
      t.equal((await post(app, { key: 'key', payload })).statusCode, 500)
      t.equal(runs(), 2)
    })

    t.test('counts by the status that the error handler chose, whatever the error said', async (t) => {
      const { app, runs } = await server(200)
      const payload = { how: 'crash' }
      t.equal((await post(app, { key: 'key', payload })).statusCode, 200)
      const retry = await post(app, { key: 'key', payload })
      t.ok(isReplay(retry))
      t.same(retry.json(), { oops: 'crashed' })
      t.equal(runs(), 1)
    })

    t.test("may be one of the plugin's own, and is stored in no case", async (t) => {
      const { app, seen, goOn, runs } = await server(200)
      const first = post(app, { key: 'key', payload: { how: 'wait' } }).then((reply) => reply)
      await until(() => runs() === 1)
      const conflict = await post(app, { key: 'key', payload: { how: 'wait' } })
      t.same(conflict.json(), { oops: 'A request with this idempotency key is still in progress' })
      t.equal(conflict.headers['retry-after'], '1', 'the header is there, whoever handles the error')
      t.match(await app.idempotency.get('key'), { state: 'running' })
      goOn.open()
      t.same((await first).json(), { run: 1 })

      const mismatch = await post(app, { key: 'key', payload: { how: 'other' } })
      t.equal(mismatch.statusCode, 200)
      t.notOk(isReplay(mismatch))
      const retry = await post(app, { key: 'key', payload: { how: 'wait' } })
      t.same(retry.json(), { run: 1 })
      t.equal(retry.headers['x-handled'], undefined)

      t.same(
        seen.map(({ code, statusCode }) => [code, statusCode]),
        [
          ['FST_IDEMPOTENCY_IN_PROGRESS', 409],
          ['FST_IDEMPOTENCY_KEY_REUSED', 422]
        ]
      )
      t.equal(runs(), 1)
    })
  })
}

t.test('an error handler that fails itself leaves the key free', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  app.setErrorHandler(() => {
    throw new Error('the handler of errors failed')
  })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => {
    if (++runs === 1) throw new Declined('declined')
    return { run: runs }
  })
  t.equal((await post(app, { key: 'key' })).statusCode, 500)
  t.same((await post(app, { key: 'key' })).json(), { run: 2 })
})

t.test('an error handler that was set before the plugin was registered sees its errors, too', async (t) => {
  for (const order of orders) {
    const app = Fastify()
    t.teardown(() => app.close())
    const { seen, handler } = recorder()
    if (order === 'after') app.setErrorHandler(handler)
    await app.register(idempotency, { required: true })
    if (order === 'before') app.setErrorHandler(handler)
    app.post('/', { config: { idempotency: true } }, async () => 'never')
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 400)
    t.match(seen, [{ code: 'FST_IDEMPOTENCY_KEY_MISSING', statusCode: 400 }])
  }
})

t.test('a 503 for a failing store reaches the error handler with its cause', async (t) => {
  class BrokenStore extends MemoryStore {
    override async acquire(): Promise<never> {
      throw new Error('connection refused')
    }
  }
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, { store: new BrokenStore() })
  const { seen, handler } = recorder()
  app.setErrorHandler(handler)
  app.post('/', { config: { idempotency: true } }, async () => 'never')
  const reply = await post(app)
  t.equal(reply.statusCode, 503)
  t.ok(reply.headers['retry-after'])
  t.match(seen, [{ code: 'FST_IDEMPOTENCY_STORE_UNAVAILABLE', cause: { message: 'connection refused' } }])
})
