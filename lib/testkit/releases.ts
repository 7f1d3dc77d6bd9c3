import { randomUUID } from 'node:crypto'
import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import {
  abandoned,
  answers,
  claim,
  equal,
  FRESH,
  LONG,
  lapsed,
  newKey,
  oneAcquired,
  overtaken,
  parallel,
  passed,
  replays,
  reply,
  SHORT,
  take,
  until
} from './fixtures.js'
import { caseWith, conformanceCase } from './harness.js'

// What a release leaves behind: nothing of a first attempt, and of a later one what is known of the attempts before.

/** What is found of a claim that took over `lapsed`, and was released. */
const ENDED = { state: 'abandoned', fingerprint: 'the heir', attempt: 2, ended: true } as const

/** What is found of a claim that has lapsed. Nobody has given it back. */
const LAPSED = { state: 'abandoned', fingerprint: 'the dead', attempt: 1, ended: undefined } as object as Acquisition

/** A first attempt that lapsed, and a second one, which was released. Gives the token that has released it. */
async function ended(store: IdempotencyStore, second: IdempotencyStore, key: string): Promise<string> {
  const { heir } = await overtaken(store, second, key)
  equal(await second.release(key, heir), true, 'release by the heir')
  return heir
}

/** A claim that takes over what is there, by its token. */
async function takeOver(store: IdempotencyStore, key: string, attempt: number): Promise<string> {
  const heir = claim({ fingerprint: `attempt ${attempt}`, takeover: true })
  answers(await store.acquire(key, heir), { state: 'acquired', attempt })
  return heir.token
}

