import { randomUUID } from 'node:crypto'
import jwt from '@fastify/jwt'
import Fastify, { type FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

const subject = (request: FastifyRequest) => (request.user as { sub: string }).sub

/** Where the token is verified. */
const places = ['an onRequest hook of the instance', 'an onRequest hook of the route', 'a preHandler hook'] as const

interface Bank {
  order: Order
  place?: (typeof places)[number]
  options?: IdempotencyOptions
}

async function bank(t: Test, { order, place = places[0], options = {} }: Bank) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency, options),
    () => app.register(jwt, { secret: 'of sufficient length' })
  )
  const verify = async (request: FastifyRequest) => void (await request.jwtVerify())
  let runs = 0
  if (place === places[0]) app.addHook('onRequest', verify)
  const hooks = place === places[1] ? { onRequest: verify } : place === places[2] ? { preHandler: verify } : {}
  app.post('/charges', { config: { idempotency: true }, ...hooks }, async (request) => ({
    run: ++runs,
    subject: subject(request)
  }))
  await app.ready()
  return {
    app,
    /** Another one each time, as after a refresh. */
    token: (sub: string) => `Bearer ${app.jwt.sign({ sub, jti: randomUUID() })}`,
    charge: (key: string, authorization: string, payload = { amount: 1 }) =>
      post(app, { url: '/charges', key, headers: { authorization }, payload }),
    runs: () => runs
  }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/jwt`, async (t) => {
    for (const place of places) {
      const options: IdempotencyOptions = { scope: subject, hook: place === places[2] ? 'preHandler' : 'onRequest' }

      t.test(`a token verified in ${place} gives the scope, and a refreshed one still gets the replay`, async (t) => {
        const { charge, token, runs } = await bank(t, { order, place, options })
        const [old, refreshed] = [token('alice'), token('alice')]
        t.not(old, refreshed)
        const first = await charge('key', old)
        t.equal(first.statusCode, 200)
        t.notOk(isReplay(first))
        const retry = await charge('key', refreshed)
        t.ok(isReplay(retry))
        t.equal(retry.body, first.body)
        t.equal(runs(), 1)
      })

      t.test(`with the scope of ${place} the same key of two subjects is two operations`, async (t) => {
        const { charge, token, runs } = await bank(t, { order, place, options })
        t.match((await charge('key', token('alice'))).json(), { run: 1, subject: 'alice' })
        t.match((await charge('key', token('bob'), { amount: 2 })).json(), { run: 2, subject: 'bob' })
        const retry = await charge('key', token('alice'))
        t.match(retry.json(), { run: 1, subject: 'alice' })
        t.ok(isReplay(retry))
        t.equal(runs(), 2)
      })

      t.test(`a forged, an expired or no token in ${place} gets 401, and never the stored reply`, async (t) => {
        const { app, charge, token, runs } = await bank(t, { order, place, options })
        const first = await charge('key', token('alice'))
        t.equal(first.statusCode, 200)
        const expired = app.jwt.sign({ sub: 'alice', exp: Math.floor(Date.now() / 1000) - 60 })
        for (const authorization of [`Bearer ${expired}`, `${token('alice')}x`, 'Bearer nothing', '']) {
          const reply = await charge('key', authorization)
          t.equal(reply.statusCode, 401)
          t.not(reply.body, first.body)
          t.notOk(isReplay(reply))
        }
        t.ok(isReplay(await charge('key', token('alice'))), 'and the stored reply has not suffered')
        t.equal(runs(), 1)
      })
    }

    t.test('without a scope another Authorization is 422, and the stored reply is untouched', async (t) => {
      for (const place of places) {
        const { charge, token, runs } = await bank(t, { order, place })
        const mine = token('alice')
        const first = await charge('key', mine)
        for (const other of [token('alice'), token('bob')]) {
          const reply = await charge('key', other)
          t.equal(reply.statusCode, 422, place)
          t.equal(reply.json().code, 'FST_IDEMPOTENCY_KEY_REUSED')
        }
        const retry = await charge('key', mine)
        t.ok(isReplay(retry))
        t.equal(retry.body, first.body)
        t.equal(runs(), 1)
      }
    })

    t.test('a scope that is asked for before the token was verified fails closed', async (t) => {
      const { app, charge, token, runs } = await bank(t, {
        order,
        place: places[2],
        options: { scope: subject, hook: 'onRequest' }
      })
      const reply = await charge('key', token('alice'))
      t.equal(reply.statusCode, 500)
      t.equal(reply.json().code, 'FST_IDEMPOTENCY_SCOPE')
      t.equal(runs(), 0)
      t.equal(await app.idempotency.get('key'), null)
    })
  })
}
