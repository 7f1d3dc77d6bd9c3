import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t, { type Test } from 'tap'
import { type Waiter, WaitingRoom, type WaitResult } from '../../lib/operation/waiting.js'
import type { Acquisition, IdempotencyStore, StoredRecord } from '../../types/index.js'
import { type Latch, latch, until } from '../support/latch.js'
import { VirtualTime } from '../support/virtual-time.js'

const RECORD: StoredRecord = { kind: 'tombstone', fingerprint: 'f', createdAt: 1, reason: 'hijacked' }
const COMPLETED: Acquisition = { state: 'completed', record: RECORD, ttlMs: 1_000 }
/** Long enough for whatever a test waits for. */
const WAIT_TIMEOUT = 30_000

const running = (leaseMs = 3_600_000): Acquisition => ({ state: 'running', fingerprint: 'f', leaseMs })

interface Subscription {
  key: string
  signal: AbortSignal
  changed: Latch<void>
}

/** What waiters see of a store: one state for all keys, which the test sets, and who asked for it when. */
class Store {
  state: Acquisition | 'free' = running()
  /** Everything that was asked, in order: names of waiters who looked, and `changed`. */
  readonly calls: string[] = []
  readonly subscriptions: Subscription[] = []
  readonly changed: IdempotencyStore['changed']
  readonly room: WaitingRoom

  /** @param changed In place of subscriptions; `null` for a store that cannot tell of changes. */
  constructor(changed?: (() => Promise<void>) | null) {
    const subscribe = (key: string, signal: AbortSignal) => {
      const subscription = { key, signal, changed: latch() }
      signal.addEventListener('abort', () => subscription.changed.open())
      this.subscriptions.push(subscription)
      return subscription.changed.promise
    }
    if (changed !== null) {
      this.changed = (key, signal) => {
        this.calls.push('changed')
        return changed === undefined ? subscribe(key, signal) : changed()
      }
    }
    this.room = new WaitingRoom(this as unknown as IdempotencyStore)
  }

  get looks(): string[] {
    return this.calls.filter((call) => call !== 'changed')
  }

  /** Sets the state, and tells those who listen. */
  become(state: Store['state']): void {
    this.state = state
    for (const { changed } of this.subscriptions) changed.open()
  }

  waiter(name: string, options: Partial<Waiter> = {}): Guest {
    return new Guest(this, name, options)
  }
}

class Guest implements Waiter {
  readonly storageKey: string
  readonly waitTimeout: number
  readonly takesOver: boolean
  disowned = 0
  result: WaitResult | Error | undefined
  readonly #store: Store
  readonly #name: string
  readonly poll: Waiter['poll']

  constructor(
    store: Store,
    name: string,
    { storageKey = 'key', waitTimeout = WAIT_TIMEOUT, takesOver = true, poll }: Partial<Waiter>
  ) {
    this.#store = store
    this.#name = name
    this.storageKey = storageKey
    this.waitTimeout = waitTimeout
    this.takesOver = takesOver
    this.poll = () => {
      store.calls.push(name)
      return poll === undefined ? this.#poll() : poll()
    }
  }

  async #poll(): Promise<Acquisition> {
    const { state } = this.#store
    if (state !== 'free') return state
    this.#store.state = running()
    return { state: 'acquired', attempt: 1 }
  }

  drop(): void {
    this.disowned++
  }

  /** Starts to wait. */
  async wait(): Promise<WaitResult | Error> {
    try {
      this.result = await this.#store.room.wait(this)
    } catch (error) {
      this.result = error as Error
    }
    return this.result
  }

  leave(): void {
    this.#store.room.leave(this)
  }

  toString(): string {
    return this.#name
  }
}

const ACQUIRED: Acquisition = { state: 'acquired', attempt: 1 }

