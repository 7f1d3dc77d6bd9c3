import t, { type Test } from 'tap'
import type { StoredStep, Transactions } from '../../types/index.js'
import { latch } from '../support/latch.js'
import {
  type Actor,
  away,
  failing,
  KEY,
  LEASE,
  never,
  onBoth,
  outcome,
  RECORD,
  running,
  type Scene,
  STORE_TIMEOUT,
  scene,
  UNAVAILABLE,
  verdictOf
} from '../support/operation-scene.js'

/* What the steps of an operation ask of the store, and when, and what becomes of its answers. */

const LOST = { code: 'FST_IDEMPOTENCY_CLAIM_LOST', statusCode: 409, headers: { 'retry-after': '1' } }
const A: StoredStep = ['a', '"a"']
const B: StoredStep = ['b', '"b"']
const T: StoredStep = ['t', 'transaction']

/** An operation whose handler runs, and the steps that earlier attempts have finished. */
async function atWork(s: Scene, steps?: readonly StoredStep[], cast?: Parameters<Scene['actor']>[0]): Promise<Actor> {
  const [, ...others] = s.store.answers.acquire
  if (steps !== undefined) s.store.answers.acquire = [{ state: 'acquired', attempt: 2, steps }, ...others, ACQUIRED]
  const actor = s.actor(cast)
  actor.operation.learn('payload')
  await actor.operation.claim()
  actor.operation.start()
  return actor
}

const ACQUIRED = { state: 'acquired', attempt: 1 }

/** What a step gives, or throws. */
const step = ({ operation }: Actor, name: string, run: () => unknown = () => name) =>
  outcome(() => operation.step(name, run))

/** The steps that the store was told, in order. */
const told = ({ store }: Scene) => store.calls('step').map(([, , step]) => step)

/** Transactions that note what is committed. */
function transactions() {
  const committed: string[] = []
  const db: Transactions<null> = {
    async once({ name, fingerprint }, work) {
      const result = await work(null)
      committed.push(name)
      return { result, fingerprint, resumed: false }
    },
    forget: async () => false
  }
  return { db, committed }
}

/** The time of a lease passes, in which it is not renewed. */
async function lapse(s: Scene, ms = LEASE): Promise<void> {
  s.store.answers.renew = [failing(away)]
  await s.time.pass(ms)
  s.store.answers.renew = [true]
}

/** Nothing more is asked, however long one waits. */
async function isQuiet(t: Test, s: Scene): Promise<void> {
  const before = s.store.names.filter((name) => name !== 'renew')
  await s.time.pass(LEASE)
  t.strictSame(
    s.store.names.filter((name) => name !== 'renew'),
    before
  )
}

/* The order of things */

onBoth(t, 'the store is asked for nothing before a step is done, and then told of it in one call', async (t, s) => {
  const a = await atWork(s)
  const seen: string[][] = []
  for (const name of ['a', 'b']) {
    const given = await step(a, name, () => {
      seen.push([...s.store.names])
      return name
    })
    t.equal(given, name)
  }
  t.strictSame(seen, [['acquire'], ['acquire', 'step']])
  await a.operation.complete(RECORD)
  t.strictSame(s.store.names, ['acquire', 'step', 'step', 'complete'])
  const [token] = s.store.tokens
  t.strictSame(s.store.calls('step'), [
    [KEY, token, A],
    [KEY, token, B]
  ])
  t.strictSame(a.events, ['acquired', 'step-stored', 'step-stored', 'stored'])
  await isQuiet(t, s)
})

onBoth(t, 'what an earlier attempt has done is given without a word to the store', async (t, s) => {
  const given = [A]
  const a = await atWork(s, given)
  t.equal(await step(a, 'a', () => t.fail('it runs again')), 'a')
  t.strictSame(s.store.names, ['acquire'])
  t.strictSame(a.events, ['acquired', 'takeover', 'step-resumed'])
  t.equal(await step(a, 'b'), 'b')
  t.strictSame(told(s), [B])
  t.strictSame(given, [A], 'the answer of the store is left alone')
})

