import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import t from 'tap'
import idempotency, { type IdempotencyStore, MemoryStore } from '../../index.js'
import { build, codeOf, inject, listen, post, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

/** The memory, and when it was let go. */
class ClosableStore extends MemoryStore {
  closed = 0
  completedWhileOpen = 0
  override async complete(...args: Parameters<IdempotencyStore['complete']>) {
    if (this.closed === 0) this.completedWhileOpen++
    return super.complete(...args)
  }
  override async close() {
    this.closed++
    await super.close()
  }
}

for (const forceCloseConnections of [false, true] as const) {
  t.test(`close waits for running claims to be stored, forceCloseConnections ${forceCloseConnections}`, async (t) => {
    const store = new ClosableStore()
    const app = await build(t, { store }, { forceCloseConnections })
    const [entered, leave] = [latch(), latch()]
    app.post('/', { config: { idempotency: true } }, async () => {
      entered.open()
      await leave.promise
      return 'done'
    })
    const port = await listen(app)
    const first = post(port, { key: 'k', body: '{}' }).catch(() => null)
    await entered.promise
    const closing = app.close()
    setTimeout(leave.open, 30)
    await closing
    await first
    t.same([store.completedWhileOpen, store.closed], [1, 1])
    const next = await build(t, { store })
    next.post('/', { config: { idempotency: true } }, async () => 'again')
    t.equal((await next.inject({ ...keyed, payload: {} })).body, 'done')
  })
}

t.test('close waits for one lease at most', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, lease: 60 })
  app.post('/', { config: { idempotency: true } }, () => new Promise(() => {}))
  inject(app, keyed).catch(() => {})
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  await app.close()
  t.equal(store.closed, 1)
})

t.test('close waits for a client that is still there as long as it takes, its lease renewed meanwhile', async (t) => {
  const store = new ClosableStore()
  const lease = 60
  const app = await build(t, { store, lease })
  const leave = latch()
  app.post('/', { config: { idempotency: true } }, async () => {
    await leave.promise
    return 'done'
  })
  const running = post(await listen(app), { key: 'k' })
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  const closing = app.close()
  await sleep(3 * lease)
  t.same([store.closed, (await app.idempotency.get('k'))?.state], [0, 'running'])
  leave.open()
  t.equal((await running).text, 'done')
  await closing
  t.same([store.completedWhileOpen, store.closed], [1, 1])
})

t.test('a request that comes when the server is closing gets its 503, and leaves its key alone', async (t) => {
  const app = await build(t)
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const met: unknown[] = []
  app.addHook('preClose', async () => {
    met.push((await post(port, { key: 'k' })).status, await app.idempotency.get('k'))
  })
  const port = await listen(app)
  await app.close()
  t.same(met, [503, null])
})

t.test('what was registered before the plugin is closed when its claims are stored', async (t) => {
  const order: string[] = []
  class NotingStore extends MemoryStore {
    override async complete(...args: Parameters<IdempotencyStore['complete']>) {
      order.push('stored')
      return super.complete(...args)
    }
  }
  const app = Fastify()
  app.addHook('onClose', async () => {
    order.push('before')
  })
  await app.register(idempotency, { store: new NotingStore() })
  const leave = latch()
  app.addHook('onClose', async () => {
    order.push('behind')
    leave.open()
  })
  app.post('/', { config: { idempotency: true } }, async () => {
    await leave.promise
    return 'done'
  })
  const running = inject(app as never, keyed)
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  await app.close()
  await running
  t.same(order, ['behind', 'stored', 'before'])
})

t.test('close waits for one lease in all, and renews nothing afterwards', async (t) => {
  const store = new ClosableStore()
  let renewals = 0
  const renew = store.renew.bind(store)
  store.renew = (...args) => {
    renewals++
    return renew(...args)
  }
  const app = await build(t, { store, lease: 90 })
  app.post('/', { config: { idempotency: true } }, () => new Promise(() => {}))
  inject(app, keyed).catch(() => {})
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  await app.close()
  const after = renewals
  await sleep(100)
  t.equal(renewals, after)
})

for (const comes of ['first', 'last']) {
  t.test(
    `a store that fails to close does not keep the others open, and is told of, where it comes ${comes}`,
    async (t) => {
      const [bad, good] = [new ClosableStore(), new ClosableStore()]
      bad.close = () => Promise.reject(new Error('broken'))
      const app = Fastify()
      const [one, other] = comes === 'first' ? [bad, good] : [good, bad]
      await app.register(idempotency, { store: one })
      app.post('/', { config: { idempotency: { store: other } } }, async () => 'x')
      await app.ready()
      await t.rejects(app.close(), { message: 'broken' })
      t.equal(good.closed, 1)
    }
  )
}

