import { createHash } from 'node:crypto'
import { once } from 'node:events'
import http from 'node:http'
import http2 from 'node:http2'
import type { AddressInfo } from 'node:net'
import { setImmediate as turn } from 'node:timers/promises'
import Fastify, { type FastifyInstance, type FastifyRequest, type FastifyServerOptions } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions, payloadFingerprint } from '../../index.js'
import { build, codeOf, listen, type Post, post, REPLAYED } from '../support/app.js'

/* What a request is for, and what it brings, over real sockets: the same request gets the same reply, and no other does. */

const REUSED = 'FST_IDEMPOTENCY_KEY_REUSED'
const covered = { config: { idempotency: true } }
const HOOKS = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const

/** An app that listens, and what becomes of a request to it: `ran`, `replay`, or the code of an error. */
async function served(
  t: Test,
  declare: (app: FastifyInstance) => unknown,
  options: IdempotencyOptions = {},
  server: FastifyServerOptions = {}
) {
  const app = await build(t, options, server)
  await declare(app)
  const port = await listen(app)
  return async (path: string, headers: Record<string, string> = {}, body = '{"a":1}', method = 'POST') => {
    const reply = await post(port, { path, method, body, key: 'k', headers } satisfies Post)
    if (reply.status !== 200) return codeOf(reply) ?? reply.status
    return reply.headers[REPLAYED] === 'true' ? 'replay' : 'ran'
  }
}

const echo = async (request: FastifyRequest) => ({ url: request.url })

t.test('one URL with routes for several versions: the key of one is of no use to another', async (t) => {
  for (const hook of HOOKS) {
    const declare = (app: FastifyInstance) => {
      for (const version of ['1.0.0', '1.2.0', '2.0.0']) {
        app.route({ method: 'POST', url: '/', constraints: { version }, ...covered, handler: async () => version })
      }
    }
    const send = await served(t, declare, { hook })
    t.equal(await send('/', { 'accept-version': '1.2.0' }), 'ran')
    t.equal(await send('/', { 'accept-version': '2.0.0' }), REUSED)
    t.equal(await send('/', { 'accept-version': '1.0.0' }), REUSED)
    t.equal(await send('/', { 'accept-version': '1.2.0' }), 'replay')
    t.equal(await send('/', { 'accept-version': '1.x' }), 'replay', 'what is routed alike is alike')
  }
})

t.test('one URL with routes for several hosts, or for what an app tells them by', async (t) => {
  const hosts = await served(t, (app) => {
    for (const host of ['a.example', /^(b|c)\.example$/]) {
      app.route({ method: 'POST', url: '/', constraints: { host }, ...covered, handler: async () => String(host) })
    }
  })
  t.equal(await hosts('/', { host: 'a.example' }), 'ran')
  t.equal(await hosts('/', { host: 'b.example' }), REUSED)
  t.equal(await hosts('/', { host: 'a.example' }), 'replay')

  const region = {
    name: 'region',
    storage() {
      const handlers = new Map<unknown, unknown>()
      return {
        get: (name: unknown) => (handlers.get(name) ?? null) as never,
        set: (name: unknown, handler: unknown) => void handlers.set(name, handler)
      }
    },
    deriveConstraint: (request: { headers: Record<string, unknown> }) => request.headers['x-region'],
    validate: () => true
  }
  const regions = await served(
    t,
    (app) => {
      for (const name of ['eu', 'us']) {
        app.route({ method: 'POST', url: '/', constraints: { region: name }, ...covered, handler: async () => name })
      }
    },
    {},
    { routerOptions: { constraints: { region } as never } }
  )
  t.equal(await regions('/', { 'x-region': 'eu' }), 'ran')
  t.equal(await regions('/', { 'x-region': 'us' }), REUSED)
  t.equal(await regions('/', { 'x-region': 'eu' }), 'replay')
})

