import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { type IdempotencyOptions, RedisStore } from '../../index.js'
import { build } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { type RedisServer, startRedis } from '../support/redis.js'
import { soon } from '../support/store-fixtures.js'

// Redis stops, hangs, or loses its data, at every point of a request's life.

/** Longer than any test: what happens before it has passed does not happen because of its end. */
const LONG = 60_000

interface Scene {
  server: RedisServer
  app: FastifyInstance
  client: Redis
  /** Runs of the handler. */
  runs: number
  /** The handler waits for this one, where there is one. */
  gate: Promise<void> | undefined
  send(key?: string, url?: string): ReturnType<typeof send>
}

async function send(app: FastifyInstance, key: string, url: string) {
  const reply = await app.inject({ method: 'POST', url, headers: { 'idempotency-key': key } })
  return {
    status: reply.statusCode,
    body: reply.json() as { run?: number; attempt?: number; code?: string },
    replayed: reply.headers['idempotent-replayed'] === 'true',
    retryAfter: reply.headers['retry-after']
  }
}

async function open(
  t: Test,
  options: IdempotencyOptions = {},
  { persist = false, ...clientOptions }: { persist?: boolean; maxRetriesPerRequest?: number } = {}
): Promise<Scene> {
  const server = await startRedis({ persist })
  t.teardown(() => server.close())
  const client = await server.client(clientOptions)
  const app = await build(t, { store: new RedisStore(client), storeTimeout: 500, lease: LONG, ...options })
  const scene: Scene = {
    server,
    app,
    client,
    runs: 0,
    gate: undefined,
    send: (key = 'key', url = '/') => send(app, key, url)
  }
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    const run = ++scene.runs
    await scene.gate
    return reply.code(201).send({ run, attempt: request.idempotency?.attempt })
  })
  await app.ready()
  // On a machine that is busy the limit of a store call may be too short for the first of them.
  await until(async () => (await scene.send('before')).status === 201, { message: 'all to be well before' })
  scene.runs = 0
  return scene
}

/** Redis is there again, and so is the client's connection. */
async function back({ client }: Scene): Promise<void> {
  await until(async () => (await client.ping().catch(() => '')) === 'PONG', { message: 'Redis to be back' })
}

const outages = [
  ['stopped', (server: RedisServer) => server.stop(), (server: RedisServer) => server.start()],
  ['frozen', (server: RedisServer) => server.pause(), async (server: RedisServer) => server.resume()]
] as const

