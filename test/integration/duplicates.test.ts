import { once } from 'node:events'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { type IdempotencyOptions, type IdempotencyStore, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, elsewhere, inject, listen, post, REPLAYED, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

/** An app whose handler waits until it is told how to end. */
async function held(t: { teardown(fn: () => unknown): void }, options: IdempotencyOptions = {}) {
  const app = await build(t, options)
  const [entered, leave] = [latch(), latch()]
  const state = { runs: 0 }
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    const run = ++state.runs
    if (run === 1) {
      entered.open()
      await leave.promise
    }
    return reply.code(201).send({ run })
  })
  return { app, entered, leave, state }
}

t.test("onConflict 'reject': a duplicate in flight gets 409 with Retry-After, at once", async (t) => {
  const { app, entered, leave, state } = await held(t)
  const first = inject(app, keyed)
  await entered.promise
  const duplicate = await app.inject(keyed)
  t.same([duplicate.statusCode, codeOf(duplicate)], [409, 'FST_IDEMPOTENCY_IN_PROGRESS'])
  t.match(duplicate.headers['retry-after'], /^[1-9]\d*$/)
  leave.open()
  t.equal((await first).statusCode, 201)
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  t.equal(state.runs, 1)
})

t.test("with hook: 'onRequest' a 409 in flight does not wait for the body of the duplicate", async (t) => {
  const { app, entered, leave } = await held(t, { hook: 'onRequest' })
  const port = await listen(app)
  const first = post(port, { key: 'k', body: '{}' })
  await entered.promise
  // The head promises more of a body than ever comes.
  const socket = connect(port, '127.0.0.1')
  t.teardown(() => socket.destroy())
  socket.write('POST / HTTP/1.1\r\nHost: localhost:80\r\nIdempotency-Key: k\r\n')
  socket.write('Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{')
  const [data] = await once(socket, 'data')
  t.match(String(data), /^HTTP\/1.1 409 /)
  leave.open()
  await first
})

t.test("onConflict 'wait': duplicates get the first one's reply, marked as a replay", async (t) => {
  const { app, entered, leave, state } = await held(t, { onConflict: 'wait' })
  const first = inject(app, keyed)
  await entered.promise
  const duplicates = Array.from({ length: 50 }, () => inject(app, keyed))
  await sleep(10)
  leave.open()
  t.equal((await first).headers[REPLAYED], undefined)
  for (const duplicate of await Promise.all(duplicates)) {
    t.same([duplicate.statusCode, duplicate.json(), duplicate.headers[REPLAYED]], [201, { run: 1 }, 'true'])
  }
  t.equal(state.runs, 1)
})

t.test('a duplicate that has waited for waitTimeout gets its 409', async (t) => {
  const { app, entered, leave } = await held(t, { onConflict: 'wait', waitTimeout: 30 })
  const first = inject(app, keyed)
  await entered.promise
  const duplicate = await app.inject(keyed)
  t.same([duplicate.statusCode, codeOf(duplicate)], [409, 'FST_IDEMPOTENCY_IN_PROGRESS'])
  t.match(duplicate.headers['retry-after'], /^[1-9]\d*$/)
  leave.open()
  await first
})

t.test(
  'when the first request fails, exactly one waiter runs next, here or elsewhere, and the others get its reply',
  async (t) => {
    const store = new MemoryStore()
    const stores = [store, elsewhere(store)]
    const apps = await Promise.all(stores.map((store) => build(t, { store, onConflict: 'wait' })))
    const [entered, leave] = [latch(), latch()]
    let [runs, running, most] = [0, 0, 0]
    for (const app of apps) {
      app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
        const run = ++runs
        most = Math.max(most, ++running)
        if (run === 1) {
          entered.open()
          await leave.promise
        } else {
          await sleep(5)
        }
        running--
        return reply.code(run < 3 ? 500 : 201).send({ run })
      })
    }
    const send = (_: unknown, n: number) => inject(apps[n % 2] as FastifyInstance, keyed)
    const first = send(null, 0)
    await entered.promise
    const duplicates = Array.from({ length: 20 }, send)
    await sleep(10)
    leave.open()
    t.equal((await first).statusCode, 500)
    const replies = await Promise.all(duplicates)
    t.same([runs, most], [3, 1])
    t.equal(replies.filter((reply) => reply.statusCode === 500).length, 1)
    t.equal(replies.filter((reply) => reply.headers[REPLAYED] === 'true').length, 18)
  }
)

t.test('waitTimeout is the limit of all the waiting, also where one run after the other fails', async (t) => {
  const app = await build(t, { onConflict: 'wait', waitTimeout: 300 })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    runs++
    await sleep(50)
    return reply.code(500).send()
  })
  const replies = await Promise.all(Array.from({ length: 60 }, () => inject(app, keyed)))
  t.ok(runs > 1 && runs < 15, `${runs} runs`)
  t.equal(replies.filter(({ statusCode }) => statusCode === 409).length, 60 - runs)
})

t.test('a waiter that hangs up stops waiting, and does not run when its turn comes', async (t) => {
  const { app, entered, leave, state } = await held(t, { onConflict: 'wait' })
  const port = await listen(app)
  const first = post(port, { key: 'k' })
  await entered.promise
  const closed: Promise<unknown>[] = []
  app.server.on('request', (_request, response) => closed.push(new Promise((resolve) => response.on('close', resolve))))
  const waiters = Array.from({ length: 5 }, () => start(port, { key: 'k' }))
  await until(() => closed.length === 5)
  await sleep(10)
  for (const waiter of waiters) waiter.hangUp()
  await Promise.all(closed)
  t.equal(await app.idempotency.delete('k'), true)
  await sleep(30)
  t.equal(state.runs, 1)
  leave.open()
  await first
})

