import { once } from 'node:events'
import http2 from 'node:http2'
import https from 'node:https'
import type { AddressInfo } from 'node:net'
import type { TLSSocket } from 'node:tls'
import cookie from '@fastify/cookie'
import session from '@fastify/session'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import t from 'tap'
import idempotency, { MemoryStore } from '../../index.js'
import { build, codeOf, inject, listen, post, REPLAYED } from '../support/app.js'
import { certificates } from '../support/certificates.js'
import { latch } from '../support/latch.js'

/* Who asks: with no option set, nobody gets what is another's. */

const REUSED = 'FST_IDEMPOTENCY_KEY_REUSED'
const covered = { config: { idempotency: true } }
const HOOKS = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const

/** Each kind of credentials, of one caller and of another. */
const KINDS: Record<string, [Record<string, string>, Record<string, string>]> = {
  authorization: [{ authorization: 'Bearer alice' }, { authorization: 'Bearer bob' }],
  'proxy-authorization': [{ 'proxy-authorization': 'Basic YQ==' }, { 'proxy-authorization': 'Basic Yg==' }],
  'x-api-key': [{ 'x-api-key': 'alice' }, { 'X-API-KEY': 'bob' }],
  'api-key': [{ 'api-key': 'alice' }, { 'api-key': 'bob' }],
  'x-auth-token': [{ 'x-auth-token': 'alice' }, { 'x-auth-token': 'bob' }],
  'x-access-token': [{ 'x-access-token': 'alice' }, { 'x-access-token': 'bob' }],
  cookie: [{ cookie: 'session=alice' }, { cookie: 'session=bob' }],
  'a cookie beside an empty token': [
    { authorization: '', cookie: 'session=alice' },
    { authorization: '', cookie: 'session=bob' }
  ],
  'the token of a user beside the key of an app': [
    { 'x-api-key': 'app', 'x-access-token': 'alice' },
    { 'x-api-key': 'app', 'x-access-token': 'bob' }
  ]
}

for (const [kind, [alice, bob]] of Object.entries(KINDS)) {
  t.test(`two callers, told by ${kind}: the second does not get the reply of the first`, async (t) => {
    for (const hook of HOOKS) {
      const app = await build(t, { hook })
      const derived: (string | undefined)[] = []
      app.post('/', covered, async (request) => {
        derived.push(request.idempotency?.deriveKey('charge'))
        return { mine: derived.length }
      })
      const port = await listen(app)
      const send = (headers: Record<string, string>) => post(port, { key: 'k', body: '{"a":1}', headers })
      t.equal((await send(alice)).status, 200)
      t.equal(codeOf(await send(bob)), REUSED)
      t.equal(codeOf(await send({})), REUSED, 'nor does nobody')
      t.equal((await send(alice)).headers[REPLAYED], 'true')
      t.equal(derived.length, 1)
      // Once the key is free again, it is anybody's: what is derived from it must not be.
      await app.idempotency.delete('k')
      t.equal((await send(bob)).status, 200)
      await app.idempotency.delete('k')
      t.equal((await send({})).status, 200)
      await app.idempotency.delete('k')
      t.equal((await send(alice)).status, 200)
      t.equal(derived[0], derived[3], 'the same for the same caller')
      t.equal(new Set(derived).size, 3, 'and no other')
    }
  })
}

t.test('a caller cannot find out by a key what another is doing', async (t) => {
  const app = await build(t)
  const [entered, leave] = [latch(), latch()]
  app.post('/', covered, async () => {
    entered.open()
    await leave.promise
    return 'done'
  })
  const send = (user: string) =>
    inject(app, { method: 'POST', url: '/', headers: { authorization: user, 'idempotency-key': 'k' } })
  const first = send('alice')
  await entered.promise
  t.equal(codeOf(await send('alice')), 'FST_IDEMPOTENCY_IN_PROGRESS')
  t.equal(codeOf(await send('bob')), REUSED)
  leave.open()
  await first
})