for (const [name, leave, comeBack] of outages) {
  t.test(`a request that finds Redis ${name} is refused with 503, and runs when Redis is back`, async (t) => {
    const scene = await open(t)
    await leave(scene.server)
    const refused = await soon(scene.send())
    t.equal(refused.status, 503)
    t.equal(refused.body.code, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
    t.match(refused.retryAfter, /^[1-9]\d*$/)
    t.equal(scene.runs, 0)
    await comeBack(scene.server)
    await back(scene)
    const { status, body } = await runs(scene)
    t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1 } })
  })

  t.test(`with onStoreError 'bypass' a request that finds Redis ${name} runs unprotected`, async (t) => {
    const scene = await open(t, { onStoreError: 'bypass' })
    await leave(scene.server)
    for (const run of [1, 2]) {
      const { status, body, replayed } = await soon(scene.send())
      t.strictSame({ status, body, replayed }, { status: 201, body: { run, attempt: 0 }, replayed: false })
    }
    await comeBack(scene.server)
    await back(scene)
    const { status, body } = await runs(scene)
    t.strictSame({ status, body }, { status: 201, body: { run: 3, attempt: 1 } })
    t.equal((await scene.send()).replayed, true)
  })

  t.test(`100 parallel requests that find Redis ${name} are all refused, and leave nothing behind`, async (t) => {
    const scene = await open(t)
    await leave(scene.server)
    const refused = await soon(Promise.all(Array.from({ length: 100 }, (_, n) => scene.send(`key ${n % 50}`))))
    t.strictSame(
      refused.map(({ status }) => status),
      refused.map(() => 503)
    )
    await comeBack(scene.server)
    await back(scene)
    for (let n = 0; n < 50; n++) t.match(await runs(scene, `key ${n}`), { body: { attempt: 1 } })
    t.equal(scene.runs, 50)
  })

  t.test(
    `a handler at work while Redis is ${name} has its reply sent and replayed, and does not run again`,
    async (t) => {
      const scene = await open(t, {}, { persist: true })
      const first = await atWork(scene)
      await leave(scene.server)
      first.go()
      const { status, body, replayed } = await soon(first.reply)
      t.strictSame({ status, body, replayed }, { status: 201, body: { run: 1, attempt: 1 }, replayed: false })
      await replayedMeanwhile(t, scene)
      await comeBack(scene.server)
      await replayedAtLast(t, scene)
      await storedAtLast(t, scene)
    }
  )

  t.test(`a retry at another server while Redis is ${name} does not run the handler either`, async (t) => {
    const scene = await open(t, {}, { persist: true })
    const second = await another(t, scene)
    const first = await atWork(scene)
    await leave(scene.server)
    first.go()
    t.equal((await soon(first.reply)).status, 201)
    t.equal((await soon(second.send())).status, 503)
    await comeBack(scene.server)
    const replay = await until(async () => {
      const { status, body, replayed } = await second.send()
      t.ok(replayed || [409, 503].includes(status), `${status} ${body.code}`)
      return replayed && body
    })
    t.strictSame(replay, { run: 1, attempt: 1 })
    t.equal(scene.runs + second.runs, 1)
  })

  t.test(
    `a server that closes while Redis is ${name} and a reply is not stored gives up after one lease`,
    async (t) => {
      const lease = 1_500
      const scene = await open(t, { lease })
      const first = await atWork(scene)
      await leave(scene.server)
      first.go()
      t.equal((await soon(first.reply)).status, 201)
      t.equal(await closes(scene.app, 2 * lease - 100), true, 'closed before a second lease has passed')
    }
  )

  t.test(`a server that closes while Redis is ${name} for a moment stores the reply before it ends`, async (t) => {
    const scene = await open(t, {}, { persist: true })
    const first = await atWork(scene)
    await leave(scene.server)
    first.go()
    t.equal((await soon(first.reply)).status, 201)
    const closing = scene.app.close()
    await sleep(100)
    await comeBack(scene.server)
    await soon(closing, 'the server to close')
    const next = await another(t, scene)
    const { replayed, body } = await next.send()
    t.strictSame({ replayed, body }, { replayed: true, body: { run: 1, attempt: 1 } })
  })
}

t.test('a server that closes with a reply to store and a claim to give back gives up after one lease', async (t) => {
  const lease = 1_500
  const scene = await open(t, { lease }, { maxRetriesPerRequest: 0 })
  const first = await atWork(scene)
  await scene.server.stop()
  first.go()
  t.equal((await soon(first.reply)).status, 201)
  t.equal((await soon(scene.send('another'))).status, 503)
  t.equal(await closes(scene.app, 2 * lease - 100), true, 'closed before a second lease has passed')
})

t.test(
  'a handler at work while Redis is killed and loses its data has its reply sent and replayed, and does not run again',
  async (t) => {
    const scene = await open(t)
    const first = await atWork(scene)
    await scene.server.kill()
    first.go()
    const { status, body } = await soon(first.reply)
    t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1 } })
    await replayedMeanwhile(t, scene)
    const replayed = replayedAtLast(t, scene)
    await scene.server.start()
    await replayed
    await storedAtLast(t, scene)
  }
)

t.test('a claim that Redis has lost while its handler is at work is claimed anew, and its reply stored', async (t) => {
  const scene = await open(t)
  const first = await atWork(scene)
  await scene.client.flushall()
  first.go()
  t.match(await first.reply, { status: 201, body: { run: 1, attempt: 1 } })
  await replayedAtLast(t, scene)
})

t.test('a claim that Redis has lost is claimed anew by its renewal, before its handler is through', async (t) => {
  const scene = await open(t, { lease: 600 })
  const first = await atWork(scene)
  await scene.client.flushall()
  await until(async () => (await scene.client.dbsize()) === 1, { message: 'the claim to be back' })
  const second = await another(t, scene, { lease: 600 })
  const refused = await second.send()
  t.strictSame([refused.status, refused.body.code], [409, 'FST_IDEMPOTENCY_IN_PROGRESS'])
  first.go()
  t.match(await first.reply, { status: 201, body: { run: 1, attempt: 1 } })
  t.equal((await second.send()).replayed, true)
})

