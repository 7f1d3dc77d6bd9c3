import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import type { Acquisition, Claim, IdempotencyStore, StoredRecord, StoredReply, Tombstone } from '../../types/index.js'
import { until } from './latch.js'

/** A store under test. */
export interface Subject {
  store: IdempotencyStore
  /** Another client on the same data. */
  second?: IdempotencyStore
  dispose?(): unknown
}

export type Factory = () => Subject | Promise<Subject>

type Clients = Required<Pick<Subject, 'store' | 'second'>>

/** Longer than any test: what has this lease does not lapse. */
const LONG = 60_000
/** So short that waiting for its end costs nothing. */
const SHORT = 20
const DAY = 86_400_000

/** Everything that is promised of a store. */
export function storeSpec(t: Test, name: string, factory: Factory): Promise<unknown> {
  return onSubject(t, name, factory, async (t, clients) => {
    await claims(t, clients)
    await ownership(t, clients)
    await lifetimes(t, clients)
    await records(t, clients)
    await hostileText(t, clients)
    await copies(t, clients)
    await listening(t, clients)
    await looking(t, clients)
  })
}

/** What is promised of claims and their tokens; holds as well for a caller who repeats what may have got lost. */
export function ownershipSpec(t: Test, name: string, factory: Factory): Promise<unknown> {
  return onSubject(t, name, factory, async (t, clients) => {
    await claims(t, clients)
    await ownership(t, clients)
  })
}

function onSubject(
  t: Test,
  name: string,
  factory: Factory,
  spec: (t: Test, clients: Clients) => Promise<void>
): Promise<unknown> {
  return t.test(name, async (t) => {
    const { store, second = store, dispose } = await factory()
    t.teardown(async () => dispose?.())
    await spec(t, { store, second })
  })
}

