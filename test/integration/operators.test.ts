import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import {
  type IdempotencyEvent,
  type IdempotencyOptions,
  type IdempotencyStore,
  type ListedOperation,
  type ListOptions,
  MemoryStore,
  type Outcome
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build } from '../support/app.js'
import { everyStore } from '../support/every-store.js'
import { latch, until } from '../support/latch.js'

/* What operators and jobs ask of `app.idempotency`: look, list, settle, forget. */

const refusal = (name: string) => ({ code: `FST_IDEMPOTENCY_${name}` })
const keyed = (key: string, url = '/orders', user = 'alice') => ({
  method: 'POST' as const,
  url,
  headers: { 'idempotency-key': key, user }
})
const alice = { scope: 'alice' }

/** An app whose handlers do what the last part of the URL says. */
async function shop(t: Test, store: IdempotencyStore, options: IdempotencyOptions = {}) {
  const app = await build(t, {
    store,
    scope: (request) => String(request.headers.user),
    onAbandoned: 'reject',
    lease: 60_000,
    ...options
  })
  const hold = latch()
  t.teardown(() => hold.open())
  const runs: number[] = []
  for (const url of ['/orders', '/payouts']) {
    app.post(url, { config: { idempotency: true } }, async (request) => {
      runs.push(request.idempotency?.attempt ?? 0)
      return { user: request.headers.user }
    })
  }
  app.post('/large', { config: { idempotency: { maxReplySize: 1 } } }, async () => 'too large')
  app.post('/hold', { config: { idempotency: true } }, () => hold.promise)
  return { app, hold, runs }
}

async function all(app: FastifyInstance, options?: ListOptions) {
  // What is in both stores of a MigratingStore is listed twice.
  const found = new Map<string, ListedOperation>()
  for await (const operation of app.idempotency.list(options)) found.set(operation.storageKey, operation)
  return [...found.values()]
}

/** Claims a key as a process would that died at once: on the route `/payouts`, for alice, unless it is said otherwise. */
async function abandon(app: FastifyInstance, key: string, { url = '/payouts', user = 'alice' } = {}): Promise<string> {
  const { store } = app.idempotency
  const name = app.idempotency.hash(key, { scope: user })
  let fingerprint = ''
  // What a request of this kind is kept with.
  const seen: IdempotencyStore = {
    acquire: (_, claim) => {
      fingerprint = claim.fingerprint
      return Promise.resolve({ state: 'running', fingerprint: '', leaseMs: 1 })
    },
    renew: async () => false,
    complete: async () => false,
    release: async () => false
  }
  const probe = await build({ teardown: () => {} }, { store: seen, scope: () => user })
  probe.post(url, { config: { idempotency: true } }, async () => 'x')
  await probe.inject(keyed(key, url, user))
  await probe.close()
  await store.acquire(name, { token: `dead ${key}`, fingerprint, leaseMs: 1, retainMs: 60_000, takeover: false })
  await until(async () => (await store.get?.(name))?.state === 'abandoned')
  return name
}

const stores = await everyStore(t)

