import t, { type Test } from 'tap'
import { type IdempotencyStore, LocalCache, MemoryStore } from '../../index.js'
import { isResolved } from '../../lib/util/sync-promise.js'
import type { Acquisition, TransactionAcquisition, TransactionClaim } from '../../types/index.js'
import { latch } from '../support/latch.js'
import { claim, newKey, reply, same, take, tombstone } from '../support/store-fixtures.js'

const LONG = 60_000

/** A store that counts what it is asked. */
class Counted extends MemoryStore {
  asked: string[] = []

  override acquire(...args: Parameters<MemoryStore['acquire']>): ReturnType<MemoryStore['acquire']> {
    this.asked.push('acquire')
    return super.acquire(...args)
  }
}

/** From now on the monotonic clock moves only when it is told to, from one whole millisecond to another. */
function stopClock(t: Test): (ms: number) => void {
  let now = Math.ceil(performance.now())
  t.intercept(performance, 'now', { value: () => now })
  return (ms) => {
    now += ms
  }
}

async function finish(store: IdempotencyStore, key = newKey(), ttl: number | null = LONG): Promise<string> {
  await store.complete(key, await take(store, key), reply(), ttl)
  return key
}

t.test('what was finished here is replayed without asking the store', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store)
  const key = await finish(cache)
  store.asked = []
  for (let n = 0; n < 3; n++) same(t, await cache.acquire(key, claim()), reply())
  t.strictSame(store.asked, [])
  t.ok(isResolved(cache.acquire(key, claim())), 'and without a promise that has to be waited for')
})

t.test('who is turned away meanwhile makes no difference', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store)
  const key = newKey()
  const token = await take(cache, key)
  t.match(await cache.acquire(key, claim()), { state: 'running' })
  await cache.complete(key, token, reply(), LONG)
  store.asked = []
  same(t, await cache.acquire(key, claim()), reply())
  t.strictSame(store.asked, [])
})

t.test('what another process finished is asked for once', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store)
  const key = await finish(store)
  store.asked = []
  for (let n = 0; n < 3; n++) same(t, await cache.acquire(key, claim()), reply())
  t.strictSame(store.asked, ['acquire'])
})

t.test('who holds a key is asked of the store each time', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store)
  const key = newKey()
  await take(cache, key)
  store.asked = []
  for (let n = 0; n < 3; n++) t.match(await cache.acquire(key, claim()), { state: 'running' })
  t.equal(store.asked.length, 3)
})

t.test('a key that is deleted here is forgotten at once', async (t) => {
  const cache = new LocalCache(new MemoryStore())
  const key = await finish(cache)
  t.equal(await cache.delete?.(key), true)
  t.match(await cache.acquire(key, claim()), { state: 'acquired' })
})

t.test('a key that is settled here is forgotten at once', async (t) => {
  const cache = new LocalCache(new MemoryStore())
  const key = newKey()
  await cache.complete(key, await take(cache, key), tombstone('hijacked'), LONG)
  t.match(await cache.acquire(key, claim()), { record: { kind: 'tombstone' } })
  t.equal(await cache.settle?.(key, 'fingerprint', { record: reply(), ttlMs: LONG }), true)
  same(t, await cache.acquire(key, claim()), reply())
})

t.test('a list, and whether to delete what is running, go on to the store', async (t) => {
  const store = new MemoryStore()
  const cache = new LocalCache(store)
  const key = newKey()
  await take(cache, key)
  t.match(await cache.list?.(['running'], null), { keys: [{ key, state: 'running' }], cursor: null })
  t.strictSame(await cache.list?.(['reply'], null), { keys: [], cursor: null })
  t.equal(await cache.delete?.(key, true), false)
  t.equal(await cache.delete?.(key), true)
})

t.test('an answer that was on its way while the key was deleted is not kept', async (t) => {
  const gate = latch()
  let held = false
  class Slow extends MemoryStore {
    override async acquire(...args: Parameters<MemoryStore['acquire']>): ReturnType<MemoryStore['acquire']> {
      const found = await super.acquire(...args)
      if (held) await gate.promise
      return found
    }
  }
  const store = new Slow()
  const cache = new LocalCache(store)
  const key = await finish(store)
  held = true
  const early = cache.acquire(key, claim())
  await cache.delete?.(key)
  held = false
  gate.open()
  t.match(await early, { state: 'completed' })
  t.match(await cache.acquire(key, claim()), { state: 'acquired' })
})

t.test('a key that another process deletes is forgotten after maxAge', async (t) => {
  const advance = stopClock(t)
  const store = new MemoryStore()
  const cache = new LocalCache(store, { maxAge: 500 })
  const key = await finish(cache)
  await store.delete(key)
  advance(499)
  t.match(await cache.acquire(key, claim()), { state: 'completed' }, 'no sooner')
  advance(1)
  t.match(await cache.acquire(key, claim()), { state: 'acquired' })
})

