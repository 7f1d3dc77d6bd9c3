import { hash, randomBytes } from 'node:crypto'
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import {
  type IdempotencyEvent,
  type IdempotencyOptions,
  type IdempotencyStore,
  MemoryStore,
  type RequestIdempotency,
  type Secret
} from '../../index.js'
import { markOf } from '../../lib/operation/origin.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { TestStore } from '../../lib/testing.js'
import { build, codeOf, inject, REPLAYED } from '../support/app.js'
import { everyStore } from '../support/every-store.js'
import { latch, until } from '../support/latch.js'

/* The option `secret`: what a store shows without it, and how one secret takes the place of another while requests come. */

const OLD = randomBytes(32)
const NEW = randomBytes(32)
/** What the instances have, deploy by deploy. */
const PHASES = { A: OLD, B: [OLD, NEW], C: [NEW, OLD], D: NEW } as const
type Phase = keyof typeof PHASES

const keyed = (key: string, payload: object = {}, user = 'alice') => ({
  method: 'POST' as const,
  url: '/orders',
  headers: { 'idempotency-key': key, user },
  payload
})
const alice = { scope: 'alice' }

function call(store: IdempotencyStore, name: keyof IdempotencyStore, args: never[]): unknown {
  return (store[name] as (...args: never[]) => unknown)(...args)
}

/** The store as another process has it, which knows nothing of what goes on in this one. */
function apart(store: IdempotencyStore): IdempotencyStore {
  const names = [
    'acquire',
    'renew',
    'complete',
    'release',
    'step',
    'changed',
    'get',
    'delete',
    'list',
    'settle'
  ] as const
  const there = names.filter((name) => store[name] !== undefined)
  const methods = there.map((name) => [name, (...args: never[]) => call(store, name, args)])
  return Object.fromEntries(methods) as IdempotencyStore
}

interface Given extends Omit<IdempotencyOptions, 'secret'> {
  secret?: Secret | readonly (Secret | null)[] | undefined
  run?: (context: {
    attempt: number
    step: (name: string) => Promise<string>
    derived: string
    signal: AbortSignal
  }) => unknown
}

/** An instance of the service, and the attempts that have run on it. */
async function instance(t: Test, store: IdempotencyStore, { run, secret, ...options }: Given) {
  const scope: IdempotencyOptions['scope'] = (request) => String(request.headers.user)
  const app = await build(t, { store: apart(store), scope, ...(secret !== undefined && { secret }), ...options })
  const runs: number[] = []
  app.post('/orders', { config: { idempotency: true } }, async (request) => {
    const { attempt, step, deriveKey, signal } = request.idempotency as RequestIdempotency
    runs.push(attempt)
    const charge = (name: string) => step(name, async () => `${name} of ${attempt}`)
    return (await run?.({ attempt, step: charge, derived: deriveKey('x'), signal })) ?? { attempt }
  })
  app.post('/large', { config: { idempotency: { maxReplySize: 1 } } }, async () => 'too large')
  return { app, runs }
}

const at = (t: Test, store: IdempotencyStore, phase: Phase, given: Given = {}) =>
  instance(t, store, { secret: PHASES[phase], ...given })

/** A request whose process dies in its handler, behind a step. */
async function interrupt(t: Test, store: IdempotencyStore, phase: Phase, key: string): Promise<void> {
  const dead = new Set<string>()
  const died = latch()
  let own = ''
  const dying: IdempotencyStore = {
    ...apart(store),
    acquire: (name, claim) => {
      own = name
      dead.add(claim.token)
      return store.acquire(name, { ...claim, leaseMs: 1 })
    },
    renew: async () => true,
    release: async () => true,
    complete: async () => true
  }
  const app = await at(t, dying, phase, {
    run: async ({ step }) => {
      await step('charge')
      died.open()
    }
  })
  await app.app.inject(keyed(key))
  await died.promise
  await until(async () => (await store.get?.(own))?.state === 'abandoned')
}

