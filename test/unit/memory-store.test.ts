import { createHook } from 'node:async_hooks'
import { getEventListeners } from 'node:events'
import t, { type Test } from 'tap'
import { sizeOf } from '../../lib/stores/memory/entry.js'
import { MemoryStore, type MemoryStoreOptions } from '../../lib/stores/memory/memory-store.js'
import { RELEASE_MEMORY_MS } from '../../lib/stores/release-memory.js'
import type { Claim, StoredReply } from '../../types/index.js'
import { until } from '../support/latch.js'
import { VirtualTime } from '../support/virtual-time.js'

const MINUTE = 60_000
const DAY = 86_400_000

const claim = (token: string, members: Partial<Claim> = {}): Claim => ({
  token,
  fingerprint: 'f',
  leaseMs: MINUTE,
  retainMs: MINUTE,
  takeover: true,
  ...members
})

const reply = (body: string | Buffer = '', headers: StoredReply['headers'] = []): StoredReply => ({
  kind: 'reply',
  fingerprint: 'f',
  createdAt: 1,
  statusCode: 200,
  headers,
  body: Buffer.from(body as string),
  text: typeof body === 'string'
})

/** Claims a key and finishes it. */
async function finish(store: MemoryStore, key: string, record = reply(), ttlMs: number | null = MINUTE): Promise<void> {
  await store.acquire(key, claim(key))
  await store.complete(key, key, record, ttlMs)
}

/** What the store knows of these keys, in one word each. */
async function states(store: MemoryStore, ...keys: string[]): Promise<string[]> {
  return Promise.all(keys.map(async (key) => (await store.get(key))?.state ?? 'free'))
}

const FULL = (entries: number) => ({
  name: 'StoreFull',
  code: 'FST_IDEMPOTENCY_STORE_FULL',
  message: `MemoryStore is full: ${entries} claims are running`
})

/** The timers of all kinds that are started from here on and still run, others' included. */
function watchTimers(t: Test): Set<number> {
  const timers = new Set<number>()
  const hook = createHook({
    init(id, type) {
      if (type === 'Timeout') timers.add(id)
    },
    destroy(id) {
      timers.delete(id)
    }
  }).enable()
  t.teardown(() => hook.disable())
  return timers
}

t.test('the options have defaults, and undefined counts as left out', async (t) => {
  for (const options of [undefined, {}, { maxEntries: undefined, maxBytes: undefined }]) {
    const store = new MemoryStore(options as MemoryStoreOptions)
    await finish(store, 'a', reply(Buffer.alloc(10_000_000)))
    t.match(await store.get('a'), { state: 'completed', record: { kind: 'reply' } })
  }
})

t.test('wrong options are refused, with their name, what they take and what they got', async (t) => {
  for (const [name, takes] of [
    ['maxEntries', 'a positive integer'],
    ['maxBytes', 'a positive integer of bytes']
  ] as const) {
    for (const [value, got] of [
      [0, '0 (number)'],
      [-1, '-1 (number)'],
      [1.5, '1.5 (number)'],
      [Number.NaN, 'NaN (number)'],
      [Number.POSITIVE_INFINITY, 'Infinity (number)'],
      ['10', "'10' (string)"],
      [true, 'true (boolean)'],
      [{}, '{} (object)']
    ]) {
      t.throws(() => new MemoryStore({ [name]: value } as MemoryStoreOptions), {
        code: 'FST_IDEMPOTENCY_INVALID_OPTION',
        message: `MemoryStore option "${name}" takes ${takes}, got ${got}`
      })
    }
  }
})

t.test('an option that is not known is refused', async (t) => {
  for (const name of ['max', 'ttl', 'maxentries', 'constructor']) {
    t.throws(() => new MemoryStore({ [name]: 1 } as MemoryStoreOptions), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message: `MemoryStore option "${name}" is not known; known are maxEntries, maxBytes`
    })
  }
})

