import t from 'tap'
import { UnreadableAnswer } from '../../lib/errors.js'
import { composeFingerprint } from '../../lib/operation/fingerprint.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { LocalCache } from '../../lib/stores/memory/local-cache.js'
import { resolved } from '../../lib/util/sync-promise.js'
import type { Acquisition } from '../../types/index.js'
import { latch } from '../support/latch.js'
import {
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
  ScriptedStore,
  STORE_TIMEOUT,
  scene,
  UNAVAILABLE,
  verdictOf,
  WAIT_TIMEOUT
} from '../support/operation-scene.js'
import { reply, tombstone } from '../support/store-fixtures.js'

/* How an operation comes to its verdict: what it asks the store, and what it makes of the answers. */

const HEAD_ONLY = composeFingerprint('head', '')

const acquired = (attempt = 1): Acquisition => ({ state: 'acquired', attempt })
const abandoned = (fingerprint = OURS): Acquisition => ({ state: 'abandoned', fingerprint, attempt: 1 })

const ABANDONED = { code: 'FST_IDEMPOTENCY_ABANDONED', statusCode: 409 }
const NOT_REPLAYABLE = { code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE', statusCode: 409 }

onBoth(t, 'a free key is claimed in one call, and held', async (t, s) => {
  const { operation, events, logged, words, bindings } = s.actor()
  operation.learn('payload')
  const verdict = operation.claim()
  t.ok(s.registration.operations.has(operation))
  t.equal(await verdict, 'run')
  t.match(s.store.asked, [['acquire', KEY, { fingerprint: OURS, leaseMs: LEASE, retainMs: 60_000, takeover: false }]])
  t.equal(s.store.asked.length, 1)
  t.match(s.store.tokens[0], /^.{10,}$/)
  t.equal(operation.phase, 'held')
  t.ok(s.inUse.live.has(KEY))
  t.ok(s.registration.operations.has(operation))
  t.strictSame([events, logged], [['acquired'], []])
  t.strictSame(words, ['idempotency acquired'])
  t.strictSame(bindings, [{ key: KEY, route: '/orders', attempt: 1 }])
  t.equal(operation.transaction, null)
})

t.test('what is at hand is decided at once', async (t) => {
  const s = scene(t)
  t.equal(s.actor().operation.claim(), 'run')
  s.store.answers.acquire = [running()]
  t.throws(() => s.actor({ key: 'other' }).operation.claim(), IN_PROGRESS)
})

t.test('a claim without a payload says so, and one with a payload says more', async (t) => {
  const s = scene(t)
  const { operation } = s.actor()
  t.equal(operation.fingerprint, HEAD_ONLY)
  operation.learn('payload')
  t.equal(operation.fingerprint, OURS)
  await operation.claim()
  t.match(s.store.calls('acquire')[0], [KEY, { fingerprint: OURS }])
})

t.test('an operation has its own token, its scope is part of its key, and its rules are the route’s', async (t) => {
  const s = scene(t)
  const a = s.actor()
  const b = s.actor({ key: 'other', policy: { reruns: false } })
  a.operation.claim()
  b.operation.claim()
  t.not(s.store.tokens[0], s.store.tokens[1])
  t.equal(b.operation.storageKey, storageKey(null, 'other'))
  t.equal(b.operation.key, 'other')
  t.strictSame([a.operation.takesOver, b.operation.takesOver], [true, false])
  t.equal(a.operation.waitTimeout, WAIT_TIMEOUT)
  t.strictSame([a.operation.replayed, a.operation.discarded, a.operation.attempt], [false, false, 1])
  t.equal(a.operation.signal, a.operation.signal)
  t.equal(a.operation.signal.aborted, false)
})

onBoth(t, 'a claim that was taken over says so', async (t, s) => {
  s.store.answers.acquire = [acquired(3)]
  const { operation, events, bindings } = s.actor()
  t.equal(await operation.claim(), 'run')
  t.equal(operation.attempt, 3)
  t.strictSame(events, ['acquired', 'takeover'])
  t.match(bindings, [{ attempt: 3 }, { attempt: 3 }])
})

onBoth(t, 'a running key is a conflict, at once', async (t, s) => {
  s.store.answers.acquire = [running()]
  const { operation, events, errors } = s.actor()
  const error = await outcome(() => operation.claim())
  t.match(error, IN_PROGRESS)
  t.equal(operation.phase, 'over')
  t.strictSame(events, ['conflict'])
  t.equal(errors.conflict, error)
  t.equal(s.registration.operations.size, 0)
  t.equal(s.inUse.live.size, 0)
})

onBoth(t, 'a completed key is replayed, and asked for once', async (t, s) => {
  const record = { ...reply(), fingerprint: OURS }
  s.store.answers.acquire = [completed(record)]
  const { operation, events } = s.actor()
  operation.learn('payload')
  t.equal(await operation.claim(), 'replay')
  t.equal(operation.reply, record)
  t.equal(operation.replayed, true)
  t.equal(operation.phase, 'over')
  t.strictSame(events, ['replayed'])
  t.equal(s.registration.operations.size, 0)
  t.equal(s.store.asked.length, 1)
})

onBoth(t, 'a tombstone is told', async (t, s) => {
  s.store.answers.acquire = [completed({ ...tombstone('too-large'), fingerprint: OURS })]
  const a = s.actor()
  t.match(await verdictOf(a), NOT_REPLAYABLE)
  t.strictSame(a.events, ['conflict'])
  t.equal(a.operation.phase, 'over')
})

/** A head of as many characters as heads have, whose hint is another. */
const OTHER_TARGET = `${'x'.repeat(22)}hint`

for (const [what, found] of Object.entries({
  running: running(composeFingerprint(OTHER_TARGET, '')),
  abandoned: abandoned(composeFingerprint(OTHER_TARGET, '')),
  completed: completed({ ...reply(), fingerprint: composeFingerprint(OTHER_TARGET, 'payload') })
})) {
  onBoth(t, `another request under a key that is ${what} is told so, before its body is read too`, async (t, s) => {
    for (const step of ['reserve', 'claim'] as const) {
      s.store.answers.acquire = [found]
      s.store.asked.length = 0
      const a = s.actor({ policy: { waits: true } })
      t.match(await outcome(() => a.operation[step]()), { ...REUSED, differs: 'target' })
      t.strictSame(a.events, ['mismatch'])
      t.equal(a.operation.phase, 'over')
      t.equal(s.store.asked.length, 1)
    }
  })
}

for (const [what, found] of Object.entries({
  running: running(),
  abandoned: abandoned(),
  completed: completed()
})) {
  onBoth(t, `another payload under a key that is ${what} is told so, and nothing is taken over`, async (t, s) => {
    s.store.answers.acquire = [found]
    const a = s.actor({ policy: { waits: true } })
    t.match(await verdictOf(a, 'another'), { ...REUSED, differs: 'payload' })
    t.strictSame(a.events, ['mismatch'])
    t.equal(s.store.asked.length, 1)
  })
}

onBoth(t, 'an abandoned claim of the same request is taken over', async (t, s) => {
  for (const fingerprint of [OURS, HEAD_ONLY, '']) {
    s.store.answers.acquire = [abandoned(fingerprint), acquired(2)]
    s.store.asked.length = 0
    const a = s.actor()
    t.equal(await verdictOf(a), 'run')
    t.match(s.store.takeovers, [false, true])
    t.equal(s.store.tokens[0], s.store.tokens[1])
    t.match(s.store.calls('acquire')[1], [KEY, { fingerprint: OURS, retainMs: 60_000 }])
    t.strictSame(a.events, ['acquired', 'takeover'])
    t.equal(a.operation.attempt, 2)
    s.inUse.live.clear()
  }
})

onBoth(t, 'who is outrun in taking over is told what has become of the key', async (t, s) => {
  s.store.answers.acquire = [abandoned(HEAD_ONLY), completed()]
  t.equal(await verdictOf(s.actor()), 'replay')
  s.store.answers.acquire = [abandoned(HEAD_ONLY), running()]
  t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
})

onBoth(
  t,
  'an abandoned claim is not taken over where the route says so',
  async (t, s) => {
    s.store.answers.acquire = [abandoned(HEAD_ONLY)]
    const a = s.actor()
    t.match(await outcome(() => a.operation.claim()), ABANDONED)
    t.strictSame(a.events, ['conflict'])
    t.equal(s.store.asked.length, 1)
  },
  { reruns: false }
)

/* A failing store */

onBoth(
  t,
  'a store that fails is told with the cause, and leaves nothing behind but a claim to give back',
  async (t, s) => {
    s.store.answers.acquire = [failing(away)]
    const a = s.actor()
    const error = await outcome(() => a.operation.claim())
    t.match(error, UNAVAILABLE)
    t.equal((error as Error).cause, away)
    t.equal(a.operation.phase, 'over')
    t.equal(s.registration.operations.size, 0)
    t.strictSame(a.events, ['store-error'])
    t.equal(a.errors['store-error'], away)
    t.strictSame(a.logged, [['error', away]])
    // The claim may have been written.
    t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  }
)

onBoth(t, 'a store that throws has failed', async (t, s) => {
  s.store.answers.acquire = [
    () => {
      throw away
    }
  ]
  t.match(await outcome(() => s.actor().operation.claim()), { ...UNAVAILABLE, cause: away })
})

onBoth(
  t,
  'where the route prefers to run a failing store is bypassed, and nothing is asked of it any more',
  async (t, s) => {
    s.store.answers.acquire = [failing(away)]
    const a = s.actor()
    t.equal(await a.operation.claim(), 'run')
    t.equal(a.operation.phase, 'unprotected')
    t.strictSame(a.events, ['store-error', 'bypassed'])
    t.equal(a.errors.bypassed, away)
    t.equal(s.inUse.live.size, 0)
    t.equal(s.registration.operations.size, 0)
    await s.time.pass(3 * LEASE)
    t.strictSame(s.store.names, ['acquire', 'release'])
    await a.operation.cancel()
    t.strictSame(s.store.names, ['acquire', 'release'])
  },
  { bypasses: true }
)

onBoth(
  t,
  'a store that fails behind a key that somebody has is not bypassed',
  async (t, s) => {
    s.store.answers.acquire = [running(), failing(away)]
    const a = s.actor({ policy: { waits: true } })
    t.match(await verdictOf(a), { ...UNAVAILABLE, cause: away })
    t.equal(a.operation.phase, 'over')
    t.strictSame(a.events, ['store-error'])
  },
  { bypasses: true }
)

onBoth(
  t,
  'a store that fails in a takeover is bypassed',
  async (t, s) => {
    s.store.answers.acquire = [abandoned(HEAD_ONLY), failing(away)]
    const a = s.actor()
    t.equal(await a.operation.claim(), 'run')
    t.equal(a.operation.phase, 'unprotected')
  },
  { bypasses: true }
)

/** A store that has not answered the first request in time, nor anything since. */
async function down(s: Scene): Promise<unknown> {
  Object.assign(s.store.answers, { acquire: [never], release: [never] })
  const first = outcome(() => s.actor({ key: 'first' }).operation.claim())
  await s.time.pass(STORE_TIMEOUT)
  return ((await first) as Error).cause
}

t.test('while a store is known to be down requests get their 503 at once, and one at a time asks', async (t) => {
  const s = scene(t, { shows: false })
  const cause = await down(s)
  const probe = s.actor({ key: 'probe' })
  const probing = outcome(() => probe.operation.claim())
  const others = ['a', 'b', 'c'].map((key) => s.actor({ key }))
  for (const other of others) {
    const error = await outcome(() => other.operation.claim())
    t.match(error, UNAVAILABLE)
    t.equal((error as Error).cause, cause)
    t.strictSame([other.events, other.errors['store-error']], [['store-error'], cause], 'each is an event')
    t.strictSame(other.logged, [], 'but none is an error in the log')
    t.equal(other.operation.phase, 'over')
  }
  t.equal(s.store.calls('acquire').length, 2)
  t.equal(s.registration.operations.size, 1)
  await s.time.pass(100)
  t.match(await probing, UNAVAILABLE)
  t.strictSame(probe.logged, [])
})

t.test('the first request after an outage runs', async (t) => {
  const s = scene(t)
  await down(s)
  s.store.answers.acquire = [{ state: 'acquired', attempt: 1 }]
  for (const key of ['a', 'b']) t.equal(await s.actor({ key }).operation.claim(), 'run')
  t.equal(s.inUse.health.isDown, false)
})

t.test('the claim of a request that did not wait for the store to come back is given back', async (t) => {
  const s = scene(t, { shows: false })
  await down(s)
  const answer = latch<Acquisition>()
  Object.assign(s.store.answers, { acquire: [() => answer.promise], release: [true] })
  const a = s.actor({ key: 'late' })
  const refused = outcome(() => a.operation.claim())
  await s.time.pass(100)
  t.match(await refused, UNAVAILABLE)
  answer.open({ state: 'acquired', attempt: 1 })
  await s.time.pass(5_000)
  const token = s.store.tokens.at(-1)
  t.ok(s.store.calls('release').some(([key, given]) => key === a.operation.storageKey && given === token))
  t.equal(s.inUse.health.isDown, false)
})

t.test('a store that is known to be down is bypassed at once, where the route prefers to run', async (t) => {
  const s = scene(t, { shows: false, policy: { bypasses: true } })
  await down(s)
  const probing = s.actor({ key: 'probe' }).operation.claim()
  const a = s.actor({ key: 'a' })
  t.equal(await a.operation.claim(), 'run')
  t.strictSame(a.events, ['store-error', 'bypassed'])
  t.equal(s.store.calls('acquire').length, 2)
  await s.time.pass(100)
  t.equal(await probing, 'run', 'and so does who asks')
})

t.test('what this process knows itself is known while the store is down', async (t) => {
  const s = scene(t, { shows: false })
  const owner = s.actor()
  owner.operation.learn('payload')
  await owner.operation.claim()
  await down(s)
  const probing = outcome(() => s.actor({ key: 'probe' }).operation.claim())
  t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
  s.store.answers.complete = [never]
  const completing = owner.operation.complete(RECORD)
  await s.time.pass(STORE_TIMEOUT)
  await completing
  const retry = s.actor()
  t.equal(await verdictOf(retry), 'replay')
  t.match(await probing, UNAVAILABLE)
})

t.test('what a cache in this process keeps is replayed while the store behind it is down', async (t) => {
  const memory = new ScriptedStore(false)
  const cache = new LocalCache(memory as never)
  const s = scene(t, { policy: { store: cache } })
  memory.answers.acquire = [{ state: 'completed', record: RECORD, ttlMs: null }]
  t.equal(await verdictOf(s.actor()), 'replay')
  Object.assign(memory.answers, { acquire: [never], release: [never] })
  const first = outcome(() => s.actor({ key: 'first' }).operation.claim())
  await s.time.pass(STORE_TIMEOUT)
  t.match(await first, UNAVAILABLE)
  void outcome(() => s.actor({ key: 'probe' }).operation.claim())
  t.match(await outcome(() => s.actor({ key: 'other' }).operation.claim()), UNAVAILABLE)
  t.equal(await verdictOf(s.actor()), 'replay')
  await s.time.pass(STORE_TIMEOUT)
})

t.test('a renewal that comes through ends the outage', async (t) => {
  const s = scene(t, { shows: false })
  const owner = s.actor()
  await owner.operation.claim()
  const error = await down(s)
  claimOf(s, owner).renew()
  await s.time.pass(0)
  t.equal(s.inUse.health.isDown, false)
  t.type(error, Error)
})

onBoth(
  t,
  'a store that is full is not bypassed',
  async (t, s) => {
    const full = Object.assign(new Error('full'), { code: 'FST_IDEMPOTENCY_STORE_FULL' })
    s.store.answers.acquire = [failing(full)]
    for (const key of ['a', 'b', 'c', 'd']) {
      const a = s.actor({ key })
      t.match(await outcome(() => a.operation.claim()), { ...UNAVAILABLE, cause: full })
      t.strictSame(a.events, ['store-error'])
    }
    t.equal(s.inUse.health.isDown, false)
  },
  { bypasses: true }
)

const REPLY = {
  kind: 'reply',
  fingerprint: '',
  createdAt: 1,
  statusCode: 200,
  headers: [],
  body: Buffer.of(),
  text: true
}
const record = (parts: object) => ({ state: 'completed', ttlMs: 1, record: { ...REPLY, ...parts } })

for (const [what, answer] of Object.entries({
  'an unknown kind': { state: 'completed', record: { kind: 'x', fingerprint: '' } },
  'no status': record({ statusCode: undefined }),
  'a status in words': record({ statusCode: '200' }),
  'a status that is none': record({ statusCode: 99 }),
  'no headers': record({ headers: null }),
  'headers by name': record({ headers: { etag: 'x' } }),
  'half a header': record({ headers: [['etag']] }),
  'a header in numbers': record({ headers: [['etag', 1]] }),
  'a header that no server sends': record({ headers: [['etag', 'a\nb']] }),
  'a name that no header has': record({ headers: [['e tag', 'a']] }),
  'a list that no server sends': record({ headers: [['link', ['a', 'b\r\n']]] }),
  'no body': record({ body: undefined }),
  'a body in JSON': record({ body: { type: 'Buffer', data: [] } }),
  'a body in text': record({ body: 'text' }),
  'no word of text': record({ text: undefined }),
  'an unknown reason': {
    state: 'completed',
    record: { kind: 'tombstone', fingerprint: '', createdAt: 1, reason: 'x' }
  },
  'a lease that is over': { state: 'running', fingerprint: '', leaseMs: -1 },
  'a lease of no length': { state: 'running', fingerprint: '' },
  'a claim abandoned in no attempt': { state: 'abandoned', fingerprint: '', attempt: 0 }
})) {
  onBoth(
    t,
    `a key that somebody has, of which a store says ${what}, is neither free nor bypassed`,
    async (t, s) => {
      s.store.answers.acquire = [answer]
      for (const key of ['a', 'b', 'c', 'd']) {
        const a = s.actor({ key })
        t.match(await verdictOf(a), { ...UNAVAILABLE, cause: { message: /no valid answer/ } })
        t.strictSame(a.events, ['store-error'])
      }
      t.equal(s.inUse.health.isDown, false)
      t.strictSame(s.store.calls('release').length, 0)
    },
    { bypasses: true }
  )
}

onBoth(
  t,
  'a store that cannot read what it keeps is not bypassed',
  async (t, s) => {
    s.store.answers.acquire = [failing(new UnreadableAnswer('A stored idempotency record could not be decoded'))]
    t.match(await verdictOf(s.actor()), { ...UNAVAILABLE, cause: { message: /could not be decoded/ } })
  },
  { bypasses: true }
)

for (const [what, answer] of Object.entries({
  nothing: undefined,
  null: null,
  'no state': {},
  'another state': { state: 'lost', attempt: 1, fingerprint: '' },
  'a claim without an attempt': { state: 'acquired', fingerprint: '', record: { fingerprint: '' } },
  'half an attempt': { state: 'acquired', attempt: 1.5 },
  'no attempt at all': { state: 'acquired', attempt: 0 },
  'a running claim of nobody': { state: 'running', leaseMs: 1, attempt: 1, record: { fingerprint: '' } },
  'an abandoned claim of nobody': { state: 'abandoned', attempt: 1, record: { fingerprint: '' } },
  'no record': { state: 'completed', ttlMs: 1, attempt: 1, fingerprint: '' },
  'a record of nothing': { state: 'completed', record: {}, attempt: 1, fingerprint: '' }
})) {
  onBoth(t, `a store that answers ${what} has failed`, async (t, s) => {
    s.store.answers.acquire = [answer]
    const a = s.actor()
    t.match(await outcome(() => a.operation.claim()), {
      ...UNAVAILABLE,
      cause: { message: 'The idempotency store gave no valid answer' }
    })
    t.strictSame(a.events, ['store-error'])
    const isClaim = (answer as Partial<Acquisition> | undefined | null)?.state === 'acquired'
    t.equal(s.store.calls('release').length, isClaim ? 1 : 0)
  })
}

t.test('a store that gives no answer in time has failed, and the claim is given back', async (t) => {
  const s = scene(t)
  s.store.answers.acquire = [never]
  const a = s.actor()
  const verdict = outcome(() => a.operation.claim())
  await s.time.pass(STORE_TIMEOUT - 10)
  t.strictSame([a.operation.phase, a.events], ['asking', []])
  await s.time.pass(20)
  t.match(await verdict, { ...UNAVAILABLE, cause: { name: 'StoreTimeout' } })
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
})

t.test('a claim that is written too late is given back once more', async (t) => {
  const s = scene(t)
  for (const [late, times] of [
    [acquired(), 2],
    [running(), 1],
    [undefined, 1]
  ] as const) {
    const answer = latch<unknown>()
    s.store.answers.acquire = [() => answer.promise]
    s.store.asked.length = 0
    const verdict = outcome(() => s.actor().operation.claim())
    await s.time.pass(STORE_TIMEOUT + 10)
    t.match(await verdict, UNAVAILABLE)
    answer.open(late)
    await s.time.pass(0)
    t.strictSame(s.store.calls('release'), Array(times).fill([KEY, s.store.tokens[0], true]))
  }
})

t.test('a call that fails too late may have been written as well', async (t) => {
  const s = scene(t)
  const answer = latch<unknown>()
  s.store.answers.acquire = [() => answer.promise]
  const verdict = outcome(() => s.actor().operation.claim())
  await s.time.pass(STORE_TIMEOUT + 10)
  await verdict
  answer.fail(away)
  await s.time.pass(0)
  t.equal(s.store.calls('release').length, 2)
})

/* A client that leaves */

for (const [what, answer, asked] of [
  ['is given back', acquired(), ['acquire', 'release']],
  ['of another is left alone', running(), ['acquire']],
  ['of another that died is left alone', abandoned(HEAD_ONLY), ['acquire']]
] as const) {
  t.test(`a client that leaves while its key is asked for gets no verdict, and a claim ${what}`, async (t) => {
    const s = scene(t)
    const answered = latch<unknown>()
    s.store.answers.acquire = [() => answered.promise]
    const a = s.actor()
    const verdict = a.operation.claim()
    await a.operation.cancel()
    t.equal(a.operation.phase, 'asking')
    answered.open(answer)
    t.equal(await verdict, 'gone')
    t.equal(a.operation.phase, 'over')
    t.strictSame(s.store.names, asked)
    t.equal(s.registration.operations.size, 0)
    t.equal(a.events.includes('conflict'), false)
    t.equal(a.operation.claim(), 'gone')
  })
}

t.test(
  'a client that leaves while a failing store is asked gets no verdict, even where that is bypassed',
  async (t) => {
    const s = scene(t, { policy: { bypasses: true } })
    const answered = latch<unknown>()
    s.store.answers.acquire = [() => answered.promise]
    const a = s.actor()
    const verdict = a.operation.claim()
    await a.operation.cancel()
    answered.fail(away)
    t.equal(await verdict, 'gone')
    t.strictSame(a.events, ['store-error'])
  }
)

onBoth(t, 'a client that leaves before its handler starts gives its key back', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  await a.operation.cancel()
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.equal(a.operation.phase, 'over')
  t.strictSame(a.events, ['acquired', 'released'])
  t.equal(a.operation.start(), false)
})

