import { createRequire } from 'node:module'
import proxy from '@fastify/http-proxy'
import type { FastifyInstance, FastifyPluginAsync, FastifyRequest, InjectOptions } from 'fastify'
import fp from 'fastify-plugin'
import t, { type Test } from 'tap'
import idempotency from '../../index.js'
import { codeOf, REPLAYED } from '../support/app.js'
import { latch } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { warningsOf } from '../support/warnings.js'
import { accountOf, bare, handled, RECIPES, snippet, tried } from './snippet.js'

/* The recipes of docs/recipes.md, and of the README: nobody gets in without credentials, and nobody gets another's reply. */

type Headers = Record<string, string>
type Send = (headers: Headers) => Promise<Awaited<ReturnType<FastifyInstance['inject']>>>

/** Posts to a route. */
function sender(app: FastifyInstance, url: string, payload: InjectOptions['payload'] = {}): Send {
  return async (headers) => await app.inject({ method: 'POST', url, headers, payload })
}

/** Who sends what: one caller, in two ways where a token can be refreshed; another; and whoever is nobody. */
interface Callers {
  alice: Headers[]
  bob: Headers
  nobody: Record<string, Headers>
}

const isReplay = ({ headers }: { headers: object }) => (headers as Headers)[REPLAYED] === 'true'

/** A recipe that authenticates keeps what its page says of it. */
async function keepsOut(t: Test, send: Send, { alice, bob, nobody }: Callers, { scoped = true } = {}): Promise<void> {
  const [mine = {}, ...refreshed] = alice
  const key = { 'idempotency-key': 'k' }
  for (const [who, headers] of Object.entries(nobody)) {
    t.equal((await send(headers)).statusCode, 401, `${who}, without a key`)
    t.equal((await send({ ...headers, ...key })).statusCode, 401, `${who}, with a key`)
  }
  const first = await send({ ...mine, ...key })
  t.equal(first.statusCode, 200, 'a 401 is not replayed')
  t.equal(isReplay(first), false)
  for (const headers of [mine, ...refreshed]) {
    const retry = await send({ ...headers, ...key })
    t.same([isReplay(retry), retry.body], [true, first.body], 'the retry of the same caller is a replay')
  }
  for (const [who, headers] of Object.entries(nobody)) {
    const refused = await send({ ...headers, ...key })
    t.same([refused.statusCode, isReplay(refused)], [401, false], `${who}, with a key that has a reply`)
  }
  const foreign = await send({ ...bob, ...key })
  t.equal(isReplay(foreign), false)
  t.not(foreign.body, first.body, 'another caller does not get the reply')
  if (scoped) t.equal(foreign.statusCode, 200, 'and has an operation of its own')
  else t.equal(codeOf(foreign), 'FST_IDEMPOTENCY_KEY_REUSED')
}

const authorization = {
  alice: [{ authorization: 'of alice' }],
  bob: { authorization: 'of bob' },
  nobody: { 'no credentials': {}, 'credentials that have expired': { authorization: 'expired' } }
}

t.test('redis: callers are told apart, and the keys are in Redis', async (t) => {
  const redis = await startRedis({ port: true })
  t.teardown(() => redis.close())
  process.env.REDIS_URL = redis.url
  const { app } = (await snippet('redis')) as { app: FastifyInstance }
  t.teardown(() => app.close())
  // Two runs in one millisecond would have one id.
  let now = 0
  const { now: clock } = Date
  Date.now = () => ++now
  try {
    await keepsOut(t, sender(app, '/charges'), authorization)
  } finally {
    Date.now = clock
  }
  t.equal(codeOf(await sender(app, '/refunds')(authorization.bob)), 'FST_IDEMPOTENCY_KEY_MISSING')
  const client = await redis.client()
  t.match(await client.keys('*'), [/^idempotency:/, /^idempotency:/])
})

t.test('autoload: the plugin file has the client of another file, and says when that is not loaded', async (t) => {
  const { exported } = (await snippet('autoload')) as { exported: FastifyPluginAsync }
  const alone = await bare(t)
  alone.register(exported)
  await t.rejects(async () => void (await alone.ready()), { message: /redis-client/ })
  const app = await bare(t)
  const redis = await startRedis()
  t.teardown(() => redis.close())
  const client = await redis.client()
  app.register(fp(async (app) => void app.decorate('redis', client as never), { name: 'redis-client' }))
  app.decorateRequest('account', '')
  app.addHook('onRequest', async (request) => {
    request.account = await accountOf(request.headers.authorization)
  })
  app.register(exported)
  app.register(async (app) => {
    app.post('/charges', { config: { idempotency: true } }, async () => ({ run: ++handled.runs }))
  })
  await app.ready()
  await keepsOut(t, sender(app, '/charges'), authorization)
})