for (const [name, makeStore] of Object.entries(stores)) {
  t.test(`on a ${name}`, async (t) => {
    t.test('hash gives the name that logs and events have for a key', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      const keys: string[] = []
      const listener = (message: unknown) => keys.push((message as IdempotencyEvent).key)
      subscribe('fastify-idempotency:stored', listener)
      t.teardown(() => unsubscribe('fastify-idempotency:stored', listener))
      await app.inject(keyed('k'))
      t.same(keys, [app.idempotency.hash('k', alice)])
      t.equal(app.idempotency.hash('k'), storageKey(null, 'k'))
    })

    t.test('get tells of a running operation since when, which attempt, which route, and what is left', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      const before = Date.now()
      void app.inject(keyed('k', '/hold'))
      const found = await until(() => app.idempotency.get('k', alice))
      t.match(found, { state: 'running', storageKey: app.idempotency.hash('k', alice), route: '/hold', attempt: 1 })
      const { startedAt = 0, leaseMs } = found as { startedAt?: number; leaseMs: number }
      t.ok(startedAt >= before && startedAt <= Date.now(), 'it began now')
      t.ok(leaseMs > 0 && leaseMs <= 60_000)
    })

    t.test('get tells of a finished operation when, what, which route, and for how long', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      const before = Date.now()
      await app.inject(keyed('k'))
      const found = await app.idempotency.get({ storageKey: app.idempotency.hash('k', alice) })
      t.match(found, { state: 'completed', route: '/orders', record: { kind: 'reply', statusCode: 200 } })
      const { record, ttlMs } = found as { record: { createdAt: number }; ttlMs: number }
      t.ok(record.createdAt >= before && record.createdAt <= Date.now(), 'it was finished now')
      t.ok(ttlMs > 0 && ttlMs <= 86_400_000)
    })

    t.test('get tells of an abandoned operation when its owner was last seen', async (t) => {
      const { app } = await shop(t, await makeStore(t), { lease: 1_000 })
      const before = Date.now()
      await abandon(app, 'k')
      const found = await app.idempotency.get('k', alice)
      t.match(found, { state: 'abandoned', route: '/payouts', attempt: 1 })
      const { ownerSeenAt = 0 } = found as { ownerSeenAt?: number }
      t.ok(ownerSeenAt >= before - 1_100 && ownerSeenAt <= Date.now() - 900, 'a lease before it lapsed')
    })

    t.test('list shows what is running, abandoned, replied and lost, and nothing of what is in it', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      void app.inject(keyed('running', '/hold'))
      await until(() => app.idempotency.get('running', alice))
      await abandon(app, 'abandoned')
      await app.inject(keyed('replied'))
      await app.inject(keyed('lost', '/large'))
      const named = (key: string) => app.idempotency.hash(key, alice)
      const expected = {
        running: [{ storageKey: named('running'), state: 'running', route: '/hold', attempt: 1 }],
        abandoned: [{ storageKey: named('abandoned'), state: 'abandoned', route: '/payouts', attempt: 1 }],
        reply: [{ storageKey: named('replied'), state: 'completed', route: '/orders', statusCode: 200 }],
        tombstone: [{ storageKey: named('lost'), state: 'completed', route: '/large', reason: 'too-large' }]
      }
      for (const [state, operations] of Object.entries(expected)) {
        const found = await all(app, { state } as ListOptions)
        t.match(found, operations, state)
        t.equal(found.length, 1)
        for (const hidden of ['fingerprint', 'record', 'steps', 'body']) t.notOk(hidden in (found[0] ?? {}), hidden)
      }
      t.equal((await all(app, { state: 'completed' })).length, 2)
      t.equal((await all(app)).length, 4)
    })

    t.test('list keeps to a route, an age and a limit', async (t) => {
      const { app } = await shop(t, await makeStore(t), { lease: 20 })
      for (const key of ['a', 'b', 'c']) await app.inject(keyed(key))
      await abandon(app, 'dead')
      t.equal((await all(app, { route: '/payouts' })).length, 1)
      t.equal((await all(app, { route: '/pay' })).length, 0)
      let some = 0
      for await (const _ of app.idempotency.list({ limit: 2 })) some++
      t.equal(some, 2)
      t.equal((await all(app, { olderThan: '1h' })).length, 0)
      await until(async () => (await all(app, { olderThan: 5 })).length === 4)
    })

    t.test('list and purge say what they take', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      t.throws(() => app.idempotency.list({ state: 'dead' as never }), refusal('INVALID_OPTION'))
      t.throws(() => app.idempotency.list({ limit: 0 }), refusal('INVALID_OPTION'))
      t.throws(() => app.idempotency.list({ olderThan: 'soon' }), refusal('INVALID_OPTION'))
      for (const options of [{}, { scope: undefined }, { status: 1 }, undefined] as never[]) {
        await t.rejects(app.idempotency.purge(options), refusal('INVALID_OPTION'))
      }
    })

    t.test('a settled reply is what every retry gets, in place of the handler', async (t) => {
      const { app, runs } = await shop(t, await makeStore(t))
      await abandon(app, 'k')
      t.match((await app.inject(keyed('k', '/payouts'))).json(), refusal('ABANDONED'))
      const reply = { statusCode: 201, headers: { location: '/payouts/7', 'X-List': ['a', 'b'] }, body: { id: 7 } }
      await app.idempotency.settle('k', alice, { reply })
      for (const _ of [1, 2]) {
        const replay = await app.inject(keyed('k', '/payouts'))
        t.match(replay, { statusCode: 201, body: '{"id":7}' })
        t.match(replay.headers, {
          'idempotent-replayed': 'true',
          'content-type': 'application/json; charset=utf-8',
          location: '/payouts/7',
          'x-list': ['a', 'b']
        })
      }
      t.equal((await app.inject({ ...keyed('k', '/payouts'), payload: { other: true } })).statusCode, 422)
      t.same(runs, [])
    })

    t.test('bodies of a settled reply are text, bytes, JSON, or none', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      const bodies: [body: unknown, sent: string, type: string | undefined][] = [
        ['done', 'done', 'text/plain; charset=utf-8'],
        [Buffer.from([1, 2]), '\u0001\u0002', undefined],
        [[1], '[1]', 'application/json; charset=utf-8'],
        [undefined, '', undefined]
      ]
      for (const [n, [body, sent, type]] of bodies.entries()) {
        await abandon(app, `k${n}`)
        await app.idempotency.settle(`k${n}`, alice, { reply: { statusCode: 200, body } })
        const { body: got, headers } = await app.inject(keyed(`k${n}`, '/payouts'))
        t.same([got, headers['content-type']], [sent, type ?? headers['content-type']])
      }
    })

    t.test('an operation that is settled as a rerun runs, as the attempt that it would have been', async (t) => {
      const { app, runs } = await shop(t, await makeStore(t))
      const name = await abandon(app, 'k')
      await app.idempotency.settle({ storageKey: name }, 'rerun')
      t.equal((await app.inject(keyed('k', '/payouts'))).statusCode, 200)
      t.same(runs, [2])
    })

    t.test('an operation that is settled as never never runs', async (t) => {
      const { app, runs } = await shop(t, await makeStore(t))
      await abandon(app, 'k')
      await app.idempotency.settle('k', alice, 'never')
      t.match((await app.inject(keyed('k', '/payouts'))).json(), refusal('NOT_REPLAYABLE'))
      t.same(runs, [])
    })

    t.test('a tombstone can be settled: by the reply that could not be kept, or to run again', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      for (const key of ['known', 'again']) await app.inject(keyed(key, '/large'))
      await app.idempotency.settle('known', alice, { reply: { statusCode: 200, body: 'x' } })
      t.equal((await app.inject(keyed('known', '/large'))).body, 'x')
      await app.idempotency.settle('again', alice, 'rerun')
      const { body, headers } = await app.inject(keyed('again', '/large'))
      t.same([body, headers['idempotent-replayed']], ['too large', undefined])
    })

    t.test('what is running, replied or unknown cannot be settled, and the error says which', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      void app.inject(keyed('running', '/hold'))
      await until(() => app.idempotency.get('running', alice))
      await app.inject(keyed('replied'))
      const outcomes: Outcome[] = ['rerun', 'never', { reply: { statusCode: 200 } }]
      for (const outcome of outcomes) {
        for (const [key, why] of Object.entries({
          running: /running/,
          replied: /reply/,
          unknown: /nothing is known/
        })) {
          const settled = app.idempotency.settle(key, alice, outcome)
          await t.rejects(settled, { ...refusal('SETTLE'), statusCode: 409, message: why }, `${key}`)
        }
      }
    })

    t.test('an outcome that is none is refused before anything is changed', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      await abandon(app, 'k')
      const wrong: unknown[] = [
        undefined,
        'done',
        {},
        { reply: {} },
        { reply: { statusCode: 99 } },
        { reply: { statusCode: 600 } },
        { reply: { statusCode: 200, headers: { 'a b': 'x' } } },
        { reply: { statusCode: 200, headers: { a: 'ключ' } } },
        { reply: { statusCode: 200, headers: { 'Set-Cookie': 'a=b' } } }
      ]
      for (const outcome of wrong) {
        await t.rejects(app.idempotency.settle('k', alice, outcome as Outcome), refusal('INVALID_OPTION'))
      }
      t.match(await app.idempotency.get('k', alice), { state: 'abandoned' })
    })

    t.test('settling is an event', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      const seen: IdempotencyEvent[] = []
      const listener = (message: unknown) => seen.push(message as IdempotencyEvent)
      subscribe('fastify-idempotency:settled', listener)
      t.teardown(() => unsubscribe('fastify-idempotency:settled', listener))
      const name = await abandon(app, 'k')
      await app.idempotency.settle('k', alice, 'rerun')
      t.match(seen, [{ key: name, route: '/payouts', attempt: 1, request: null }])
    })

    t.test('purge forgets all of a scope but what is running, and says how much', async (t) => {
      const { app, hold } = await shop(t, await makeStore(t))
      for (const key of ['a', 'b']) await app.inject(keyed(key))
      await app.inject(keyed('a', '/orders', 'bob'))
      await abandon(app, 'dead')
      const running = app.inject(keyed('running', '/hold'))
      await until(() => app.idempotency.get('running', alice))
      t.equal(await app.idempotency.purge({ scope: 'alice' }), 3)
      t.equal(await app.idempotency.purge({ scope: 'alice' }), 0)
      for (const key of ['a', 'b', 'dead']) t.equal(await app.idempotency.get(key, alice), null, key)
      t.match(await app.idempotency.get('a', { scope: 'bob' }), { state: 'completed' })
      t.match(await app.idempotency.get('running', alice), { state: 'running' })
      hold.open()
      await running
    })

    t.test('purge keeps to a route and an age', async (t) => {
      const { app } = await shop(t, await makeStore(t))
      await app.inject(keyed('a'))
      await app.inject(keyed('b', '/payouts'))
      t.equal(await app.idempotency.purge({ olderThan: '1h' }), 0)
      t.equal(await app.idempotency.purge({ route: '/payouts', scope: 'bob' }), 0)
      t.equal(await app.idempotency.purge({ route: '/payouts' }), 1)
      await until(async () => (await app.idempotency.purge({ olderThan: 5 })) === 1)
    })

    t.test('delete takes a storage key as well', async (t) => {
      const { app, runs } = await shop(t, await makeStore(t))
      await app.inject(keyed('k'))
      t.equal(await app.idempotency.delete({ storageKey: app.idempotency.hash('k', alice) }), true)
      await app.inject(keyed('k'))
      t.same(runs, [1, 1])
    })
  })
}