t.test('one URL of two tenants: the key of one is of no use to the other, whatever scope they have', async (t) => {
  for (const options of [{}, { scope: () => 'user 1' }, { scope: false as const }]) {
    const send = await served(t, (app) => app.post('/orders', covered, echo), options)
    t.equal(await send('/orders', { host: 'acme.example' }), 'ran')
    t.equal(await send('/orders', { host: 'globex.example' }), REUSED)
    t.equal(await send('/orders', { host: 'acme.example:8080' }), REUSED)
    t.equal(await send('/orders', { host: 'Acme.Example' }), 'replay', 'RFC 3986: letter case is nothing in a host')
    t.equal(await send('/orders', { host: 'globex.example', 'x-forwarded-host': 'acme.example' }), REUSED)
  }
})

t.test('the host behind a proxy that is trusted is the one that it names', async (t) => {
  const send = await served(t, (app) => app.post('/', covered, echo), {}, { trustProxy: true })
  const through = (host: string, proxy: string) => ({ host: proxy, 'x-forwarded-host': host })
  t.equal(await send('/', through('acme.example', 'proxy-1')), 'ran')
  t.equal(await send('/', through('globex.example', 'proxy-1')), REUSED)
  t.equal(await send('/', through('acme.example', 'proxy-2')), 'replay')
})

t.test('a URL that is rewritten is what it is rewritten to', async (t) => {
  const rewriteUrl: FastifyServerOptions['rewriteUrl'] = (request) =>
    `/${request.headers['x-tenant']}${request.url?.replace('/v1', '')}`
  const declare = (app: FastifyInstance) => {
    app.post('/:tenant/orders', covered, echo)
    app.post('/fixed/list', covered, echo)
  }
  const send = await served(t, declare, { scope: () => 'user 1' }, { rewriteUrl })
  t.equal(await send('/orders', { 'x-tenant': 'acme' }), 'ran')
  t.equal(await send('/orders', { 'x-tenant': 'globex' }), REUSED)
  t.equal(await send('/v1/orders', { 'x-tenant': 'acme' }), 'replay', 'two ways to one resource')
})

t.test('in HTTP/2 the host is the :authority', async (t) => {
  const app = await build(t, {}, { http2: true } as never)
  app.post('/', covered, echo)
  const port = await listen(app)
  const session = http2.connect(`http://127.0.0.1:${port}`)
  t.teardown(() => session.destroy())
  const send = async (authority: string, body: string | null, headers = {}) => {
    const named = { ':method': 'POST', ':path': '/', ':authority': authority, 'idempotency-key': 'k', ...headers }
    const stream = session.request(named, { endStream: body === null })
    stream.resume()
    if (body !== null) stream.end(body)
    const [reply] = await once(stream, 'response')
    return reply[':status'] === 200 ? (reply[REPLAYED] === 'true' ? 'replay' : 'ran') : reply[':status']
  }
  const json = { 'content-type': 'application/json' }
  t.equal(await send('acme.example', '{"a":1}', json), 'ran')
  t.equal(await send('globex.example', '{"a":1}', json), 422)
  t.equal(await send('acme.example', '{"a":2}', json), 422)
  t.equal(await send('acme.example', null), 422)
  t.equal(await send('acme.example', '{"a":1}', json), 'replay')
})

t.test('parameters and query are compared by value', async (t) => {
  const send = await served(
    t,
    (app) => {
      app.post('/users/:user/orders/:order', covered, echo)
      app.post('/files/*', covered, echo)
    },
    { hook: 'onRequest' }
  )
  const first = '/users/1/orders/2?a=1&b=2&c=3&c=4'
  t.equal(await send(first), 'ran')
  for (const other of [
    '/users/2/orders/1?a=1&b=2&c=3&c=4',
    '/users/1/orders/3?a=1&b=2&c=3&c=4',
    '/users/1/orders/2?a=1&b=2&c=4&c=3',
    '/users/1/orders/2?a=1&b=2&c=3',
    '/users/1/orders/2?a=2&b=1&c=3&c=4',
    '/users/1/orders/2?a=1&b=2&c=3&c=4&d',
    '/users/1/orders/2',
    '/files/1?a=1&b=2&c=3&c=4'
  ]) {
    t.equal(await send(other), REUSED, other)
  }
  for (const same of ['?b=2&a=1&c=3&c=4', '?c=3&b=2&c=4&a=1', '?a=1&b=%32&c=3&c=4', '?a=1&b=2&c=3&c=4&']) {
    t.equal(await send(`/users/1/orders/2${same}`), 'replay', same)
  }
})