/** Makes pauses of at least `from` milliseconds last 5, and notes how long they would have been. */
function hurry(t: Test, from: number): number[] {
  const real = globalThis.setTimeout
  const asked: number[] = []
  const hurried = (callback: () => void, ms = 0) => {
    // What is longer is the end of the waiting, not a pause.
    if (ms > WAIT_TIMEOUT / 2) return real(callback, ms)
    asked.push(ms)
    return real(callback, ms >= from ? 5 : ms)
  }
  globalThis.setTimeout = hurried as typeof setTimeout
  t.teardown(() => {
    globalThis.setTimeout = real
  })
  return asked
}

t.test('many waiters share one subscription, and one look finds the reply for all', async (t) => {
  const store = new Store()
  const guests = Array.from({ length: 1_000 }, (_, i) => store.waiter(`${i}`))
  const waits = guests.map((guest) => guest.wait())
  await until(() => store.looks.length === 1)
  store.become(COMPLETED)
  const results = await Promise.all(waits)
  t.ok(results.every((result) => result === COMPLETED))
  t.strictSame(store.calls, ['changed', '0', 'changed', '0'])
})

t.test('a key that becomes free is for exactly one waiter at a time, in the order in which they came', async (t) => {
  const store = new Store()
  const guests = ['a', 'b', 'c'].map((name) => store.waiter(name))
  const got: string[] = []
  const waits = guests.map(async (guest) => {
    t.same(await guest.wait(), ACQUIRED)
    got.push(`${guest}`)
  })
  for (const names of [['a'], ['a', 'b'], ['a', 'b', 'c']]) {
    await until(() => store.looks.length > 0)
    store.become('free')
    await until(() => got.length === names.length)
    t.strictSame(got, names)
    t.equal(guests.filter(({ result }) => result !== undefined).length, names.length)
  }
  await Promise.all(waits)
  t.strictSame(
    guests.map(({ disowned }) => disowned),
    [0, 0, 0]
  )
})

t.test('the subscription comes before the look, so that no change falls between the two', async (t) => {
  const pauses = hurry(t, 100)
  const store = new Store()
  const looking = latch<Acquisition>()
  let looks = 0
  const guest = store.waiter('a', { poll: async () => (++looks === 1 ? looking.promise : COMPLETED) })
  const waiting = guest.wait()
  t.strictSame(store.calls, ['changed', 'a'])
  store.become(COMPLETED)
  looking.open(running())
  t.equal(await waiting, COMPLETED)
  t.strictSame(pauses, [], 'it looks again at once')
})

t.test('waiters of different keys have nothing to do with each other', async (t) => {
  const store = new Store()
  const a = store.waiter('a', { storageKey: 'one' })
  const b = store.waiter('b', { storageKey: 'other' })
  const waits = [a.wait(), b.wait()]
  t.strictSame(
    store.subscriptions.map(({ key }) => key),
    ['one', 'other']
  )
  a.leave()
  t.equal(await waits[0], 'left')
  t.equal(b.result, undefined)
  store.become(COMPLETED)
  t.equal(await waits[1], COMPLETED)
})

t.test('who comes later joins those who wait, behind them', async (t) => {
  const store = new Store()
  const first = store.waiter('first')
  const second = store.waiter('second')
  const waits = [first.wait()]
  await until(() => store.looks.length === 1)
  waits.push(second.wait())
  t.strictSame(store.calls, ['changed', 'first'])
  store.become('free')
  t.same(await waits[0], ACQUIRED)
  t.equal(second.result, undefined)
  store.become('free')
  t.same(await waits[1], ACQUIRED)
})

t.test('who leaves gets no key, and the next one looks in his place', async (t) => {
  const store = new Store()
  const first = store.waiter('first')
  const second = store.waiter('second')
  const waits = [first.wait(), second.wait()]
  await until(() => store.looks.length === 1)
  first.leave()
  t.equal(await waits[0], 'left')
  store.become('free')
  t.same(await waits[1], ACQUIRED)
  t.strictSame(store.looks, ['first', 'second'])
})

