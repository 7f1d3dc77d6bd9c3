import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyRouteOptions, type StoredReply } from '../../index.js'
import { isReplay, post } from './kit.js'

const hooks = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const

const body = {
  type: 'object',
  required: ['amount'],
  additionalProperties: false,
  properties: {
    amount: { type: 'integer', minimum: 1 },
    currency: { type: 'string', default: 'EUR' },
    tags: { type: 'array', items: { type: 'string' } }
  }
}

async function server(t: Test, options: IdempotencyRouteOptions, schema: object) {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  const bodies: unknown[] = []
  app.post('/', { config: { idempotency: options }, schema }, async (request, reply) => {
    bodies.push(request.body)
    reply.code(201)
    return { id: bodies.length, shown: 'yes', secret: 'hash of a password' }
  })
  return { app, bodies }
}

for (const hook of hooks) {
  t.test(`with a body schema, and the key claimed in ${hook}`, async (t) => {
    t.test('what coercion and defaults make of a body does not make its retry another request', async (t) => {
      const { app, bodies } = await server(t, { hook }, { body })
      const payload = { amount: '5', tags: 'one', unknown: true }
      const first = await post(app, { key: 'key', payload })
      t.equal(first.statusCode, 201)
      t.same(bodies, [{ amount: 5, currency: 'EUR', tags: ['one'] }], 'validation does change the body')
      for (let i = 0; i < 2; i++) {
        const retry = await post(app, { key: 'key', payload })
        t.ok(isReplay(retry))
        t.equal(retry.body, first.body)
      }
      t.equal(bodies.length, 1)
    })

    t.test('bodies are compared as they were sent', async (t) => {
      const { app, bodies } = await server(t, { hook }, { body })
      await post(app, { key: 'key', payload: { amount: 5 } })
      for (const payload of [{ amount: 6 }, { amount: 5, currency: 'USD' }, { amount: 5, unknown: true }]) {
        t.equal((await post(app, { key: 'key', payload })).statusCode, 422)
      }
      t.equal(bodies.length, 1)
    })

    t.test('an invalid body is 400 and leaves the key free', async (t) => {
      const { app, bodies } = await server(t, { hook }, { body })
      for (const payload of [{ amount: 0 }, '{"amount":', {}]) {
        const headers = { 'content-type': 'application/json' }
        t.equal((await post(app, { key: 'key', headers, payload })).statusCode, 400)
        t.equal(await app.idempotency.get('key'), null)
      }
      t.equal((await post(app, { key: 'key', payload: { amount: 5 } })).statusCode, 201)
      t.equal(bodies.length, 1)
    })

    t.test('an invalid body never gets a replay', async (t) => {
      const { app } = await server(t, { hook }, { body })
      await post(app, { key: 'key', payload: { amount: 5 } })
      const invalid = await post(app, { key: 'key', payload: { amount: 0 } })
      // In preValidation the bodies are compared before the schema has its say.
      t.equal(invalid.statusCode, hook === 'preValidation' ? 422 : 400)
      t.notOk(isReplay(invalid))
      t.ok(isReplay(await post(app, { key: 'key', payload: { amount: 5 } })), 'and does no harm to the stored reply')
    })

    t.test('headers, query and parameters that are invalid leave the key free as well', async (t) => {
      const app = Fastify()
      t.teardown(() => app.close())
      await app.register(idempotency)
      let runs = 0
      const schema = {
        headers: { type: 'object', required: ['x-tenant'], properties: { 'x-tenant': { type: 'string' } } },
        querystring: { type: 'object', properties: { page: { type: 'integer' } } },
        params: { type: 'object', properties: { id: { type: 'integer' } } }
      }
      app.post('/:id', { config: { idempotency: { hook } }, schema }, async () => ({ run: ++runs }))
      const headers = { 'x-tenant': 'one' }
      for (const invalid of [{ url: '/1' }, { url: '/1?page=x', headers }, { url: '/x', headers }]) {
        t.equal((await post(app, { key: 'key', ...invalid })).statusCode, 400)
        t.equal(await app.idempotency.get('key'), null)
      }
      t.equal((await post(app, { key: 'key', url: '/1?page=2', headers })).statusCode, 200)
      t.ok(isReplay(await post(app, { key: 'key', url: '/1?page=2', headers })))
      t.equal(runs, 1)
    })
  })

  t.test(`a headers schema that keeps only the headers it knows, and the key claimed in ${hook}`, async (t) => {
    t.test('does not take the protection away', async (t) => {
      const headers = {
        type: 'object',
        additionalProperties: false,
        properties: { 'x-tenant': { type: 'string' } }
      }
      const { app, bodies } = await server(t, { hook, required: true }, { headers })
      t.notOk(isReplay(await post(app, { key: 'key' })))
      t.ok(isReplay(await post(app, { key: 'key' })))
      t.equal(bodies.length, 1)
    })
  })
}

