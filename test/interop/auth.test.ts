import auth from '@fastify/auth'
import Fastify, { type FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { latch, listening, until } from '../support/latch.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

/** No credentials that the fingerprint knows: here nothing but the authentication stands in the way. */
const alice = { 'x-badge': 'of alice' }
const nobody = {}

/** Where the route, or its instance, authenticates. */
const places = ['onRequest', 'preHandler'] as const
const levels = ['instance', 'route'] as const

interface Bank {
  order: Order
  place: (typeof places)[number]
  level?: (typeof levels)[number]
  options?: IdempotencyOptions
  work?: () => Promise<void>
}

async function bank(t: Test, { order, place, level = 'route', options = {}, work = async () => {} }: Bank) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency, options),
    () => app.register(auth)
  )
  const byBadge = async (request: FastifyRequest) => {
    if (request.headers['x-badge'] !== alice['x-badge']) throw new Error('Who are you?')
  }
  const byCertificate = async () => {
    throw new Error('There is no certificate')
  }
  let runs = 0
  const authenticate = app.auth([byCertificate, byBadge])
  if (level === 'instance') app.addHook(place as 'preHandler', authenticate)
  const hooks = level === 'route' ? { [place]: authenticate } : {}
  app.post('/charges', { config: { idempotency: true }, ...hooks }, async () => {
    runs++
    await work()
    return { run: runs, balance: 'private' }
  })
  const charge = (key: string, headers: Record<string, string>) => post(app, { url: '/charges', key, headers })
  return { app, charge, runs: () => runs }
}

for (const order of orders) {
  for (const place of places) {
    for (const level of levels) {
      t.test(`registered ${order} @fastify/auth, which works in ${place} of the ${level}`, async (t) => {
        t.test('an unauthenticated duplicate never gets the stored reply', async (t) => {
          for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
            const { charge, runs } = await bank(t, { order, place, level, options: { hook } })
            const first = await charge('key', alice)
            t.equal(first.statusCode, 200)
            const stranger = await charge('key', nobody)
            t.equal(stranger.statusCode, 401, hook)
            t.notOk(isReplay(stranger))
            t.notMatch(stranger.body, 'private')
            const retry = await charge('key', alice)
            t.ok(isReplay(retry), 'and nothing is lost by it')
            t.equal(retry.body, first.body)
            t.equal(runs(), 1)
          }
        })

        t.test('a 401 leaves the key free: who logs in afterwards can use the same one', async (t) => {
          const { app, charge, runs } = await bank(t, { order, place, level })
          t.equal((await charge('key', nobody)).statusCode, 401)
          t.equal(await app.idempotency.get('key'), null)
          t.equal(runs(), 0)
          const first = await charge('key', alice)
          t.equal(first.statusCode, 200)
          t.notOk(isReplay(first))
          t.ok(isReplay(await charge('key', alice)))
          t.equal(runs(), 1)
        })

        t.test(
          'an unauthenticated duplicate does not wait for the first request, let alone for its reply',
          async (t) => {
            const started = latch()
            const goOn = latch()
            const { app } = await bank(t, {
              order,
              place,
              level,
              options: { onConflict: 'wait' },
              work: () => {
                started.open()
                return goOn.promise
              }
            })
            const url = `${await listening(app)}/charges`
            const send = (headers: Record<string, string>) =>
              fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key', ...headers } })
            const first = send(alice)
            await started.promise
            const duplicate = send(alice)
            const stranger = await send(nobody)
            t.equal(stranger.status, 401, 'answered although the first request still runs')
            t.notMatch(await stranger.text(), 'private')
            goOn.open()
            t.equal(await (await duplicate).text(), await (await first).text())
            t.equal((await duplicate).headers.get('idempotent-replayed'), 'true')
          }
        )
      })
    }
  }
}

t.test('a request that is refused in onRequest never asks the store', async (t) => {
  let asked = 0
  class CountingStore extends MemoryStore {
    override acquire(...args: Parameters<MemoryStore['acquire']>) {
      asked++
      return super.acquire(...args)
    }
  }
  for (const level of levels) {
    for (const order of orders) {
      asked = 0
      const { charge } = await bank(t, { order, place: 'onRequest', level, options: { store: new CountingStore() } })
      t.equal((await charge('key', nobody)).statusCode, 401)
      t.equal(asked, 0)
      await charge('key', alice)
      t.equal(asked, 1)
    }
  }
})

t.test('a request that is refused in preHandler never holds its key, or until then where that is early', async (t) => {
  for (const hook of ['onRequest', 'preHandler'] as const) {
    const refusing = latch()
    const goOn = latch()
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(idempotency, { hook })
    await app.register(auth)
    const slowly = async () => {
      refusing.open()
      await goOn.promise
      throw new Error('Who are you?')
    }
    app.post('/', { config: { idempotency: true }, preHandler: app.auth([slowly]) }, async () => 'never')
    const reply = post(app, { key: 'key' })
    void reply.then(() => {})
    await refusing.promise
    t.equal((await app.idempotency.get('key'))?.state, hook === 'onRequest' ? 'running' : undefined)
    goOn.open()
    t.equal((await reply).statusCode, 401)
    await until(async () => (await app.idempotency.get('key')) === null)
  }
})