t.test('close waits for all claims that are running, not only for the first that ends', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store })
  const leave = { short: latch(), long: latch() }
  app.post('/:name', { config: { idempotency: true } }, async ({ params }) => {
    await leave[(params as { name: keyof typeof leave }).name].promise
    return 'done'
  })
  const requests = ['short', 'long'].map((key) =>
    inject(app, { ...keyed, url: `/${key}`, headers: { 'idempotency-key': key } })
  )
  for (const key of ['short', 'long']) {
    await until(async () => (await app.idempotency.get(key))?.state === 'running')
  }
  const closing = app.close()
  // For the close to come to its waiting, and then to go on, if it will.
  const turns = async () => {
    for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve))
  }
  await turns()
  leave.short.open()
  await requests[0]
  await turns()
  t.equal(store.closed, 0)
  leave.long.open()
  await Promise.all([closing, ...requests])
  t.same([store.completedWhileOpen, store.closed], [2, 1])
})

t.test('what could not be stored until the close is not tried any more afterwards', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, lease: 30, storeTimeout: 20 })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  let asked = 0
  store.complete = async () => {
    asked++
    throw new Error('down')
  }
  t.equal((await app.inject(keyed)).body, 'done')
  await app.close()
  const after = asked
  // The pauses before the first three repetitions.
  await sleep(50 + 100 + 200)
  t.equal(asked, after)
})

t.test('a duplicate whose answer comes when the server is closing does not begin to wait', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, onConflict: 'wait' })
  const [leave, asked, answer, begun] = [latch(), latch(), latch(), latch()]
  // Behind that of the plugin.
  app.addHook('preClose', async () => begun.open())
  app.post('/', { config: { idempotency: true } }, async () => {
    await leave.promise
    return 'done'
  })
  const first = inject(app, keyed)
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  const acquire = store.acquire.bind(store)
  store.acquire = async (...args) => {
    asked.open()
    await answer.promise
    return acquire(...args)
  }
  const duplicate = inject(app, keyed)
  await asked.promise
  const closing = app.close()
  await begun.promise
  answer.open()
  t.equal((await duplicate).json().code, 'FST_IDEMPOTENCY_IN_PROGRESS')
  leave.open()
  await Promise.all([first, closing])
})

t.test('close does not wait for claims that nobody needs', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, storeTimeout: 20 })
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  store.acquire = () => new Promise(() => {})
  store.release = () => Promise.reject(new Error('down'))
  t.equal((await app.inject(keyed)).statusCode, 503)
  const closed = latch<string>()
  void app.close().then(() => closed.open('closed'))
  t.equal(await Promise.race([closed.promise, sleep(5_000, 'waited')]), 'closed')
})

t.test('close waits for a claim that could not be released yet', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, storeTimeout: 20 })
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => reply.code(500).send())
  const release = store.release.bind(store)
  let failures = 0
  store.release = (...args) => (++failures < 3 ? Promise.reject(new Error('down')) : release(...args))
  t.equal((await app.inject(keyed)).statusCode, 500)
  await app.close()
  t.equal(await app.idempotency.get('k'), null)
})

t.test('close waits for the background retries of a failed completion', async (t) => {
  const store = new ClosableStore()
  const app = await build(t, { store, storeTimeout: 20 })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const complete = store.complete.bind(store)
  let failures = 0
  store.complete = (...args) => (++failures < 3 ? Promise.reject(new Error('down')) : complete(...args))
  t.equal((await app.inject(keyed)).body, 'done')
  await app.close()
  t.same([store.completedWhileOpen, store.closed], [1, 1])
})

t.test('waiting duplicates get their 409 when the server closes', async (t) => {
  const app = await build(t, { onConflict: 'wait' })
  const [entered, leave] = [latch(), latch()]
  app.post('/', { config: { idempotency: true } }, async () => {
    entered.open()
    await leave.promise
    return 'done'
  })
  const port = await listen(app)
  const first = post(port, { key: 'k' })
  await entered.promise
  const requests: unknown[] = []
  app.server.on('request', (request) => requests.push(request))
  const duplicate = post(port, { key: 'k' })
  await until(() => requests.length === 1)
  const closing = app.close()
  t.equal(codeOf(await duplicate), 'FST_IDEMPOTENCY_IN_PROGRESS')
  leave.open()
  t.equal((await first).text, 'done')
  await closing
})

t.test('a store that two registrations share is closed by the last one', async (t) => {
  const store = new ClosableStore()
  const [one, two] = [Fastify(), Fastify()]
  for (const app of [one, two]) {
    await app.register(idempotency, { store })
    app.post('/', { config: { idempotency: { store } } }, async () => 'x')
    await app.ready()
  }
  await one.close()
  t.equal(store.closed, 0)
  await two.inject(keyed)
  t.equal((await two.inject(keyed)).headers[REPLAYED], 'true')
  await two.close()
  t.equal(store.closed, 1)
})

t.test("a route's own store is closed too", async (t) => {
  const own = new ClosableStore()
  const app = await build(t)
  app.post('/', { config: { idempotency: { store: own } } }, async () => 'x')
  await app.ready()
  await app.close()
  t.equal(own.closed, 1)
})
