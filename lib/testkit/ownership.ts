import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import {
  abandoned,
  answers,
  claim,
  equal,
  FRESH,
  finish,
  inTime,
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
import { conformanceCase } from './harness.js'

// What the owner's token may do with a key, and that no other may.

interface Step {
  name: string
  by(store: IdempotencyStore, key: string, token: string): Promise<boolean>
  /** What others find afterwards, when the token was the owner's. */
  effect(found: Acquisition): void
}

const late = reply({ fingerprint: 'late' })

const steps: Step[] = [
  {
    name: 'renew',
    by: (store, key, token) => store.renew(key, token, LONG),
    effect: (found) => answers(found, { state: 'running' }, 'a renewed claim')
  },
  {
    name: 'complete',
    by: (store, key, token) => store.complete(key, token, late, LONG),
    effect: (found) => replays(found, late, 'a completed key')
  },
  {
    name: 'release',
    by: (store, key, token) => store.release(key, token),
    effect: (found) => answers(found, FRESH, 'a released key')
  }
]

/** Nobody of these owns the key. */
async function refused(store: IdempotencyStore, key: string, token: string): Promise<void> {
  for (const { name, by } of steps) equal(await by(store, key, token), false, `${name} by who does not own the key`)
}

const eachStep = ({ name, by, effect }: Step) => [
  conformanceCase(`${name} by the owner is true, by whichever client it comes`, async ({ store, second }) => {
    for (const client of [store, second]) {
      const key = newKey()
      equal(await by(client, key, await take(store, key)), true, name)
      for (const other of [store, second]) {
        const found = await other.acquire(key, claim())
        effect(found)
        if (found.state === 'acquired') break
      }
    }
  }),

  conformanceCase(`${name} by another token is false and changes nothing`, async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { fingerprint: 'the owner' })
    for (const client of [store, second]) {
      equal(await by(client, key, randomUUID()), false, name)
      answers(await client.acquire(key, claim()), { state: 'running', fingerprint: 'the owner' })
    }
    equal(await store.renew(key, token, LONG), true, 'renew by the owner')
  }),

  conformanceCase(`${name} of a lapsed claim that nobody took is true`, async ({ store, second }) => {
    const key = newKey()
    const token = await lapsed(store, key)
    equal(await by(store, key, token), true, name)
    effect(await second.acquire(key, claim()))
  }),

  conformanceCase(`${name} of an abandoned claim by another token is false and changes nothing`, async ({ store }) => {
    const key = newKey()
    await lapsed(store, key, { fingerprint: 'the dead' })
    equal(await by(store, key, randomUUID()), false, name)
    answers(await store.acquire(key, claim()), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
  }),

  conformanceCase(`${name} after a takeover is false and changes nothing`, async ({ store, second }) => {
    const key = newKey()
    const { token, heir } = await overtaken(store, second, key)
    equal(await by(store, key, token), false, name)
    answers(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the heir' })
    equal(await second.renew(key, heir, LONG), true, 'renew by the heir')
  }),

  conformanceCase(`${name} of a key that nobody claimed is false and changes nothing`, async ({ store, second }) => {
    const key = newKey()
    equal(await by(store, key, randomUUID()), false, name)
    answers(await second.acquire(key, claim()), FRESH)
  }),

  conformanceCase(
    `${name} by another token after the completion is false and changes nothing`,
    async ({ store, second }) => {
      const key = newKey()
      const kept = reply({ fingerprint: 'kept' })
      await finish(store, key, kept)
      equal(await by(second, key, randomUUID()), false, name)
      replays(await store.acquire(key, claim()), kept)
    }
  ),

  conformanceCase(
    `${name} by another token after the release is false and changes nothing`,
    async ({ store, second }) => {
      const key = newKey()
      await store.release(key, await take(store, key))
      for (const client of [store, second]) equal(await by(client, key, randomUUID()), false, name)
      answers(await second.acquire(key, claim()), FRESH)
    }
  ),

  conformanceCase(`${name} of a claim that was forgotten is false and changes nothing`, async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { leaseMs: 1, retainMs: SHORT })
    await sleep(SHORT + 50)
    equal(await by(store, key, token), false, name)
    answers(await second.acquire(key, claim()), FRESH)
  })
]