t.test('when the last one leaves the subscription ends, and nobody looks any more', async (t) => {
  const store = new Store()
  const guests = [store.waiter('a'), store.waiter('b')]
  const waits = guests.map((guest) => guest.wait())
  await until(() => store.looks.length === 1)
  for (const guest of guests) {
    t.equal(store.subscriptions[0]?.signal.aborted, false)
    guest.leave()
  }
  t.strictSame(await Promise.all(waits), ['left', 'left'])
  await until(() => store.subscriptions[0]?.signal.aborted)
  t.strictSame(store.calls, ['changed', 'a'])
})

t.test('leaving without waiting does nothing, and neither does leaving twice', async (t) => {
  const store = new Store()
  const guest = store.waiter('a')
  guest.leave()
  const waiting = guest.wait()
  await until(() => store.looks.length === 1)
  guest.leave()
  guest.leave()
  t.equal(await waiting, 'left')
  guest.leave()
  store.state = COMPLETED
  t.equal(await guest.wait(), COMPLETED, 'and he may come back')
})

t.test('a claim that comes for somebody who has left is given back', async (t) => {
  const store = new Store()
  const looking = latch<Acquisition>()
  const first = store.waiter('first', { poll: () => looking.promise })
  const second = store.waiter('second')
  const waits = [first.wait(), second.wait()]
  first.leave()
  t.equal(await waits[0], 'left')
  looking.open(ACQUIRED)
  await until(() => first.disowned > 0)
  t.equal(first.disowned, 1)
  t.equal(second.result, undefined, "it is not the second one's either")
  store.become('free')
  t.same(await waits[1], ACQUIRED)
  t.equal(second.disowned, 0)
})

t.test('nothing is given back when what came for somebody who has left is no claim', async (t) => {
  for (const state of [COMPLETED, running(), { state: 'abandoned', fingerprint: 'f', attempt: 1 } as Acquisition]) {
    const store = new Store()
    const looking = latch<Acquisition>()
    const guest = store.waiter('a', { poll: () => looking.promise })
    const waiting = guest.wait()
    guest.leave()
    t.equal(await waiting, 'left')
    looking.open(state)
    await until(() => store.subscriptions[0]?.signal.aborted)
    t.equal(guest.disowned, 0, state.state)
  }
})

t.test('a reply that comes while the one who looks leaves is still for the others', async (t) => {
  const store = new Store()
  const looking = latch<Acquisition>()
  const first = store.waiter('first', { poll: () => looking.promise })
  const second = store.waiter('second')
  const waits = [first.wait(), second.wait()]
  first.leave()
  looking.open(COMPLETED)
  t.strictSame(await Promise.all(waits), ['left', COMPLETED])
  t.strictSame(store.looks, ['first'])
})

t.test('each waits as long as its own waitTimeout says, and no longer', async (t) => {
  const store = new Store()
  const short = store.waiter('short', { waitTimeout: 20 })
  const long = store.waiter('long', { waitTimeout: WAIT_TIMEOUT })
  const waits = [short.wait(), long.wait()]
  t.equal(await waits[0], 'timeout')
  t.equal(long.result, undefined)
  store.become(COMPLETED)
  t.equal(await waits[1], COMPLETED)
})

t.test('nobody who waits is left without an answer by a store that does not give one', async (t) => {
  const store = new Store()
  t.equal(await store.waiter('a', { waitTimeout: 20, poll: () => new Promise(() => {}) }).wait(), 'timeout')
})

t.test('a store that cannot tell of changes is asked again every 100 ms', async (t) => {
  const store = new Store(null)
  const { time, end } = await manyKeys(t, store, 1)
  for (const looks of [2, 3, 4]) {
    await time.pass(99)
    t.equal(store.looks.length, looks - 1)
    await time.pass(1)
    t.equal(store.looks.length, looks)
  }
  await end()
})

