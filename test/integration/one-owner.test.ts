import t from 'tap'
import { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, elsewhere, inject, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* A key has one owner at a time, and knows how often it has been tried, whatever becomes of stores and processes. */

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' }, payload: { a: 1 } }
const config = (options: IdempotencyOptions = {}) => ({ config: { idempotency: options } })
const KEY = storageKey(null, 'k')

t.test('an owner that lives in this process keeps its key, whatever the store says', async (t) => {
  for (const onConflict of ['reject', 'wait'] as const) {
    const store = new MemoryStore()
    const app = await build(t, { store, onConflict, lease: 300 })
    const [entered, leave] = [latch<AbortSignal>(), latch()]
    const attempts: unknown[] = []
    app.post('/', config(), async (request) => {
      attempts.push(request.idempotency?.attempt)
      entered.open(request.idempotency?.signal as AbortSignal)
      await leave.promise
      return 'done'
    })
    const first = inject(app, keyed)
    const signal = await entered.promise
    await store.delete(KEY)
    const other = await app.inject({ ...keyed, payload: { a: 2 } })
    t.equal(codeOf(other), 'FST_IDEMPOTENCY_KEY_REUSED', 'another payload is compared with that of the owner')
    await store.delete(KEY)
    const duplicate = inject(app, keyed)
    if (onConflict === 'reject') t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_IN_PROGRESS')
    await until(async () => (await store.get(KEY))?.state === 'running')
    leave.open()
    t.equal((await first).body, 'done')
    if (onConflict === 'wait') t.equal((await duplicate).headers[REPLAYED], 'true')
    t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
    t.same([attempts, signal.aborted], [[1], false])
  }
})

t.test(
  'what other processes see of a claim that was lost and left to its owner is what the owner brought',
  async (t) => {
    const store = new MemoryStore()
    const [here, there] = [await build(t, { store }), await build(t, { store: elsewhere(store) })]
    const [entered, leave] = [latch(), latch()]
    for (const app of [here, there]) {
      app.post('/', config(), async () => {
        entered.open()
        await leave.promise
        return 'done'
      })
    }
    const first = inject(here, keyed)
    await entered.promise
    await store.delete(KEY)
    t.equal(codeOf(await here.inject({ ...keyed, payload: { a: 2 } })), 'FST_IDEMPOTENCY_KEY_REUSED')
    t.equal(codeOf(await there.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
    leave.open()
    await first
    t.equal((await there.inject(keyed)).headers[REPLAYED], 'true')
  }
)

t.test('attempt goes on counting after an interrupted attempt, until there is a final reply', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store, onAbandoned: 'reject' })
  const attempts: unknown[] = []
  const statuses = [200, 503, 500, 201]
  app.post('/', config(), async (request, reply) => {
    attempts.push(request.idempotency?.attempt)
    return reply.code(statuses.shift() as number).send('x')
  })
  const rerunning = await build(t, { store })
  rerunning.post('/', config(), async (request, reply) => {
    attempts.push(request.idempotency?.attempt)
    return reply.code(statuses.shift() as number).send('x')
  })
  await app.inject(keyed)
  const found = await store.get(KEY)
  const fingerprint = found?.state === 'completed' ? found.record.fingerprint : ''
  await store.delete(KEY)
  await store.acquire(KEY, { token: 'dead', fingerprint, leaseMs: 1, retainMs: 60_000, takeover: false })
  await until(async () => (await store.get(KEY))?.state === 'abandoned')
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_ABANDONED')
  t.equal((await rerunning.inject(keyed)).statusCode, 503)
  t.equal((await app.inject(keyed)).statusCode, 500, "what its owner has given back is not abandoned: 'reject' runs it")
  t.equal((await app.inject(keyed)).statusCode, 201)
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  t.same(attempts, [1, 2, 3, 4])
  await app.idempotency.delete('k')
  statuses.push(201)
  await app.inject(keyed)
  t.equal(attempts.at(-1), 1)
})