onBoth(t, 'a client that leaves while its handler runs changes nothing', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  t.equal(a.operation.start(), true)
  t.equal(a.operation.phase, 'running')
  await a.operation.cancel()
  t.equal(a.operation.phase, 'running')
  t.strictSame(s.store.names, ['acquire'])
})

/* Waiting */

onBoth(
  t,
  'a duplicate that waits gets the reply',
  async (t, s) => {
    const record = { ...reply(), fingerprint: OURS }
    s.store.answers.acquire = [running(), running(), completed(record)]
    const a = s.actor()
    const verdict = verdictOf(a)
    await s.time.pass(0)
    t.equal(s.store.asked.length, 2)
    await s.time.pass(100)
    t.equal(await verdict, 'replay')
    t.equal(a.operation.reply, record)
    t.strictSame(a.events, ['replayed'])
    t.match(s.store.takeovers, [false, false, false])
  },
  { waits: true }
)

onBoth(
  t,
  'a duplicate of another payload finds out when the reply is there',
  async (t, s) => {
    s.store.answers.acquire = [running(HEAD_ONLY), completed()]
    t.match(await verdictOf(s.actor(), 'another'), REUSED)
  },
  { waits: true }
)

onBoth(
  t,
  'a duplicate that waits gets the key when it becomes free',
  async (t, s) => {
    s.store.answers.acquire = [running(), acquired()]
    const a = s.actor()
    t.equal(await verdictOf(a), 'run')
    t.equal(a.operation.phase, 'held')
    t.match(s.store.calls('acquire')[1], [KEY, { fingerprint: OURS }])
  },
  { waits: true }
)

