import t from 'tap'
import { EncryptedStore, type IdempotencyStore, LocalCache, MemoryStore, MigratingStore } from '../../index.js'
import { raise } from '../../lib/stores/attempts.js'
import { build } from '../support/app.js'
import { latch } from '../support/latch.js'
import { claim, finish, lapsed, newKey, reply, same, take } from '../support/store-fixtures.js'

/* What a MigratingStore does with its two stores, one rule each. Where processes die is in migrating-deaths. */

const DAY = 86_400_000

/** A store with other methods in front of a MemoryStore, which is what others see. */
class Changed extends MemoryStore {
  /** The calls that have come, in their order. */
  readonly calls: string[]
  readonly #name: string
  /** What is done instead of a call, the next time. */
  readonly next: Partial<Record<keyof IdempotencyStore, () => unknown>> = {}

  constructor(name: string, calls: string[]) {
    super()
    this.#name = name
    this.calls = calls
  }

  override acquire(...args: Parameters<MemoryStore['acquire']>) {
    return this.#call('acquire', () => super.acquire(...args))
  }
  override renew(...args: Parameters<MemoryStore['renew']>) {
    return this.#call('renew', () => super.renew(...args))
  }
  override complete(...args: Parameters<MemoryStore['complete']>) {
    return this.#call('complete', () => super.complete(...args))
  }
  override step(...args: Parameters<MemoryStore['step']>) {
    return this.#call('step', () => super.step(...args))
  }
  override release(...args: Parameters<MemoryStore['release']>) {
    return this.#call('release', () => super.release(...args))
  }
  override delete(...args: Parameters<MemoryStore['delete']>) {
    return this.#call('delete', () => super.delete(...args))
  }
  override close() {
    return this.#call('close', () => super.close())
  }

  async #call<T>(method: keyof IdempotencyStore, call: () => Promise<T>): Promise<T> {
    this.calls.push(`${this.#name}.${method}`)
    const { [method]: instead } = this.next
    delete this.next[method]
    if (instead !== undefined) await instead()
    return call()
  }
}

function scene() {
  const calls: string[] = []
  const [from, to] = [new Changed('from', calls), new Changed('to', calls)]
  const store = new MigratingStore(from, to) as MigratingStore & Required<IdempotencyStore>
  /** What is called by this, in its order. */
  const callsOf = async (work: () => Promise<unknown>) => {
    calls.length = 0
    await work()
    return [...calls]
  }
  return { from, to, store, callsOf, key: newKey() }
}

const fail = (message: string, code?: string) => () => {
  throw Object.assign(new Error(message), code && { code })
}

/* What it takes */

t.test('it takes two stores, and says which of them is none', (t) => {
  const invalid = 'FST_IDEMPOTENCY_INVALID_OPTION'
  const store = new MemoryStore()
  t.throws(() => new MigratingStore(undefined as never, store), { code: invalid, message: /as "from", got undefined/ })
  t.throws(() => new MigratingStore(store, {} as never), { code: invalid, message: /as "to", got/ })
  t.throws(() => new MigratingStore(store, MemoryStore as never), { code: invalid, message: /write new MemoryStore/ })
  t.throws(() => new MigratingStore(store, store), { code: invalid, message: /the same one twice/ })
  const sealed = new EncryptedStore(store, { keys: [Buffer.alloc(32, 1)] })
  t.throws(() => new MigratingStore(new LocalCache(store), sealed), { code: invalid, message: /the same one twice/ })
  t.doesNotThrow(() => new MigratingStore(new LocalCache(new MemoryStore()), sealed))
  t.end()
})

t.test('what a store need not have, it has where both have it, and close where one has', async (t) => {
  const names = ['step', 'changed', 'get', 'delete', 'list', 'settle', 'begin', 'close'] as const
  const has = (store: IdempotencyStore) => names.filter((name) => store[name] !== undefined)
  const whole = new MemoryStore()
  const least = (): IdempotencyStore => {
    const { acquire, renew, complete, release } = new MemoryStore()
    return { acquire, renew, complete, release }
  }
  const all = ['step', 'changed', 'get', 'delete', 'list', 'settle', 'close']
  t.same(has(new MigratingStore(whole, new MemoryStore())), all)
  const blind: IdempotencyStore = Object.assign(new MemoryStore(), { get: undefined })
  t.same(has(new MigratingStore(whole, blind)), ['step', 'changed', 'delete', 'list', 'close'])
  t.same(has(new MigratingStore(whole, least())), ['close'])
  t.same(has(new MigratingStore(least(), whole)), ['close'])
  t.same(has(new MigratingStore(least(), least())), [])
})