t.test('two users of a site with sessions: the second does not get the reply of the first', async (t) => {
  const app = await build(t)
  await app.register(cookie)
  await app.register(session, { secret: 'a secret with at least 32 characters in it', cookie: { secure: false } })
  app.post('/login', async (request) => {
    Object.assign(request.session, { user: (request.body as { user: string }).user })
    return 'in'
  })
  app.post('/', covered, async (request) => ({ for: (request.session as { user?: string }).user }))
  const port = await listen(app)
  const login = async (user: string) => {
    const reply = await post(port, { path: '/login', body: JSON.stringify({ user }) })
    return { cookie: String(reply.headers['set-cookie']?.[0]).split(';')[0] as string }
  }
  const [alice, bob] = [await login('alice'), await login('bob')]
  const send = (headers: Record<string, string>) => post(port, { key: 'k', body: '{}', headers })
  t.same(JSON.parse((await send(alice)).text), { for: 'alice' })
  t.equal(codeOf(await send(bob)), REUSED)
  t.same(JSON.parse((await send(alice)).text), { for: 'alice' })
})

t.test('what a caller sends besides its credentials may change', async (t) => {
  const app = await build(t)
  app.post('/', covered, async () => 'done')
  const port = await listen(app)
  const send = (headers: Record<string, string>) => post(port, { key: 'k', body: '{}', headers })
  const bearer = { authorization: 'Bearer alice' }
  await send({ ...bearer, cookie: 'a=1', 'user-agent': 'one', 'x-request-id': '1' })
  const again = await send({ ...bearer, cookie: 'a=2', 'user-agent': 'two', 'x-request-id': '2' })
  t.equal(again.headers[REPLAYED], 'true', 'a cookie is not looked at where there is a token')
})

t.test('with a scope, or scope: false, credentials may change, and derived keys stay', async (t) => {
  for (const scope of [() => 'alice', false as const]) {
    const app = await build(t, { scope, store: new MemoryStore() })
    const derived: unknown[] = []
    app.post('/', covered, async (request) => {
      derived.push(request.idempotency?.deriveKey('charge'))
      return 'done'
    })
    const port = await listen(app)
    const send = (headers: Record<string, string>) => post(port, { key: 'k', body: '{}', headers })
    for (const [alice, bob] of Object.values(KINDS)) {
      await send(alice)
      t.equal((await send(bob)).headers[REPLAYED], 'true')
    }
    t.equal(derived.length, 1)
    await app.idempotency.delete('k', scope === false ? {} : { scope: 'alice' })
    await send({ cookie: 'another' })
    t.equal(derived[1], derived[0])
  }
})

t.test('what a schema removes of the headers is still part of who asks', async (t) => {
  const schema = {
    headers: { type: 'object', properties: { accept: { type: 'string' } }, additionalProperties: false }
  }
  for (const hook of HOOKS) {
    const app = await build(t, { hook }, { ajv: { customOptions: { removeAdditional: 'all' } } })
    const derived = new Set<unknown>()
    app.post('/', { schema, ...covered }, async (request) => derived.add(request.idempotency?.deriveKey('charge')).size)
    const port = await listen(app)
    const send = (user: string) => post(port, { key: 'k', body: '{}', headers: { authorization: user } })
    await send('alice')
    t.equal(codeOf(await send('bob')), REUSED)
    await app.idempotency.delete('k')
    await send('bob')
    t.equal(derived.size, 2)
  }
})