t.test('healthy is whether the stores answer', async (t) => {
  const store = new MemoryStore()
  const { app } = await shop(t, store, { storeTimeout: 20 })
  t.equal(await app.idempotency.healthy(), true)
  const failing: Partial<IdempotencyStore>[] = [
    { get: () => Promise.reject(new Error('down')) },
    { get: () => new Promise(() => {}) },
    {
      get: () => {
        throw new Error('broken')
      }
    }
  ]
  for (const broken of failing) {
    app.post(`/${failing.indexOf(broken)}`, { config: { idempotency: true } }, async () => 'x')
    Object.assign(store, broken)
    t.equal(await app.idempotency.healthy(), false)
    Object.assign(store, { get: MemoryStore.prototype.get })
  }
  t.equal(await app.idempotency.healthy(), true)
})

t.test('stores of routes are looked at as well as that of the registration', async (t) => {
  const own = new MemoryStore()
  const app = await build(t, { store: new MemoryStore() })
  app.post('/own', { config: { idempotency: { store: own } } }, async () => 'x')
  await app.inject(keyed('k', '/own'))
  t.match(await app.idempotency.get('k'), { state: 'completed', route: '/own' })
  t.equal((await all(app)).length, 1)
  t.equal(await app.idempotency.purge({ route: '/own' }), 1)
  t.equal(await own.get(storageKey(null, 'k')), null)
  await app.inject(keyed('k', '/own'))
  t.equal(await app.idempotency.delete('k'), true)
  own.get = () => Promise.reject(new Error('down'))
  t.equal(await app.idempotency.healthy(), false)
})

t.test('a store that cannot list, or settle, says so', async (t) => {
  const store = Object.assign(new MemoryStore(), { list: undefined, settle: undefined }) as IdempotencyStore
  const { app } = await shop(t, store)
  await t.rejects(all(app), { message: 'This idempotency store has no list()' })
  await t.rejects(app.idempotency.purge({ scope: 'alice' }), { message: 'This idempotency store has no list()' })
  await abandon(app, 'k')
  await t.rejects(app.idempotency.settle('k', alice, 'never'), { message: 'This idempotency store has no settle()' })
})