t.test('what Fastify routes alike is alike', async (t) => {
  const routerOptions = { ignoreTrailingSlash: true, caseSensitive: false, ignoreDuplicateSlashes: true }
  const send = await served(t, (app) => app.post('/orders', covered, echo), {}, { routerOptions })
  t.equal(await send('/orders'), 'ran')
  for (const same of ['/orders/', '/Orders', '//orders', '/orders?', '/ORDERS//', '/%6frders']) {
    t.equal(await send(same), 'replay', same)
  }
  t.equal(await send('/orders?a'), REUSED)
  const wild = await served(t, (app) => app.post('/files/*', covered, echo), {}, { routerOptions })
  t.equal(await wild('/files/a/b'), 'ran')
  t.equal(await wild('/Files//a/b/'), 'replay')
  t.equal(await wild('/files/a/c'), REUSED)
  const encoded = await served(t, (app) => app.post('/users/:name', covered, echo), {}, { routerOptions })
  t.equal(await encoded('/users/J%C3%BCrgen'), 'ran')
  t.equal(await encoded('/users/J%c3%bcrgen'), 'replay')
  t.equal(await encoded('/Users/%4A%C3%BCrgen'), 'replay')
  t.equal(await encoded('/users/j%C3%BCrgen'), REUSED, 'the case of a parameter counts')

  const prefixed = await served(t, (app) =>
    app.register(async (child) => void child.post('/', covered, echo), { prefix: '/shop' })
  )
  t.equal(await prefixed('/shop'), 'ran')
  t.equal(await prefixed('/shop/'), 'replay')
})

t.test('parameters and query are those that were sent, not those that a schema has made of them', async (t) => {
  const schema = {
    params: { type: 'object', properties: { id: { type: 'integer' } } },
    querystring: {
      type: 'object',
      properties: { limit: { type: 'integer', default: 10 } },
      additionalProperties: false
    }
  }
  for (const hook of HOOKS) {
    const send = await served(t, (app) => app.post('/:id', { schema, ...covered }, echo), { hook })
    t.equal(await send('/1?other=1'), 'ran')
    t.equal(await send('/1?other=2'), REUSED, 'what the schema does not know is still what was asked for')
    t.equal(await send('/1?other=1&limit=10'), REUSED)
    t.equal(await send('/1?other=1'), 'replay')
  }
})

t.test('a query parser of its own, with nested values, is compared by value as well', async (t) => {
  const querystringParser = (text: string) => {
    const nested: Record<string, unknown> = {}
    for (const [name, value] of new URLSearchParams(text)) nested[name] = { at: new Map([[name, value]]) }
    return nested
  }
  const send = await served(t, (app) => app.post('/', covered, echo), {}, { routerOptions: { querystringParser } })
  t.equal(await send('/?a=1&b=2'), 'ran')
  t.equal(await send('/?b=2&a=1'), 'replay')
  t.equal(await send('/?a=1&b=3'), REUSED)
})

t.test('a target says what a signed URL, or one with a cache buster, is for', async (t) => {
  for (const hook of HOOKS) {
    const target = (request: FastifyRequest) => (request.query as { to: string }).to
    const send = await served(t, (app) => app.route({ method: ['POST', 'PUT'], url: '/', ...covered, handler: echo }), {
      hook,
      target
    })
    t.equal(await send('/?to=alice&sig=1'), 'ran')
    t.equal(await send('/?sig=2&to=alice', { host: 'other.example' }), 'replay')
    t.equal(await send('/?to=mallory&sig=1'), REUSED)
    t.equal(await send('/?to=alice&sig=1', {}, '{"a":1}', 'PUT'), REUSED, 'the method is always compared')
    t.equal(await send('/?to=alice&sig=1', {}, '{"a":2}'), REUSED, 'and so is the payload')
    t.equal(await send('/?to=alice&sig=1', { authorization: 'Bearer mallory' }), REUSED, 'and the caller')
    t.equal(await send('/?sig=1'), 'FST_IDEMPOTENCY_INVALID_OPTION', 'nothing is no target')
  }
})

