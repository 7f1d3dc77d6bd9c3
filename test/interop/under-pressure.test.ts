import underPressure from '@fastify/under-pressure'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { MemoryStore } from '../../index.js'
import { until } from '../support/latch.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

/** A server that can be put under pressure. */
async function server(t: Test, order: Order) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  let healthy = true
  await register(
    order,
    () => app.register(idempotency),
    () => app.register(underPressure, { healthCheck: async () => healthy, healthCheckInterval: 5, retryAfter: 7 })
  )
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  await app.ready()
  const press = async (is: boolean) => {
    healthy = !is
    await until(() => app.isUnderPressure() === is)
  }
  return { app, press, runs: () => runs }
}

for (const order of orders) {
  t.test(`registered ${order} @fastify/under-pressure`, async (t) => {
    t.test('a request that is turned away leaves its key free, and is not stored', async (t) => {
      const { app, press, runs } = await server(t, order)
      await press(true)
      const refused = await post(app, { key: 'key' })
      t.match(refused, { statusCode: 503, headers: { 'retry-after': '7' } })
      t.match(refused.json(), { code: 'FST_UNDER_PRESSURE' })
      t.equal(await app.idempotency.get('key'), null)
      await press(false)
      const later = await post(app, { key: 'key' })
      t.same([later.statusCode, isReplay(later), runs()], [200, false, 1])
    })

    t.test('replays are turned away as well, and come back when the pressure is gone', async (t) => {
      const { app, press, runs } = await server(t, order)
      const first = await post(app, { key: 'key' })
      await press(true)
      t.equal((await post(app, { key: 'key' })).statusCode, 503)
      await press(false)
      const replay = await post(app, { key: 'key' })
      t.ok(isReplay(replay))
      t.same([replay.body, runs()], [first.body, 1])
      t.notOk(replay.headers['retry-after'])
    })
  })
}

t.test('healthy() as healthCheck: without its store a server is under pressure, and with it no more', async (t) => {
  const store = new MemoryStore()
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(idempotency, { store })
  await app.register(underPressure, {
    healthCheck: () => app.idempotency.healthy(),
    healthCheckInterval: 5,
    exposeStatusRoute: '/ready'
  })
  app.get('/', async () => 'without a key')
  const statuses = () => Promise.all(['/ready', '/'].map(async (url) => (await app.inject(url)).statusCode))
  t.same(await statuses(), [200, 200])
  const { get } = store
  store.get = () => Promise.reject(new Error('down'))
  await until(() => app.isUnderPressure())
  t.same(await statuses(), [503, 503], 'routes that need no store as well')
  store.get = get
  await until(() => !app.isUnderPressure())
  t.same(await statuses(), [200, 200])
})

t.test('healthy() as healthCheck of @fastify/under-pressure, registered before: it is never ready', async (t) => {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(underPressure, { healthCheck: () => app.idempotency.healthy(), exposeStatusRoute: '/ready' })
  await app.register(idempotency)
  app.get('/', async () => 'without a key')
  t.equal((await app.inject('/')).statusCode, 503)
})
