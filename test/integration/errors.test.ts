import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import {
  type IdempotencyEvent,
  type IdempotencyOptions,
  type IdempotencyStore,
  idempotencyEvents,
  MemoryStore,
  type StoredRecord
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, inject, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* The plugin's own errors, a store that fails, and what can be seen from outside. */

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

/** A store over the memory whose methods can be made to fail. */
function breakable() {
  const memory = new MemoryStore()
  const failing: Partial<Record<'acquire' | 'renew' | 'complete' | 'release', () => Promise<never>>> = {}
  const store: IdempotencyStore = {
    acquire: (...args) => failing.acquire?.() ?? memory.acquire(...args),
    renew: (...args) => failing.renew?.() ?? memory.renew(...args),
    complete: (...args) => failing.complete?.() ?? memory.complete(...args),
    release: (...args) => failing.release?.() ?? memory.release(...args),
    get: (key) => memory.get(key)
  }
  return { memory, store, failing }
}

const failures: Record<string, () => Promise<never>> = {
  'by rejecting': () => Promise.reject(new Error('down')),
  'by throwing': () => {
    throw new Error('down')
  },
  'by never answering': () => new Promise(() => {})
}

for (const [how, fail] of Object.entries(failures)) {
  t.test(`a store that fails at the claim, ${how}: 503 with Retry-After, and no handler`, async (t) => {
    const { store, failing } = breakable()
    const app = await build(t, { store, storeTimeout: 20 })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => ++runs)
    failing.acquire = fail
    const refused = await app.inject(keyed)
    t.same([refused.statusCode, codeOf(refused), runs], [503, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE', 0])
    t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
    delete failing.acquire
    t.equal((await app.inject(keyed)).body, '1')
  })

  t.test(`onStoreError 'bypass' runs the handler unprotected when the store fails ${how}`, async (t) => {
    const { store, failing } = breakable()
    const app = await build(t, { store, storeTimeout: 20, onStoreError: 'bypass' })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async (request) => [++runs, request.idempotency?.attempt])
    failing.acquire = fail
    t.same((await app.inject(keyed)).json(), [1, 0])
    t.same((await app.inject(keyed)).json(), [2, 0])
  })

  t.test(`a store that fails at completion, ${how}: the client gets its reply, and no retry runs`, async (t) => {
    const { store, failing } = breakable()
    const app = await build(t, { store, storeTimeout: 20, lease: 600 })
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async (_request, reply) => reply.code(201).send({ run: ++runs }))
    app.post('/stream', { config: { idempotency: true } }, async () => Readable.from(['do', 'ne']))
    failing.complete = fail
    const first = await app.inject(keyed)
    t.same([first.statusCode, first.json()], [201, { run: 1 }])
    const streamed = await app.inject({ ...keyed, url: '/stream', headers: { 'idempotency-key': 'stream' } })
    t.same([streamed.statusCode, streamed.body], [200, 'done'])
    t.equal((await app.inject(keyed)).headers[REPLAYED], 'true', 'this process still knows the reply')
    const elsewhere = await build(t, { store: { ...store } })
    elsewhere.post('/', { config: { idempotency: true } }, async () => ++runs)
    t.equal(codeOf(await elsewhere.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
    delete failing.complete
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    t.equal((await elsewhere.inject(keyed)).headers[REPLAYED], 'true')
    t.equal(runs, 1)
  })

  t.test(
    `a store that fails at a release, ${how}: the client gets the error of the handler, and the key comes free later`,
    async (t) => {
      const { store, failing } = breakable()
      const app = await build(t, { store, storeTimeout: 20 })
      let runs = 0
      app.post('/', { config: { idempotency: true } }, async () => {
        throw Object.assign(new Error(`run ${++runs}`), { statusCode: 507 })
      })
      failing.release = fail
      t.match((await app.inject(keyed)).json(), { statusCode: 507, message: 'run 1' })
      delete failing.release
      await until(async () => (await app.idempotency.get('k')) === null)
      t.match((await app.inject(keyed)).json(), { statusCode: 507, message: 'run 2' })
    }
  )
}

/** A process that has a reply which it could not store, and has been cut off from the store for longer than its lease. */
async function cutOff(t: Test, options: IdempotencyOptions = {}) {
  const { memory, store, failing } = breakable()
  const lease = 60
  const app = await build(t, { store, lease, storeTimeout: 20, ...options })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => reply.code(201).send(`run ${++runs}`))
  const fail = () => Promise.reject(new Error('down'))
  Object.assign(failing, { complete: fail, renew: fail })
  t.equal((await app.inject(keyed)).body, 'run 1')
  const isLapsed = async () => {
    const found = await memory.acquire(storageKey(null, 'k'), { ...claim, takeover: false })
    return found.state === 'abandoned'
  }
  const claim = { token: 'somebody else', fingerprint: '', leaseMs: 60_000, retainMs: 60_000 }
  await until(isLapsed)
  const overtake = async () => {
    await memory.acquire(storageKey(null, 'k'), { ...claim, takeover: true })
    const body = Buffer.from('theirs')
    const record: StoredRecord = {
      kind: 'reply',
      statusCode: 201,
      headers: [],
      body,
      text: true,
      fingerprint: '',
      createdAt: 0
    }
    t.equal(await memory.complete(storageKey(null, 'k'), claim.token, record, 60_000), true)
  }
  return { app, memory, failing, overtake, runs: () => runs }
}

t.test("a reply that could not be stored is nobody else's once another process may have the key", async (t) => {
  const { app, failing, overtake } = await cutOff(t)
  await overtake()
  Object.assign(failing, { acquire: failing.complete })
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  for (const step of ['acquire', 'complete', 'renew'] as const) delete failing[step]
  const replay = await app.inject(keyed)
  t.same([replay.body, replay.headers[REPLAYED]], ['theirs', 'true'])
})

t.test('a reply that could not be stored is stored before it is replayed, once its lease has lapsed', async (t) => {
  const { app, memory, failing, runs } = await cutOff(t)
  delete failing.complete
  const replay = await app.inject(keyed)
  t.same([replay.body, replay.headers[REPLAYED]], ['run 1', 'true'])
  t.equal((await memory.get(storageKey(null, 'k')))?.state, 'completed')
  t.equal(runs(), 1)
})

t.test('a store that has lost its data meanwhile gets the reply from the first who asks', async (t) => {
  const { app, memory, failing, runs } = await cutOff(t)
  t.equal(await memory.delete(storageKey(null, 'k')), true)
  delete failing.complete
  t.equal((await app.inject(keyed)).body, 'run 1')
  t.equal((await memory.get(storageKey(null, 'k')))?.state, 'completed')
  t.equal(runs(), 1)
})

t.test(
  "onStoreError 'bypass' replays what could not be stored rather than to run again, until it knows better",
  async (t) => {
    const { app, failing, overtake, runs } = await cutOff(t, { onStoreError: 'bypass' })
    Object.assign(failing, { acquire: failing.complete })
    t.equal((await app.inject(keyed)).body, 'run 1')
    await overtake()
    for (const step of ['acquire', 'complete', 'renew'] as const) delete failing[step]
    t.equal((await app.inject(keyed)).body, 'theirs')
    t.equal(runs(), 1)
  }
)

t.test('a reply that could not be stored is replayed for as long as its claim is renewed', async (t) => {
  const { memory, store, failing } = breakable()
  let renewals = 0
  const renew = async (...args: Parameters<IdempotencyStore['renew']>) => {
    renewals++
    return memory.renew(...args)
  }
  const app = await build(t, { store: { ...store, renew }, lease: 300 })
  app.post('/', { config: { idempotency: true } }, async () => 'reply')
  failing.complete = () => Promise.reject(new Error('down'))
  await app.inject(keyed)
  await until(() => renewals > 3, { message: 'more than a lease' })
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
})

t.test('a reply that could not be stored is no replay when the claim turns out to be lost', async (t) => {
  const { memory, store, failing } = breakable()
  let isLost = false
  const renew = async (...args: Parameters<IdempotencyStore['renew']>) => {
    const renewed = await memory.renew(...args)
    isLost = !renewed
    return renewed
  }
  const app = await build(t, { store: { ...store, renew }, lease: 900, hook: 'onRequest' })
  app.post('/', { config: { idempotency: true } }, async () => 'mine')
  failing.complete = () => Promise.reject(new Error('down'))
  t.equal((await app.inject(keyed)).body, 'mine')
  const key = storageKey(null, 'k')
  await memory.delete(key)
  const theirs = { token: 'theirs', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: false }
  t.match(await memory.acquire(key, theirs), { state: 'acquired' })
  await until(() => isLost)
  await sleep(1)
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  delete failing.complete
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
})

t.test(
  'a reply that could not be stored is asked for again when its replay has had to wait for the request',
  async (t) => {
    const { memory, store, failing } = breakable()
    let isLost = false
    const renew = async (...args: Parameters<IdempotencyStore['renew']>) => {
      const renewed = await memory.renew(...args)
      isLost = !renewed
      return renewed
    }
    const app = await build(t, { store: { ...store, renew }, lease: 900 })
    const [entered, leave] = [latch(), latch()]
    const preHandler = async (request: FastifyRequest) => {
      if (request.headers.late === undefined) return
      entered.open()
      await leave.promise
    }
    app.post('/', { config: { idempotency: true }, preHandler }, async () => 'mine')
    failing.complete = () => Promise.reject(new Error('down'))
    t.equal((await app.inject(keyed)).body, 'mine')
    const late = inject(app, { ...keyed, headers: { ...keyed.headers, late: 'yes' } })
    await entered.promise
    const key = storageKey(null, 'k')
    await memory.delete(key)
    const theirs = { token: 'theirs', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: false }
    t.match(await memory.acquire(key, theirs), { state: 'acquired' })
    await until(() => isLost)
    delete failing.complete
    leave.open()
    t.equal(codeOf(await late), 'FST_IDEMPOTENCY_IN_PROGRESS')
  }
)

t.test('a process does not take over from itself, however long it could not renew', async (t) => {
  const { memory, store, failing } = breakable()
  const app = await build(t, { store, lease: 60, storeTimeout: 20 })
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => {
    runs++
    entered.open()
    await leave.promise
    return 'reply'
  })
  const first = inject(app, keyed)
  await entered.promise
  failing.renew = () => Promise.reject(new Error('down'))
  await until(async () => (await memory.get(storageKey(null, 'k')))?.state === 'abandoned')
  delete failing.renew
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
  t.equal((await memory.get(storageKey(null, 'k')))?.state, 'running', 'it renews at once')
  leave.open()
  t.equal((await first).body, 'reply')
  t.same([(await app.inject(keyed)).body, runs], ['reply', 1])
})