/** An app that asks for client certificates. */
async function withCertificates(t: { teardown(fn: () => unknown): void }, server: object) {
  const tls = { ...certificates.server, requestCert: true, rejectUnauthorized: false, allowHTTP1: true }
  const app = await build(t, {}, { https: tls, ...server } as never)
  const derived: (string | undefined)[] = []
  app.post('/', covered, async (request) => {
    derived.push(request.idempotency?.deriveKey('charge'))
    return {
      reused: ((request.raw.socket ?? {}) as TLSSocket).isSessionReused?.() ?? null
    }
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  return { app, derived, port: ((app as FastifyInstance).server.address() as AddressInfo).port }
}

const HEADERS = { host: 'a', 'idempotency-key': 'k' }

t.test('two callers, told by their certificates: the second does not get the reply of the first', async (t) => {
  for (const maxVersion of ['TLSv1.2', 'TLSv1.3'] as const) {
    const { app, derived, port } = await withCertificates(t, {})
    const send = async (caller?: keyof typeof certificates, session?: Buffer, headers: Record<string, string> = {}) => {
      const request = https.request({
        ...(caller && certificates[caller]),
        ...(session && { session }),
        ...{ port, host: '127.0.0.1', method: 'POST', rejectUnauthorized: false, maxVersion, agent: false },
        headers: { ...HEADERS, ...headers }
      })
      let ticket: Buffer | undefined
      request.on('socket', (socket) =>
        socket.on('session', (session: Buffer) => {
          ticket = session
        })
      )
      const [reply] = await once(request.end(), 'response')
      const chunks: Buffer[] = []
      for await (const chunk of reply) chunks.push(chunk)
      return { reply, ticket, json: JSON.parse(Buffer.concat(chunks).toString()) }
    }
    const first = await send('alice')
    t.equal(first.reply.statusCode, 200)
    t.equal((await send('bob')).reply.statusCode, 422)
    t.equal((await send()).reply.statusCode, 422)
    t.equal((await send('alice')).reply.headers[REPLAYED], 'true')
    t.equal((await send('alice', undefined, { cookie: 'a=1' })).reply.headers[REPLAYED], 'true')
    t.equal((await send('alice', undefined, { 'x-api-key': '1' })).reply.statusCode, 422)
    // A session that is resumed does without a handshake, and still has its certificate.
    t.equal((await send('alice', first.ticket)).reply.headers[REPLAYED], 'true')
    await app.idempotency.delete('k')
    t.same((await send('alice', first.ticket)).json, { reused: true }, 'it was resumed')
    await app.idempotency.delete('k')
    await send('bob')
    t.equal(derived[0], derived[1])
    t.not(derived[0], derived[2])
  }
})

t.test('a certificate tells callers of HTTP/2 as well', async (t) => {
  const { port } = await withCertificates(t, { http2: true })
  const send = async (caller: keyof typeof certificates) => {
    const session = http2.connect(`https://127.0.0.1:${port}`, { ...certificates[caller], rejectUnauthorized: false })
    t.teardown(() => session.destroy())
    const stream = session.request({ ...HEADERS, ':method': 'POST', ':path': '/', ':authority': 'a' })
    stream.resume()
    const [reply] = await once(stream.end(), 'response')
    return [reply[':status'], reply[REPLAYED]]
  }
  t.same(await send('alice'), [200, undefined])
  t.same(await send('bob'), [422, undefined])
  t.same(await send('alice'), [200, 'true'])
})

t.test('credentials that a hook takes off a request, or replaces, are still those of its caller', async (t) => {
  const hooks: Record<string, (headers: Record<string, unknown>) => void> = {
    'taken off': (headers) => {
      delete headers.authorization
    },
    replaced: (headers) => {
      headers.authorization = 'Bearer of the gateway'
    }
  }
  for (const [how, change] of Object.entries(hooks)) {
    for (const isFirst of [true, false]) {
      const app = Fastify()
      t.teardown(() => app.close())
      const hook = async (request: FastifyRequest) => change(request.headers)
      if (isFirst) app.addHook('onRequest', hook)
      await app.register(idempotency)
      if (!isFirst) app.addHook('onRequest', hook)
      const derived: unknown[] = []
      app.post('/', { config: { idempotency: true } }, async (request) => {
        derived.push(request.idempotency?.deriveKey('charge'))
        return { run: derived.length }
      })
      const send = (user: string, key = 'k') =>
        app.inject({ method: 'POST', url: '/', headers: { authorization: `Bearer ${user}`, 'idempotency-key': key } })
      const first = await send('alice')
      t.equal((await send('bob')).statusCode, 422, how)
      t.equal((await send('alice')).body, first.body)
      await app.idempotency.delete('k')
      await send('bob')
      t.equal(new Set(derived).size, 2)
    }
  }
})
