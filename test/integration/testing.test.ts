import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import { EncryptedStore, type IdempotencyEvent, type IdempotencyOptions, LocalCache } from '../../index.js'
import { type TestRecord, TestStore } from '../../lib/testing.js'
import { build, codeOf, inject, listen, post as postOver, REPLAYED } from '../support/app.js'
import { type Latch, latch } from '../support/latch.js'
import { nodeTest } from '../support/node-test.js'

/* What `TestStore` of fastify-idempotency/testing gives to those who test their routes. */

const ABANDONED = 'FST_IDEMPOTENCY_ABANDONED'
const RUNNING = 'FST_IDEMPOTENCY_IN_PROGRESS'
const DOWN = 'FST_IDEMPOTENCY_STORE_UNAVAILABLE'

type Scene = Awaited<ReturnType<typeof scene>>

/** An app on a TestStore, whose handlers say that they have begun, and wait until they may go on. */
async function scene(t: Test, options: IdempotencyOptions = {}, store = new TestStore()) {
  const app = await build(t, { store, ...options })
  const runs: { request: FastifyRequest; go: Latch<unknown> }[] = []
  let begun = latch()
  app.post('/:what', { config: { idempotency: true } }, async (request) => {
    const go = latch<unknown>()
    runs.push({ request, go })
    begun.open()
    begun = latch()
    if ((request.params as { what: string }).what === 'quick') go.open({ run: runs.length })
    return go.promise
  })
  t.teardown(() => {
    for (const { go } of runs) go.open('late')
  })
  const post = (url: string, key = 'k', headers = {}) =>
    inject(app, { method: 'POST', url, headers: { 'idempotency-key': key, ...headers } })
  /** Resolves with the answer to come, as soon as the handler has begun. */
  const begin = async (key = 'k', headers = {}) => {
    const { promise } = begun
    const reply = post('/slow', key, headers)
    await Promise.race([promise, reply])
    return { reply, run: runs.at(-1) as (typeof runs)[number] }
  }
  return { app, store, runs, post, begin }
}

/** Has it been answered? */
async function isAnswered(reply: Promise<unknown>): Promise<boolean> {
  const nothing = Symbol()
  return (await Promise.race([reply, Promise.resolve(nothing)])) !== nothing
}

function eventsOf(t: Test, name: string): IdempotencyEvent[] {
  const events: IdempotencyEvent[] = []
  const note = (event: unknown) => void events.push(event as IdempotencyEvent)
  subscribe(`fastify-idempotency:${name}`, note)
  t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, note))
  return events
}

