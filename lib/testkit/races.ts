import { isDeepStrictEqual } from 'node:util'
import type { Acquisition, IdempotencyStore, StoredStep } from '../../types/index.js'
import {
  answers,
  claim,
  equal,
  FRESH,
  hasSteps,
  LONG,
  lapsed,
  newKey,
  ok,
  parallel,
  replays,
  reply,
  take
} from './fixtures.js'
import { caseWith, conformanceCase, type Harness, shown } from './harness.js'

// Two steps on one key at the same moment. One of them comes first, and what they answer has to agree on which.

type AtOnce = <A, B>(first: () => Promise<A>, second: () => Promise<B>) => Promise<[A, B]>

/** Some rounds, by one client or by two, with the one step or the other sent first. */
async function rounds<H extends Harness>(
  { store, second }: H,
  race: (one: H['store'], other: H['store'], atOnce: AtOnce) => Promise<void>
): Promise<void> {
  const asTold: AtOnce = (first, second) => Promise.all([first(), second()])
  const theOtherWay: AtOnce = async (first, second) => {
    const [b, a] = await Promise.all([second(), first()])
    return [a, b]
  }
  await parallel(12, [store, second], (one, n) => {
    const other = n % 3 === 0 ? one : one === store ? second : store
    return race(one, other, n % 4 < 2 ? asTold : theOtherWay)
  })
}

const heir = () => claim({ fingerprint: 'the heir', takeover: true })

export const races = [
  conformanceCase('of a renewal and a takeover at the same moment exactly one succeeds', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await lapsed(one, key)
      const [renewed, found] = await atOnce(
        () => one.renew(key, token, LONG),
        () => other.acquire(key, heir())
      )
      answers(found, renewed ? { state: 'running' } : { state: 'acquired', attempt: 2 }, `after renew was ${renewed}`)
      equal(await other.renew(key, token, LONG), renewed, 'renew by the former owner')
    })
  ),

  conformanceCase('of a completion and a takeover at the same moment exactly one succeeds', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await lapsed(one, key)
      const [done, found] = await atOnce(
        () => one.complete(key, token, reply(), LONG),
        () => other.acquire(key, heir())
      )
      if (!done) answers(found, { state: 'acquired', attempt: 2 }, 'the key that could not be completed')
      // A completion may renew the lease before it stores the record: whoever comes in between waits for it.
      else if (found.state === 'running') answers(found, { state: 'running', attempt: 1 }, 'the key that was completed')
      else replays(found, reply(), 'the key that was completed')
      const later = await other.acquire(key, heir())
      if (done) replays(later, reply(), 'the key that was completed')
      else answers(later, { state: 'running', fingerprint: 'the heir' }, 'the key that was taken over')
    })
  ),

  conformanceCase(
    'of a release and a takeover at the same moment the later one finds what the earlier one left',
    (harness) =>
      rounds(harness, async (one, other, atOnce) => {
        const key = newKey()
        const token = await lapsed(one, key)
        const [released, found] = await atOnce(
          () => one.release(key, token),
          () => other.acquire(key, heir())
        )
        answers(found, { state: 'acquired', attempt: released ? 1 : 2 }, `after release was ${released}`)
        answers(await one.acquire(key, heir()), { state: 'running', fingerprint: 'the heir' })
      })
  ),

  conformanceCase('of a completion and a release at the same moment exactly one succeeds', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await take(one, key)
      const [done, released] = await atOnce(
        () => one.complete(key, token, reply(), LONG),
        () => other.release(key, token)
      )
      ok(done !== released, `complete was ${done}, and release was ${released}`)
      const found = await other.acquire(key, claim())
      if (done) replays(found, reply(), 'the key that was completed')
      else answers(found, FRESH, 'the key that was released')
    })
  ),

  conformanceCase('of several completions with the same token at the same moment one record stays', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await take(one, key)
      const complete = (client: IdempotencyStore, fingerprint: string) => () =>
        client.complete(key, token, reply({ fingerprint, body: Buffer.from(fingerprint) }), LONG)
      const done = await atOnce(complete(one, 'first'), complete(other, 'second'))
      ok(done[0] && done[1], `complete was ${done[0]} and ${done[1]}`)
      const found = await one.acquire(key, claim())
      answers(found, { state: 'completed' })
      const { fingerprint } = (found as { record: { fingerprint: string } }).record
      const kept = reply({ fingerprint, body: Buffer.from(fingerprint) })
      replays(found, kept)
      replays(await other.acquire(key, claim()), kept, 'the key, asked again,')
    })
  ),

  conformanceCase('a renewal or a repeated claim at the same moment does not undo a completion', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const [key, again] = [newKey(), claim()]
      answers(await one.acquire(key, again), FRESH)
      const [done] = await atOnce(
        () => one.complete(key, again.token, reply(), LONG),
        () => Promise.all([other.renew(key, again.token, LONG), other.acquire(key, again)])
      )
      equal(done, true, 'complete by the owner')
      replays(await other.acquire(key, claim()), reply())
    })
  ),

  conformanceCase('a renewal at the same moment does not undo a release', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await take(one, key)
      const [released] = await atOnce(
        () => one.release(key, token),
        () => other.renew(key, token, LONG)
      )
      equal(released, true, 'release by the owner')
      answers(await other.acquire(key, claim()), FRESH)
    })
  ),

  caseWith('step', 'of a step and a takeover at the same moment the heir has the step, or it is refused', (harness) =>
    rounds(harness, async (one, other, atOnce) => {
      const key = newKey()
      const token = await lapsed(one, key)
      const [kept, found] = await atOnce(
        () => one.step(key, token, ['step', 'done']),
        () => other.acquire(key, claim({ takeover: true }))
      )
      answers(found, { state: 'acquired', attempt: 2 })
      hasSteps(found, kept ? [['step', 'done']] : [], `the takeover, after step was ${kept},`)
    })
  ),

  caseWith('step', 'steps at the same moment all stay', (harness) =>
    rounds(harness, async (one, other) => {
      const key = newKey()
      const token = await take(one, key)
      const many = Array.from({ length: 6 }, (_, n): StoredStep => [`step ${n}`, `result ${n}`])
      const kept = await parallel(many.length, [one, other], (client, n) => {
        return client.step(key, token, many[n] as StoredStep)
      })
      ok(!kept.includes(false), `step was ${kept}`)
      const stay = stepsOf(await other.acquire(key, claim({ token })))
      const sorted = [...stay].sort(([a], [b]) => (a < b ? -1 : 1))
      ok(isDeepStrictEqual(sorted, many), `${shown(stay)} stay of ${shown(many)}`)
    })
  ),

  caseWith('step', 'of steps of one name at the same moment one stays', (harness) =>
    rounds(harness, async (one, other) => {
      const key = newKey()
      const token = await take(one, key)
      const kept = await parallel(4, [one, other], (client, n) => client.step(key, token, ['step', `${n}`]))
      ok(!kept.includes(false), `step was ${kept}`)
      const stay = stepsOf(await other.acquire(key, claim({ token })))
      ok(stay.length === 1, `${shown(stay)} stay`)
      hasSteps(await one.acquire(key, claim({ token })), stay)
    })
  )
]

function stepsOf(found: Acquisition): readonly StoredStep[] {
  return (found as { steps?: readonly StoredStep[] }).steps ?? []
}