t.test('a message that gets lost costs a second at most, however long the lease', async (t) => {
  const store = new Store()
  const { time, guests, end } = await manyKeys(t, store, 1)
  for (const looks of [2, 3]) {
    await time.pass(999)
    t.equal(store.looks.length, looks - 1)
    await time.pass(1)
    t.equal(store.looks.length, looks)
  }
  t.equal(store.subscriptions.length, 1, 'the subscription stays')
  store.state = COMPLETED
  await time.pass(1_000)
  t.equal(guests[0]?.result, COMPLETED)
  await end()
})

t.test('a change that leaves the key taken is looked at once, and the next one is waited for again', async (t) => {
  const store = new Store()
  const { time, guests, end } = await manyKeys(t, store, 1)
  for (const looks of [2, 3]) {
    store.become(running())
    // After a change that was none the pause before the next look is never nothing.
    await time.pass(20)
    t.equal(store.looks.length, looks)
    await time.pass(900)
    t.equal(store.looks.length, looks, 'nothing has changed since')
  }
  store.become(COMPLETED)
  await time.pass(20)
  t.equal(guests[0]?.result, COMPLETED)
  await end()
})

t.test('a subscription that fails is replaced by asking again, and tried again', async (t) => {
  const asked = hurry(t, 100)
  const fail = () => {
    throw new Error('no connection')
  }
  for (const changed of [async () => fail(), fail]) {
    const store = new Store(changed)
    const waiting = store.waiter('a').wait()
    await until(() => store.looks.length >= 3)
    store.state = COMPLETED
    t.equal(await waiting, COMPLETED)
    t.strictSame(store.calls.slice(0, 6), ['changed', 'a', 'changed', 'a', 'changed', 'a'])
  }
  t.notOk(asked.includes(1_000), 'without waiting for a message that will not come')
})

t.test('a look that fails fails all who wait, and nobody who comes later', async (t) => {
  const store = new Store()
  const looking = latch<Acquisition>()
  const guests = [store.waiter('a', { poll: () => looking.promise }), store.waiter('b'), store.waiter('c')]
  const waits = guests.map((guest) => guest.wait())
  const error = new Error('store down')
  looking.fail(error)
  t.ok((await Promise.all(waits)).every((result) => result === error))
  t.strictSame(store.looks, ['a'])
  await until(() => store.subscriptions[0]?.signal.aborted)
  store.state = COMPLETED
  t.equal(await store.waiter('d').wait(), COMPLETED)
})

t.test('a look that throws at once fails all who wait as well', async (t) => {
  const store = new Store()
  const error = new Error('store down')
  const thrower = () => {
    throw error
  }
  const guests = [store.waiter('a', { poll: thrower }), store.waiter('b', { poll: thrower })]
  t.strictSame(await Promise.all(guests.map((guest) => guest.wait())), [error, error])
})

t.test('a lease of next to nothing is not asked for at full speed', async (t) => {
  const store = new Store(null)
  store.state = running(0)
  t.equal(await store.waiter('a', { waitTimeout: 100 }).wait(), 'timeout')
  t.ok(store.looks.length <= 10, `${store.looks.length} looks`)
})

t.test('when the lease of the owner is over somebody looks, without being told', async (t) => {
  const store = new Store()
  const abandoned: Acquisition = { state: 'abandoned', fingerprint: 'f', attempt: 1 }
  let looks = 0
  // The wait is over before anybody would look again without a reason.
  const guest = store.waiter('a', { waitTimeout: 600, poll: async () => (++looks === 1 ? running(30) : abandoned) })
  t.equal(await guest.wait(), abandoned)
})

t.test('of those who wait for an abandoned key only the first goes to take it over', async (t) => {
  const store = new Store()
  store.state = { state: 'abandoned', fingerprint: 'f', attempt: 1 }
  const guests = ['a', 'b', 'c'].map((name) => store.waiter(name))
  const takeovers: string[] = []
  const waits = guests.map(async (guest) => {
    const found = await guest.wait()
    if (typeof found === 'object' && 'state' in found && found.state === 'abandoned') {
      takeovers.push(`${guest}`)
      store.become(running())
    }
  })
  await until(() => store.looks.includes('b'))
  t.strictSame(takeovers, ['a'])
  t.strictSame(
    guests.map(({ result }) => result === undefined),
    [false, true, true]
  )
  store.become(COMPLETED)
  await Promise.all(waits)
  t.equal(guests[2]?.result, COMPLETED)
})

