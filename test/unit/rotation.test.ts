import t, { type Test } from 'tap'
import { acquireAmong, type Placed } from '../../lib/operation/rotation.js'
import { MemoryStore } from '../../lib/stores/memory/memory-store.js'
import { claim, reply } from '../../lib/testkit/fixtures.js'
import type { Acquisition, Claim, IdempotencyStore, StoredStep } from '../../types/index.js'
import { until } from '../support/latch.js'
import { everySchedule, type Process } from '../support/schedules.js'

/*
 * One key under two secrets: whatever the order in which the calls of processes come to the store that have them in another
 * order, one of them runs.
 */

type Keys = [string, ...string[]]
const OLD_FIRST: Keys = ['old', 'new']
const NEW_FIRST: Keys = ['new', 'old']
const STEPS: StoredStep[] = [['charge', '"ch_1"']]

/** Asks once, as a process does that has the keys in this order. */
async function ask(store: IdempotencyStore, keys: Keys, changes: Partial<Claim> = {}, turn = async () => {}) {
  const mine = claim(changes)
  const giveBack = (key: string) => void store.release(key, mine.token, true)
  // One more look, when it is its turn again.
  const pause = async (n: number) => {
    if (n === 1) await turn()
    return n === 1
  }
  const found = await acquireAmong({ store, keys, claim: mine, isHolder: false, giveBack, pause })
  return { found, token: mine.token }
}

/** A claim whose owner has stopped, and may go on. Returns its token. */
async function interrupt(store: IdempotencyStore, key: string, steps = STEPS, attempts = 1): Promise<string> {
  let token = ''
  for (let n = 0; n < attempts; n++) {
    const lapsing = claim({ takeover: true })
    token = lapsing.token
    await store.acquire(key, lapsing)
    for (const step of steps) await store.step?.(key, token, step)
    await store.renew(key, token, 0)
  }
  return token
}

type Run = { own: string; found: Placed<Acquisition>; isStored: boolean }

/** Asks, and runs and completes where it gets the key. */
function runner(keys: Keys, runs: Run[], found: Placed<Acquisition>[], changes: Partial<Claim> = {}): Process {
  return async (store, turn) => {
    const asked = await ask(store, keys, changes, turn)
    found.push(asked.found)
    if (asked.found.state !== 'acquired') return
    const run = { own: keys[0], found: asked.found, isStored: false }
    runs.push(run)
    run.isStored = await store.complete(keys[0], asked.token, reply(), 60_000)
  }
}

/** Who comes when all is over finds the reply, in either order; or, where there was no run, may run. */
async function comesLater(t: Test, store: IdempotencyStore, runs: Run[], schedule: string): Promise<boolean> {
  for (const keys of [OLD_FIRST, NEW_FIRST]) {
    const { found, token } = await ask(store, keys, { takeover: true })
    const expected = runs.length > 0 ? 'completed' : 'acquired'
    if (found.state !== expected) t.fail(`${schedule}: ${keys[0]} first finds it ${found.state}, not ${expected}`)
    if (found.state === 'acquired') await store.release(keys[0], token, true)
  }
  return runs.length > 0
}

const cases: [string, (store: IdempotencyStore) => Promise<unknown>, Partial<Claim>, Keys[], number][] = [
  ['a key that is free', async () => {}, {}, [OLD_FIRST, NEW_FIRST], 1],
  ['a key that is free, for three', async () => {}, {}, [OLD_FIRST, NEW_FIRST, NEW_FIRST], 1],
  [
    'what was interrupted under the old secret',
    (store) => interrupt(store, 'old'),
    { takeover: true },
    [OLD_FIRST, NEW_FIRST],
    2
  ],
  [
    'what was interrupted under the new secret',
    (store) => interrupt(store, 'new'),
    { takeover: true },
    [OLD_FIRST, NEW_FIRST],
    2
  ],
  [
    'what was interrupted more often',
    (store) => interrupt(store, 'old', STEPS, 3),
    { takeover: true },
    [OLD_FIRST, NEW_FIRST],
    4
  ],
  [
    'what was interrupted under both',
    async (store) => {
      await interrupt(store, 'old', [['ride', '1']], 2)
      await interrupt(store, 'new')
    },
    { takeover: true },
    [OLD_FIRST, NEW_FIRST],
    3
  ]
]

for (const [what, prepare, changes, orders, attempt] of cases) {
  t.test(`${what} is run by one, in every order of calls`, async (t) => {
    let ran = 0
    const schedules = await everySchedule(
      () => new MemoryStore(),
      async (store) => {
        await prepare(store)
        const kept = changes.takeover ? STEPS : []
        const [runs, found]: [Run[], Placed<Acquisition>[]] = [[], []]
        return {
          processes: orders.map((keys) => runner(keys, runs, found, changes)),
          check: async (schedule) => {
            if (runs.length > 1) t.fail(`${schedule}: two runs`)
            for (const run of runs) {
              if (!run.isStored) t.fail(`${schedule}: its reply was not stored`)
              const { steps = [], ...rest } = run.found as Extract<Acquisition, { state: 'acquired' }>
              if (rest.attempt !== attempt) t.fail(`${schedule}: attempt ${rest.attempt}`)
              for (const step of kept)
                if (!steps.some(([name]) => name === step[0])) t.fail(`${schedule}: a step is lost`)
            }
            if (await comesLater(t, store, runs, schedule)) ran++
          }
        }
      },
      2_000
    )
    t.ok(schedules > 10, `${schedules} orders`)
    t.ok(ran > schedules / 2, `a run in ${ran} of them`)
  })
}