t.test('a route with a transaction does not boot on it, and hears why', async (t) => {
  const app = await build(t, { store: scene().store })
  const route = () => app.post('/', { config: { idempotency: { transaction: true } } }, async () => 'x')
  t.throws(route, { message: /takes a store with transactions \(PostgresStore\), got MigratingStore/ })
})

t.test('closing closes both, even when one of them cannot', async (t) => {
  const { store, from, to } = scene()
  const closed = latch()
  from.next.close = fail('stuck')
  to.next.close = () => closed.promise
  let isOver = false
  const closing = store.close().finally(() => {
    isOver = true
  })
  closing.catch(() => {})
  await new Promise<void>((resolve) => setImmediate(resolve))
  t.equal(isOver, false)
  closed.open()
  await t.rejects(closing, { message: 'stuck' })
})

/* Claims */

t.test('a claim asks `from` first, and `to` only when `from` is its own', async (t) => {
  const { store, callsOf, key } = scene()
  t.strictSame(await callsOf(() => take(store, key)), ['from.acquire', 'to.acquire'])
  t.strictSame(await callsOf(() => store.acquire(key, claim())), ['from.acquire'])
})

t.test('a claim that finds `to` running is given back in `from` as it was found', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(from, key, { fingerprint: 'the dead' })
  await take(to, key, { fingerprint: 'of `to` alone' })
  t.match(await store.acquire(key, claim({ takeover: true })), { state: 'running', fingerprint: 'of `to` alone' })
  t.match(await from.get(key), { state: 'abandoned', attempt: 1, fingerprint: 'the dead' })
})

t.test('a record that only `to` has is put into `from` before it is shown', async (t) => {
  for (const takeover of [false, true]) {
    for (const before of [async () => {}, lapsed] as ((store: MemoryStore, key: string) => Promise<unknown>)[]) {
      const { store, from, to, key } = scene()
      await before(from, key)
      await finish(to, key, reply({ statusCode: 299 }))
      same(t, await store.acquire(key, claim({ takeover })), reply({ statusCode: 299 }))
      same(t, await from.acquire(key, claim({ takeover: true })), reply({ statusCode: 299 }))
    }
  }
})

t.test('what is abandoned in `from` is not abandoned while it runs in `to`', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(from, key)
  await take(to, key, { fingerprint: 'at work' })
  t.match(await store.acquire(key, claim()), { state: 'running', fingerprint: 'at work' })
})

t.test('what is abandoned in `from` alone leaves nothing in `to` when somebody looks', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(from, key, { fingerprint: 'the dead' })
  t.match(await store.acquire(key, claim()), { state: 'abandoned', attempt: 1, fingerprint: 'the dead' })
  t.equal(await to.get(key), null)
})

t.test('what is abandoned in both is what the later attempt has left, with the steps of both', async (t) => {
  const { store, from, to, key } = scene()
  const [a, b] = [claim({ fingerprint: 'earlier' }), claim({ fingerprint: 'later', takeover: true })]
  await from.acquire(key, a)
  await from.step(key, a.token, ['a', '1'])
  await from.release(key, a.token)
  await lapsed(to, key)
  await to.acquire(key, b)
  await to.step(key, b.token, ['b', '2'])
  await to.renew(key, b.token, 1)
  await lapse()
  const steps = [
    ['a', '1'],
    ['b', '2']
  ]
  const left = { state: 'abandoned', fingerprint: 'later', attempt: 2, steps, ended: undefined }
  for (const found of [await store.acquire(key, claim()), await store.get(key)]) t.match(found, left)
})

