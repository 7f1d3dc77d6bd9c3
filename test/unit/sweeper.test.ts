import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { Sweeper } from '../../lib/stores/sweeper.js'
import { latch, until } from '../support/latch.js'

const MINUTE = 60_000
const LONGEST_DELAY = 2 ** 31 - 1

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

interface FakeTimer {
  ms: number
  /** What the clock would do when the time has come. */
  fire(): void
  unrefs: number
  cleared: boolean
}

/** Timers that fire when the test says so. `until` and `sleep` do not use these. */
function fakeTimers(t: Test): { all: FakeTimer[]; waiting(): FakeTimer[]; next(): FakeTimer } {
  const { setTimeout, clearTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout, clearTimeout }))
  const all: FakeTimer[] = []
  const fired = new Set<FakeTimer>()
  const waiting = () => all.filter((timer) => !timer.cleared && !fired.has(timer))
  Object.assign(globalThis, {
    setTimeout(callback: () => void, ms: number) {
      const timer = {
        ms,
        unrefs: 0,
        cleared: false,
        fire() {
          fired.add(timer)
          callback()
        },
        unref() {
          timer.unrefs++
          return timer
        }
      }
      all.push(timer)
      return timer
    },
    clearTimeout(timer: FakeTimer) {
      timer.cleared = true
    }
  })
  return {
    all,
    waiting,
    next() {
      const [timer, ...others] = waiting()
      if (timer === undefined || others.length > 0) throw new Error(`${others.length + (timer ? 1 : 0)} timers wait`)
      return timer
    }
  }
}

/** A sweep that is held up until the test lets it go on, once for each call. */
function heldSweeps() {
  const calls: ReturnType<typeof latch<boolean>>[] = []
  let atOnce = 0
  let most = 0
  const sweep = async () => {
    const call = latch<boolean>()
    calls.push(call)
    most = Math.max(most, ++atOnce)
    try {
      return await call.promise
    } finally {
      atOnce--
    }
  }
  return {
    calls,
    sweep,
    /** The most that ran at the same time. */
    most: () => most,
    begun: (count: number) => until(() => calls.length >= count, { message: `sweep ${count}` })
  }
}

/** Lets everything happen that only waits for promises. */
const settled = () => new Promise((resolve) => setImmediate(resolve))

t.test('nothing is swept before the start, and nothing by the start itself', async (t) => {
  const timers = fakeTimers(t)
  let sweeps = 0
  const sweeper = new Sweeper(MINUTE, async () => {
    sweeps++
    return false
  })
  t.equal(timers.all.length, 0)
  sweeper.start()
  await settled()
  t.equal(sweeps, 0)
  timers.next().fire()
  await settled()
  t.equal(sweeps, 1)
  await sweeper.stop()
})

t.test('rounds go on and on, in real time', async () => {
  let sweeps = 0
  const sweeper = new Sweeper(1, async () => {
    sweeps++
    return false
  })
  sweeper.start()
  await until(() => sweeps >= 5)
  await sweeper.stop()
})

t.test('a round goes on at once while there is more to delete, and the next is a pause away', async (t) => {
  const timers = fakeTimers(t)
  const more = [true, true, true, false, false, true, false]
  let sweeps = 0
  const sweeper = new Sweeper(MINUTE, async () => more[sweeps++] ?? false)
  sweeper.start()
  for (const total of [4, 5, 7]) {
    timers.next().fire()
    t.equal(timers.waiting().length, 0, 'no timer while a round goes on')
    await settled()
    t.equal(sweeps, total)
  }
  await sweeper.stop()
})

t.test('starting again and again is starting once', async (t) => {
  const timers = fakeTimers(t)
  const sweeper = new Sweeper(MINUTE, async () => false)
  for (let n = 0; n < 10; n++) sweeper.start()
  t.equal(timers.all.length, 1)
  timers.next().fire()
  for (let n = 0; n < 10; n++) sweeper.start()
  await settled()
  for (let n = 0; n < 10; n++) sweeper.start()
  t.equal(timers.waiting().length, 1)
  await sweeper.stop()
})

t.test('the pauses are of different lengths, around the interval', async (t) => {
  const timers = fakeTimers(t)
  const sweeper = new Sweeper(MINUTE, async () => false)
  sweeper.start()
  for (let n = 0; n < 200; n++) {
    timers.next().fire()
    await settled()
  }
  const pauses = timers.all.map(({ ms }) => ms)
  await sweeper.stop()
  t.ok(
    pauses.every((ms) => ms >= MINUTE / 2 && ms <= (MINUTE * 3) / 2),
    'none is far off'
  )
  t.ok(new Set(pauses).size > 100, 'processes that were started together do not stay together')
  const average = pauses.reduce((sum, ms) => sum + ms) / pauses.length
  t.ok(average > MINUTE * 0.8 && average < MINUTE * 1.2, `${average} ms on average`)
})

t.test('an interval that is longer than a timer can be does not become a short one', async (t) => {
  const timers = fakeTimers(t)
  const sweeper = new Sweeper(Number.MAX_SAFE_INTEGER, async () => false)
  sweeper.start()
  t.equal(timers.next().ms, LONGEST_DELAY)
  await sweeper.stop()
})