async function claims(t: Test, { store, second }: Clients): Promise<void> {
  await t.test('a free key is acquired, with attempt 1', async (t) => {
    t.strictSame(await store.acquire(newKey(), claim()), { state: 'acquired', attempt: 1 })
  })

  await t.test(
    'a key that another token holds is running, with its fingerprint and what is left of its lease',
    async (t) => {
      const key = newKey()
      const before = performance.now()
      await take(store, key, { fingerprint: 'the first', leaseMs: LONG })
      for (const other of [store, second]) {
        for (const takeover of [false, true]) {
          const found = await other.acquire(key, claim({ fingerprint: 'another', takeover }))
          const passed = performance.now() - before
          t.match(found, { state: 'running', fingerprint: 'the first' })
          const { leaseMs } = found as { leaseMs: number }
          t.ok(leaseMs <= LONG && leaseMs >= LONG - passed - 10, `${leaseMs} ms are left after ${passed} ms`)
        }
      }
    }
  )

  await t.test('the same token acquires again what it holds, with the same attempt', async (t) => {
    const key = newKey()
    const again = claim()
    for (const client of [store, second, store]) {
      t.strictSame(await client.acquire(key, again), { state: 'acquired', attempt: 1 })
    }
  })

  await t.test('the same token acquires again what it holds after its lease has lapsed', async (t) => {
    const key = newKey()
    const token = await lapsed(store, key)
    t.strictSame(await store.acquire(key, claim({ token })), { state: 'acquired', attempt: 1 })
    t.match(await second.acquire(key, claim({ takeover: true })), { state: 'running' }, 'its new lease counts')
  })

  await t.test('of 100 parallel claims by two clients exactly one is acquired', async (t) => {
    const key = newKey()
    const tokens = Array.from({ length: 100 }, (_, n) => `token ${n}`)
    const found = await Promise.all(
      tokens.map((token, n) =>
        (n % 2 === 0 ? store : second).acquire(key, claim({ token, fingerprint: token, takeover: true }))
      )
    )
    const owners = tokens.filter((_, n) => found[n]?.state === 'acquired')
    t.equal(owners.length, 1)
    const others = found.filter(({ state }) => state !== 'acquired')
    t.match(
      others,
      others.map(() => ({ state: 'running', fingerprint: owners[0] }))
    )
  })

  await t.test('a claim lapses after its lease, not before', async (t) => {
    const key = newKey()
    const leaseMs = 150
    const before = performance.now()
    await take(store, key, { leaseMs })
    await until(async () => (await second.acquire(key, claim())).state === 'abandoned')
    const passed = performance.now() - before
    t.ok(passed >= leaseMs - 2, `lapsed after ${passed} ms`)
  })

  await t.test('a lapsed claim is abandoned, and stays so for those who do not take over', async (t) => {
    const key = newKey()
    await lapsed(store, key, { fingerprint: 'the dead' })
    for (const client of [store, second, store, second]) {
      t.strictSame(await client.acquire(key, claim()), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
    }
  })

  await t.test('whoever takes over an abandoned claim has the next attempt', async (t) => {
    const key = newKey()
    await lapsed(store, key)
    for (const attempt of [2, 3]) {
      const heir = claim({ fingerprint: `heir ${attempt}`, leaseMs: SHORT, takeover: true })
      t.strictSame(await second.acquire(key, heir), { state: 'acquired', attempt })
      const found = await until(async () => {
        const found = await store.acquire(key, claim())
        return found.state === 'abandoned' && found
      })
      t.strictSame(found, { state: 'abandoned', fingerprint: `heir ${attempt}`, attempt })
    }
  })

  await t.test('of 50 parallel takeovers by two clients exactly one is acquired', async (t) => {
    const key = newKey()
    await lapsed(store, key)
    const found = await Promise.all(
      Array.from({ length: 50 }, (_, n) => (n % 2 === 0 ? store : second).acquire(key, claim({ takeover: true })))
    )
    t.strictSame(
      found.filter(({ state }) => state !== 'running'),
      [{ state: 'acquired', attempt: 2 }]
    )
  })

  await t.test('a claim that was taken over is running for its former owner', async (t) => {
    const key = newKey()
    const { token } = await overtaken(store, second, key)
    t.match(await store.acquire(key, claim({ token, takeover: true })), { state: 'running', fingerprint: 'the heir' })
  })

  await t.test('an abandoned claim is remembered for retainMs, then forgotten', async (t) => {
    const key = newKey()
    const [leaseMs, retainMs] = [50, 250]
    const before = performance.now()
    await take(store, key, { leaseMs, retainMs })
    const next = claim()
    const states: string[] = []
    await until(async () => {
      const found = await second.acquire(key, next)
      if (states.at(-1) !== found.state) states.push(found.state)
      if (found.state === 'acquired') t.equal(found.attempt, 1, 'it is as if it had never been')
      return found.state === 'acquired'
    })
    const passed = performance.now() - before
    t.ok(passed >= leaseMs + retainMs - 2, `forgotten after ${passed} ms`)
    const order = ['running', 'abandoned', 'acquired']
    t.strictSame(
      states,
      order.filter((state) => states.includes(state)),
      'nothing else, and in this order'
    )
  })

  await t.test('keys do not know of each other', async (t) => {
    const keys = Array.from({ length: 20 }, newKey)
    const token = randomUUID()
    for (const key of keys) await take(store, key, { token })
    t.equal(await store.release(keys[0] as string, token), true)
    t.equal(await store.complete(keys[1] as string, token, reply(), LONG), true)
    for (const key of keys.slice(2)) t.match(await second.acquire(key, claim()), { state: 'running' })
  })
}

async function ownership(t: Test, { store, second }: Clients): Promise<void> {
  const record = reply({ fingerprint: 'late' })
  const steps: [name: string, (store: IdempotencyStore, key: string, token: string) => Promise<boolean>][] = [
    ['renew', (store, key, token) => store.renew(key, token, LONG)],
    ['complete', (store, key, token) => store.complete(key, token, record, LONG)],
    ['release', (store, key, token) => store.release(key, token)]
  ]

  for (const [name, step] of steps) {
    await t.test(`${name} by the owner is true, by whichever client it comes`, async (t) => {
      for (const client of [store, second]) {
        const key = newKey()
        const token = await take(store, key)
        t.equal(await step(client, key, token), true)
      }
    })

    await t.test(`${name} by another token is false and changes nothing`, async (t) => {
      const key = newKey()
      const token = await take(store, key, { fingerprint: 'the owner' })
      t.equal(await step(second, key, randomUUID()), false)
      t.match(await second.acquire(key, claim()), { state: 'running', fingerprint: 'the owner' })
      t.equal(await store.renew(key, token, LONG), true)
    })

    await t.test(`${name} of a lapsed claim that nobody took is true`, async (t) => {
      const key = newKey()
      const token = await lapsed(store, key)
      t.equal(await step(store, key, token), true)
    })

    await t.test(`${name} of an abandoned claim by another token is false and changes nothing`, async (t) => {
      const key = newKey()
      await lapsed(store, key, { fingerprint: 'the dead' })
      t.equal(await step(store, key, randomUUID()), false)
      t.strictSame(await store.acquire(key, claim()), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
    })

    await t.test(`${name} after a takeover is false and changes nothing`, async (t) => {
      const key = newKey()
      const { token, heir } = await overtaken(store, second, key)
      t.equal(await step(store, key, token), false)
      t.match(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the heir' })
      t.equal(await second.renew(key, heir, LONG), true)
    })

    await t.test(`${name} of a key that nobody claimed is false and changes nothing`, async (t) => {
      const key = newKey()
      t.equal(await step(store, key, randomUUID()), false)
      t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })

    await t.test(`${name} by another token after the completion is false and changes nothing`, async (t) => {
      const key = newKey()
      const token = await take(store, key)
      const kept = reply({ fingerprint: 'kept' })
      await store.complete(key, token, kept, LONG)
      t.equal(await step(second, key, randomUUID()), false)
      same(t, await store.acquire(key, claim()), kept)
    })

    await t.test(`${name} of a claim that was forgotten is false and changes nothing`, async (t) => {
      const key = newKey()
      const token = await take(store, key, { leaseMs: 1, retainMs: SHORT })
      await sleep(SHORT + 30)
      t.equal(await step(store, key, token), false)
      t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })
  }

  await t.test('a renewed claim lives for the new lease from the renewal on', async (t) => {
    const key = newKey()
    const token = await take(store, key, { leaseMs: SHORT })
    const leaseMs = 200
    const before = performance.now()
    t.equal(await store.renew(key, token, leaseMs), true)
    await until(async () => (await second.acquire(key, claim())).state === 'abandoned')
    const passed = performance.now() - before
    t.ok(passed >= leaseMs - 2, `lapsed ${passed} ms after the renewal`)
  })

  await t.test('a lapsed claim that was renewed is safe from takeovers again', async (t) => {
    const key = newKey()
    const token = await lapsed(store, key, { fingerprint: 'back again' })
    await store.renew(key, token, LONG)
    const found = await second.acquire(key, claim({ takeover: true }))
    t.match(found, { state: 'running', fingerprint: 'back again' })
  })

  await t.test('renewing keeps the attempt', async (t) => {
    const key = newKey()
    const { heir } = await overtaken(store, second, key)
    await store.renew(key, heir, 1)
    const found = await until(async () => {
      const found = await store.acquire(key, claim())
      return found.state === 'abandoned' && found
    })
    t.strictSame(found, { state: 'abandoned', fingerprint: 'the heir', attempt: 2 })
  })

  await t.test('renewing after the completion or the release is false and changes nothing', async (t) => {
    const [done, given] = [newKey(), newKey()]
    const token = await take(store, done)
    await store.complete(done, token, record, LONG)
    t.equal(await store.renew(done, token, LONG), false)
    same(t, await second.acquire(done, claim()), record)
    await take(store, given, { token })
    await store.release(given, token)
    t.equal(await store.renew(given, token, LONG), false)
    t.strictSame(await second.acquire(given, claim()), { state: 'acquired', attempt: 1 })
  })

  await t.test(
    'a completed key is completed for everybody, its owner included, whoever wants to take over',
    async (t) => {
      const key = newKey()
      const token = await take(store, key)
      const kept = reply()
      await store.complete(key, token, kept, LONG)
      for (const client of [store, second]) {
        same(t, await client.acquire(key, claim()), kept)
        same(t, await client.acquire(key, claim({ takeover: true })), kept)
        same(t, await client.acquire(key, claim({ token })), kept)
      }
    }
  )

  await t.test('completing again with the same token is true again, and the first record stays', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    const first = reply({ fingerprint: 'first' })
    await store.complete(key, token, first, LONG)
    for (const client of [store, second]) {
      t.equal(await client.complete(key, token, reply({ fingerprint: 'second' }), LONG), true)
      same(t, await client.acquire(key, claim()), first)
    }
  })

  await t.test('the record of whoever took over is not overwritten by the former owner', async (t) => {
    const key = newKey()
    const { token, heir } = await overtaken(store, second, key)
    const kept = reply({ fingerprint: 'the heir' })
    t.equal(await second.complete(key, heir, kept, LONG), true)
    for (const [name, step] of steps) t.equal(await step(store, key, token), false, name)
    same(t, await store.acquire(key, claim()), kept)
  })

  await t.test('completing after the release is false, and the key stays free', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    await store.release(key, token)
    t.equal(await store.complete(key, token, record, LONG), false)
    t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
  })

  await t.test('releasing after the completion is false, and the record stays', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    const kept = reply()
    await store.complete(key, token, kept, LONG)
    t.equal(await store.release(key, token), false)
    same(t, await second.acquire(key, claim()), kept)
  })

  await t.test('releasing again with the same token is true again while the key is free', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    for (const client of [store, store, second]) t.equal(await client.release(key, token), true)
  })

  await t.test('releasing what another token has released is false', async (t) => {
    const key = newKey()
    await store.release(key, await take(store, key))
    t.equal(await second.release(key, randomUUID()), false)
  })

  await t.test(
    'after a release the next claim is acquired with attempt 1, whatever the attempt was before',
    async (t) => {
      const key = newKey()
      const { heir } = await overtaken(store, second, key)
      t.equal(await second.release(key, heir), true)
      t.strictSame(await store.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    }
  )

  await t.test('the token that released a key can claim it again', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    await store.release(key, token)
    t.strictSame(await store.acquire(key, claim({ token })), { state: 'acquired', attempt: 1 })
    t.match(await second.acquire(key, claim()), { state: 'running' })
  })

  await t.test('of 50 parallel claims of a released key exactly one is acquired', async (t) => {
    const key = newKey()
    await store.release(key, await take(store, key))
    const found = await Promise.all(
      Array.from({ length: 50 }, (_, n) => (n % 2 === 0 ? store : second).acquire(key, claim({ takeover: true })))
    )
    t.strictSame(
      found.filter(({ state }) => state !== 'running'),
      [{ state: 'acquired', attempt: 1 }]
    )
  })

  await t.test('whoever released a key has no say in what the next owner does with it', async (t) => {
    const key = newKey()
    const old = await take(store, key)
    await store.release(key, old)
    const owner = await take(second, key, { fingerprint: 'the next' })
    for (const [name, step] of steps) {
      t.equal(await step(store, key, old), false, name)
      t.match(await store.acquire(key, claim()), { state: 'running', fingerprint: 'the next' })
    }
    const kept = reply({ fingerprint: 'the next' })
    t.equal(await second.complete(key, owner, kept, LONG), true)
    for (const [name, step] of steps) t.equal(await step(store, key, old), false, `${name} after the completion`)
    same(t, await store.acquire(key, claim()), kept)
  })
}

