import t from 'tap'
import { StoreFull } from '../../lib/errors.js'
import { composeFingerprint } from '../../lib/operation/fingerprint.js'
import type { Acquisition } from '../../types/index.js'
import { latch } from '../support/latch.js'
import {
  away,
  completed,
  failing,
  IN_PROGRESS,
  KEY,
  LEASE,
  OURS,
  onBoth,
  outcome,
  RECORD,
  running,
  scene,
  UNAVAILABLE,
  verdictOf
} from '../support/operation-scene.js'

/* Keys that are claimed before their requests have been read; and claims that are left to living owners. */

const HEAD_ONLY = composeFingerprint('head', '')
const ABANDONED = { code: 'FST_IDEMPOTENCY_ABANDONED', statusCode: 409 }
const acquired = (attempt = 1): Acquisition => ({ state: 'acquired', attempt })
const abandoned = (): Acquisition => ({ state: 'abandoned', fingerprint: OURS, attempt: 1 })

onBoth(
  t,
  'a free key is reserved for one lease, after which nothing is remembered, and nobody is told',
  async (t, s) => {
    const { operation, events, words } = s.actor()
    t.equal(await operation.reserve(), 'later')
    t.match(s.store.asked, [['acquire', KEY, { fingerprint: HEAD_ONLY, leaseMs: LEASE, retainMs: 0, takeover: false }]])
    t.strictSame([operation.phase, s.inUse.reservations], ['reserved', 1])
    t.strictSame([events, words], [[], []])
    t.equal(s.inUse.live.size, 0)
    await s.time.pass(3 * LEASE)
    t.strictSame(s.store.names, ['acquire'], 'it is not renewed')
  }
)

onBoth(t, 'a reserved key is claimed by the same token, with all that is known of the request', async (t, s) => {
  const a = s.actor()
  await a.operation.reserve()
  t.equal(await verdictOf(a), 'run')
  t.match(s.store.calls('acquire')[1], [KEY, { fingerprint: OURS, leaseMs: LEASE, retainMs: 60_000, takeover: false }])
  t.equal(s.store.tokens[0], s.store.tokens[1])
  t.strictSame([a.operation.phase, s.inUse.reservations], ['held', 0])
  t.strictSame(a.events, ['acquired'])
  t.ok(s.inUse.live.has(KEY))
})

onBoth(t, 'a reservation that has lapsed costs nobody who came between anything', async (t, s) => {
  for (const [found, verdict] of [
    [[running()], IN_PROGRESS],
    [[completed()], 'replay'],
    [[abandoned(), acquired(2)], 'run']
  ] as const) {
    s.store.answers.acquire = [acquired(), ...found]
    s.store.asked.length = 0
    const a = s.actor()
    t.equal(await a.operation.reserve(), 'later')
    t.match(await verdictOf(a), verdict)
    t.equal(s.inUse.reservations, 0)
    t.equal(s.store.calls('release').length, 0)
    s.inUse.live.delete(KEY)
  }
})

onBoth(t, 'a running key is a conflict before the request has been read, unless it is waited for', async (t, s) => {
  s.store.answers.acquire = [running()]
  const a = s.actor()
  t.match(await outcome(() => a.operation.reserve()), IN_PROGRESS)
  t.strictSame([a.operation.phase, a.events], ['over', ['conflict']])
  const b = s.actor({ policy: { waits: true } })
  t.equal(await b.operation.reserve(), 'later')
  t.strictSame([b.operation.phase, b.events], ['undecided', []])
  s.store.answers.acquire = [completed()]
  t.equal(await verdictOf(b), 'replay')
  t.equal(s.inUse.reservations, 0)
})

onBoth(t, 'a reservation never takes over: that is for the claim, which asks no more than that', async (t, s) => {
  s.store.answers.acquire = [abandoned(), acquired(2)]
  const a = s.actor()
  t.equal(await a.operation.reserve(), 'later')
  t.strictSame([s.store.asked.length, a.operation.phase], [1, 'undecided'])
  t.equal(await verdictOf(a), 'run')
  t.strictSame(s.store.takeovers, [false, true])
  t.strictSame([a.operation.attempt, a.events], [2, ['acquired', 'takeover']])
})