t.test('advance', async (t) => {
  t.test('a reply lives for its ttl', async (t) => {
    const { store, post } = await scene(t, { ttl: 60_000 })
    await post('/quick')
    await store.advance(50_000)
    t.equal((await post('/quick')).headers[REPLAYED], 'true')
    await store.advance(10_000)
    t.strictSame((await post('/quick')).json(), { run: 2 })
  })

  t.test('a handler that outlives its lease keeps its key', async (t) => {
    const { store, post, begin } = await scene(t, { lease: 3_000 })
    const { reply, run } = await begin()
    for (let n = 0; n < 3; n++) {
      await store.advance(4_000)
      t.equal(codeOf(await post('/slow')), RUNNING)
    }
    await store.advance(600_000)
    run.go.open('done')
    t.equal((await reply).body, 'done')
    t.equal((await post('/slow')).headers[REPLAYED], 'true')
  })

  t.test('a duplicate waits for waitTimeout', async (t) => {
    const { store, post, begin } = await scene(t, { onConflict: 'wait', waitTimeout: 20_000 })
    await begin()
    const duplicate = post('/slow')
    await store.advance(19_000)
    t.equal(await isAnswered(duplicate), false)
    await store.advance(1_000)
    t.equal(await isAnswered(duplicate), true)
    t.equal(codeOf(await duplicate), RUNNING)
  })

  t.test('a store that does not answer is given up after storeTimeout', async (t) => {
    const { store, post, runs } = await scene(t, { storeTimeout: 5_000 })
    store.hang()
    const reply = post('/quick')
    await store.advance(4_000)
    t.equal(await isAnswered(reply), false)
    await store.advance(1_000)
    t.equal(codeOf(await reply), DOWN)
    t.equal(runs.length, 0)
  })

  t.test('what could not be stored is stored later', async (t) => {
    const { store, begin } = await scene(t)
    const { reply, run } = await begin()
    store.fail(1)
    run.go.open('done')
    t.equal((await reply).statusCode, 200)
    t.strictSame([store.claims().length, store.records().length], [1, 0])
    await store.advance(1_000)
    t.strictSame([store.claims().length, store.records().length], [0, 1])
  })

  t.test('closing waits for one lease of it', async (t) => {
    const { app, store, begin } = await scene(t, { lease: 3_000 })
    await begin()
    const closed = app.close().then(() => true)
    await store.advance(2_000)
    t.equal(await isAnswered(closed), false)
    await store.advance(1_000)
    t.equal(await isAnswered(closed), true)
  })

  t.test('what is running and what is finished grows older, for list and purge too', async (t) => {
    const { app, store, post, begin } = await scene(t, { ttl: '7d' })
    await post('/quick', 'finished')
    const { run, reply } = await begin('running')
    const older = async (olderThan: string) => {
      const states: string[] = []
      for await (const { state } of app.idempotency.list({ olderThan })) states.push(state)
      return states.sort()
    }
    await store.advance(60_000)
    t.same(await older('2m'), [])
    t.same(await older('59s'), ['completed', 'running'])
    t.equal(await app.idempotency.purge({ olderThan: '59s' }), 1, 'what runs is left alone')
    run.go.open('done')
    await reply
  })

  t.test('it is one clock for all stores', async (t) => {
    const { store, post } = await scene(t, { ttl: 1_000 })
    await post('/quick')
    await new TestStore().advance(1_000)
    t.equal(store.records().length, 0)
  })

  t.test('it takes milliseconds', async (t) => {
    const store = new TestStore()
    for (const ms of [-1, Number.NaN, Number.POSITIVE_INFINITY, undefined]) {
      await t.rejects(store.advance(ms as number), {
        name: 'RangeError',
        message: `advance() takes milliseconds, got ${ms}`
      })
    }
    await t.resolves(store.advance(0))
  })
})

