import t, { type Test } from 'tap'
import { StoreTimeout, UnreadableAnswer } from '../../lib/errors.js'
import { StoreHealth } from '../../lib/operation/store-health.js'
import { resolved } from '../../lib/util/sync-promise.js'
import { latch } from '../support/latch.js'
import { VirtualTime } from '../support/virtual-time.js'

const LIMIT = 2_003
const away = new Error('away')
const refused = Object.assign(new Error('connect ECONNREFUSED'), { code: 'ECONNREFUSED' })
const reset = Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' })
const full = Object.assign(new Error('full'), { code: 'FST_IDEMPOTENCY_STORE_FULL' })
const never = () => new Promise<never>(() => {})

/** The time of all tests: limits of one length share a timer, which goes on from one to the next. */
const time = new VirtualTime()

/** The health of a store in virtual time, and what is logged of it. */
function patient(t: Test) {
  time.install()
  t.teardown(() => time.uninstall())
  const health = new StoreHealth()
  const logged: [level: string, words: string, error?: unknown][] = []
  const level = (name: string) => (entry: { err?: unknown }, words: string) => {
    logged.push(entry.err === undefined ? [name, words] : [name, words, entry.err])
  }
  const log = { debug: level('debug'), warn: level('warn'), error: level('error') } as never
  const ask = async (key: string, call: () => Promise<unknown>, permit = health.admit()) => {
    if (permit === null) return 'refused'
    try {
      return await health.ask(key, LIMIT, call, permit)
    } catch (error) {
      health.report(error, log, {})
      return error
    }
  }
  const fail = (key: string, error: unknown = away) => ask(key, () => Promise.reject(error))
  const hang = async (key = 'silent') => {
    const asked = ask(key, never)
    await time.pass(LIMIT)
    return asked
  }
  return { time, health, logged, ask, fail, hang }
}

t.test('a store that has not answered in time, and nobody else meanwhile, is down', async (t) => {
  const { health, hang } = patient(t)
  const error = await hang()
  t.type(error, StoreTimeout)
  t.equal(health.isDown, true)
  t.equal(health.error, error)
})

t.test('a store that cannot be connected to is down at once', async (t) => {
  const { health, fail } = patient(t)
  await fail('a', refused)
  t.equal(health.isDown, true)
})

t.test('one key that gets no answer closes the store to nobody, as long as others get one', async (t) => {
  const { time, health, ask } = patient(t)
  const silent = ask('a', never)
  await time.pass(1_000)
  await ask('b', async () => true)
  await time.pass(1_003)
  t.type(await silent, StoreTimeout)
  t.equal(health.isDown, false)
})

t.test('one key that fails again and again closes the store to nobody', async (t) => {
  const { health, fail } = patient(t)
  for (let n = 0; n < 20; n++) await fail('damaged')
  t.equal(health.isDown, false)
})

t.test('three keys that fail one after the other are a store that is down', async (t) => {
  const { health, fail, ask } = patient(t)
  await fail('a')
  await fail('b')
  await ask('c', async () => true)
  await fail('c')
  await fail('d')
  t.equal(health.isDown, false, 'not with an answer between')
  await fail('e')
  t.equal(health.isDown, true)
})

t.test('calls that were under way together have failed together: of them one counts', async (t) => {
  for (const error of [away, reset, Object.assign(new Error('write EPIPE'), { code: 'EPIPE' })]) {
    const { health, ask } = patient(t)
    const broken = latch<never>()
    const asked = ['a', 'b', 'c', 'd', 'e'].map((key) => ask(key, () => broken.promise))
    const other = latch<boolean>()
    const elsewhere = ask('elsewhere', () => other.promise)
    broken.fail(error)
    await Promise.all(asked)
    t.equal(health.isDown, false)
    t.not(health.admit(), null, 'nobody is refused')
    other.open(true)
    t.equal(await elsewhere, true)
  }
})

t.test('calls that fail one after the other count, whatever the number of those that fail with each', async (t) => {
  const { health, ask } = patient(t)
  for (const [round, isDown] of [false, false, true].entries()) {
    const broken = latch<never>()
    const asked = ['a', 'b', 'c'].map((key) => ask(`${key}${round}`, () => broken.promise))
    broken.fail(reset)
    await Promise.all(asked)
    t.equal(health.isDown, isDown)
  }
})

t.test('a key that fails again and again does not hide that others do', async (t) => {
  const { health, fail, ask } = patient(t)
  await fail('damaged')
  for (const [key, isDown] of Object.entries({ a: false, b: true })) {
    const broken = latch<never>()
    const asked = ask(key, () => broken.promise)
    await fail('damaged')
    broken.fail(away)
    await asked
    t.equal(health.isDown, isDown)
  }
})

t.test('a call that has had no answer for as long as it may is silence, whoever has failed meanwhile', async (t) => {
  const { time, health, ask, fail } = patient(t)
  const silent = ask('silent', never)
  await fail('a')
  await time.pass(LIMIT)
  t.type(await silent, StoreTimeout)
  t.equal(health.isDown, true)
})

t.test('a store that is full, or whose answers cannot be read, is not down', async (t) => {
  const { health, fail, logged } = patient(t)
  for (const error of [full, new UnreadableAnswer()]) {
    for (let n = 0; n < 5; n++) await fail(`key ${n}`, error)
    t.equal(health.isDown, false)
  }
  t.equal(logged.filter(([level]) => level === 'error').length, 10, 'each is an error of its own')
})