t.test('when there are too many entries the oldest replies go first', async (t) => {
  const store = new MemoryStore({ maxEntries: 3 })
  for (const key of ['a', 'b', 'c']) await finish(store, key)
  t.strictSame(await states(store, 'a', 'b', 'c'), ['completed', 'completed', 'completed'], 'three are not too many')
  await finish(store, 'd')
  t.strictSame(await states(store, 'a', 'b', 'c', 'd'), ['free', 'completed', 'completed', 'completed'])
  await finish(store, 'e')
  await finish(store, 'f')
  t.strictSame(await states(store, 'b', 'c', 'd', 'e', 'f'), ['free', 'free', 'completed', 'completed', 'completed'])
})

t.test('the oldest reply is the one that was finished first, whenever it was claimed', async (t) => {
  const store = new MemoryStore({ maxEntries: 3 })
  await store.acquire('early', claim('early'))
  await finish(store, 'a')
  await store.complete('early', 'early', reply(), MINUTE)
  await finish(store, 'b')
  await finish(store, 'c')
  t.strictSame(await states(store, 'a', 'early', 'b', 'c'), ['free', 'completed', 'completed', 'completed'])
})

t.test('a key that was forgotten and finished anew is the youngest', async (t) => {
  const store = new MemoryStore({ maxEntries: 3 })
  for (const key of ['a', 'b', 'c']) await finish(store, key)
  await store.delete('a')
  await finish(store, 'a')
  await finish(store, 'd')
  t.strictSame(await states(store, 'b', 'c', 'a', 'd'), ['free', 'completed', 'completed', 'completed'])
})

t.test('evicting goes on where it was, through thousands of replies', async (t) => {
  const store = new MemoryStore({ maxEntries: 10 })
  const expected: string[] = []
  for (let i = 0; i < 3_000; i++) {
    if (expected.length === 10) expected.shift()
    expected.push(`${i}`)
    await finish(store, `${i}`)
    // Now and then one from the middle, and once all of them.
    const gone = i % 7 === 0 ? expected.splice(i % 5, 1) : i === 2_000 ? expected.splice(0) : []
    for (const key of gone) t.equal(await store.delete(key), true)
  }
  const keys = Array.from({ length: 3_000 }, (_, i) => `${i}`)
  const found = await Promise.all(keys.map((key) => store.get(key)))
  t.strictSame(
    keys.filter((_, i) => found[i] !== null),
    expected
  )
})

t.test('a running claim is never evicted, however many replies come after it', async (t) => {
  const store = new MemoryStore({ maxEntries: 2 })
  await store.acquire('running', claim('owner'))
  for (let i = 0; i < 100; i++) await finish(store, `${i}`)
  t.match(await store.get('running'), { state: 'running', fingerprint: 'f' })
  t.equal(await store.complete('running', 'owner', reply('kept'), MINUTE), true)
  t.match(await store.get('running'), { state: 'completed', record: { body: Buffer.from('kept') } })
})

t.test('a store that is full of running claims refuses another, and harms none of them', async (t) => {
  const store = new MemoryStore({ maxEntries: 2 })
  await store.acquire('a', claim('a'))
  await store.acquire('b', claim('b'))
  await t.rejects(store.acquire('c', claim('c')), FULL(2))
  t.strictSame(await states(store, 'a', 'b', 'c'), ['running', 'running', 'free'])
  t.match(await store.acquire('a', claim('a')), { state: 'acquired' }, 'what is held needs no room')
  t.match(await store.acquire('a', claim('other')), { state: 'running' })
  await store.release('a', 'a')
  t.same(await store.acquire('c', claim('c')), { state: 'acquired', attempt: 1 })
})

t.test('a store that was full of running claims makes room again when they have ended', async (t) => {
  const store = new MemoryStore({ maxEntries: 2 })
  for (const key of ['a', 'b']) await store.acquire(key, claim(key))
  await t.rejects(store.acquire('c', claim('c')), FULL(2))
  for (const key of ['a', 'b']) await store.complete(key, key, reply(), MINUTE)
  for (const key of ['c', 'd']) await finish(store, key)
  t.strictSame(await states(store, 'a', 'b', 'c', 'd'), ['free', 'free', 'completed', 'completed'])
})

