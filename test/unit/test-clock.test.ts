import { mock } from 'node:test'
import t, { type Test } from 'tap'
import { settled, useTestClock } from '../../lib/testing/test-clock.js'
import { clock } from '../../lib/util/clock.js'
import { Timer } from '../../lib/util/timer.js'
import { until } from '../support/latch.js'

/* The clock that fastify-idempotency/testing puts in the place of the process's own. */

const before = { now: clock.now(), timer: clock.setTimer(() => {}, 60_000) }
const time = useTestClock()

/** Notes what rings, and when. */
function rings(t: Test) {
  const from = clock.now()
  const rung: [name: string, after: number][] = []
  const timers = new Set<Timer<string>>()
  t.teardown(() => {
    for (const timer of timers) timer.cancel()
  })
  const ring = (name: string) => void rung.push([name, Math.round(clock.now() - from)])
  return { rung, set: (name: string, ms: number) => timers.add(new Timer(ms, ring, name, true)) }
}

/** Mocks `Date` and `setTimeout` as node:test does, until the test ends. */
function mocks(t: Test, now = 0) {
  mock.timers.enable({ apis: ['setTimeout', 'setInterval', 'Date'], now })
  t.teardown(() => mock.timers.reset())
  clock.now()
}

t.test('there is one, and it goes on from where the other was', async (t) => {
  t.equal(useTestClock(), time)
  t.ok(clock.now() >= before.now - 1)
  t.ok(clock.now() < before.now + 60_000)
  clock.clearTimer(before.timer)
  t.notOk(process.getActiveResourcesInfo().includes('Timeout'), 'a timer of the other can be cleared')
})

t.test('the time of day is that of Date, and what was added', async (t) => {
  const apart = clock.date() - Date.now()
  await time.advance(5_000)
  t.ok(Math.abs(clock.date() - Date.now() - apart - 5_000) < 50)
})

t.test('time goes by as that of Date does, and timers ring by themselves', async (t) => {
  const { rung, set } = rings(t)
  set('soon', 5)
  await until(() => rung.length === 1)
  t.ok((rung[0] as [string, number])[1] >= 4)
})

t.test('what is due rings in its order, each at its time, with what it sets itself', async (t) => {
  mocks(t)
  const { rung, set } = rings(t)
  set('c', 30_000)
  set('a', 10_000)
  new Timer(20_000, () => set('d', 15_000), null, true)
  set('b', 10_000)
  set('e', 40_001)
  await time.advance(40_000)
  t.strictSame(rung, [
    ['a', 10_000],
    ['b', 10_000],
    ['c', 30_000],
    ['d', 35_000]
  ])
})

t.test('what has rung early does not ring again, and what was cancelled not at all', async (t) => {
  const { rung, set } = rings(t)
  set('once', 10)
  const cancelled = new Timer(10, () => rung.push(['cancelled', 0]), null, true)
  cancelled.cancel()
  await time.advance(10)
  await new Promise((resolve) => setTimeout(resolve, 20))
  t.strictSame(
    rung.map(([name]) => name),
    ['once']
  )
})

t.test('what is not due yet rings by itself when the rest of its time has passed', async (t) => {
  const { rung, set } = rings(t)
  set('later', 3_600_000)
  await time.advance(3_600_000 - 500)
  t.equal(rung.length, 0)
  await until(() => rung.length === 1)
})

t.test('a delay beyond what Node can take is kept', async (t) => {
  mocks(t)
  const { rung, set } = rings(t)
  set('late', 2 ** 31 + 1_000)
  await time.advance(2 ** 31 + 999)
  t.equal(rung.length, 0)
  await time.advance(1)
  t.equal(rung.length, 1)
})

t.test('a timer keeps the process alive where it should, also when the clock was moved', async (t) => {
  const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  const none = holding()
  const quiet = new Timer(60_000, () => {}, null, false)
  const loud = new Timer(60_000, () => {}, null, true)
  for (const ms of [0, 1_000]) {
    await time.advance(ms)
    t.equal(holding(), none + 1)
  }
  quiet.cancel()
  loud.cancel()
  t.equal(holding(), none)
})

t.test('mock timers move it, and ring', async (t) => {
  mocks(t)
  const { rung, set } = rings(t)
  const from = clock.now()
  set('mocked', 30_000)
  mock.timers.tick(29_999)
  await settled()
  t.equal(rung.length, 0)
  mock.timers.tick(1)
  await settled()
  t.strictSame(rung, [['mocked', 30_000]])
  t.equal(clock.now() - from, 30_000)
  await time.advance(5)
  t.equal(clock.now() - from, 30_005)
})

t.test('a mock that comes or goes is no time that passes, and time never goes back', async (t) => {
  const from = clock.now()
  mocks(t, 1_000_000)
  t.ok(clock.now() - from < 1_000)
  mock.timers.tick(10)
  const ticked = clock.now()
  mock.timers.reset()
  t.equal(clock.now(), ticked)
  const { now } = Date
  t.teardown(() => {
    Date.now = now
  })
  let spied = 5_000
  Date.now = () => spied
  t.equal(clock.now(), ticked)
  spied = 4_000
  t.equal(clock.now(), ticked)
  spied = 4_010
  t.equal(clock.now(), ticked + 10)
})

t.test('a timer from before the mock rings once', async (t) => {
  let rung = 0
  clock.setTimer(() => rung++, 50)
  mocks(t)
  await time.advance(50)
  t.equal(rung, 1)
  mock.timers.reset()
  await new Promise((resolve) => setTimeout(resolve, 60))
  t.equal(rung, 1)
})

t.test('immediates that are mocked hold up nothing', async (t) => {
  const { setImmediate } = globalThis
  t.teardown(() => Object.assign(globalThis, { setImmediate }))
  Object.assign(globalThis, { setImmediate: () => {} })
  const { rung, set } = rings(t)
  set('soon', 5)
  await time.advance(5)
  t.equal(rung.length, 1)
})

t.test('who has one turn of the event loop follow the other for ever is not waited for', async (t) => {
  let stopped = false
  const again = () => {
    if (!stopped) setImmediate(again)
  }
  again()
  await t.resolves(settled())
  stopped = true
})