t.test('why the store could not be asked is for the error handler', async (t) => {
  const why = new Error('down')
  const { store, failing } = breakable()
  const app = await build(t, { store })
  const seen: Error[] = []
  app.addHook('onError', async (_request, _reply, error) => void seen.push(error))
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  failing.acquire = () => Promise.reject(why)
  t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_STORE_UNAVAILABLE')
  t.equal(seen[0]?.cause, why)
})

t.test('a store that has lost its data gets the claim anew, which counts as any other', async (t) => {
  const { memory, store, failing } = breakable()
  const app = await build(t, { store, lease: 600 })
  const [entered, leave] = [latch<AbortSignal>(), latch()]
  app.post('/', { config: { idempotency: true } }, async (request) => {
    entered.open(request.idempotency?.signal as AbortSignal)
    await leave.promise
    return 'reply'
  })
  const first = inject(app, keyed)
  const signal = await entered.promise
  const key = storageKey(null, 'k')
  await memory.delete(key)
  await until(async () => (await memory.get(key))?.state === 'running')
  failing.complete = () => Promise.reject(new Error('down'))
  leave.open()
  t.equal((await first).body, 'reply')
  t.equal(signal.aborted, false)
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  delete failing.complete
  await until(async () => (await memory.get(key))?.state === 'completed')
})