t.test('however long a sweep takes, there is never another at the same time', async (t) => {
  const { calls, sweep, begun, most } = heldSweeps()
  const sweeper = new Sweeper(1, sweep)
  sweeper.start()
  for (let n = 1; n <= 5; n++) {
    await begun(n)
    sweeper.start()
    await sleep(10)
    t.equal(calls.length, n)
    calls.at(-1)?.open(n % 2 === 0)
  }
  const stopped = sweeper.stop()
  for (const call of calls) call.open(false)
  await stopped
  t.equal(most(), 1)
})

t.test('a sweeper that is started again while it stops does not sweep twice at once', async (t) => {
  const timers = fakeTimers(t)
  const { calls, sweep, begun, most } = heldSweeps()
  const sweeper = new Sweeper(MINUTE, sweep)
  sweeper.start()
  timers.next().fire()
  await begun(1)
  const stopped = sweeper.stop()
  sweeper.start()
  for (const timer of timers.waiting()) timer.fire()
  await settled()
  t.equal(most(), 1)
  calls[0]?.open(false)
  await settled()
  for (const timer of timers.waiting()) timer.fire()
  await settled()
  t.equal(most(), 1)
  calls.at(-1)?.open(false)
  await settled()
  t.ok(timers.waiting().length <= 1, 'one round after another, not two')
  const again = sweeper.stop()
  for (const call of calls) call.open(false)
  await Promise.all([stopped, again])
})

for (const [name, fail] of [
  ['rejects', () => Promise.reject(new Error('no connection'))],
  [
    'throws',
    () => {
      throw new Error('no connection')
    }
  ]
] as [string, () => Promise<boolean>][]) {
  t.test(`after a sweep that ${name} the next round comes as ever`, async (t) => {
    const timers = fakeTimers(t)
    const steps = [fail, async () => true, fail, fail, async () => false]
    let sweeps = 0
    const sweeper = new Sweeper(MINUTE, () => (steps[sweeps++] ?? fail)())
    sweeper.start()
    for (const total of [1, 3, 4, 5]) {
      const timer = timers.next()
      t.ok(timer.ms >= MINUTE / 2, 'not sooner than otherwise')
      timer.fire()
      await settled()
      t.equal(sweeps, total)
    }
    await sweeper.stop()
  })
}

t.test('stop waits for the sweep that is going on', async (t) => {
  const { calls, sweep, begun } = heldSweeps()
  const sweeper = new Sweeper(1, sweep)
  sweeper.start()
  await begun(1)
  let stopped = false
  const stop = sweeper.stop().then(() => {
    stopped = true
  })
  await sleep(10)
  t.notOk(stopped)
  calls[0]?.open(true)
  await stop
  t.equal(calls.length, 1, 'and no other follows, although there would have been more to delete')
})

t.test('stop resolves when the sweep that is going on fails', async (t) => {
  const { calls, sweep, begun } = heldSweeps()
  const sweeper = new Sweeper(1, sweep)
  sweeper.start()
  await begun(1)
  const stop = sweeper.stop()
  calls[0]?.fail(new Error('no connection'))
  await stop
  await sleep(10)
  t.equal(calls.length, 1)
})

t.test('stop does not wait for ever for a sweep that a broken connection holds up', async (t) => {
  const timers = fakeTimers(t)
  const { sweep, begun } = heldSweeps()
  const sweeper = new Sweeper(MINUTE, sweep)
  sweeper.start()
  timers.next().fire()
  await begun(1)
  let stopped = false
  const stop = sweeper.stop().then(() => {
    stopped = true
  })
  await settled()
  t.notOk(stopped)
  timers.next().fire()
  await stop
  t.equal(timers.waiting().length, 0)
})

t.test('after stop nothing is swept, and no timer is left', async (t) => {
  const timers = fakeTimers(t)
  let sweeps = 0
  const sweeper = new Sweeper(MINUTE, async () => {
    sweeps++
    return false
  })
  sweeper.start()
  await sweeper.stop()
  t.equal(timers.waiting().length, 0)
  sweeper.start()
  timers.next().fire()
  await settled()
  await sweeper.stop()
  t.equal(timers.waiting().length, 0)
  await settled()
  t.equal(sweeps, 1)
})

t.test('stop resolves where nothing was started, and when called twice', async (t) => {
  const sweeper = new Sweeper(1, async () => t.fail('a sweep'))
  await sweeper.stop()
  await sweeper.stop()
  sweeper.start()
  await Promise.all([sweeper.stop(), sweeper.stop()])
})

t.test('a sweeper that was stopped can be started again, and stopped again', async (t) => {
  let sweeps = 0
  const sweeper = new Sweeper(1, async () => {
    sweeps++
    return false
  })
  for (let round = 0; round < 3; round++) {
    const before = sweeps
    sweeper.start()
    await until(() => sweeps > before)
    await sweeper.stop()
  }
  const after = sweeps
  await sleep(20)
  t.equal(sweeps, after)
})

t.test('a sweeper does not keep the process alive, neither at first nor later', async (t) => {
  let sweeps = 0
  const sweeper = new Sweeper(1, async () => {
    sweeps++
    return false
  })
  const before = holding()
  sweeper.start()
  t.equal(holding(), before)
  await until(() => sweeps >= 2)
  t.equal(holding(), before)
  await sweeper.stop()
  const timers = fakeTimers(t)
  sweeper.start()
  timers.next().fire()
  await settled()
  t.strictSame(
    timers.all.map(({ unrefs }) => unrefs > 0),
    [true, true]
  )
  await sweeper.stop()
})