t.test('abandon', async (t) => {
  /** The first request is abandoned, the second one runs as attempt 2, and both end. */
  async function reruns(t: Test, { store, runs, post, begin }: Scene, key = 'k', headers = {}, scope?: string) {
    const first = await begin(key, headers)
    await store.abandon(key, scope === undefined ? {} : { scope })
    t.equal(first.run.request.idempotency?.signal.aborted, true, 'who still runs is told')
    const second = await begin(key, headers)
    t.equal(second.run.request.idempotency?.attempt, 2)
    second.run.go.open('second')
    t.equal((await second.reply).body, 'second')
    first.run.go.open('first')
    t.equal((await first.reply).body, 'first', 'its own client has its reply')
    t.equal((await post('/slow', key, headers)).body, 'second', 'which has overwritten nothing')
    t.equal(runs.length, 2)
  }

  t.test('the next request is the next attempt, and nothing of the last one counts', async (t) => {
    await reruns(t, await scene(t))
  })

  t.test('also one that ends before anybody else has come', async (t) => {
    const { store, post, begin } = await scene(t)
    const { reply, run } = await begin()
    await store.abandon('k')
    run.go.open('late')
    t.equal((await reply).body, 'late')
    t.match(store.claims(), [{ state: 'abandoned', attempt: 1 }])
    t.equal(store.records().length, 0)
    t.strictSame((await post('/quick', 'another')).statusCode, 200)
  })

  t.test('again and again', async (t) => {
    const { store, begin } = await scene(t)
    for (const attempt of [1, 2, 3]) {
      const { run } = await begin()
      t.equal(run.request.idempotency?.attempt, attempt)
      await store.abandon('k')
    }
  })

  t.test('in a scope, and with a key in quotes', async (t) => {
    const kit = await scene(t, { scope: (request) => String(request.headers['x-user']) })
    await reruns(t, kit, '"k"', { 'x-user': 'alice' }, 'alice')
  })

  t.test('of an app that has the store behind others', async (t) => {
    const store = new TestStore()
    const behind = new LocalCache(new EncryptedStore(store, { keys: [Buffer.alloc(32, 1)] }))
    await reruns(t, await scene(t, { store: behind }, store))
  })

  t.test('and not a request on another store', async (t) => {
    const [kit, other] = [await scene(t), await scene(t)]
    await kit.begin()
    const { reply, run } = await other.begin()
    await kit.store.abandon('k')
    // Its own loses its data, so that it has to claim its key anew.
    await other.store.delete(other.store.claims()[0]?.storageKey ?? '')
    run.go.open('done')
    t.equal((await reply).body, 'done')
    t.equal((await other.post('/slow')).headers[REPLAYED], 'true')
  })

  t.test('its finished steps stay, and it begins no other', async (t) => {
    const store = new TestStore()
    const app = await build(t, { store })
    const done: string[] = []
    const [charged, dead] = [latch(), latch()]
    app.post('/', { config: { idempotency: true } }, async (request) => {
      const { attempt, step } = request.idempotency as NonNullable<typeof request.idempotency>
      await step('charge', () => void done.push(`charge ${attempt}`))
      if (attempt === 1) {
        charged.open()
        await dead.promise
      }
      await step('mail', () => void done.push(`mail ${attempt}`))
      return 'done'
    })
    const request = { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } } as const
    const first = inject(app, request)
    await charged.promise
    await store.abandon('k')
    t.match(store.claims(), [{ state: 'abandoned', steps: ['charge'] }])
    dead.open()
    t.equal(codeOf(await first), 'FST_IDEMPOTENCY_CLAIM_LOST')
    t.equal((await inject(app, request)).body, 'done')
    t.strictSame(done, ['charge 1', 'mail 2'])
  })

  t.test('with onAbandoned reject, nobody runs any more', async (t) => {
    const { store, post, begin, runs } = await scene(t, { onAbandoned: 'reject' })
    await begin()
    await store.abandon('k')
    for (let n = 0; n < 2; n++) t.equal(codeOf(await post('/slow')), ABANDONED)
    t.equal(runs.length, 1)
  })

  t.test('a duplicate that waits takes over at once', async (t) => {
    const { store, post, begin, runs } = await scene(t, { onConflict: 'wait' })
    await begin()
    const duplicate = post('/slow')
    await store.advance(0)
    await store.abandon('k')
    await store.advance(100)
    t.equal(runs.length, 2)
    runs[1]?.go.open('second')
    t.equal((await duplicate).body, 'second')
  })

  t.test('a reply whose storing is under way or repeated does not count either', async (t) => {
    const { store, begin } = await scene(t)
    const first = await begin()
    const release = store.hold()
    first.run.go.open('first')
    await store.advance(0)
    await store.abandon('k')
    release()
    t.equal((await first.reply).body, 'first')
    const second = await begin()
    t.equal(second.run.request.idempotency?.attempt, 2)
    store.fail()
    second.run.go.open('second')
    t.equal((await second.reply).body, 'second')
    await store.abandon('k')
    store.recover()
    await store.advance(2_000)
    const third = await begin()
    t.equal(third.run.request.idempotency?.attempt, 3)
    t.equal(store.records().length, 0)
  })

  t.test('while the store is down: who comes when it is back is the next attempt', async (t) => {
    const { store, begin } = await scene(t)
    const first = await begin()
    store.fail()
    await store.abandon('k')
    store.recover()
    const second = await begin()
    t.equal(second.run.request.idempotency?.attempt, 2)
    await store.advance(60_000)
    t.equal(first.run.request.idempotency?.signal.aborted, true)
    t.equal(second.run.request.idempotency?.signal.aborted, false)
  })

  t.test('a key that an early hook has only reserved is free', async (t) => {
    const store = new TestStore()
    const app = await build(t, { store, hook: 'onRequest' })
    const [entered, go] = [latch(), latch()]
    const preParsing = async () => {
      entered.open()
      await go.promise
    }
    app.post('/', { config: { idempotency: true }, preParsing }, async (request) => {
      return { attempt: request.idempotency?.attempt }
    })
    const send = () => inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
    const first = send()
    await entered.promise
    await store.abandon('k')
    t.strictSame(store.claims(), [])
    go.open()
    t.strictSame((await first).json(), { attempt: 1 })
    t.equal((await send()).headers[REPLAYED], 'true')
  })

  t.test('closing does not wait for it', async (t) => {
    const { app, store, begin } = await scene(t)
    const { reply, run } = await begin()
    await store.abandon('k')
    const closed = app.close()
    run.go.open('late')
    await Promise.all([closed, reply])
  })

  t.test('the claim is lost, as its events say', async (t) => {
    const lost = eventsOf(t, 'lease-lost')
    const { store, begin } = await scene(t)
    await begin()
    await store.abandon('k')
    t.match(lost, [{ attempt: 1, route: '/:what' }])
  })

  t.test('it says why there is nothing to abandon', async (t) => {
    const { store, post, begin } = await scene(t, { scope: () => 'alice' })
    const nobody = (why: string, scope = 'of the scope "alice"') => ({
      message: `No request with the key "k" ${scope} is running: ${why}`
    })
    const scope = { scope: 'alice' }
    await t.rejects(store.abandon('k', scope), nobody('none is. Wait until its handler has started'))
    const { reply, run } = await begin()
    const other = nobody('others are, on /:what. Is it another key, or another scope?', 'without a scope')
    await t.rejects(store.abandon('k'), other)
    await store.abandon('k', scope)
    await t.rejects(store.abandon('k', scope), nobody('it is abandoned already'))
    run.go.open('late')
    await reply
    await post('/quick', 'k')
    const second = await begin()
    second.run?.go.open('done')
    await second.reply
    await t.rejects(store.abandon('k', scope), nobody('its reply is stored already'))
  })
})