for (const [behind, ahead] of [
  ['to', 'from'],
  ['from', 'to']
] as const) {
  t.test(
    `who takes over goes on from attempt and steps of \`${ahead}\`, and leaves them in \`${behind}\` too`,
    async (t) => {
      const scenery = scene()
      const { store, key } = scenery
      for (let attempt = 1; attempt <= 3; attempt++) {
        const former = claim({ takeover: true, leaseMs: attempt === 1 ? 1 : 60_000 })
        await scenery[ahead].acquire(key, former)
        if (attempt > 1) await scenery[ahead].step(key, former.token, [`step ${attempt}`, '1'])
        if (attempt > 1) await scenery[ahead].release(key, former.token)
        else await lapse()
      }
      const heir = claim({ takeover: true, retainMs: DAY, fingerprint: 'the heir' })
      const steps = [
        ['step 2', '1'],
        ['step 3', '1']
      ]
      t.strictSame(await store.acquire(key, heir), { state: 'acquired', attempt: 4, steps })
      t.equal(await store.release(key, heir.token), true)
      const left = { state: 'abandoned', fingerprint: 'the heir', attempt: 4, ended: true, steps }
      for (const side of [scenery.from, scenery.to]) t.match(await side.get(key), left)
    }
  )
}

t.test('who takes over what died without a step has the next attempt in both', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(from, key)
  const heir = claim({ takeover: true })
  t.strictSame(await store.acquire(key, heir), { state: 'acquired', attempt: 2 })
  await store.release(key, heir.token)
  for (const side of [from, to]) t.match(await side.get(key), { state: 'abandoned', attempt: 2, ended: true })
})

t.test('who gets the key while an attempt is raised keeps it', async (t) => {
  const store = new MemoryStore()
  const key = newKey()
  const mine = claim()
  await store.acquire(key, mine)
  const { release } = store
  store.release = async (...args) => {
    const released = await release.apply(store, args)
    await take(store, key, { fingerprint: 'faster' })
    return released
  }
  const found = await raise(store, key, mine, { state: 'acquired', attempt: 1 }, 2)
  t.match(found, { state: 'running', fingerprint: 'faster' })
})

t.test('of two results of one step that of `to` counts', async (t) => {
  const { store, from, to, key } = scene()
  for (const [side, result] of [
    [from, 'nobody was told'],
    [to, 'told']
  ] as const) {
    await side.step(key, await take(side, key, { token: 'dead', leaseMs: 1 }), ['step', result])
  }
  await lapse()
  t.match(await store.acquire(key, claim({ takeover: true })), { attempt: 2, steps: [['step', 'told']] })
})

t.test('a claim whose answer from `to` got lost is there when it is asked for again', async (t) => {
  const { store, to, key } = scene()
  const mine = claim()
  to.next.acquire = fail('full', 'FST_IDEMPOTENCY_STORE_FULL')
  await t.rejects(store.acquire(key, mine), { message: 'full', code: 'FST_IDEMPOTENCY_STORE_FULL' })
  t.match(await store.acquire(key, claim()), { state: 'running' }, 'it may have been written')
  t.strictSame(await store.acquire(key, mine), { state: 'acquired', attempt: 1 })
  t.equal(await store.complete(key, mine.token, reply(), null), true)
})

t.test('what the caller changes after its call is not stored', async (t) => {
  const { store, from, to, key } = scene()
  const mine = claim({ fingerprint: 'as it was' })
  const acquired = store.acquire(key, mine)
  mine.fingerprint = 'changed'
  await acquired
  for (const side of [from, to]) t.match(await side.get(key), { fingerprint: 'as it was' })
  const record = reply({ headers: [['x-a', ['1']]] })
  const completed = store.complete(key, mine.token, record, null)
  record.body.fill(0)
  record.headers.length = 0
  await completed
  for (const side of [from, to]) same(t, await side.get(key), reply({ headers: [['x-a', ['1']]] }))
})

t.test('who gets `from` while a record is put there is what is found', async (t) => {
  const { store, from, to, key } = scene()
  await finish(to, key)
  const mine = claim()
  from.next.complete = async () => {
    await from.release(key, mine.token)
    await take(from, key, { fingerprint: 'faster' })
  }
  t.match(await store.acquire(key, mine), { state: 'running', fingerprint: 'faster' })
})

t.test('a record that has less than a millisecond left is put into `from` for a whole one', async (t) => {
  const { from, to, key } = scene()
  await finish(to, key)
  const ttls: unknown[] = []
  const complete = from.complete.bind(from)
  from.complete = (key, token, record, ttl) => {
    ttls.push(ttl)
    return complete(key, token, record, ttl)
  }
  const acquire = to.acquire.bind(to)
  to.acquire = async (...args) => ({ ...(await acquire(...args)), ttlMs: 0.4 }) as never
  await new MigratingStore(from, to).acquire(key, claim())
  t.strictSame(ttls, [1])
})