t.test('claims never cost a reply its place, however many come and go', async (t) => {
  const store = new MemoryStore({ maxEntries: 2 })
  for (const key of ['a', 'b']) await finish(store, key)
  for (let n = 0; n < 10; n++) {
    await store.acquire(`${n}`, claim('refused'))
    await store.release(`${n}`, 'refused')
  }
  for (const key of ['c', 'd']) await store.acquire(key, claim(key))
  await t.rejects(store.acquire('e', claim('e')), FULL(2))
  t.strictSame(await states(store, 'a', 'b', 'c', 'd', 'e'), ['completed', 'completed', 'running', 'running', 'free'])
  await store.complete('c', 'c', reply(), MINUTE)
  t.strictSame(await states(store, 'a', 'b', 'c', 'd'), ['free', 'completed', 'completed', 'running'])
})

t.test('a full store of thousands of claims refuses another without looking through them all', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore({ maxEntries: 5_000 })
  for (let n = 0; n < 5_000; n++) await store.acquire(`${n}`, claim('a'))
  let looks = 0
  const { [Symbol.iterator]: iterate, entries } = Map.prototype
  const counted = function (this: Map<unknown, unknown>) {
    looks++
    return entries.call(this)
  }
  Map.prototype[Symbol.iterator] = counted
  t.teardown(() => {
    Map.prototype[Symbol.iterator] = iterate
  })
  for (let n = 0; n < 100; n++) await t.rejects(store.acquire('another', claim('b')), FULL(5_000))
  t.equal(looks, 0)
  time.pass(MINUTE / 2)
  t.equal(await store.renew('0', 'a', 2 * MINUTE), true)
  time.pass(MINUTE / 2)
  t.match(await store.acquire('another', claim('b')), { state: 'acquired' }, 'and finds the first that has lapsed')
  t.strictSame(await states(store, '0', '1', '2', 'another'), ['running', 'free', 'abandoned', 'running'])
})

t.test('a claim that was given back makes room as one whose owner is gone', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore({ maxEntries: 1 })
  await store.acquire('a', claim('dead', { leaseMs: 1 }))
  time.pass(1)
  t.match(await store.acquire('a', claim('heir')), { state: 'acquired', attempt: 2 })
  await t.rejects(store.acquire('b', claim('b')), FULL(1))
  await store.release('a', 'heir')
  t.match(await store.acquire('b', claim('b')), { state: 'acquired', attempt: 1 })
  t.strictSame(await states(store, 'a', 'b'), ['free', 'running'])
})

t.test('a reply makes room for a new claim, even for the same key', async (t) => {
  const store = new MemoryStore({ maxEntries: 1 })
  await finish(store, 'a')
  t.match(await store.acquire('a', claim('again')), { state: 'completed' })
  await finish(store, 'b')
  t.strictSame(await states(store, 'a', 'b'), ['free', 'completed'])
})

t.test('a claim whose owner is gone makes room when nothing else can', async (t) => {
  const store = new MemoryStore({ maxEntries: 2 })
  await store.acquire('running', claim('a'))
  await store.acquire('abandoned', claim('b', { leaseMs: 1 }))
  await until(async () => (await store.get('abandoned'))?.state === 'abandoned')
  t.same(await store.acquire('c', claim('c')), { state: 'acquired', attempt: 1 })
  t.strictSame(await states(store, 'running', 'abandoned', 'c'), ['running', 'free', 'running'])
})

t.test('when the replies take too many bytes the oldest go first', async (t) => {
  const store = new MemoryStore({ maxBytes: 10_000 })
  for (const key of ['a', 'b', 'c']) await finish(store, key, reply(Buffer.alloc(2_500)))
  t.strictSame(await states(store, 'a', 'b', 'c'), ['completed', 'completed', 'completed'])
  await finish(store, 'd', reply(Buffer.alloc(2_500)))
  t.strictSame(await states(store, 'a', 'b', 'c', 'd'), ['free', 'completed', 'completed', 'completed'])
  await finish(store, 'e', reply(Buffer.alloc(9_000)))
  t.strictSame(await states(store, 'b', 'c', 'd', 'e'), ['free', 'free', 'free', 'completed'])
})

