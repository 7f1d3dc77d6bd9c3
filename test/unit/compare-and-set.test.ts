import { isDeepStrictEqual } from 'node:util'
import t, { type Test } from 'tap'
import { decodeClaim, decodeValue, encodeClaim, type StoredClaim } from '../../lib/stores/cas/claim-codec.js'
import { CompareAndSetStore } from '../../lib/stores/cas/compare-and-set-store.js'
import type { Claim, IdempotencyStore, StoredRecord } from '../../types/index.js'
import { latch, until } from '../support/latch.js'
import { MemoryDriver } from '../support/memory-driver.js'
import { reply, tombstone } from '../support/store-fixtures.js'
import { VirtualTime } from '../support/virtual-time.js'

/* What holds of every store on the core of compare-and-set, whatever its database. The conformance kit says the rest. */

const LEASE = 1_000
const RETAIN = 5_000
const TTL = 60_000
const KEY = 'key'

const claim = (token: string, changes: Partial<Claim> = {}): Claim => ({
  token,
  fingerprint: `of ${token}`,
  leaseMs: LEASE,
  retainMs: RETAIN,
  takeover: false,
  ...changes
})

function open() {
  const driver = new MemoryDriver()
  const store = new CompareAndSetStore(driver, null)
  const pass = (ms: number) => {
    driver.now += ms
  }
  return { driver, store, pass }
}

type Scene = ReturnType<typeof open>
type Step = (scene: Scene) => Promise<unknown>

/** How a key comes to where it is. `owner` is who has, or had, it; `heir` took it over. */
const STATES: Record<string, Step> = {
  free: async () => undefined,
  running: ({ store }) => store.acquire(KEY, claim('owner')),
  lapsed: async ({ store, pass }) => {
    await store.acquire(KEY, claim('owner'))
    pass(LEASE)
  },
  'with a step': async ({ store }) => {
    await store.acquire(KEY, claim('owner'))
    await store.step(KEY, 'owner', ['ride', '1'])
  },
  'taken over': async ({ store, pass }) => {
    await store.acquire(KEY, claim('owner'))
    pass(LEASE)
    await store.acquire(KEY, claim('heir', { takeover: true }))
  },
  'given back': async ({ store }) => {
    await store.acquire(KEY, claim('owner'))
    await store.step(KEY, 'owner', ['ride', '1'])
    await store.release(KEY, 'owner')
  },
  released: async ({ store }) => {
    await store.acquire(KEY, claim('owner'))
    await store.release(KEY, 'owner')
  },
  completed: async ({ store }) => {
    await store.acquire(KEY, claim('owner'))
    await store.complete(KEY, 'owner', reply(), TTL)
  },
  expired: async ({ store, pass }) => {
    await store.acquire(KEY, claim('owner'))
    await store.complete(KEY, 'owner', reply(), TTL)
    pass(TTL)
  },
  forgotten: async ({ store, pass }) => {
    await store.acquire(KEY, claim('owner'))
    pass(LEASE + RETAIN)
  }
}

/** All that can be asked of a store that changes something, by those who were there and by a stranger. */
const OPERATIONS: Record<string, Step> = {
  'a claim': ({ store }) => store.acquire(KEY, claim('stranger')),
  'a takeover': ({ store }) => store.acquire(KEY, claim('stranger', { takeover: true })),
  'the claim again': ({ store }) => store.acquire(KEY, claim('owner', { leaseMs: 2 * LEASE })),
  renewal: ({ store }) => store.renew(KEY, 'owner', LEASE),
  'renewal by the heir': ({ store }) => store.renew(KEY, 'heir', LEASE),
  'a step': ({ store }) => store.step(KEY, 'owner', ['charge', '2']),
  'a step by the heir': ({ store }) => store.step(KEY, 'heir', ['charge', '3']),
  completion: ({ store }) => store.complete(KEY, 'owner', reply(), TTL),
  'completion by the heir': ({ store }) => store.complete(KEY, 'heir', tombstone('hijacked'), null),
  release: ({ store }) => store.release(KEY, 'owner'),
  'release of what never ran': ({ store }) => store.release(KEY, 'heir', true),
  deletion: ({ store }) => store.delete(KEY)
}