onBoth(
  t,
  'a duplicate that waits takes over from an owner that died',
  async (t, s) => {
    s.store.answers.acquire = [running(), abandoned(), acquired(2)]
    const a = s.actor()
    t.equal(await verdictOf(a), 'run')
    t.match(s.store.takeovers, [false, false, true])
  },
  { waits: true }
)

t.test('who is outrun in taking over waits on', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running(), abandoned(), running(), completed()]
  const verdict = verdictOf(s.actor())
  await s.time.pass(200)
  t.equal(await verdict, 'replay')
})

t.test('a duplicate that has waited long enough is in conflict', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  const a = s.actor()
  const verdict = verdictOf(a)
  await s.time.pass(WAIT_TIMEOUT - 10)
  t.strictSame(a.events, [])
  await s.time.pass(20)
  t.match(await verdict, IN_PROGRESS)
  t.strictSame(a.events, ['conflict'])
  t.equal(a.operation.phase, 'over')
})

t.test('a duplicate whose server closes is in conflict, and does not begin to wait', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  const a = s.actor()
  const verdict = verdictOf(a)
  await s.time.pass(10)
  a.operation.stopWaiting()
  t.match(await verdict, IN_PROGRESS)
  const asked = s.store.asked.length
  Object.assign(s.registration, { closing: true })
  t.match(await verdictOf(s.actor()), IN_PROGRESS)
  t.equal(s.store.asked.length, asked + 1)
})

