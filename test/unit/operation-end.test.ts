import t, { type Test } from 'tap'
import type { StoredRecord } from '../../types/index.js'
import { latch } from '../support/latch.js'
import {
  type Actor,
  away,
  claimOf,
  completed,
  failing,
  IN_PROGRESS,
  KEY,
  LEASE,
  never,
  OURS,
  onBoth,
  outcome,
  RECORD,
  REUSED,
  running,
  type Scene,
  STORE_TIMEOUT,
  scene,
  TTL,
  UNAVAILABLE,
  verdictOf
} from '../support/operation-scene.js'
import { tombstone } from '../support/store-fixtures.js'

/* How a claim is kept, and how it ends: with a record, given back, or lost. */

const TOMBSTONE: StoredRecord = { ...tombstone('hijacked'), fingerprint: OURS }

/** An operation whose handler runs. */
async function atWork(s: Scene, cast?: Parameters<Scene['actor']>[0]): Promise<Actor> {
  const actor = s.actor(cast)
  actor.operation.learn('payload')
  await actor.operation.claim()
  actor.operation.start()
  return actor
}

/** An operation whose reply could not be stored. */
async function unstored(s: Scene, record = RECORD, cast?: Parameters<Scene['actor']>[0]): Promise<Actor> {
  const actor = await atWork(s, cast)
  s.store.answers.complete = [failing(away)]
  await actor.operation.complete(record)
  return actor
}

/** Nobody keeps this operation any more. */
function isOver(t: Test, s: Scene, { operation }: Actor): void {
  t.equal(operation.phase, 'over')
  t.equal(s.inUse.live.size, 0)
  t.equal(s.registration.operations.size, 0)
}

/* Storing */

for (const [record, event] of [
  [RECORD, 'stored'],
  [TOMBSTONE, 'tombstoned']
] as const) {
  onBoth(t, `a record is ${event} in one call, and the claim is over`, async (t, s) => {
    const a = await atWork(s)
    const done = a.operation.complete(record)
    t.equal(done instanceof Promise, done !== undefined)
    await done
    t.strictSame(s.store.names, ['acquire', 'complete'])
    t.strictSame(s.store.calls('complete'), [[KEY, s.store.tokens[0], record, TTL]])
    t.strictSame(a.events, ['acquired', event])
    isOver(t, s, a)
    t.equal(a.operation.signal.aborted, false)
    await s.time.pass(LEASE)
    t.strictSame(s.store.names, ['acquire', 'complete'])
  })
}

t.test('an operation ends once', async (t) => {
  const s = scene(t, { shows: false })
  const a = await atWork(s)
  const done = a.operation.complete(RECORD)
  t.equal(a.operation.phase, 'ending')
  t.equal(a.operation.complete(TOMBSTONE), undefined)
  await a.operation.release()
  await done
  t.equal(a.operation.complete(TOMBSTONE), undefined)
  await a.operation.release()
  t.strictSame(s.store.names, ['acquire', 'complete'])
  t.strictSame(a.events, ['acquired', 'stored'])
})

onBoth(t, 'a reply that the handler wants not to be stored is not, and the key is free', async (t, s) => {
  const a = await atWork(s)
  a.operation.discarded = true
  await a.operation.complete(RECORD)
  t.strictSame(
    [s.store.names, a.events],
    [
      ['acquire', 'release'],
      ['acquired', 'released']
    ]
  )
  isOver(t, s, a)
})

onBoth(t, 'a store that has lost its data gets the claim anew, and then the record', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.complete = [false, true]
  await a.operation.complete(RECORD)
  t.strictSame(s.store.names, ['acquire', 'complete', 'get', 'acquire', 'complete'])
  t.strictSame(s.store.calls('get'), [[KEY]])
  const [first, anew] = s.store.calls('acquire')
  t.strictSame(anew, first)
  t.strictSame(s.store.calls('complete')[1], [KEY, s.store.tokens[0], RECORD, TTL])
  t.strictSame(a.events, ['acquired', 'stored'])
  isOver(t, s, a)
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
  },
  'the store loses it once more': () => {}
})) {
  onBoth(t, `a claim is lost when the store does not know it and ${what}`, async (t, s) => {
    const a = await atWork(s)
    s.store.answers.complete = [false]
    prepare(s)
    await a.operation.complete(RECORD)
    t.strictSame(a.events, ['acquired', 'lease-lost'])
    t.equal(a.operation.signal.aborted, true)
    t.strictSame(a.logged, [['warn', undefined]])
    t.match(a.words.at(-1), what.startsWith('somebody else') ? /to another owner/ : /does not know it any more/)
    t.equal(s.store.calls('complete').length, what === 'the store loses it once more' ? 2 : 1)
    t.strictSame(s.store.calls('release'), [])
    isOver(t, s, a)
  })
}

