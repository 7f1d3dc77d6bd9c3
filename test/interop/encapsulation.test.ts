import Fastify, { type FastifyInstance, type FastifyPluginAsync } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { isReplay, post } from './kit.js'

function server(t: Test) {
  const app = Fastify()
  t.teardown(() => app.close())
  const runs: string[] = []
  /** A route that tells which one it is. */
  const route = (instance: FastifyInstance, path: string) =>
    instance.post(path, { config: { idempotency: true } }, async (request) => {
      runs.push(path)
      return { path, run: runs.length, key: request.idempotency?.key }
    })
  return { app, runs, route }
}

t.test('two sibling scopes with two stores know nothing of each other', async (t) => {
  const { app, runs, route } = server(t)
  const stores = { one: new MemoryStore(), two: new MemoryStore() }
  for (const [name, store] of Object.entries(stores)) {
    app.register(
      async (child) => {
        await child.register(idempotency, { store, replayHeader: `x-replayed-by-${name}` })
        t.equal(child.idempotency.store, store)
        route(child, '/')
      },
      { prefix: `/${name}` }
    )
  }
  await app.ready()
  t.notOk(app.hasDecorator('idempotency'), 'and nothing of them is to be seen outside')
  for (const name of ['one', 'two']) {
    const first = await post(app, { url: `/${name}`, key: 'key' })
    t.equal(first.headers[`x-replayed-by-${name}`], undefined)
    const retry = await post(app, { url: `/${name}`, key: 'key' })
    t.equal(retry.headers[`x-replayed-by-${name}`], 'true')
    t.equal(retry.body, first.body)
  }
  t.equal(runs.length, 2)
})

t.test('two sibling scopes on one store share their keys', async (t) => {
  const { app, runs, route } = server(t)
  const store = new MemoryStore()
  for (const prefix of ['/one', '/two']) {
    const child: FastifyPluginAsync = async (instance) => {
      await instance.register(idempotency, { store })
      route(instance, '/')
    }
    app.register(child, { prefix })
  }
  t.equal((await post(app, { url: '/one', key: 'key' })).statusCode, 200)
  t.equal((await post(app, { url: '/two', key: 'key' })).statusCode, 422, 'one key is one operation')
  t.equal(runs.length, 1)
})

t.test('of nested registrations the nearest one has a route, and it alone', async (t) => {
  for (const innerFirst of [false, true]) {
    const { app, runs, route } = server(t)
    const stores = [new MemoryStore(), new MemoryStore(), new MemoryStore()] as const
    let inner!: FastifyInstance
    let innermost!: FastifyInstance
    const outer = () => app.register(idempotency, { store: stores[0], replayHeader: 'x-outer' })
    if (!innerFirst) await outer()
    await app.register(async (child) => {
      inner = child
      await child.register(idempotency, { store: stores[1], replayHeader: 'x-inner' })
      route(child, '/inner')
      await child.register(async (grandchild) => route(grandchild, '/inherited'))
      await child.register(async (grandchild) => {
        innermost = grandchild
        await grandchild.register(idempotency, { store: stores[2], replayHeader: 'x-innermost' })
        route(grandchild, '/innermost')
      })
    })
    if (innerFirst) await outer()
    route(app, '/outer')
    await app.ready()

    const marks = { '/outer': 'x-outer', '/inner': 'x-inner', '/inherited': 'x-inner', '/innermost': 'x-innermost' }
    for (const [url, mark] of Object.entries(marks)) {
      await post(app, { url, key: url })
      const { headers } = await post(app, { url, key: url })
      t.same(
        Object.keys(headers).filter((name) => name.startsWith('x-')),
        [mark],
        url
      )
    }
    t.equal(runs.length, 4)
    t.same(
      [app, inner, innermost].map(({ idempotency }) => idempotency.store),
      [...stores]
    )
    t.match(await inner.idempotency.get('/inner'), { state: 'completed' })
    t.equal(await app.idempotency.get('/inner'), null)
    t.equal(await innermost.idempotency.get('/inherited'), null)
  }
})