t.test('the method counts where one handler serves several', async (t) => {
  const send = await served(t, (app) =>
    app.route({ method: ['POST', 'PUT', 'PATCH', 'DELETE'], url: '/', ...covered, handler: echo })
  )
  t.equal(await send('/'), 'ran')
  for (const method of ['PUT', 'PATCH', 'DELETE']) t.equal(await send('/', {}, '{"a":1}', method), REUSED)
})

t.test("what an instance's hook makes of a body does not turn retries into other requests", async (t) => {
  let now = 0
  const hooks: Record<string, (request: FastifyRequest) => void> = {
    replaces: (request) => {
      request.body = { ...(request.body as object), receivedAt: ++now }
    },
    mutates: (request) => {
      Object.assign(request.body as object, { receivedAt: ++now })
    },
    removes: (request) => {
      request.body = undefined
    },
    'mutates deeply': (request) => {
      ;(request.body as { items: unknown[] }).items.push(++now)
    }
  }
  for (const hook of HOOKS) {
    for (const [name, change] of Object.entries(hooks)) {
      for (const phase of ['preValidation', 'preHandler'] as const) {
        const seen: unknown[] = []
        const declare = (app: FastifyInstance) => {
          app.addHook(phase, async (request) => change(request))
          app.post('/', covered, async (request) => seen.push(request.body))
        }
        const send = await served(t, declare, { hook })
        const [one, other] = ['{"items":[1]}', '{"items":[2]}']
        const where = `${name} in ${phase}, claimed in ${hook}`
        t.equal(await send('/', {}, one), 'ran', where)
        t.equal(await send('/', {}, one), 'replay', where)
        t.equal(await send('/', {}, other), REUSED, `${where}: another one is still told`)
        t.equal(seen.length, 1)
        t.notSame(seen[0], JSON.parse(one), 'the handler gets what the hook has made')
      }
    }
  }
})

t.test('a body that a hook puts where none was sent is not what was sent', async (t) => {
  let now = 0
  const declare = (app: FastifyInstance) => {
    app.addHook('preValidation', async (request) => {
      request.body = { receivedAt: ++now }
    })
    app.post('/', covered, async (request) => ({ body: request.body }))
  }
  for (const hook of HOOKS) {
    const app = await build(t, { hook })
    declare(app)
    const port = await listen(app)
    const send = () => post(port, { key: 'k' })
    const first = await send()
    t.same(JSON.parse(first.text), { body: { receivedAt: now } })
    const second = await send()
    t.equal(second.headers[REPLAYED], 'true')
    t.equal(second.text, first.text)
    t.equal(codeOf(await post(port, { key: 'k', body: '{}' })), REUSED)
  }
})

t.test('a body that cannot be looked at is an error of the server, and no crash', async (t) => {
  const lazy = () => ({
    get amount() {
      throw new Error('not to be read')
    }
  })
  const preHandler = async ({ headers }: FastifyRequest) => {
    if (headers['x-key'] !== undefined) headers['idempotency-key'] = 'k'
  }
  for (const hook of HOOKS) {
    // A form is looked at for longer.
    for (const type of ['application/x-lazy', 'multipart/form-data']) {
      const app = await build(t, { hook })
      app.addContentTypeParser(type, { parseAs: 'string' }, async () =>
        type.endsWith('lazy') ? lazy() : { a: lazy() }
      )
      let runs = 0
      app.post('/', { ...covered, preHandler }, async () => ++runs)
      const port = await listen(app)
      const headers = { 'content-type': type }
      t.equal((await post(port, { key: 'k', body: 'x', headers })).status, 500)
      t.equal(
        (await post(port, { body: 'x', headers: { ...headers, 'x-key': 'k' } })).status,
        500,
        'with a key of a hook'
      )
      t.equal(runs, 0)
      await turn()
      t.equal(await app.idempotency.get('k'), null)
      t.equal((await post(port, { body: 'x', headers })).status, 200, 'without a key nobody looks')
    }
  }
})