onBoth(t, 'what is finished is replayed when the request has been read, and asked for once', async (t, s) => {
  s.store.answers.acquire = [completed()]
  const a = s.actor()
  t.equal(await a.operation.reserve(), 'later')
  t.strictSame([a.operation.reply, a.events], [null, []])
  t.equal(await verdictOf(a), 'replay')
  t.equal(s.store.asked.length, 1)
})

onBoth(
  t,
  'where an abandoned claim is not taken over that is told at once, unless its owner has given it back',
  async (t, s) => {
    s.store.answers.acquire = [abandoned()]
    t.match(await outcome(() => s.actor().operation.reserve()), ABANDONED)
    s.store.answers.acquire = [{ ...abandoned(), ended: true }, acquired(2)]
    const a = s.actor()
    t.equal(await a.operation.reserve(), 'later')
    t.equal(await verdictOf(a), 'run')
  },
  { reruns: false }
)

t.test(
  'of those that have not been read a process reserves a thousand keys at a time, and claims the others',
  async (t) => {
    const s = scene(t)
    const many = Array.from({ length: 1_000 }, (_, n) => s.actor({ key: `key ${n}` }))
    for (const { operation } of many) t.equal(operation.reserve(), 'later')
    t.equal(s.inUse.reservations, 1_000)
    s.store.asked.length = 0
    const a = s.actor()
    t.equal(a.operation.reserve(), 'later')
    t.strictSame([s.store.asked, a.operation.phase], [[], 'undecided'])
    t.equal(await verdictOf(a), 'run')
    t.equal(s.store.asked.length, 1)
    await many[0]?.operation.cancel()
    t.equal(s.inUse.reservations, 999)
    t.equal(s.actor({ key: 'another' }).operation.reserve(), 'later')
    t.equal(s.inUse.reservations, 1_000)
  }
)

onBoth(t, 'a reservation whose request ends is given back unused, and nobody is told', async (t, s) => {
  const a = s.actor()
  await a.operation.reserve()
  await a.operation.cancel()
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.strictSame([a.operation.phase, a.events, s.inUse.reservations], ['over', [], 0])
  t.equal(s.registration.operations.size, 0)
})

onBoth(t, 'a reservation that cannot be given back is tried again until it can be', async (t, s) => {
  s.store.answers.release = [failing(away), failing(away), true]
  const a = s.actor()
  await a.operation.reserve()
  await a.operation.cancel()
  t.strictSame([a.operation.phase, a.events], ['over', ['store-error']])
  await s.time.pass(200)
  t.strictSame(s.store.calls('release'), Array(3).fill([KEY, s.store.tokens[0], true]))
})

t.test('a client that leaves while a key is being reserved gets no verdict, and the key is given back', async (t) => {
  const s = scene(t)
  const answered = latch<unknown>()
  s.store.answers.acquire = [() => answered.promise]
  const a = s.actor()
  const verdict = a.operation.reserve()
  await a.operation.cancel()
  answered.open(acquired())
  t.equal(await verdict, 'gone')
  t.strictSame(s.store.calls('release'), [[KEY, s.store.tokens[0], true]])
  t.strictSame([a.operation.phase, s.inUse.reservations, s.registration.operations.size], ['over', 0, 0])
  t.equal(s.actor().operation.phase, 'asking')
})

onBoth(t, 'a client that leaves while nothing is decided is forgotten', async (t, s) => {
  s.store.answers.acquire = [completed()]
  const a = s.actor()
  await a.operation.reserve()
  await a.operation.cancel()
  t.equal(a.operation.phase, 'over')
  t.equal(s.registration.operations.size, 0)
  t.strictSame(s.store.names, ['acquire'])
  t.equal(a.operation.reserve(), 'gone')
})