t.test('a paused owner whose successor has come and gone does not take its claim back', async (t) => {
  const store = new MemoryStore()
  const paused = await build(t, { store, lease: 60 })
  const successor = await build(t, { store: elsewhere(store) })
  const [entered, leave, answer] = [latch<AbortSignal>(), latch(), latch()]
  let asked = false
  const renew = store.renew.bind(store)
  store.renew = async (...args) => {
    // The process stands still before its renewal comes to the store.
    asked = true
    await answer.promise
    return renew(...args)
  }
  paused.post('/', config(), async (request) => {
    entered.open(request.idempotency?.signal as AbortSignal)
    await leave.promise
    return 'late'
  })
  successor.post('/', config(), async (_request, reply) => reply.code(503).send('gone'))
  const first = inject(paused, keyed)
  const signal = await entered.promise
  await until(() => asked)
  await until(async () => (await store.get(KEY))?.state === 'abandoned')
  t.equal((await successor.inject(keyed)).statusCode, 503)
  answer.open()
  await until(() => signal.aborted)
  leave.open()
  t.equal((await first).body, 'late', 'its client gets its reply')
  t.match(await store.get(KEY), { state: 'abandoned', attempt: 2, ended: true }, 'which is not stored')
})

t.test('what a handler gets may be taken out of its object', async (t) => {
  const app = await build(t)
  const derived: string[] = []
  app.post('/', config(), async (request) => {
    const { discard, deriveKey } = request.idempotency as NonNullable<typeof request.idempotency>
    derived.push(deriveKey('charge'))
    discard()
    return 'done'
  })
  await app.inject(keyed)
  t.equal((await app.inject(keyed)).headers[REPLAYED], undefined)
  t.equal(derived[0], derived[1])
})

t.test("with 'bypass' nothing runs beside a request that this process has begun meanwhile", async (t) => {
  const store = new MemoryStore()
  const acquire = store.acquire.bind(store)
  let calls = 0
  store.acquire = (...args) => (++calls === 1 ? new Promise(() => {}) : acquire(...args))
  const app = await build(t, { store, onStoreError: 'bypass', storeTimeout: 100 })
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  app.post('/', config(), async () => {
    runs++
    entered.open()
    await leave.promise
    return 'done'
  })
  const unanswered = inject(app, keyed)
  await until(() => calls === 1)
  const running = inject(app, keyed)
  await entered.promise
  t.equal(codeOf(await unanswered), 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  leave.open()
  await running
  t.equal(runs, 1)
})

t.test('a store that never gives what nobody has is not asked for ever', async (t) => {
  const store = new MemoryStore()
  store.acquire = async () => ({ state: 'abandoned', fingerprint: '', attempt: 1 })
  const app = await build(t, { store })
  app.post('/', config(), async () => 'done')
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
})

for (const [when, delays] of Object.entries({
  'before its claim has come to the store': 'question',
  'before the other knows that it has the key': 'answer'
})) {
  t.test(
    `an owner that claims a lost key anew while another request of its process gets it keeps it, ${when}`,
    async (t) => {
      const store = new MemoryStore()
      const app = await build(t, { store, lease: 90, onAbandoned: 'reject' })
      const [entered, leave, goOn] = [latch<AbortSignal>(), latch(), latch()]
      let runs = 0
      app.post('/', config(), async (request) => {
        runs++
        entered.open(request.idempotency?.signal as AbortSignal)
        await leave.promise
        return 'done'
      })
      const [acquire, get, renew] = [store.acquire.bind(store), store.get.bind(store), store.renew.bind(store)]
      let owner: string | undefined
      let [isLost, isDelayed, looks] = [false, false, 0]
      store.acquire = async (key, claim) => {
        owner ??= claim.token
        const isRival = claim.token !== owner
        if (isLost && !isDelayed && isRival === (delays === 'answer')) {
          isDelayed = true
          if (delays === 'question') await goOn.promise
          const found = await acquire(key, claim)
          await goOn.promise
          return found
        }
        return acquire(key, claim)
      }
      store.get = async (key) => {
        looks++
        return get(key)
      }
      store.renew = async (...args) => isLost && (await renew(...args))
      const first = inject(app, keyed)
      const signal = await entered.promise
      isLost = true
      await store.delete(KEY)
      let duplicate: ReturnType<typeof inject>
      if (delays === 'question') {
        await until(() => isDelayed)
        duplicate = inject(app, keyed)
        t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_IN_PROGRESS')
      } else {
        duplicate = inject(app, keyed)
        await until(() => isDelayed && looks > 0)
      }
      goOn.open()
      t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_IN_PROGRESS')
      leave.open()
      t.equal((await first).body, 'done')
      t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
      t.same([runs, signal.aborted], [1, false])
    }
  )
}