t.test('an attempt that others have raised further meanwhile is raised in the other store too', async (t) => {
  for (const behind of ['from', 'to'] as const) {
    const scenery = scene()
    const { store, from, to, key } = scenery
    await lapsed(scenery[behind === 'from' ? 'to' : 'from'], key)
    to.next.acquire = () => {
      scenery[behind].next.release = () => {
        // While nobody has it.
        scenery[behind].next.acquire = async () => {
          await lapsed(scenery[behind], key)
          await scenery[behind].acquire(key, claim({ takeover: true, leaseMs: 1 }))
          await lapse()
        }
      }
    }
    const heir = claim({ takeover: true })
    const found = await store.acquire(key, heir)
    t.match(found, { state: 'acquired' })
    const attempts = await Promise.all([from, to].map((side) => side.acquire(key, heir)))
    t.strictSame(attempts, [found, found])
    t.ok((found as { attempt: number }).attempt > 2)
  }
})

t.test('who loses `from` while its attempt is raised there lets go of `to`', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(to, key)
  to.next.acquire = () => {
    from.next.acquire = () => take(from, key, { fingerprint: 'faster' })
  }
  t.match(await store.acquire(key, claim({ takeover: true })), { state: 'running', fingerprint: 'faster' })
  t.match(await to.get(key), { state: 'abandoned', attempt: 1 })
})

t.test('a claim that leaves nothing behind leaves what it has taken over in order to put a record there', async (t) => {
  const { store, from, to, key } = scene()
  await lapsed(from, key)
  await finish(to, key)
  from.next.complete = fail('down')
  await t.rejects(store.acquire(key, claim({ leaseMs: 1, retainMs: 0 })), { message: 'down' })
  await lapse()
  t.match(await from.get(key), { state: 'abandoned', attempt: 2 })
})

t.test('a claim that leaves nothing behind is raised all the same, and leaves nothing', async (t) => {
  const store = new MemoryStore()
  const [key, mine] = [newKey(), claim({ leaseMs: 500, retainMs: 0 })]
  await store.acquire(key, mine)
  t.strictSame(await raise(store, key, mine, { state: 'acquired', attempt: 1 }, 3), { state: 'acquired', attempt: 3 })
  await store.renew(key, mine.token, 1)
  await lapse()
  t.equal(await store.get(key), null)
})

t.test('what has ended in one store and has lapsed in the other has not ended', async (t) => {
  for (const ended of ['from', 'to'] as const) {
    const scenery = scene()
    const { store, key } = scenery
    const token = await take(store, key)
    await store.step(key, token, ['a', '1'])
    for (const side of ['from', 'to'] as const) {
      if (side === ended) await scenery[side].release(key, token)
      else await scenery[side].renew(key, token, 1)
    }
    await lapse()
    t.match(await store.acquire(key, claim()), {
      state: 'abandoned',
      fingerprint: 'fingerprint',
      attempt: 1,
      ended: undefined,
      steps: [['a', '1']]
    })
  }
})

/* Leases */

t.test('what its owner has given back in one store is not claimed there anew', async (t) => {
  for (const given of ['from', 'to'] as const) {
    const scenery = scene()
    const { store, key } = scenery
    const token = await take(store, key)
    await scenery[given].release(key, token)
    t.equal(await store.renew(key, token, 60_000), false)
    t.equal(await scenery[given].get(key), null)
  }
})

t.test('a lapsed claim that was taken over in `to` does not hold `from` when it is renewed or completed', async (t) => {
  for (const asked of [
    (store: IdempotencyStore, key: string, token: string) => store.renew(key, token, 60_000),
    (store: IdempotencyStore, key: string, token: string) => store.complete(key, token, reply(), null)
  ]) {
    const { store, from, to, key } = scene()
    const token = await lapsed(store, key)
    await to.acquire(key, claim({ takeover: true }))
    t.equal(await asked(new MigratingStore(from, to), key, token), false)
    t.equal(await from.get(key), null)
  }
})

