/*
 * Failures, and what clients and operators can do wrong.
 *
 * guard                                            test
 * handler runs although the claim failed           a store that fails at the claim lets nothing run
 *                                                  with bypass the handler runs once, and its reply is not lost
 * a 500 after the side effect                      a store that fails after the handler does not take the reply from the client
 * the claim stays when storing fails               a reply that could not be stored is stored later, and nothing runs meanwhile
 * error paths that keep the claim                  however a request fails, its key is free again
 *                                                  a reply that cannot be sent is a failure for every retry as well, never a success
 *                                                  a client that leaves in the middle of its body, or before the handler, leaves its key free
 * cleaning up masks the error                      a store that fails at the release does not hide the error of the handler
 * retries and breakers around the claim            a claim that was written but not acknowledged does not block its key
 * a connection per duplicate that waits            duplicates that wait share one connection to Redis, which ends with the server
 * a reply that expires during the wait             a reply that has expired when the duplicate looks does not break the duplicate
 * look-up before the subscription                  a reply that comes between look-up and subscription is not missed
 * waiting for nobody                               a duplicate whose client has left waits no longer
 * any number of duplicates that wait               there is an end to how many may wait
 * internal headers that clients can send           no header of a client makes its request a replay
 * stored data brought to life                      what is stored is data: nothing in it is run or revived
 *                                                  what cannot be decoded is a failure of the store, not a crash
 * request headers stored                           nothing of the request is stored but hashes
 * options by reference                             options that are changed after the registration change nothing
 * hooks that stay in the plugin's own scope        routes outside of the plugin's own scope are protected
 *
 * Tables and their creation come with the PostgreSQL store.
 */