export const releases = [
  conformanceCase(
    'a claim that took over and is released is abandoned at once, with its attempt, and says that it has ended',
    async ({ store, second }) => {
      const key = newKey()
      await ended(store, second, key)
      for (const client of [store, second, store, second]) answers(await client.acquire(key, claim()), ENDED)
    }
  ),

  conformanceCase('whoever takes over what was released has the next attempt, and can complete it', async (harness) => {
    const { store, second } = harness
    const key = newKey()
    await ended(store, second, key)
    for (const attempt of [3, 4]) {
      const token = await takeOver(store, key, attempt)
      answers(await second.acquire(key, claim({ takeover: true })), {
        state: 'running',
        fingerprint: `attempt ${attempt}`
      })
      equal(await store.release(key, token), true, 'release')
      const left = { state: 'abandoned', fingerprint: `attempt ${attempt}`, attempt, ended: true } as const
      answers(await second.acquire(key, claim()), left)
    }
    const token = await takeOver(second, key, 5)
    equal(await second.complete(key, token, reply(), LONG), true, 'complete')
    replays(await store.acquire(key, claim({ takeover: true })), reply())
  }),

  conformanceCase(
    'of 50 parallel takeovers of a released attempt exactly one is acquired',
    async ({ store, second }) => {
      const key = newKey()
      await ended(store, second, key)
      oneAcquired(await parallel(50, [store, second], (client) => client.acquire(key, claim({ takeover: true }))), 3)
    }
  ),

  conformanceCase(
    'an attempt that was released is remembered for retainMs from the release on, then forgotten',
    async ({ store, second }) => {
      for (const unused of [false, true]) {
        const key = newKey()
        const retainMs = 250
        await lapsed(store, key)
        const heir = claim({ retainMs, takeover: true })
        answers(await second.acquire(key, heir), { state: 'acquired', attempt: 2 })
        const before = performance.now()
        equal(await second.release(key, heir.token, unused), true, 'release')
        const next = claim()
        const forgotten = async () => {
          const found = await store.acquire(key, next)
          if (found.state !== 'abandoned') answers(found, FRESH, 'a key that was forgotten')
          return found.state === 'acquired'
        }
        await until(forgotten, { message: 'a released attempt to be forgotten' })
        passed(retainMs, before, 'the released attempt was forgotten')
      }
    }
  ),

  conformanceCase('whoever has released an attempt has no say in it any more', async ({ store, second }) => {
    const key = newKey()
    const token = await ended(store, second, key)
    for (const client of [store, second]) {
      equal(await client.renew(key, token, LONG), false, 'renew')
      equal(await client.complete(key, token, reply(), LONG), false, 'complete')
      answers(await client.acquire(key, claim({ token })), ENDED, 'the key, asked for by the same token,')
    }
    answers(await store.acquire(key, claim({ token, takeover: true })), { state: 'acquired', attempt: 3 })
  }),

  conformanceCase(
    'releasing an attempt again with the same token is true again, and changes nothing',
    async ({ store, second }) => {
      const key = newKey()
      const token = await ended(store, second, key)
      for (const client of [store, second]) {
        for (const unused of [false, true]) equal(await client.release(key, token, unused), true, 'release')
        equal(await client.release(key, randomUUID()), false, 'release by another token')
      }
      answers(await store.acquire(key, claim()), ENDED)
      await takeOver(store, key, 3)
      equal(await second.release(key, token), false, 'release after a takeover')
      answers(await second.acquire(key, claim()), { state: 'running', fingerprint: 'attempt 3' })
    }
  ),

  conformanceCase('an attempt that took over and has lapsed can be released as well', async ({ store, second }) => {
    const key = newKey()
    const { heir } = await overtaken(store, second, key)
    equal(await second.renew(key, heir, 1), true, 'renew')
    await abandoned(store, key)
    equal(await second.release(key, heir), true, 'release')
    answers(await store.acquire(key, claim()), ENDED)
  }),

  conformanceCase('only what was released says that it has ended', async ({ store, second }) => {
    const [dead, again] = [newKey(), newKey()]
    await lapsed(store, dead, { fingerprint: 'the dead' })
    answers(await second.acquire(dead, claim()), LAPSED)
    await ended(store, second, again)
    const heir = claim({ fingerprint: 'the dead', leaseMs: SHORT, takeover: true })
    answers(await store.acquire(again, heir), { state: 'acquired', attempt: 3 })
    const found = await abandoned(second, again)
    answers(found, { ...LAPSED, attempt: 3 } as Acquisition, 'what took over, and lapsed,')
  }),

  conformanceCase('a first attempt that is released unused leaves the key free', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    for (const client of [second, store]) equal(await client.release(key, token, true), true, 'release')
    answers(await second.acquire(key, claim()), FRESH)
  }),

  conformanceCase(
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    async ({ store, second }) => {
      const key = newKey()
      await lapsed(store, key, { fingerprint: 'the dead' })
      for (const client of [second, store]) {
        const token = await takeOver(client, key, 2)
        equal(await client.release(key, token, true), true, 'release')
        for (const other of [store, second]) answers(await other.acquire(key, claim()), LAPSED)
        equal(await client.renew(key, token, LONG), false, 'renew after the release')
        equal(await client.complete(key, token, reply(), LONG), false, 'complete after the release')
        equal(await client.release(key, token, true), true, 'release again')
        answers(await second.acquire(key, claim()), LAPSED, 'the key, released again,')
      }
      await takeOver(store, key, 2)
    }
  ),

  conformanceCase(
    'what had ended has ended again when whoever took it over releases it unused',
    async ({ store, second }) => {
      const key = newKey()
      await ended(store, second, key)
      for (const client of [second, store]) {
        equal(await client.release(key, await takeOver(client, key, 3), true), true, 'release')
        for (const other of [store, second]) answers(await other.acquire(key, claim()), ENDED)
      }
    }
  ),

  conformanceCase('a claim that is repeated still knows what it took over', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key, { fingerprint: 'the dead' })
    const heir = claim({ takeover: true })
    for (const client of [store, second, store]) {
      answers(await client.acquire(key, heir), { state: 'acquired', attempt: 2 })
    }
    equal(await second.renew(key, heir.token, LONG), true, 'renew')
    equal(await store.release(key, heir.token, true), true, 'release')
    answers(await second.acquire(key, claim()), LAPSED)
  }),

  caseWith('get', 'get shows an attempt that was released, and leaves it so', async ({ store, second }) => {
    const key = newKey()
    await ended(store, second, key)
    for (const client of [second, store, second]) answers(await client.get(key), ENDED)
    equal(await store.release(key, await takeOver(store, key, 3), true), true, 'release')
    answers(await second.get(key), ENDED)
    const dead = newKey()
    await lapsed(store, dead, { fingerprint: 'the dead' })
    answers(await second.get(dead), LAPSED)
  }),

  caseWith('delete', 'delete forgets an attempt that was released', async ({ store, second }) => {
    const key = newKey()
    const token = await ended(store, second, key)
    equal(await store.delete(key), true, 'delete')
    equal(await second.release(key, token), false, 'release after the deletion')
    answers(await second.acquire(key, claim({ takeover: true })), FRESH)
  })
]