t.test('a claim that was written although its answer came too late, or never, is given back', async (t) => {
  for (const written of ['before', 'after'] as const) {
    const memory = new MemoryStore()
    const late = latch()
    const acquire = memory.acquire.bind(memory)
    memory.acquire = async (...args) => {
      const found = written === 'before' ? acquire(...args) : null
      await late.promise
      return found ?? acquire(...args)
    }
    const app = await build(t, { store: memory, storeTimeout: 20 })
    app.post('/', { config: { idempotency: true } }, async (request) => request.idempotency?.attempt)
    t.equal((await app.inject(keyed)).statusCode, 503)
    if (written === 'before') await until(async () => (await app.idempotency.get('k')) === null)
    late.open()
    await sleep(5)
    await until(async () => (await app.idempotency.get('k')) === null)
    t.equal((await app.inject(keyed)).body, '1')
  }
})

t.test('a key that cannot be released holds up neither itself beyond its lease nor another key', async (t) => {
  const store = new MemoryStore()
  const release = store.release.bind(store)
  const failing = new Set(['bad', 'good'].map((key) => storageKey(null, key)))
  store.release = (key, token) => (failing.has(key) ? Promise.reject(new Error('down')) : release(key, token))
  const app = await build(t, { store, storeTimeout: 20, lease: 200 })
  const attempts: unknown[] = []
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    attempts.push(request.idempotency?.attempt)
    return reply.code(attempts.length > 2 ? 201 : 500).send()
  })
  for (const key of ['bad', 'good']) await app.inject({ ...keyed, headers: { 'idempotency-key': key } })
  failing.delete(storageKey(null, 'good'))
  await until(async () => (await app.idempotency.get('good')) === null)
  await until(async () => (await app.inject({ ...keyed, headers: { 'idempotency-key': 'bad' } })).statusCode === 201)
  t.same(attempts, [1, 1, 2])
})

