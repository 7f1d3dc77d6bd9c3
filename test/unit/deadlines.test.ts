import { createHook } from 'node:async_hooks'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import t from 'tap'
import { Deadlines } from '../../lib/util/deadlines.js'
import { until } from '../support/latch.js'

const FORTY_DAYS = 40 * 86_400_000

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

/** How many timers a piece of work starts. */
function timersOf(work: () => void): number {
  let timers = 0
  const hook = createHook({
    init(_id, type) {
      if (type === 'Timeout') timers++
    }
  }).enable()
  work()
  hook.disable()
  return timers
}

t.test('an item that is not removed in time expires once, and one that is does not', async (t) => {
  const expired: string[] = []
  const deadlines = new Deadlines<string>(10, (item) => expired.push(item), true)
  deadlines.add('removed')
  deadlines.add('kept')
  deadlines.delete('removed')
  await until(() => expired.length > 0)
  const later = new Deadlines<string>(10, (item) => expired.push(item), true)
  later.add('later')
  await until(() => expired.includes('later'))
  t.strictSame(expired, ['kept', 'later'])
})

t.test('items expire in the order in which they were added', async (t) => {
  const expired: number[] = []
  const deadlines = new Deadlines<number>(5, (item) => expired.push(item), true)
  const items = Array.from({ length: 1_000 }, (_, i) => i)
  for (const item of items) deadlines.add(item)
  await until(() => expired.length === 1_000)
  t.strictSame(expired, items)
})

t.test('nothing expires before its time, whatever else does', async (t) => {
  const added = new Map<number, number>()
  let early = 0
  const deadlines = new Deadlines<number>(
    10,
    (item) => {
      if (performance.now() - (added.get(item) as number) < 10) early++
      added.delete(item)
    },
    true
  )
  for (let item = 0; item < 10; item++) {
    added.set(item, performance.now())
    deadlines.add(item)
    await new Promise((resolve) => setTimeout(resolve, 3))
  }
  await until(() => added.size === 0)
  t.equal(early, 0)
})

t.test('adding an item again puts its deadline off, behind those of the others', async (t) => {
  const expired: string[] = []
  let putOff = 0
  let early = false
  const deadlines = new Deadlines<string>(
    20,
    (item) => {
      expired.push(item)
      if (item === 'a') early = performance.now() - putOff < 20
    },
    true
  )
  deadlines.add('a')
  deadlines.add('b')
  await new Promise((resolve) => setTimeout(resolve, 5))
  putOff = performance.now()
  deadlines.add('a')
  await until(() => expired.length === 2)
  t.strictSame(expired, ['b', 'a'])
  t.notOk(early)
})

t.test('items that are added again when they expire expire again, on the same one timer', async (t) => {
  const expiries: string[] = []
  // `until` sleeps by another function, and is not counted.
  const { setTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout }))
  let timers = 0
  let most = 0
  const counting = (callback: () => void, ms: number) => {
    most = Math.max(most, ++timers)
    return setTimeout(() => {
      timers--
      callback()
    }, ms)
  }
  Object.assign(globalThis, { setTimeout: counting })
  const deadlines = new Deadlines<string>(
    5,
    (item) => {
      expiries.push(item)
      if (expiries.length < 20) deadlines.add(item)
    },
    true
  )
  for (const item of ['a', 'b', 'c']) deadlines.add(item)
  await until(() => expiries.length === 22)
  t.strictSame(expiries.slice(0, 6), ['a', 'b', 'c', 'a', 'b', 'c'])
  t.equal(most, 1)
})

t.test('the timer is set for the moment when the first item is due, and for no other', async (t) => {
  const { setTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout }))
  const asked: number[] = []
  const noting = (callback: () => void, ms: number) => {
    asked.push(ms)
    return setTimeout(callback, ms)
  }
  Object.assign(globalThis, { setTimeout: noting })
  new Deadlines<string>(1_500, () => {}, false).add('a')
  new Deadlines<string>(10.2, () => {}, false).add('b')
  new Deadlines<string>(0.2, () => {}, false).add('c')
  t.strictSame(asked, [1_500, 11, 1])
})

t.test('any number of items share one timer', async (t) => {
  const deadlines = new Deadlines<number>(30_000, () => {}, true)
  const timers = timersOf(() => {
    for (let item = 0; item < 1_000; item++) deadlines.add(item)
    for (let item = 0; item < 1_000; item++) deadlines.delete(item)
    for (let item = 0; item < 1_000; item++) deadlines.add(item)
  })
  t.equal(timers, 1)
  for (let item = 0; item < 1_000; item++) deadlines.delete(item)
})

t.test('a pending deadline keeps the process alive where it should, and only while there is one', async (t) => {
  const before = holding()
  const deadlines = new Deadlines<string>(30_000, () => {}, true)
  t.equal(holding(), before, 'none was added')
  deadlines.add('a')
  deadlines.add('b')
  t.equal(holding(), before + 1)
  deadlines.delete('a')
  t.equal(holding(), before + 1, 'one is left')
  deadlines.delete('b')
  t.equal(holding(), before, 'none is left')
  deadlines.add('c')
  t.equal(holding(), before + 1, 'there is one again')
  deadlines.delete('unknown')
  t.equal(holding(), before + 1, 'another was removed')
  deadlines.delete('c')
  t.equal(holding(), before)
})

t.test('a pending deadline does not keep the process alive where it should not', async (t) => {
  const before = holding()
  const deadlines = new Deadlines<string>(30_000, () => {}, false)
  deadlines.add('a')
  deadlines.add('b')
  t.equal(holding(), before)
  deadlines.delete('a')
  deadlines.delete('b')
  deadlines.add('c')
  t.equal(holding(), before)
})

t.test('deadlines that all were met leave nothing behind, and the next one is still kept', async (t) => {
  const before = holding()
  const expired: string[] = []
  const deadlines = new Deadlines<string>(10, (item) => expired.push(item), true)
  deadlines.add('met')
  deadlines.delete('met')
  await new Promise((resolve) => setTimeout(resolve, 20))
  deadlines.add('missed')
  await until(() => expired.length > 0)
  t.strictSame(expired, ['missed'])
  t.equal(holding(), before)
})

t.test('a deadline beyond what a timer can take does not strike at once', async (t) => {
  const warnings: Error[] = []
  const warned = (warning: Error) => warnings.push(warning)
  process.on('warning', warned)
  t.teardown(() => process.off('warning', warned))
  let expired = 0
  const far = new Deadlines<string>(FORTY_DAYS, () => expired++, false)
  far.add('a')
  const near: string[] = []
  new Deadlines<string>(10, (item) => near.push(item), true).add('b')
  await until(() => near.length > 0)
  t.equal(expired, 0)
  t.strictSame(warnings, [])
})

t.test('after a stall of the event loop what has arrived meanwhile is heard before anything expires', async (t) => {
  // A datagram to oneself is there as soon as it is sent, without any thread's help.
  const socket = createSocket('udp4')
  t.teardown(() => socket.close())
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  socket.connect(socket.address().port, '127.0.0.1')
  await once(socket, 'connect')
  const order: string[] = []
  const deadlines = new Deadlines<string>(5, (item) => order.push(`${item} expired`), true)
  socket.on('message', () => {
    order.push('answer')
    deadlines.delete('answered')
  })
  deadlines.add('answered')
  deadlines.add('unanswered')
  socket.send('answer')
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
  await until(() => order.length === 2)
  t.strictSame(order, ['answer', 'unanswered expired'])
})
