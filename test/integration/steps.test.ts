import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import {
  EncryptedStore,
  type IdempotencyEvent,
  type IdempotencyOptions,
  type IdempotencyRouteOptions,
  type IdempotencyStore,
  MemoryStore,
  type RequestIdempotency,
  type Step,
  type TransactionalStep,
  type Transactions
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, elsewhere, inject, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* What a handler does in steps is done once: a rerun goes on behind the last finished one. */

const KEY = storageKey(null, 'k')
const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

type Handler = (operation: RequestIdempotency, request: FastifyRequest) => unknown

/** An app with one route, whose handler is given what it may do with its operation. */
async function route(
  t: Test,
  handler: Handler,
  options: IdempotencyRouteOptions = {},
  registration: IdempotencyOptions = {}
) {
  const app = await build(t, registration)
  app.post('/', { config: { idempotency: options } }, async (request) =>
    handler(request.idempotency as RequestIdempotency, request)
  )
  return app
}

/** The names of the events about steps, and of which step. */
function heard(t: Test): string[] {
  const events: string[] = []
  for (const name of ['step-stored', 'step-resumed']) {
    const hear = (message: unknown) => events.push(`${name} ${(message as IdempotencyEvent).step}`)
    subscribe(`fastify-idempotency:${name}`, hear)
    t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, hear))
  }
  return events
}

/** A handler that fails in its first attempts, between steps that are counted. */
function failing(after: string, times = 1) {
  const runs: Record<string, number> = {}
  const attempts: number[] = []
  let failures = 0
  const handler: Handler = async ({ step, attempt }) => {
    attempts.push(attempt)
    const results: unknown[] = []
    for (const name of ['a', 'b', 'c']) {
      results.push(
        await step(name, () => {
          runs[name] = (runs[name] ?? 0) + 1
          return `${name}${runs[name]}`
        })
      )
      if (name === after && failures++ < times) throw new Error('interrupted')
    }
    return results
  }
  return { runs, attempts, handler }
}

/** The key is somebody else's from now on. */
async function steal(store: IdempotencyStore): Promise<void> {
  await store.delete?.(KEY)
  const other = { token: 'other', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: true }
  await store.acquire(KEY, other)
}

t.test('after a failure a retry runs at once, as the next attempt, behind the last finished step', async (t) => {
  for (const [after, runs] of [
    ['a', { a: 1, b: 1, c: 1 }],
    ['b', { a: 1, b: 1, c: 1 }],
    ['c', { a: 1, b: 1, c: 1 }]
  ] as const) {
    const scene = failing(after, 2)
    const app = await route(t, scene.handler)
    for (const status of [500, 500, 200]) t.equal((await app.inject(keyed)).statusCode, status)
    const again = await app.inject(keyed)
    t.strictSame([again.json(), again.headers[REPLAYED]], [['a1', 'b1', 'c1'], 'true'])
    t.strictSame([scene.runs, scene.attempts], [runs, [1, 2, 3]])
  }
})

t.test('after the death of its owner a retry goes on behind the last finished step', async (t) => {
  const store = new MemoryStore()
  const hanging = latch()
  let runs = 0
  const handler: Handler = async ({ step, attempt }) => {
    const charge = await step('charge', () => ++runs)
    if (attempt === 1) await hanging.promise
    return { charge, attempt }
  }
  const dead = await route(t, handler, { lease: 100 }, { store })
  const first = inject(dead, keyed)
  await until(() => runs === 1)
  // Its process stands still: nothing renews the claim.
  const renew = store.renew
  store.renew = () => new Promise(() => {})
  const app = await route(t, handler, { lease: 100, onAbandoned: 'rerun' }, { store: elsewhere(store) })
  await until(async () => (await app.inject(keyed)).statusCode === 200)
  t.same((await app.inject(keyed)).json(), { charge: 1, attempt: 2 })
  t.equal(runs, 1)
  store.renew = renew
  hanging.open()
  await first
})

t.test("with onAbandoned 'reject' a failure is not an unknown outcome: a retry goes on", async (t) => {
  const scene = failing('b')
  const app = await route(t, scene.handler, { onAbandoned: 'reject' })
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.strictSame(scene.runs, { a: 1, b: 1, c: 1 })
})