onBoth(t, 'what is done, and cannot be kept, is not done again by the same attempt', async (t, s) => {
  const a = await atWork(s)
  t.match(await step(a, 'a', () => 1n), { code: 'FST_IDEMPOTENCY_STEP', message: /is done, but/ })
  t.match(await step(a, 'a', () => t.fail('it runs again')), { message: /used for two steps/ })
  t.equal(s.store.calls('step').length, 1)
})

onBoth(t, 'what is thrown in a step is not told to the store', async (t, s) => {
  const a = await atWork(s)
  t.equal(await step(a, 'a', () => Promise.reject(away)), away)
  t.strictSame(s.store.names, ['acquire'])
  t.equal(await step(a, 'a'), 'a')
  t.strictSame(told(s), [A])
})

/* Before a step */

onBoth(t, 'the store is asked before a step only if it may have let the lease lapse', async (t, s) => {
  const a = await atWork(s)
  await lapse(s, LEASE - 1)
  const before = s.store.asked.length
  await step(a, 'a')
  t.strictSame(s.store.names.slice(before), ['step'])
  await s.time.pass(1)
  await step(a, 'b', () => {
    t.strictSame(s.store.names.slice(before), ['step', 'renew'])
    return 'b'
  })
  t.strictSame(s.store.asked[before + 1], ['renew', KEY, s.store.tokens[0], LEASE])
  await step(a, 'c')
  t.strictSame(s.store.names.slice(before), ['step', 'renew', 'step', 'step'])
})

for (const [what, prepare] of Object.entries({
  'somebody else has the key': ({ store }: Scene) => {
    store.answers.get = [running()]
  },
  'somebody else was faster': ({ store }: Scene) => {
    store.answers.acquire = [running()]
  },
  'the store cannot tell': ({ store }: Scene) => {
    delete store.get
  }
})) {
  onBoth(t, `no step begins when the lease has lapsed and ${what}`, async (t, s) => {
    const a = await atWork(s)
    await lapse(s)
    s.store.answers.renew = [false]
    prepare(s)
    t.match(await step(a, 'a', () => t.fail('it has begun')), LOST)
    t.equal(a.operation.signal.aborted, true)
    t.equal(a.events.at(-1), 'lease-lost')
    t.strictSame(told(s), [])
    const asked = s.store.asked.length
    t.match(await step(a, 'b', () => t.fail('it has begun')), LOST)
    t.equal(s.store.asked.length, asked)
  })

  onBoth(t, `a step that is done is not kept when the store does not know the claim and ${what}`, async (t, s) => {
    const a = await atWork(s)
    s.store.answers.step = [false]
    prepare(s)
    t.match(await step(a, 'a'), LOST)
    t.equal(a.operation.signal.aborted, true)
    t.strictSame(a.events, ['acquired', 'lease-lost'])
    t.equal(a.operation.phase, 'over')
    t.match(await step(a, 'b', () => t.fail('it has begun')), LOST)
    await a.operation.release()
    t.equal(s.store.calls('step').length, 1)
    t.strictSame(s.store.calls('release'), [])
    await isQuiet(t, s)
  })
}

for (const [how, answer] of Object.entries({ fails: failing(away), 'does not answer': never })) {
  t.test(`no step begins when the lease may have lapsed and the store ${how}, unless the route says so`, async (t) => {
    for (const bypasses of [false, true]) {
      const s = scene(t, { policy: { bypasses } })
      const a = await atWork(s)
      await lapse(s)
      s.store.answers.renew = [answer]
      const given = step(a, 'a')
      await s.time.pass(STORE_TIMEOUT)
      if (bypasses) t.equal(await given, 'a')
      else t.match(await given, UNAVAILABLE)
      t.strictSame(told(s), bypasses ? [A] : [])
      t.equal(a.operation.signal.aborted, false)
    }
  })
}