export const ownership = [
  ...steps.flatMap(eachStep),

  conformanceCase('a renewed claim lives for the new lease from the renewal on', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { leaseMs: SHORT })
    const leaseMs = 200
    const before = performance.now()
    equal(await store.renew(key, token, leaseMs), true, 'renew')
    await abandoned(second, key)
    passed(leaseMs, before, 'the new lease has lapsed')
  }),

  conformanceCase('a lapsed claim that was renewed is safe from takeovers again', async ({ store, second }) => {
    const key = newKey()
    const token = await lapsed(store, key, { fingerprint: 'back again' })
    await store.renew(key, token, LONG)
    const found = await second.acquire(key, claim({ takeover: true }))
    answers(found, { state: 'running', fingerprint: 'back again' })
  }),

  conformanceCase('renewing keeps the attempt', async ({ store, second }) => {
    const key = newKey()
    const { heir } = await overtaken(store, second, key)
    await store.renew(key, heir, 1)
    answers(await abandoned(store, key), { state: 'abandoned', fingerprint: 'the heir', attempt: 2 })
  }),

  conformanceCase(
    'a claim that was renewed outlives the time for which it was to be remembered',
    async ({ store, second }) => {
      let key = ''
      const renewed = async (ms: number) => {
        key = newKey()
        const token = await take(store, key, { leaseMs: ms / 2, retainMs: ms / 2 })
        return store.renew(key, token, LONG)
      }
      const ms = await inTime(renewed, 'renew was false')
      await sleep(ms + 50)
      answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
    }
  ),

  conformanceCase(
    'renewing after the completion or the release is false and changes nothing',
    async ({ store, second }) => {
      const [done, given] = [newKey(), newKey()]
      const token = await finish(store, done)
      equal(await store.renew(done, token, LONG), false, 'renew after the completion')
      replays(await second.acquire(done, claim()), reply())
      await take(store, given, { token })
      await store.release(given, token)
      equal(await store.renew(given, token, LONG), false, 'renew after the release')
      answers(await second.acquire(given, claim()), FRESH)
    }
  ),

  conformanceCase(
    'a completed key is completed for everybody, its owner included, whoever wants to take over',
    async ({ store, second }) => {
      const key = newKey()
      const token = await finish(store, key)
      for (const client of [store, second]) {
        for (const asked of [claim(), claim({ takeover: true }), claim({ token }), claim({ token, takeover: true })]) {
          replays(await client.acquire(key, asked), reply())
        }
      }
    }
  ),

  conformanceCase(
    'completing again with the same token is true again, and the first record stays',
    async ({ store, second }) => {
      const key = newKey()
      const first = reply({ fingerprint: 'first' })
      const token = await finish(store, key, first)
      for (const client of [store, second]) {
        const again = reply({ fingerprint: 'second', body: Buffer.from('second') })
        equal(await client.complete(key, token, again, LONG), true, 'complete')
        replays(await client.acquire(key, claim()), first)
      }
    }
  ),

  conformanceCase(
    'the record of whoever took over is not overwritten by the former owner',
    async ({ store, second }) => {
      const key = newKey()
      const { token, heir } = await overtaken(store, second, key)
      const kept = reply({ fingerprint: 'the heir' })
      equal(await second.complete(key, heir, kept, LONG), true, 'complete by the heir')
      await refused(store, key, token)
      replays(await store.acquire(key, claim()), kept)
    }
  ),

  conformanceCase('completing after the release is false, and the key stays free', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    await store.release(key, token)
    equal(await store.complete(key, token, late, LONG), false, 'complete')
    answers(await second.acquire(key, claim()), FRESH)
  }),

  conformanceCase('releasing after the completion is false, and the record stays', async ({ store, second }) => {
    const key = newKey()
    const token = await finish(store, key)
    equal(await store.release(key, token), false, 'release')
    replays(await second.acquire(key, claim()), reply())
  }),

  conformanceCase(
    'releasing again with the same token is true again while the key is free',
    async ({ store, second }) => {
      const key = newKey()
      const token = await take(store, key)
      for (const client of [store, store, second]) equal(await client.release(key, token), true, 'release')
      answers(await second.acquire(key, claim()), FRESH)
    }
  ),

  conformanceCase('releasing what another token has released is false', async ({ store, second }) => {
    const key = newKey()
    await store.release(key, await take(store, key))
    equal(await second.release(key, randomUUID()), false, 'release')
  }),

  conformanceCase('the token that released a key can claim it again', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    await store.release(key, token)
    answers(await store.acquire(key, claim({ token })), FRESH)
    answers(await second.acquire(key, claim()), { state: 'running' })
  }),

  conformanceCase('of 50 parallel claims of a released key exactly one is acquired', async ({ store, second }) => {
    const key = newKey()
    await store.release(key, await take(store, key))
    oneAcquired(await parallel(50, [store, second], (client) => client.acquire(key, claim({ takeover: true }))), 1)
  }),

  conformanceCase(
    'whoever released a key has no say in what the next owner does with it',
    async ({ store, second }) => {
      const key = newKey()
      const old = await take(store, key)
      await store.release(key, old)
      const owner = await take(second, key, { fingerprint: 'the next' })
      await refused(store, key, old)
      answers(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the next' })
      const kept = reply({ fingerprint: 'the next' })
      equal(await second.complete(key, owner, kept, LONG), true, 'complete by the next owner')
      await refused(store, key, old)
      replays(await store.acquire(key, claim()), kept)
    }
  ),

  conformanceCase('whoever was forgotten has no say in what the next owner does with it', async ({ store, second }) => {
    const key = newKey()
    const old = await take(store, key, { leaseMs: 1, retainMs: SHORT })
    const owner = claim({ fingerprint: 'the next' })
    const forgotten = async () => (await second.acquire(key, owner)).state === 'acquired'
    await until(forgotten, { message: 'the claim to be forgotten' })
    await refused(store, key, old)
    answers(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the next' })
    equal(await second.renew(key, owner.token, LONG), true, 'renew by the next owner')
  })
]
