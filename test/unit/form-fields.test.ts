import formbody from '@fastify/formbody'
import multipart from '@fastify/multipart'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { warningsOf } from '../support/warnings.js'

/** What is told of a server with these options, whose routes are declared by `declare`. */
function told(options: IdempotencyOptions, declare: (app: FastifyInstance) => void): Promise<string[]> {
  return warningsOf('FST_IDEMPOTENCY_FIELD', async () => {
    const app = Fastify()
    await app.register(idempotency, options)
    declare(app)
    await app.ready()
    await app.close()
  })
}

const handler = async () => 'done'
const covered = { config: { idempotency: true } }

t.test('a field without a parser for forms is told, with its routes and what to do', async (t) => {
  const heard = await told({ field: 'key' }, (app) => {
    app.post('/one', covered, handler)
    app.post('/two', covered, handler)
    app.post('/plain', handler)
    app.post('/other', { config: { idempotency: { getKey: () => 'key' } } }, handler)
  })
  t.equal(heard.length, 1)
  t.match(heard[0], /"field" is set for POST \/one, POST \/two, which .*@fastify\/formbody/)
  t.equal(
    (await told({}, (app) => app.post('/three', { config: { idempotency: { field: 'key' } } }, handler))).length,
    1
  )
})

t.test('a parser may be of either kind, come later, and from above', async (t) => {
  for (const parser of [formbody, multipart]) {
    const heard = await told({ field: 'key' }, (app) => {
      app.post('/before', covered, handler)
      app.register(parser as never)
      app.register(async (child) => void child.post('/child', covered, handler))
    })
    t.strictSame(heard, [])
  }
})

t.test('a parser of another context is none', async (t) => {
  const heard = await told({ field: 'key' }, (app) => {
    app.register(async (child) => void child.register(formbody))
    app.post('/outside', covered, handler)
  })
  t.match(heard, [/POST \/outside/])
})