onBoth(t, 'a claim that the store has lost is made anew before a step, with what was done before', async (t, s) => {
  const a = await atWork(s, [A])
  await step(a, 'b')
  await lapse(s)
  s.store.answers.renew = [false]
  const before = s.store.asked.length
  await step(a, 'c', () => {
    t.strictSame(s.store.names.slice(before), ['renew', 'get', 'acquire', 'step', 'step'])
    return 'c'
  })
  t.strictSame(told(s), [B, A, B, ['c', '"c"']])
  t.equal(a.operation.signal.aborted, false)
})

onBoth(t, 'what a step does while its claim is lost is not kept', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.renew = [false]
  s.store.answers.get = [running()]
  t.match(await step(a, 'a', () => s.time.pass(LEASE / 3)), LOST)
  t.strictSame(told(s), [])
})

/* What the store answers */

onBoth(t, 'a store that has lost its data gets the claim anew, and all of its steps', async (t, s) => {
  const a = await atWork(s, [A])
  s.store.answers.step = [false, true]
  t.equal(await step(a, 'b'), 'b')
  t.strictSame(s.store.names, ['acquire', 'step', 'get', 'acquire', 'step', 'step'])
  t.strictSame(told(s), [B, A, B])
  t.equal(new Set(s.store.tokens).size, 1)
  t.strictSame(a.events, ['acquired', 'takeover', 'step-stored'])
  await isQuiet(t, s)
})

for (const [how, answer] of Object.entries({
  fails: failing(away),
  'makes no sense': 'yes',
  'does not answer': never
})) {
  onBoth(t, `what a store that ${how} does not take counts, and is tried again until it is there`, async (t, s) => {
    const a = await atWork(s)
    s.store.answers.step = [answer, answer, true]
    const given = step(a, 'a')
    await s.time.pass(how === 'does not answer' ? STORE_TIMEOUT : 0)
    t.equal(await given, 'a')
    t.strictSame(a.events, ['acquired', 'store-error', 'step-stored'])
    t.equal(s.store.calls('step').length, 1)
    await s.time.pass(60)
    t.equal(s.store.calls('step').length, 2)
    await s.time.pass(110 + STORE_TIMEOUT)
    t.strictSame(s.store.calls('step'), Array(3).fill([KEY, s.store.tokens[0], A]))
    await isQuiet(t, s)
  })
}

onBoth(t, 'an answer that comes too late changes nothing', async (t, s) => {
  const a = await atWork(s)
  const answer = latch<boolean>()
  s.store.answers.step = [() => answer.promise, true]
  const given = step(a, 'a')
  await s.time.pass(STORE_TIMEOUT)
  t.equal(await given, 'a')
  await s.time.pass(60)
  t.strictSame(told(s), [A, A])
  answer.open(false)
  await s.time.pass(60)
  t.equal(a.operation.signal.aborted, false)
  await isQuiet(t, s)
})

onBoth(t, 'several that the store does not take are tried again together, in order', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away)]
  for (const name of ['a', 'b']) t.equal(await step(a, name), name)
  s.store.answers.step = [true]
  await s.time.pass(60)
  t.strictSame(told(s), [A, B, A, B])
  s.store.answers.step = [failing(away), true]
  await step(a, 'c')
  await s.time.pass(60)
  t.strictSame(told(s).slice(4), Array(2).fill(['c', '"c"']))
  await isQuiet(t, s)
})

onBoth(t, 'the first of them finds out whether the store is back', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away)]
  for (const name of ['a', 'b']) await step(a, name)
  await s.time.pass(60)
  t.strictSame(told(s), [A, B, A])
})

onBoth(t, 'a step that turns out to be too late is not tried any more', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away), false]
  await step(a, 'a')
  await s.time.pass(60)
  t.equal(s.store.calls('step').length, 2)
  await s.time.pass(LEASE / 3 - 100)
  t.equal(s.store.calls('step').length, 2)
})