t.test('headers take bytes as well', async (t) => {
  const store = new MemoryStore({ maxBytes: 10_000 })
  const large = reply('', [['x', 'x'.repeat(6_000)]])
  await finish(store, 'a', large)
  await finish(store, 'b', large)
  t.strictSame(await states(store, 'a', 'b'), ['free', 'completed'])
})

t.test('bytes that were given back can be used again', async (t) => {
  const store = new MemoryStore({ maxBytes: 10_000 })
  for (let round = 0; round < 100; round++) {
    await finish(store, 'deleted', reply(Buffer.alloc(5_000)))
    await store.delete('deleted')
  }
  await finish(store, 'expired', reply(Buffer.alloc(5_000)), 1)
  await until(async () => (await store.get('expired')) === null)
  await finish(store, 'a', reply(Buffer.alloc(4_500)))
  await finish(store, 'b', reply(Buffer.alloc(4_500)))
  t.strictSame(await states(store, 'a', 'b'), ['completed', 'completed'])
})

t.test('a reply that is larger than all there is becomes a tombstone, and drives nothing out', async (t) => {
  const store = new MemoryStore({ maxBytes: 10_000 })
  await finish(store, 'small', reply(Buffer.alloc(5_000)))
  await store.acquire('large', claim('owner'))
  t.equal(await store.complete('large', 'owner', reply(Buffer.alloc(10_001)), MINUTE), true)
  t.match(await store.get('large'), {
    state: 'completed',
    record: { kind: 'tombstone', reason: 'too-large', fingerprint: 'f', createdAt: 1 }
  })
  t.match(await store.get('small'), { state: 'completed', record: { kind: 'reply' } })
})

t.test('text and bytes come back as they were, and nobody can change what is kept', async (t) => {
  const store = new MemoryStore()
  const every = Buffer.from(Array.from({ length: 256 }, (_, i) => i))
  for (const given of [reply('é🔑\u0000', [['link', ['a', 'b']]]), { ...reply(every), text: true }, reply(every)]) {
    const expected = structuredClone({ ...given, body: given.body.toString('hex') })
    await store.delete('a')
    await finish(store, 'a', given)
    given.body.fill(0)
    given.headers.push(['x-late', 'a'])
    for (let i = 0; i < 2; i++) {
      const found = await store.get('a')
      if (found?.state !== 'completed' || found.record.kind !== 'reply') throw new Error('The reply is lost')
      t.strictSame({ ...found.record, body: found.record.body.toString('hex') }, expected)
      found.record.body.fill(0)
      found.record.headers.length = 0
    }
  }
})

t.test('whatever the number of keys there is one timer, which does not keep the process alive', async (t) => {
  const timers = watchTimers(t)
  const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  const before = holding()
  const store = new MemoryStore()
  await store.acquire('claimed', claim('a'))
  for (let i = 0; i < 1_000; i++) await finish(store, `${i}`, reply(), (i + 1) * DAY)
  await store.acquire('released', claim('b'))
  await store.release('released', 'b')
  t.equal(timers.size, 1)
  t.equal(holding(), before)
  const [timer] = timers
  await store.close()
  // async_hooks tells of its end a little later.
  await until(() => !timers.has(timer as number), { message: 'the end of the timer' })
})

t.test('a store that is closed twice, or was never used, has no timer', async (t) => {
  const timers = watchTimers(t)
  await new MemoryStore().close()
  const store = new MemoryStore()
  await store.close()
  await store.close()
  t.equal(timers.size, 0)
})

t.test('a closed store keeps what it holds, and can be used again', async (t) => {
  const store = new MemoryStore()
  await finish(store, 'a', reply('a'))
  await store.acquire('b', claim('b'))
  await store.close()
  t.match(await store.get('a'), { state: 'completed', record: { body: Buffer.from('a') } })
  const timers = watchTimers(t)
  t.equal(await store.complete('b', 'b', reply('b'), MINUTE), true)
  t.equal(timers.size, 1, 'it sweeps again')
  t.match(await store.get('b'), { state: 'completed' })
  await store.close()
})

