import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import {
  answers,
  claim,
  equal,
  finish,
  LONG,
  lapsed,
  later,
  newKey,
  ok,
  overtaken,
  replays,
  reply,
  SHORT,
  soon,
  take,
  until
} from './fixtures.js'
import { caseWith, type HarnessWith } from './harness.js'

// Whoever listens to a key hears that it has changed, from wherever and whenever that was.

type Listening = HarnessWith<'changed'>

interface End {
  /** As in "when the key is …". */
  name: string
  by(client: IdempotencyStore, key: string, token: string): Promise<boolean | undefined>
}

const ends: End[] = [
  { name: 'completed', by: (client, key, token) => client.complete(key, token, reply(), LONG) },
  { name: 'completed by a tombstone without a ttl', by: (client, key, token) => entomb(client, key, token) },
  { name: 'released', by: (client, key, token) => client.release(key, token) },
  { name: 'deleted', by: async (client, key) => client.delete?.(key) }
]

function entomb(client: IdempotencyStore, key: string, token: string): Promise<boolean> {
  const { fingerprint, createdAt } = reply()
  return client.complete(key, token, { kind: 'tombstone', reason: 'hijacked', fingerprint, createdAt }, null)
}

/** As a duplicate does that trusts in what it hears. */
async function look(client: Listening['store'], key: string, signal: AbortSignal): Promise<Acquisition> {
  for (;;) {
    const heard = client.changed(key, signal)
    const found = await client.acquire(key, claim())
    if (found.state !== 'running') return found
    await heard
  }
}

/** By the same client, and by either of two. */
function pairs({ store, second }: Listening) {
  return [
    { listener: store, owner: store },
    { listener: store, owner: second },
    { listener: second, owner: store }
  ]
}

const eachEnd = ({ name, by }: End) => {
  const promisedOf = (sentence: string, keep: (harness: Listening) => Promise<void>) =>
    caseWith('changed', sentence, async (harness) => {
      // Where nothing can be deleted there is nothing to hear of that.
      if (name !== 'deleted' || harness.store.delete) await keep(harness)
    })
  return [
    promisedOf(`whoever listens hears when the key is ${name}, by whichever client`, async (harness) => {
      const heard = pairs(harness).map(async ({ listener, owner }) => {
        const key = newKey()
        const token = await take(owner, key)
        const heard = listener.changed(key, harness.signal)
        // With the subscription in place for certain, and without it in the next case.
        await sleep(50)
        equal(await by(owner, key, token), true, `the key being ${name}`)
        await soon(heard, `the listener to hear that the key is ${name}`)
      })
      await Promise.all(heard)
    }),

    promisedOf(`whoever listens hears when the key is ${name} immediately after the call`, async (harness) => {
      for (let round = 0; round < 8; round++) {
        for (const { listener, owner } of pairs(harness)) {
          const key = newKey()
          const token = await take(owner, key)
          const heard = listener.changed(key, harness.signal)
          // Some of the time that a subscription may take, and none of it.
          if (round > 3) await sleep(round - 3)
          const ended = later(by(owner, key, token))
          await soon(heard, `the listener to hear that the key is ${name}`)
          equal(await ended, true, `the key being ${name}`)
        }
      }
    }),

    promisedOf(`each of several who listen hears when the key is ${name}`, async (harness) => {
      const { store, second, signal } = harness
      const key = newKey()
      const token = await take(store, key)
      const heard = [store, store, second, store, second].map((client) => client.changed(key, signal))
      await sleep(50)
      heard.push(store.changed(key, signal), second.changed(key, signal))
      equal(await by(second, key, token), true, `the key being ${name}`)
      await soon(Promise.all(heard), `all listeners to hear that the key is ${name}`)
    })
  ]
}