const stores = await everyStore(t)

/** All that the store was told, as one text. */
function overheard(store: IdempotencyStore): { store: IdempotencyStore; said: () => string; calls: string[] } {
  const said: unknown[] = []
  const calls: string[] = []
  const names = ['acquire', 'renew', 'complete', 'release', 'step', 'get'] as const
  const methods = names.map((name) => [
    name,
    (...args: never[]) => {
      calls.push(name)
      said.push(args)
      return call(store, name, args)
    }
  ])
  return { store: { ...apart(store), ...Object.fromEntries(methods) }, said: () => JSON.stringify(said), calls }
}

t.test('without a secret, who reads the store can try guesses; with one, no guess is recognised', async (t) => {
  const payload = { iban: 'NL00 1234', amount: 100 }
  const told: Record<string, string> = {}
  for (const [name, secret] of Object.entries({ without: undefined, with: OLD })) {
    const { store, said } = overheard(new MemoryStore())
    const { app } = await instance(t, store, { secret })
    await app.inject(keyed('1', payload))
    told[name] = said()
    // The mark is of the storage key, which is there to be read.
    const key = app.idempotency.hash('1', alice)
    t.equal(told[name]?.includes(markOf(key, 'alice')), secret === undefined, `${name} a secret, the caller`)
    t.equal(told[name]?.includes(storageKey('alice', '1')), secret === undefined, `${name} a secret, the key`)
  }
  // What is compared, as anybody can compute it who knows the payload.
  const { store, said } = overheard(new MemoryStore())
  const { app } = await instance(t, store, {})
  await app.inject(keyed('another', payload))
  const [, head = '', guess = ''] = /"([\w-]{26})\.([\w-]{22})~/.exec(said()) ?? []
  for (const part of [head.slice(0, 22), guess]) {
    t.equal(part.length, 22)
    t.ok(told.without?.includes(part))
    t.notOk(told.with?.includes(part))
  }
  t.notOk(told.with?.includes(hash('sha256', '1', 'base64url')))
})