/** All that a key is, but for the names of its revisions. */
async function seen({ driver, store }: Scene): Promise<unknown> {
  const rows = [...driver.rows].map(([key, { revision: _, ...content }]) => [key, content])
  return { rows, found: await store.get(KEY) }
}

/** What both answer, and what is left, when one comes after the other. */
async function inOrder(arrange: Step, first: Step, second: Step): Promise<unknown[]> {
  const scene = open()
  await arrange(scene)
  const answers = [await first(scene), await second(scene)]
  return [...answers, await seen(scene)]
}

for (const [state, arrange] of Object.entries(STATES)) {
  t.test(`where the key is ${state}, two who ask at once are answered as if one had come first`, async (t) => {
    for (const [name, operation] of Object.entries(OPERATIONS)) {
      for (const [other, between] of Object.entries(OPERATIONS)) {
        const scene = open()
        await arrange(scene)
        const second: Scene = { ...scene, store: new CompareAndSetStore(scene.driver, null) }
        let came: Promise<unknown> | undefined
        scene.driver.afterFind = () => {
          scene.driver.afterFind = () => undefined
          came = between(second)
          return came
        }
        const answer = await operation(scene)
        scene.driver.afterFind = () => undefined
        // Where nobody looked, nothing came between.
        if (came === undefined) continue

        const mixed = [await came, answer, await seen(scene)]
        const [left, right, after] = await inOrder(arrange, operation, between)
        const orders = [await inOrder(arrange, between, operation), [right, left, after]]
        const isLikeOne = orders.some((order) => isDeepStrictEqual(order, mixed))
        t.ok(isLikeOne, `${other} in the middle of ${name}`, { mixed, orders })
      }
    }
  })
}

t.test('a claim that was deleted and made anew by the same token is not the one that was looked at', async (t) => {
  const { driver, store, pass } = open()
  await store.acquire(KEY, claim('owner'))
  pass(LEASE)
  driver.afterFind = async () => {
    driver.afterFind = () => undefined
    await store.delete(KEY)
    await new CompareAndSetStore(driver, null).acquire(KEY, claim('owner'))
  }
  t.match(await store.acquire(KEY, claim('stranger', { takeover: true })), { state: 'running' })
})

t.test('a key that changes between every look and every change is given up, and an error says so', async (t) => {
  const { driver, store } = open()
  const other = new CompareAndSetStore(driver, null)
  await store.acquire(KEY, claim('owner'))
  driver.afterFind = async () => {
    const row = driver.rows.get(KEY)
    if (row !== undefined) driver.rows.set(KEY, { ...row, revision: `${row.revision}'` })
  }
  await t.rejects(store.renew(KEY, 'owner', LEASE), { message: /changes hands too fast/ })
  await t.rejects(store.delete(KEY), { message: /changes hands too fast/ })
  driver.rows.clear()
  driver.insert = async () => false
  await t.rejects(other.acquire(KEY, claim('stranger')), { message: /changes hands too fast/ })
})

