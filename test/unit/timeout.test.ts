import t from 'tap'
import { StoreTimeout } from '../../lib/errors.js'
import { promiseTry, withTimeout } from '../../lib/util/timeout.js'
import { latch } from '../support/latch.js'

const never = () => new Promise<never>(() => {})

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

t.test('an answer in time is given on', async (t) => {
  const answer = { state: 'acquired' }
  t.equal(await withTimeout(10_000, async () => answer), answer)
  t.equal(await withTimeout(10_000, async () => undefined), undefined)
  const later = latch<number>()
  const waiting = withTimeout(10_000, () => later.promise)
  later.open(1)
  t.equal(await waiting, 1)
})

t.test("a store's own error is given on as it is", async (t) => {
  const error = new Error('connection lost')
  const given = await withTimeout(10_000, () => Promise.reject(error)).catch((reason) => reason)
  t.equal(given, error)
})

t.test('a store that throws instead of rejecting is treated alike, and leaves nothing behind', async (t) => {
  const before = holding()
  const error = new Error('not connected')
  const call = withTimeout(10, () => {
    throw error
  })
  t.equal(await call.catch((reason) => reason), error)
  t.equal(holding(), before)
  // Had its limit stayed, it would strike now, and nobody would handle that.
  t.equal(await withTimeout(10, never).catch(() => 'over'), 'over')
})

t.test('an answer that is no promise is an answer', async (t) => {
  t.equal(await withTimeout(10_000, () => true as unknown as Promise<boolean>), true)
  t.equal(await promiseTry(() => true as unknown as Promise<boolean>), true)
})

t.test('no answer in time is a StoreTimeout that says how long was waited', async (t) => {
  const error = await withTimeout(15, never).catch((reason) => reason)
  t.ok(error instanceof StoreTimeout)
  t.match(error, { name: 'StoreTimeout', message: 'The idempotency store did not answer within 15 ms' })
})

t.test('an answer that comes too late changes nothing, and neither does a late error', async (t) => {
  const answered = latch<string>()
  const failed = latch<string>()
  const first = withTimeout(10, () => answered.promise)
  const second = withTimeout(10, () => failed.promise)
  await t.rejects(first, StoreTimeout)
  await t.rejects(second, StoreTimeout)
  answered.open('late')
  // Nobody else handles this one: were it not taken care of, the process would end here.
  failed.fail(new Error('late'))
  await new Promise((resolve) => setImmediate(resolve))
  await t.rejects(first, StoreTimeout)
})

t.test('each call has its own limit', async (t) => {
  const short = withTimeout(10, never).catch(() => 'short')
  const long = withTimeout(20_000, () => short)
  t.equal(await long, 'short')
})

t.test('a call keeps the process alive until it is answered, and no longer', async (t) => {
  const before = holding()
  const answer = latch()
  const call = withTimeout(12_000, () => answer.promise)
  t.equal(holding(), before + 1)
  answer.open()
  await call
  t.equal(holding(), before)
  await withTimeout(12_000, () => Promise.reject(new Error('failed'))).catch(() => {})
  t.equal(holding(), before)
})