t.test('fastify-cli: options of the application are not taken for those of the plugin', async (t) => {
  tried.add('fastify-cli')
  const plugin = createRequire(import.meta.url)('../docs/snippets/fastify-cli.cjs') as FastifyPluginAsync
  const options = { foo: 'bar' }
  const bareOne = await bare(t)
  bareOne.register(idempotency, options as object)
  await t.rejects(async () => void (await bareOne.ready()), { message: /option "foo" is not known/ })
  const app = await bare(t)
  app.register(plugin, options)
  app.register(async (app) => {
    app.post('/charges', { config: { idempotency: true } }, async () => ({}))
  })
  t.equal(codeOf(await sender(app, '/charges')({})), 'FST_IDEMPOTENCY_KEY_MISSING')
})

t.test(
  'scope, jwt: a missing, an expired or a forged token is a 401, and the caller is who the token says',
  async (t) => {
    for (const name of ['scope', 'jwt']) {
      const app = await bare(t)
      if (name === 'scope') await app.register(import('@fastify/jwt'), { secret: 'only for this example' })
      await snippet(name, { app })
      const handler = async () => ({ run: ++handled.runs })
      if (name === 'scope') app.post('/charges', { config: { idempotency: true } }, handler)
      await app.ready()
      const bearer = (claims: object) => ({ authorization: `Bearer ${app.jwt.sign(claims)}` })
      const required = name === 'jwt'
      await keepsOut(t, sender(app, '/charges'), {
        alice: [bearer({ sub: 'alice' }), bearer({ sub: 'alice', refreshed: true })],
        bob: bearer({ sub: 'bob' }),
        nobody: {
          'no token': {},
          'an expired token': bearer({ sub: 'alice', exp: 1 }),
          'a forged token': { authorization: `${bearer({ sub: 'alice' }).authorization}x` }
        }
      })
      const keyless = await sender(app, '/charges')(bearer({ sub: 'alice' }))
      t.equal(keyless.statusCode, required ? 400 : 200, 'who is somebody may come without a key, unless it is required')
    }
  }
)

t.test('auth: the caller is whoever the session belongs to, whatever a header says', async (t) => {
  const app = await bare(t)
  app.decorateRequest('account', '')
  await snippet('auth', { app })
  const send = sender(app, '/charges')
  await keepsOut(t, send, {
    alice: [{ cookie: 'of alice' }, { cookie: 'of alice', 'x-user': 'bob' }],
    bob: { cookie: 'of bob', 'x-user': 'alice' },
    nobody: { 'no session': { 'x-user': 'alice' }, 'a session that has expired': { cookie: 'expired' } }
  })
})

t.test(
  'session: a session that is missing, has ended or is forged is a 401, and a second user gets no reply of the first',
  async (t) => {
    const app = await bare(t)
    await snippet('session', { app })
    app.post('/login', async (request) => {
      request.session.account = (request.body as { user: string }).user
      return {}
    })
    app.post('/logout', async (request) => request.session.destroy().then(() => ({})))
    const cookieOf = async (user: string) => {
      const { headers } = await app.inject({ method: 'POST', url: '/login', payload: { user } })
      return { cookie: String([headers['set-cookie']].flat()[0]).split(';')[0] as string }
    }
    const ended = await cookieOf('alice')
    await app.inject({ method: 'POST', url: '/logout', headers: ended })
    await keepsOut(t, sender(app, '/charges'), {
      alice: [await cookieOf('alice'), await cookieOf('alice')],
      bob: await cookieOf('bob'),
      nobody: {
        'no session': {},
        'a session that has ended': ended,
        'a forged session': { cookie: 'sessionId=alice.forged' }
      }
    })
  }
)

t.test('api-key: a missing, an expired or a foreign key', async (t) => {
  const app = await bare(t)
  await snippet('api-key', { app })
  await keepsOut(t, sender(app, '/charges'), {
    alice: [{ 'x-api-key': 'of alice' }],
    bob: { 'x-api-key': 'of bob' },
    nobody: { 'no key': {}, 'a key that has expired': { 'x-api-key': 'expired' } }
  })
})

const CREDENTIALS: Record<string, (of: string) => Headers> = {
  'an Authorization': (authorization) => ({ authorization }),
  'an API key': (of) => ({ 'x-api-key': of }),
  'a cookie': (cookie) => ({ cookie })
}

