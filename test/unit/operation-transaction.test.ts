import t from 'tap'
import { composeFingerprint } from '../../lib/operation/fingerprint.js'
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

/* What is different where the claim is held by a transaction of the database. */

const policy = { transaction: true }

/** An open transaction, which notes what is asked of it. */
class Transaction {
  readonly client = {}
  readonly asked: unknown[][] = []
  readonly connection = new AbortController()
  readonly lost = this.connection.signal
  committed: () => unknown = async () => ({ state: 'committed' })
  rolledBack: () => Promise<boolean> = async () => true

  get names(): unknown[] {
    return this.asked.map(([name]) => name)
  }

  complete(...args: unknown[]): unknown {
    this.asked.push(['complete', ...args])
    return this.committed()
  }

  rollback(): Promise<boolean> {
    this.asked.push(['rollback'])
    return this.rolledBack()
  }

  keepAlive(): void {
    this.asked.push(['keepAlive'])
  }

  abandon(): void {
    this.asked.push(['abandon'])
  }
}

const begun = (transaction: Transaction) => ({ state: 'acquired', attempt: 1, transaction })

/** An operation that has a transaction, and its handler at work. */
async function atWork(s: Scene): Promise<Actor & { transaction: Transaction }> {
  const transaction = new Transaction()
  s.store.answers.begin = [begun(transaction)]
  const actor = s.actor()
  actor.operation.learn('payload')
  await actor.operation.claim()
  actor.operation.start()
  return { ...actor, transaction }
}

onBoth(
  t,
  'the key is claimed with the transaction, in one call, and the handler gets its client',
  async (t, s) => {
    const transaction = new Transaction()
    s.store.answers.begin = [begun(transaction)]
    const a = s.actor({ policy: { waits: true } })
    t.equal(await a.operation.claim(), 'run')
    t.match(s.store.asked, [
      ['begin', KEY, { fingerprint: composeFingerprint('head', ''), leaseMs: LEASE, retainMs: 60_000, takeover: false }]
    ])
    t.match(s.store.asked, [['begin', KEY, { wake: true, timeoutMs: STORE_TIMEOUT }]])
    t.equal(s.store.asked.length, 1)
    t.equal(a.operation.transaction, transaction.client)
    t.equal(a.operation.phase, 'held')
    t.ok(s.inUse.live.has(KEY))
    t.equal(s.inUse.asking.size, 0)
    t.strictSame(transaction.asked, [])
    t.strictSame(a.events, ['acquired'])
    await s.actor({ key: 'other' }).operation.claim()
    t.match(s.store.calls('begin')[1]?.[1], { wake: false })
    await s.actor({ key: 'nested', policy: { nested: true } }).operation.claim()
    t.match(s.store.calls('begin')[2]?.[1], { nested: true })
  },
  policy
)

t.test(
  'an owner under a lease, whose key the store has lost, is not outrun by a transaction of its process',
  async (t) => {
    const s = scene(t)
    const owner = s.actor()
    t.equal(await verdictOf(owner), 'run')
    const claim = claimOf(s, owner)
    const transaction = new Transaction()
    s.store.answers.begin = [begun(transaction)]
    t.match(await verdictOf(s.actor({ policy })), IN_PROGRESS)
    t.strictSame(transaction.asked, [['rollback']])
    t.equal(claimOf(s, owner), claim)
    await s.time.pass(0)
    t.equal(s.store.calls('renew').length, 1, 'the owner does not wait for its next renewal to claim the key anew')
  }
)

/* The end */

onBoth(
  t,
  'the record is committed with what the handler did, and the claim is over',
  async (t, s) => {
    const a = await atWork(s)
    await a.operation.complete(RECORD)
    t.strictSame(a.transaction.asked, [['complete', RECORD, TTL, false]])
    t.strictSame(s.store.names, ['begin'])
    t.strictSame(a.events, ['acquired', 'stored'])
    t.equal(a.operation.phase, 'over')
    t.equal(s.inUse.live.size, 0)
    t.equal(s.registration.operations.size, 0)
    t.equal(a.operation.signal.aborted, false)
    await s.time.pass(LEASE)
    t.equal(a.transaction.asked.length, 1)
  },
  policy
)

t.test('a commit that the database refuses is the handler’s error', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  const error = new Error('deferred constraint')
  a.transaction.committed = async () => ({ state: 'refused', error })
  t.equal(await outcome(() => a.operation.complete(RECORD)), error)
  t.strictSame(a.events, ['acquired', 'released'])
  t.strictSame(a.logged, [['warn', error]])
  t.match(a.bindings.at(-1), { key: KEY, route: '/orders', attempt: 1 })
  t.equal(a.operation.phase, 'over')
  t.equal(a.operation.signal.aborted, false)
  t.strictSame(a.transaction.asked.slice(1), [])
})