/** Which of these routes of an app, each declared without a config, replay. */
async function covered(app: FastifyInstance, urls: string[]): Promise<string[]> {
  const replayed: string[] = []
  for (const route of urls) {
    const [method, url] = route.split(' ') as ['POST', string]
    const request = { method, url, headers: { 'idempotency-key': route } }
    await app.inject(request)
    if (isReplay(await app.inject(request))) replayed.push(route)
  }
  return replayed
}

t.test('an inner registration inherits global and methods of the nearest outer one', async (t) => {
  const { app } = server(t)
  await app.register(idempotency, { global: true, methods: ['PUT'], store: new MemoryStore() })
  const all = (instance: FastifyInstance, url: string) =>
    instance.route({ method: ['POST', 'PUT', 'DELETE'], url, handler: async () => 'done' })
  const inner = new MemoryStore()
  await app.register(async (child) => {
    await child.register(idempotency, { store: inner })
    t.equal(child.idempotency.store, inner, 'and not the store that it has said')
    all(child, '/inner')
    child.put('/out', { config: { idempotency: false } }, async () => 'done')
    await child.register(async (grandchild) => {
      await grandchild.register(idempotency, { methods: ['DELETE'] })
      all(grandchild, '/methods')
    })
    await child.register(async (grandchild) => {
      await grandchild.register(idempotency, { global: false })
      all(grandchild, '/not')
      await grandchild.register(async (innermost) => {
        await innermost.register(idempotency)
        all(innermost, '/nor')
      })
      await grandchild.register(async (innermost) => {
        await innermost.register(idempotency, { global: true })
        all(innermost, '/again')
      })
    })
  })
  const urls = ['/inner', '/methods', '/not', '/nor', '/again'].flatMap((url) => [
    `POST ${url}`,
    `PUT ${url}`,
    `DELETE ${url}`
  ])
  t.strictSame(await covered(app, [...urls, 'PUT /out']), ['PUT /inner', 'DELETE /methods', 'PUT /again'])
})

t.test('an inner registration that has come before the outer one inherits nothing in silence', async (t) => {
  for (const own of [{}, { global: false }, { methods: ['PUT'] }]) {
    const { app } = server(t)
    app.register(async (child) => {
      await child.register(idempotency, own)
      child.post('/inner', async () => 'done')
      child.get('/safe', async () => 'done')
    })
    app.register(idempotency, { global: true })
    const boot = async () => void (await app.ready())
    if ('global' in own || 'methods' in own) await t.resolves(boot)
    else await t.rejects(boot, { code: 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY', message: /^POST \/inner was declared/ })
  }
})

t.test('an inner registration that says nothing of scope has the one of the nearest outer one', async (t) => {
  const account = (request: { headers: Record<string, unknown> }) => String(request.headers['x-account'])
  const from = (app: FastifyInstance, url: string, caller: string) =>
    app.inject({ method: 'POST', url, headers: { 'idempotency-key': url, 'x-account': caller } })
  for (const [own, isApart] of [
    [{}, true],
    [{ scope: undefined }, true],
    [{ scope: false }, false],
    [{ scope: () => 'all' }, false]
  ] as [IdempotencyOptions, boolean][]) {
    const { app, route } = server(t)
    await app.register(idempotency, { scope: account })
    await app.register(async (child) => {
      await child.register(idempotency, { ...own, store: new MemoryStore() })
      route(child, '/inner')
      await child.register(async (grandchild) => {
        await grandchild.register(idempotency, { store: new MemoryStore() })
        route(grandchild, '/innermost')
      })
    })
    for (const url of ['/inner', '/innermost']) {
      await from(app, url, 'a')
      t.equal(isReplay(await from(app, url, 'b')), !isApart, url)
      t.equal(isReplay(await from(app, url, 'a')), true, url)
    }
  }
})

t.test('an inner registration that has come before an outer one with a scope fails the boot', async (t) => {
  for (const [own, fails] of [
    [{}, true],
    [{ scope: false }, false]
  ] as [IdempotencyOptions, boolean][]) {
    const { app, route } = server(t)
    app.register(async (child) => {
      await child.register(idempotency, own)
      route(child, '/inner')
    })
    app.register(idempotency, { scope: () => 'somebody' })
    const boot = async () => void (await app.ready())
    if (fails) await t.rejects(boot, { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"scope" of an outer/ })
    else await t.resolves(boot)
  }
})

t.test('global in an outer scope does not cover the routes of an inner registration that says no', async (t) => {
  const { app } = server(t)
  await app.register(idempotency, { global: true })
  let runs = 0
  await app.register(async (child) => {
    await child.register(idempotency, { global: false })
    child.post('/inner', async (request) => ({ run: ++runs, known: request.idempotency !== null }))
  })
  app.post('/outer', async () => ({ run: ++runs }))
  for (const run of [1, 2]) t.same((await post(app, { url: '/inner', key: 'key' })).json(), { run, known: false })
  for (let i = 0; i < 2; i++) t.same((await post(app, { url: '/outer', key: 'key' })).json(), { run: 3 })
})

t.test('a second registration in the same scope is an error at boot', async (t) => {
  const { app } = server(t)
  app.register(idempotency)
  app.register(idempotency)
  await t.rejects(async () => app.ready(), { code: 'FST_IDEMPOTENCY_ALREADY_REGISTERED' })
})

t.test('decorators of request and reply are there for handlers, and for our options', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.decorateRequest('tenant', '')
  app.addHook('onRequest', async (request) => {
    ;(request as unknown as { tenant: string }).tenant = String(request.headers['x-tenant'])
  })
  const tenant = (request: object) => (request as { tenant: string }).tenant
  await app.register(idempotency, { scope: tenant })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (request) => ({ run: ++runs, tenant: tenant(request) }))
  const send = (name: string) => post(app, { key: 'key', headers: { 'x-tenant': name } })
  t.same((await send('one')).json(), { run: 1, tenant: 'one' })
  t.same((await send('two')).json(), { run: 2, tenant: 'two' })
  const retry = await send('one')
  t.ok(isReplay(retry))
  t.same(retry.json(), { run: 1, tenant: 'one' })
  t.ok(await app.idempotency.get('key', { scope: 'two' }))
})

