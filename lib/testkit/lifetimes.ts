import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import {
  answers,
  claim,
  DAY,
  equal,
  FRESH,
  finish,
  inTime,
  LONG,
  lapsed,
  left,
  newKey,
  ok,
  oneAcquired,
  parallel,
  passed,
  replays,
  reply,
  SHORT,
  SLACK,
  take,
  until
} from './fixtures.js'
import { conformanceCase } from './harness.js'

// How long claims and records live, by the clock of the store.

/** What is left of the life of the record under the key. */
async function ttlOf(store: IdempotencyStore, key: string): Promise<number | null> {
  const found = await store.acquire(key, claim({ withTtl: true }))
  answers(found, { state: 'completed' })
  return (found as { ttlMs: number | null }).ttlMs
}

/** A record with a ttl of LONG was completed more than 60 ms ago. */
function notProlonged(ttlMs: number | null): void {
  ok(ttlMs !== null && ttlMs <= LONG - 60 + SLACK, `${ttlMs} ms are left of ${LONG}, of which 60 have passed`)
}

/** Claims the key many times at once, again and again, until somebody has it. */
async function oneOfMany(clients: readonly [IdempotencyStore, IdempotencyStore], key: string, attempt: number) {
  const acquired = await until(
    async () => {
      const found = await parallel(20, clients, (client) => client.acquire(key, claim({ takeover: true })))
      return found.some(({ state }) => state === 'acquired') && found
    },
    { message: 'the key to be free' }
  )
  // At the moment itself some may still find what was there before.
  oneAcquired(
    (acquired as Acquisition[]).filter(({ state }) => state !== 'completed'),
    attempt
  )
}

export const lifetimes = [
  conformanceCase(
    'a record lives for its ttl from the completion on, not from the claim',
    async ({ store, second }) => {
      const key = newKey()
      const ttlMs = 200
      const token = await take(store, key, { leaseMs: 30 })
      await sleep(60)
      const before = performance.now()
      await store.complete(key, token, reply(), ttlMs)
      const next = claim()
      const expired = async () => {
        const found = await second.acquire(key, next)
        if (found.state === 'completed') return false
        answers(found, FRESH, 'a key whose record has expired')
        return true
      }
      await until(expired, { message: 'a record to expire' })
      passed(ttlMs, before, 'the record has expired')
    }
  ),

  conformanceCase('a completed key tells what is left of its ttl', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { leaseMs: DAY, retainMs: DAY })
    await sleep(SHORT)
    const before = performance.now()
    await store.complete(key, token, reply(), LONG)
    for (const client of [store, second]) left(await ttlOf(client, key), LONG, before)
  }),

  conformanceCase('a repeated completion does not prolong the life of the record', async ({ store, second }) => {
    const key = newKey()
    const token = await finish(store, key)
    await sleep(60)
    for (const ttlMs of [LONG, DAY, null]) {
      await second.complete(key, token, reply(), ttlMs)
      notProlonged(await ttlOf(store, key))
    }
  }),

  conformanceCase('replaying does not prolong the life of the record', async ({ store, second }) => {
    const key = newKey()
    const token = await finish(store, key)
    await sleep(60)
    for (const client of [store, second]) {
      for (const asked of [claim({ leaseMs: DAY, retainMs: DAY }), claim({ takeover: true }), claim({ token })]) {
        await client.acquire(key, asked)
        notProlonged(await ttlOf(store, key))
      }
    }
  }),

  conformanceCase(
    'of many parallel claims at the moment of expiry exactly one is acquired',
    async ({ store, second }) => {
      const key = newKey()
      await finish(store, key, reply(), 40)
      await oneOfMany([store, second], key, 1)
    }
  ),

  conformanceCase(
    'of many parallel takeovers at the moment of lapse exactly one is acquired',
    async ({ store, second }) => {
      const key = newKey()
      await take(store, key, { leaseMs: 40 })
      await oneOfMany([store, second], key, 2)
    }
  ),

  conformanceCase(
    'whoever has let a record expire has no say in what the next owner does',
    async ({ store, second }) => {
      const key = newKey()
      const old = await finish(store, key, reply(), SHORT)
      const owner = claim({ fingerprint: 'the next' })
      const expired = async () => (await second.acquire(key, owner)).state === 'acquired'
      await until(expired, { message: 'a record to expire' })
      equal(await store.renew(key, old, LONG), false, 'renew by the former owner')
      equal(await store.release(key, old), false, 'release by the former owner')
      await store.complete(key, old, reply(), LONG)
      answers(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the next' })
      equal(await second.renew(key, owner.token, LONG), true, 'renew by the next owner')
    }
  ),

  ...(
    [
      ['40 days', 40 * DAY],
      ['a thousand years', 365_000 * DAY],
      ['the largest integer', Number.MAX_SAFE_INTEGER]
    ] as const
  ).map(([name, ttlMs]) =>
    conformanceCase(`a ttl of ${name} is kept`, async ({ store, second }) => {
      const key = newKey()
      // A ttl is also what claims are remembered for.
      const token = await take(store, key, { retainMs: ttlMs })
      answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
      equal(await store.renew(key, token, LONG), true, 'renew')
      answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
      equal(await store.complete(key, token, reply(), ttlMs), true, 'complete')
      await sleep(SHORT)
      const found = await second.acquire(key, claim({ withTtl: true }))
      replays(found, reply())
      const { ttlMs: leftMs } = found as { ttlMs: number | null }
      ok(leftMs !== null && leftMs <= ttlMs && leftMs > ttlMs - DAY, `${leftMs} ms are left of ${ttlMs}`)
    })
  ),

  conformanceCase('a lease of 40 days does not lapse', async ({ store, second }) => {
    const key = newKey()
    const before = performance.now()
    const token = await take(store, key, { leaseMs: 40 * DAY })
    await sleep(SHORT)
    for (let renewed = false; ; renewed = true) {
      const found = await second.acquire(key, claim({ takeover: true }))
      answers(found, { state: 'running' })
      left((found as { leaseMs: number }).leaseMs, 40 * DAY, before)
      if (renewed) break
      equal(await store.renew(key, token, 40 * DAY), true, 'renew')
    }
  }),

  conformanceCase('an abandoned claim that is remembered for 40 days can be taken over', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key, { retainMs: 40 * DAY })
    const heir = claim({ takeover: true, retainMs: 40 * DAY })
    answers(await second.acquire(key, heir), { state: 'acquired', attempt: 2 })
  }),

  conformanceCase('without a ttl a record never expires', async ({ store, second }) => {
    let key = ''
    const completed = async (ms: number) => {
      key = newKey()
      const token = await take(store, key, { leaseMs: ms / 2, retainMs: ms / 2 })
      return store.complete(key, token, reply(), null)
    }
    const ms = await inTime(completed, 'complete was false')
    await sleep(ms + 50)
    for (const client of [store, second]) {
      const found = await client.acquire(key, claim({ withTtl: true }))
      replays(found, reply())
      answers(found, { ttlMs: null })
    }
  }),

  conformanceCase('a record outlives the claim that it came from', async ({ store, second }) => {
    let key = ''
    const completed = async (ms: number) => {
      key = newKey()
      const token = await take(store, key, { leaseMs: ms / 2, retainMs: ms / 2 })
      return store.complete(key, token, reply(), LONG)
    }
    const ms = await inTime(completed, 'complete was false')
    await sleep(ms + 50)
    replays(await second.acquire(key, claim({ takeover: true })), reply())
  })
]