t.test('renewals that fail for a while do not lose the claim', async (t) => {
  const { store, failing } = breakable()
  const app = await build(t, { store, lease: 90 })
  const leave = latch()
  let tried = 0
  failing.renew = () => {
    tried++
    return Promise.reject(new Error('down'))
  }
  app.post('/', { config: { idempotency: true } }, async (request) => {
    await leave.promise
    return request.idempotency?.signal.aborted
  })
  const first = inject(app, keyed)
  await until(() => tried >= 2)
  delete failing.renew
  leave.open()
  t.equal((await first).body, 'false')
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
})

t.test("the plugin's own replies are never stored, nor do they touch the claim", async (t) => {
  const memory = new MemoryStore()
  const written: string[] = []
  for (const name of ['complete', 'release'] as const) {
    const method = memory[name].bind(memory) as (...args: unknown[]) => Promise<boolean>
    memory[name] = (...args: unknown[]) => {
      written.push(name)
      return method(...args)
    }
  }
  const app = await build(t, { store: memory, required: true, shouldStore: () => true })
  const [entered, leave] = [latch(), latch()]
  app.post('/', { config: { idempotency: true } }, async () => {
    entered.open()
    await leave.promise
    return 'x'
  })
  const first = inject(app, keyed)
  await entered.promise
  t.equal((await app.inject(keyed)).statusCode, 409)
  t.equal((await app.inject({ ...keyed, url: '/?other' })).statusCode, 422)
  t.equal((await app.inject({ ...keyed, headers: { 'idempotency-key': '' } })).statusCode, 422)
  t.equal((await app.inject({ ...keyed, headers: {} })).statusCode, 400)
  t.same(written, [])
  leave.open()
  await first
  await app.inject(keyed)
  await app.inject({ ...keyed, payload: { other: true } })
  t.same(written, ['complete'])
})

