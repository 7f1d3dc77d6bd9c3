import fastifyRedis from '@fastify/redis'
import Fastify, { type FastifyInstance } from 'fastify'
import type { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import idempotency, { type RedisClient, RedisStore } from '../../index.js'
import { latch, listening, until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { isReplay, orders, post, register } from './kit.js'

const server = await startRedis()
t.teardown(() => server.close())

function storeOn(client: RedisClient, keyPrefix: string): RedisStore {
  return new RedisStore(client, { keyPrefix })
}

/** A keyed request on a connection of its own, which does not hold up the closing of the server. */
function send(url: string): Promise<Response> {
  return fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key', connection: 'close' } })
}

/** The keys that are in Redis. */
async function stored(t: Test, prefix: string): Promise<string[]> {
  const client = await server.client()
  t.teardown(() => client.disconnect())
  return client.keys(`${prefix}*`)
}

/** A server with a handler that waits, one request in it, and `app.close()` under way. */
async function closingWhileRunning(
  t: Test,
  set: (app: FastifyInstance, handler: () => Promise<object>) => Promise<void>
) {
  const started = latch()
  const goOn = latch()
  const app = Fastify()
  t.teardown(() => app.close())
  await set(app, async () => {
    started.open()
    await goOn.promise
    return { done: true }
  })
  const url = await listening(app)
  const reply = send(url)
  await started.promise
  let closed = false
  const close = app.close().then(() => {
    closed = true
  })
  return { url, reply, goOn, close, isClosed: () => closed }
}

t.test('a store on app.redis replays, with the clients of several servers', async (t) => {
  let runs = 0
  const apps: FastifyInstance[] = []
  for (let i = 0; i < 2; i++) {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(fastifyRedis, { path: server.path })
    await app.register(idempotency, { store: storeOn(app.redis, 'several:') })
    app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
    apps.push(app)
  }
  const [one, other] = apps as [FastifyInstance, FastifyInstance]
  t.notOk(isReplay(await post(one, { key: 'key' })))
  const retry = await post(other, { key: 'key' })
  t.ok(isReplay(retry))
  t.same(retry.json(), { run: 1 })
  t.equal((await stored(t, 'several:')).length, 1)
})

t.test('a namespace of @fastify/redis serves as well', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(fastifyRedis, { path: server.path, namespace: 'keys' })
  await app.register(idempotency, {
    store: storeOn(app.redis.keys as unknown as Redis, 'namespace:')
  })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  await post(app, { key: 'key' })
  t.ok(isReplay(await post(app, { key: 'key' })))
  t.equal((await stored(t, 'namespace:')).length, 1)
})

t.test('closing the server', async (t) => {
  t.test('a request that still runs is stored before @fastify/redis closes its client', async (t) => {
    for (const order of orders) {
      let client: Redis | undefined
      const keyPrefix = `closing-${order}:`
      const { url, reply, goOn, close, isClosed } = await closingWhileRunning(t, async (app, handler) => {
        await register(
          order,
          () => app.register(idempotency),
          () => app.register(fastifyRedis, { path: server.path })
        )
        client = app.redis as Redis
        const store = storeOn(client, keyPrefix)
        app.post('/', { config: { idempotency: { store } } }, handler)
      })
      t.equal((await stored(t, keyPrefix)).length, 1, 'the claim')
      t.equal(client?.status, 'ready')
      t.notOk(isClosed())
      goOn.open()
      t.same(await (await reply).json(), { done: true })
      await close
      await until(() => client?.status === 'end', { message: '@fastify/redis to close its client' })

      let runs = 0
      const next = Fastify()
      t.teardown(() => next.close())
      const store = storeOn(await server.client(), keyPrefix)
      await next.register(idempotency, { store })
      next.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
      // To the same service, whichever of its servers answers.
      const headers = { 'idempotency-key': 'key', host: new URL(url).host }
      const retry = await next.inject({ method: 'POST', url: '/', headers })
      t.ok(isReplay(retry), `registered ${order} @fastify/redis`)
      t.same(retry.json(), { done: true })
      t.equal(runs, 0)
    }
  })

  t.test('the same holds where the server does not wait for its connections', async (t) => {
    const keyPrefix = 'forced:'
    const started = latch()
    const goOn = latch()
    const app = Fastify({ forceCloseConnections: true })
    await app.register(fastifyRedis, { path: server.path })
    await app.register(idempotency, { store: storeOn(app.redis, keyPrefix) })
    app.post('/', { config: { idempotency: true } }, async () => {
      started.open()
      await goOn.promise
      return { done: true }
    })
    const url = await listening(app)
    const reply = send(url)
    reply.catch(() => {})
    await started.promise
    const close = app.close()
    await t.rejects(reply, 'the client is cut off')
    t.equal((app.redis as Redis).status, 'ready')
    goOn.open()
    await close
    const client = await server.client()
    const [key = ''] = await client.keys(`${keyPrefix}*`)
    t.match(await client.get(key), /^C1/, 'a record, not a claim')
    t.match(await client.get(key), /\{"done":true\}$/)
  })

  t.test('a client that was given to the store is never closed by us, nor are its subscriptions', async (t) => {
    const client = await server.client()
    await client.subscribe('somebody else')
    const working = await server.client()
    const app = Fastify()
    const store = storeOn(working, 'injected:')
    await app.register(idempotency, { store, onConflict: 'wait' })
    const started = latch()
    const goOn = latch()
    app.post('/', { config: { idempotency: true } }, async () => {
      started.open()
      await goOn.promise
      return 'done'
    })
    const url = await listening(app)
    const first = send(url)
    await started.promise
    const duplicate = send(url)
    const subscribers = async () => {
      const list = (await working.client('LIST', 'TYPE', 'PUBSUB')) as string
      return list.trim().split('\n').filter(Boolean).length
    }
    await until(async () => (await subscribers()) === 2, { message: 'our own connection to listen on' })
    goOn.open()
    t.equal(await (await first).text(), 'done')
    t.equal((await duplicate).headers.get('idempotent-replayed'), 'true')
    await app.close()
    t.equal(working.status, 'ready')
    t.equal(await working.ping(), 'PONG')
    await until(async () => (await subscribers()) === 1, { message: 'our own connection to close' })
    t.equal(client.status, 'ready')
  })
})