t.test(
  'a claim whose answer got lost is given back: the retry runs with attempt 1, long before the lease ends',
  async (t) => {
    const scene = await open(t)
    await scene.server.pause()
    t.equal((await soon(scene.send())).status, 503)
    scene.server.resume()
    const { status, body } = await runs(scene)
    t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1 } })
  }
)

t.test('a claim whose answer got lost with its connection is given back all the same', async (t) => {
  const scene = await open(t, {}, { maxRetriesPerRequest: 0 })
  await scene.server.pause()
  const asked = scene.send()
  await until(() => (scene.client as unknown as { stream: { writableLength: number } }).stream.writableLength === 0)
  // What was sent is in the server's hands, which will read it, whoever has hung up meanwhile.
  scene.client.disconnect(true)
  t.equal((await soon(asked)).status, 503)
  scene.server.resume()
  await back(scene)
  const { status, body } = await runs(scene)
  t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1 } })
})

t.test('a bypassed claim whose answer got lost is given back as well', async (t) => {
  const scene = await open(t, { onStoreError: 'bypass' })
  await scene.server.pause()
  t.equal((await soon(scene.send())).status, 201)
  scene.server.resume()
  await until(async () => {
    const { status, replayed, body } = await scene.send()
    if (status === 409) return false
    t.strictSame({ status, replayed, attempt: body.attempt }, { status: 201, replayed: false, attempt: 1 })
    return true
  })
})

t.test('a key that could not be given back while Redis was stopped is given back afterwards', async (t) => {
  const scene = await open(t, {}, { persist: true })
  const started = latch()
  const go = latch()
  let fails = true
  scene.app.close()
  const app = await build(t, { store: new RedisStore(await scene.server.client()), storeTimeout: 500, lease: LONG })
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    started.open()
    await go.promise
    return reply.code(fails ? 500 : 201).send({ attempt: request.idempotency?.attempt })
  })
  const first = send(app, 'key', '/')
  await started.promise
  await scene.server.stop()
  go.open()
  t.equal((await soon(first)).status, 500)
  fails = false
  await scene.server.start()
  const { body } = (await until(async () => {
    const answer = await send(app, 'key', '/')
    t.ok([201, 409, 503].includes(answer.status))
    return answer.status === 201 && answer
  })) as Awaited<typeof first>
  t.strictSame(body, { attempt: 1 })
})

t.test('those who wait when their listening connection is cut get the reply all the same', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  const admin = await server.client()
  // Connections that are there stay; whoever connects after the change of the password is refused.
  await admin.acl('SETUSER', 'app', 'on', '>old', '~*', '&*', '+@all')
  const client = await server.client({ username: 'app', password: 'old' })
  const app = await build(t, { store: new RedisStore(client), onConflict: 'wait', lease: LONG })
  const go = latch()
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (_, reply) => {
    runs++
    await go.promise
    return reply.code(201).send({ run: runs })
  })
  const replies = Promise.all(Array.from({ length: 10 }, () => send(app, 'key', '/')))
  const subscribers = async () => String(await admin.call('CLIENT', 'LIST', 'TYPE', 'pubsub')).trim()
  await until(async () => (await subscribers()) !== '', { message: 'somebody to listen' })
  await admin.acl('SETUSER', 'app', 'resetpass', '>new')
  t.equal(await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub'), 1)
  go.open()
  for (const { status, body } of await soon(replies)) t.strictSame({ status, body }, { status: 201, body: { run: 1 } })
  t.equal(await subscribers(), '', 'nobody has listened since')
  t.equal(runs, 1)
})

t.test('those who wait listen again when their listening connection was cut', async (t) => {
  const scene = await open(t, { onConflict: 'wait' })
  const admin = await scene.server.client()
  const first = await atWork(scene)
  const waiting = Array.from({ length: 10 }, () => scene.send())
  const listening = async () => String(await admin.call('CLIENT', 'LIST', 'TYPE', 'pubsub')).includes(' sub=1 ')
  await until(listening)
  await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
  await until(listening, { message: 'the connection to be back' })
  first.go()
  t.equal((await first.reply).status, 201)
  for (const { replayed, body } of await soon(Promise.all(waiting))) {
    t.strictSame({ replayed, body }, { replayed: true, body: { run: 1, attempt: 1 } })
  }
})

