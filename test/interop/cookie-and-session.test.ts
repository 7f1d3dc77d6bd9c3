import cookie from '@fastify/cookie'
import session from '@fastify/session'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions, type StoredReply } from '../../index.js'
import { all, isReplay, orders, post, register } from './kit.js'

const SECRET = 'a secret that is longer than thirty-two characters'

async function storedHeaders(app: FastifyInstance, key: string, scope?: string) {
  const selector = scope === undefined ? {} : { scope }
  const { record } = (await app.idempotency.get(key, selector)) as { record: StoredReply }
  return record.headers
}

/** The `name=value` of each cookie that a reply sets. */
function pairs({ headers }: { headers: Record<string, string | string[] | number | undefined> }): string[] {
  return all(headers['set-cookie']).map((cookie) => cookie.split(';')[0] as string)
}

/** Puts the user in the session, or finds it there. */
const users = {
  set: (request: FastifyRequest, user: unknown) => request.session.set('user' as never, user as never),
  get: (request: FastifyRequest) => request.session.get('user' as never) as unknown as string
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/cookie`, async (t) => {
    async function server(t: Test, options: IdempotencyOptions = {}) {
      const app = Fastify()
      t.teardown(() => app.close())
      await register(
        order,
        () => app.register(idempotency, options),
        () => app.register(cookie, { secret: SECRET })
      )
      let runs = 0
      app.addHook('onRequest', async (_request, reply) => void reply.setCookie('visit', String(++visits)))
      let visits = 0
      app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
        reply.setCookie('token', 'of the first caller', { httpOnly: true })
        reply.header('x-kept', 'yes')
        return { run: ++runs }
      })
      app.post('/by-hand', { config: { idempotency: true } }, async (_request, reply) => {
        reply.raw.setHeader('set-cookie', ['raw=1'])
        reply.header('Set-Cookie', ['a=1, 2', 'b=2'])
        return { run: ++runs }
      })
      return { app, runs: () => runs }
    }

    t.test("a replay has no cookie of the first caller's", async (t) => {
      const { app, runs } = await server(t)
      const first = await post(app, { key: 'key' })
      t.match(all(first.headers['set-cookie']).join(), /token=of%20the%20first%20caller/)
      const retry = await post(app, { key: 'key' })
      t.ok(isReplay(retry))
      t.equal(retry.body, first.body)
      t.equal(retry.headers['x-kept'], 'yes')
      t.notMatch(all(retry.headers['set-cookie']).join(), /token/)
      t.notOk((await storedHeaders(app, 'key')).some(([name]) => name === 'set-cookie'))
      t.equal(runs(), 1)
    })

    t.test('a replay has the cookies that its own request is given, each in a header of its own', async (t) => {
      const { app } = await server(t)
      const first = await post(app, { key: 'key' })
      t.equal(all(first.headers['set-cookie']).length, 2)
      for (const visit of ['visit=2', 'visit=3']) {
        const reply = await post(app, { key: 'key' })
        t.ok(isReplay(reply))
        t.same(pairs(reply), [visit])
      }
    })

    t.test('cookies that the handler set by hand are neither joined nor replayed', async (t) => {
      const { app } = await server(t)
      const first = await post(app, { url: '/by-hand', key: 'key' })
      t.ok(pairs(first).includes('a=1, 2'), 'the first caller has them as they were')
      const retry = await post(app, { url: '/by-hand', key: 'key' })
      t.ok(isReplay(retry))
      t.same(pairs(retry), ['visit=2'])
    })

    t.test('a signed cookie can give the scope', async (t) => {
      const scope = (request: FastifyRequest) => {
        const { valid, value } = request.unsignCookie(request.cookies.user ?? '')
        if (!valid || value === null) throw new Error('Not signed by us')
        return value
      }
      const { app, runs } = await server(t, { scope })
      const as = (user: string) => ({ key: 'key', headers: { cookie: `user=${user}` } })
      t.equal((await post(app, as(app.signCookie('alice')))).json().run, 1)
      t.equal((await post(app, as(app.signCookie('bob')))).json().run, 2)
      t.ok(isReplay(await post(app, as(app.signCookie('alice')))))
      const forged = await post(app, as('alice.forged'))
      t.equal(forged.statusCode, 500)
      t.equal(forged.json().code, 'FST_IDEMPOTENCY_SCOPE')
      t.equal(runs(), 2)
    })
  })

  t.test(`registered ${order} @fastify/session`, async (t) => {
    async function server(t: Test, options: IdempotencyOptions = {}) {
      const app = Fastify()
      t.teardown(() => app.close())
      await register(
        order,
        () => app.register(idempotency, options),
        async () => {
          await app.register(cookie)
          await app.register(session, { secret: SECRET, cookie: { secure: false } })
        }
      )
      let runs = 0
      app.post('/login', async (request) => {
        users.set(request, (request.body as { user: string }).user)
        return {}
      })
      app.post('/', { config: { idempotency: true } }, async (request) => {
        users.set(request, users.get(request))
        return { run: ++runs }
      })
      return { app, runs: () => runs }
    }

    t.test('a replay to somebody without a session starts a session of their own', async (t) => {
      const { app, runs } = await server(t)
      const first = pairs(await post(app, { key: 'key' }))
      t.equal(first.length, 1)
      const reply = await post(app, { key: 'key' })
      t.ok(isReplay(reply))
      const second = pairs(reply)
      t.equal(second.length, 1, 'one cookie, not two')
      t.match(second[0], /^sessionId=/)
      t.not(second[0], first[0])
      t.notOk((await storedHeaders(app, 'key')).some(([name]) => name === 'set-cookie'))
      t.equal(runs(), 1)
    })

    t.test('without a scope another session is another caller', async (t) => {
      const { app, runs } = await server(t)
      const login = async (user: string) => {
        const reply = await app.inject({ method: 'POST', url: '/login', payload: { user } })
        return { cookie: pairs(reply)[0] as string }
      }
      const [alice, bob] = [await login('alice'), await login('bob')]
      const first = await post(app, { key: 'key', headers: alice })
      const stranger = await post(app, { key: 'key', headers: bob })
      t.equal(stranger.json().code, 'FST_IDEMPOTENCY_KEY_REUSED')
      const retry = await post(app, { key: 'key', headers: alice })
      t.ok(isReplay(retry))
      t.equal(retry.body, first.body)
      t.equal(runs(), 1)
    })

    t.test('a replay leaves the session of a caller who has one alone, where all callers are one', async (t) => {
      const { app } = await server(t, { scope: false })
      const login = async (user: string) => {
        const reply = await app.inject({ method: 'POST', url: '/login', payload: { user } })
        return pairs(reply)[0] as string
      }
      const [mine, theirs] = [await login('alice'), await login('bob')]
      t.not(mine, theirs)
      await post(app, { key: 'key', headers: { cookie: mine } })
      const reply = await post(app, { key: 'key', headers: { cookie: theirs } })
      t.ok(isReplay(reply))
      for (const cookie of pairs(reply)) t.equal(cookie, theirs)
    })

    t.test('the session can give the scope', async (t) => {
      const { app, runs } = await server(t, { scope: users.get })
      const login = async (user: string) => {
        const reply = await app.inject({ method: 'POST', url: '/login', payload: { user } })
        return { cookie: pairs(reply)[0] as string }
      }
      t.equal((await post(app, { key: 'key', headers: await login('alice') })).json().run, 1)
      t.equal((await post(app, { key: 'key', headers: await login('bob') })).json().run, 2)
      const retry = await post(app, { key: 'key', headers: await login('alice') })
      t.ok(isReplay(retry), 'in another session of the same user')
      t.equal(retry.json().run, 1)
      const stranger = await post(app, { key: 'key' })
      t.equal(stranger.json().code, 'FST_IDEMPOTENCY_SCOPE', 'without a user there is no scope')
      t.equal(runs(), 2)
    })
  })
}