async function lifetimes(t: Test, { store, second }: Clients): Promise<void> {
  await t.test('a record lives for its ttl from the completion on, not from the claim', async (t) => {
    const key = newKey()
    const ttlMs = 200
    const token = await take(store, key, { leaseMs: 30, retainMs: LONG })
    await sleep(60)
    const before = performance.now()
    await store.complete(key, token, reply(), ttlMs)
    const next = claim()
    await until(async () => {
      const found = await second.acquire(key, next)
      const passed = performance.now() - before
      if (found.state === 'acquired') {
        t.ok(passed >= ttlMs - 2, `free after ${passed} ms`)
        t.equal(found.attempt, 1, 'an expired record leaves nothing behind')
        return true
      }
      t.equal(found.state, 'completed')
      return false
    })
  })

  await t.test('a completed key tells what is left of its ttl', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    const before = performance.now()
    await store.complete(key, token, reply(), LONG)
    const { ttlMs } = (await second.acquire(key, claim())) as { ttlMs: number }
    const passed = performance.now() - before
    t.ok(ttlMs <= LONG && ttlMs >= LONG - passed - 10, `${ttlMs} ms are left after ${passed} ms`)
  })

  await t.test('a repeated completion does not prolong the life of the record', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    await store.complete(key, token, reply(), 1_000)
    await store.complete(key, token, reply(), LONG)
    const { ttlMs } = (await second.acquire(key, claim())) as { ttlMs: number }
    t.ok(ttlMs <= 1_000, `${ttlMs} ms are left`)
  })

  await t.test('replaying does not prolong the life of the record', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    await store.complete(key, token, reply(), 1_000)
    for (const client of [store, second]) await client.acquire(key, claim({ leaseMs: LONG, retainMs: LONG }))
    const { ttlMs } = (await second.acquire(key, claim())) as { ttlMs: number }
    t.ok(ttlMs <= 1_000, `${ttlMs} ms are left`)
  })

  await t.test('of many parallel claims at the moment of expiry exactly one is acquired', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    await store.complete(key, token, reply(), 40)
    let acquired = 0
    await until(async () => {
      const found = await Promise.all(
        Array.from({ length: 20 }, (_, n) => (n % 2 === 0 ? store : second).acquire(key, claim({ takeover: true })))
      )
      acquired += found.filter(({ state }) => state === 'acquired').length
      return acquired > 0
    })
    t.equal(acquired, 1)
  })

  for (const [name, ttlMs] of [
    ['40 days', 40 * DAY],
    ['a thousand years', 365_000 * DAY],
    ['the largest integer', Number.MAX_SAFE_INTEGER]
  ] as const) {
    await t.test(`a ttl of ${name} is kept`, async (t) => {
      const key = newKey()
      const token = await take(store, key, { retainMs: ttlMs })
      t.match(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
      t.equal(await store.renew(key, token, LONG), true)
      t.match(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
      const kept = reply()
      t.equal(await store.complete(key, token, kept, ttlMs), true)
      await sleep(SHORT)
      const found = await second.acquire(key, claim())
      same(t, found, kept)
      const left = (found as { ttlMs: number }).ttlMs
      t.ok(left <= ttlMs && left > ttlMs - DAY, `${left} ms are left`)
    })
  }

  await t.test('an abandoned claim that is remembered for 40 days can be taken over', async (t) => {
    const key = newKey()
    await lapsed(store, key, { retainMs: 40 * DAY })
    const heir = claim({ takeover: true, retainMs: 40 * DAY })
    t.strictSame(await second.acquire(key, heir), { state: 'acquired', attempt: 2 })
  })

  await t.test('without a ttl a record never expires', async (t) => {
    const key = newKey()
    const token = await take(store, key, { leaseMs: 50, retainMs: 250 })
    const kept = reply()
    t.equal(await store.complete(key, token, kept, null), true)
    await sleep(350)
    const found = await second.acquire(key, claim())
    same(t, found, kept)
    t.equal((found as { ttlMs: unknown }).ttlMs, null)
  })
}

async function records(t: Test, { store, second }: Clients): Promise<void> {
  const everyByte = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))
  const samples: [name: string, record: StoredRecord][] = [
    ['a text reply', reply({ body: Buffer.from('{"a":1}'), text: true })],
    ['a text reply in many scripts', reply({ body: Buffer.from('naïve 🚲 日本語 \u0000 \u2028'), text: true })],
    ['a reply of every byte value', reply({ body: everyByte })],
    ['a reply of every byte value that counts as text', reply({ body: everyByte, text: true })],
    ['an empty text', reply({ body: Buffer.alloc(0), text: true })],
    ['an empty body', reply({ body: Buffer.alloc(0), text: false })],
    ['a reply of 1 MiB', reply({ body: Buffer.alloc(1 << 20, everyByte) })],
    ['a reply of 1 MiB of text', reply({ body: Buffer.alloc(1 << 20, 'ü'), text: true })],
    ['a reply with a part of a larger buffer as its body', reply({ body: everyByte.subarray(13, 77) })],
    ['a reply without headers', reply({ headers: [] })],
    [
      'headers with several values, in their order',
      reply({
        headers: [
          ['link', ['</a>; rel="next"', '</b>; rel="prev"']],
          ['x-one', ['alone']],
          ['x-none', []],
          ['x-empty', ''],
          ['content-type', 'text/plain'],
          ['x-number', '1']
        ]
      })
    ],
    [
      'headers with unusual text',
      reply({
        headers: [
          ['__proto__', 'a'],
          ['constructor', 'b'],
          ['x-unicode', 'ü 🚲 "quoted" \\ \u0000 \n'],
          ['x-long', 'x'.repeat(100_000)]
        ]
      })
    ],
    ['an empty fingerprint', reply({ fingerprint: '' })],
    ['a fingerprint with unusual text', reply({ fingerprint: 'ü:🚲\n"\\\u0000,][' })],
    ['the least and an early time', reply({ createdAt: 0, statusCode: 200 })],
    ['a status that nobody knows', reply({ statusCode: 599 })],
    ['a tombstone of a reply that was too large', tombstone('too-large')],
    ['a tombstone of a stream that failed', tombstone('stream-failed')],
    ['a tombstone of a hijacked reply', tombstone('hijacked')]
  ]
  for (const [name, record] of samples) {
    await t.test(`${name} comes back as it was stored, every time`, async (t) => {
      const key = newKey()
      const token = await take(store, key)
      t.equal(await store.complete(key, token, record, LONG), true)
      for (const client of [store, second, store]) same(t, await client.acquire(key, claim()), record)
    })
  }
}