t.test('while it is down one request at a time asks, and the others are refused', async (t) => {
  const { time, health, hang, ask } = patient(t)
  await hang()
  const probe = ask('probe', never)
  for (let n = 0; n < 5; n++) t.equal(health.admit(), null)
  await time.pass(100)
  t.type(await probe, StoreTimeout, 'who asks does not wait for long')
  t.not(health.admit(), null, 'and then it is the turn of the next one')
  t.equal(health.admit(), null)
})

t.test('a probe that fails at once makes way for the next one at once', async (t) => {
  const { health, fail } = patient(t)
  await fail('a', refused)
  t.equal(await fail('b', refused), refused)
  t.not(health.admit(), null)
})

t.test('a call that fails and is no probe lets nobody else ask', async (t) => {
  const { health, fail, ask } = patient(t)
  await fail('a', refused)
  void ask('probe', never)
  await health.ask('renewal', LIMIT, () => Promise.reject(refused)).catch(() => {})
  t.equal(health.admit(), null)
})

t.test('with the first answer it is up again, whoever gets it', async (t) => {
  for (const answer of [async () => true, () => resolved(false)]) {
    const { health, hang } = patient(t)
    await hang()
    await health.ask('renewal', LIMIT, answer)
    t.equal(health.isDown, false)
  }
})

t.test('the answer to a probe counts, though its request has given up', async (t) => {
  const { time, health, hang, ask } = patient(t)
  await hang()
  const answer = latch<boolean>()
  const probe = ask('probe', () => answer.promise)
  await time.pass(150)
  t.type(await probe, StoreTimeout)
  answer.open(true)
  await time.pass(0)
  t.equal(health.isDown, false)
})

t.test('a probe does not wait longer than a store call may', async (t) => {
  const { time, health, hang } = patient(t)
  await hang()
  const probe = health.ask('probe', 31, never, health.admit() ?? undefined)
  let is = 'asking'
  probe.catch(() => {
    is = 'over'
  })
  await time.pass(31)
  t.equal(is, 'over')
})

t.test('an outage is one error in the log, and one warning when it is over', async (t) => {
  const { time, logged, hang, ask, fail } = patient(t)
  const first = await hang()
  await fail('a', refused)
  const probe = ask('b', never)
  await time.pass(100)
  await probe
  await fail('c')
  await ask('d', async () => true)
  await ask('d', async () => true)
  const lines = logged.filter(([level]) => level !== 'debug')
  t.strictSame(lines, [
    ['error', 'idempotency store failed', first],
    ['warn', 'idempotency store is back']
  ])
  t.equal(logged.filter(([level]) => level === 'debug').length, 3)
  t.strictSame(
    (await fail('e')) && logged.at(-1),
    ['error', 'idempotency store failed', away],
    'the next one is another'
  )
})

t.test('a failure that is no outage is an error, and its end is nothing to tell', async (t) => {
  const { logged, ask, fail } = patient(t)
  await fail('a')
  await ask('a', async () => true)
  t.strictSame(logged, [['error', 'idempotency store failed', away]])
})

t.test('errors that say nothing are errors all the same', async (t) => {
  const { health, ask } = patient(t)
  for (const nothing of [undefined, null, 'x', 0])
    for (const key of ['a', 'b', 'c']) await ask(key, () => Promise.reject(nothing))
  t.equal(health.isDown, true)
  t.ok(health.error instanceof Error || health.error === 0)
  await ask('d', async () => true)
  t.equal(health.isDown, false)
})

/* Who waits for it to be back */

t.test('a pause ends when it is over, or when a store that was down is back', async (t) => {
  const { time, health, hang, fail, ask } = patient(t)
  const ended: string[] = []
  const pause = (name: string, ms: number) => health.pause(ms).then(() => ended.push(name))
  void pause('over', 50)
  void pause('cut short', 5_000)
  await time.pass(50)
  t.strictSame(ended, ['over'])
  await fail('a')
  await ask('b', async () => true)
  await time.pass(0)
  t.strictSame(ended, ['over'], 'it was not down')
  await hang()
  await ask('b', async () => true)
  await time.pass(0)
  t.strictSame(ended, ['over', 'cut short'])
})

t.test('who waits for a store that is down is told once that it is back', async (t) => {
  const { health, hang, ask } = patient(t)
  let told = 0
  const waiting = { storeIsBack: () => void told++ }
  health.tellWhenBack(waiting)
  for (let outage = 1; outage <= 2; outage++) {
    await hang()
    t.equal(told, outage - 1)
    health.tellWhenBack(waiting)
    health.tellWhenBack(waiting)
    await ask('a', async () => true)
    t.equal(told, outage)
  }
})

t.test('a store that is back is not overrun, and not as long as it is down again', async (t) => {
  const { time, health, hang, ask } = patient(t)
  let ended = 0
  for (let n = 0; n < 40; n++) void health.pause(60_000).then(() => ended++)
  await hang()
  await ask('a', async () => true)
  await time.pass(0)
  t.equal(ended, 16)
  await time.pass(10)
  t.equal(ended, 32)
  await ask('a', () => Promise.reject(refused))
  t.equal(health.isDown, true)
  await time.pass(100)
  t.equal(ended, 32)
  await ask('a', async () => true)
  await time.pass(0)
  t.equal(ended, 40)
})