for (const [what, committed, cause] of [
  ['fails', failing(away), away],
  ['is not answered', never, { name: 'StoreTimeout' }]
] as const) {
  t.test(`a commit that ${what} is a 503: its outcome is not known, and its connection is cut`, async (t) => {
    const s = scene(t, { policy })
    const a = await atWork(s)
    a.transaction.committed = committed
    const done = outcome(() => a.operation.complete(RECORD))
    await s.time.pass(STORE_TIMEOUT + 10)
    t.match(await done, { ...UNAVAILABLE, cause })
    t.strictSame(a.transaction.names, ['complete', 'abandon'])
    t.strictSame(a.events, ['acquired', 'store-error', 'lease-lost'])
    t.equal(a.operation.signal.aborted, true)
    t.equal(a.operation.phase, 'over')
    t.equal(s.registration.operations.size, 0)
    await s.time.pass(LEASE)
    t.equal(a.transaction.asked.length, 2)
  })
}

t.test('a commit that fails behind a connection whose loss was told already is not told again', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  a.transaction.connection.abort()
  a.transaction.committed = failing(away)
  t.match(await outcome(() => a.operation.complete(RECORD)), UNAVAILABLE)
  t.strictSame(a.events, ['acquired', 'lease-lost', 'store-error'])
})

t.test('the connection is not kept alive beyond the commit', async (t) => {
  const s = scene(t, { policy: { ...policy, storeTimeout: 2 * LEASE } })
  const a = await atWork(s)
  const committed = latch<unknown>()
  a.transaction.committed = () => committed.promise
  const done = a.operation.complete(RECORD)
  await s.time.pass(LEASE)
  t.strictSame(a.transaction.names, ['complete'])
  committed.open({ state: 'committed' })
  await done
})

for (const isThere of [true, false]) {
  t.test(`a key is given back by rolling back, where the connection ${isThere ? 'is there' : 'is lost'}`, async (t) => {
    const s = scene(t, { policy })
    const a = await atWork(s)
    a.transaction.rolledBack = async () => isThere
    await a.operation.release()
    t.strictSame([a.transaction.asked, s.store.names], [[['rollback']], ['begin']])
    t.strictSame([a.operation.phase, a.events], ['over', ['acquired', 'released']])
    t.equal(s.inUse.live.size, 0)
  })
}

for (const [what, rolledBack] of Object.entries({ fails: failing(away), 'is not answered': never })) {
  t.test(`where rolling back ${what} the connection is cut, which does as well`, async (t) => {
    const s = scene(t, { policy })
    const a = await atWork(s)
    a.transaction.rolledBack = rolledBack
    const done = a.operation.release()
    await s.time.pass(STORE_TIMEOUT + 10)
    await done
    t.strictSame(a.transaction.asked, [['rollback'], ['abandon']])
    t.strictSame(a.events, ['acquired', 'store-error', 'released'])
    t.equal(a.operation.phase, 'over')
    t.equal(s.registration.operations.size, 0)
    await s.time.pass(LEASE)
    t.strictSame(s.store.names, ['begin'])
    t.equal(a.transaction.asked.length, 2)
  })
}

t.test('a transaction that turns out to be needless is rolled back, and nobody runs', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  a.operation.drop()
  t.strictSame(a.transaction.asked, [['rollback']])
  t.strictSame(s.store.names, ['begin'])
  t.equal(s.inUse.live.size, 0)
})

/* The connection */

t.test('a connection is kept alive for as long as the claim is held, three times in a lease', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  await s.time.pass(LEASE + 100)
  t.strictSame(a.transaction.asked, Array(3).fill(['keepAlive']))
  t.strictSame(s.store.names, ['begin'])
  const claim = claimOf(s, a)
  a.operation.phase = 'over'
  claim.renew()
  t.equal(a.transaction.asked.length, 3)
})

t.test('a connection that is lost while the handler runs is told at once', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  a.transaction.connection.abort()
  t.equal(a.operation.signal.aborted, true)
  t.strictSame(a.events, ['acquired', 'lease-lost'])
  t.strictSame(a.logged, [['warn', undefined]])
  t.match(a.words.at(-1), /connection/)
  t.equal(a.operation.phase, 'running')
})