async function hostileText(t: Test, { store, second }: Clients): Promise<void> {
  const texts = [
    ' ',
    ':',
    '::',
    'a',
    'A',
    'ab',
    'a:b',
    'a\nb',
    'a\r\nb',
    'a\u0000b',
    '{a}',
    '{}a',
    '*',
    'P1',
    '\u0001',
    '1:1:1',
    '__proto__',
    'constructor',
    'hasOwnProperty',
    '"quoted"',
    "'; DROP TABLE idempotency; --",
    '%s%d$1',
    '\u00e9',
    'e\u0301',
    '🚲',
    '日本語'
  ]

  await t.test('keys are told apart whatever is in them', async (t) => {
    const keys = ['', ...texts, 'k'.repeat(20_000), `${'k'.repeat(20_000)}k`]
    const tokens: string[] = []
    for (const key of keys) {
      const mine = claim({ fingerprint: `of ${key}` })
      tokens.push(mine.token)
      t.strictSame(await store.acquire(key, mine), { state: 'acquired', attempt: 1 })
    }
    for (const [n, key] of keys.entries()) {
      t.match(await second.acquire(key, claim()), { state: 'running', fingerprint: `of ${key}` })
      const record = reply({ fingerprint: `of ${key}` })
      t.equal(await second.complete(key, tokens[n] as string, record, LONG), true)
    }
    for (const key of keys) same(t, await store.acquire(key, claim()), reply({ fingerprint: `of ${key}` }))
  })

  await t.test('tokens are told apart whatever is in them', async (t) => {
    const tokens = [...texts, 't'.repeat(254), 't'.repeat(255), `${'é'.repeat(127)}t`]
    for (const token of tokens) {
      const key = newKey()
      const mine = claim({ token, fingerprint: token })
      t.strictSame(await store.acquire(key, mine), { state: 'acquired', attempt: 1 })
      t.strictSame(await second.acquire(key, mine), { state: 'acquired', attempt: 1 })
      const others = tokens.filter((other) => other !== token)
      const answers = await Promise.all(
        others.flatMap((other) => [
          second.renew(key, other, LONG),
          second.release(key, other),
          second.complete(key, other, reply(), LONG)
        ])
      )
      t.notOk(answers.includes(true), 'no other token has a say')
      t.equal(await store.complete(key, token, reply(), LONG), true)
      const afterwards = await Promise.all(others.map((other) => second.complete(key, other, reply(), LONG)))
      t.notOk(afterwards.includes(true), 'no other token takes the completion for its own')
    }
  })

  await t.test('fingerprints come back whatever is in them', async (t) => {
    for (const fingerprint of ['', ...texts, 'f'.repeat(20_000)]) {
      const key = newKey()
      const token = await take(store, key, { fingerprint })
      t.match(await second.acquire(key, claim()), { state: 'running', fingerprint })
      await store.renew(key, token, 1)
      const found = await until(async () => {
        const found = await second.acquire(key, claim())
        return found.state === 'abandoned' && found
      })
      t.strictSame(found, { state: 'abandoned', fingerprint, attempt: 1 })
    }
  })
}

