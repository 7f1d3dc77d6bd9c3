import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency from '../../index.js'
import { build, REPLAYED } from '../support/app.js'

const keyed = (key: string) => ({ 'idempotency-key': key })

/** Sends the same keyed request twice, and tells whether the second one was a replay. */
async function replays(app: FastifyInstance, url: string, method = 'POST'): Promise<boolean> {
  const request = { method: method as 'POST', url, headers: keyed(`${method} ${url}`) }
  await app.inject(request)
  const second = await app.inject(request)
  return second.headers[REPLAYED] === 'true'
}

t.test('a route is covered by config.idempotency true or an options object, and by nothing else', async (t) => {
  const app = await build(t)
  app.post('/yes', { config: { idempotency: true } }, async () => 'x')
  app.post('/object', { config: { idempotency: { ttl: 1000 } } }, async () => 'x')
  app.post('/no', { config: { idempotency: false } }, async () => 'x')
  app.post('/plain', async () => 'x')
  t.equal(await replays(app, '/yes'), true)
  t.equal(await replays(app, '/object'), true)
  t.equal(await replays(app, '/no'), false)
  t.equal(await replays(app, '/plain'), false)
})

t.test('an uncovered route gets no hook of ours', async (t) => {
  const app = await build(t)
  const handler = async () => 'x'
  let route: Record<string, unknown> = {}
  app.addHook('onRoute', (options) => {
    route = options as never
  })
  app.post('/plain', handler)
  await app.ready()
  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'onSend', 'onError']) {
    t.equal(route[hook], undefined, hook)
  }
  t.equal(route.handler, handler)
})

t.test('global covers the routes with a method in methods, and a route can opt out', async (t) => {
  const app = await build(t, { global: true, methods: ['POST', 'put'] })
  app.post('/post', async () => 'x')
  app.put('/put', async () => 'x')
  app.patch('/patch', async () => 'x')
  app.get('/get', async () => 'x')
  app.post('/out', { config: { idempotency: false } }, async () => 'x')
  t.equal(await replays(app, '/post'), true)
  t.equal(await replays(app, '/put', 'PUT'), true)
  t.equal(await replays(app, '/patch', 'PATCH'), false)
  t.equal(await replays(app, '/get', 'GET'), false)
  t.equal(await replays(app, '/out'), false)
})

t.test('in a route with several methods the safe ones are left alone, with their HEAD twin', async (t) => {
  const app = await build(t)
  app.route({ method: ['GET', 'POST'], url: '/both', config: { idempotency: true }, handler: async () => 'x' })
  app.all('/all', { config: { idempotency: true } }, async () => 'x')
  t.equal(await replays(app, '/both'), true)
  t.equal(await replays(app, '/both', 'GET'), false)
  t.equal(await replays(app, '/both', 'HEAD'), false)
  t.equal(await replays(app, '/all', 'DELETE'), true)
  t.equal(await replays(app, '/all', 'OPTIONS'), false)
})

t.test('a route with safe methods only cannot opt in', async (t) => {
  const app = await build(t)
  const error = { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /GET \/get/ }
  t.throws(() => app.get('/get', { config: { idempotency: true } }, async () => 'x'), error)
  const head = () => app.route({ method: 'HEAD', url: '/h', config: { idempotency: {} }, handler: async () => 'x' })
  t.throws(head, { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
})

t.test('a request without a key runs normally', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (request) => {
    t.equal(request.idempotency, null)
    return ++runs
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).body, '1')
  t.equal((await app.inject({ method: 'POST', url: '/' })).body, '2')
})

t.test('bad options fail at registration, and at the declaration of the route', async (t) => {
  const app = Fastify()
  await t.rejects(async () => await app.register(idempotency, { ttl: 'soon' } as never), {
    code: 'FST_IDEMPOTENCY_INVALID_OPTION',
    message: /"ttl" takes a positive integer.*'soon' \(string\)/
  })
  const other = await build(t)
  t.throws(() => other.post('/', { config: { idempotency: { ttll: 1 } as never } }, async () => 'x'), {
    code: 'FST_IDEMPOTENCY_INVALID_OPTION',
    message: /"ttll" of POST \/ is not known/
  })
})

t.test('a route may have one hook, or several', async (t) => {
  const app = await build(t)
  let calls = 0
  const hook = async () => void calls++
  app.post('/one', { config: { idempotency: true }, preHandler: hook }, async () => 'x')
  app.post('/several', { config: { idempotency: true }, preHandler: [hook, hook] }, async () => 'x')
  for (const url of ['/one', '/several']) t.equal(await replays(app, url), true, url)
  t.equal(calls, 6)
})