t.test('a store that throws, answers without a promise, or answers nonsense, is a store that fails', async (t) => {
  const { store, memory } = breakable()
  for (const answer of [
    undefined,
    null,
    {},
    { state: 'odd' },
    { state: 'running' },
    { state: 'completed' },
    'acquired'
  ]) {
    const app = await build(t, { store: { ...store, acquire: (() => answer) as never } })
    app.post('/', { config: { idempotency: true } }, async () => 'x')
    t.equal((await app.inject(keyed)).statusCode, 503)
  }
  const changed = () => {
    throw new Error('broken')
  }
  const other = await build(t, { store: { ...store, changed }, onConflict: 'wait' })
  const [entered, leave] = [latch(), latch()]
  other.post('/', { config: { idempotency: true } }, async () => {
    entered.open()
    await leave.promise
    return 'x'
  })
  const first = inject(other, keyed)
  await entered.promise
  const duplicate = inject(other, keyed)
  await until(async () => (await memory.get(storageKey(null, 'k')))?.state === 'running')
  leave.open()
  await first
  t.equal((await duplicate).headers[REPLAYED], 'true')
})

t.test('the key is in no message and no log line', async (t) => {
  const lines: string[] = []
  const memory = new MemoryStore()
  const secret = 'very-secret-key'
  const app = await build(
    t,
    { store: memory, problemDetails: true },
    { logger: { level: 'trace', stream: { write: (line: string) => lines.push(line) } } }
  )
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  const request = { ...keyed, headers: { 'idempotency-key': secret } }
  const replies = [
    await app.inject(request),
    await app.inject(request),
    await app.inject({ ...request, payload: {} }),
    await app.inject({ ...keyed, headers: { 'idempotency-key': `${secret},b` } }),
    await app.inject({ ...keyed, headers: { 'idempotency-key': `"${secret}` } })
  ]
  memory.acquire = () => Promise.reject(new Error('down'))
  replies.push(await app.inject(request))
  for (const reply of replies) t.notMatch(reply.body, secret)
  t.ok(lines.some((line) => line.includes('idempotency acquired')))
  t.notMatch(lines.join('\n'), secret)
  const levelOf = (text: string) => JSON.parse(lines.find((line) => line.includes(text)) ?? '{}').level
  t.equal(levelOf('idempotency replayed'), 20)
  t.equal(levelOf('idempotency store failed'), 50)
})

t.test('a claim that could not be given back at once is told to be released when it was', async (t) => {
  const { memory, store, failing } = breakable()
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => reply.code(500).send())
  const seen: string[] = []
  for (const name of ['store-error', 'released']) {
    const listener = () => seen.push(name)
    subscribe(`fastify-idempotency:${name}`, listener)
    t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  }
  failing.release = () => Promise.reject(new Error('down'))
  await app.inject(keyed)
  t.same(seen, ['store-error'])
  delete failing.release
  await until(() => seen.length > 1)
  t.same(seen, ['store-error', 'released'])
  t.equal(await memory.get(storageKey(null, keyed.headers['idempotency-key'])), null)
})

