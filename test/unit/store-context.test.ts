import { setTimeout as pause } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { retryUntil, StoreContext, sleep } from '../../lib/operation/store-context.js'
import { StoreHealth } from '../../lib/operation/store-health.js'
import type { IdempotencyStore } from '../../types/index.js'
import { latch, until } from '../support/latch.js'

/** Longer than any pause. */
const TIMEOUT = 30_000

// Pauses do not keep the process alive: something else must.
const alive = setInterval(() => {}, TIMEOUT)
t.teardown(() => clearInterval(alive))

/** The context of a store that is asked for nothing else. */
function releasing(release: IdempotencyStore['release']): StoreContext {
  return StoreContext.of({ release } as IdempotencyStore)
}

/** Makes pauses short, and notes how long they would have been. */
function hurry(t: Test): number[] {
  const real = globalThis.setTimeout
  const asked: number[] = []
  const hurried = (callback: (...args: unknown[]) => void, ms = 0, ...args: unknown[]) => {
    if (ms >= TIMEOUT) return real(callback, ms, ...args)
    asked.push(ms)
    return real(callback, 1, ...args)
  }
  globalThis.setTimeout = hurried as typeof setTimeout
  t.teardown(() => {
    globalThis.setTimeout = real
  })
  return asked
}

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

t.test('a store that need not be closed is let go all the same', async (t) => {
  const inUse = StoreContext.of({} as IdempotencyStore)
  inUse.enter()
  await t.resolves(inUse.leave())
})

t.test('a store is in use until the last registration has let go of it', async (t) => {
  const context = StoreContext.of({} as IdempotencyStore)
  const isInUse = () => [...StoreContext.inUse].includes(context)
  t.equal(isInUse(), false)
  for (let n = 0; n < 2; n++) context.enter()
  await context.leave()
  t.equal(isInUse(), true)
  await context.leave()
  t.equal(isInUse(), false)
})

t.test('a claim that nobody needs is given back once, used or unused, and who asked for it is told', async (t) => {
  const released: unknown[][] = []
  const inUse = releasing(async (...args) => {
    released.push(args)
    return true
  })
  await inUse.giveBack('a', '1', TIMEOUT, true)
  await Promise.all([inUse.giveBack('b', '2', TIMEOUT, false), inUse.giveBack('c', '3', TIMEOUT, true)])
  t.strictSame(released, [
    ['a', '1', true],
    ['b', '2', false],
    ['c', '3', true]
  ])
})

t.test('a claim that cannot be given back is tried again after growing pauses, a second at most', async (t) => {
  const pauses = hurry(t)
  let failures = 7
  const asked: string[] = []
  const inUse = releasing(async (key) => {
    asked.push(key)
    if (failures-- > 0) throw new Error('away')
    return true
  })
  await inUse.giveBack('a', 'token', TIMEOUT, true)
  t.strictSame(pauses, [50, 100, 200, 400, 800, 1_000, 1_000])
  failures = 1
  await inUse.giveBack('b', 'token', TIMEOUT, true)
  t.equal(pauses.at(-1), 50, 'once the store is back, the pauses are short again')
  t.strictSame(asked, [...Array(8).fill('a'), 'b', 'b'])
})

t.test('a success makes the pauses short again for the claims behind it', async (t) => {
  const pauses = hurry(t)
  const answers = [false, false, true, false, true]
  const inUse = releasing(async () => {
    if (answers.shift() === false) throw new Error('away')
    return true
  })
  await Promise.all([inUse.giveBack('a', 'token', TIMEOUT, true), inUse.giveBack('b', 'token', TIMEOUT, true)])
  t.strictSame(pauses, [50, 100, 50])
})

t.test('a claim that cannot be given back does not hold up the others', async (t) => {
  hurry(t)
  let broken = true
  const inUse = releasing(async (key) => {
    if (key === 'broken' && broken) throw new Error('away')
    return true
  })
  const first = inUse.giveBack('broken', 'token', TIMEOUT, true)
  await inUse.giveBack('sound', 'token', TIMEOUT, true)
  broken = false
  await first
})