for (const [name, leave, comeBack] of outages) {
  t.test(`those who wait while Redis is ${name} get the reply or a 503, and never run the handler`, async (t) => {
    const scene = await open(t, { onConflict: 'wait' }, { persist: true })
    const second = await another(t, scene, { onConflict: 'wait' })
    const first = await atWork(scene)
    const waiting = [scene, second].flatMap(({ send }) => Array.from({ length: 10 }, () => send()))
    await until(async () => ((await scene.client.call('PUBSUB', 'CHANNELS')) as unknown[]).length > 0)
    await leave(scene.server)
    first.go()
    t.equal((await soon(first.reply)).status, 201)
    await sleep(50)
    await comeBack(scene.server)
    for (const { status, replayed, body } of await soon(Promise.all(waiting))) {
      if (status === 503) t.equal(body.code, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
      else t.strictSame({ status, replayed, body }, { status: 201, replayed: true, body: { run: 1, attempt: 1 } })
    }
    await replayedAtLast(t, scene)
    t.equal(scene.runs + second.runs, 1)
  })
}

t.test('an app goes on while Redis comes and goes', async (t) => {
  const scene = await open(t, {}, { persist: true })
  for (let round = 0; round < 3; round++) {
    await scene.server.kill()
    t.equal((await soon(scene.send(`down ${round}`))).status, 503)
    await scene.server.start()
    await back(scene)
    t.match(await runs(scene, `down ${round}`), { status: 201, body: { attempt: 1 } })
    t.equal((await scene.send(`down ${round}`)).replayed, true)
  }
  t.equal(scene.runs, 3)
})

/** Has the app closed within this time? */
async function closes(app: FastifyInstance, ms: number): Promise<boolean> {
  return await Promise.race([app.close().then(() => true), sleep(ms, false)])
}

/** Sends until the key is free, refused meanwhile by 409 or 503. */
function runs(scene: Scene, key?: string) {
  return until(async () => {
    const answer = await scene.send(key)
    if (![201, 409, 503].includes(answer.status) || answer.replayed) throw new Error(JSON.stringify(answer))
    return answer.status === 201 && answer
  }) as ReturnType<typeof send>
}

/** A request whose handler is at work, until `go()`. */
async function atWork(scene: Scene): Promise<{ go(): void; reply: ReturnType<typeof send> }> {
  const { promise, open } = latch()
  scene.gate = promise
  const reply = scene.send()
  await until(() => scene.runs === 1, { message: 'the handler to start' })
  return { go: open, reply }
}

/** Another server with the same routes, on the same Redis. */
async function another(
  t: Test,
  { server }: Scene,
  options: IdempotencyOptions = {}
): Promise<Pick<Scene, 'send' | 'runs'>> {
  const client = await server.client()
  const app = await build(t, { store: new RedisStore(client), storeTimeout: 500, lease: LONG, ...options })
  const scene = { runs: 0, send: (key = 'key', url = '/') => send(app, key, url) }
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++scene.runs }))
  await app.ready()
  return scene
}

/** The server that ran the handler knows its reply, whether or not Redis does. */
async function replayedMeanwhile(t: Test, scene: Scene): Promise<void> {
  for (let n = 0; n < 3; n++) {
    const { status, body, replayed } = await soon(scene.send())
    t.strictSame({ status, body, replayed }, { status: 201, body: { run: 1, attempt: 1 }, replayed: true })
  }
  t.equal(scene.runs, 1)
}

/** Every retry is a replay, or refused for a while. */
async function replayedAtLast(t: Test, scene: Scene): Promise<void> {
  const replay = await until(
    async () => {
      const { status, body, replayed } = await scene.send()
      if (!replayed && ![409, 503].includes(status)) throw new Error(`${status} ${JSON.stringify(body)}`)
      return replayed && body
    },
    { message: 'the replay' }
  )
  t.strictSame(replay, { run: 1, attempt: 1 })
  t.equal(scene.runs, 1)
}

/** The record is in Redis, for every server. */
async function storedAtLast(t: Test, scene: Scene): Promise<void> {
  await until(async () => (await scene.app.idempotency.get('key').catch(() => null))?.state === 'completed', {
    message: 'the record to be in Redis'
  })
  const { replayed, body } = await (await another(t, scene)).send()
  t.strictSame({ replayed, body }, { replayed: true, body: { run: 1, attempt: 1 } })
}
