import t from 'tap'
import { UnreadableAnswer } from '../../lib/errors.js'
import { composeFingerprint } from '../../lib/operation/fingerprint.js'
import { LocalCache } from '../../lib/stores/memory/local-cache.js'
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
import { tombstone } from '../support/store-fixtures.js'

/* How an operation comes to its verdict: what it asks the store, and what it makes of the answers. */

const HEAD_ONLY = composeFingerprint('head', '')
const OTHER_PAYLOAD = composeFingerprint('head', 'another')
/** Of a head of as many characters as heads have, whose hint is another. */
const OTHER_TARGET = composeFingerprint(`${'x'.repeat(22)}hint`, '')

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

/** Of what is found, with `onAbandoned: 'reject'`: the verdict, and its event. What is found of whom is in decide.test.ts. */
const VERDICTS: [what: string, found: Acquisition, verdict: unknown, event: string][] = [
  ['a running key is a conflict', running(), IN_PROGRESS, 'conflict'],
  ['a finished reply is replayed', completed(), 'replay', 'replayed'],
  ['a tombstone is told', completed({ ...tombstone('too-large'), fingerprint: OURS }), NOT_REPLAYABLE, 'conflict'],
  ['an abandoned claim is told', abandoned(), ABANDONED, 'conflict'],
  ['the key of another target is told', running(OTHER_TARGET), { ...REUSED, differs: 'target' }, 'mismatch'],
  ['another payload is told', completed({ ...RECORD, fingerprint: OTHER_PAYLOAD }), REUSED, 'mismatch']
]

for (const [what, found, verdict, event] of VERDICTS) {
  onBoth(
    t,
    `${what} at once, with its event, and then the operation is over`,
    async (t, s) => {
      s.store.answers.acquire = [found]
      const a = s.actor()
      const given = await verdictOf(a)
      t.match(given, verdict)
      t.equal(a.operation.reply, verdict === 'replay' ? RECORD : null)
      t.strictSame([a.operation.phase, a.events], ['over', [event]])
      if (event === 'conflict') t.equal(a.errors[event], given)
      t.strictSame([s.store.asked.length, s.inUse.live.size, s.registration.operations.size], [1, 0, 0])
    },
    { reruns: false }
  )
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
    s.inUse.live.delete(KEY)
  }
})

onBoth(t, 'who is outrun in taking over is told what has become of the key', async (t, s) => {
  s.store.answers.acquire = [abandoned(HEAD_ONLY), completed()]
  t.equal(await verdictOf(s.actor()), 'replay')
  s.store.answers.acquire = [abandoned(HEAD_ONLY), running()]
  t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
})

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

for (const bypasses of [false, true]) {
  const what = bypasses ? 'runs' : 'gets its 503'
  t.test(`while a store is known to be down one at a time asks it, and who else comes ${what} at once`, async (t) => {
    const s = scene(t, { shows: false, policy: { bypasses } })
    const cause = await down(s)
    const probing = verdictOf(s.actor({ key: 'probe' }))
    for (const key of ['a', 'b']) {
      const a = s.actor({ key })
      t.match(await verdictOf(a), bypasses ? 'run' : { ...UNAVAILABLE, cause })
      t.strictSame(a.events, ['store-error', ...(bypasses ? ['bypassed'] : [])], 'each is an event')
      t.strictSame(a.logged, [], 'but none is an error in the log')
    }
    t.equal(s.store.calls('acquire').length, 2)
    await s.time.pass(100)
    t.match(await probing, bypasses ? 'run' : UNAVAILABLE)
  })
}

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
  await down(s)
  claimOf(s, owner).renew()
  await s.time.pass(0)
  t.equal(s.inUse.health.isDown, false)
})

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

t.test(
  'a claim that gets no answer in time has failed, and is given back: again if it is written too late',
  async (t) => {
    const s = scene(t)
    for (const [late, times] of [
      [acquired, 2],
      [running, 1],
      [() => undefined, 1],
      [failing(away), 2]
    ] as const) {
      const answer = latch()
      s.store.answers.acquire = [() => answer.promise.then(() => late())]
      s.store.asked.length = 0
      const a = s.actor()
      const verdict = outcome(() => a.operation.claim())
      await s.time.pass(STORE_TIMEOUT - 10)
      t.strictSame([a.operation.phase, a.events], ['asking', []])
      await s.time.pass(20)
      t.match(await verdict, { ...UNAVAILABLE, cause: { name: 'StoreTimeout' } })
      t.equal(s.store.calls('release').length, 1)
      answer.open()
      await s.time.pass(0)
      t.strictSame(s.store.calls('release'), Array(times).fill([KEY, s.store.tokens[0], true]))
    }
  }
)

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

onBoth(t, 'a client that leaves between its claim and its handler gives its key back', async (t, s) => {
  const a = s.actor()
  await a.operation.claim()
  await a.operation.cancel()
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.strictSame([a.operation.phase, a.events], ['over', ['acquired', 'released']])
  t.equal(a.operation.start(), false)
})

/* Waiting */

t.test('who is outrun in taking over waits on', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running(), abandoned(), running(), completed()]
  const verdict = verdictOf(s.actor())
  await s.time.pass(200)
  t.equal(await verdict, 'replay')
})

t.test('who is outrun does not wait for longer than the others', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  const verdict = verdictOf(s.actor())
  await s.time.pass(WAIT_TIMEOUT / 2)
  s.store.answers.acquire = [abandoned(), running()]
  await s.time.pass(WAIT_TIMEOUT / 2 - 10)
  t.strictSame(s.store.takeovers.filter(Boolean), [true])
  let isOver = false
  void verdict.then(() => {
    isOver = true
  })
  await s.time.pass(0)
  t.equal(isOver, false)
  await s.time.pass(11)
  t.equal(isOver, true)
  t.match(await verdict, IN_PROGRESS)
})

t.test('a duplicate whose client leaves while it waits is gone, without an event', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  const a = s.actor()
  const verdict = verdictOf(a)
  await s.time.pass(10)
  await a.operation.cancel()
  t.equal(await verdict, 'gone')
  t.strictSame([a.events, s.registration.operations.size], [[], 0])
})

t.test('a duplicate does not begin to wait while its server closes', async (t) => {
  const s = scene(t, { policy: { waits: true } })
  s.store.answers.acquire = [running()]
  Object.assign(s.registration, { closing: true })
  t.match(await verdictOf(s.actor()), IN_PROGRESS)
  t.equal(s.store.asked.length, 1)
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

onBoth(t, 'a claim that has lapsed while its owner lives in this process is in progress, and renewed', async (t, s) => {
  await verdictOf(s.actor())
  for (const found of [abandoned(), abandoned('')]) {
    s.store.answers.acquire = [found]
    s.store.asked.length = 0
    t.match(await outcome(() => s.actor().operation.claim()), IN_PROGRESS)
    await s.time.pass(0)
    t.match(s.store.asked, [['acquire'], ['renew', KEY, String, LEASE]])
    t.equal(s.store.asked.length, 2)
  }
})

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