for (const [kind, credentials] of Object.entries(CREDENTIALS)) {
  t.test(`with ${kind} and no option set, a second caller never gets the first one's reply`, async (t) => {
    const app = await bare(t)
    const [name = ''] = Object.keys(credentials(''))
    app.addHook('onRequest', async (request) => void (await accountOf(request.headers[name])))
    await app.register(idempotency)
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
    const alice = [credentials('of alice')]
    const nobody = { nobody: {}, 'credentials that have expired': credentials('expired') }
    await keepsOut(t, sender(app, '/'), { alice, bob: credentials('of bob'), nobody }, { scoped: false })
  })

  t.test(
    `with ${kind} and no option set, another caller of a key that is free again has another derived key`,
    async (t) => {
      const app = await bare(t, true)
      const derived: unknown[] = []
      app.post('/', { config: { idempotency: true } }, async (request, reply) => {
        derived.push(request.idempotency?.deriveKey('charge'))
        return reply.code(500).send({})
      })
      const send = sender(app, '/')
      for (const of of ['of alice', 'of alice', 'of bob']) await send({ 'idempotency-key': 'k', ...credentials(of) })
      t.equal(derived[0], derived[1], 'a retry has the same one')
      t.not(derived[1], derived[2])
    }
  )
}

t.test('webhooks: a delivery is handled once, for a sender whose signature is good', async (t) => {
  const app = await bare(t, true)
  await snippet('webhooks', { app })
  const send = sender(app, '/webhooks/github')
  const delivery = { 'x-github-delivery': 'd' }
  const good = { 'x-signature': 'of github' }
  for (const bad of [{}, { 'x-signature': 'expired' }]) t.equal((await send({ ...delivery, ...bad })).statusCode, 401)
  t.same((await send({ ...delivery, ...good })).json(), { run: 1 })
  const again = await send({ ...delivery, ...good, authorization: 'another one each time' })
  t.same([isReplay(again), again.json()], [true, { run: 1 }])
  for (const bad of [{}, { 'x-signature': 'expired' }]) {
    const refused = await send({ ...delivery, ...bad })
    t.same([refused.statusCode, isReplay(refused)], [401, false])
  }
})

t.test(
  'attempt-counter: a redelivery with another payload is a replay, and without a good signature a 401',
  async (t) => {
    const app = await bare(t, true)
    await snippet('attempt-counter', { app })
    const send = (attempt: number, signature = 'of shop') =>
      sender(app, '/webhooks/shop', { id: 'd', attempt })({ 'x-signature': signature })
    t.equal((await send(1, '')).statusCode, 401)
    t.same((await send(1)).json(), { run: 1 })
    const again = await send(2)
    t.same([isReplay(again), again.json()], [true, { run: 1 }])
    t.equal((await send(3, 'expired')).statusCode, 401)
  }
)

t.test('graphql: what failed inside of a 200 runs again, and what did not is replayed', async (t) => {
  const app = await bare(t)
  const state = { broken: true, charges: 0 }
  await snippet('graphql', {
    app,
    schema: 'type Query { charges: Int! } type Mutation { charge: Int }',
    resolvers: {
      Mutation: {
        charge: () => {
          if (state.broken) throw new Error('The provider is down')
          return ++state.charges
        }
      }
    }
  })
  const send = () => sender(app, '/graphql', { query: 'mutation { charge }' })({ 'idempotency-key': 'k' })
  const failed = await send()
  t.match([failed.statusCode, failed.json()], [200, { errors: [{ message: 'The provider is down' }] }])
  state.broken = false
  const [first, again] = [await send(), await send()]
  t.same([isReplay(first), first.json()], [false, { data: { charge: 1 } }])
  t.same([isReplay(again), again.json()], [true, { data: { charge: 1 } }])
})

t.test('a 207 with an error inside, as of tRPC, runs again when it says discard()', async (t) => {
  const app = await bare(t, true)
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    runs++
    if (runs === 1) request.idempotency?.discard()
    return reply.code(207).send([{ run: runs }, runs === 1 ? { error: 'internal' } : { result: 'done' }])
  })
  const send = sender(app, '/')
  for (const [run, replayed] of [
    [1, false],
    [2, false],
    [2, true]
  ]) {
    const reply = await send({ 'idempotency-key': 'k' })
    t.same([reply.json()[0].run, isReplay(reply)], [run, replayed])
  }
})

t.test('changing-field: it is not compared, and all the others are; a body may be missing', async (t) => {
  const app = await bare(t, true)
  await snippet('changing-field', { app })
  const send = (payload: object) => sender(app, '/orders', payload)({ 'idempotency-key': 'k' })
  t.equal(isReplay(await send({ book: 1, sentAt: 1 })), false)
  t.equal(isReplay(await send({ book: 1, sentAt: 2 })), true)
  t.equal(codeOf(await send({ book: 2, sentAt: 1 })), 'FST_IDEMPOTENCY_KEY_REUSED')
  const empty = { method: 'POST', url: '/orders', headers: { 'idempotency-key': 'empty' } } as const
  t.equal((await app.inject(empty)).statusCode, 200)
})