async function copies(t: Test, { store, second }: Clients): Promise<void> {
  const original = () =>
    reply({
      headers: [
        ['content-type', 'text/plain'],
        ['link', ['a', 'b']]
      ],
      body: Buffer.from([0xff, 1, 2, 3])
    })
  const spoil = (record: StoredRecord) => {
    record.fingerprint = 'spoilt'
    if (record.kind === 'tombstone') return
    record.statusCode = 500
    record.body.fill(0)
    record.headers[0] = ['spoilt', 'spoilt']
    const links = record.headers[1]?.[1]
    if (Array.isArray(links)) links.push('spoilt')
    record.headers.push(['spoilt', 'spoilt'])
  }

  for (const text of [false, true]) {
    await t.test(
      `what is done to a ${text ? 'text' : 'binary'} record after it was stored does not change it`,
      async (t) => {
        const key = newKey()
        const token = await take(store, key)
        const record = { ...original(), text }
        const stored = store.complete(key, token, record, LONG)
        spoil(record)
        await stored
        same(t, await second.acquire(key, claim()), { ...original(), text })
      }
    )

    await t.test(
      `what is done to a ${text ? 'text' : 'binary'} record that was replayed does not change it`,
      async (t) => {
        const key = newKey()
        const token = await take(store, key)
        await store.complete(key, token, { ...original(), text }, LONG)
        for (const client of [store, second, store]) {
          const found = await client.acquire(key, claim())
          same(t, found, { ...original(), text })
          if (found.state === 'completed') spoil(found.record)
        }
      }
    )
  }

  await t.test('what is done to a claim after it was made does not change it', async (t) => {
    const key = newKey()
    const mine = claim({ fingerprint: 'mine' })
    const { token } = mine
    const acquired = store.acquire(key, mine)
    Object.assign(mine, { token: 'spoilt', fingerprint: 'spoilt', leaseMs: 1, retainMs: 1, takeover: true })
    await acquired
    t.match(await second.acquire(key, claim()), { state: 'running', fingerprint: 'mine' })
    t.equal(await store.renew(key, token, LONG), true)
  })
}