onBoth(t, 'a store without room for a reservation may have it for the claim', async (t, s) => {
  const full = new StoreFull('full')
  for (const bypasses of [false, true]) {
    s.store.answers.acquire = [failing(full), acquired()]
    const a = s.actor({ policy: { bypasses } })
    t.equal(await a.operation.reserve(), 'later')
    t.equal(await verdictOf(a), 'run')
    t.equal(a.operation.phase, 'held')
    s.inUse.live.delete(KEY)
    s.store.answers.acquire = [failing(full)]
    const b = s.actor({ policy: { bypasses } })
    t.equal(await b.operation.reserve(), 'later')
    t.match(await verdictOf(b), { ...UNAVAILABLE, cause: full }, 'and if it has not, nothing runs unprotected')
  }
})

onBoth(t, 'a store that fails is told at once', async (t, s) => {
  s.store.answers.acquire = [failing(away)]
  const a = s.actor()
  t.match(await outcome(() => a.operation.reserve()), { ...UNAVAILABLE, cause: away })
  t.equal(a.operation.phase, 'over')
})

onBoth(
  t,
  'where the route prefers to run a store that fails is asked again by the claim',
  async (t, s) => {
    s.store.answers.acquire = [failing(away), acquired()]
    const a = s.actor()
    t.equal(await a.operation.reserve(), 'later')
    t.equal(await verdictOf(a), 'run')
    t.equal(a.operation.phase, 'held', 'and protects, if it is back')
    t.not(s.store.tokens[0], s.store.tokens[1], 'under another name: the first may be given back at any time')
    t.strictSame(a.events, ['store-error', 'acquired'])
  },
  { bypasses: true }
)

/* A store that gives away what somebody in this process has */

onBoth(t, 'a claim that a store gives to another in this process is left to its living owner', async (t, s) => {
  const owner = s.actor()
  t.equal(await verdictOf(owner), 'run')
  owner.operation.start()
  const other = s.actor()
  t.match(await verdictOf(other), IN_PROGRESS)
  const [first, second, third] = s.store.tokens
  t.not(first, second)
  t.equal(third, second, 'under the name that the store knows now')
  t.match(s.store.calls('acquire')[2], [KEY, { fingerprint: OURS, leaseMs: LEASE, retainMs: 60_000, takeover: false }])
  await other.operation.cancel()
  t.equal(s.store.calls('release').length, 0)
  t.ok(s.inUse.live.has(KEY))
  await owner.operation.complete(RECORD)
  t.match(s.store.calls('complete'), [[KEY, second, RECORD]])
  t.strictSame([owner.events, other.events], [['acquired', 'stored'], ['conflict']])
})

onBoth(t, 'who is given what is not theirs is compared with its owner', async (t, s) => {
  await verdictOf(s.actor())
  const other = s.actor()
  t.match(await verdictOf(other, 'another'), { code: 'FST_IDEMPOTENCY_KEY_REUSED' })
  t.strictSame(other.events, ['mismatch'])
  t.match(s.store.calls('acquire')[2], [KEY, { fingerprint: OURS }], "the store knows the owner's fingerprint again")
})

onBoth(t, 'the owner is known to run also where the store fails then', async (t, s) => {
  const owner = s.actor()
  await verdictOf(owner)
  s.store.answers.acquire = [acquired(), failing(away)]
  t.match(await verdictOf(s.actor()), IN_PROGRESS)
  t.strictSame(owner.events, ['acquired', 'store-error'])
  await owner.operation.complete(RECORD)
  t.match(s.store.calls('complete'), [[KEY, s.store.tokens[1], RECORD]])
})

onBoth(t, 'an owner that gives its key back has it no more: it is the next one’s', async (t, s) => {
  const owner = s.actor()
  await verdictOf(owner)
  const released = latch<boolean>()
  s.store.answers.release = [() => released.promise]
  const over = owner.operation.release()
  t.equal(await verdictOf(s.actor()), 'run')
  released.open(true)
  await over
})