t.test('a first claim is one trip, and so is its completion; everything else is two', async (t) => {
  const { driver, store, pass } = open()
  const trips = async (ask: Promise<unknown>) => {
    await ask
    return driver.calls.splice(0)
  }
  t.strictSame(await trips(store.acquire(KEY, claim('owner'))), ['insert'])
  t.strictSame(await trips(store.acquire(KEY, claim('stranger'))), ['insert', 'find'])
  t.strictSame(await trips(store.renew(KEY, 'owner', LEASE)), ['find', 'replace'])
  t.strictSame(await trips(store.step(KEY, 'owner', ['a', '1'])), ['find', 'replace'])
  t.strictSame(await trips(store.complete(KEY, 'owner', reply(), TTL)), ['complete'])
  t.strictSame(await trips(store.acquire(KEY, claim('stranger'))), ['insert', 'find'])
  t.strictSame(await trips(store.get(KEY)), ['find'])
  pass(TTL)
  t.strictSame(await trips(store.acquire(KEY, claim('stranger'))), ['insert', 'find', 'replace'])
  t.strictSame(await trips(store.release(KEY, 'stranger')), ['find', 'replace'])
  t.strictSame(await trips(store.delete(KEY)), ['find', 'remove'])
})

t.test('a lease counts from when its row was looked at, however late it is replaced', async (t) => {
  const { driver, store, pass } = open()
  await store.acquire(KEY, claim('owner'))
  driver.afterFind = async () => pass(LEASE - 1)
  await store.renew(KEY, 'owner', LEASE)
  driver.afterFind = () => undefined
  t.match(await store.get(KEY), { state: 'running', leaseMs: 1 })
})

/* What is in a row */

const CLAIMS: StoredClaim[] = [
  { attempt: 1, retainMs: 0, fingerprint: '', found: null, steps: [] },
  { attempt: 7, retainMs: 4e15, fingerprint: 'f \u0000\ud800 🚲', found: { fingerprint: 'g', ended: true }, steps: [] },
  {
    attempt: 2,
    retainMs: 1,
    fingerprint: 'f',
    found: { fingerprint: '', ended: false },
    steps: [
      ['a', '"b"'],
      ['', '']
    ]
  }
]

t.test('a claim comes back as it was', async (t) => {
  for (const stored of CLAIMS) t.strictSame(decodeClaim(encodeClaim(stored)), stored)
})

t.test('a row that is not ours, or of another version, cannot be read: nobody is given anything for it', async (t) => {
  const texts = [
    ...[
      '',
      '1',
      '1{',
      '1null',
      '1[]',
      '1[1,2,"f"]',
      '1[1,2,"f",0,[],0]',
      '2[1,2,"f",0]',
      '[1,2,"f",0]',
      '1["1",2,"f",0]'
    ],
    ...['1[1,null,"f",0]', '1[1,2,3,0]', '1[1,2,"f",1]', '1[1,2,"f",["g"]]', '1[1,2,"f",["g",2]]', '1[1,2,"f",[0,1]]'],
    ...['1[1,2,"f",0,{}]', '1[1,2,"f",0,[["a"]]]', '1[1,2,"f",0,[["a",1]]]', '1[-1,2,"f",0]', '1[1,-2,"f",0]']
  ]
  for (const text of texts) {
    t.throws(() => decodeClaim(Buffer.from(text)), { message: /could not be decoded/ }, text)
    t.throws(() => decodeValue(Buffer.from(text)), { message: /could not be decoded/ }, text)
  }
  for (const state of ['running', 'completed'] as const) {
    const { driver, store } = open()
    await store.acquire(KEY, claim('owner'))
    const row = driver.rows.get(KEY)
    if (row !== undefined) driver.rows.set(KEY, { ...row, state, value: Buffer.from('2') })
    const asks = (store: IdempotencyStore) => [
      store.acquire(KEY, claim('stranger', { takeover: true })),
      store.get?.(KEY)
    ]
    for (const ask of asks(store)) await t.rejects(ask as Promise<unknown>, { message: /could not be decoded/ }, state)
  }
})

/* Waiting */

// The store's own timers do not keep the process alive.
const alive = setInterval(() => {}, 1_000)
t.teardown(() => clearInterval(alive))

/** The keys of so many running claims. */
async function running({ store }: Scene, count: number): Promise<string[]> {
  const keys = Array.from({ length: count }, (_, n) => `key ${n}`)
  for (const key of keys) await store.acquire(key, claim('owner'))
  return keys
}