for (const [what, end] of Object.entries({
  'has a reply': ({ operation }: Actor) => operation.complete(RECORD),
  'is lost': ({ operation }: Actor) => operation.end(),
  'is in a server that has closed': (_: Actor, s: Scene) => Object.assign(s.registration, { closed: true })
})) {
  onBoth(t, `nobody tries any more to store the step of an operation that ${what}`, async (t, s) => {
    const a = await atWork(s)
    s.store.answers.step = [failing(away)]
    await step(a, 'a')
    await end(a, s)
    await s.time.pass(LEASE)
    t.equal(s.store.calls('step').length, 1)
  })
}

// Until then this process may die, and whoever comes behind it is to find what was done.

onBoth(t, 'the steps of an operation are needed until its reply is stored', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away), true]
  await step(a, 'a')
  s.store.answers.complete = [never]
  await Promise.all([a.operation.complete(RECORD), s.time.pass(STORE_TIMEOUT)])
  t.strictSame(told(s), [A, A])
})

onBoth(t, 'a claim that is made anew for a reply has its steps before it has the reply', async (t, s) => {
  const a = await atWork(s)
  await step(a, 'a')
  s.store.answers.complete = [false, true]
  await a.operation.complete(RECORD)
  t.strictSame(s.store.names.slice(2), ['complete', 'get', 'acquire', 'step', 'complete'])
})

/* Claims that are made anew, or adopted */

for (const [what, lose] of Object.entries({
  'the claim is made anew': async (s: Scene, again: unknown) => {
    s.store.answers.acquire = [again]
    s.store.answers.renew = [false, true]
    await s.time.pass(LEASE / 3)
  },
  'another request leaves it its claim': async (s: Scene, again: unknown) => {
    s.store.answers.acquire = [ACQUIRED, again]
    t.match(await verdictOf(s.actor()), { code: 'FST_IDEMPOTENCY_IN_PROGRESS' })
  }
})) {
  onBoth(t, `a store that has lost its data gets the steps again when ${what}`, async (t, s) => {
    const a = await atWork(s, [A])
    await step(a, 'b')
    await lose(s, ACQUIRED)
    t.strictSame(told(s), [B, A, B])
    t.equal(s.store.calls('step').at(-1)?.[1], s.store.tokens.at(-1))
    await isQuiet(t, s)
  })

  onBoth(t, `it gets them as soon as it can when ${what} and it fails`, async (t, s) => {
    const a = await atWork(s, [A])
    await step(a, 'b')
    s.store.answers.step = [true, failing(away), true]
    await lose(s, ACQUIRED)
    t.strictSame(told(s), [B, A, B])
    await s.time.pass(60)
    t.strictSame(told(s), [B, A, B, B])
    await isQuiet(t, s)
  })

  onBoth(t, `it gets them when ${what} and its answer is lost`, async (t, s) => {
    const a = await atWork(s, [A])
    await step(a, 'b')
    await lose(s, failing(away))
    t.strictSame(told(s), [B])
    await s.time.pass(60)
    t.strictSame(told(s), [B, A, B])
    t.equal(s.store.calls('step').at(-1)?.[1], s.store.tokens.at(-1))
    await isQuiet(t, s)
  })
}

onBoth(t, 'a step is kept when another request leaves its claim while the store is told of it', async (t, s) => {
  const a = await atWork(s)
  const answer = latch<boolean>()
  s.store.answers.step = [() => answer.promise, true]
  const given = step(a, 'a')
  await s.time.pass(0)
  t.match(await verdictOf(s.actor()), { code: 'FST_IDEMPOTENCY_IN_PROGRESS' })
  answer.open(false)
  t.equal(await given, 'a')
  const [first, second] = s.store.tokens
  t.strictSame(s.store.calls('step'), [
    [KEY, first, A],
    [KEY, second, A]
  ])
  t.strictSame(s.store.calls('get'), [])
})

/* Giving back */