t.test('a lease that holds is renewed in both, and one that may have lapsed in `from` first', async (t) => {
  const { store, from, key, callsOf } = scene()
  const token = await take(store, key)
  t.strictSame(await callsOf(() => store.renew(key, token, 1)), ['from.renew', 'to.renew'])
  await lapse()
  await from.acquire(key, claim({ takeover: true }))
  t.strictSame(await callsOf(async () => t.equal(await store.renew(key, token, 60_000), false)), ['from.renew'])
})

for (const lost of ['from', 'to'] as const) {
  t.test(`a claim that \`${lost}\` has forgotten is there again with its steps when it is renewed`, async (t) => {
    const scenery = scene()
    const { store, key } = scenery
    const token = await take(store, key, { fingerprint: 'mine' })
    await store.step(key, token, ['step', '1'])
    await scenery[lost].delete(key)
    t.equal(await store.renew(key, token, 60_000), true)
    t.match(await scenery[lost].get(key), { state: 'running', fingerprint: 'mine', steps: [['step', '1']] })
  })

  t.test(`a step and a completion find the claim again that \`${lost}\` has forgotten`, async (t) => {
    const scenery = scene()
    const { store, key } = scenery
    const token = await take(store, key)
    await scenery[lost].delete(key)
    t.equal(await store.step(key, token, ['step', '1']), true)
    t.match(await scenery[lost].get(key), { state: 'running', steps: [['step', '1']] })
    await store.renew(key, token, 3_000)
    await scenery[lost].delete(key)
    t.equal(await store.complete(key, token, reply(), null), true)
    for (const side of [scenery.from, scenery.to]) same(t, await side.get(key), reply())
  })

  t.test(
    `who has taken the key where \`${lost}\` had forgotten it keeps it, and the other one is free for them`,
    async (t) => {
      const scenery = scene()
      const { store, key } = scenery
      const token = await take(store, key)
      await scenery[lost].delete(key)
      await take(scenery[lost], key, { fingerprint: 'the next' })
      t.equal(await store.renew(key, token, 60_000), false)
      t.match(await scenery[lost].get(key), { state: 'running', fingerprint: 'the next' })
      t.equal(await scenery[lost === 'from' ? 'to' : 'from'].get(key), null)
    }
  )
}

t.test('what both have forgotten is not claimed again: that is for the owner to decide', async (t) => {
  const { store, key } = scene()
  const token = await take(store, key)
  await store.delete(key)
  t.equal(await store.renew(key, token, 60_000), false)
  t.equal(await store.step(key, token, ['a', '1']), false)
  t.equal(await store.complete(key, token, reply(), null), false)
  t.equal(await store.get(key), null)
})

/* Records */

t.test('a record is in `to` before it is in `from`', async (t) => {
  const { store, callsOf, key } = scene()
  const token = await take(store, key)
  const complete = () => store.complete(key, token, reply(), null)
  t.strictSame(await callsOf(complete), ['to.complete', 'from.complete'])
})

t.test('nobody in `from` comes between the halves of the completion of a lapsed claim', async (t) => {
  const { store, from, to, key } = scene()
  const token = await lapsed(store, key)
  let found: unknown
  to.next.complete = async () => {
    found = await from.acquire(key, claim({ takeover: true }))
  }
  t.equal(await store.complete(key, token, reply(), null), true)
  t.match(found, { state: 'running' })
  same(t, await from.get(key), reply())
})

t.test('who asks while a lapsed claim is being completed finds it completed', async (t) => {
  const { store, from, to, key } = scene()
  const token = await lapsed(store, key)
  const [begun, finish] = [latch(), latch()]
  to.next.complete = () => {
    begun.open()
    return finish.promise
  }
  const completed = store.complete(key, token, reply(), null)
  await begun.promise
  const found = new MigratingStore(from, to).acquire(key, claim({ takeover: true }))
  finish.open()
  t.equal(await completed, true)
  same(t, await found, reply())
})

t.test('a lapsed claim that was taken over in `from` completes nothing in `to`', async (t) => {
  const { store, from, to, key } = scene()
  const token = await lapsed(store, key)
  await from.acquire(key, claim({ takeover: true }))
  t.equal(await store.complete(key, token, reply(), null), false)
  t.match(await to.get(key), { state: 'abandoned' })
})