async function listening(t: Test, { store, second }: Clients): Promise<void> {
  if (store.changed === undefined) return
  const changed = (client: IdempotencyStore, key: string, signal = new AbortController().signal) =>
    (client.changed as NonNullable<IdempotencyStore['changed']>)(key, signal)
  const ends: [name: string, (client: IdempotencyStore, key: string, token: string) => Promise<boolean>][] = [
    ['completed', (client, key, token) => client.complete(key, token, reply(), LONG)],
    ['released', (client, key, token) => client.release(key, token)]
  ]

  for (const [name, end] of ends) {
    await t.test(`whoever listens hears when the key is ${name}, by whichever client`, async (t) => {
      for (const [listener, owner] of [
        [store, store],
        [store, second],
        [second, store]
      ] as const) {
        const key = newKey()
        const token = await take(owner, key)
        const heard = changed(listener, key)
        // With the subscription in place for certain, and without it in the next test.
        await sleep(SHORT)
        t.equal(await end(owner, key, token), true)
        await soon(heard)
      }
      t.pass('it was heard')
    })

    await t.test(`whoever listens hears when the key is ${name} immediately after the call`, async (t) => {
      for (let round = 0; round < 25; round++) {
        const key = newKey()
        const owner = round % 2 === 0 ? store : second
        const token = await take(owner, key)
        const heard = changed(store, key)
        const ended = end(owner, key, token)
        await soon(heard)
        t.equal(await ended, true)
      }
    })

    await t.test(`each of several who listen hears when the key is ${name}`, async (t) => {
      const key = newKey()
      const token = await take(store, key)
      const heard = [store, store, second, store, second].map((client) => changed(client, key))
      await sleep(SHORT)
      heard.push(changed(store, key))
      t.equal(await end(second, key, token), true)
      await soon(Promise.all(heard))
    })
  }

  await t.test('whoever listens hears when a running claim is deleted', async (t) => {
    const key = newKey()
    await take(store, key)
    const heard = changed(store, key)
    await sleep(SHORT)
    await second.delete?.(key)
    await soon(heard)
    t.pass('it was heard')
  })

  await t.test('whoever listens hears nothing while nothing happens to the key', async (t) => {
    const [key, other] = [newKey(), newKey()]
    const [token, otherToken] = [await take(store, key), await take(store, other)]
    let heard = false
    const listened = changed(store, key).then(() => {
      heard = true
    })
    t.equal(await store.renew(key, token, LONG), true)
    t.equal(await store.complete(key, randomUUID(), reply(), LONG), false)
    t.equal(await store.release(key, randomUUID()), false)
    t.match(await second.acquire(key, claim({ takeover: true })), { state: 'running' })
    t.equal(await second.complete(other, otherToken, reply(), LONG), true)
    await sleep(100)
    t.equal(heard, false)
    await store.release(key, token)
    await soon(listened)
  })

  await t.test('listening ends at once where no claim is running', async (t) => {
    const [unknown, completed, released, abandoned] = [newKey(), newKey(), newKey(), newKey()]
    await store.complete(completed, await take(store, completed), reply(), LONG)
    await store.release(released, await take(store, released))
    await lapsed(store, abandoned)
    for (const client of [store, second]) {
      for (const key of [unknown, completed, released, abandoned]) await soon(changed(client, key))
    }
    t.pass('it ended')
  })

  await t.test('listening ends when the signal aborts, and others go on', async (t) => {
    const key = newKey()
    const token = await take(store, key)
    const [early, late, before] = [new AbortController(), new AbortController(), new AbortController()]
    before.abort()
    let heard = 0
    const others = [changed(store, key), changed(store, key)].map((listened) => listened.then(() => heard++))
    await soon(changed(store, key, before.signal))
    const first = changed(store, key, early.signal)
    early.abort()
    await soon(first)
    const second = changed(store, key, late.signal)
    await sleep(SHORT)
    late.abort()
    await soon(second)
    await sleep(SHORT)
    t.equal(heard, 0)
    await store.complete(key, token, reply(), LONG)
    await soon(Promise.all(others))
  })

  await t.test('one can listen to a key again and again', async (t) => {
    const key = newKey()
    for (let round = 0; round < 10; round++) {
      const token = await take(store, key)
      const heard = changed(second, key)
      await store.release(key, token)
      await soon(heard)
    }
    t.pass('it was heard each time')
  })

  await t.test('whoever listens to a claim that is taken over hears of its end', async (t) => {
    const key = newKey()
    await take(store, key, { leaseMs: 300 })
    const heard = [changed(store, key), changed(second, key)]
    const heir = claim({ takeover: true })
    await until(async () => (await second.acquire(key, heir)).state === 'acquired')
    t.equal(await second.complete(key, heir.token, reply(), LONG), true)
    await soon(Promise.all(heard))
  })

  await t.test('whoever listens to a claim that its owner claims and renews again hears of its end', async (t) => {
    const key = newKey()
    const mine = claim()
    await store.acquire(key, mine)
    const heard = changed(second, key)
    await sleep(SHORT)
    t.match(await store.acquire(key, mine), { state: 'acquired' })
    t.equal(await store.renew(key, mine.token, LONG), true)
    t.equal(await store.complete(key, mine.token, reply(), LONG), true)
    await soon(heard)
  })
}