t.test('a reply lives for 40 days where it should, without a timer that overflows', async (t) => {
  const warnings: Error[] = []
  const warned = (warning: Error) => warnings.push(warning)
  process.on('warning', warned)
  t.teardown(() => process.off('warning', warned))
  const store = new MemoryStore()
  await finish(store, 'long', reply(), 40 * DAY)
  await finish(store, 'ever', reply(), null)
  await finish(store, 'short', reply(), 5)
  await store.acquire('claim', claim('a', { leaseMs: 40 * DAY }))
  await until(async () => (await store.get('short')) === null)
  const found = await store.get('long')
  if (found?.state !== 'completed' || found.ttlMs === null) throw new Error('The reply is lost')
  t.ok(found.ttlMs > 39 * DAY && found.ttlMs <= 40 * DAY)
  t.match(await store.get('ever'), { state: 'completed', ttlMs: null })
  t.match(await store.get('claim'), { state: 'running' })
  t.strictSame(warnings, [])
})

t.test('expired entries make room without being asked for, and sweeping ends with the last of them', async (t) => {
  const { setInterval, clearInterval } = globalThis
  t.teardown(() => Object.assign(globalThis, { setInterval, clearInterval }))
  // Stores of other tests may still sweep: only what starts here counts.
  const sweepers = new Set<NodeJS.Timeout>()
  let sweeps = 0
  Object.assign(globalThis, {
    setInterval: (sweep: () => void) => {
      const hurried = () => {
        sweeps++
        sweep()
      }
      const sweeper = setInterval(hurried, 5)
      sweepers.add(sweeper)
      return sweeper
    },
    clearInterval: (timer: NodeJS.Timeout) => {
      sweepers.delete(timer)
      clearInterval(timer)
    }
  })
  const store = new MemoryStore({ maxEntries: 3 })
  await finish(store, 'oldest', reply())
  await finish(store, 'expired', reply(), 1)
  await store.acquire('forgotten', claim('a', { leaseMs: 1, retainMs: 1 }))
  await until(() => sweeps > 4)
  await store.acquire('new', claim('b'))
  await store.acquire('newer', claim('c'))
  t.strictSame(await states(store, 'oldest', 'new', 'newer'), ['completed', 'running', 'running'])
  t.equal(sweepers.size, 1)
  await store.delete('oldest')
  await until(() => sweepers.size === 0)
  const before = sweeps
  await finish(store, 'another', reply(), 1)
  t.equal(sweepers.size, 1, 'and begins again with the next')
  await until(() => sweepers.size === 0)
  t.ok(sweeps > before)
})

/** A clock that can be put on, and the store's sweeping in the test's hands. */
function timeMachine(t: Test) {
  const { setInterval, clearInterval } = globalThis
  const { now } = performance
  t.teardown(() => {
    Object.assign(globalThis, { setInterval, clearInterval })
    performance.now = now
  })
  let ahead = 0
  performance.now = () => now.call(performance) + ahead
  let sweep: (() => void) | null = null
  Object.assign(globalThis, {
    setInterval(work: () => void) {
      sweep = work
      return { unref: () => 'sweeper' }
    },
    clearInterval() {
      sweep = null
    }
  })
  return {
    pass(ms: number) {
      ahead += ms
    },
    sweep: () => sweep?.(),
    get isSweeping() {
      return sweep !== null
    }
  }
}

t.test('sweeping leaves claims alone that run, or are remembered, and replies that count', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore()
  await store.acquire('running', claim('a', { leaseMs: 2 * MINUTE }))
  await store.acquire('abandoned', claim('b', { leaseMs: 1, retainMs: 2 * MINUTE }))
  await store.acquire('forgotten', claim('c', { leaseMs: 1, retainMs: 1 }))
  await finish(store, 'done', reply(), 2 * MINUTE)
  time.pass(MINUTE)
  time.sweep()
  t.strictSame(await states(store, 'running', 'abandoned', 'forgotten', 'done'), [
    'running',
    'abandoned',
    'free',
    'completed'
  ])
})