t.test('a store that gives no answer in time is asked again', async (t) => {
  hurry(t)
  let asked = 0
  const inUse = releasing(() => (++asked === 1 ? new Promise<never>(() => {}) : Promise.resolve(true)))
  await inUse.giveBack('a', 'token', 10, true)
  t.equal(asked, 2)
})

t.test('when the last one has left nothing more is given back, and who waits for it is told', async (t) => {
  hurry(t)
  let asked = 0
  const inUse = releasing(async () => {
    asked++
    throw new Error('away')
  })
  inUse.enter()
  const given = Promise.all([inUse.giveBack('a', 'token', TIMEOUT, true), inUse.giveBack('b', 'token', TIMEOUT, true)])
  await until(() => asked >= 3)
  await inUse.leave()
  t.strictSame(await given, [false, false])
  const before = asked
  await pause(20)
  t.equal(asked, before)
})

t.test(
  'a claim that nobody needs any more when the last one has left is not given back, until the store is used again',
  async (t) => {
    let asked = 0
    const inUse = releasing(async () => {
      asked++
      return true
    })
    inUse.enter()
    await inUse.leave()
    t.equal(await inUse.giveBack('a', 'token', TIMEOUT, true), false)
    t.equal(asked, 0)
    inUse.enter()
    t.equal(await inUse.giveBack('a', 'token', TIMEOUT, true), true)
    t.equal(asked, 1)
  }
)

t.test('a claim whose giving back fails after the last one has left is not tried again', async (t) => {
  hurry(t)
  const answer = latch<boolean>()
  let asked = 0
  const inUse = releasing(() => {
    asked++
    return answer.promise
  })
  inUse.enter()
  const given = inUse.giveBack('a', 'token', TIMEOUT, true)
  await inUse.leave()
  await given
  answer.fail(new Error('away'))
  await pause(20)
  t.equal(asked, 1)
})

t.test('of more than ten thousand claims that nobody needs the oldest are left to lapse', async (t) => {
  const answer = latch<boolean>()
  const asked: string[] = []
  const inUse = releasing((key) => {
    asked.push(key)
    return answer.promise
  })
  let told = 0
  const tell = async (given: Promise<boolean>) => {
    const is = await given
    told++
    return is
  }
  const given = Array.from({ length: 10_000 }, (_, n) => tell(inUse.giveBack(`${n}`, 'token', TIMEOUT, true)))
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(told, 0)
  for (let n = 10_000; n < 10_003; n++) given.push(tell(inUse.giveBack(`${n}`, 'token', TIMEOUT, true)))
  await Promise.all(given.slice(0, 3))
  t.equal(told, 3, 'who waits for those is told')
  answer.open(true)
  const results = await Promise.all(given)
  t.strictSame(
    results.map((is, n) => (is ? -1 : n)).filter((n) => n >= 0),
    [0, 1, 2],
    'that they are not given back'
  )
  t.equal(asked.length, 10_001)
  t.strictSame(asked.slice(0, 2), ['0', '3'], 'the first was being given back already')
})

t.test('insisting repeats a step until it is answered, after growing pauses', async (t) => {
  const pauses = hurry(t)
  let failures = 6
  const answer = await retryUntil(
    new StoreHealth(),
    async () => {
      if (failures-- > 0) throw new Error('away')
      return 'answer'
    },
    () => false
  )
  t.equal(answer, 'answer')
  t.strictSame(pauses, [50, 100, 200, 400, 800, 1_000, 1_000])
})

t.test('insisting ends without another step when there is no more point in it', async (t) => {
  hurry(t)
  let steps = 0
  const answer = await retryUntil(
    new StoreHealth(),
    async () => {
      steps++
      throw new Error('away')
    },
    () => steps === 2
  )
  t.equal(answer, null)
  t.equal(steps, 2)
})

t.test('a pause does not keep the process alive', async (t) => {
  const before = holding()
  const sleeping = sleep(10)
  t.equal(holding(), before)
  await Promise.all([sleeping, pause(20)])
})
