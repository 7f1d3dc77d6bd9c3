import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import t, { type Test } from 'tap'
import { type IdempotencyEvent, type IdempotencyStore, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, inject } from '../support/app.js'
import { latch, until } from '../support/latch.js'

const KEY = 'the key of a client'
const STORED = storageKey(null, KEY)
const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': KEY } }

/** The events of a name, from now on. */
function events(t: Test, name: string): IdempotencyEvent[] {
  const heard: IdempotencyEvent[] = []
  const listener = (message: unknown) => heard.push(message as IdempotencyEvent)
  subscribe(`fastify-idempotency:${name}`, listener)
  t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  return heard
}

t.test('of those who wait for an owner that died one asks to take over, and the others get its reply', async (t) => {
  const store = new MemoryStore()
  const claim = { token: 'dead', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: false }
  await store.acquire(STORED, claim)
  const asked: boolean[] = []
  const acquire = store.acquire.bind(store)
  store.acquire = (key, claim) => {
    asked.push(claim.takeover)
    return acquire(key, claim)
  }
  const died = latch()
  const changed = store.changed.bind(store)
  store.changed = (...args) => {
    store.changed = changed
    return Promise.race([died.promise, changed(...args)])
  }
  const app = await build(t, { store, onConflict: 'wait' })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => `run ${++runs}`)
  const requests = Array.from({ length: 5 }, () => inject(app, keyed))
  // Each has asked, and one for all who wait.
  await until(() => asked.length === 6)
  await store.renew(STORED, 'dead', 1)
  await until(async () => (await store.get(STORED))?.state === 'abandoned')
  died.open()
  t.same(
    (await Promise.all(requests)).map(({ body }) => body),
    Array(5).fill('run 1')
  )
  t.equal(asked.filter((takeover) => takeover).length, 1)
})

t.test('a release that the store refuses is a claim that was lost', async (t) => {
  const store = new MemoryStore()
  const [lost, released] = [events(t, 'lease-lost'), events(t, 'released')]
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => reply.code(500).send())
  store.release = async () => false
  await app.inject(keyed)
  t.same(
    lost.map(({ key }) => key),
    [STORED]
  )
  t.same(released, [])
})

t.test('a key that becomes free for somebody who waits no more is given back', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store, onConflict: 'wait' })
  const [fail, stay] = [latch(), latch()]
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    await fail.promise
    return reply.code(500).send()
  })
  // Holds the server open while it closes, and the store with it.
  app.post('/stay', { config: { idempotency: true } }, () => stay.promise)
  const other = inject(app, { ...keyed, url: '/stay', headers: { 'idempotency-key': 'other' } })
  const first = inject(app, keyed)
  await until(async () => (await app.idempotency.get(KEY))?.state === 'running')
  await until(async () => (await app.idempotency.get('other'))?.state === 'running')
  const [taken, answer] = [latch(), latch()]
  const acquire = store.acquire.bind(store)
  const looked = latch()
  store.acquire = async (...args) => {
    const found = await acquire(...args)
    looked.open()
    if (found.state !== 'acquired') return found
    taken.open()
    await answer.promise
    return found
  }
  const duplicate = inject(app, keyed)
  await looked.promise
  fail.open()
  await first
  await taken.promise
  const closing = app.close()
  t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_IN_PROGRESS')
  t.equal((await store.get(STORED))?.state, 'running')
  answer.open()
  await until(async () => (await store.get(STORED)) === null)
  stay.open()
  await Promise.all([other, closing])
})

t.test('a renewal that fails is told, but not when the claim has ended meanwhile', async (t) => {
  const store = new MemoryStore()
  const errors = events(t, 'store-error')
  const app = await build(t, { store, lease: 30 })
  let leave = latch()
  app.post('/', { config: { idempotency: true } }, async () => {
    await leave.promise
    return 'done'
  })
  const down = new Error('down')
  const { renew } = store
  store.renew = async () => {
    // The next one has an answer again.
    store.renew = renew
    throw down
  }
  const first = inject(app, keyed)
  await until(() => errors.length === 1)
  t.match(errors, [{ key: STORED, route: '/', attempt: 1, error: down }])
  leave.open()
  t.equal((await first).body, 'done')

  leave = latch()
  const late = latch<boolean>()
  let renewing = false
  store.renew = () => {
    renewing = true
    return late.promise
  }
  const second = inject(app, { ...keyed, headers: { 'idempotency-key': 'other' } })
  await until(() => renewing)
  leave.open()
  t.equal((await second).body, 'done')
  late.fail(down)
  for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve))
  t.equal(errors.length, 1)
})

t.test(
  "log entries name the operation by the store's key, its route and attempt, never by the client's key",
  async (t) => {
    const lines: string[] = []
    const logger = { level: 'debug', stream: { write: (line: string) => void lines.push(line) } }
    const store: IdempotencyStore = new MemoryStore()
    const app = await build(t, { store }, { logger })
    app.post('/', { config: { idempotency: true } }, async () => 'done')
    await app.inject(keyed)
    await app.inject(keyed)
    const ours = lines.filter((line) => line.includes('"idempotency"')).map((line) => JSON.parse(line))
    t.match(
      ours.map(({ msg, idempotency }) => [msg, idempotency]),
      [
        ['idempotency acquired', { key: STORED, route: '/', attempt: 1 }],
        ['idempotency stored', { key: STORED, route: '/', attempt: 1 }],
        ['idempotency replayed', { key: STORED, route: '/', attempt: 0 }]
      ]
    )
    t.notOk(lines.some((line) => line.includes(KEY)))
  }
)
