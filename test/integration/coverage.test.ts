import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency, { MemoryStore } from '../../index.js'
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

t.test('global covers only the methods of methods in a route that has more', async (t) => {
  const app = await build(t, { global: true })
  app.route({ method: ['PUT', 'POST'], url: '/both', handler: async () => 'x' })
  t.equal(await replays(app, '/both'), true)
  t.equal(await replays(app, '/both', 'PUT'), false)
})

t.test('a route with safe methods only cannot opt in', async (t) => {
  const app = await build(t)
  const error = { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /GET \/get/ }
  t.throws(() => app.get('/get', { config: { idempotency: true } }, async () => 'x'), error)
  const head = () => app.route({ method: 'HEAD', url: '/h', config: { idempotency: {} }, handler: async () => 'x' })
  t.throws(head, { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
})

t.test('both urls of a prefixed root route are covered', async (t) => {
  const app = await build(t)
  await app.register(async (child) => void child.post('/', { config: { idempotency: true } }, async () => 'x'), {
    prefix: '/pre'
  })
  t.equal(await replays(app, '/pre'), true)
  t.equal(await replays(app, '/pre/'), true)
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

t.test('skip lets a request through unprotected, and is asked before anything else', async (t) => {
  for (const hook of ['onRequest', 'preHandler'] as const) {
    for (const answer of [true, Promise.resolve(true)]) {
      const app = await build(t, { hook, required: true, keyFormat: 'uuid', field: 'key', skip: () => answer })
      app.post('/', { config: { idempotency: true } }, async (request) => ({ seen: request.idempotency }))
      const invalid = await app.inject({ method: 'POST', url: '/', headers: keyed('k'), payload: { key: 'k' } })
      t.same(invalid.json(), { seen: null })
      const missing = await app.inject({ method: 'POST', url: '/' })
      t.same(missing.json(), { seen: null })
    }
  }
})

t.test('skip is asked once per request, also where the key may come with the body', async (t) => {
  let asked = 0
  const app = await build(t, {
    field: 'key',
    skip: () => {
      asked++
      return false
    }
  })
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  await app.inject({ method: 'POST', url: '/', payload: { key: 'k' } })
  t.equal(asked, 1)
})

t.test('a covered route declared before the plugin has loaded fails the boot', async (t) => {
  const expected = { code: 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY', message: /POST \/early.*await app\.register/s }
  t.test('when it was declared before register', async (t) => {
    const app = Fastify()
    app.post('/early', { config: { idempotency: true } }, async () => 'x')
    await t.rejects(async () => {
      await app.register(idempotency)
      await app.ready()
    }, expected)
  })
  t.test('when register was not awaited', async (t) => {
    const app = Fastify()
    app.register(idempotency)
    app.post('/early', { config: { idempotency: {} } }, async () => 'x')
    await t.rejects(async () => {
      await app.ready()
    }, expected)
  })
  t.test('when global would cover it', async (t) => {
    const app = Fastify()
    app.register(idempotency, { global: true })
    app.post('/early', async () => 'x')
    await t.rejects(async () => {
      await app.ready()
    }, expected)
  })
  t.test('but not when it is declared in a plugin that loads later, or opts out, or is safe', async (t) => {
    const app = Fastify()
    t.teardown(() => app.close())
    app.get('/get', async () => 'x')
    app.post('/out', { config: { idempotency: false } }, async () => 'x')
    app.register(idempotency, { global: true })
    app.register(async (child) => void child.post('/late', async () => 'x'))
    await app.ready()
    t.equal(await replays(app as never, '/late'), true)
  })
  t.test('and not for routes outside of the scope in which the plugin is registered', async (t) => {
    const app = Fastify()
    t.teardown(() => app.close())
    app.post('/outside', async () => 'x')
    await app.register(async (child) => {
      await child.register(idempotency, { global: true })
      child.post('/inside', async () => 'x')
    })
    await app.ready()
    t.equal(await replays(app as never, '/inside'), true)
    t.equal(await replays(app as never, '/outside'), false)
  })
})

t.test('two encapsulated scopes are two independent instances', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const runs: string[] = []
  for (const name of ['a', 'b']) {
    await app.register(async (child) => {
      await child.register(idempotency, { header: `X-Key-${name}` })
      child.post(`/${name}`, { config: { idempotency: true } }, async () => runs.push(name))
    })
  }
  for (const name of ['a', 'b', 'a', 'b']) {
    await app.inject({ method: 'POST', url: `/${name}`, headers: { [`x-key-${name}`]: 'k' } })
  }
  await app.inject({ method: 'POST', url: '/a', headers: { 'x-key-b': 'k' } })
  t.same(runs, ['a', 'b', 'a'])
})

t.test('a registration in a child scope is its own master, below one in the parent', async (t) => {
  const [outer, inner] = [new MemoryStore(), new MemoryStore()]
  const app = await build(t, { store: outer })
  app.post('/outer', { config: { idempotency: true } }, async () => 'x')
  await app.register(async (child) => {
    await child.register(idempotency, { store: inner })
    t.equal(child.idempotency.store, inner)
    child.post('/inner', { config: { idempotency: true } }, async () => 'x')
  })
  t.equal(app.idempotency.store, outer)
  t.equal(await replays(app, '/inner'), true)
  t.equal(await app.idempotency.get('POST /inner'), null)
  t.equal(await replays(app, '/outer'), true)
  t.equal((await app.idempotency.get('POST /outer'))?.state, 'completed')
})

t.test('registering twice in one scope is refused', async (t) => {
  const app = Fastify()
  await app.register(idempotency)
  await t.rejects(async () => await app.register(idempotency), { code: 'FST_IDEMPOTENCY_ALREADY_REGISTERED' })
})

t.test('bad options fail at registration, and at the declaration of the route', async (t) => {
  const app = Fastify()
  await t.rejects(async () => await app.register(idempotency, { ttl: '1h' } as never), {
    code: 'FST_IDEMPOTENCY_INVALID_OPTION',
    message: /"ttl" takes a positive integer.*'1h' \(string\)/
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

t.test("a user's shared and frozen hook arrays stay as they are", async (t) => {
  const app = await build(t)
  const shared = Object.freeze({ preHandler: Object.freeze([async () => {}]), config: { idempotency: true } })
  app.post('/1', shared as never, async () => 'x')
  app.post('/2', shared as never, async () => 'x')
  await app.ready()
  t.equal(shared.preHandler.length, 1)
  t.equal(await replays(app, '/1'), true)
})