import { request as httpRequest } from 'node:http'
import { PassThrough, Readable } from 'node:stream'
import { serialize } from 'node:v8'
import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import type { Redis } from 'ioredis'
import t from 'tap'
import idempotency, { type Claim, type IdempotencyOptions, MemoryStore } from '../../index.js'
import { WaitingRoom } from '../../lib/operation/waiting.js'
import { isReplay, post } from '../interop/kit.js'
import { latch, listening, until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { Delegate, kinds, redisStore, serve, tally, times } from './kit.js'

const redis = await startRedis()
t.teardown(() => redis.close())

/** A store that fails, or does not answer, where the test says so. */
class Flaky extends Delegate {
  acquireFails: false | 'at once' | 'after it was written' | 'without an answer' = false
  completeFails = false
  releaseFails = false
  readonly calls = { acquire: 0, complete: 0, release: 0 }

  override async acquire(key: string, claim: Claim) {
    this.calls.acquire++
    if (this.acquireFails === 'at once') throw new Error('connection refused')
    const found = await super.acquire(key, claim)
    if (this.acquireFails === 'after it was written') throw new Error('connection reset')
    if (this.acquireFails === 'without an answer') return new Promise<never>(() => {})
    return found
  }

  override async complete(...args: Parameters<Delegate['complete']>) {
    this.calls.complete++
    if (this.completeFails) throw new Error('connection reset')
    return super.complete(...args)
  }

  override async release(...args: Parameters<Delegate['release']>) {
    this.calls.release++
    if (this.releaseFails) throw new Error('connection reset')
    return super.release(...args)
  }
}

t.test('a store that fails at the claim lets nothing run', async (t) => {
  for (const how of ['at once', 'without an answer'] as const) {
    const store = new Flaky()
    let runs = 0
    const app = await serve(t, { store, storeTimeout: 50 }, async () => ({ run: ++runs }))
    store.acquireFails = how
    const reply = await post(app, { key: 'key' })
    t.equal(reply.statusCode, 503)
    t.equal(reply.json().code, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
    t.equal(runs, 0, how)
  }
})

t.test('with bypass the handler runs once, and its reply is not lost', async (t) => {
  for (const how of ['at once', 'without an answer'] as const) {
    const store = new Flaky()
    const settings = { store, storeTimeout: 50, onStoreError: 'bypass' } as const
    let runs = 0
    const app = await serve(t, settings, async () => ({ run: ++runs }))
    store.acquireFails = how
    store.completeFails = true
    store.releaseFails = true
    const reply = await post(app, { key: 'key' })
    t.equal(reply.statusCode, 200)
    t.same(reply.json(), { run: 1 })
    t.equal(runs, 1)
    t.equal(store.calls.complete, 0)
    store.releaseFails = false
  }
})

t.test('a store that fails after the handler does not take the reply from the client', async (t) => {
  const replies: Record<string, () => unknown> = {
    string: () => 'done',
    stream: () => Readable.from(['do', 'ne'])
  }
  for (const [kind, make] of Object.entries(replies)) {
    const store = new Flaky()
    let _runs = 0
    const app = await serve(t, { store, storeTimeout: 100, lease: 200 }, async (_request, reply) => {
      _runs++
      reply.code(201).type('text/plain')
      return make()
    })
    store.completeFails = true
    const reply = await post(app, { key: 'key' })
    t.equal(reply.statusCode, 201, kind)
    t.equal(reply.body, 'done')
    store.completeFails = false
  }
})

t.test('a reply that could not be stored is stored later, and nothing runs meanwhile', async (t) => {
  const data = new MemoryStore()
  const store = new Flaky(data)
  let runs = 0
  const handler = async () => ({ run: ++runs })
  const app = await serve(t, { store, lease: 300 }, handler)
  const other = await serve(t, { store: new Delegate(data), lease: 300 }, handler)
  store.completeFails = true
  t.same((await post(app, { key: 'key' })).json(), { run: 1 })
  const start = performance.now()
  while (performance.now() - start < 600) {
    t.equal((await post(other, { key: 'key' })).statusCode, 409, 'another process cannot know the reply yet')
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  t.ok(isReplay(await post(app, { key: 'key' })), 'the same process can')
  store.completeFails = false
  await until(async () => (await other.idempotency.get('key'))?.state === 'completed')
  for (const server of [app, other]) {
    const retry = await post(server, { key: 'key' })
    t.ok(isReplay(retry))
    t.same(retry.json(), { run: 1 })
  }
  t.equal(runs, 1)
})

/** Ways in which the first request fails. The second one succeeds. */
const failures: Record<string, (reply: FastifyReply, request: FastifyRequest) => unknown> = {
  'throws at once': () => {
    throw new Error('failed')
  },
  rejects: async () => {
    throw new Error('failed')
  },
  'rejects later': async () => {
    await new Promise(setImmediate)
    throw new Error('failed')
  },
  'throws a string': () => {
    throw 'failed'
  },
  'rejects with nothing': () => Promise.reject(undefined),
  'sends an error': (reply) => reply.send(new Error('failed')),
  'replies 500': (reply) => reply.code(500).send('failed'),
  'replies 429': (reply) => reply.code(429).send('failed'),
  'streams nothing and fails': async () =>
    new Readable({
      read() {
        this.destroy(new Error('failed'))
      }
    }),
  'has a web stream that fails': async () =>
    new ReadableStream({
      start(controller) {
        controller.error(new Error('failed'))
      }
    }),
  'gives itself up': async (_reply, request) => {
    request.idempotency?.discard()
    return 'not to be kept'
  }
}

for (const { name, fresh } of kinds(redis)) {
  t.test(`however a request fails, its key is free again (${name})`, async (t) => {
    for (const [how, fail] of Object.entries(failures)) {
      const open = fresh()
      let runs = 0
      const app = await serve(t, { store: await open() }, (request, reply) => {
        if (++runs === 1) return fail(reply, request)
        return reply.send({ run: runs })
      })
      await post(app, { key: 'key' }).catch(() => {})
      await until(async () => (await app.idempotency.get('key')) === null, { message: `the key of what ${how}` })
      const retry = await post(app, { key: 'key' })
      t.same(retry.json(), { run: 2 }, how)
      t.notOk(isReplay(retry))
      t.ok(isReplay(await post(app, { key: 'key' })))
    }
  })
}

t.test('a reply that cannot be sent is a failure for every retry as well, never a success', async (t) => {
  let runs = 0
  const app = await serve(t, {}, (_request, reply) => {
    runs++
    return reply.header('x-name', 'two\nlines').send('done')
  })
  for (let i = 0; i < 3; i++) {
    const reply = await post(app, { key: 'key' })
    t.ok(reply.statusCode >= 400, `${reply.statusCode} ${reply.body}`)
  }
  t.ok(runs > 0)
})

t.test('a store that fails at the release does not hide the error of the handler', async (t) => {
  const store = new Flaky()
  const app = await serve(t, { store, storeTimeout: 50 }, async () => {
    throw Object.assign(new Error('the database is on fire'), { statusCode: 507 })
  })
  store.releaseFails = true
  const reply = await post(app, { key: 'key' })
  t.equal(reply.statusCode, 507)
  t.equal(reply.json().message, 'the database is on fire')
  store.releaseFails = false
  await until(async () => (await app.idempotency.get('key')) === null, {
    message: 'the key to be given back after all'
  })
})

for (const { name, fresh } of kinds(redis)) {
  t.test(`a claim that was written but not acknowledged does not block its key (${name})`, async (t) => {
    for (const how of ['after it was written', 'without an answer'] as const) {
      const open = fresh()
      const store = new Flaky(await open())
      let runs = 0
      const app = await serve(t, { store, storeTimeout: 50, lease: 60_000 }, async () => ({ run: ++runs }))
      store.acquireFails = how
      t.equal((await post(app, { key: 'key' })).statusCode, 503)
      t.equal(runs, 0)
      store.acquireFails = false
      await until(async () => (await app.idempotency.get('key')) === null, {
        timeout: 2_000,
        message: `the key to be given back after an acquire that failed ${how}`
      })
      t.same((await post(app, { key: 'key' })).json(), { run: 1 })
      t.ok(isReplay(await post(app, { key: 'key' })))
    }
  })
}

async function listeners(client: Redis): Promise<number> {
  const list = (await client.client('LIST', 'TYPE', 'PUBSUB')) as string
  return list.trim().split('\n').filter(Boolean).length
}

t.test('duplicates that wait share one connection to Redis, which ends with the server', async (t) => {
  const observer = await redis.client()
  t.equal(await listeners(observer), 0)
  const goOn = latch()
  const settings = { store: redisStore(await redis.client()), onConflict: 'wait' } as const
  const runs: Record<string, number> = {}
  const app = await serve(t, settings, async (request) => {
    const key = String(request.idempotency?.key)
    runs[key] = (runs[key] ?? 0) + 1
    await goOn.promise
    return { key }
  })
  const keys = ['a', 'b', 'c']
  const firsts = keys.map((key) => post(app, { key }).then((reply) => reply))
  await until(() => Object.keys(runs).length === 3)
  const waiting = times(60, (i) => post(app, { key: keys[i % 3] as string }).then((reply) => reply))
  await until(async () => (await observer.pubsub('CHANNELS', '*')).length === 3, { message: 'three subscriptions' })
  t.equal(await listeners(observer), 1)
  goOn.open()
  t.same(tally(await Promise.all([...firsts, ...waiting])), { 200: 63 })
  t.same(runs, { a: 1, b: 1, c: 1 })
  await until(async () => (await observer.pubsub('CHANNELS', '*')).length === 0, { message: 'no subscriptions' })
  await app.close()
  await until(async () => (await listeners(observer)) === 0, { message: 'the connection to end' })
})

for (const { name, fresh } of kinds(redis)) {
  t.test(`a reply that has expired when the duplicate looks does not break the duplicate (${name})`, async (t) => {
    const open = fresh()
    const data = await open()
    const goOn = latch()
    const gone = latch()
    let runs = 0
    let looks = 0
    // The duplicate sees the running claim first, and looks again only when the reply has expired.
    class Late extends Delegate {
      override async acquire(key: string, claim: Claim) {
        if (++looks > 1) await gone.promise
        return super.acquire(key, claim)
      }
    }
    const handler = async () => {
      const run = ++runs
      if (run === 1) await goOn.promise
      return { run }
    }
    const first = post(await serve(t, { store: data, ttl: 1 }, handler), { key: 'key' }).then((reply) => reply)
    await until(() => runs === 1)
    const app = await serve(t, { store: new Late(await open()), onConflict: 'wait' }, handler)
    const duplicate = post(app, { key: 'key' }).then((reply) => reply)
    await until(() => looks === 2)
    goOn.open()
    await first
    await until(async () => (await app.idempotency.get('key')) === null)
    gone.open()
    t.same((await duplicate).json(), { run: 2 }, 'it claims the key, and runs')
    t.ok(isReplay(await post(app, { key: 'key' })))
    t.equal(runs, 2)
  })

  t.test(`a reply that comes between look-up and subscription is not missed (${name})`, async (t) => {
    const open = fresh()
    const goOn = latch()
    const stored = latch()
    let runs = 0
    const handler = async () => {
      runs++
      await goOn.promise
      return { run: runs }
    }
    class Between extends Delegate {
      override async changed(key: string, signal: AbortSignal) {
        goOn.open()
        await stored.promise
        return super.changed(key, signal)
      }
    }
    const one = await serve(t, { store: await open() }, handler)
    const two = await serve(t, { store: new Between(await open()), onConflict: 'wait' }, handler)
    const first = post(one, { key: 'key' }).then((reply) => reply)
    await until(() => runs === 1)
    const duplicate = post(two, { key: 'key' }).then((reply) => reply)
    await first
    const start = performance.now()
    stored.open()
    t.ok(isReplay(await duplicate))
    t.ok(performance.now() - start < 800, 'it need not wait until it looks of itself')
    t.equal(runs, 1)
  })

  t.test(`a duplicate whose client has left waits no longer (${name})`, async (t) => {
    const open = fresh()
    const goOn = latch()
    let runs = 0
    let signal: AbortSignal | undefined
    class Watched extends Delegate {
      override changed(key: string, aborted: AbortSignal) {
        signal = aborted
        return super.changed(key, aborted)
      }
    }
    const app = await serve(t, { store: new Watched(await open()), onConflict: 'wait' }, async () => {
      runs++
      await goOn.promise
      throw new Error('failed')
    })
    const url = await listening(app)
    const init = { method: 'POST', headers: { 'idempotency-key': 'key', connection: 'close' } }
    const first = fetch(url, init)
    await until(() => runs === 1)
    const duplicate = httpRequest(url, init).end()
    duplicate.on('error', () => {})
    await until(() => signal)
    t.notOk(signal?.aborted)
    duplicate.destroy()
    await until(() => signal?.aborted, { message: 'the waiting to end' })
    goOn.open()
    t.equal((await first).status, 500)
    await (await first).text()
    await until(async () => (await app.idempotency.get('key')) === null)
    t.equal(runs, 1, 'nothing runs for somebody who has left')
  })
}

t.test('there is an end to how many may wait', async (t) => {
  const endless = new Delegate()
  endless.changed = (_key, signal) => new Promise((resolve) => signal.addEventListener('abort', () => resolve()))
  const room = new WaitingRoom(endless)
  const waiter = () => ({
    storageKey: 'key',
    waitTimeout: 60_000,
    takesOver: false,
    poll: async () => ({ state: 'running', fingerprint: '', leaseMs: 60_000 }) as const,
    drop() {}
  })
  const waiters = times(10_000, waiter)
  const results = waiters.map((one) => room.wait(one))
  t.equal(await room.wait(waiter()), 'timeout', 'one more is answered as if it had waited long enough')
  for (const one of waiters) room.leave(one)
  t.same(new Set(await Promise.all(results)), new Set(['left']))
})

t.test('no header of a client makes its request a replay', async (t) => {
  let runs = 0
  const app = await serve(t, {}, async () => ({ run: ++runs }))
  const headers = Object.fromEntries(
    [
      'Idempotent-Replayed',
      'X-Hit',
      'X-Idempotent-Replayed',
      'Idempotency-Replay',
      'X-Cache',
      'Idempotency-Status'
    ].map((name) => [name, 'true'])
  )
  const url = await listening(app)
  const send = (key?: string) =>
    fetch(url, { method: 'POST', headers: { ...headers, ...(key && { 'idempotency-key': key }) } })
  for (const key of [undefined, 'key']) {
    const response = await send(key)
    t.equal(response.headers.get('idempotent-replayed'), null)
    t.same(await response.json(), { run: runs })
  }
  t.equal(runs, 2)
  t.equal((await send('key')).headers.get('idempotent-replayed'), 'true')
  t.equal(runs, 2)
})

t.test('what is stored is data: nothing in it is run or revived', async (t) => {
  const evil = [
    '{"type":"Buffer","data":[104,105]}',
    '{"__proto__":{"polluted":true},"constructor":{"prototype":{"polluted":true}}}',
    '{"$type":"System.Diagnostics.Process","rce":"_$$ND_FUNC$$_function(){globalThis.pwned=1}()"}',
    "cos\nsystem\n(S'touch /tmp/pwned'\ntR."
  ]
  for (const { fresh } of kinds(redis)) {
    const open = fresh()
    const app = await serve(t, { store: await open() }, async (request, reply) =>
      reply.type('application/json').send(evil[(request.body as { n: number }).n])
    )
    for (const [n, text] of evil.entries()) {
      await post(app, { key: `${n}`, payload: { n } })
      const retry = await post(app, { key: `${n}`, payload: { n } })
      t.ok(isReplay(retry))
      t.equal(retry.body, text)
    }
  }
  t.notOk('polluted' in {})
  t.notOk('pwned' in globalThis)
})

t.test('what cannot be decoded is a failure of the store, not a crash', async (t) => {
  const client = await redis.client()
  const keyPrefix = 'garbage:'
  let runs = 0
  const settings = { store: redisStore(client, keyPrefix), onConflict: 'wait', waitTimeout: 1_000 } as const
  const app = await serve(t, settings, async () => ({ run: ++runs }))
  await post(app, { key: 'key' })
  const [key = ''] = await client.keys(`${keyPrefix}*`)
  const valid = await client.getBuffer(key)
  if (valid === null) throw new Error('There should be a record')
  const damaged = Buffer.from(valid)
  damaged.writeUInt32BE(0xffffffff, 3 + (valid[2] as number))
  const garbage = [
    Buffer.alloc(0),
    Buffer.from('hello'),
    Buffer.from('C'),
    Buffer.from('P'),
    Buffer.from('P1\x04xxxx'),
    Buffer.from(JSON.stringify({ state: 'completed', record: { kind: 'reply' } })),
    serialize({ kind: 'reply', statusCode: 200, headers: [], body: Buffer.from('revived') }),
    valid.subarray(0, 20),
    valid.subarray(0, 60),
    damaged,
    Buffer.concat([Buffer.from('C9'), valid.subarray(2)])
  ]
  for (const value of garbage) {
    await client.set(key, value, 'PX', 60_000)
    const reply = await post(app, { key: 'key' })
    t.equal(reply.statusCode, 503, JSON.stringify(value.toString('latin1').slice(0, 12)))
    t.equal(reply.json().code, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  }
  await client.del(key)
  await client.rpush(key, 'a list')
  t.equal((await post(app, { key: 'key' })).statusCode, 503)
  t.equal(runs, 1)
  await client.set(key, valid, 'PX', 60_000)
  t.ok(isReplay(await post(app, { key: 'key' })), 'and nothing was overwritten')
})

t.test('nothing of the request is stored but hashes', async (t) => {
  const secrets = {
    authorization: 'Bearer sesame-token',
    cookie: 'session=sesame-cookie',
    'x-api-key': 'sesame-api-key',
    'user-agent': 'sesame-agent',
    'x-user': 'sesame-user'
  }
  for (const scoped of [false, true]) {
    const client = await redis.client()
    const keyPrefix = `secrets-${scoped}:`
    const options: IdempotencyOptions = { store: redisStore(client, keyPrefix) }
    if (scoped) options.scope = (request) => String(request.headers['x-user'])
    const goOn = latch()
    let runs = 0
    const app = await serve(t, options, async (request) => {
      runs++
      if ((request.body as { wait?: true }).wait) await goOn.promise
      return 'the reply'
    })
    const running = post(app, {
      key: 'sesame-one',
      url: '/?q=sesame-query',
      headers: secrets,
      payload: { card: 'sesame-card', wait: true }
    }).then((reply) => reply)
    await until(() => runs === 1)
    await post(app, {
      key: 'sesame-two',
      url: '/?q=sesame-query',
      headers: secrets,
      payload: { card: 'sesame-card' }
    })
    const keys = await client.keys(`${keyPrefix}*`)
    t.equal(keys.length, 2, 'a running and a finished operation')
    const values = await Promise.all(keys.map((key) => client.getBuffer(key)))
    const everything = `${keys.join()}${values.map((value) => value?.toString('latin1')).join()}`
    t.match(everything, 'the reply')
    t.notMatch(everything, /sesame/)
    goOn.open()
    await running
  }
})

t.test('options that are changed after the registration change nothing', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const excludeHeaders = ['x-excluded']
  const methods = ['POST']
  const keyFormat = /^k/g
  const options: IdempotencyOptions = { global: true, methods, excludeHeaders, keyFormat, replayHeader: 'x-replayed' }
  await app.register(idempotency, options)
  const own = { required: true, excludeHeaders: ['x-own'] }
  const config = { idempotency: own }
  let runs = 0
  const handler = async (_request: FastifyRequest, reply: FastifyReply) => {
    reply.header('x-excluded', '1').header('x-own', '1').header('x-other', '1')
    return { run: ++runs }
  }
  app.post('/', handler)
  app.post('/own', { config }, handler)

  Object.assign(options, { replayHeader: false, header: 'x-other-key', maxKeyLength: 1, global: false, ttl: 1 })
  excludeHeaders.push('x-other')
  methods.length = 0
  keyFormat.lastIndex = 1
  Object.assign(own, { required: false, ttl: 1 })
  own.excludeHeaders.push('x-other')
  config.idempotency = { required: false, excludeHeaders: [] }
  app.post('/late', handler)

  for (const [url, excluded, kept] of [
    ['/', 'x-excluded', 'x-other'],
    ['/own', 'x-own', 'x-other'],
    ['/late', 'x-excluded', 'x-other']
  ] as const) {
    for (let i = 0; i < 3; i++) {
      const reply = await post(app, { url, key: `k${url}` })
      t.equal(reply.statusCode, 200, url)
      if (i === 0) continue
      t.equal(reply.headers['x-replayed'], 'true')
      t.equal(reply.headers[excluded], undefined)
      t.equal(reply.headers[kept], '1')
    }
  }
  t.equal(runs, 3)
  t.equal((await app.inject({ method: 'POST', url: '/own', payload: {} })).statusCode, 400, 'still required')
})

t.test("routes outside of the plugin's own scope are protected", async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  let runs = 0
  const config = { idempotency: true }
  const handler = async (request: FastifyRequest) => ({ run: ++runs, key: request.idempotency?.key })
  app.post('/sibling', { config }, handler)
  app.register(async (child) => {
    child.post('/child', { config }, handler)
    child.register(async (grandchild) => void grandchild.post('/grandchild', { config }, handler))
  })
  for (const url of ['/sibling', '/child', '/grandchild']) {
    const first = await post(app, { url, key: url })
    t.match(first.json(), { key: url })
    const retry = await post(app, { url, key: url })
    t.ok(isReplay(retry), url)
    t.equal(retry.body, first.body)
  }
  t.equal(runs, 3)
})

t.test('a client that leaves in the middle of its body, or before the handler, leaves its key free', async (t) => {
  const checking = latch()
  const goOn = latch()
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, { hook: 'onRequest' })
  let runs = 0
  const preHandler = async (request: FastifyRequest) => {
    if ((request.body as { wait?: true } | null)?.wait === undefined) return
    checking.open()
    await goOn.promise
  }
  app.post('/', { config: { idempotency: true }, preHandler }, async () => ({ run: ++runs }))
  const url = await listening(app)

  const headers = { 'idempotency-key': 'body', 'content-type': 'application/json', 'content-length': '100' }
  const sent = httpRequest(url, { method: 'POST', headers })
  sent.on('error', () => {})
  sent.write('{"amount":')
  await until(async () => (await app.idempotency.get('body'))?.state === 'running')
  sent.destroy()
  await until(async () => (await app.idempotency.get('body')) === null, { message: 'the key to be given back' })

  const body = new PassThrough()
  body.end(JSON.stringify({ wait: true }))
  const leaving = httpRequest(url, {
    method: 'POST',
    headers: { 'idempotency-key': 'handler', 'content-type': 'application/json' }
  })
  leaving.on('error', () => {})
  body.pipe(leaving)
  await checking.promise
  leaving.destroy()
  await new Promise((resolve) => leaving.once('close', resolve))
  await until(async () => (await app.idempotency.get('handler')) === null, { message: 'the key to be given back' })
  goOn.open()
  t.equal((await post(app, { key: 'handler', payload: { amount: 1 } })).statusCode, 200)
  t.equal(runs, 1)
})