t.test('a record that is none is an answer like any other', async (t) => {
  const store = new MemoryStore()
  await store.acquire('k', claim('a'))
  const stored = store.complete('k', 'a', null as never, MINUTE)
  await t.rejects(stored, TypeError)
})

t.test('a release may be repeated for a minute, and then it is none any more', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore()
  await store.acquire('a', claim('1'))
  t.equal(await store.release('a', '1'), true)
  time.pass(50_000)
  t.equal(await store.release('a', '1'), true)
  t.equal(await store.release('a', '2'), false)
  time.pass(10_000)
  t.equal(await store.release('a', '1'), false)
})

t.test('of more than ten thousand releases the oldest is forgotten', async (t) => {
  const store = new MemoryStore()
  for (let n = 0; n <= 10_000; n++) {
    await store.acquire(`${n}`, claim('1'))
    await store.release(`${n}`, '1')
  }
  t.equal(await store.release('0', '1'), false)
  t.equal(await store.release('1', '1'), true)
  t.equal(await store.release('10000', '1'), true)
})

t.test('releases are swept when their minute is over, and sweeping ends with the last of them', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore()
  for (const key of ['a', 'b']) {
    await store.acquire(key, claim('1'))
    await store.release(key, '1')
    time.pass(30_000)
  }
  // The first is due, the second is not.
  time.pass(1_000)
  time.sweep()
  t.ok(time.isSweeping)
  t.equal(await store.release('b', '1'), true)
  time.pass(30_000)
  time.sweep()
  t.notOk(time.isSweeping)
})

t.test('who was told of a change, or has gone, leaves no listener behind', async (t) => {
  const store = new MemoryStore()
  await store.acquire('a', claim('1'))
  const [gone, told] = [new AbortController(), new AbortController()]
  const changes = [store.changed('a', gone.signal), store.changed('a', told.signal)]
  gone.abort()
  await changes[0]
  t.strictSame(getEventListeners(gone.signal, 'abort'), [])
  await store.release('a', '1')
  await changes[1]
  t.strictSame(getEventListeners(told.signal, 'abort'), [])
})

t.test('fingerprints come back to the letter, whatever they are made of', async (t) => {
  const store = new MemoryStore()
  for (const fingerprint of ['', 'plain', 'é', 'š', '指紋', '\ud800', 'a\u0000b']) {
    await finish(store, `key ${fingerprint}`, { ...reply(), fingerprint })
    t.match(await store.get(`key ${fingerprint}`), { state: 'completed', record: { fingerprint } })
  }
  await store.close()
})

/* Bounds, to the moment and to the byte */

/** A clock that moves when it is told to, and a store that sweeps each full second. */
async function clocked(t: Test, options?: MemoryStoreOptions) {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  const store = new MemoryStore(options)
  await finish(store, 'kept')
  return { time, store }
}

t.test('a lease ends at its moment, for whoever asks', async (t) => {
  const { time, store } = await clocked(t)
  await store.acquire('k', claim('a', { leaseMs: 500 }))
  await time.pass(499)
  t.match(await store.get('k'), { state: 'running', leaseMs: 1 })
  t.match(await store.acquire('k', claim('b')), { state: 'running' })
  const { signal } = new AbortController()
  let isTold = false
  void store.changed('k', signal).then(() => {
    isTold = true
  })
  await time.pass(0)
  t.equal(isTold, false)
  await time.pass(1)
  t.match(await store.get('k'), { state: 'abandoned' })
  await store.changed('k', signal)
  t.match(await store.acquire('k', claim('b', { takeover: false })), { state: 'abandoned' })
  t.match(await store.acquire('k', claim('b')), { state: 'acquired', attempt: 2 })
})

t.test('an abandoned claim, a reply and a release are remembered until their moment', async (t) => {
  const { time, store } = await clocked(t)
  await store.acquire('claim', claim('a', { leaseMs: 300, retainMs: 200 }))
  await store.acquire('reply', claim('a'))
  await store.complete('reply', 'a', reply(), 500)
  await time.pass(499)
  t.strictSame(await states(store, 'claim', 'reply'), ['abandoned', 'completed'])
  await time.pass(1)
  t.strictSame(await states(store, 'claim', 'reply'), ['free', 'free'])
  await store.acquire('released', claim('a'))
  await store.release('released', 'a')
  await time.pass(RELEASE_MEMORY_MS - 1)
  t.equal(await store.release('released', 'a'), true)
  await time.pass(1)
  t.equal(await store.release('released', 'a'), false)
})