t.test('discard() keeps the steps', async (t) => {
  let runs = 0
  const app = await route(t, async ({ step, attempt, discard }) => {
    await step('a', () => ++runs)
    if (attempt === 1) discard()
    return { attempt }
  })
  t.same((await app.inject(keyed)).json(), { attempt: 1 })
  t.same((await app.inject(keyed)).json(), { attempt: 2 })
  t.equal(runs, 1)
})

t.test('another payload under the key is refused, and leaves the steps in peace', async (t) => {
  const scene = failing('b')
  const app = await route(t, scene.handler)
  const other = { ...keyed, payload: { other: true } }
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.same([(await app.inject(other)).statusCode, codeOf(await app.inject(other))], [422, 'FST_IDEMPOTENCY_KEY_REUSED'])
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.strictSame(scene.runs, { a: 1, b: 1, c: 1 })
})

t.test('a final reply ends the steps, and delete() forgets them', async (t) => {
  const store = new MemoryStore()
  const scene = failing('b', 2)
  const app = await route(t, scene.handler, {}, { store })
  await app.inject(keyed)
  t.match(await app.idempotency.get('k'), {
    state: 'abandoned',
    attempt: 1,
    ended: true,
    steps: [
      ['a', '"a1"'],
      ['b', '"b1"']
    ]
  })
  await app.idempotency.delete('k')
  await app.inject(keyed)
  t.strictSame(scene.runs, { a: 2, b: 2 })
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.notOk('steps' in ((await app.idempotency.get('k')) as object))
  t.strictSame(scene.attempts, [1, 1, 2])
})

t.test('what a step gives is what JSON makes of it, on the first attempt too', async (t) => {
  const at = new Date(0)
  const values: [given: unknown, got: unknown][] = [
    [at, at.toJSON()],
    [
      { at, gone: undefined, list: [1, 'a', null] },
      { at: at.toJSON(), list: [1, 'a', null] }
    ],
    [undefined, undefined],
    [null, null],
    ['undefined', 'undefined'],
    ['!', '!'],
    ['transaction', 'transaction'],
    [{ toJSON: () => ({ shown: 1 }) }, { shown: 1 }],
    [
      new (class Order {
        id = 1
      })(),
      { id: 1 }
    ],
    [
      { none: [], empty: {}, bare: Object.create(null) },
      { none: [], empty: {}, bare: {} }
    ],
    [
      [Object(1), Object('a'), Object(false)],
      [1, 'a', false]
    ],
    ['\0\n\u2028😀', '\0\n\u2028😀']
  ]
  const seen: unknown[][] = []
  const app = await route(t, async ({ step, attempt }) => {
    const results: unknown[] = []
    for (const [n, [given]] of values.entries()) results.push(await step(`s${n}`, () => given))
    seen.push(results)
    if (attempt === 1) throw new Error('interrupted')
    return {}
  })
  for (const _ of [1, 2]) await app.inject(keyed)
  const expected = values.map(([, got]) => got)
  t.strictSame(seen, [expected, expected])
})

t.test('results are kept as JSON, and what is none as a word', async (t) => {
  const db = new FakeTransactions()
  const app = await route(t, async ({ step }) => {
    await step('nothing', () => {})
    await step('text', () => 'undefined')
    await step('order', db, () => 1)
    await step('lost', () => 1n as never).catch(() => {})
    throw new Error('interrupted')
  })
  await app.inject(keyed)
  const reason = '!its result is a bigint, which JSON cannot keep: return what it can, an id perhaps'
  t.match(await app.idempotency.get('k'), {
    steps: [
      ['nothing', 'undefined'],
      ['text', '"undefined"'],
      ['order', 'transaction'],
      ['lost', reason]
    ]
  })
})