async function looking(t: Test, { store, second }: Clients): Promise<void> {
  const get = async (key: string) => (await second.get?.(key)) as Acquisition | null
  const forget = (key: string) => (second.delete as NonNullable<IdempotencyStore['delete']>)(key)

  if (store.get !== undefined) {
    await t.test('get gives null for a key that nobody claimed, and does not claim it', async (t) => {
      const key = newKey()
      t.equal(await get(key), null)
      t.strictSame(await store.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })

    await t.test('get shows a running claim', async (t) => {
      const key = newKey()
      await take(store, key, { fingerprint: 'at work', leaseMs: LONG })
      const found = await get(key)
      t.match(found, { state: 'running', fingerprint: 'at work' })
      const { leaseMs } = found as { leaseMs: number }
      t.ok(leaseMs > 0 && leaseMs <= LONG, `${leaseMs} ms are left`)
    })

    await t.test('get shows an abandoned claim, and leaves it so', async (t) => {
      const key = newKey()
      await lapsed(store, key, { fingerprint: 'the dead' })
      for (let n = 0; n < 2; n++) {
        t.strictSame(await get(key), { state: 'abandoned', fingerprint: 'the dead', attempt: 1 })
      }
    })

    await t.test('get shows a record and its ttl', async (t) => {
      for (const [record, ttl] of [
        [reply(), LONG],
        [tombstone('hijacked'), null]
      ] as const) {
        const key = newKey()
        await store.complete(key, await take(store, key), record, ttl)
        const found = await get(key)
        same(t, found, record)
        const { ttlMs } = found as { ttlMs: number | null }
        t.ok(ttl === null ? ttlMs === null : ttlMs !== null && ttlMs > 0 && ttlMs <= ttl, `${ttlMs} of ${ttl}`)
      }
    })

    await t.test('get gives null for a key that was released, expired or forgotten', async (t) => {
      const [released, expired, forgotten] = [newKey(), newKey(), newKey()]
      await store.release(released, await take(store, released))
      t.equal(await get(released), null)
      await store.complete(expired, await take(store, expired), reply(), SHORT)
      await take(store, forgotten, { leaseMs: 1, retainMs: SHORT })
      await until(async () => (await get(expired)) === null)
      await until(async () => (await get(forgotten)) === null)
    })
  }

  if (store.delete !== undefined) {
    await t.test('delete of a key that holds nothing is false', async (t) => {
      const [unknown, released] = [newKey(), newKey()]
      t.equal(await forget(unknown), false)
      await store.release(released, await take(store, released))
      t.equal(await forget(released), false)
      t.strictSame(await store.acquire(released, claim()), { state: 'acquired', attempt: 1 })
    })

    await t.test('delete forgets a record', async (t) => {
      const key = newKey()
      const token = await take(store, key)
      await store.complete(key, token, reply(), null)
      t.equal(await forget(key), true)
      t.equal(await forget(key), false)
      t.equal(await store.complete(key, token, reply(), LONG), false, 'its completion is forgotten too')
      t.strictSame(await store.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })

    await t.test('delete forgets an abandoned claim, and its attempts', async (t) => {
      const key = newKey()
      await lapsed(store, key)
      t.equal(await forget(key), true)
      t.strictSame(await store.acquire(key, claim({ takeover: true })), { state: 'acquired', attempt: 1 })
    })

    await t.test('delete takes a running claim from its owner', async (t) => {
      const key = newKey()
      const token = await take(store, key)
      t.equal(await forget(key), true)
      t.equal(await store.renew(key, token, LONG), false)
      t.equal(await store.complete(key, token, reply(), LONG), false)
      t.equal(await store.release(key, token), false)
      t.strictSame(await second.acquire(key, claim()), { state: 'acquired', attempt: 1 })
    })
  }
}

/** A key that no other test has. */
export function newKey(): string {
  return randomUUID()
}

/** A claim by a new token that does not lapse during a test. */
export function claim(changes: Partial<Claim> = {}): Claim {
  return { token: randomUUID(), fingerprint: 'fingerprint', leaseMs: LONG, retainMs: LONG, takeover: false, ...changes }
}

export function reply(changes: Partial<StoredReply> = {}): StoredReply {
  return {
    kind: 'reply',
    fingerprint: 'fingerprint',
    createdAt: 1_700_000_000_000,
    statusCode: 201,
    headers: [['content-type', 'application/json; charset=utf-8']],
    body: Buffer.from('{"done":true}'),
    text: true,
    ...changes
  }
}

export function tombstone(reason: Tombstone['reason']): Tombstone {
  return { kind: 'tombstone', fingerprint: 'fingerprint', createdAt: 1_700_000_000_000, reason }
}

/** Claims a free key, and returns the owner's token. */
export async function take(store: IdempotencyStore, key: string, changes: Partial<Claim> = {}): Promise<string> {
  const mine = claim(changes)
  const { state } = await store.acquire(key, mine)
  if (state !== 'acquired') throw new Error(`The key should be free and is ${state}`)
  return mine.token
}

/** Claims a free key, and returns when the lease has lapsed. */
export async function lapsed(store: IdempotencyStore, key: string, changes: Partial<Claim> = {}): Promise<string> {
  const token = await take(store, key, { leaseMs: SHORT, ...changes })
  await until(async () => (await store.acquire(key, claim())).state === 'abandoned', { message: 'the lease to lapse' })
  return token
}

/** A claim, and another that took it over and is running. */
async function overtaken(
  store: IdempotencyStore,
  second: IdempotencyStore,
  key: string
): Promise<{ token: string; heir: string }> {
  const token = await lapsed(store, key)
  const heir = claim({ fingerprint: 'the heir', takeover: true })
  const found = await second.acquire(key, heir)
  if (found.state !== 'acquired') throw new Error(`The key should be abandoned and is ${found.state}`)
  return { token, heir: heir.token }
}

/** The key is completed, with this record. */
export function same(t: Test, found: Acquisition | null, record: StoredRecord): void {
  if (found?.state !== 'completed') {
    t.equal(found?.state, 'completed')
    return
  }
  if (record.kind === 'tombstone' || found.record.kind === 'tombstone') {
    t.strictSame(found.record, record)
    return
  }
  const { body: actual, ...head } = found.record
  const { body: expected, ...expectedHead } = record
  t.strictSame(head, expectedHead)
  t.ok(Buffer.isBuffer(actual) && actual.equals(expected), `a body of the same ${expected.length} bytes`)
}

/** Fails when the promise takes longer than anything in these tests may take. */
export async function soon<T>(promise: Promise<T>, message = 'the promise'): Promise<T> {
  const late = new AbortController()
  const timeout = sleep(10_000, undefined, { signal: late.signal }).then(() => {
    throw new Error(`Waited 10 seconds in vain for ${message}`)
  })
  timeout.catch(() => {})
  try {
    return await Promise.race([promise, timeout])
  } finally {
    late.abort()
  }
}
