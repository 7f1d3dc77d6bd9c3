import type { StoredStep } from '../../types/index.js'
import {
  answers,
  claim,
  equal,
  FRESH,
  finish,
  hasSteps,
  LONG,
  lapsed,
  left,
  newKey,
  ok,
  replays,
  reply,
  SHORT,
  take,
  tombstone,
  until
} from './fixtures.js'
import { caseWith } from './harness.js'

// What somebody decides about an operation that nobody is running: settle.

const OURS = 'fingerprint'
/** What has really happened. */
const TRUTH = reply({ statusCode: 200, body: Buffer.from('"paid out"') })

export const settling = [
  caseWith('settle', 'settle puts a record in the place of an abandoned claim', async ({ store, second }) => {
    for (const record of [TRUTH, tombstone('settled')]) {
      for (const ttlMs of [LONG, null]) {
        const key = newKey()
        await lapsed(store, key)
        const before = performance.now()
        equal(await second.settle(key, OURS, { record, ttlMs }), true, 'settle')
        for (const client of [store, second]) {
          const found = await client.acquire(key, claim({ takeover: true, withTtl: true }))
          replays(found, record)
          const { ttlMs: leftMs } = found as { ttlMs: number | null }
          if (ttlMs === null) equal(leftMs, null, 'what is left of no ttl')
          else left(leftMs, ttlMs, before)
        }
      }
    }
  }),

  caseWith('settle', 'settle puts a record in the place of a tombstone', async ({ store, second }) => {
    for (const ttlMs of [LONG, null]) {
      const key = newKey()
      await finish(store, key, tombstone('too-large'), ttlMs)
      equal(await second.settle(key, OURS, { record: TRUTH, ttlMs: LONG }), true, 'settle')
      replays(await store.acquire(key, claim()), TRUTH)
    }
  }),

  caseWith('settle', 'settle lets an abandoned claim be as its owner would give it back', async ({ store, second }) => {
    const key = newKey()
    const kept: StoredStep[] = [['charge', '"ch_1"']]
    const token = await take(store, key, { leaseMs: LONG, fingerprint: 'the dead' })
    if (store.step) equal(await store.step(key, token, kept[0] as StoredStep), true, 'step')
    await store.renew(key, token, SHORT)
    const settled = async () => second.settle(key, 'the dead', 'ended')
    await until(settled, { message: 'a lapsed claim to be settled' })
    const steps = store.step ? kept : []
    const found = await store.acquire(key, claim())
    answers(found, { state: 'abandoned', fingerprint: 'the dead', attempt: 1, ended: true })
    hasSteps(found, steps)
    equal(await second.settle(key, 'the dead', 'ended'), true, 'settle again')
    const heir = await second.acquire(key, claim({ takeover: true }))
    answers(heir, { state: 'acquired', attempt: 2 })
    hasSteps(heir, steps)
  }),

  caseWith('settle', 'settle of what has ended puts a record in its place, too', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key)
    equal(await second.settle(key, OURS, 'ended'), true, 'settle')
    equal(await store.settle(key, OURS, { record: TRUTH, ttlMs: LONG }), true, 'settle by a record')
    replays(await second.acquire(key, claim({ takeover: true })), TRUTH)
  }),

  caseWith('settle', 'settle leaves what is running, replied or free', async ({ store, second }) => {
    const [running, replied, unknown, released, expired] = [newKey(), newKey(), newKey(), newKey(), newKey()]
    const token = await take(store, running)
    await finish(store, replied)
    await store.release(released, await take(store, released))
    await finish(store, expired, tombstone('hijacked'), 1)
    await until(async () => (await store.get?.(expired)) === null || store.get === undefined)
    for (const settlement of [{ record: TRUTH, ttlMs: LONG }, 'ended'] as const) {
      for (const key of [running, replied, unknown, released]) {
        equal(await second.settle(key, OURS, settlement), false, 'settle')
      }
      if (store.get) equal(await second.settle(expired, OURS, settlement), false, 'settle of what has expired')
    }
    equal(await store.complete(running, token, reply(), LONG), true, 'complete by the owner')
    replays(await second.acquire(replied, claim()), reply())
    for (const key of [unknown, released]) answers(await second.acquire(key, claim()), FRESH)
  }),

  caseWith('settle', 'settle lets no tombstone be as if it were given back', async ({ store, second }) => {
    const key = newKey()
    await finish(store, key, tombstone('hijacked'))
    equal(await second.settle(key, OURS, 'ended'), false, 'settle')
    replays(await store.acquire(key, claim({ takeover: true })), tombstone('hijacked'))
  }),

  caseWith('settle', 'settle leaves what has another fingerprint', async ({ store, second }) => {
    const [dead, lost] = [newKey(), newKey()]
    await lapsed(store, dead)
    await finish(store, lost, tombstone('hijacked'))
    for (const fingerprint of ['another', '', `${OURS} `]) {
      for (const key of [dead, lost]) {
        equal(await second.settle(key, fingerprint, { record: TRUTH, ttlMs: LONG }), false, 'settle')
      }
      equal(await second.settle(dead, fingerprint, 'ended'), false, 'settle')
    }
    const found = await store.acquire(dead, claim())
    answers(found, { state: 'abandoned', attempt: 1, ended: undefined as never })
  }),

  caseWith('settle', 'settle by a record leaves the owner of before nothing', async ({ store, second }) => {
    const key = newKey()
    const token = await lapsed(store, key)
    equal(await second.settle(key, OURS, { record: TRUTH, ttlMs: LONG }), true, 'settle')
    equal(await store.renew(key, token, LONG), false, 'renew by the owner of before')
    equal(await store.complete(key, token, reply(), LONG), false, 'complete by the owner of before')
    equal(await store.release(key, token), false, 'release by the owner of before')
    if (store.step) equal(await store.step(key, token, ['late', '1']), false, 'step by the owner of before')
    replays(await second.acquire(key, claim()), TRUTH)
  }),

  caseWith('settle', 'settle as ended leaves the owner of before nothing to complete', async ({ store, second }) => {
    const key = newKey()
    const token = await lapsed(store, key)
    equal(await second.settle(key, OURS, 'ended'), true, 'settle')
    equal(await store.renew(key, token, LONG), false, 'renew by the owner of before')
    equal(await store.complete(key, token, reply(), LONG), false, 'complete by the owner of before')
    answers(await second.acquire(key, claim({ takeover: true })), { state: 'acquired', attempt: 2 })
  }),

  caseWith('settle', 'settle and a takeover at the same time are one after the other', async ({ store, second }) => {
    for (let round = 0; round < 5; round++) {
      const key = newKey()
      await lapsed(store, key)
      const [settled, found] = await Promise.all([
        second.settle(key, OURS, { record: TRUTH, ttlMs: LONG }),
        store.acquire(key, claim({ takeover: true }))
      ])
      ok(settled ? found.state !== 'acquired' : found.state === 'acquired', `settle: ${settled}, and ${found.state}`)
    }
  })
]