t.test('without steps as well, where the attempt has to be raised by a claim that lapses', async (t) => {
  await everySchedule(
    () => new MemoryStore(),
    async (store) => {
      await interrupt(store, 'old', [])
      const runs: Run[] = []
      return {
        processes: [OLD_FIRST, NEW_FIRST].map((keys) => runner(keys, runs, [], { takeover: true })),
        check: async (schedule) => {
          if (runs.length > 1) t.fail(`${schedule}: two runs`)
          for (const { found } of runs) t.match(found, { state: 'acquired', attempt: 2 })
        }
      }
    },
    200
  )
  const store = new MemoryStore()
  await interrupt(store, 'old', [])
  t.match((await ask(store, NEW_FIRST, { takeover: true })).found, { state: 'acquired', attempt: 2 })
  t.equal(await store.get('old'), null)
})

t.test('an owner that was only paused is heard of or has lost, in every order of calls', async (t) => {
  const outcomes = new Set<string>()
  await everySchedule(
    () => new MemoryStore(),
    async (store) => {
      const token = await interrupt(store, 'old')
      const [runs, found]: [Run[], Placed<Acquisition>[]] = [[], []]
      let isCompleted = false
      return {
        processes: [
          runner(NEW_FIRST, runs, found, { takeover: true }),
          async (store) => {
            await store.renew('old', token, 60_000)
            isCompleted = await store.complete('old', token, reply(), 60_000)
          }
        ],
        check: async (schedule) => {
          if (isCompleted && runs.length > 0) t.fail(`${schedule}: both have run to the end`)
          if (!isCompleted && runs.length === 0) t.fail(`${schedule}: both are gone`)
          outcomes.add(`${isCompleted ? 'it goes on' : 'it has lost'}, the other finds it ${found[0]?.state}`)
        }
      }
    },
    8_000
  )
  t.same([...outcomes].sort(), [
    'it goes on, the other finds it completed',
    'it goes on, the other finds it running',
    'it has lost, the other finds it acquired'
  ])
})

t.test('what is settled meanwhile is met, or cannot be settled any more, in every order of calls', async (t) => {
  const outcomes = new Set<string>()
  await everySchedule(
    () => new MemoryStore(),
    async (store) => {
      await interrupt(store, 'old')
      const [runs, found]: [Run[], Placed<Acquisition>[]] = [[], []]
      let isSettled = false
      return {
        processes: [
          runner(NEW_FIRST, runs, found, { takeover: true }),
          async (store) => {
            isSettled = (await store.settle?.('old', 'fingerprint', { record: reply(), ttlMs: 60_000 })) === true
          }
        ],
        check: async () => {
          outcomes.add(`${isSettled ? 'settled' : 'refused'}, ${found[0]?.state}`)
        }
      }
    },
    8_000
  )
  t.same([...outcomes].sort(), ['refused, acquired', 'settled, completed'])
})

t.test('who dies on the way loses nothing of what was interrupted', async (t) => {
  // After so many calls, each of which has been carried out.
  for (let calls = 0; calls < 12; calls++) {
    const store = new MemoryStore()
    await interrupt(store, 'old', STEPS, 2)
    let left = calls
    const never = new Promise<never>(() => {})
    const dying = new Proxy(store, {
      get: (_, name) => {
        const method = store[name as 'get'] as unknown
        if (typeof method !== 'function') return method
        return (...args: unknown[]) => (left-- > 0 ? method.apply(store, args) : never)
      }
    })
    let isOver = false
    const over = () => {
      isOver = true
    }
    ask(dying, NEW_FIRST, { takeover: true, leaseMs: 30 }).then(over, over)
    await until(async () => isOver || left < 0)
    const found = await until(async () => {
      const { found } = await ask(store, NEW_FIRST, { takeover: true })
      return found.state === 'acquired' && found
    })
    t.match(found, { state: 'acquired', steps: STEPS }, `after ${calls} calls`)
    t.ok(found && found.attempt >= 3)
    t.equal(await store.get('old'), null)
  }
})

t.test('what is there is found before anything is claimed', async (t) => {
  const store = new MemoryStore()
  const { token } = await ask(store, OLD_FIRST)
  const calls: string[] = []
  const spied = new Proxy(store, {
    get: (_, name) => {
      const method = store[name as 'get'] as unknown
      if (typeof method !== 'function') return method
      return (...args: unknown[]) => {
        calls.push(`${String(name)} ${args[0]}`)
        return method.apply(store, args)
      }
    }
  })
  t.match((await ask(spied, NEW_FIRST)).found, { state: 'running', storageKey: 'old' })
  await store.complete('old', token, reply(), 60_000)
  t.match((await ask(spied, NEW_FIRST)).found, { state: 'completed', storageKey: 'old' })
  t.same(calls, ['get new', 'get old', 'get new', 'get old'])
})

t.test('what is interrupted is not taken over by who does not ask for that', async (t) => {
  const store = new MemoryStore()
  await interrupt(store, 'old')
  const before = await store.get('old')
  t.match((await ask(store, NEW_FIRST)).found, { state: 'abandoned', attempt: 1, steps: STEPS, storageKey: 'old' })
  t.equal(await store.get('new'), null)
  t.match(await store.get('old'), { ...before, lapsedMs: Number })
})

t.test('an answer that makes no sense is an error, and the claim is not kept', async (t) => {
  const store = new MemoryStore()
  const odd: IdempotencyStore = {
    acquire: (...args) => store.acquire(...args),
    renew: (...args) => store.renew(...args),
    complete: (...args) => store.complete(...args),
    release: (...args) => store.release(...args),
    get: async () => ({ state: 'completed' }) as never
  }
  await t.rejects(ask(odd, NEW_FIRST), { name: 'Error', isFree: false })
  t.equal(await store.get('new'), null)
})