t.test('what has ended at the moment of a sweep is swept', async (t) => {
  const { time, store } = await clocked(t, { maxEntries: 2 })
  await store.acquire('claim', claim('a', { leaseMs: 500, retainMs: 500 }))
  await time.pass(1_000)
  await store.acquire('another', claim('a'))
  t.strictSame(await states(store, 'kept', 'another'), ['completed', 'running'])
  // When nothing is left there are no more sweeps.
  await time.pass(MINUTE - 1_001)
  t.equal(time.pending, 1)
  await time.pass(1)
  t.equal(time.pending, 0)
  await store.release('another', 'a')
  await time.pass(RELEASE_MEMORY_MS - 1)
  t.equal(time.pending, 1)
  await time.pass(1)
  t.equal(time.pending, 0)
})

t.test('a full store has room when a lease ends', async (t) => {
  const { time, store } = await clocked(t, { maxEntries: 1 })
  await store.acquire('claim', claim('a', { leaseMs: 500 }))
  await time.pass(499)
  await t.rejects(store.acquire('another', claim('a')), FULL(1))
  await time.pass(1)
  t.match(await store.acquire('another', claim('a')), { state: 'acquired' })
})

t.test('a store may be full to the last byte', async (t) => {
  const size = sizeOf('a', reply('body'))
  const store = new MemoryStore({ maxBytes: 2 * size })
  await finish(store, 'a', reply('body'))
  await finish(store, 'b', reply('body'))
  t.match(await store.get('a'), { record: { kind: 'reply' } })
  t.match(await store.get('b'), { record: { kind: 'reply' } })
  const small = new MemoryStore({ maxBytes: size })
  await finish(small, 'a', reply('body'))
  t.match(await small.get('a'), { record: { kind: 'reply' } })
})

const NO_ROOM = (bytes: number) => ({
  code: 'FST_IDEMPOTENCY_STORE_FULL',
  message: `MemoryStore is full: the steps of unfinished operations take ${bytes} bytes`
})
/** A step that takes a thousand bytes, with all that belongs to it. */
const THOUSAND = (name: string) => [name, 'r'.repeat(900 - name.length)] as const

t.test('steps count with the replies, and the oldest of those make room for them', async (t) => {
  const size = sizeOf('a', reply('body'))
  const store = new MemoryStore({ maxBytes: 2 * size + 1_000 })
  await store.acquire('k', claim('a'))
  for (const key of ['a', 'b']) await finish(store, key, reply('body'))
  t.equal(await store.step('k', 'a', THOUSAND('1')), true)
  t.strictSame(await states(store, 'a', 'b'), ['completed', 'completed'], 'full to the last byte')
  t.equal(await store.step('k', 'a', ['2', '']), true)
  t.strictSame(await states(store, 'k', 'a', 'b'), ['running', 'free', 'completed'])
  await finish(store, 'c', reply('body'))
  t.strictSame(await states(store, 'b', 'c'), ['free', 'completed'], 'and replies make room for replies beside them')
})

t.test('a step for which there is no room is refused, and costs neither a step nor a claim', async (t) => {
  const store = new MemoryStore({ maxBytes: 2_000 })
  for (const token of ['a', 'b']) {
    await store.acquire(token, claim(token))
    t.equal(await store.step(token, token, THOUSAND('1')), true)
  }
  for (const token of ['a', 'b']) {
    await t.rejects(store.step(token, token, ['2', '']), NO_ROOM(2_000))
    t.equal(await store.step(token, token, ['1', 'again']), true, 'what is there takes no room')
    t.match(await store.get(token), { state: 'running', steps: [THOUSAND('1')] })
    t.equal(await store.renew(token, token, MINUTE), true)
  }
  t.match(await store.acquire('c', claim('c')), { state: 'acquired' }, 'nor is a claim refused for steps')
  await t.rejects(store.step('c', 'c', ['1', '']), NO_ROOM(2_000))
  t.equal(await store.step('c', 'another', ['1', '']), false)
  t.equal(await store.release('c', 'c'), true)
  t.strictSame(await states(store, 'c'), ['free'], 'what was refused is no step')
})