t.test(
  'a claim that was taken over in `to` does not hold `from` any longer when it could not be completed',
  async (t) => {
    const { store, from, to, key } = scene()
    const token = await lapsed(store, key)
    await finish(to, key, reply(), 1).catch(() => {})
    await to.acquire(key, claim({ takeover: true }))
    t.equal(await store.complete(key, token, reply(), null), false)
    t.equal(await from.get(key), null)
  }
)

t.test('a completion that `from` did not hear of is whole when it is repeated', async (t) => {
  const { store, from, to, key } = scene()
  const token = await take(store, key)
  from.next.complete = fail('down')
  await t.rejects(store.complete(key, token, reply(), null), { message: 'down' })
  t.match(await store.acquire(key, claim({ takeover: true })), { state: 'running' }, 'it is shown to nobody')
  t.equal(await store.renew(key, token, 60_000), true, 'and kept, although `to` has no claim any more')
  for (let n = 0; n < 2; n++) t.equal(await store.complete(key, token, reply(), null), true)
  for (const side of [from, to]) same(t, await side.get(key), reply())
  t.equal(await new MigratingStore(from, to).complete(key, token, reply(), null), true)
})

t.test("a record that another has put into `from` for its owner is the owner's", async (t) => {
  const { store, from, to, key } = scene()
  const token = await take(store, key)
  from.next.complete = fail('down')
  await t.rejects(store.complete(key, token, reply(), null), { message: 'down' })
  t.equal(await store.renew(key, token, 1), true)
  await lapse()
  same(t, await new MigratingStore(from, to).acquire(key, claim({ takeover: true })), reply())
  t.equal(await store.complete(key, token, reply(), null), true)
})

t.test('a record is put into `from` although it has just lost its data', async (t) => {
  const { store, from, key } = scene()
  const token = await take(store, key)
  from.next.complete = () => from.delete(key)
  t.equal(await store.complete(key, token, reply(), null), true)
  same(t, await from.get(key), reply())
})

t.test('a record is not stored when another one is in `from` by then', async (t) => {
  const { store, from, key } = scene()
  const token = await take(store, key)
  from.next.complete = async () => {
    await from.renew(key, token, 1)
    await lapse()
    const heir = claim({ takeover: true })
    await from.acquire(key, heir)
    await from.complete(key, heir.token, reply({ statusCode: 299 }), null)
  }
  t.equal(await store.complete(key, token, reply(), null), false)
  same(t, await store.acquire(key, claim()), reply({ statusCode: 299 }))
})

/* Steps, releases, looks */

t.test('a step is kept in `from`, then in `to`', async (t) => {
  const { store, callsOf, key } = scene()
  const token = await take(store, key)
  t.strictSame(await callsOf(() => store.step(key, token, ['a', '1'])), ['from.step', 'to.step'])
})

t.test(
  'a step of a lapsed claim is kept when who takes over has got it, and is not when that is in `to` alone',
  async (t) => {
    for (const heirs of ['both', 'to'] as const) {
      const { store, from, to, key, callsOf } = scene()
      const token = await lapsed(store, key)
      const heir = claim({ takeover: true })
      let found: unknown
      to.next.step = async () => {
        found = await (heirs === 'to' ? to : new MigratingStore(from, to)).acquire(key, heir)
      }
      const kept = heirs === 'both'
      const calls = await callsOf(async () => t.equal(await store.step(key, token, ['a', '1']), kept))
      t.strictSame(found, { state: 'acquired', attempt: 2, ...(kept && { steps: [['a', '1']] }) })
      if (!kept) t.strictSame(calls, ['from.step', 'to.step', 'to.acquire', 'from.step'])
    }
  }
)

t.test('a release is heard by both when one of them fails, and is whole when it is repeated', async (t) => {
  for (const down of ['from', 'to'] as const) {
    const scenery = scene()
    const { store, from, to, key } = scenery
    const token = await take(store, key)
    scenery[down].next.release = fail('down')
    await t.rejects(store.release(key, token), { message: 'down' })
    t.equal(await scenery[down === 'from' ? 'to' : 'from'].get(key), null)
    t.equal(await store.release(key, token), true)
    t.same([await from.get(key), await to.get(key)], [null, null])
  }
})

t.test('a claim is not given back by who has it in one store only', async (t) => {
  const { store, from, key } = scene()
  const token = await lapsed(store, key)
  await from.acquire(key, claim({ takeover: true }))
  t.equal(await store.release(key, token), false)
})