t.test('a store that fails', async (t) => {
  t.test('for so many calls, those apart that give back what was not used', async (t) => {
    const { store, post } = await scene(t)
    for (const calls of [1, 2, 3]) {
      store.fail(calls)
      for (let n = 0; n < calls; n++) t.equal((await post('/quick', `${calls}`)).statusCode, 503)
      t.equal((await post('/quick', `${calls}`)).statusCode, 200)
    }
    await store.advance(2_000)
    t.strictSame(store.claims(), [])
  })

  t.test('until it recovers, and keeps what it has', async (t) => {
    const { store, post, runs } = await scene(t)
    await post('/quick')
    store.fail()
    for (const key of ['k', 'a', 'b', 'c', 'd']) t.equal(codeOf(await post('/quick', key)), DOWN)
    store.recover()
    t.equal((await post('/quick')).headers[REPLAYED], 'true')
    t.equal((await post('/quick', 'a')).statusCode, 200)
    t.equal(runs.length, 2)
  })

  t.test('runs unprotected where that is preferred', async (t) => {
    const { store, post } = await scene(t, { onStoreError: 'bypass' })
    store.fail()
    t.equal((await post('/quick')).statusCode, 200)
    t.strictSame(store.records(), [])
  })

  t.test('is told how often, once or more', async (t) => {
    for (const calls of [0, -1, Number.NaN]) t.throws(() => new TestStore().fail(calls), { name: 'RangeError' })
  })
})

t.test('a store that hangs does not answer until it recovers, and has done nothing', async (t) => {
  const { store, post, begin } = await scene(t)
  const { reply, run } = await begin()
  store.hang()
  run.go.open('done')
  await store.advance(1_000)
  t.equal(await isAnswered(reply), false, 'it is to be stored first')
  await store.advance(1_000)
  t.equal((await reply).body, 'done')
  const other = post('/quick', 'another')
  await store.advance(0)
  store.recover()
  // What could not be stored is stored as soon as somebody has an answer.
  store.fail()
  t.equal(codeOf(await other), DOWN)
  await store.advance(1_000)
  t.strictSame([store.records().length, store.claims().length], [0, 1])
  store.recover()
  await store.advance(1_000)
  t.strictSame([store.records().length, store.claims()], [1, []], 'what could not be stored, and nothing else')
  t.equal((await post('/slow')).headers[REPLAYED], 'true')
})