t.test('what JSON cannot keep fails the step by its place, and is never done again', async (t) => {
  const cases: [given: unknown, message: RegExp][] = [
    [1n, /its result is a bigint/],
    [{ items: [{ price: Number.NaN }] }, /its result\.items\[0\]\.price is NaN/],
    [{ 'a b': new Map([[1, 2]]) }, /its result\["a b"\] is a value of type Map/],
    [[new Set()], /its result\[0\] is a value of type Set/],
    [[undefined], /its result\[0\] is undefined/],
    [() => {}, /its result is a function/],
    [Symbol('s'), /its result is a symbol/],
    [Buffer.from('b'), /its result is a value of type Buffer/],
    [new Error('e'), /its result is a value of type Error/],
    [new Date(Number.NaN), /its result is an invalid Date/],
    [{ p: Promise.resolve() }, /its result\.p is a value of type Promise/],
    [new Headers(), /its result is a value of type Headers/],
    [/r/, /its result is a value of type RegExp/],
    [Object.assign(new Map(), { own: 1 }), /its result is a value of type Map/],
    [Object.assign(new Set(), { own: 1 }), /its result is a value of type Set/],
    [Object.assign(new TypeError('e'), { code: 1 }), /its result is a value of type TypeError/],
    [{ p: Object.assign(Promise.resolve(), { own: 1 }) }, /its result\.p is a value of type Promise/],
    [new (class {})(), /its result is \[?{?.*\(object\)/],
    [circular(), /its result\.self makes an error \(Converting circular structure/],
    ['x'.repeat(70_000), /the results of all steps take 700\d\d bytes, of 65536 allowed/]
  ]
  for (const [given, message] of cases) {
    let runs = 0
    const app = await route(t, async ({ step }) => {
      await step('a', () => {
        runs++
        return given
      })
    })
    for (const _ of [1, 2]) {
      const reply = await app.inject(keyed)
      t.same([reply.statusCode, codeOf(reply)], [500, 'FST_IDEMPOTENCY_STEP'])
      t.match(reply.json().message, message)
      t.match(reply.json().message, /^the step "a" is done, but /)
    }
    t.equal(runs, 1)
  }
})

function circular(): object {
  const value: { self?: unknown } = {}
  value.self = value
  return value
}

t.test('maxStepsSize bounds the names and results of all steps together', async (t) => {
  const sizes: number[] = []
  const app = await route(
    t,
    async ({ step }) => {
      // A name of one byte, and two quotes.
      await step('a', () => 'x'.repeat(7))
      await step('b', () => 'x'.repeat(7))
      sizes.push(20)
      await step('c', () => '')
    },
    { maxStepsSize: 20 }
  )
  for (const _ of [1, 2]) t.match((await app.inject(keyed)).json().message, /take 23 bytes, of 20 allowed/)
  t.same(sizes, [20, 20])
})

t.test('the steps of earlier attempts count as well', async (t) => {
  const app = await route(
    t,
    async ({ step, attempt }) => {
      if (attempt === 1) {
        await step('a', () => 'x'.repeat(10))
        throw new Error('interrupted')
      }
      await step('b', () => 'x'.repeat(5))
    },
    { maxStepsSize: 20 }
  )
  await app.inject(keyed)
  t.match((await app.inject(keyed)).json().message, /take 21 bytes, of 20 allowed/)
})

t.test('what a step throws is passed on, and it may run again, in this attempt or the next', async (t) => {
  const declined = Object.assign(new Error('declined'), { statusCode: 503 })
  const failingTwice = () => {
    let calls = 0
    return () => {
      if (++calls < 3) throw declined
      return `${calls}`
    }
  }
  const charge = failingTwice()
  const insert = failingTwice()
  const commit = failingTwice()
  const unreliable: Transactions<null> = {
    async once({ fingerprint }, work) {
      const result = await work(null)
      commit()
      return { result, fingerprint, resumed: false }
    },
    forget: async () => false
  }
  const db = new FakeTransactions()
  for (const attempt of [
    (step: Step) => step('charge', charge),
    (step: Step) => step('order', db, insert),
    (step: Step) => step('receipt', unreliable, () => '3')
  ]) {
    const app = await route(t, ({ step }) => attempt(step).catch(() => attempt(step)))
    t.equal((await app.inject(keyed)).statusCode, 503)
    t.equal((await app.inject(keyed)).body, '3')
  }
})

t.test('each step has a key for the service that it calls: that of deriveKey, on every attempt', async (t) => {
  const keys: string[][] = []
  const app = await route(t, async ({ step, deriveKey, attempt }) => {
    const seen: string[] = []
    keys.push(seen)
    // The first fails in its step, so that it runs again.
    await step('charge', ({ key }) => {
      seen.push(key)
      if (attempt === 1 && seen.length === 1) throw new Error('away')
    }).catch(() => {})
    seen.push(deriveKey('charge'), deriveKey('other'))
    await step('other', ({ key, signal }) => {
      seen.push(key)
      return signal.aborted
    })
    throw new Error('interrupted')
  })
  for (const _ of [1, 2]) await app.inject(keyed)
  const [[charge, same, other, alsoOther], second] = keys as [string[], string[]]
  t.strictSame([charge, other], [same, alsoOther])
  t.not(charge, other)
  t.same(second, [charge, charge, other])
})

t.test('steps may run side by side', async (t) => {
  const gates = [latch(), latch()]
  let runs = 0
  const app = await route(t, async ({ step, attempt }) => {
    const work = gates.map(({ promise }, n) =>
      step(`s${n}`, async () => {
        runs++
        await promise
        return n
      })
    )
    const results = await Promise.all(work)
    if (attempt === 1) throw new Error('interrupted')
    return results
  })
  const first = inject(app, keyed)
  await until(() => runs === 2)
  gates[1]?.open()
  gates[0]?.open()
  t.equal((await first).statusCode, 500)
  t.same((await app.inject(keyed)).json(), [0, 1])
  t.equal(runs, 2)
})

t.test(
  'a handler that fails while a step runs keeps its key until the step has ended, and is not held up',
  async (t) => {
    const slow = latch()
    const runs = { slow: 0, fast: 0 }
    const app = await route(t, async ({ step, attempt }) => {
      const work = step('slow', async () => {
        runs.slow++
        await slow.promise
        return 'done'
      })
      if (attempt > 1) return work
      work.catch(() => {})
      await step('fast', () => {
        runs.fast++
        throw new Error('declined')
      })
      return {}
    })
    t.equal((await app.inject(keyed)).statusCode, 500)
    t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
    slow.open()
    await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
    t.equal((await app.inject(keyed)).body, 'done')
    t.same(runs, { slow: 1, fast: 1 })
  }
)

t.test('a step that still runs when the reply is stored is a warning with its name', async (t) => {
  const lines: string[] = []
  const slow = latch()
  const done: unknown[] = []
  const app = await build(t, {}, { logger: { level: 'warn', stream: { write: (line: string) => lines.push(line) } } })
  app.post('/waits', { config: { idempotency: true } }, async (request) =>
    request.idempotency?.step('waited for', () => 'ok')
  )
  app.post('/', { config: { idempotency: true } }, async (request) => {
    void request.idempotency?.step('forgotten', () => slow.promise).then((value) => done.push(value))
    return 'ok'
  })
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.match(JSON.parse(lines.join()), { steps: ['forgotten'], msg: /still run when the reply is stored/ })
  slow.open()
  await until(() => done.length === 1)
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  t.equal((await app.inject({ ...keyed, url: '/waits', headers: { 'idempotency-key': 'other' } })).body, 'ok')
  t.equal(lines.length, 1)
})

t.test('misuse is refused before anything runs', async (t) => {
  const ran: string[] = []
  const run = () => void ran.push('x')
  const cases: [use: (step: Step) => Promise<unknown>, message: RegExp][] = [
    [(step) => step('', run), /name of 1 to 255 bytes/],
    [(step) => step('é'.repeat(128), run), /name of 1 to 255 bytes/],
    [(step) => step(7 as never, run), /name of 1 to 255 bytes/],
    [(step) => step('a\ud800', run), /name of 1 to 255 bytes of well-formed text/],
    [(step) => step('a', undefined as never), /takes a function/],
    [(step) => step('a', {} as never, run), /takes transactions, as those of sqlTransactions\(\)/],
    [(step) => step('a', null as never, run), /takes transactions/],
    [(step) => Promise.all([step('a', () => 1), step('a', run)]), /"a" is used for two steps/],
    [(step) => step('a', () => 1).then(() => step('a', run)), /"a" is used for two steps/]
  ]
  for (const [use, message] of cases) {
    const app = await route(t, ({ step }) => use(step))
    const reply = await app.inject(keyed)
    t.same([reply.statusCode, codeOf(reply)], [500, 'FST_IDEMPOTENCY_STEP'])
    t.match(reply.json().message, message)
  }
  t.same(ran, [])
})

t.test('the longest name has 255 bytes', async (t) => {
  const app = await route(t, ({ step }) => step(`${'é'.repeat(127)}x`, () => 'ok'))
  t.equal((await app.inject(keyed)).body, 'ok')
})

t.test('a store without steps is refused by name, and a step comes too late behind the reply', async (t) => {
  const { step: _, ...store } = elsewhere(new MemoryStore())
  const without = await route(t, ({ step }) => step('a', () => 1), {}, { store })
  t.match((await without.inject(keyed)).json(), { code: 'FST_IDEMPOTENCY_STEP', message: /no method "step"/ })

  const late = latch<unknown>()
  const app = await build(t)
  app.post('/', { config: { idempotency: true } }, (request, reply) => {
    reply.raw.on('close', () => request.idempotency?.step('a', () => 1).catch(late.open))
    reply.send('ok')
  })
  await app.inject(keyed)
  t.match(await late.promise, { code: 'FST_IDEMPOTENCY_STEP', message: /comes when the request is over/ })
})

t.test('under a claim that was lost no step begins, and what one has done is not kept', async (t) => {
  for (const loss of ['before', 'in'] as const) {
    const store = new MemoryStore()
    const ran: string[] = []
    const app = await route(
      t,
      async ({ step, signal }) => {
        await step('first', () => 1)
        if (loss === 'before') {
          await steal(store)
          await until(() => signal.aborted)
        }
        await step('second', async () => {
          ran.push('second')
          await steal(store)
        })
      },
      { lease: 60 },
      { store }
    )
    const reply = await app.inject(keyed)
    t.same([reply.statusCode, codeOf(reply)], [409, 'FST_IDEMPOTENCY_CLAIM_LOST'])
    t.equal(reply.headers['retry-after'], '1')
    t.same(ran, loss === 'before' ? [] : ['second'])
    t.match(await store.get(KEY), { state: 'running', fingerprint: '' })
  }
})

t.test('a process that stood still for longer than its lease asks before it begins a step', async (t) => {
  const store = new MemoryStore()
  const ran: string[] = []
  const app = await route(
    t,
    async ({ step }) => {
      // Nothing else runs meanwhile, no renewal either.
      const end = performance.now() + 60
      while (performance.now() < end);
      void steal(store)
      await step('second', () => void ran.push('second'))
    },
    { lease: 50 },
    { store }
  )
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_CLAIM_LOST')
  t.same(ran, [])
})

t.test('errors of steps are problem details where that is wanted, with Retry-After where a retry helps', async (t) => {
  const store = new MemoryStore()
  const app = await route(
    t,
    async ({ step, attempt }) => {
      if (attempt === 1) await step('', () => 1)
    },
    { problemDetails: true },
    { store }
  )
  app.post('/lost', { config: { idempotency: { problemDetails: true } } }, async ({ idempotency }) =>
    idempotency?.step('a', () => steal(store))
  )
  for (const [url, status, code, retryAfter] of [
    ['/', 500, 'FST_IDEMPOTENCY_STEP', undefined],
    ['/lost', 409, 'FST_IDEMPOTENCY_CLAIM_LOST', '1']
  ] as const) {
    const reply = await app.inject({ ...keyed, url })
    t.equal(reply.headers['content-type'], 'application/problem+json')
    t.match(reply.json(), { status, code })
    t.equal(reply.headers['retry-after'], retryAfter)
  }
})

t.test('a refusal in a handler is never stored as its reply, whatever shouldStore says', async (t) => {
  const store = new MemoryStore()
  let runs = 0
  const foreign: Transactions<null> = {
    once: async () => ({ result: '1', fingerprint: 'another.payload', resumed: true }),
    forget: async () => false
  }
  const app = await route(
    t,
    async ({ step }) => (++runs === 1 ? step('a', foreign, () => 1) : { runs }),
    { shouldStore: () => true },
    { store }
  )
  const reply = await app.inject(keyed)
  t.same([reply.statusCode, codeOf(reply)], [422, 'FST_IDEMPOTENCY_KEY_REUSED'])
  t.same((await app.inject(keyed)).json(), { runs: 2 })
})

t.test('what the store does not take at once it gets later, and a failure of the handler waits for it', async (t) => {
  const store = new MemoryStore()
  const { step } = store
  let isAway = true
  store.step = (...args) => (isAway ? Promise.reject(new Error('away')) : step.apply(store, args))
  const scene = failing('b')
  const app = await route(t, scene.handler, { lease: 2_000 }, { store })
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
  isAway = false
  await until(async () => (await store.get(KEY))?.state === 'abandoned')
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.strictSame(scene.runs, { a: 1, b: 1, c: 1 })
})

t.test('a store that loses its data gets the steps anew with the claim', async (t) => {
  const store = new MemoryStore()
  const scene = failing('b')
  const app = await route(
    t,
    async (operation, request) => {
      const { step, attempt } = operation
      await step('early', () => 1)
      if (attempt === 1) {
        await store.delete(KEY)
        await until(async () => (await store.get(KEY)) !== null)
      }
      return scene.handler(operation, request)
    },
    { lease: 60 },
    { store }
  )
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.match(await store.get(KEY), {
    steps: [
      ['early', '1'],
      ['a', '"a1"'],
      ['b', '"b1"']
    ]
  })
  t.equal((await app.inject(keyed)).statusCode, 200)
  t.strictSame(scene.runs, { a: 1, b: 1, c: 1 })
})

t.test('where the store is away and the route runs all the same, steps run and nothing is kept', async (t) => {
  const store = new MemoryStore()
  store.acquire = () => Promise.reject(new Error('away'))
  let runs = 0
  const app = await route(
    t,
    async ({ step, attempt }) => [attempt, await step('a', () => ++runs)],
    { onStoreError: 'bypass' },
    { store }
  )
  t.same((await app.inject(keyed)).json(), [0, 1])
  t.same((await app.inject(keyed)).json(), [0, 2])
})

t.test('steps are heard of by name when they are stored, and when they are resumed', async (t) => {
  const events = heard(t)
  const app = await route(t, failing('b').handler)
  await app.inject(keyed)
  t.same(events, ['step-stored a', 'step-stored b'])
  await app.inject(keyed)
  t.same(events.slice(2), ['step-resumed a', 'step-resumed b', 'step-stored c'])
})

t.test('in an encrypted store the results of steps cannot be read', async (t) => {
  const memory = new MemoryStore()
  const store = new EncryptedStore(memory, { keys: [Buffer.alloc(32, 7)] })
  const scene = failing('a')
  const app = await route(t, scene.handler, {}, { store })
  await app.inject(keyed)
  const found = (await memory.get(KEY)) as unknown as { steps: [string, string][] }
  t.equal(found.steps[0]?.[0], 'a')
  t.notMatch(found.steps[0]?.[1], /a1/)
  t.same((await app.inject(keyed)).json(), ['a1', 'b1', 'c1'])
})

/* In transactions */

/** A database of one map: what is done in a transaction is there when it is committed. */
class FakeTransactions implements Transactions<Map<string, unknown>> {
  readonly committed = new Map<string, { result: string; fingerprint: string }>()
  readonly effects = new Map<string, unknown>()
  readonly steps: TransactionalStep[] = []

  async once(step: TransactionalStep, work: (tx: Map<string, unknown>) => Promise<string>) {
    this.steps.push(step)
    const id = `${step.operation} ${step.name}`
    const known = this.committed.get(id)
    if (known !== undefined) return { ...known, resumed: true }
    const tx = new Map<string, unknown>()
    const row = { result: await work(tx), fingerprint: step.fingerprint }
    this.committed.set(id, row)
    for (const [key, value] of tx) this.effects.set(key, value)
    return { ...row, resumed: false }
  }

  async forget() {
    return false
  }
}

t.test('a step in a transaction is committed with its result, and resumed from there', async (t) => {
  const db = new FakeTransactions()
  const store = new MemoryStore()
  const events = heard(t)
  const attempts: number[] = []
  const app = await route(
    t,
    async ({ step, attempt }) => {
      attempts.push(attempt)
      const order = await step('order', db, (tx, { key }) => {
        tx.set(`order ${attempt}`, key)
        return { id: attempt, at: new Date(0) }
      })
      if (attempt === 1) throw new Error('interrupted')
      return order
    },
    { ttl: 1_000, lease: 2_000 },
    { store }
  )
  const before = Date.now()
  await app.inject(keyed)
  t.match(await store.get(KEY), { state: 'abandoned', attempt: 1, ended: true })
  t.same((await app.inject(keyed)).json(), { id: 1, at: '1970-01-01T00:00:00.000Z' })
  t.same([...db.effects.keys()], ['order 1'])
  t.same(attempts, [1, 2])
  t.same(events, ['step-stored order', 'step-resumed order'])
  const forEver = await route(t, ({ step }) => step('order', db, () => 1), { ttl: null })
  await forEver.inject({ ...keyed, headers: { 'idempotency-key': 'for ever' } })
  t.equal(db.steps.at(-1)?.expiresAt, null)
  const [step] = db.steps as [TransactionalStep]
  t.match(step, { operation: KEY, name: 'order' })
  t.ok((step.expiresAt as number) >= before + 3_000 && (step.expiresAt as number) <= Date.now() + 3_000)
})

t.test('what a step in a transaction throws, or JSON cannot keep, undoes it: it runs again', async (t) => {
  const db = new FakeTransactions()
  let runs = 0
  const app = await route(t, async ({ step }) =>
    step('order', db, (tx) => {
      tx.set(`order ${++runs}`, true)
      if (runs === 1) throw new Error('interrupted')
      return runs === 2 ? (1n as never) : runs
    })
  )
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.match((await app.inject(keyed)).json().message, /^the step "order" is undone: its result is a bigint/)
  t.equal((await app.inject(keyed)).body, '3')
  t.same([...db.effects.keys()], ['order 3'])
})

t.test('a step is not committed under a claim that was lost', async (t) => {
  const db = new FakeTransactions()
  const store = new MemoryStore()
  const app = await route(
    t,
    ({ step }) =>
      step('order', db, async (tx) => {
        tx.set('order', true)
        await steal(store)
      }),
    {},
    { store }
  )
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_CLAIM_LOST')
  t.equal(db.effects.size, 0)
})

t.test('steps in transactions need nothing of the store: it may have no steps, be away, or forget', async (t) => {
  const db = new FakeTransactions()
  const memory = new MemoryStore()
  const { step: _, ...store } = elsewhere(memory)
  let isAway = false
  const acquire = store.acquire
  store.acquire = (...args) => (isAway ? Promise.reject(new Error('away')) : acquire(...args))
  let runs = 0
  const app = await route(
    t,
    async ({ step }) => {
      const id = await step('order', db, () => ++runs)
      if (runs === 1 && !isAway) throw new Error('interrupted')
      return id
    },
    { onStoreError: 'bypass' },
    { store }
  )
  t.equal((await app.inject(keyed)).statusCode, 500)
  isAway = true
  t.equal((await app.inject(keyed)).body, '1')
  await memory.delete(KEY)
  isAway = false
  runs = 7
  t.equal((await app.inject(keyed)).body, '1')
})

t.test('the name of a step says of what kind it is', async (t) => {
  const db = new FakeTransactions()
  let attempt = 0
  const app = await route(t, async ({ step }) => {
    switch (++attempt) {
      case 1:
        await step('a', db, () => 1)
        await step('b', () => 2)
        throw new Error('interrupted')
      case 2:
        return step('a', () => 3)
      default:
        // A plain step that is finished is resumed wherever it would run now.
        return step('b', db, () => 4)
    }
  })
  await app.inject(keyed)
  t.match((await app.inject(keyed)).json(), {
    code: 'FST_IDEMPOTENCY_STEP',
    message: /took transactions in an earlier/
  })
  t.equal((await app.inject(keyed)).body, '2')
})