t.test('a connection that is lost before the handler starts ends the operation, with a 503', async (t) => {
  const s = scene(t, { policy })
  const transaction = new Transaction()
  s.store.answers.begin = [begun(transaction)]
  const a = s.actor()
  await a.operation.claim()
  transaction.connection.abort()
  t.equal(a.operation.phase, 'over')
  t.equal(s.registration.operations.size, 0)
  t.strictSame(a.events, ['acquired', 'lease-lost'])
  t.match(await outcome(() => a.operation.start()), UNAVAILABLE)
})

t.test('a connection that ends with its transaction, or behind it, is not lost', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  const committed = latch<unknown>()
  a.transaction.committed = () => committed.promise
  const done = a.operation.complete(RECORD)
  a.transaction.connection.abort()
  committed.open({ state: 'committed' })
  await done
  t.strictSame(a.events, ['acquired', 'stored'])
  t.equal(a.operation.signal.aborted, false)
})

t.test('a connection that is lost before the answer has come is a failing store', async (t) => {
  const s = scene(t, { policy })
  const transaction = new Transaction()
  transaction.connection.abort()
  s.store.answers.begin = [begun(transaction)]
  const a = s.actor()
  t.match(await outcome(() => a.operation.claim()), UNAVAILABLE)
  t.strictSame(a.events, [])
  t.equal(a.operation.phase, 'over')
  t.equal(s.inUse.live.size, 0)
})

for (const [what, phase, asked] of [
  ['is cut', 'running', [['abandon']]],
  ['is left to its commit', 'ending', []]
] as const) {
  t.test(`when the server has closed a connection ${what} while it is ${phase}`, async (t) => {
    const s = scene(t, { policy })
    const a = await atWork(s)
    a.operation.phase = phase
    a.operation.abandon()
    t.strictSame(a.transaction.asked, asked)
    await s.time.pass(LEASE)
    t.strictSame(a.transaction.asked, asked)
  })
}

/* Answers that fail, or come too late */

for (const [what, late, rolledBack] of [
  ['a transaction that begins too late is rolled back', begun, [['rollback']]],
  ['a key that is another’s too late is nobody’s', () => running(), []],
  ['a failure that comes too late is nobody’s', failing(away), []]
] as const) {
  t.test(what, async (t) => {
    const s = scene(t, { policy })
    const answer = latch()
    const transaction = new Transaction()
    s.store.answers.begin = [() => answer.promise.then(() => late(transaction))]
    const verdict = outcome(() => s.actor().operation.claim())
    await s.time.pass(STORE_TIMEOUT + 10)
    t.match(await verdict, { ...UNAVAILABLE, cause: { name: 'StoreTimeout' } })
    t.equal(s.inUse.asking.size, 0)
    answer.open()
    await s.time.pass(0)
    t.strictSame([transaction.asked, s.store.names], [rolledBack, ['begin']])
  })
}

/* Others in the same process */

t.test('who asks while a transaction of this process holds the key is told without asking the database', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
  t.match(await outcome(() => s.actor({ head: 'another' }).operation.claim()), REUSED)
  t.strictSame(s.store.names, ['begin'])
  t.equal(a.operation.phase, 'running')
})

t.test('for longer than a lease nobody relies on that', async (t) => {
  const s = scene(t, { policy })
  await atWork(s)
  s.store.answers.begin = [running('')]
  await s.time.pass(LEASE - 10)
  await outcome(() => s.actor().operation.claim())
  t.equal(s.store.calls('begin').length, 1)
  await s.time.pass(10)
  // The database does not show whose the key is; this process knows.
  t.match(await outcome(() => s.actor({ head: 'another' }).operation.claim()), REUSED)
  t.equal(s.store.calls('begin').length, 2)
})

t.test('who asks while the transaction is being committed asks the database', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  const committed = latch<unknown>()
  a.transaction.committed = () => committed.promise
  const done = a.operation.complete(RECORD)
  s.store.answers.begin = [completed()]
  t.equal(await verdictOf(s.actor()), 'replay')
  t.equal(s.store.calls('begin').length, 2)
  committed.open({ state: 'committed' })
  await done
})