onBoth(t, 'what the store does not have yet goes before a release', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [true, failing(away), true]
  await step(a, 'a')
  await step(a, 'b')
  await a.operation.release()
  t.strictSame(s.store.names, ['acquire', 'step', 'step', 'step', 'release'])
  t.strictSame(told(s), [A, B, B])
  t.equal(a.events.at(-1), 'released')
  await isQuiet(t, s)
})

onBoth(t, 'a key whose steps the store does not take is given back behind them, in the background', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away)]
  await step(a, 'a')
  await a.operation.release()
  t.strictSame(s.store.names, ['acquire', 'step', 'step'])
  t.strictSame(a.events, ['acquired', 'store-error', 'step-stored', 'store-error'])
  s.store.answers.step = [failing(away), true]
  await s.time.pass(3_000)
  t.equal(s.store.names.indexOf('release'), s.store.names.lastIndexOf('step') + 1)
  t.equal(s.store.calls('release').length, 1)
  t.equal(a.events.at(-1), 'released')
  t.equal(a.operation.phase, 'over')
  await isQuiet(t, s)
})

onBoth(t, 'a key whose steps were not stored before its server closed is not given back', async (t, s) => {
  s.inUse.enter()
  const a = await atWork(s)
  s.store.answers.step = [failing(away)]
  await step(a, 'a')
  await a.operation.release()
  Object.assign(s.registration, { closed: true })
  await s.inUse.leave()
  await s.time.pass(3_000)
  t.strictSame(s.store.calls('release'), [])
  t.notOk(a.events.includes('released'))
  t.equal(s.time.pending, 0, 'nothing is tried any more')
})

onBoth(t, 'a key that is another’s when steps go before its release is lost', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.step = [failing(away), false]
  await step(a, 'a')
  await a.operation.release()
  t.strictSame(s.store.calls('release'), [])
  t.equal(a.events.at(-1), 'lease-lost')
  t.equal(a.operation.phase, 'over')
})

onBoth(t, 'a release waits for all steps that run, and for what becomes of them', async (t, s) => {
  const a = await atWork(s)
  const [first, second] = [latch<string>(), latch<string>()]
  const given = [step(a, 'a', () => first.promise), step(a, 'b', () => second.promise)]
  await s.time.pass(0)
  t.equal(await a.operation.release(), undefined, 'in the background')
  t.equal(a.operation.phase, 'running')
  t.match(await step(a, 'c', () => t.fail('it has begun')), { code: 'FST_IDEMPOTENCY_STEP', statusCode: 500 })
  first.open('a')
  await s.time.pass(LEASE / 3)
  t.strictSame(s.store.names, ['acquire', 'step', 'renew'], 'and the lease is renewed')
  second.fail(away)
  await s.time.pass(0)
  t.strictSame(await Promise.all(given), ['a', away])
  t.strictSame(s.store.names, ['acquire', 'step', 'renew', 'release'])
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], false]])
  t.equal(a.operation.phase, 'over')
})

onBoth(t, 'a reply does not wait for the steps that run: what they give is for nobody', async (t, s) => {
  const a = await atWork(s)
  const gate = latch<string>()
  const given = step(a, 'a', () => gate.promise)
  await s.time.pass(0)
  await a.operation.complete(RECORD)
  t.equal(a.words.filter((words) => /still run/.test(words)).length, 1)
  gate.open('a')
  t.equal(await given, 'a')
  t.strictSame(s.store.names, ['acquire', 'complete'])
})

/* In transactions */

onBoth(t, 'before a step is committed the claim knows of it', async (t, s) => {
  const a = await atWork(s)
  const { db, committed } = transactions()
  s.store.answers.step = [
    () => {
      t.strictSame(committed, [])
      return true
    }
  ]
  t.equal(await a.operation.step('t', db, () => 1), 1)
  t.strictSame(committed, ['t'])
  t.strictSame(told(s), [T])
})