t.test('megabytes of brackets are answered, compared and replayed', async (t) => {
  const send = await served(t, (app) => app.post('/:n', { ...covered, bodyLimit: 2 ** 21 }, echo), { scope: () => 'x' })
  const many = 333_333
  const bodies = (last: string) => [
    `[${'[],'.repeat(many)}${last}]`,
    '['.repeat(many) + last + ']'.repeat(many),
    '{"a":'.repeat(many / 3) + last + '}'.repeat(many / 3)
  ]
  const [ones, twos] = [bodies('1'), bodies('2')]
  for (const [n, body] of ones.entries()) {
    t.equal(await send(`/${n}`, { 'idempotency-key': `k${n}` }, body), 'ran')
    t.equal(await send(`/${n}`, { 'idempotency-key': `k${n}` }, body), 'replay')
    t.equal(await send(`/${n}`, { 'idempotency-key': `k${n}` }, twos[n]), REUSED)
  }
})

/** Two blocks with the MD5 79054025255fb1a26e4bc422aef54eb4 (Wang and others, 2004). */
const collision = ['87', '07'].map((x) => {
  const [y, z] = x === '87' ? ['71', 'f2'] : ['f1', '72']
  const [u, v] = x === '87' ? ['b4', 'a8'] : ['34', '28']
  return Buffer.from(
    `d131dd02c5e6eec4693d9a0698aff95c2fcab5${x}12467eab4004583eb8fb7f89` +
      `55ad340609f4b30283e4888325${y}415a085125e8f7cdc99fd91dbd${z}80373c5b` +
      `d8823e3156348f5bae6dacd436c919c6dd53e2${u}87da03fd02396306d248cda0` +
      `e99f33420f577ee8ce54b67080${v}0d1ec69821bcb6a8839396f965${x === '87' ? '2b' : 'ab'}6ff72a70`,
    'hex'
  )
})

t.test('bodies with the same MD5 are different requests', async (t) => {
  const md5 = (data: Buffer) => createHash('md5').update(data).digest('hex')
  const [one, two] = collision as [Buffer, Buffer]
  t.notSame(one, two)
  t.equal(md5(one), md5(two))
  for (const options of [{}, { fingerprint: ({ body }: FastifyRequest) => body as Buffer }]) {
    const app = await build(t, options)
    app.addContentTypeParser('application/x', { parseAs: 'buffer' }, (_request, body, done) => done(null, body))
    app.post('/', covered, async () => 'done')
    const port = await listen(app)
    const send = (body: Buffer) => post(port, { key: 'k', body, headers: { 'content-type': 'application/x' } })
    t.equal((await send(one)).status, 200)
    t.equal(codeOf(await send(two)), REUSED)
    t.equal((await send(one)).headers[REPLAYED], 'true')
  }
})

t.test('payloadFingerprint compares a part of a body by value', async (t) => {
  const fingerprint = ({ body }: FastifyRequest) => {
    const { sentAt, ...rest } = body as Record<string, unknown>
    return payloadFingerprint(rest)
  }
  const send = await served(t, (app) => app.post('/', covered, echo), { fingerprint })
  t.equal(await send('/', {}, '{"a":1,"b":2,"sentAt":1}'), 'ran')
  t.equal(await send('/', {}, '{"sentAt":2,"b":2,"a":1}'), 'replay')
  t.equal(await send('/', {}, '{"sentAt":1,"b":2,"a":2}'), REUSED)
})

t.test('a key header that was sent twice is one key if it is one value', async (t) => {
  const app = await build(t)
  app.post('/', covered, async (request) => ({ key: request.idempotency?.key }))
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const send = async (...keys: string[]) => {
    const headers = keys.flatMap((key) => ['idempotency-key', key])
    const [reply] = await once(
      http
        .request({
          port,
          host: '127.0.0.1',
          method: 'POST',
          agent: false,
          headers: ['host', 'a', 'content-length', '0', ...headers]
        })
        .end(),
      'response'
    )
    reply.resume()
    return [reply.statusCode, reply.headers[REPLAYED]]
  }
  t.same(await send('a', 'a'), [200, undefined])
  t.same(await send('a'), [200, 'true'])
  t.same(await send('"a"', '"a"'), [200, 'true'])
  t.same(await send('"b,c"', '"b,c"', '"b,c"'), [200, undefined])
  t.equal((await send('a', 'b'))[0], 422)
  t.equal((await send('"a"', '"b"'))[0], 422)
})