/* A reply that cannot be stored */

onBoth(t, 'a reply leaves although it could not be stored, which is tried again until it is', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.complete = [failing(away), failing(away), failing(away), true]
  t.equal(await a.operation.complete(RECORD), undefined)
  t.equal(a.operation.phase, 'ending')
  t.strictSame(a.events, ['acquired', 'store-error'])
  t.equal(a.errors['store-error'], away)
  t.strictSame(a.logged, [['error', away]])
  await s.time.pass(40)
  t.equal(s.store.calls('complete').length, 1)
  await s.time.pass(20)
  t.equal(s.store.calls('complete').length, 2)
  await s.time.pass(110)
  t.equal(s.store.calls('complete').length, 3)
  await s.time.pass(210)
  t.strictSame(s.store.calls('complete'), Array(4).fill([KEY, s.store.tokens[0], RECORD, TTL]))
  t.strictSame(a.events, ['acquired', 'store-error', 'stored'])
  t.strictSame(a.logged.length, 1)
  isOver(t, s, a)
})

onBoth(t, 'a reply that could not be stored in time turns out to be another’s', async (t, s) => {
  const a = await unstored(s)
  s.store.answers.complete = [false]
  s.store.answers.get = [completed()]
  await s.time.pass(60)
  t.strictSame(a.events, ['acquired', 'store-error', 'lease-lost'])
  isOver(t, s, a)
})

onBoth(t, 'a claim whose reply is not stored yet is renewed', async (t, s) => {
  await unstored(s)
  await s.time.pass(LEASE / 3 + 10)
  t.equal(s.store.calls('renew').length, 1)
  await s.time.pass(LEASE / 3 + 10)
  t.strictSame(s.store.calls('renew'), Array(2).fill([KEY, s.store.tokens[0], LEASE]))
})

/** The time of a lease passes, in which the store is not heard of. */
async function cutOff(s: Scene, ms = LEASE): Promise<void> {
  s.store.answers.renew = [failing(away)]
  await s.time.pass(ms)
}

onBoth(t, 'a reply that is not stored yet is replayed from memory while nobody else can have the key', async (t, s) => {
  await unstored(s)
  await cutOff(s, LEASE - 10)
  const asked = s.store.asked.length
  const b = s.actor()
  t.equal(await b.operation.reserve(), 'later')
  t.equal(await verdictOf(b), 'replay')
  t.equal(b.operation.reply, RECORD)
  t.match(await verdictOf(s.actor(), 'another'), REUSED)
  t.equal(s.store.asked.length, asked, 'without asking')
})

onBoth(t, 'what was remembered is asked for again when the request has been read', async (t, s) => {
  await unstored(s)
  const b = s.actor()
  t.equal(await b.operation.reserve(), 'later')
  s.store.answers.complete = [true]
  await s.time.pass(60)
  const another: StoredRecord = { ...RECORD, statusCode: 418 }
  s.store.answers.acquire = [completed(another)]
  t.equal(await verdictOf(b), 'replay')
  t.equal(b.operation.reply, another)
  t.strictSame(s.store.takeovers, [false, false])
})

onBoth(
  t,
  'after that the store has to take it first: all who ask share one attempt, if it does not fail',
  async (t, s) => {
    const a = await unstored(s)
    await cutOff(s)
    t.match(await verdictOf(s.actor()), { ...UNAVAILABLE, cause: away })
    const answer = latch<boolean>()
    s.store.answers.complete = [() => answer.promise]
    const before = s.store.asked.length
    const verdicts = [s.actor(), s.actor(), s.actor()].map((actor) => verdictOf(actor))
    await s.time.pass(1_200)
    t.strictSame(s.store.names.slice(before), ['complete'])
    answer.open(true)
    t.strictSame(await Promise.all(verdicts), ['replay', 'replay', 'replay'])
    t.strictSame([a.operation.phase, a.events.at(-1)], ['over', 'stored'])
    await s.time.pass(3_000)
    t.equal(s.store.names.length, before + 1, 'and nobody stores it again')
    t.equal(a.events.filter((event) => event === 'stored').length, 1)
  }
)