t.test('those who may not take over an abandoned key all hear of it, and only the others wait on', async (t) => {
  const store = new Store()
  const abandoned: Acquisition = { state: 'abandoned', fingerprint: 'f', attempt: 1 }
  store.state = abandoned
  const guests = [false, true, false, true].map((takesOver, i) => store.waiter(`${i}`, { takesOver }))
  const waits = guests.map((guest) => guest.wait())
  for (const i of [0, 1, 2]) t.equal(await waits[i], abandoned)
  t.strictSame(store.looks, ['0'], 'one look was enough for them')
  t.equal(guests[3]?.result, undefined)
  store.become(COMPLETED)
  t.equal(await waits[3], COMPLETED)
})

/** So many of them that start to wait. */
const crowd = (store: Store, count: number, storageKey: string) =>
  Array.from({ length: count }, (_, n) => store.waiter(`${storageKey} ${n}`, { storageKey }))

const isOver = ({ result }: Guest) => result !== undefined

t.test('of more than 10,000 waiters for one key the last are answered at once, and nobody else is', async (t) => {
  const store = new Store()
  const guests = crowd(store, 10_000, 'crowded')
  const waits = guests.map((guest) => guest.wait())
  for (const late of crowd(store, 10_500, 'crowded').slice(10_000)) t.equal(await late.wait(), 'timeout')
  const other = store.waiter('other', { storageKey: 'other' })
  waits.push(other.wait())
  guests[0]?.leave()
  waits.push(store.waiter('in the place of who has left', { storageKey: 'crowded' }).wait())
  await until(() => store.looks.includes('other'))
  t.equal(other.result, undefined)
  store.become(COMPLETED)
  t.equal((await Promise.all(waits)).filter((result) => result === COMPLETED).length, 10_001)
})

t.test('when 50,000 wait on a store, a key with few waiters takes the place of one of the most crowded', async (t) => {
  const store = new Store()
  const crowds = [10_000, 10_000, 10_000, 10_000, 9_998, 2].map((count, n) => crowd(store, count, `key ${n}`))
  const guests = crowds.flat()
  const waits = guests.map((guest) => guest.wait())
  const [few] = crowd(store, 1, 'key 5')
  const [alone] = crowd(store, 1, 'another')
  waits.push((few as Guest).wait(), (alone as Guest).wait())
  await until(() => guests.filter(isOver).length === 2)
  for (const guest of guests.filter(isOver)) {
    t.equal(guest.result, 'timeout')
    t.match(guest.storageKey, /^key [0-3]$/)
    t.notMatch(`${guest}`, / 0$/, 'not the one who looks for the others')
  }
  t.equal(await (crowd(store, 1, 'key 0')[0] as Guest).wait(), 'timeout', 'the crowded ones are refused')
  t.strictSame([few?.result, alone?.result], [undefined, undefined])
  store.become(COMPLETED)
  t.equal((await Promise.all(waits)).filter((result) => result === COMPLETED).length, 50_000)
  waits.push((alone as Guest).wait())
  t.equal(await waits.at(-1), COMPLETED, 'and then there is room again')
})

t.test('where nobody has more than one waiter who has come first stays', async (t) => {
  const store = new Store()
  const guests = Array.from({ length: 50_000 }, (_, n) => store.waiter(`${n}`, { storageKey: `key ${n}` }))
  const waits = guests.map((guest) => guest.wait())
  t.equal(await store.waiter('new', { storageKey: 'new' }).wait(), 'timeout')
  t.equal(await store.waiter('second', { storageKey: 'key 1' }).wait(), 'timeout')
  for (const guest of guests) guest.leave()
  await Promise.all(waits)
})