t.test('a headers schema may describe the key', async (t) => {
  const headers = {
    type: 'object',
    required: ['idempotency-key'],
    properties: { 'idempotency-key': { type: 'string', format: 'uuid' } }
  }
  for (const hook of hooks) {
    const { app, bodies } = await server(t, { hook }, { headers })
    t.equal((await post(app, { key: 'not a uuid' })).statusCode, 400)
    t.equal((await app.inject({ method: 'POST', url: '/', payload: {} })).statusCode, 400)
    const key = app.idempotency.generateKey()
    t.equal((await post(app, { key })).statusCode, 201)
    t.ok(isReplay(await post(app, { key })), hook)
    t.equal(bodies.length, 1)
  }
})

t.test(
  'a key in a body field is claimed after validation, and the body is still compared as it was sent',
  async (t) => {
    const properties = { ...body.properties, __key: { type: 'string' } }
    const { app, bodies } = await server(t, { field: '__key' }, { body: { ...body, properties } })
    const send = (payload: object) => app.inject({ method: 'POST', url: '/', payload })
    t.equal((await send({ __key: 'key', amount: '5' })).statusCode, 201)
    t.ok(isReplay(await send({ __key: 'key', amount: '5' })))
    t.equal((await send({ __key: 'key', amount: 5 })).statusCode, 422)
    t.equal((await send({ __key: 'key', amount: 0 })).statusCode, 400)
    t.equal(bodies.length, 1)
  }
)

t.test('a key in a body field is found although the body schema knows nothing of it, and removes it', async (t) => {
  const { app, bodies } = await server(t, { field: '__key', required: true }, { body })
  const send = (payload: object) => app.inject({ method: 'POST', url: '/', payload })
  t.equal((await send({ __key: 'key', amount: 5 })).statusCode, 201)
  t.same(bodies, [{ amount: 5, currency: 'EUR' }])
  t.ok(isReplay(await send({ __key: 'key', amount: 5 })))
  t.equal((await send({ __key: 'key', amount: 6 })).statusCode, 422)
  t.equal(bodies.length, 1)
})

t.test('with a response schema', async (t) => {
  const response = { 201: { type: 'object', properties: { id: { type: 'integer' }, shown: { type: 'string' } } } }

  t.test('what it removes is not in a replay, nor in the store', async (t) => {
    const { app } = await server(t, {}, { response })
    const first = await post(app, { key: 'key' })
    t.equal(first.body, '{"id":1,"shown":"yes"}')
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.body, first.body)
    t.equal(retry.headers['content-type'], first.headers['content-type'])
    const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
    t.equal(record.body.toString(), first.body)
    t.notMatch(JSON.stringify(await app.idempotency.get('key')), 'password')
  })

  t.test('a replay is not serialised once more', async (t) => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(idempotency)
    let serialised = 0
    const serializerCompiler = () => (data: unknown) => {
      serialised++
      return `<${JSON.stringify(data)}>`
    }
    app.post('/', { config: { idempotency: true }, schema: { response }, serializerCompiler }, async (_, reply) =>
      reply.code(201).send({ id: 1 })
    )
    t.equal((await post(app, { key: 'key' })).body, '<{"id":1}>')
    t.equal((await post(app, { key: 'key' })).body, '<{"id":1}>')
    t.equal(serialised, 1)
  })

  t.test('a reply that cannot be serialised is a 500 that is stored: the work behind it is done', async (t) => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(idempotency)
    let runs = 0
    const required = { type: 'object', required: ['id'], properties: { id: { type: 'integer' } } }
    const schema = { response: { 200: required } }
    app.post('/', { config: { idempotency: true }, schema }, async () => (++runs === 1 ? {} : { id: runs }))
    const failed = await post(app, { key: 'key' })
    t.equal(failed.statusCode, 500)
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.same([retry.statusCode, retry.body], [500, failed.body])
    t.equal(runs, 1)
  })

  t.test('one for errors does not spoil problem documents', async (t) => {
    const problem = { type: 'object', properties: { message: { type: 'string' } } }
    const { app } = await server(t, { problemDetails: true }, { response: { ...response, '4xx': problem } })
    await post(app, { key: 'key' })
    const refusal = await post(app, { key: 'key', payload: { other: true } })
    t.equal(refusal.statusCode, 422)
    t.match(refusal.headers['content-type'], /^application\/problem\+json/)
    t.match(refusal.json(), { status: 422, code: 'FST_IDEMPOTENCY_KEY_REUSED' })
  })
})