t.test('routes with a prefix, and both forms of its root, are covered', async (t) => {
  const { app, runs, route } = server(t)
  await app.register(idempotency)
  app.register(async (child) => void route(child, '/'), { prefix: '/v1' })
  for (const url of ['/v1', '/v1/']) {
    t.notOk(isReplay(await post(app, { url, key: url })))
    t.ok(isReplay(await post(app, { url, key: url })))
  }
  t.equal(runs.length, 2)
})

t.test('an inner registration that says nothing of a store has the one that an outer one was given', async (t) => {
  const given = new MemoryStore()
  const { app, route } = server(t)
  await app.register(idempotency, { store: given, scope: false })
  await app.register(async (child) => {
    await child.register(idempotency, { ttl: '2h' })
    t.equal(child.idempotency.store, given)
    route(child, '/inner')
    await child.register(async (grandchild) => {
      await grandchild.register(idempotency)
      t.equal(grandchild.idempotency.store, given)
    })
  })
  await app.register(async (child) => {
    await child.register(idempotency, { store: new MemoryStore() })
    t.not(child.idempotency.store, given)
  })
  await app.inject({ method: 'POST', url: '/inner', headers: { 'idempotency-key': 'k' } })
  t.match(await app.idempotency.get('k'), { state: 'completed' })
})

t.test('an inner registration that has come before an outer one with a store fails the boot', async (t) => {
  for (const [own, outer, fails] of [
    [{}, { store: new MemoryStore() }, true],
    [{ store: new MemoryStore() }, { store: new MemoryStore() }, false],
    [{}, {}, false]
  ] as [IdempotencyOptions, IdempotencyOptions, boolean][]) {
    const { app, route } = server(t)
    app.register(async (child) => {
      await child.register(idempotency, own)
      route(child, '/inner')
    })
    app.register(idempotency, outer)
    const boot = async () => void (await app.ready())
    if (fails) await t.rejects(boot, { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"store" of an outer/ })
    else await t.resolves(boot)
  }
})