t.test('the room of steps is free again when their claim is over, however it ends', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore({ maxBytes: 1_000, maxEntries: 1 })
  const ends: [name: string, end: () => Promise<unknown>][] = [
    ['completed', () => store.complete('k', 'a', reply(), 1)],
    ['deleted', () => store.delete('k')],
    ['driven out', () => store.acquire('other', claim('b'))],
    ['swept', async () => time.sweep()],
    ['forgotten', () => store.get('k')],
    ['forgotten, and nobody has looked', async () => {}]
  ]
  for (const [name, end] of ends) {
    await store.acquire('k', claim('a', { leaseMs: 1 }))
    t.equal(await store.step('k', 'a', THOUSAND('1')), true, name)
    await t.rejects(store.step('k', 'a', ['2', '']), NO_ROOM(1_000))
    time.pass(name === 'driven out' ? 1 : name === 'completed' || name === 'deleted' ? 0 : MINUTE + 1)
    await end()
    const key = name === 'driven out' ? 'other' : 'next'
    const token = key === 'other' ? 'b' : 'c'
    await store.acquire(key, claim(token))
    t.equal(await store.step(key, token, THOUSAND('1')), true, `${name}: there is room`)
    await store.delete(key)
    time.pass(1)
  }
})

t.test('a takeover keeps the steps, and the room that they take', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore({ maxBytes: 1_000 })
  await store.acquire('k', claim('a', { leaseMs: 1 }))
  await store.step('k', 'a', THOUSAND('1'))
  time.pass(1)
  t.strictSame(await store.acquire('k', claim('b')), { state: 'acquired', attempt: 2, steps: [THOUSAND('1')] })
  await t.rejects(store.step('k', 'b', ['2', '']), NO_ROOM(1_000))
  t.equal(await store.release('k', 'b'), true)
  await store.acquire('other', claim('c'))
  await t.rejects(store.step('other', 'c', ['1', '']), NO_ROOM(1_000), 'what was given back takes it as well')
  await store.delete('k')
  t.equal(await store.step('other', 'c', THOUSAND('1')), true)
})

t.test('a reply for which steps leave no room is a tombstone', async (t) => {
  const size = sizeOf('a', reply('body'))
  const store = new MemoryStore({ maxBytes: size + 999 })
  await store.acquire('k', claim('a'))
  await store.step('k', 'a', THOUSAND('1'))
  await finish(store, 'a', reply('body'))
  t.match(await store.get('a'), { state: 'completed', record: { kind: 'tombstone', reason: 'too-large' } })
  await store.complete('k', 'a', reply('body'), MINUTE)
  t.match(await store.get('k'), { record: { kind: 'reply' } }, 'its own steps are gone by then')
})

t.test('claims with steps are swept when they are forgotten, and sweeping ends with the last of them', async (t) => {
  const time = timeMachine(t)
  const store = new MemoryStore()
  await store.acquire('k', claim('a'))
  t.equal(time.isSweeping, false, 'a claim alone is not swept')
  await store.step('k', 'a', ['1', ''])
  t.equal(time.isSweeping, true)
  time.pass(2 * MINUTE - 5_000)
  time.sweep()
  t.equal(time.isSweeping, true)
  time.pass(5_000)
  time.sweep()
  t.equal(time.isSweeping, false)
})

t.test('an answer without steps says nothing of them', async (t) => {
  const store = new MemoryStore()
  t.strictSame(await store.acquire('k', claim('a')), { state: 'acquired', attempt: 1 })
  t.strictSame(Object.keys((await store.get('k')) ?? {}), ['state', 'fingerprint', 'leaseMs', 'attempt'])
  t.equal(await store.release('k', 'a'), true)
  t.strictSame(await states(store, 'k'), ['free'])
})
