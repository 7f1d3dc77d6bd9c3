import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { MemoryStore } from '../../index.js'
import { FlakyStore, persistent } from '../support/flaky-store.js'
import { until } from '../support/latch.js'
import { newSeed, Random } from '../support/random.js'
import { claim, conforms, lapsed, REPEATABLE, reply, same, take } from '../support/store-fixtures.js'
import { exclusiveHistory, takeoverHistory } from '../support/store-histories.js'

conforms(t, 'a MemoryStore keeps every promise of a store', () => new MemoryStore())

t.test('a MemoryStore behind a bad network', async (t) => {
  const random = new Random(newSeed())
  t.comment(`SEED=${random.seed}`)
  const factory = () => {
    const store = new MemoryStore()
    return { store: persistent(new FlakyStore(store, { random })), dispose: () => store.close() }
  }
  await conforms(t, 'belongs to its tokens for a caller who repeats what got lost', factory, REPEATABLE)
  const store = new MemoryStore()
  t.teardown(() => store.close())
  const clients = [new FlakyStore(store, { random }), new FlakyStore(store, { random })]
  await exclusiveHistory(t, clients, random)
  await takeoverHistory(t, clients, random)
})

t.test('in a MemoryStore claims and replies expire, wherever the wall clock stands', async (t) => {
  const { now } = Date
  t.teardown(() => {
    Date.now = now
  })
  for (const clock of [0, 999, now() + 1e12]) {
    Date.now = () => clock
    const store = newStore(t, {})
    await store.acquire('claim', claim({ leaseMs: 1 }))
    await store.complete('reply', await take(store, 'reply'), reply(), 1)
    await sleep(5)
    t.match(await store.acquire('claim', claim({ takeover: true })), { state: 'acquired', attempt: 2 })
    t.match(await store.acquire('reply', claim()), { state: 'acquired', attempt: 1 })
  }
})

t.test('a MemoryStore keeps no more than maxEntries, and forgets the oldest replies first', async (t) => {
  const store = newStore(t, { maxEntries: 10 })
  for (let n = 0; n < 25; n++) await finish(store, `key ${n}`)
  const kept: number[] = []
  for (let n = 0; n < 25; n++) if ((await store.get(`key ${n}`)) !== null) kept.push(n)
  t.strictSame(kept, [15, 16, 17, 18, 19, 20, 21, 22, 23, 24])
})

t.test('a MemoryStore keeps no more than maxBytes of replies, and forgets the oldest first', async (t) => {
  const store = newStore(t, { maxBytes: 100_000 })
  for (let n = 0; n < 25; n++) await finish(store, `key ${n}`, 15_000)
  const kept: number[] = []
  for (let n = 0; n < 25; n++) if ((await store.get(`key ${n}`)) !== null) kept.push(n)
  t.ok(kept.length * 15_000 <= 100_000, `${kept.length} replies of 15,000 bytes are kept`)
  t.ok(kept.length >= 5, 'and not much fewer than there is room for')
  t.strictSame(
    kept,
    Array.from({ length: kept.length }, (_, n) => 25 - kept.length + n)
  )
})

t.test('a MemoryStore that is full never forgets a running claim', async (t) => {
  const store = newStore(t, { maxEntries: 10, maxBytes: 100_000 })
  const token = await take(store, 'running', { fingerprint: 'at work' })
  for (let n = 0; n < 50; n++) await finish(store, `key ${n}`, 15_000)
  t.match(await store.acquire('running', claim({ takeover: true })), { state: 'running', fingerprint: 'at work' })
  const record = reply({ fingerprint: 'at work' })
  t.equal(await store.complete('running', token, record, 60_000), true)
  same(t, await store.acquire('running', claim()), record)
})

t.test(
  'a MemoryStore that is full of running claims refuses further ones, and takes them when there is room',
  async (t) => {
    const store = newStore(t, { maxEntries: 3 })
    const token = await take(store, 'a')
    await take(store, 'b')
    await take(store, 'c')
    await t.rejects(store.acquire('d', claim()), { message: /full/ })
    for (const key of ['a', 'b', 'c']) t.match(await store.acquire(key, claim()), { state: 'running' })
    await store.release('a', token)
    t.strictSame(await store.acquire('d', claim()), { state: 'acquired', attempt: 1 })
  }
)

