import t, { type Test } from 'tap'
import { type IdempotencyStore, LocalCache, MemoryStore } from '../../index.js'
import { isAtHand } from '../../lib/at-hand.js'
import { latch } from '../support/latch.js'
import { claim, newKey, reply, same, take } from '../support/store-fixtures.js'

const LONG = 60_000

/** A store that counts what it is asked. */
class Counted extends MemoryStore {
  asked: string[] = []

  override acquire(...args: Parameters<MemoryStore['acquire']>): ReturnType<MemoryStore['acquire']> {
    this.asked.push('acquire')
    return super.acquire(...args)
  }
}

/** From now on the monotonic clock moves only when it is told to. */
function stopClock(t: Test): (ms: number) => void {
  let now = performance.now()
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
  t.ok(isAtHand(cache.acquire(key, claim())), 'and without a promise that has to be waited for')
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

t.test('what a store lacks, a LocalCache in front of it lacks as well', async (t) => {
  const { acquire, renew, complete, release } = new MemoryStore()
  const cache = new LocalCache({ acquire, renew, complete, release })
  t.strictSame([cache.changed, cache.get, cache.delete, cache.begin, cache.close], Array(5).fill(undefined))
})

t.test('bad options are named', async (t) => {
  const store = new MemoryStore()
  const code = 'FST_IDEMPOTENCY_INVALID_OPTION'
  t.throws(() => new LocalCache({} as IdempotencyStore), { code, message: /LocalCache takes an IdempotencyStore/ })
  for (const name of ['maxEntries', 'maxBytes', 'maxAge']) {
    for (const value of [0, -1, 1.5, '10', null]) {
      t.throws(() => new LocalCache(store, { [name]: value }), {
        code,
        message: new RegExp(`LocalCache option "${name}"`)
      })
    }
  }
  t.throws(() => new LocalCache(store, { size: 1 } as object), { code, message: /no option "size"/ })
})