t.test('a key that cannot be given back is in progress, not abandoned, until it is', async (t) => {
  const { memory, store, failing } = breakable()
  const options = { lease: 60, onAbandoned: 'reject' as const }
  const app = await build(t, { ...options, store })
  const elsewhere = await build(t, { ...options, store: { ...store } })
  let runs = 0
  for (const each of [app, elsewhere]) {
    each.post('/', { config: { idempotency: true } }, async (_request, reply) =>
      reply.code(++runs > 1 ? 200 : 500).send()
    )
  }
  failing.release = () => Promise.reject(new Error('full'))
  const leases: number[] = []
  const { renew } = memory
  memory.renew = (...args) => {
    leases.push(args[2])
    return renew.apply(memory, args)
  }
  t.equal((await app.inject(keyed)).statusCode, 500)
  await until(() => leases.length > 4, { message: 'more than one lease to pass' })
  t.equal(codeOf(await elsewhere.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
  delete failing.release
  await until(async () => (await elsewhere.inject(keyed)).statusCode === 200)
  t.equal(runs, 2)
})

t.test('every event is on its diagnostics channel, with the hashed key', async (t) => {
  const names =
    'acquired replayed conflict mismatch stored released tombstoned takeover lease-lost store-error bypassed'
  t.same(idempotencyEvents, [...names.split(' '), 'step-stored', 'step-resumed', 'refused', 'settled'])
  const seen: [string, IdempotencyEvent][] = []
  for (const name of names.split(' ')) {
    const listener = (message: unknown) => seen.push([name, message as IdempotencyEvent])
    subscribe(`fastify-idempotency:${name}`, listener)
    t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  }
  const { memory, store, failing } = breakable()
  const app = await build(t, { store, maxReplySize: 5 })
  const hold = latch()
  app.post('/do/:what', { config: { idempotency: { onStoreError: 'bypass', lease: 50 } } }, async (request, reply) => {
    const { what } = request.params as { what: string }
    if (what === 'fail') return reply.code(500).send()
    if (what === 'hold') await hold.promise
    return what === 'large' ? 'too large' : 'x'
  })
  const send = (what: string, payload = {}) =>
    inject(app, { method: 'POST', url: `/do/${what}`, headers: { 'idempotency-key': what }, payload })
  const events = () => seen.splice(0).map(([name]) => name)

  await send('run')
  t.same(events(), ['acquired', 'stored'])
  await send('run')
  t.same(events(), ['replayed'])
  await send('run', { other: true })
  t.same(events(), ['mismatch'])
  await send('fail')
  t.same(events(), ['acquired', 'released'])
  await send('large')
  t.same(events(), ['acquired', 'tombstoned'])
  failing.acquire = () => Promise.reject(new Error('down'))
  await send('run')
  const [failed] = seen
  t.match(failed?.[1].error, { message: 'down' })
  t.same(events(), ['store-error', 'bypassed'])
  delete failing.acquire
  const holding = send('hold')
  await until(() => seen.length === 1)
  const [first] = seen
  t.match(first?.[1], { key: storageKey(null, 'hold'), route: '/do/:what', attempt: 1 })
  t.equal(first?.[1].request?.url, '/do/hold')
  await send('hold')
  t.same(events(), ['acquired', 'conflict'])
  await memory.delete(storageKey(null, 'hold'))
  await memory.acquire(storageKey(null, 'hold'), {
    token: 'other',
    fingerprint: '',
    leaseMs: 60_000,
    retainMs: 1,
    takeover: false
  })
  await until(() => seen.length === 1)
  t.equal(seen[0]?.[1].loss, 'taken')
  t.same(events(), ['lease-lost'])
  hold.open()
  await holding
  t.same(events(), [])
  await memory.acquire(storageKey(null, 'again'), {
    token: 'dead',
    fingerprint: '',
    leaseMs: 1,
    retainMs: 60_000,
    takeover: false
  })
  await until(async () => (await memory.get(storageKey(null, 'again')))?.state === 'abandoned')
  await send('again')
  t.same(events(), ['acquired', 'takeover', 'stored'])
})

/* The application's own functions */

for (const option of ['getKey', 'skip', 'target', 'fingerprint'] as const)
  for (const [how, fail] of [
    [
      'throws',
      (error: Error) => {
        throw error
      }
    ],
    ['rejects', (error: Error) => Promise.reject(error)]
  ] as const) {
    if (option === 'target' && how === 'rejects') continue
    t.test(
      `where the option ${option} ${how}, the log names it, and its error is the answer; a 4xx is no failure`,
      async (t) => {
        const logged: { msg: string; err: { message: string } }[] = []
        const stream = { write: (line: string) => void logged.push(JSON.parse(line)) }
        const app = await build(t, {}, { logger: { level: 'error', stream } })
        let statusCode: number | undefined
        const failing = () => fail(Object.assign(new Error('no such member'), statusCode && { statusCode }))
        let runs = 0
        app.post('/', { config: { idempotency: { [option]: failing } } }, async () => ++runs)
        const failed = await app.inject(keyed)
        t.match([failed.statusCode, failed.json().message, runs], [500, 'no such member', 0])
        t.same(
          logged.filter(({ msg }) => msg.startsWith('idempotency')).map(({ msg, err }) => [msg, err.message]),
          [[`idempotency option ${option} failed`, 'no such member']]
        )
        statusCode = 403
        logged.length = 0
        t.equal((await app.inject(keyed)).statusCode, 403)
        t.same(logged, [])
      }
    )
  }