const never = new AbortController().signal
const completed: StoredRecord = reply()

t.test('whoever waits hears at once of what the same store has done, without another question', async (t) => {
  const scene = open()
  const [key = ''] = await running(scene, 1)
  const heard = scene.store.changed(key, never)
  await until(() => scene.driver.calls.includes('running'))
  scene.driver.calls.length = 0
  await scene.store.complete(key, 'owner', completed, TTL)
  await heard
  t.strictSame(scene.driver.calls, ['complete'])
})

t.test('one question asks for many keys: what others have done is heard of, and nothing else', async (t) => {
  const scene = open()
  const keys = await running(scene, 450)
  const asked: number[] = []
  const heard = new Set<string>()
  for (const key of keys) void scene.store.changed(key, never).then(() => heard.add(key))
  await until(() => scene.driver.calls.filter((call) => call === 'running').length === keys.length)
  const ask = scene.driver.running.bind(scene.driver)
  scene.driver.running = (keys) => {
    asked.push(keys.length)
    return ask(keys)
  }
  const other = new CompareAndSetStore(scene.driver, null)
  const ended = keys.filter((_, n) => n % 3 === 0)
  for (const key of ended) await other.complete(key, 'owner', completed, TTL)
  await until(() => heard.size >= ended.length)
  t.strictSame([...heard].sort(), [...ended].sort())
  t.strictSame(asked.slice(0, 3), [200, 200, 50])
  await scene.store.close()
})

t.test('a question that fails is asked again', async () => {
  const scene = open()
  const [key = ''] = await running(scene, 1)
  const heard = scene.store.changed(key, never)
  await until(() => scene.driver.calls.includes('running'))
  const ask = scene.driver.running
  let failures = 0
  scene.driver.running = async () => {
    failures++
    throw new Error('away')
  }
  await new CompareAndSetStore(scene.driver, null).release(key, 'owner')
  await until(() => failures > 0)
  scene.driver.running = ask
  await heard
})

/** The moment at which time stands still, until it is let pass. */
function still(t: Test): VirtualTime {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  return time
}

const asked = ({ driver }: Scene) => driver.calls.filter((call) => call === 'running').length

t.test('when nobody waits any more, nothing is asked', async (t) => {
  const time = still(t)
  const scene = open()
  const [key = ''] = await running(scene, 1)
  const stop = new AbortController()
  const heard = scene.store.changed(key, stop.signal)
  await time.pass(250)
  t.equal(asked(scene), 3, 'at once, and twice since')
  stop.abort()
  await heard
  await time.pass(100)
  const before = asked(scene)
  await time.pass(1_000)
  t.equal(asked(scene), before)
})

t.test('a question that is under way when the store is closed is not followed by others', async (t) => {
  const time = still(t)
  const scene = open()
  const [key = ''] = await running(scene, 1)
  const heard = scene.store.changed(key, never)
  await time.pass(0)
  const gate = latch()
  const ask = scene.driver.running.bind(scene.driver)
  scene.driver.running = (keys) => gate.promise.then(() => ask(keys))
  await time.pass(100)
  await scene.store.close()
  await heard
  scene.driver.running = ask
  const again = scene.store.changed(key, never)
  await time.pass(0)
  gate.open()
  await time.pass(0)
  const before = asked(scene)
  await time.pass(1_000)
  t.equal(asked(scene) - before, 10, 'ten times a second, as if there had been none before')
  await scene.store.close()
  await again
})

t.test('closing ends all waiting, and the store can be used again', async () => {
  const scene = open()
  const [key = ''] = await running(scene, 1)
  const heard = scene.store.changed(key, never)
  await until(() => scene.driver.calls.includes('running'))
  await scene.store.close()
  await heard
  const again = scene.store.changed(key, never)
  await new CompareAndSetStore(scene.driver, null).release(key, 'owner')
  await again
  await scene.store.close()
})