t.test('a duplicate whose client leaves while it waits is gone', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  const a = s.actor()
  const verdict = verdictOf(a)
  await s.time.pass(10)
  await a.operation.cancel()
  t.equal(await verdict, 'gone')
  t.strictSame(a.events, [])
  t.equal(s.registration.operations.size, 0)
})

t.test('a key that becomes free for a duplicate that has left is given back', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  const answered = latch<unknown>()
  s.store.answers.acquire = [running(), () => answered.promise]
  const a = s.actor()
  const verdict = verdictOf(a)
  await s.time.pass(10)
  await a.operation.cancel()
  t.equal(await verdict, 'gone')
  answered.open(acquired())
  await s.time.pass(0)
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.equal(s.inUse.live.size, 0)
})

t.test('a key that becomes free for a duplicate that leaves at this very moment is given back', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running(), acquired()]
  const a = s.actor()
  // The last thing that happens before the duplicate hears of its key.
  Object.assign(s.store, {
    changed: (_key: string, signal: AbortSignal) => {
      signal.addEventListener('abort', () => void a.operation.cancel())
      return never()
    }
  })
  t.equal(await verdictOf(a), 'gone')
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.equal(a.operation.phase, 'over')
})

/* Others in the same process */

onBoth(
  t,
  'a claim that has lapsed while its owner is alive in this process is not taken over, but renewed',
  async (t, s) => {
    const owner = s.actor()
    owner.operation.learn('payload')
    await owner.operation.claim()
    for (const found of [abandoned(), abandoned('')]) {
      s.store.answers.acquire = [found]
      s.store.asked.length = 0
      t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
      await s.time.pass(0)
      t.match(s.store.asked, [['acquire'], ['renew', KEY, String, LEASE]])
      t.equal(s.store.asked.length, 2)
    }
  }
)