t.test('target: a URL that is signed anew is the same request', async (t) => {
  const app = await bare(t, true)
  await snippet('target', { app })
  const send = (url: string) => sender(app, url)({ 'idempotency-key': 'k' })
  t.equal(isReplay(await send('/files/1?signature=a')), false)
  t.equal(isReplay(await send('/files/1?signature=b')), true)
  t.equal(codeOf(await send('/files/2?signature=a')), 'FST_IDEMPOTENCY_KEY_REUSED')
})

t.test('conditional: after a 412 another If-Match is another request', async (t) => {
  const app = await bare(t, true)
  const handler = async (request: FastifyRequest, reply: { code(status: number): { send(body: object): unknown } }) =>
    request.headers['if-match'] === '"v2"' ? { saved: true } : reply.code(412).send({ error: 'read it anew' })
  await snippet('conditional', { app, handler })
  const send = (key: string, version: string) =>
    app.inject({
      method: 'PATCH',
      url: '/documents/1',
      headers: { 'idempotency-key': key, 'if-match': version },
      payload: { title: 'x' }
    })
  t.equal((await send('a', '"v1"')).statusCode, 412)
  t.equal(codeOf(await send('a', '"v2"')), 'FST_IDEMPOTENCY_KEY_REUSED', 'and not the old 412')
  t.equal((await send('b', '"v2"')).statusCode, 200)
  t.equal(isReplay(await send('b', '"v2"')), true)
})

t.test('gateway: bodies are compared by value, or by their digests', async (t) => {
  const upstream = await bare(t)
  let runs = 0
  upstream.post('/', async (request) => ({ run: ++runs, body: request.body }))
  const server = await upstream.listen({ host: '127.0.0.1', port: 0 })
  const app = await bare(t, true)
  await snippet('gateway', { app, server })
  await snippet('gateway-digest', { app, server })

  const pay = (amount: number) => sender(app, '/payments', { amount })({ 'idempotency-key': 'k' })
  t.same((await pay(1)).json(), { run: 1, body: { amount: 1 } })
  t.equal(isReplay(await pay(1)), true)
  t.equal(codeOf(await pay(2)), 'FST_IDEMPOTENCY_KEY_REUSED')

  const upload = (digest?: string) =>
    sender(app, '/uploads', { large: 'body' })({
      'idempotency-key': 'u',
      ...(digest === undefined ? {} : { 'content-digest': digest })
    })
  t.equal((await upload()).statusCode, 400)
  t.equal((await upload('sha-256=:a:')).json().run, 2)
  t.equal(isReplay(await upload('sha-256=:a:')), true)
  t.equal(codeOf(await upload('sha-256=:b:')), 'FST_IDEMPOTENCY_KEY_REUSED')
  t.equal(runs, 2)
})

t.test('a gateway that passes bodies on unread is told that they are not compared', async (t) => {
  const upstream = await bare(t)
  upstream.post('/', async () => ({}))
  const server = await upstream.listen({ host: '127.0.0.1', port: 0 })
  const app = await bare(t, true)
  const config = { idempotency: true }
  await app.register(proxy, { upstream: server, prefix: '/unread', config })
  await app.register(proxy, { upstream: server, prefix: '/silenced', config: { idempotency: { fingerprint: false } } })
  await snippet('gateway', { app, server })
  const send = (url: string) => sender(app, url, { amount: 1 })({ 'idempotency-key': url })
  const told = await warningsOf('FST_IDEMPOTENCY_PAYLOAD', async () => {
    for (const url of ['/unread', '/unread', '/silenced', '/payments']) t.equal((await send(url)).statusCode, 200)
  })
  t.match(told, [/payloads of \/unread are not compared/])
})

t.test('uploads: a duplicate has its 409 before its body is read', async (t) => {
  const app = await bare(t, true)
  const [entered, leave] = [latch(), latch()]
  await snippet('uploads', {
    app,
    handler: async () => {
      entered.open()
      await leave.promise
      return {}
    }
  })
  app.addContentTypeParser('application/never', (_request, _payload, _done) => {})
  const send = (type: string) =>
    app.inject({
      method: 'POST',
      url: '/uploads',
      headers: { 'idempotency-key': 'k', 'content-type': type },
      payload: '{}'
    })
  const first = send('application/json').then((reply) => reply)
  await entered.promise
  t.equal(codeOf(await send('application/never')), 'FST_IDEMPOTENCY_IN_PROGRESS')
  leave.open()
  t.equal((await first).statusCode, 200)
})

t.test('no recipe was left out', async (t) => {
  t.same([...tried].sort(), [...RECIPES].sort())
})