t.test('waiters on one store take nobody the place on another', async (t) => {
  const [store, other] = [new Store(), new Store()]
  const guests = crowd(store, 10_000, 'key')
  const waits = guests.map((guest) => guest.wait())
  const guest = other.waiter('a', { storageKey: 'key' })
  waits.push(guest.wait())
  await until(() => other.looks.length === 1)
  t.equal(guest.result, undefined)
  for (const guest of [...guests]) guest.leave()
  guest.leave()
  await Promise.all(waits)
})

/** One waiter for each of so many keys, in virtual time. */
async function manyKeys(t: Test, store: Store, count: number, options: Partial<Waiter> = {}) {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  // Timers of one length are shared, and these are virtual.
  const waitTimeout = 100_000 + Math.random()
  const guests = Array.from({ length: count }, (_, n) => {
    return store.waiter(`${n}`, { storageKey: `key ${n}`, waitTimeout, ...options })
  })
  const waits = guests.map((guest) => guest.wait())
  await time.pass(0)
  const end = async () => {
    for (const guest of guests) guest.leave()
    await time.pass(0)
    t.ok((await Promise.all(waits)).every((result) => result === 'left' || result === COMPLETED))
    t.equal(time.pending, 0, 'nothing is left')
  }
  return { time, guests, end }
}

/** How often the store was asked in each of so many seconds. */
async function looksPerSecond(time: VirtualTime, store: Store, seconds: number): Promise<number[]> {
  const counts: number[] = []
  for (let n = 0; n < seconds; n++) {
    const before = store.looks.length
    await time.pass(1_000)
    counts.push(store.looks.length - before)
  }
  return counts
}

t.test(
  'however many keys are waited for, a store that tells of changes is asked 20 times a second at most',
  async (t) => {
    const store = new Store()
    const { time, end } = await manyKeys(t, store, 300)
    t.equal(store.looks.length, 300, 'once for each key, when its waiting begins')
    const counts = await looksPerSecond(time, store, 20)
    t.ok(Math.max(...counts) <= 20, `${counts}`)
    t.ok(counts.slice(2).every((count) => count >= 19))
    for (let n = 0; n < 300; n++)
      t.ok(store.looks.filter((name) => name === `${n}`).length >= 2, 'each key has its turn')
    t.equal(store.subscriptions.length, 300)
    await end()
  }
)

t.test('a few keys are each looked at every second', async (t) => {
  const store = new Store()
  const { time, end } = await manyKeys(t, store, 10)
  await time.pass(500)
  t.strictSame(await looksPerSecond(time, store, 5), [10, 10, 10, 10, 10])
  await end()
})

t.test('a change is looked at at once, however many keys are in line', async (t) => {
  const store = new Store()
  const { time, guests, end } = await manyKeys(t, store, 300)
  await time.pass(1_500)
  store.state = COMPLETED
  store.subscriptions[299]?.changed.open()
  await time.pass(0)
  t.equal(guests[299]?.result, COMPLETED)
  t.equal(guests[298]?.result, undefined)
  store.state = running()
  await end()
})

t.test(
  'however many keys are waited for, a store that cannot tell of changes is asked 100 times a second',
  async (t) => {
    const store = new Store(null)
    const { time, end } = await manyKeys(t, store, 300)
    const counts = await looksPerSecond(time, store, 10)
    t.ok(Math.max(...counts) <= 100, `${counts}`)
    t.ok(counts.every((count) => count >= 89))
    await end()
  }
)

t.test('a store whose subscriptions fail, or call out all the time, is asked 100 times a second at most', async (t) => {
  for (const changed of [() => Promise.reject(new Error('no connection')), () => Promise.resolve()]) {
    const store = new Store(changed)
    const { time, end } = await manyKeys(t, store, 300)
    // Those who were called out to look once more at once.
    await time.pass(1)
    const before = store.calls.length
    const counts = await looksPerSecond(time, store, 3)
    t.ok(Math.max(...counts) <= 100, `${counts}`)
    t.ok(store.calls.length - before <= 2 * 300)
    await end()
  }
})