t.test('a reply does not outlive its ttl, nor is it asked for less of it than is left', async (t) => {
  const advance = stopClock(t)
  const cache = new LocalCache(new MemoryStore())
  const key = await finish(cache, newKey(), 300)
  advance(200)
  t.match(await cache.acquire(key, claim()), { state: 'completed', ttlMs: 100 })
  advance(100)
  t.match(await cache.acquire(key, claim()), { state: 'acquired' })
  const ever = await finish(cache, newKey(), null)
  t.match(await cache.acquire(ever, claim()), { state: 'completed', ttlMs: null })
  t.ok(isResolved(cache.acquire(ever, claim())), 'what is kept for ever is kept here, too')
})

t.test('a repeated completion with another record does not change what is replayed', async (t) => {
  const cache = new LocalCache(new MemoryStore())
  const key = newKey()
  const token = await take(cache, key)
  await cache.complete(key, token, reply(), LONG)
  t.equal(await cache.complete(key, token, reply({ body: Buffer.from('another') }), LONG), true)
  same(t, await cache.acquire(key, claim()), reply())
})

t.test('a completion that is refused leaves nothing behind', async (t) => {
  const store = new MemoryStore()
  const cache = new LocalCache(store)
  const key = newKey()
  const token = await take(cache, key, { leaseMs: 1 })
  await store.delete(key)
  t.equal(await cache.complete(key, token, reply(), LONG), false)
  t.match(await cache.acquire(key, claim()), { state: 'acquired' })
})

t.test('no more than maxEntries are kept, and what was used least recently goes first', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store, { maxEntries: 3 })
  const keys = [await finish(cache), await finish(cache), await finish(cache)] as const
  await cache.acquire(keys[0], claim())
  await finish(cache)
  store.asked = []
  await cache.acquire(keys[0], claim())
  await cache.acquire(keys[2], claim())
  t.strictSame(store.asked, [])
  await cache.acquire(keys[1], claim())
  t.strictSame(store.asked, ['acquire'])
})

t.test('no more than maxBytes are kept, and what is larger is not kept at all', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store, { maxBytes: 10_000 })
  const sized = async (size: number) => {
    const key = newKey()
    await cache.complete(key, await take(cache, key), reply({ body: Buffer.alloc(size) }), LONG)
    return key
  }
  const [first, second] = [await sized(4_000), await sized(4_000)]
  const large = await sized(10_000)
  store.asked = []
  for (const key of [first, second]) await cache.acquire(key, claim())
  t.strictSame(store.asked, [], 'the large one has not driven them out')
  await cache.acquire(large, claim())
  t.equal(store.asked.length, 1)
  await sized(4_000)
  store.asked = []
  await cache.acquire(first, claim())
  t.equal(store.asked.length, 1)
})

t.test('what is put in or taken out is a copy', async (t) => {
  const cache = new LocalCache(new MemoryStore())
  const key = newKey()
  const record = reply()
  await cache.complete(key, await take(cache, key), record, LONG)
  record.body.fill(0)
  const found = await cache.acquire(key, claim())
  if (found.state !== 'completed' || found.record.kind !== 'reply') return t.fail('a reply')
  same(t, found, reply())
  found.record.body.fill(0)
  found.record.headers.push(['x', 'y'])
  same(t, await cache.acquire(key, claim()), reply())
})

t.test('a key is not replayed while it is being deleted, nor after that failed', async (t) => {
  const [gate, began] = [latch(), latch()]
  class Slow extends Counted {
    override async delete(): Promise<boolean> {
      began.open()
      await gate.promise
      throw new Error('The store is down')
    }
  }
  const store = new Slow()
  const cache = new LocalCache(store)
  const key = await finish(cache)
  const deleted = cache.delete?.(key)
  await began.promise
  store.asked = []
  await cache.acquire(key, claim())
  t.strictSame(store.asked, ['acquire'])
  gate.open()
  await t.rejects(deleted as Promise<unknown>, { message: 'The store is down' })
  store.asked = []
  await cache.acquire(key, claim())
  t.strictSame(store.asked, ['acquire'], 'what was learned while it was being deleted is forgotten')
})

t.test('in a transaction as well, what is finished is replayed without asking the store', async (t) => {
  const asked: string[] = []
  class Transactional extends MemoryStore {
    async begin(key: string, claim: TransactionClaim): Promise<TransactionAcquisition> {
      asked.push(key)
      return (await this.acquire(key, claim)) as TransactionAcquisition
    }
  }
  const store = new Transactional()
  const cache = new LocalCache(store)
  const ofTransaction = () => ({ ...claim(), wake: false, timeoutMs: LONG })
  const running = newKey()
  t.match(await cache.begin?.(running, ofTransaction()), { state: 'acquired' })
  t.match(await cache.begin?.(running, ofTransaction()), { state: 'running' })
  t.strictSame(asked, [running, running])
  const key = await finish(store)
  for (let n = 0; n < 3; n++) same(t, (await cache.begin?.(key, ofTransaction())) as Acquisition, reply())
  t.strictSame(asked, [running, running, key])
})