onBoth(
  t,
  'a store that shares its locks with the transaction is told after the commit, and not asked before',
  async (t, s) => {
    s.store.sharesLocks = true
    const a = await atWork(s)
    const { db, committed } = transactions()
    s.store.answers.step = [
      () => {
        t.strictSame(committed, ['t'])
        return true
      },
      () => {
        t.strictSame(committed, ['t', 'u'])
        return false
      }
    ]
    t.equal(await a.operation.step('t', db, () => 1), 1)
    t.strictSame(told(s), [T])
    s.store.answers.get = [running()]
    t.match(await outcome(() => a.operation.step('u', db, () => 2)), LOST, 'it is done, but not by an owner')
  }
)

onBoth(t, 'such a store is asked only where the lease has lapsed, and a lost claim undoes the step', async (t, s) => {
  s.store.sharesLocks = true
  const a = await atWork(s)
  const { db, committed } = transactions()
  await lapse(s)
  s.store.answers.renew = [false]
  s.store.answers.get = [running()]
  t.match(await outcome(() => a.operation.step('t', db, () => 3)), LOST)
  t.strictSame(committed, [])
})

onBoth(t, 'a step that the claim knows of is committed without a word, unless the lease has lapsed', async (t, s) => {
  const { db, committed } = transactions()
  const a = await atWork(s, [T, ['u', 'transaction'], ['v', 'transaction']])
  await a.operation.step('t', db, () => 1)
  t.strictSame(s.store.names, ['acquire'])
  await lapse(s)
  const before = s.store.asked.length
  await a.operation.step('u', db, () => 1)
  t.strictSame(s.store.names.slice(before), ['renew'])
  await lapse(s)
  s.store.answers.renew = [false]
  s.store.answers.get = [running()]
  t.match(await outcome(() => a.operation.step('v', db, () => 1)), LOST)
  t.strictSame(committed, ['t', 'u'])
})

onBoth(t, 'a step is committed although the store fails to learn of it, which is tried again', async (t, s) => {
  const a = await atWork(s)
  const { db, committed } = transactions()
  s.store.answers.step = [failing(away), true]
  t.equal(await a.operation.step('t', db, () => 1), 1)
  t.strictSame(committed, ['t'])
  await s.time.pass(60)
  t.strictSame(told(s), [T, T])
})

onBoth(t, 'a step that is tried again is asked for, not stored again', async (t, s) => {
  const a = await atWork(s)
  const { db, committed } = transactions()
  let isAway = true
  const unreliable: typeof db = {
    ...db,
    once: (step, work) => db.once(step, async (tx) => (isAway ? work(tx).then(() => Promise.reject(away)) : work(tx)))
  }
  t.equal(await outcome(() => a.operation.step('t', unreliable, () => 1)), away)
  isAway = false
  t.equal(await a.operation.step('t', unreliable, () => 1), 1)
  t.strictSame(committed, ['t'])
  t.strictSame(told(s), [T])
})

onBoth(t, 'a step whose request has its reply already is committed without a word', async (t, s) => {
  const a = await atWork(s)
  const { db, committed } = transactions()
  const gate = latch<number>()
  const given = outcome(() => a.operation.step('t', db, () => gate.promise))
  await a.operation.complete(RECORD)
  gate.open(1)
  t.equal(await given, 1)
  t.strictSame(committed, ['t'])
  t.strictSame(told(s), [])
})

for (const when of ['before the store is told', 'when the store is told'] as const) {
  onBoth(t, `a step is not committed when the claim is lost ${when}`, async (t, s) => {
    const a = await atWork(s)
    const { db, committed } = transactions()
    s.store.answers.get = [running()]
    s.store.answers.step = [false]
    s.store.answers.renew = [false]
    const work = () => (when === 'before the store is told' ? s.time.pass(LEASE / 3) : undefined)
    t.match(await outcome(() => a.operation.step('t', db, work)), LOST)
    t.strictSame(committed, [])
    t.equal(s.store.calls('step').length, when === 'before the store is told' ? 0 : 1)
    t.equal(a.operation.signal.aborted, true)
  })
}
