import { randomUUID } from 'node:crypto'
import { setImmediate as immediate } from 'node:timers/promises'
import type { Acquisition } from '../../types/index.js'
import {
  abandoned,
  answers,
  claim,
  equal,
  FRESH,
  LONG,
  lapsed,
  left,
  newKey,
  oneAcquired,
  overtaken,
  parallel,
  passed,
  reply,
  SHORT,
  take,
  until
} from './fixtures.js'
import { conformanceCase } from './harness.js'

// What acquire does: it takes a key, or says what holds it, in one step.

export const claims = [
  conformanceCase('a free key is acquired, with attempt 1', async ({ store, second }) => {
    for (const client of [store, second]) {
      for (const takeover of [false, true]) answers(await client.acquire(newKey(), claim({ takeover })), FRESH)
    }
  }),

  conformanceCase(
    'a key that another token holds is running, with its fingerprint and what is left of its lease',
    async ({ store, second }) => {
      const key = newKey()
      const before = performance.now()
      await take(store, key, { fingerprint: 'the first', leaseMs: LONG })
      for (const client of [store, second]) {
        for (const takeover of [false, true]) {
          const found = await client.acquire(key, claim({ fingerprint: 'another', takeover }))
          answers(found, { state: 'running', fingerprint: 'the first' })
          left((found as { leaseMs: number }).leaseMs, LONG, before)
        }
      }
    }
  ),

  conformanceCase('the same token acquires again what it holds, with the same attempt', async ({ store, second }) => {
    const key = newKey()
    const again = claim()
    for (const client of [store, second, store]) answers(await client.acquire(key, again), FRESH)
    answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
  }),

  conformanceCase(
    'the same token acquires again what it holds after its lease has lapsed',
    async ({ store, second }) => {
      for (const takeover of [false, true]) {
        const key = newKey()
        const token = await lapsed(store, key)
        answers(await store.acquire(key, claim({ token, takeover })), FRESH)
        answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' }, 'a key with a new lease')
      }
    }
  ),

  conformanceCase('whoever acquires again is remembered for the retainMs of then', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { retainMs: 1 })
    answers(await store.acquire(key, claim({ token, leaseMs: SHORT })), FRESH)
    answers(await abandoned(second, key), { state: 'abandoned', attempt: 1 })
  }),

  conformanceCase('whoever acquires again is compared by the fingerprint of then', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { fingerprint: 'the head' })
    answers(await store.acquire(key, claim({ token, fingerprint: 'head and body' })), FRESH)
    answers(await second.acquire(key, claim()), { state: 'running', fingerprint: 'head and body' })
  }),

  conformanceCase('a claim that nothing is lost with is free when its lease has lapsed', async ({ store, second }) => {
    const key = newKey()
    await take(store, key, { leaseMs: SHORT, retainMs: 0 })
    const found = await until(async () => {
      const found = await second.acquire(key, claim())
      return found.state === 'running' ? null : found
    })
    answers(found, FRESH)
  }),

  conformanceCase('of 100 parallel claims by two clients exactly one is acquired', async ({ store, second }) => {
    const key = newKey()
    const tokens = Array.from({ length: 100 }, (_, n) => `token ${n}`)
    const found = await parallel(100, [store, second], (client, n) => {
      const token = tokens[n] as string
      return client.acquire(key, claim({ token, fingerprint: token, takeover: true }))
    })
    oneAcquired(found, 1)
    const owner = tokens[found.findIndex(({ state }) => state === 'acquired')] as string
    for (const other of found) if (other.state === 'running') equal(other.fingerprint, owner, 'what is running')
  }),

  conformanceCase('of parallel claims of many keys exactly one of each key is acquired', async ({ store, second }) => {
    const keys = Array.from({ length: 10 }, newKey)
    const found = await parallel(100, [store, second], (client, n) => client.acquire(keyAt(keys, n >> 1), claim()))
    for (const n of keys.keys())
      oneAcquired(
        found.filter((_, at) => (at >> 1) % keys.length === n),
        1
      )
  }),

  conformanceCase(
    'parallel claims with the same token are all acquired, with the same attempt',
    async ({ store, second }) => {
      const key = newKey()
      const again = claim()
      for (const found of await parallel(10, [store, second], (client) => client.acquire(key, again))) {
        answers(found, FRESH)
      }
      answers(await second.acquire(key, claim()), { state: 'running' })
    }
  ),

  conformanceCase('a claim lapses after its lease, not before', async ({ store, second }) => {
    const key = newKey()
    const leaseMs = 150
    const before = performance.now()
    await take(store, key, { leaseMs })
    await abandoned(second, key)
    passed(leaseMs, before, 'the lease has lapsed')
  }),

  conformanceCase(
    'a lapsed claim is abandoned, and stays so for those who do not take over',
    async ({ store, second }) => {
      const key = newKey()
      await lapsed(store, key, { fingerprint: 'the dead' })
      for (const client of [store, second, store, second]) {
        answers(await client.acquire(key, claim()), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
      }
    }
  ),

  conformanceCase('whoever takes over an abandoned claim has the next attempt', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key)
    for (const attempt of [2, 3, 4]) {
      const fingerprint = `heir ${attempt}`
      const heir = claim({ fingerprint, leaseMs: SHORT, takeover: true })
      answers(await second.acquire(key, heir), { state: 'acquired', attempt })
      answers(await abandoned(store, key), { state: 'abandoned', fingerprint, attempt })
    }
  }),

  conformanceCase(
    'whoever asks to take over finds a key running until it is theirs, and never abandoned',
    async (harness) => {
      // Many moments of lapse, at each of which somebody is likely to ask.
      for (let round = 0; round < 20; round++) {
        const key = newKey()
        await take(harness.store, key, { fingerprint: 'the dead', leaseMs: 5 })
        const found = await parallel(8, [harness.store, harness.second], async (client) => {
          const heir = claim({ fingerprint: 'the heir', takeover: true })
          for (;;) {
            const found = await client.acquire(key, heir)
            if (found.state !== 'running' || found.fingerprint !== 'the dead') return found
            await immediate()
          }
        })
        oneAcquired(found, 2)
      }
    }
  ),

  conformanceCase('whoever took over acquires again with the same attempt', async ({ store, second }) => {
    const key = newKey()
    const { heir } = await overtaken(store, second, key)
    for (const client of [store, second]) {
      answers(await client.acquire(key, claim({ token: heir })), { state: 'acquired', attempt: 2 })
    }
  }),

  conformanceCase('of 50 parallel takeovers by two clients exactly one is acquired', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key)
    oneAcquired(await parallel(50, [store, second], (client) => client.acquire(key, claim({ takeover: true }))), 2)
  }),

  conformanceCase('a claim that was taken over is running for its former owner', async ({ store, second }) => {
    const key = newKey()
    const { token } = await overtaken(store, second, key)
    for (const takeover of [true, false]) {
      const found = await store.acquire(key, claim({ token, takeover }))
      answers(found, { state: 'running', fingerprint: 'the heir' })
    }
  }),

  conformanceCase('an abandoned claim is remembered for retainMs, then forgotten', async ({ store, second }) => {
    const key = newKey()
    const [leaseMs, retainMs] = [50, 250]
    const before = performance.now()
    await take(store, key, { leaseMs, retainMs })
    const next = claim()
    const expected: Acquisition['state'][] = ['running', 'abandoned', 'acquired']
    await until(
      async () => {
        const found = await second.acquire(key, next)
        while (expected.length > 1 && expected[0] !== found.state) expected.shift()
        // A busy machine may miss a state, but none comes back.
        answers(found, { state: expected[0] as 'running' }, 'a claim that is running, then abandoned, then forgotten')
        if (found.state === 'acquired') answers(found, FRESH, 'a key that was forgotten')
        return found.state === 'acquired'
      },
      { message: 'an abandoned claim to be forgotten' }
    )
    passed(leaseMs + retainMs, before, 'the claim was forgotten')
  }),

  conformanceCase('keys do not know of each other', async ({ store, second }) => {
    const keys = Array.from({ length: 20 }, newKey)
    const token = randomUUID()
    for (const key of keys) await take(store, key, { token })
    equal(await store.release(keyAt(keys, 0), token), true, 'release')
    equal(await store.complete(keyAt(keys, 1), token, reply(), LONG), true, 'complete')
    for (const key of keys.slice(2)) answers(await second.acquire(key, claim()), { state: 'running' })
  })
]

function keyAt(keys: string[], n: number): string {
  return keys[n % keys.length] as string
}