t.test('a waiter is compared before it waits, where the payload of the first is known', async (t) => {
  const { app, entered, leave } = await held(t, { onConflict: 'wait', hook: 'preHandler' })
  const first = inject(app, { ...keyed, payload: { a: 1 } })
  await entered.promise
  const other = await app.inject({ ...keyed, payload: { a: 2 } })
  t.same([other.statusCode, codeOf(other)], [422, 'FST_IDEMPOTENCY_KEY_REUSED'])
  leave.open()
  await first
})

t.test('a waiter is compared with the reply that it waited for', async (t) => {
  const { app, entered, leave } = await held(t, { onConflict: 'wait' })
  const first = inject(app, { ...keyed, payload: { a: 1 } })
  await entered.promise
  const other = inject(app, { ...keyed, payload: { a: 2 } })
  const same = inject(app, { ...keyed, payload: { a: 1 } })
  await sleep(10)
  leave.open()
  await first
  t.equal(codeOf(await other), 'FST_IDEMPOTENCY_KEY_REUSED')
  t.equal((await same).headers[REPLAYED], 'true')
})

t.test('waiters on a store that cannot tell of changes poll', async (t) => {
  const memory = new MemoryStore()
  const store: IdempotencyStore = {
    acquire: (...args) => memory.acquire(...args),
    renew: (...args) => memory.renew(...args),
    complete: (...args) => memory.complete(...args),
    release: (...args) => memory.release(...args)
  }
  const { app, entered, leave } = await held(t, { onConflict: 'wait', store })
  const first = inject(app, keyed)
  await entered.promise
  const duplicate = inject(app, keyed)
  await sleep(10)
  leave.open()
  await first
  t.equal((await duplicate).headers[REPLAYED], 'true')
})

t.test('a tombstone ends the waiting with NOT_REPLAYABLE', async (t) => {
  const { app, entered, leave } = await held(t, { onConflict: 'wait', maxReplySize: 1 })
  const first = inject(app, keyed)
  await entered.promise
  const duplicate = inject(app, keyed)
  await sleep(10)
  leave.open()
  t.equal((await first).statusCode, 201)
  t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
})

t.test('a waiter takes over from an owner that died', async (t) => {
  const store = new MemoryStore()
  await store.acquire(storageKey(null, 'k'), {
    token: 'dead',
    fingerprint: '',
    leaseMs: 80,
    retainMs: 60_000,
    takeover: false
  })
  const app = await build(t, { store, onConflict: 'wait' })
  app.post('/', { config: { idempotency: true } }, async (request) => request.idempotency?.attempt)
  const replies = await Promise.all([1, 2, 3].map(() => inject(app, keyed)))
  t.same(
    replies.map((reply) => reply.body),
    ['2', '2', '2']
  )
  t.equal(replies.filter((reply) => reply.headers[REPLAYED] === 'true').length, 2)
})

t.test('an answer that comes too late for a waiter does not free the claim that it got since', async (t) => {
  const store = new MemoryStore()
  const acquire = store.acquire.bind(store)
  const late = latch()
  let calls = 0
  store.acquire = async (...args) => {
    // The waiter's first look hangs, and reaches the store when the waiter has long asked again.
    if (++calls === 3) await late.promise
    return acquire(...args)
  }
  const app = await build(t, { store, onConflict: 'wait', storeTimeout: 30 })
  const steps = [latch(), latch()]
  const entered = [latch(), latch()]
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    const run = runs++
    entered[run]?.open()
    await steps[run]?.promise
    return reply.code(run === 0 ? 500 : 201).send({ run })
  })
  const first = inject(app, keyed)
  await entered[0]?.promise
  const waiter = inject(app, keyed)
  await until(() => calls >= 4)
  steps[0]?.open()
  t.equal((await first).statusCode, 500)
  await entered[1]?.promise
  late.open()
  await sleep(60)
  t.equal((await app.idempotency.get('k'))?.state, 'running')
  steps[1]?.open()
  t.equal((await waiter).statusCode, 201)
  t.equal(runs, 2)
})

t.test('an abandoned claim is compared before it is taken over', async (t) => {
  for (const hook of ['onRequest', 'preHandler'] as const) {
    const store = new MemoryStore()
    const app = await build(t, { store, hook })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => ++runs)
    const seen = await fingerprintOf(app, store, { ...keyed, payload: { a: 1 } })
    await store.acquire(storageKey(null, 'k'), {
      token: 'dead',
      fingerprint: seen,
      leaseMs: 1,
      retainMs: 60_000,
      takeover: false
    })
    await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
    runs = 0
    const other = await app.inject({ ...keyed, payload: { a: 2 } })
    t.same([codeOf(other), runs], ['FST_IDEMPOTENCY_KEY_REUSED', 0])
    t.equal((await app.idempotency.get('k'))?.state, 'abandoned')
    t.equal((await app.inject({ ...keyed, payload: { a: 1 } })).body, '1')
  }
})

/** Runs the request once, to learn the fingerprint that is stored for it. */
async function fingerprintOf(app: FastifyInstance, store: MemoryStore, request: object): Promise<string> {
  await app.inject(request)
  const found = await store.get(storageKey(null, 'k'))
  await store.delete(storageKey(null, 'k'))
  return found?.state === 'completed' ? found.record.fingerprint : ''
}