onBoth(t, 'a key that the store says is another’s is not the one’s who believes to have it here', async (t, s) => {
  await s.actor().operation.claim()
  s.store.answers.acquire = [running(composeFingerprint('another', ''))]
  t.match(await outcome(() => s.actor({ head: 'another' }).operation.claim()), IN_PROGRESS)
})

onBoth(t, 'a claim that has lapsed, whose owner here is giving it back, is taken over', async (t, s) => {
  const owner = s.actor()
  await owner.operation.claim()
  s.store.answers.release = [never]
  void owner.operation.release()
  s.store.answers.acquire = [abandoned(HEAD_ONLY), acquired(2)]
  t.equal(await s.actor().operation.claim(), 'run')
})

onBoth(t, 'an owner that waits for the store is known to run when the store fails', async (t, s) => {
  const owner = s.actor()
  owner.operation.learn('payload')
  await owner.operation.claim()
  s.store.answers.acquire = [failing(away)]
  const a = s.actor()
  t.match(await outcome(() => a.operation.claim()), IN_PROGRESS)
  t.strictSame(a.events, ['store-error', 'conflict'])
  const b = s.actor({ head: 'another' })
  t.match(await outcome(() => b.operation.claim()), REUSED)
})

t.test('who asks again after a failure does so under another name', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  const owner = s.actor()
  owner.operation.learn('payload')
  owner.operation.claim()
  s.store.answers.acquire = [failing(away), failing(away), running()]
  const verdict = verdictOf(s.actor())
  await s.time.pass(200)
  const [, first, second, third, fourth] = s.store.tokens
  t.equal(new Set([first, second, third]).size, 3)
  t.equal(fourth, third)
  s.store.answers.acquire = [completed()]
  await s.time.pass(200)
  t.equal(await verdict, 'replay')
})