t.test('a renewal counts from when it was asked for', async (t) => {
  const s = scene(t)
  await unstored(s)
  const answer = latch<boolean>()
  s.store.answers.renew = [() => answer.promise, failing(away)]
  await s.time.pass(LEASE / 3 + STORE_TIMEOUT / 2)
  answer.open(true)
  await s.time.pass(LEASE - STORE_TIMEOUT / 2 + 100)
  const before = s.store.asked.length
  s.store.answers.complete = [true]
  await verdictOf(s.actor())
  t.equal(s.store.names[before], 'complete')
})

for (const [lease, gone] of [
  [LEASE, LEASE / 3],
  [3_000, STORE_TIMEOUT]
] as const) {
  t.test(`with a lease of ${lease} ms an attempt that hangs ends after ${gone} ms, and another is made`, async (t) => {
    const s = scene(t, { policy: { lease } })
    await unstored(s)
    s.store.answers.complete = [never]
    await s.time.pass(60)
    t.equal(s.store.calls('complete').length, 2)
    await s.time.pass(gone - 40)
    t.equal(s.store.calls('complete').length, 2)
    await s.time.pass(200)
    t.equal(s.store.calls('complete').length, 3)
  })
}

t.test('who asks while an attempt hangs is told in time that the store does not answer', async (t) => {
  const s = scene(t)
  await unstored(s)
  await cutOff(s)
  s.store.answers.complete = [never]
  const verdict = outcome(() => s.actor().operation.claim())
  await s.time.pass(STORE_TIMEOUT + 10)
  t.match(await verdict, { ...UNAVAILABLE, cause: { name: 'StoreTimeout' } })
})

onBoth(t, 'a first attempt that arrives late does not count twice', async (t, s) => {
  const a = await atWork(s)
  const answer = latch<boolean>()
  s.store.answers.complete = [() => answer.promise, true]
  const done = a.operation.complete(RECORD)
  await s.time.pass(STORE_TIMEOUT + 10)
  await done
  await s.time.pass(60)
  t.strictSame(a.events, ['acquired', 'store-error', 'stored'])
  const before = s.store.asked.length
  answer.open(false)
  await s.time.pass(0)
  t.strictSame(a.events, ['acquired', 'store-error', 'stored'])
  // Whether the key is still there is asked; it is not claimed anew, for it may have been deleted since.
  t.strictSame(s.store.names.slice(before), ['get'])
})

/* A store that comes and goes */

/** The store is down, and then answers one request. */
async function comesBack(t: Test, s: Scene, meanwhile: () => Promise<void>): Promise<void> {
  const { acquire, renew, complete, release } = s.store.answers
  Object.assign(s.store.answers, {
    acquire: [never],
    renew: [failing(away)],
    complete: [never],
    release: [failing(away)]
  })
  await outcome(async () => {
    const verdict = verdictOf(s.actor({ key: 'first' }))
    await s.time.pass(STORE_TIMEOUT)
    return verdict
  })
  t.equal(s.inUse.health.isDown, true)
  await meanwhile()
  Object.assign(s.store.answers, { acquire, renew, complete, release })
  await verdictOf(s.actor({ key: 'other' }))
  await s.time.pass(0)
}

t.test(
  'a reply that could not be stored is stored as soon as the store is back, whenever it would be tried again',
  async (t) => {
    const s = scene(t, { shows: false })
    const a = await atWork(s)
    await comesBack(t, s, async () => {
      const done = a.operation.complete(RECORD)
      // Tries, and pauses of a second between them.
      await s.time.pass(LEASE / 2)
      await done
      t.notOk(a.events.includes('stored'))
      s.store.answers.complete = [failing(away)]
      await s.time.pass(12_000)
    })
    t.ok(a.events.includes('stored'))
  }
)

t.test('a claim that could not be renewed is renewed as soon as the store is back', async (t) => {
  const s = scene(t, { shows: false })
  await atWork(s)
  const renewals = () => s.store.calls('renew').filter(([key]) => key === KEY).length
  await comesBack(t, s, () => s.time.pass(LEASE / 2))
  t.equal(renewals(), 2)
  await s.time.pass(LEASE / 3 - 10)
  t.equal(renewals(), 2, 'that took the place of the next')
  await s.time.pass(10)
  t.equal(renewals(), 3)
})

/* Who asks meanwhile, and gets no answer */