export const wakeUps = [
  ...ends.flatMap(eachEnd),

  caseWith('changed', 'whoever listens and looks in turn comes to see that the claim has ended', async (harness) => {
    for (let round = 0; round < 4; round++) {
      for (const { listener, owner } of pairs(harness)) {
        const key = newKey()
        const token = await take(owner, key)
        const seen = later(look(listener, key, harness.signal))
        if (round % 2 === 0) await sleep(round * 10)
        equal(await owner.complete(key, token, reply(), LONG), true, 'complete')
        replays(await soon(seen, 'the listener to see that the key is completed'), reply())
      }
    }
  }),

  caseWith(
    'changed',
    'whoever listens hears nothing while nothing happens to the key',
    async ({ store, second, signal }) => {
      const [key, other] = [newKey(), newKey()]
      const [token, otherToken] = [await take(store, key), await take(store, other)]
      let heard = 0
      const listened = [store, second].map((client) => later(client.changed(key, signal).then(() => heard++)))
      equal(await store.renew(key, token, LONG), true, 'renew')
      equal(await store.complete(key, randomUUID(), reply(), LONG), false, 'complete by another token')
      equal(await store.release(key, randomUUID()), false, 'release by another token')
      answers(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
      equal(await second.complete(other, otherToken, reply(), LONG), true, 'complete of another key')
      await sleep(100)
      ok(heard === 0, `${heard} of 2 listeners heard of a key to which nothing had happened`)
      await store.release(key, token)
      await soon(Promise.all(listened), 'the listeners to hear of the release')
    }
  ),

  caseWith('changed', 'listening ends at once where no claim is running', async ({ store, second, signal }) => {
    const [unknown, completed, released, abandoned, ended] = [newKey(), newKey(), newKey(), newKey(), newKey()]
    await finish(store, completed)
    await store.release(released, await take(store, released))
    await lapsed(store, abandoned)
    const { heir } = await overtaken(store, second, ended)
    await second.release(ended, heir)
    for (const client of [store, second]) {
      for (const [name, key] of Object.entries({ unknown, completed, released, abandoned, ended })) {
        await soon(client.changed(key, signal), `listening to end where the key is ${name}`)
      }
    }
  }),

  caseWith('changed', 'listening ends at once when the signal has aborted before', async ({ store, second }) => {
    const key = newKey()
    await take(store, key)
    for (const client of [store, second]) await soon(client.changed(key, AbortSignal.abort()), 'listening to end')
  }),

  caseWith('changed', 'listening ends when the signal aborts, and others go on', async ({ store, signal }) => {
    const key = newKey()
    const token = await take(store, key)
    let heard = 0
    const others = [store, store].map((client) => later(client.changed(key, signal).then(() => heard++)))
    for (const pause of [0, SHORT, 50]) {
      const stop = new AbortController()
      const listened = store.changed(key, stop.signal)
      if (pause > 0) await sleep(pause)
      stop.abort()
      await soon(listened, 'listening to end')
    }
    await sleep(SHORT)
    ok(heard === 0, `${heard} of 2 others heard of a key to which nothing had happened`)
    await store.complete(key, token, reply(), LONG)
    await soon(Promise.all(others), 'the others to hear of the completion')
  }),

  caseWith('changed', 'one can listen to a key again and again', async ({ store, second, signal }) => {
    const key = newKey()
    for (let round = 0; round < 10; round++) {
      const token = await take(store, key)
      const heard = second.changed(key, signal)
      await store.release(key, token)
      await soon(heard, 'the listener to hear of the release')
    }
  }),

  caseWith(
    'changed',
    'whoever listens to a claim that is taken over hears of its end',
    async ({ store, second, signal }) => {
      const key = newKey()
      await take(store, key, { leaseMs: 150 })
      const heard = [store.changed(key, signal), second.changed(key, signal)]
      const heir = claim({ takeover: true })
      const takenOver = async () => (await second.acquire(key, heir)).state === 'acquired'
      await until(takenOver, { message: 'the claim to be taken over' })
      equal(await second.complete(key, heir.token, reply(), LONG), true, 'complete by the heir')
      await soon(Promise.all(heard), 'the listeners to hear of the completion')
    }
  ),

  caseWith(
    'changed',
    'whoever listens to a claim that took over hears when it is released',
    async ({ store, second, signal }) => {
      for (const unused of [false, true]) {
        const key = newKey()
        const { heir } = await overtaken(store, second, key)
        const heard = [store, second].map((client) => client.changed(key, signal))
        await sleep(50)
        equal(await second.release(key, heir, unused), true, 'release')
        await soon(Promise.all(heard), 'the listeners to hear of the release')
      }
    }
  ),

  caseWith(
    'changed',
    'whoever listens to a claim that its owner claims and renews again hears of its end',
    async ({ store, second, signal }) => {
      const key = newKey()
      const mine = claim()
      await store.acquire(key, mine)
      const heard = second.changed(key, signal)
      await sleep(SHORT)
      answers(await store.acquire(key, mine), { state: 'acquired' })
      equal(await store.renew(key, mine.token, LONG), true, 'renew')
      equal(await store.complete(key, mine.token, reply(), LONG), true, 'complete')
      await soon(heard, 'the listener to hear of the completion')
    }
  )
]