t.test('who looks at a key sees what the store says', async (t) => {
  const store = new MemoryStore()
  const cache = new LocalCache(store)
  const key = await finish(cache)
  same(t, (await cache.get?.(key)) as Acquisition, reply())
  await store.delete(key)
  t.equal(await cache.get?.(key), null)
})

t.test('steps go on to the store, and come from there', async (t) => {
  const store = new Counted()
  const cache = new LocalCache(store)
  const key = newKey()
  const mine = claim()
  await cache.acquire(key, mine)
  t.equal(await cache.step?.(key, mine.token, ['a', 'b']), true)
  t.equal(await cache.step?.(key, 'another', ['c', 'd']), false)
  t.strictSame(await cache.acquire(key, mine), { state: 'acquired', attempt: 1, steps: [['a', 'b']] })
  t.match(await cache.acquire(key, claim()), { state: 'running', steps: [['a', 'b']] })
  await store.delete(key)
  t.strictSame(await cache.acquire(key, mine), { state: 'acquired', attempt: 1 }, 'none are kept here')
  t.equal(store.asked.length, 4)
})

t.test('a renewal, the end of a claim, who waits for it, and the end of the store go on to the store', async (t) => {
  const store = new MemoryStore()
  let closed = 0
  store.close = async () => void closed++
  const cache = new LocalCache(store)
  const key = newKey()
  const token = await take(cache, key)
  const leaving = new AbortController()
  const changed = cache.changed?.(key, leaving.signal)
  t.ok(changed instanceof Promise)
  t.equal(await cache.renew(key, token, LONG), true)
  t.equal(await cache.release(key, token), true)
  await changed
  await cache.close?.()
  t.equal(closed, 1)
})

t.test(
  'claims that never end are forgotten some day, which costs a cached reply, and those that end are not counted',
  async (t) => {
    const store = new Counted({ maxEntries: 200_000 })
    const cache = new LocalCache(store)
    const key = newKey()
    const token = await take(cache, key)
    const asked = async () => {
      store.asked = []
      await cache.acquire(key, claim())
      return store.asked.length
    }
    for (let n = 0; n < 100_000; n++) {
      await cache.acquire(`ended ${n}`, claim({ token: 'a' }))
      if (n % 2 === 0) await cache.release(`ended ${n}`, 'a')
      else await cache.complete(`ended ${n}`, 'a', tombstone('too-large'), LONG)
    }
    await cache.complete(key, token, reply(), LONG)
    t.equal(await asked(), 0, 'its claim is known')
    const other = newKey()
    const lost = await take(cache, other)
    for (let n = 0; n < 99_999; n++) await cache.acquire(`lasting ${n}`, claim())
    t.equal(await cache.complete(other, lost, reply(), LONG), true)
    store.asked = []
    await cache.acquire(other, claim())
    t.strictSame(store.asked, [], 'as many as that are known')
    const forgotten = newKey()
    const late = await take(cache, forgotten)
    for (let n = 0; n < 2; n++) await cache.acquire(`too many ${n}`, claim())
    await cache.complete(forgotten, late, reply(), LONG)
    store.asked = []
    await cache.acquire(forgotten, claim())
    t.strictSame(store.asked, ['acquire'])
  }
)

t.test('what a store lacks, a LocalCache in front of it lacks as well', async (t) => {
  const { acquire, renew, complete, release } = new MemoryStore()
  const cache = new LocalCache({ acquire, renew, complete, release })
  const { step, changed, get, delete: forget, list, settle, begin, close } = cache
  t.strictSame([step, changed, get, forget, list, settle, begin, close], Array(8).fill(undefined))
})

t.test('bad options are named', async (t) => {
  const store = new MemoryStore()
  const code = 'FST_IDEMPOTENCY_INVALID_OPTION'
  t.throws(() => new LocalCache({} as IdempotencyStore), { code, message: /LocalCache takes an IdempotencyStore/ })
  for (const name of ['maxEntries', 'maxBytes', 'maxAge']) {
    for (const value of [0, -1, 1.5, 'ten', null]) {
      t.throws(() => new LocalCache(store, { [name]: value }), {
        code,
        message: new RegExp(`LocalCache option "${name}"`)
      })
    }
  }
  t.throws(() => new LocalCache(store, { size: 1 } as object), {
    code,
    message: /LocalCache option "size" is not known/
  })
})