for (const bypasses of [false, true]) {
  const runs = bypasses ? ', though the route runs without protection else' : ''
  const failingScene = async (t: Test) => {
    const s = scene(t, { shows: false, policy: { bypasses } })
    const a = await atWork(s)
    s.store.answers.acquire = [failing(away)]
    return { s, a }
  }

  t.test(`while a reply is being stored it is replayed${runs}`, async (t) => {
    const { s, a } = await failingScene(t)
    s.store.answers.renew = [failing(away)]
    const answer = latch<boolean>()
    s.store.answers.complete = [() => answer.promise]
    const done = a.operation.complete(RECORD)
    const retry = s.actor()
    t.equal(await verdictOf(retry), 'replay')
    t.equal(retry.operation.reply, RECORD)
    t.match(await verdictOf(s.actor(), 'another payload'), REUSED)
    answer.open(true)
    await done
  })

  t.test(`while the handler is at work it is said to be, until the lease may be over${runs}`, async (t) => {
    const { s } = await failingScene(t)
    s.store.answers.renew = [failing(away)]
    await s.time.pass(LEASE - 10)
    t.match(await verdictOf(s.actor()), IN_PROGRESS)
    await s.time.pass(10)
    t.match(await verdictOf(s.actor()), UNAVAILABLE)
  })

  t.test(`while the key is given back nothing is known of it${runs}`, async (t) => {
    const { s, a } = await failingScene(t)
    const [asked, answer] = [latch<unknown>(), latch<boolean>()]
    s.store.answers.acquire = [() => asked.promise]
    const verdict = verdictOf(s.actor())
    s.store.answers.release = [() => answer.promise]
    const done = a.operation.release()
    asked.fail(away)
    t.match(await verdict, UNAVAILABLE)
    answer.open(true)
    await done
  })
}

/* Deleting */

onBoth(t, 'a reply that cannot be stored when its key was deleted before is nobody’s', async (t, s) => {
  const a = await atWork(s)
  claimOf(s, a).forget()
  s.store.answers.complete = [failing(away)]
  await a.operation.complete(RECORD)
  const before = s.store.asked.length
  s.store.answers.acquire = [running()]
  t.match(await outcome(() => s.actor({ policy: { lease: LEASE * 2 } }).operation.claim()), IN_PROGRESS)
  t.equal(s.store.names[before], 'acquire')
  await s.time.pass(2 * LEASE)
  t.ok(s.store.calls('renew').length <= 1)
})

/* Giving back */

onBoth(t, 'a key is given back in one call', async (t, s) => {
  const a = await atWork(s)
  await a.operation.release()
  t.strictSame(s.store.asked.slice(1), [['release', KEY, s.store.tokens[0], false]])
  t.strictSame(a.events, ['acquired', 'released'])
  t.equal(a.operation.signal.aborted, false)
  isOver(t, s, a)
  await s.time.pass(LEASE)
  t.strictSame(s.store.names, ['acquire', 'release'])
})

onBoth(t, 'a key that is not given back before the store is closed is not said to be free', async (t, s) => {
  s.inUse.enter()
  const a = await atWork(s)
  s.store.answers.release = [failing(away)]
  await a.operation.release()
  await s.inUse.leave()
  await s.time.pass(0)
  t.strictSame(a.events, ['acquired', 'store-error'])
  isOver(t, s, a)
})

for (const reruns of [true, false]) {
  onBoth(
    t,
    `a claim that cannot be given back ${reruns ? 'lapses' : 'does not lapse where that would call it abandoned'}`,
    async (t, s) => {
      const a = await atWork(s)
      const claim = claimOf(s, a)
      s.store.answers.release = [failing(away)]
      await a.operation.release()
      await s.time.pass(LEASE + 100)
      t.equal(s.store.calls('renew').length, reruns ? 0 : 3)
      // Somebody else has asked in the meantime, and may have had it renewed.
      claim.renew()
      await s.time.pass(0)
      t.equal(s.store.calls('renew').length, reruns ? 0 : 4)
      s.store.answers.release = [true]
      await s.time.pass(1_100)
      const renewals = s.store.calls('renew').length
      await s.time.pass(LEASE)
      t.equal(s.store.calls('renew').length, renewals)
    },
    { reruns }
  )
}

onBoth(t, 'a claim that is being given back is not held against others in this process', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.release = [never]
  void a.operation.release()
  s.store.answers.acquire = [failing(away)]
  t.match(await outcome(() => s.actor().operation.claim()), UNAVAILABLE)
})

onBoth(t, 'whoever has the key after its owner keeps it when the owner is done', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.release = [never]
  const done = a.operation.release()
  const b = await atWork(s)
  const claim = claimOf(s, b)
  await s.time.pass(STORE_TIMEOUT + 10)
  s.store.answers.release = [true]
  await done
  await s.time.pass(STORE_TIMEOUT + 1_100)
  t.equal(a.operation.phase, 'over')
  t.equal(claimOf(s, b), claim)
})