t.test('a MemoryStore that is full of claims lets go of an abandoned one first', async (t) => {
  const store = newStore(t, { maxEntries: 3 })
  await take(store, 'a')
  await lapsed(store, 'b')
  await take(store, 'c')
  t.strictSame(await store.acquire('d', claim()), { state: 'acquired', attempt: 1 })
  for (const key of ['a', 'c', 'd']) t.match(await store.acquire(key, claim()), { state: 'running' })
})

t.test('a reply that is larger than maxBytes is not replayed, and its handler does not run again', async (t) => {
  const store = newStore(t, { maxBytes: 10_000 })
  await finish(store, 'small')
  await finish(store, 'large', 20_000)
  const found = await store.acquire('large', claim({ takeover: true }))
  t.match(found, { state: 'completed', record: { kind: 'tombstone', reason: 'too-large', fingerprint: 'fingerprint' } })
  t.match(await store.acquire('small', claim()), { state: 'completed' }, 'and others stay')
})

t.test('a MemoryStore gives the memory of expired replies and forgotten claims back', async (t) => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const store = newStore(t, {})
  const bytes = () => {
    collect()
    return process.memoryUsage().arrayBuffers
  }
  const before = bytes()
  for (let n = 0; n < 200; n++) {
    const token = await take(store, `key ${n}`)
    await store.complete(`key ${n}`, token, reply({ body: Buffer.alloc(100_000, n), text: false }), 500)
  }
  t.ok(bytes() - before > 15_000_000, 'it was kept')
  await until(() => bytes() - before < 2_000_000, { message: 'the memory to come back' })
})

t.test('a MemoryStore refuses bounds that are not positive integers, and options that it does not have', (t) => {
  for (const value of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, '10', null]) {
    for (const name of ['maxEntries', 'maxBytes']) {
      if (value === null) continue
      const error = t.throws(() => new MemoryStore({ [name]: value }), { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
      t.match(error, { message: new RegExp(`${name}.*positive integer.*${value}`) })
    }
  }
  t.throws(() => new MemoryStore({ max: 1 } as never), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"max"/ })
  t.end()
})

t.test('a MemoryStore that holds claims and replies does not keep its process alive', async (t) => {
  const script = `
    import { MemoryStore } from ${JSON.stringify(new URL('../../index.js', import.meta.url).href)}
    const store = new MemoryStore()
    const claim = { fingerprint: '', leaseMs: 600000, retainMs: 600000, takeover: false }
    await store.acquire('a', { ...claim, token: 'a' })
    await store.acquire('b', { ...claim, token: 'b' })
    const record = { kind: 'tombstone', reason: 'hijacked', fingerprint: '', createdAt: 0 }
    await store.complete('b', 'b', record, 600000)
    void store.changed('a', new AbortController().signal)
  `
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
    stdio: ['ignore', 'ignore', 'inherit']
  })
  t.teardown(() => child.kill('SIGKILL'))
  t.strictSame(await once(child, 'exit'), [0, null])
})

t.test('a MemoryStore that was closed can be used again, and holds what it held', async (t) => {
  const store = newStore(t, {})
  const token = await take(store, 'running')
  await finish(store, 'done')
  await store.close()
  await store.close()
  t.match(await store.acquire('done', claim()), { state: 'completed' })
  t.equal(await store.complete('running', token, reply(), 10), true)
  await sleep(20)
  t.match(await store.acquire('running', claim()), { state: 'acquired' })
})

function newStore(
  t: { teardown(fn: () => unknown): void },
  bounds: { maxEntries?: number; maxBytes?: number }
): MemoryStore {
  const store = new MemoryStore(bounds)
  t.teardown(() => store.close())
  return store
}

async function finish(store: MemoryStore, key: string, size = 10): Promise<void> {
  const token = await take(store, key)
  await store.complete(key, token, reply({ body: Buffer.alloc(size, 'x') }), null)
}