t.test('a store that is held is late', async (t) => {
  t.test('in time', async (t) => {
    const { store, post } = await scene(t)
    const release = store.hold()
    const reply = post('/quick')
    await store.advance(1_000)
    t.strictSame([await isAnswered(reply), store.claims()], [false, []])
    release()
    t.equal((await reply).statusCode, 200)
    t.equal((await post('/quick', 'another')).statusCode, 200, 'nothing is held any more')
  })

  t.test('too late: the claim that nobody needs is given back', async (t) => {
    const { store, post, runs } = await scene(t)
    const release = store.hold()
    const reply = post('/quick')
    await store.advance(2_000)
    t.equal(codeOf(await reply), DOWN)
    release()
    await store.advance(1_000)
    t.strictSame([store.claims(), runs.length], [[], 0])
    t.equal((await post('/quick')).statusCode, 200)
  })

  t.test('each for itself, and until it recovers at the latest', async (t) => {
    const { store, post } = await scene(t)
    const first = store.hold()
    const a = post('/quick', 'a')
    await store.advance(1)
    store.hold()
    const b = post('/quick', 'b')
    await store.advance(1)
    first()
    await store.advance(1)
    t.strictSame([await isAnswered(a), await isAnswered(b)], [false, false], 'what the first one calls next is held')
    store.recover()
    t.strictSame([(await a).statusCode, (await b).statusCode], [200, 200])
    first()
  })
})

t.test('claims: what is unfinished', async (t) => {
  const { store, post, begin } = await scene(t)
  t.strictSame(store.claims(), [])
  await post('/quick', 'done')
  const from = Date.now()
  await begin('running')
  await begin('dead')
  await store.abandon('dead')
  const claims = store.claims()
  t.strictSame(
    claims.map(({ state, attempt, route, steps }) => [state, attempt, route, steps]),
    [
      ['running', 1, '/:what', []],
      ['abandoned', 1, '/:what', []]
    ]
  )
  t.strictSame(Object.keys(claims[0] ?? {}).sort(), ['attempt', 'route', 'startedAt', 'state', 'steps', 'storageKey'])
  t.ok(Number(claims[0]?.startedAt) >= from)
  t.match(claims[0]?.storageKey, /^[\w-]{43}$/)
  const ended = await begin('dead')
  ended.run.go.fail(new Error('failed'))
  t.equal((await ended.reply).statusCode, 500)
  t.match(store.claims()[1], { state: 'ended', attempt: 2 })
})

t.test('records: what is stored', async (t) => {
  const store = new TestStore()
  const app = await build(t, { store, ttl: 60_000, maxReplySize: 100 })
  const replies: Record<string, unknown> = { json: { a: 'ü' }, bytes: Buffer.from([1, 2]), large: 'x'.repeat(101) }
  app.post('/:what', { config: { idempotency: true } }, async (request, reply) =>
    reply
      .code(201)
      .header('x-two', ['a', 'b'])
      .send(replies[(request.params as { what: string }).what])
  )
  for (const what of Object.keys(replies)) {
    await inject(app, { method: 'POST', url: `/${what}`, headers: { 'idempotency-key': what } })
  }
  await store.advance(10_000)
  const [json, bytes, large] = store.records() as [TestRecord, TestRecord, TestRecord]
  const { storageKey, ttlMs, ...reply } = json
  t.match(storageKey, /^[\w-]{43}$/)
  t.ok(ttlMs !== null && ttlMs <= 50_000 && ttlMs > 40_000)
  t.strictSame(reply, {
    kind: 'reply',
    route: '/:what',
    statusCode: 201,
    headers: { 'x-two': ['a', 'b'], 'content-type': 'application/json; charset=utf-8' },
    body: '{"a":"ü"}'
  })
  t.match(bytes, { kind: 'reply', body: Buffer.from([1, 2]) })
  t.match(large, { kind: 'tombstone', reason: 'too-large', route: '/:what' })
})

