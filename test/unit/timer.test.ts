import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import t from 'tap'
import { LONGEST_DELAY, Timer } from '../../lib/util/timer.js'
import { until } from '../support/latch.js'
import { settled, VirtualTime } from '../support/virtual-time.js'

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

t.test('a timer rings once, with its item, and one that was cancelled does not', async (t) => {
  const rung: string[] = []
  const ring = (item: string) => rung.push(item)
  const [cancelled, kept] = [new Timer(10, ring, 'cancelled', true), new Timer(10, ring, 'kept', true)]
  t.equal(cancelled.cancel(), true)
  await until(() => rung.length > 0)
  new Timer(10, ring, 'later', true)
  await until(() => rung.length > 1)
  t.strictSame(rung, ['kept', 'later'])
  t.equal(cancelled.cancel(), false, 'it was')
  t.equal(kept.cancel(), false, 'it has rung')
})

t.test('timers of one length ring in the order in which they were set', async (t) => {
  const rung: number[] = []
  for (let n = 0; n < 1_000; n++) new Timer(5, (item) => rung.push(item), n, true)
  await until(() => rung.length === 1_000)
  t.strictSame(
    rung,
    Array.from({ length: 1_000 }, (_, n) => n)
  )
})

t.test('a delay is whole milliseconds, and one at least', async (t) => {
  const { setTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout }))
  const asked: number[] = []
  Object.assign(globalThis, { setTimeout: (_: unknown, ms: number) => asked.push(ms) && { unref() {} } })
  for (const ms of [1_500, 10.2, 0.2, 0]) new Timer(ms, () => {}, null, false)
  t.strictSame(asked, [1_500, 11, 1, 1])
})

t.test('a timer keeps the process alive where it should, until it has rung or was cancelled', async (t) => {
  const before = holding()
  const timer = new Timer(30_000, () => {}, null, true)
  t.equal(holding(), before + 1)
  timer.cancel()
  t.equal(holding(), before)
  const other = new Timer(30_000, () => {}, null, false)
  t.equal(holding(), before)
  other.cancel()
})

t.test('a delay beyond what Node can take is kept', async (t) => {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  let rung = 0
  const ring = () => rung++
  new Timer(LONGEST_DELAY + 1_000, ring, null, false)
  const cancelled = new Timer(LONGEST_DELAY + 1_000, ring, null, false)
  await time.pass(LONGEST_DELAY)
  cancelled.cancel()
  await time.pass(999)
  t.equal(rung, 0)
  await time.pass(1)
  await settled()
  t.equal(rung, 1)
  t.equal(time.pending, 0)
})

t.test('after a stall of the event loop what has arrived meanwhile is heard before anything rings', async (t) => {
  // A datagram to oneself is there as soon as it is sent, without any thread's help.
  const socket = createSocket('udp4')
  t.teardown(() => socket.close())
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  socket.connect(socket.address().port, '127.0.0.1')
  await once(socket, 'connect')
  const order: string[] = []
  const ring = (item: string) => order.push(`${item} rings`)
  const answered = new Timer(5, ring, 'answered', true)
  socket.on('message', () => {
    order.push('answer')
    answered.cancel()
  })
  new Timer(5, ring, 'unanswered', true)
  socket.send('answer')
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
  await until(() => order.length === 2)
  t.strictSame(order, ['answer', 'unanswered rings'])
})