onBoth(t, 'a claim that turns out to be needless is given back', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  a.operation.drop()
  await s.time.pass(0)
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
})

/* Keeping */

onBoth(t, 'a claim is renewed three times in a lease, for as long as it is held', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  await s.time.pass(LEASE / 3 - 10)
  t.equal(s.store.calls('renew').length, 0)
  await s.time.pass(20)
  t.strictSame(s.store.calls('renew'), [[KEY, s.store.tokens[0], LEASE]])
  const claim = claimOf(s, a)
  a.operation.start()
  await s.time.pass(LEASE)
  t.equal(s.store.calls('renew').length, 4)
  await a.operation.complete(RECORD)
  await s.time.pass(LEASE)
  t.equal(s.store.calls('renew').length, 4)
  claim.renew()
  await s.time.pass(0)
  t.equal(s.store.calls('renew').length, 4)
})

for (const [what, answers, error] of [
  ['fails', { renew: [failing(away), true] }, away],
  ['is not answered in time', { renew: [never, true] }, { name: 'StoreTimeout' }],
  ['is refused by a store that then falls silent', { renew: [false], get: [never] }, { name: 'StoreTimeout' }]
] as const) {
  t.test(`a renewal that ${what} is told, and tried again`, async (t) => {
    const s = scene(t)
    const a = await atWork(s)
    Object.assign(s.store.answers, answers)
    await s.time.pass(LEASE / 3 + STORE_TIMEOUT + 10)
    t.strictSame([a.operation.phase, a.events], ['running', ['acquired', 'store-error']])
    t.match(a.errors['store-error'], error)
    await s.time.pass(LEASE / 3 + 10)
    t.equal(s.store.calls('renew').length, 2)
  })
}

onBoth(t, 'a claim that the store has forgotten is claimed anew, and kept', async (t, s) => {
  const a = await atWork(s)
  s.store.answers.renew = [false, true]
  await s.time.pass(LEASE / 3 + 10)
  t.strictSame(s.store.names, ['acquire', 'renew', 'get', 'acquire'])
  t.equal(s.store.tokens[1], s.store.tokens[0])
  t.strictSame([a.operation.phase, a.events], ['running', ['acquired']])
  await s.time.pass(LEASE / 3 + 10)
  t.equal(s.store.calls('renew').length, 2)
})

onBoth(
  t,
  'a claim that another has taken over is lost: the handler is told, and nothing more is asked',
  async (t, s) => {
    const a = await atWork(s)
    s.store.answers.renew = [false]
    s.store.answers.get = [running()]
    await s.time.pass(LEASE / 3 + 10)
    t.equal(a.operation.signal.aborted, true)
    t.strictSame(a.events, ['acquired', 'lease-lost'])
    t.strictSame(a.logged, [['warn', undefined]])
    isOver(t, s, a)
    await a.operation.complete(RECORD)
    await s.time.pass(LEASE)
    t.strictSame(s.store.names, ['acquire', 'renew', 'get'])
  }
)

t.test('a claim that ends while its renewal is refused finds out by itself', async (t) => {
  const s = scene(t)
  const a = await atWork(s)
  const [renewed, stored] = [latch<boolean>(), latch<boolean>()]
  s.store.answers.renew = [() => renewed.promise]
  s.store.answers.complete = [() => stored.promise]
  await s.time.pass(LEASE / 3 + 10)
  const done = a.operation.complete(RECORD)
  renewed.open(false)
  await s.time.pass(0)
  t.strictSame(s.store.names, ['acquire', 'renew', 'complete'])
  t.equal(a.operation.phase, 'ending')
  stored.open(true)
  await done
  t.strictSame(a.events, ['acquired', 'stored'])
})

t.test('a claim that ends while it is claimed anew is not called lost', async (t) => {
  const s = scene(t)
  const a = await atWork(s)
  const seen = latch<unknown>()
  s.store.answers.renew = [false]
  s.store.answers.get = [() => seen.promise]
  await s.time.pass(LEASE / 3 + 10)
  await a.operation.complete(RECORD)
  seen.open(running())
  await s.time.pass(0)
  t.strictSame(a.events, ['acquired', 'stored'])
})

onBoth(t, 'a claim is not renewed any more when the server has closed while it was', async (t, s) => {
  await atWork(s)
  Object.assign(s.registration, { closed: true })
  await s.time.pass(LEASE + 10)
  t.equal(s.store.calls('renew').length, 1)
})