onBoth(t, 'a store that does not say of what a claim is knows nothing against it', async (t, s) => {
  s.store.answers.acquire = [running('')]
  t.match(await outcome(() => s.actor({ head: 'another' }).operation.claim()), IN_PROGRESS)
})

/* Before the handler */

onBoth(t, 'a claim that is lost before the handler starts is a conflict', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  s.store.answers.renew = [false]
  s.store.answers.get = [running()]
  claimOf(s, a).renew()
  await s.time.pass(0)
  t.equal(a.operation.phase, 'over')
  t.strictSame(a.events, ['acquired', 'lease-lost'])
  t.match(await outcome(() => a.operation.start()), IN_PROGRESS)
  t.strictSame(a.events.slice(2), ['conflict'])
})

t.test('a request that was let through unprotected does not start as a claim', async (t) => {
  const s = scene(t)
  const a = s.actor()
  t.throws(() => a.operation.start(), IN_PROGRESS)
})

t.test('an answer at hand is not waited for, and one that is none is a failure', async (t) => {
  const s = scene(t, { shows: false })
  s.store.answers.acquire = [() => resolved(undefined)]
  t.match(await outcome(() => s.actor().operation.claim()), {
    ...UNAVAILABLE,
    cause: { message: 'The idempotency store gave no valid answer' }
  })
})