t.test('clear', async (t) => {
  t.test('nothing is left of before, and the clock stays', async (t) => {
    const { app, store, post, begin, runs } = await scene(t, { ttl: 60_000 })
    await post('/quick', 'done')
    await begin('dead')
    await store.abandon('dead')
    const { reply, run } = await begin()
    store.fail()
    store.clear()
    await store.advance(0)
    t.strictSame([store.claims(), store.records()], [[], []])
    const second = await begin()
    t.equal(second.run.request.idempotency?.attempt, 1)
    run.go.open('late')
    t.equal((await reply).body, 'late')
    second.run.go.open('second')
    await second.reply
    t.equal((await post('/slow')).body, 'second', 'what was still running has overwritten nothing')
    t.equal((await post('/quick', 'done')).headers[REPLAYED], undefined)
    t.equal(runs.length, 5)
    t.equal(app.idempotency.store, store)
  })
})

t.test('over HTTP it is the same', async (t) => {
  const { app, store, runs } = await scene(t, { lease: 10_000, ttl: 60_000 })
  const port = await listen(app)
  const post = (path: string) => postOver(port, { path, key: 'k' })
  const first = post('/slow')
  while (runs.length === 0) await store.advance(0)
  await store.advance(20_000)
  t.equal((await post('/slow')).status, 409)
  await store.abandon('k')
  const second = post('/slow')
  while (runs.length === 1) await store.advance(0)
  for (const { go } of runs) go.open('done')
  t.strictSame([(await first).text, (await second).text], ['done', 'done'])
  t.equal((await post('/slow')).headers[REPLAYED], 'true')
  await store.advance(60_000)
  t.equal(store.records().length, 0)
})

t.test('nothing has to be swept, for which mock timers would ring every second', async (t) => {
  const started = new Set<unknown>()
  const { setInterval, clearInterval } = globalThis
  t.teardown(() => Object.assign(globalThis, { setInterval, clearInterval }))
  Object.assign(globalThis, {
    setInterval: (...args: Parameters<typeof setInterval>) => {
      const timer = setInterval(...args)
      started.add(timer)
      return timer
    },
    clearInterval: (timer: NodeJS.Timeout) => {
      started.delete(timer)
      clearInterval(timer)
    }
  })
  const { store, post, begin } = await scene(t)
  await post('/quick')
  const { run, reply } = await begin('failing')
  run.go.fail(new Error('failed'))
  await reply
  t.equal(store.records().length, 1)
  t.equal(started.size, 0)
})

t.test('mock timers of node:test move leases, ttl and waiting', async (t) => {
  const url = (file: string) => JSON.stringify(new URL(`../../${file}`, import.meta.url).href)
  const { code, output } = await nodeTest(`
    import assert from 'node:assert/strict'
    import { test } from 'node:test'
    import Fastify from ${JSON.stringify(import.meta.resolve('fastify'))}
    import idempotency from ${url('index.js')}
    import { TestStore } from ${url('lib/testing.js')}

    test('an hour, a day', async (t) => {
      t.mock.timers.enable({ apis: ['setTimeout', 'setInterval', 'Date'] })
      const turn = async () => {
        for (let n = 0; n < 20; n++) await new Promise((resolve) => setImmediate(resolve))
      }
      const store = new TestStore()
      const app = Fastify()
      await app.register(idempotency, { store, ttl: 86_400_000, lease: 3_600_000, onConflict: 'wait' })
      const ends = []
      app.post('/', { config: { idempotency: true } }, () => new Promise((resolve) => ends.push(resolve)))
      const post = async () => app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
      const first = post()
      await turn()
      for (let n = 0; n < 8; n++) {
        t.mock.timers.tick(1_200_000)
        await turn()
      }
      assert.deepEqual(store.claims().map(({ state }) => state), ['running'], 'it was renewed')
      const duplicate = post()
      await turn()
      t.mock.timers.tick(60_000)
      assert.equal((await duplicate).statusCode, 409)
      ends[0]('done')
      assert.equal((await first).body, 'done')
      t.mock.timers.tick(86_399_000)
      assert.equal((await post()).headers['idempotent-replayed'], 'true')
      t.mock.timers.tick(1_000)
      const again = post()
      await turn()
      ends[1]('again')
      assert.equal((await again).body, 'again')
      await app.close()
    })
  `)
  t.equal(code, 0, code === 0 ? 'it ends well' : output)
  t.match(output, /^# pass 1$/m)
})