for (const bypasses of [false, true]) {
  const runs = bypasses ? ', though the route runs without protection else' : ''
  t.test(`who asks then, and gets no answer, is not told that it is running: it may be done${runs}`, async (t) => {
    const s = scene(t, { policy: { ...policy, bypasses } })
    const a = await atWork(s)
    const committed = latch<unknown>()
    a.transaction.committed = () => committed.promise
    const done = a.operation.complete(RECORD)
    s.store.answers.begin = [failing(away)]
    t.match(await verdictOf(s.actor()), UNAVAILABLE)
    // Nor is who hears of the failure when all is over here.
    const answer = latch<unknown>()
    s.store.answers.begin = [() => answer.promise]
    const verdict = verdictOf(s.actor())
    await s.time.pass(0)
    committed.open({ state: 'committed' })
    await done
    answer.fail(away)
    t.match(await verdict, UNAVAILABLE)
  })
}

t.test('who asks when the connection was lost asks the database, although the handler is at work', async (t) => {
  const s = scene(t, { policy })
  const a = await atWork(s)
  a.transaction.connection.abort()
  s.store.answers.begin = [completed()]
  t.equal(await verdictOf(s.actor()), 'replay')
  s.store.answers.begin = [failing(away)]
  t.match(await verdictOf(s.actor()), UNAVAILABLE)
})

t.test('a key that a transaction of another process holds is only known to be held', async (t) => {
  const s = scene(t, { policy })
  s.store.answers.begin = [running('')]
  t.match(await outcome(() => s.actor({ head: 'another' }).operation.claim()), IN_PROGRESS)
})

t.test('of those who want a key in a transaction one at a time asks, and the others learn from it', async (t) => {
  const s = scene(t, { policy })
  const [first, second] = [latch<unknown>(), latch<unknown>()]
  s.store.answers.begin = [() => first.promise, () => second.promise, running()]
  const verdicts = [0, 1, 2].map(() => outcome(() => s.actor().operation.claim()))
  await s.time.pass(0)
  t.equal(s.store.calls('begin').length, 1)
  // This answer was asked for before they came: it may be old.
  first.open(running())
  await s.time.pass(0)
  t.equal(s.store.calls('begin').length, 2)
  // This one is new to who waited for it.
  second.open(running())
  for (const verdict of verdicts) t.match(await verdict, IN_PROGRESS)
  t.equal(s.store.calls('begin').length, 2)
  t.equal(s.inUse.asking.size, 0)
})

t.test('an answer that is final is as good for those who came later', async (t) => {
  const s = scene(t, { policy })
  const answer = latch<unknown>()
  s.store.answers.begin = [() => answer.promise]
  const actors = [s.actor(), s.actor()]
  const verdicts = actors.map((actor) => verdictOf(actor))
  await s.time.pass(0)
  answer.open(completed())
  t.strictSame(await Promise.all(verdicts), ['replay', 'replay'])
  t.equal(s.store.calls('begin').length, 1)
  t.equal(actors[1]?.operation.reply, RECORD)
})

t.test('of three who want a key at the same moment one runs, be it the second', async (t) => {
  const s = scene(t, { policy })
  const [first, second] = [latch<unknown>(), latch<unknown>()]
  s.store.answers.begin = [() => first.promise, () => second.promise]
  const actors = [s.actor(), s.actor(), s.actor()]
  const verdicts = actors.map(({ operation }) => outcome(() => operation.claim()))
  await s.time.pass(0)
  first.open(running())
  await s.time.pass(0)
  second.open(begun(new Transaction()))
  t.match(await verdicts[0], IN_PROGRESS)
  t.equal(await verdicts[1], 'run')
  t.match(await verdicts[2], IN_PROGRESS)
  t.equal(s.store.calls('begin').length, 2, 'who waited for the one that got it is told so, without asking')
  t.ok(s.inUse.live.has(KEY))
})

t.test('who asks for another key does not wait', async (t) => {
  const s = scene(t, { policy })
  s.store.answers.begin = [never, running()]
  const verdict = outcome(() => s.actor().operation.claim())
  t.match(await outcome(() => s.actor({ key: 'other' }).operation.claim()), IN_PROGRESS)
  await s.time.pass(STORE_TIMEOUT + 10)
  t.match(await verdict, UNAVAILABLE)
})

t.test('a failure is that of all who wait for the answer', async (t) => {
  const s = scene(t, { policy })
  const answer = latch<unknown>()
  s.store.answers.begin = [() => answer.promise, running()]
  const actors = [s.actor(), s.actor()]
  const verdicts = actors.map(({ operation }) => outcome(() => operation.claim()))
  await s.time.pass(0)
  answer.fail(away)
  for (const verdict of verdicts) t.match(await verdict, { ...UNAVAILABLE, cause: away })
  t.equal(s.store.calls('begin').length, 1)
  // And of nobody else.
  t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
  t.equal(s.store.calls('begin').length, 2)
})