t.test('get shows what acquire would say', async (t) => {
  const { store, from, to, key } = scene()
  await finish(to, key)
  same(t, await store.get(key), reply())
  await take(from, key, { fingerprint: 'of `from`' })
  t.match(await store.get(key), { state: 'running', fingerprint: 'of `from`' })
  const other = newKey()
  await lapsed(from, other)
  t.match(await store.get(other), { state: 'abandoned' })
  await take(to, other, { fingerprint: 'of `to`' })
  t.match(await store.get(other), { state: 'running', fingerprint: 'of `to`' })
})

t.test('delete forgets `to` first, and says whether there was anything', async (t) => {
  const { store, from, to, callsOf, key } = scene()
  t.strictSame(await callsOf(async () => t.equal(await store.delete(key), false)), ['to.delete', 'from.delete'])
  for (const side of [from, to]) {
    await finish(side, key)
    t.equal(await store.delete(key), true)
  }
})

t.test('what is abandoned in both is so since both leases have lapsed', async (t) => {
  const lapsedFor = (lapsedMs?: number) => {
    const found = { state: 'abandoned', fingerprint: '', attempt: 1, ...(lapsedMs && { lapsedMs }) } as const
    return Object.assign(new MemoryStore(), { get: async () => found })
  }
  const told = async (inFrom?: number, inTo?: number) => {
    const found = await new MigratingStore(lapsedFor(inFrom), lapsedFor(inTo)).get?.('key')
    return (found as { lapsedMs?: number }).lapsedMs
  }
  t.equal(await told(500, 300), 300)
  t.equal(await told(300, 500), 300)
  t.equal(await told(undefined, 500), undefined, 'what one of them does not know is not known')
})

t.test('list shows all of `to`, then all of `from`, page by page', async (t) => {
  const keys = ['a', 'b', 'c', '']
  /** Each key is a page, and the cursor of the page behind it. */
  const paged = (outcome: number) =>
    Object.assign(new MemoryStore(), {
      list: async (kinds: readonly string[], cursor: string | null) => {
        t.strictSame(kinds, ['reply'])
        const at = cursor === null ? 0 : keys.indexOf(cursor) + 1
        const found = { state: 'completed', fingerprint: '', createdAt: 0, outcome, ttlMs: null } as const
        return {
          keys: [{ ...found, key: keys[at] as string }],
          cursor: at < keys.length - 1 ? (keys[at] as string) : null
        }
      }
    })
  const { list } = new MigratingStore(paged(201), paged(202)) as unknown as Required<IdempotencyStore>
  const listed: unknown[] = []
  for (let cursor: string | null = null; ; ) {
    const page = await list(['reply'], cursor)
    for (const found of page.keys) listed.push([found.key, found.state === 'completed' && found.outcome])
    cursor = page.cursor
    if (cursor === null) break
  }
  t.strictSame(listed, [...keys.map((key) => [key, 202]), ...keys.map((key) => [key, 201])])
})

t.test('who listens hears the end of a claim in both, in `from` alone and in `to` alone', async (t) => {
  for (const side of ['store', 'from', 'to'] as const) {
    const scenery = scene()
    const { store, key } = scenery
    const token = await take(scenery[side], key)
    let hasHeard = false
    const heard = store.changed(key, new AbortController().signal).then(() => {
      hasHeard = true
    })
    await new Promise<void>((resolve) => setImmediate(resolve))
    t.equal(hasHeard, false)
    await scenery[side].complete(key, token, reply(), null)
    await heard
  }
})

t.test('who stops to listen leaves nothing behind in either store', async (t) => {
  const stops: AbortSignal[] = []
  const { store, from, to, key } = scene()
  for (const side of [from, to]) {
    const { changed } = MemoryStore.prototype
    side.changed = (key, signal) => {
      stops.push(signal)
      return changed.call(side, key, signal)
    }
  }
  const listening = new MigratingStore(from, to)
  const token = await take(store, key)
  const stop = new AbortController()
  const heard = listening.changed?.(key, stop.signal)
  stop.abort()
  await heard
  const again = listening.changed?.(key, new AbortController().signal)
  await store.release(key, token)
  await again
  t.strictSame(
    stops.map(({ aborted }) => aborted),
    [true, true, true, true]
  )
})

/** Until a lease of a millisecond has lapsed for certain. */
function lapse(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 3))
}