t.test('the ends of leases are looked at 100 times a second at most, and none is left out', async (t) => {
  const store = new Store()
  store.state = running(3_000)
  const { time, guests, end } = await manyKeys(t, store, 300)
  await time.pass(2_990)
  store.state = { state: 'abandoned', fingerprint: 'f', attempt: 1 }
  const counts = await looksPerSecond(time, store, 4)
  t.ok(Math.max(...counts) <= 120, `${counts}`)
  t.ok(guests.every((guest) => (guest.result as Acquisition).state === 'abandoned'))
  void end
})

t.test('a subscription that fails while its key is in line is missed no longer than a poll takes', async (t) => {
  const store = new Store()
  const { time, end } = await manyKeys(t, store, 300)
  await time.pass(1_500)
  const before = store.looks.filter((name) => name === '299').length
  store.subscriptions[299]?.changed.fail(new Error('no connection'))
  await time.pass(10)
  t.equal(store.looks.filter((name) => name === '299').length, before + 1)
  t.equal(store.subscriptions.length, 301, 'and it is tried again')
  await end()
})

t.test('places in line are given up with the waiting', async (t) => {
  const store = new Store(null)
  const { time, guests, end } = await manyKeys(t, store, 1_000)
  await time.pass(500)
  for (const guest of guests) guest.leave()
  const late = store.waiter('late', { storageKey: 'late', waitTimeout: 2_017 })
  const waiting = late.wait()
  await time.pass(0)
  store.state = COMPLETED
  await time.pass(100)
  t.equal(await waiting, COMPLETED)
  void end
})

t.test('nothing keeps the process alive when nobody waits any more', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  const before = timers()
  const store = new Store()
  const guest = store.waiter('a')
  const waiting = guest.wait()
  await until(() => store.looks.length === 1)
  t.ok(timers() > before)
  guest.leave()
  await waiting
  t.equal(timers(), before)
})

t.test('a store that tells of changes all the time is asked each 20 ms', async (t) => {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  const store = new Store(() => new Promise<void>((resolve) => void setTimeout(resolve, 5)))
  // Timers of one length are shared, and these are virtual.
  const waiting = store.waiter('a', { waitTimeout: 1_005 }).wait()
  await time.pass(1_004)
  // At once, after the first change, and then after each pause.
  t.equal(store.looks.length, 2 + 49)
  await time.pass(100)
  t.equal(await waiting, 'timeout')
})

t.test('a store is asked again just after the lease of the owner, not before', async (t) => {
  const asked = hurry(t, 20)
  const store = new Store()
  store.state = running(49.5)
  const waiting = store.waiter('a').wait()
  await until(() => store.looks.length === 2)
  store.become(COMPLETED)
  await waiting
  t.equal(asked[0], 51)
})

t.test('when the last one leaves while somebody looks the waiting ends with that look', async (t) => {
  const asked = hurry(t, 20)
  const store = new Store()
  const looking = latch<Acquisition>()
  const guest = store.waiter('a', { poll: () => looking.promise })
  const waiting = guest.wait()
  guest.leave()
  t.equal(await waiting, 'left')
  looking.open(running())
  await until(() => store.subscriptions[0]?.signal.aborted)
  t.strictSame(asked, [])
})

t.test('nothing is remembered of keys for which nobody waits any more', async (t) => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const room = new WaitingRoom({} as IdempotencyStore)
  const waitFor = async (from: number) => {
    for (let n = from; n < from + 10_000; n++) {
      const waiter = { waitTimeout: WAIT_TIMEOUT, takesOver: true, poll: async () => COMPLETED, drop() {} }
      await room.wait({ ...waiter, storageKey: `key ${n}` })
    }
    collect()
    return process.memoryUsage().heapUsed
  }
  const before = await waitFor(0)
  const growth = (await waitFor(10_000)) - before
  // A queue that stays takes some 700 bytes.
  t.ok(growth < 2_000_000, `${growth} bytes for 10,000 keys`)
})