t.test('nor by who may send requests: what came with one key has nothing in common with another', async (t) => {
  const { store, said } = overheard(new MemoryStore())
  const { app } = await instance(t, store, { secret: OLD })
  for (const user of ['alice', 'mallory']) await app.inject(keyed('k', { iban: 'NL00 1234' }, user))
  const parts = [...said().matchAll(/"acquire"|"fingerprint":"([\w-]{22})([\w-]{4})\.([\w-]{22})~\w+~([\w-]{16})~/g)]
  const texts = new Set(parts.flatMap(([, ...groups]) => groups))
  t.equal(texts.size, 8, 'two heads, hints, payloads and callers')
})

t.test('without a secret, and with one, a request asks the store as often as ever', async (t) => {
  const first: Record<string, string[]> = {
    none: ['acquire', 'complete'],
    one: ['acquire', 'complete'],
    'a list of one': ['acquire', 'complete'],
    two: ['get', 'get', 'acquire', 'get', 'complete']
  }
  const secrets = { none: undefined, one: OLD, 'a list of one': [OLD], two: [OLD, NEW] }
  for (const [name, secret] of Object.entries(secrets)) {
    const { store, calls } = overheard(new MemoryStore())
    const { app } = await instance(t, store, { secret })
    await app.inject(keyed('k'))
    t.same(calls.splice(0), first[name], `${name}: a first request`)
    t.equal((await app.inject(keyed('k'))).headers[REPLAYED], 'true')
    t.same(calls.splice(0), name === 'two' ? ['get', 'get'] : ['acquire'], `${name}: a replay`)
    t.equal((await app.inject(keyed('k', { other: 1 }))).statusCode, 422)
  }
})

t.test('under another secret nothing is found', async (t) => {
  const store = new MemoryStore()
  const { app } = await instance(t, store, { secret: OLD })
  const other = await instance(t, store, { secret: NEW })
  await app.inject(keyed('k'))
  t.equal(await other.app.idempotency.get('k', alice), null)
  t.equal(await other.app.idempotency.purge(alice), 0)
  t.equal((await other.app.inject(keyed('k'))).headers[REPLAYED], undefined)
  t.same(other.runs, [1])
})

for (const [name, openStore] of Object.entries(stores)) {
  const makeStore = async (t: Test) => {
    const store = await openStore(t)
    // The apps do not, for whom it is another's.
    t.teardown(() => store.close?.())
    return store
  }

  t.test(`a rotation on a ${name}`, async (t) => {
    t.test(
      'finds and compares what each instance has kept, in the deploy of its time and in the next one',
      async (t) => {
        const store = await makeStore(t)
        const made: Record<Phase, Awaited<ReturnType<typeof at>>> = {
          A: await at(t, store, 'A'),
          B: await at(t, store, 'B'),
          C: await at(t, store, 'C'),
          D: await at(t, store, 'D')
        }
        for (const [writer, readers] of [
          ['A', 'ABC'],
          ['B', 'ABC'],
          ['C', 'BCD'],
          ['D', 'BCD']
        ] as const) {
          const { app, runs } = made[writer]
          const reply = await app.inject(keyed(writer, { amount: 1 }))
          t.equal(reply.statusCode, 200)
          await app.inject({ ...keyed(`large ${writer}`), url: '/large' })
          for (const reader of readers as Iterable<Phase>) {
            const { app } = made[reader]
            const replay = await app.inject(keyed(writer, { amount: 1 }))
            t.equal(replay.headers[REPLAYED], 'true', `${reader} replays what ${writer} has stored`)
            t.equal(replay.payload, reply.payload)
            const misuse = await app.inject(keyed(writer, { amount: 2 }))
            t.match([misuse.statusCode, misuse.json()], [422, { differs: undefined, message: /its payload differs/ }])
            const again = await app.inject({ ...keyed(`large ${writer}`), url: '/large' })
            t.equal(codeOf(again), 'FST_IDEMPOTENCY_NOT_REPLAYABLE', `${reader} meets the tombstone of ${writer}`)
          }
          t.same(runs.splice(0), [1])
        }
        for (const { runs } of Object.values(made)) t.same(runs, [])
      }
    )

    t.test('meets what is running, and waits for it', async (t) => {
      const store = await makeStore(t)
      for (const [writer, readers] of [
        ['A', 'B'],
        ['B', 'AC'],
        ['C', 'BD'],
        ['D', 'C']
      ] as const) {
        const [hold, started] = [latch(), latch()]
        const run = async () => {
          started.open()
          await hold.promise
          return { by: writer }
        }
        const { app } = await at(t, store, writer, { run })
        const first = inject(app, keyed(writer))
        await started.promise
        const waiting = []
        for (const reader of readers as Iterable<Phase>) {
          const impatient = await at(t, store, reader)
          t.equal(
            codeOf(await impatient.app.inject(keyed(writer))),
            'FST_IDEMPOTENCY_IN_PROGRESS',
            `${writer}, ${reader}`
          )
          const misuse = await impatient.app.inject(keyed(writer, { other: 1 }))
          t.equal(misuse.statusCode, 422)
          const found = await impatient.app.idempotency.get(writer, alice)
          t.match(found, { state: 'running', storageKey: app.idempotency.hash(writer, alice) })
          await t.rejects(impatient.app.idempotency.settle(writer, alice, 'never'), { message: /it is running/ })
          const patient = await at(t, store, reader, { onConflict: 'wait' })
          waiting.push(inject(patient.app, keyed(writer)))
        }
        hold.open()
        t.same((await first).json(), { by: writer })
        for (const reply of await Promise.all(waiting)) {
          t.equal(reply.headers[REPLAYED], 'true')
          t.same(reply.json(), { by: writer })
        }
      }
    })

    t.test('goes on with what was interrupted, and the next deploy knows what has become of it', async (t) => {
      const store = await makeStore(t)
      for (const [before, now, after] of [
        ['A', 'B', 'C'],
        ['B', 'C', 'D'],
        ['A', 'C', 'D']
      ] as const) {
        const key = `${before}${now}`
        await interrupt(t, store, before, key)
        const careful = await at(t, store, now, { onAbandoned: 'reject' })
        t.equal(codeOf(await careful.app.inject(keyed(key))), 'FST_IDEMPOTENCY_ABANDONED')
        const failing = await at(t, store, now, {
          run: ({ attempt }) => {
            throw new Error(`attempt ${attempt} fails`)
          }
        })
        t.match((await failing.app.inject(keyed(key))).json(), { message: 'attempt 2 fails' })
        const next = await at(t, store, after, { run: async ({ attempt, step }) => [attempt, await step('charge')] })
        t.same((await next.app.inject(keyed(key))).json(), [3, 'charge of 1'], key)
        const { app, runs } = await at(t, store, after)
        t.equal((await app.inject(keyed(key))).headers[REPLAYED], 'true')
        t.same(runs, [])
      }
    })

    t.test('operators find all of it, by its key and its scope', async (t) => {
      const store = await makeStore(t)
      const a = await at(t, store, 'A')
      const { app, runs } = await at(t, store, 'C', { onAbandoned: 'reject' })
      for (const key of ['kept', 'deleted', 'purged']) await a.app.inject(keyed(key))
      await app.inject(keyed('new'))
      await a.app.inject(keyed("bob's", {}, 'bob'))
      await interrupt(t, store, 'A', 'interrupted')
      const old = (key: string) => a.app.idempotency.hash(key, alice)
      t.not(app.idempotency.hash('kept', alice), old('kept'), 'hash is under the first')

      t.match(await app.idempotency.get('kept', alice), { state: 'completed', storageKey: old('kept') })
      t.match(await app.idempotency.get({ storageKey: old('kept') }), { state: 'completed', storageKey: old('kept') })
      t.match(await app.idempotency.get('interrupted', alice), { state: 'abandoned', storageKey: old('interrupted') })
      const listed = new Set<string>()
      for await (const { storageKey } of app.idempotency.list()) listed.add(storageKey)
      t.equal(listed.size, 6)

      t.ok(await app.idempotency.delete('deleted', alice))
      t.equal(await app.idempotency.get('deleted', alice), null)
      const events: IdempotencyEvent[] = []
      const listener = (event: unknown) => events.push(event as IdempotencyEvent)
      for (const event of ['settled', 'replayed']) subscribe(`fastify-idempotency:${event}`, listener)
      t.teardown(() => {
        for (const event of ['settled', 'replayed']) unsubscribe(`fastify-idempotency:${event}`, listener)
      })
      await app.idempotency.settle('interrupted', alice, { reply: { statusCode: 201, body: { settled: true } } })
      const settled = await app.inject(keyed('interrupted'))
      t.same([settled.statusCode, settled.json()], [201, { settled: true }])
      t.same([...new Set(events.map(({ key }) => key))], [old('interrupted')], 'events name what there is')

      t.ok((await app.idempotency.purge(alice)) >= 4)
      for (const key of ['kept', 'purged', 'new', 'interrupted']) t.equal(await app.idempotency.get(key, alice), null)
      t.match(await app.idempotency.get("bob's", { scope: 'bob' }), { state: 'completed' })
      t.same(runs, [1])
    })

    t.test('runs each key once, however many come at a time', async (t) => {
      const store = await makeStore(t)
      let count = 0
      const apps = await Promise.all(
        (['B', 'C', 'B', 'C'] as const).map((phase, n) =>
          at(t, store, phase, {
            onConflict: n < 2 ? 'wait' : 'reject',
            storeTimeout: '30s',
            run: () => ({ run: count++ })
          })
        )
      )
      const keys = Array.from({ length: 12 }, (_, n) => `race ${n}`)
      const ask = async (app: FastifyInstance, key: string): Promise<string> => {
        for (;;) {
          const reply = await inject(app, keyed(key))
          if (reply.statusCode === 200) return reply.payload
          if (codeOf(reply) !== 'FST_IDEMPOTENCY_IN_PROGRESS') throw new Error(reply.payload)
        }
      }
      await Promise.all(
        keys.map(async (key) => {
          const replies = await Promise.all(apps.flatMap(({ app }) => [ask(app, key), ask(app, key), ask(app, key)]))
          t.equal(new Set(replies).size, 1, key)
        })
      )
      t.equal(apps.flatMap(({ runs }) => runs).length, keys.length)
    })
  })
}

t.test('to a secret from none, and back', async (t) => {
  const store = new MemoryStore()
  const phases = [undefined, [null, NEW], [NEW, null], NEW]
  for (const order of [phases, phases.toReversed()]) {
    let before: string | null = null
    for (const [n, secret] of order.entries()) {
      const { app, runs } = await instance(t, store, { secret })
      if (before !== null) t.equal((await app.inject(keyed(before))).headers[REPLAYED], 'true', String(n))
      before = `${order === phases} ${n}`
      await app.inject(keyed(before))
      t.same(runs, [1])
    }
  }
})

t.test('deriveKey is the same on every attempt, whatever the secret', async (t) => {
  const store = new MemoryStore()
  const derived: string[] = []
  const run: Given['run'] = (context) => {
    derived.push(context.derived)
    throw new Error('not yet')
  }
  for (const secret of [undefined, [null, OLD], ...Object.values(PHASES)]) {
    const { app } = await instance(t, store, { secret, run })
    t.equal((await app.inject(keyed('k'))).statusCode, 500)
  }
  t.equal(derived.length, 6)
  t.equal(new Set(derived).size, 1)
})

t.test('run() finds what it has kept under the secret of before', async (t) => {
  const store = new MemoryStore()
  for (const [n, phase] of (['A', 'B', 'C'] as const).entries()) {
    const { app } = await at(t, store, phase)
    t.equal(await app.idempotency.run('job', { ttl: 60_000 }, () => `run ${n}`), 'run 0')
  }
})

t.test('an early hook reserves under the first secret, and meets what is under another', async (t) => {
  const store = new MemoryStore()
  const [a, c] = [await at(t, store, 'A'), await at(t, store, 'C', { hook: 'onRequest' })]
  await a.app.inject(keyed('before'))
  t.equal((await c.app.inject(keyed('before'))).headers[REPLAYED], 'true')
  await interrupt(t, store, 'A', 'interrupted')
  t.same((await c.app.inject(keyed('interrupted'))).json(), { attempt: 2 })
  t.same((await c.app.inject(keyed('first'))).json(), { attempt: 1 })
  t.equal((await c.app.inject(keyed('first'))).headers[REPLAYED], 'true')
  t.equal((await store.list(['running', 'abandoned'])).keys.length, 0)
})

t.test('an owner whose claim was moved while it was paused is told, and stores nothing', async (t) => {
  const store = new MemoryStore()
  let token = ''
  const seen: IdempotencyStore = {
    ...apart(store),
    acquire: (key, claim) => {
      token = claim.token
      return store.acquire(key, claim)
    }
  }
  const [started, hold] = [latch(), latch()]
  const paused = await at(t, seen, 'B', {
    run: async () => {
      started.open()
      await hold.promise
      return { by: 'paused' }
    }
  })
  const losses: unknown[] = []
  const listener = (event: unknown) => losses.push((event as IdempotencyEvent).loss)
  subscribe('fastify-idempotency:lease-lost', listener)
  t.teardown(() => unsubscribe('fastify-idempotency:lease-lost', listener))
  const first = inject(paused.app, keyed('k'))
  await started.promise
  await store.renew(paused.app.idempotency.hash('k', alice), token, 0)
  const { app, runs } = await at(t, store, 'C')
  t.same((await app.inject(keyed('k'))).json(), { attempt: 2 })
  hold.open()
  t.same((await first).json(), { by: 'paused' })
  t.same(losses, ['taken'])
  for (const one of [paused.app, app]) t.same((await one.inject(keyed('k'))).json(), { attempt: 2 })
  t.same([paused.runs, runs], [[1], [2]])
})

t.test('an owner that claims anew, and cannot look under the other secret at once, looks when it renews', async (t) => {
  const store = new MemoryStore()
  const other = (await at(t, store, 'B')).app.idempotency.hash('k', alice)
  const rival = { token: 'rival', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: false }
  let isAnew = false
  let failures = 0
  const seen: IdempotencyStore = {
    ...apart(store),
    acquire: async (key, claim) => {
      const found = await store.acquire(key, claim)
      if (isAnew) t.equal((await store.acquire(other, rival)).state, 'acquired')
      return found
    },
    get: async (key) => {
      if (isAnew && failures === 0 && (await store.get(other)) !== null) {
        failures++
        throw new Error('the store is away')
      }
      return store.get(key)
    }
  }
  const [started, lost] = [latch(), latch()]
  const { app } = await at(t, seen, 'C', {
    lease: 300,
    run: async ({ signal }) => {
      signal.addEventListener('abort', () => lost.open())
      started.open()
      await lost.promise
      return { by: 'the one that was too late' }
    }
  })
  const own = app.idempotency.hash('k', alice)
  const first = inject(app, keyed('k'))
  await started.promise
  isAnew = true
  await store.delete(own)
  await lost.promise
  t.same((await first).json(), { by: 'the one that was too late' })
  t.equal(failures, 1)
  await until(async () => (await store.get(own)) === null, { message: 'its claim to be given back' })
  t.match(await store.get(other), { state: 'running' }, 'and that of the other one stands')
})

t.test('in a TestStore, the owner of a key dies by its name', async (t) => {
  const store = new TestStore()
  const started = latch()
  const app = await build(t, { store, secret: OLD })
  app.post('/orders', { config: { idempotency: true } }, async (request) => {
    if (request.idempotency?.attempt === 1) {
      started.open()
      await new Promise((resolve) => request.idempotency?.signal.addEventListener('abort', resolve))
    }
    return { attempt: request.idempotency?.attempt }
  })
  const first = inject(app, keyed('k'))
  await started.promise
  await t.rejects(store.abandon('k'), { message: /^No request with the key "k" without a scope is running/ })
  await t.rejects(store.abandon({ storageKey: 'x' }), { message: /^No request with the storage key "x" is running/ })
  await store.abandon({ storageKey: app.idempotency.hash('k') })
  t.same((await first).json(), { attempt: 1 })
  t.same((await app.inject(keyed('k'))).json(), { attempt: 2 })
})

t.test('while the store fails, a request gets 503, and nothing is left of its claim', async (t) => {
  const store = new MemoryStore()
  for (let calls = 0; calls < 4; calls++) {
    let left = calls
    const failing = Object.fromEntries(
      (['get', 'acquire'] as const).map((name) => [
        name,
        (...args: never[]) => (left-- > 0 ? call(store, name, args) : Promise.reject(new Error('the store is away')))
      ])
    )
    const { app, runs } = await at(t, { ...apart(store), ...failing }, 'C')
    t.equal((await app.inject(keyed('k'))).statusCode, 503, `after ${calls} calls`)
    t.same(runs, [])
    await until(async () => (await store.list(['running'])).keys.length === 0)
  }
  const { app } = await at(t, store, 'C')
  t.same((await app.inject(keyed('k'))).json(), { attempt: 1 })
})
