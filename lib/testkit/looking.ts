import { setTimeout as sleep } from 'node:timers/promises'
import {
  answers,
  claim,
  equal,
  FRESH,
  finish,
  LONG,
  lapsed,
  left,
  newKey,
  ok,
  overtaken,
  replays,
  reply,
  SHORT,
  SLACK,
  take,
  tombstone,
  until
} from './fixtures.js'
import { caseWith } from './harness.js'

// What is done beside requests: get, delete, close.

export const looking = [
  caseWith('get', 'get gives null for a key that nobody claimed, and does not claim it', async (harness) => {
    const { store, second } = harness
    const key = newKey()
    for (const client of [store, second]) equal(await client.get(key), null, 'get')
    answers(await store.acquire(key, claim()), FRESH)
  }),

  caseWith('get', 'get shows a running claim, and leaves it so', async ({ store, second }) => {
    const key = newKey()
    const before = performance.now()
    const token = await take(store, key, { fingerprint: 'at work' })
    for (const client of [second, store, second]) {
      const found = await client.get(key)
      answers(found, { state: 'running', fingerprint: 'at work' })
      left((found as { leaseMs: number }).leaseMs, LONG, before)
    }
    equal(await store.renew(key, token, LONG), true, 'renew by the owner')
  }),

  caseWith('get', 'get does not prolong a lease', async ({ store, second }) => {
    const key = newKey()
    await take(store, key, { leaseMs: 50, fingerprint: 'the dead' })
    const found = await until(
      async () => {
        const found = await second.get(key)
        return found?.state !== 'running' && { found }
      },
      { message: 'a lease to lapse' }
    )
    answers((found as Exclude<typeof found, false>).found, { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
  }),

  caseWith('get', 'get shows an abandoned claim and its attempt, and leaves it so', async ({ store, second }) => {
    const [key, later] = [newKey(), newKey()]
    await lapsed(store, key, { fingerprint: 'the dead' })
    for (const client of [second, store, second]) {
      answers(await client.get(key), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
    }
    answers(await store.acquire(key, claim({ takeover: true })), { state: 'acquired', attempt: 2 })
    const { heir } = await overtaken(store, second, later)
    await store.renew(later, heir, 1)
    const lapse = async () => {
      const found = await second.get(later)
      return found?.state === 'abandoned' && found
    }
    const found = await until(lapse, { message: 'get to show an abandoned claim' })
    answers(found || null, { state: 'abandoned', fingerprint: 'the heir', attempt: 2 })
  }),

  caseWith('get', 'get shows a record and what is left of its ttl', async ({ store, second }) => {
    for (const record of [reply(), tombstone('hijacked')]) {
      for (const ttlMs of [LONG, null]) {
        const key = newKey()
        const before = performance.now()
        await finish(store, key, record, ttlMs)
        for (const client of [second, store]) {
          const found = await client.get(key)
          replays(found, record)
          const { ttlMs: leftMs } = found as { ttlMs: number | null }
          if (ttlMs === null) equal(leftMs, null, 'what is left of no ttl')
          else left(leftMs, ttlMs, before)
        }
      }
    }
  }),

  caseWith('get', 'get does not prolong the life of a record', async ({ store, second }) => {
    const key = newKey()
    await finish(store, key)
    await sleep(60)
    for (const client of [second, store, second]) {
      const found = await client.get(key)
      replays(found, reply())
      const { ttlMs } = found as { ttlMs: number }
      ok(ttlMs <= LONG - 60 + SLACK, `${ttlMs} ms are left of ${LONG}, of which 60 have passed`)
    }
  }),

  caseWith('get', 'get gives null for a key that was released, expired or forgotten', async ({ store, second }) => {
    const [released, expired, forgotten] = [newKey(), newKey(), newKey()]
    await store.release(released, await take(store, released))
    for (const client of [store, second]) equal(await client.get(released), null, 'get of a released key')
    await finish(store, expired, reply(), SHORT)
    await take(store, forgotten, { leaseMs: 1, retainMs: SHORT })
    for (const client of [store, second]) {
      for (const [name, key] of Object.entries({ expired, forgotten })) {
        await until(async () => (await client.get(key)) === null, {
          message: `get of a key that is ${name} to give null`
        })
      }
    }
  }),

  caseWith('delete', 'delete of a key that holds nothing is false', async ({ store, second }) => {
    const [unknown, released, expired] = [newKey(), newKey(), newKey()]
    equal(await second.delete(unknown), false, 'delete of a key that nobody claimed')
    await store.release(released, await take(store, released))
    equal(await second.delete(released), false, 'delete of a released key')
    answers(await store.acquire(released, claim()), FRESH)
    await finish(store, expired, reply(), 1)
    await sleep(50)
    equal(await second.delete(expired), false, 'delete of a key whose record has expired')
  }),

  caseWith('delete', 'delete forgets a record', async ({ store, second }) => {
    for (const ttlMs of [LONG, null]) {
      const key = newKey()
      const token = await finish(store, key, reply(), ttlMs)
      equal(await second.delete(key), true, 'delete')
      equal(await second.delete(key), false, 'delete again')
      equal(await store.complete(key, token, reply(), LONG), false, 'complete by the former owner')
      if (store.get) equal(await store.get(key), null, 'get')
      answers(await store.acquire(key, claim()), FRESH)
    }
  }),

  caseWith('delete', 'delete forgets an abandoned claim, and its attempts', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key)
    equal(await second.delete(key), true, 'delete')
    answers(await store.acquire(key, claim({ takeover: true })), FRESH)
  }),

  caseWith('delete', 'delete takes a running claim from its owner', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    equal(await second.delete(key), true, 'delete')
    equal(await store.renew(key, token, LONG), false, 'renew by the former owner')
    equal(await store.complete(key, token, reply(), LONG), false, 'complete by the former owner')
    equal(await store.release(key, token), false, 'release by the former owner')
    answers(await second.acquire(key, claim()), FRESH)
  }),

  caseWith('delete', 'delete leaves other keys as they are', async ({ store, second }) => {
    const [gone, running, done] = [newKey(), newKey(), newKey()]
    await finish(store, gone)
    await take(store, running)
    await finish(store, done)
    equal(await second.delete(gone), true, 'delete')
    answers(await store.acquire(running, claim({ takeover: true })), { state: 'running' }, 'another key')
    replays(await store.acquire(done, claim()), reply(), 'another key')
  }),

  caseWith('delete', 'delete unless it is running leaves a running claim', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    equal(await second.delete(key, true), false, 'delete')
    equal(await store.renew(key, token, LONG), true, 'renew by the owner')
    equal(await store.complete(key, token, reply(), LONG), true, 'complete by the owner')
  }),

  caseWith('delete', 'delete unless it is running forgets records and abandoned claims', async ({ store, second }) => {
    const [done, dead, unknown] = [newKey(), newKey(), newKey()]
    await finish(store, done)
    await lapsed(store, dead)
    equal(await second.delete(unknown, true), false, 'delete of a key that nobody claimed')
    for (const key of [done, dead]) {
      equal(await second.delete(key, true), true, 'delete')
      answers(await store.acquire(key, claim({ takeover: true })), FRESH)
    }
  }),

  caseWith('close', 'close can be called again and again', async ({ store }) => {
    const key = newKey()
    await finish(store, key)
    for (let n = 0; n < 3; n++) await store.close()
    await Promise.all([store.close(), store.close()])
  }),

  caseWith('close', 'close lets go of one client only, and of no data', async ({ store, second }) => {
    if (second === store) return
    const [running, done] = [newKey(), newKey()]
    const token = await take(store, running)
    await finish(store, done)
    await store.close()
    answers(await second.acquire(running, claim({ takeover: true })), { state: 'running' })
    replays(await second.acquire(done, claim()), reply())
    equal(await second.complete(running, token, reply(), LONG), true, 'complete by the owner')
  })
]