t.test('a UUID is one key in upper and lower case, for the operator too', async (t) => {
  const app = await build(t, { keyFormat: 'uuid' })
  app.post('/', covered, async (request) => ({ key: request.idempotency?.key }))
  const port = await listen(app)
  const key = '018C2B65-6B0A-7E35-9F1A-9C3D7F0A1B2C'
  t.same(JSON.parse((await post(port, { key })).text), { key: key.toLowerCase() })
  t.equal((await post(port, { key: `"${key.toLowerCase()}"` })).headers[REPLAYED], 'true')
  for (const written of [key, key.toLowerCase(), `"${key}"`]) t.ok(await app.idempotency.get(written), written)
  t.equal(await app.idempotency.delete(key), true)
  t.equal((await post(port, { key })).headers[REPLAYED], undefined)
})

t.test('a key of 32 megabytes in a body is refused', async (t) => {
  const app = await build(t, { field: 'key' }, { bodyLimit: 2 ** 26 })
  app.post('/', covered, async () => 'done')
  const port = await listen(app)
  const huge = 'a'.repeat(32 * 1024 * 1024)
  for (const key of [huge, `"${huge}"`, `"a";b="${huge}"`]) {
    const reply = await post(port, { body: JSON.stringify({ key }) })
    t.same([reply.status, codeOf(reply)], [422, 'FST_IDEMPOTENCY_KEY_INVALID'])
  }
})

t.test(
  'a body that a preHandler hook reads, as those for uploads do, is compared, and its fields are looked at',
  async (t) => {
    for (const options of [{}, { field: 'key' }]) {
      const app = Fastify()
      t.teardown(() => app.close())
      await app.register(idempotency, options)
      app.addContentTypeParser('multipart/form-data', (_request, _payload, done) => done(null))
      let runs = 0
      const preHandler = async (request: FastifyRequest) => {
        let text = ''
        for await (const chunk of request.raw) text += chunk
        request.body = JSON.parse(text)
      }
      app.post('/', { config: { idempotency: true }, preHandler }, async () => ({ run: ++runs }))
      const send = (amount: number) =>
        app.inject({
          method: 'POST',
          url: '/',
          headers: {
            'content-type': 'multipart/form-data; boundary=x',
            ...(options.field === undefined && { 'idempotency-key': 'k' })
          },
          payload: JSON.stringify({ key: 'k', amount })
        })
      t.same((await send(10)).json(), { run: 1 })
      t.equal((await send(9_999)).statusCode, 422)
      t.equal((await send(10)).headers['idempotent-replayed'], 'true')
    }
  }
)

t.test('a constraint that is a pattern needs a target: what it has matched cannot be seen', async (t) => {
  const tenants = {
    name: 'tenant',
    mustMatchWhenDerived: true,
    storage: () => {
      const routes: [RegExp, unknown][] = []
      return {
        get: (value: string) => routes.find(([pattern]) => pattern.test(value))?.[1] ?? null,
        set: (pattern: RegExp, store: unknown) => void routes.push([pattern, store])
      }
    },
    deriveConstraint: (request: { headers: Record<string, unknown> }) => String(request.headers['x-tenant']),
    validate() {}
  }
  const serve = async (target?: (request: FastifyRequest) => string) => {
    const app = Fastify({ routerOptions: { constraints: { tenant: tenants as never } } })
    t.teardown(() => app.close())
    await app.register(idempotency, target === undefined ? {} : { target })
    app.post('/', { constraints: { tenant: /^eu-/ }, config: { idempotency: true } }, async (request) => ({
      tenant: request.headers['x-tenant']
    }))
    await app.ready()
    return app
  }
  await t.rejects(serve(), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"target" of POST \/ is needed/ })
  const app = await serve((request) => `${request.headers['x-tenant']} ${request.url}`)
  const send = (tenant: string) =>
    app.inject({ method: 'POST', url: '/', headers: { 'x-tenant': tenant, 'idempotency-key': 'k' } })
  t.equal((await send('eu-alice')).statusCode, 200)
  t.equal((await send('eu-bob')).statusCode, 422)
})
