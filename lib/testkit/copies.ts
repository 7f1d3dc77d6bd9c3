import type { Acquisition, IdempotencyStore, StoredRecord, StoredStep } from '../../types/index.js'
import {
  abandoned,
  answers,
  claim,
  equal,
  FRESH,
  finish,
  hasSteps,
  LONG,
  lapsed,
  newKey,
  replays,
  reply,
  take,
  tombstone
} from './fixtures.js'
import { caseWith, conformanceCase } from './harness.js'

// What a store was given and what it gives belong to the caller, who may do with them as it likes.

const samples: [name: string, make: () => StoredRecord][] = [
  ...([true, false] as const).map((text): [string, () => StoredRecord] => [
    text ? 'a text record' : 'a binary record',
    () =>
      reply({
        headers: [
          ['content-type', 'text/plain'],
          ['link', ['a', 'b']]
        ],
        body: Buffer.from([0xff, 1, 2, 3]),
        text
      })
  ]),
  ['a tombstone', () => tombstone('hijacked')]
]

/** Keys that can be claimed, each by another path through a store. */
const before: [name: string, prepare: (store: IdempotencyStore, key: string) => Promise<unknown>, attempt: number][] = [
  ['a free', async () => {}, 1],
  ['a released', async (store, key) => store.release(key, await take(store, key)), 1],
  ['an abandoned', lapsed, 2]
]

/** Changes all there is to change. */
function spoil(record: StoredRecord): void {
  if (record.kind === 'reply') {
    record.body.fill(0)
    const links = record.headers[1]?.[1]
    if (Array.isArray(links)) links.push('spoilt')
    const first = record.headers[0]
    if (first) first[1] = 'spoilt'
    record.headers.push(['spoilt', 'spoilt'])
  }
  Object.assign(record, {
    kind: 'reply',
    fingerprint: 'spoilt',
    statusCode: 500,
    headers: [],
    text: true,
    createdAt: 1
  })
}

export const copies = [
  ...samples.flatMap(([name, make]) => [
    conformanceCase(`what is done to ${name} after it was stored does not change it`, async ({ store, second }) => {
      const key = newKey()
      const token = await take(store, key)
      const record = make()
      const stored = store.complete(key, token, record, LONG)
      spoil(record)
      equal(await stored, true, 'complete')
      for (const client of [store, second]) replays(await client.acquire(key, claim()), make())
    }),

    conformanceCase(`what is done to ${name} that was replayed does not change it`, async ({ store, second }) => {
      const key = newKey()
      await finish(store, key, make())
      for (const client of [store, second, store]) {
        const found = await client.acquire(key, claim())
        replays(found, make())
        if (found.state === 'completed') spoil(found.record)
      }
    })
  ]),

  caseWith('get', 'what is done to what get has given does not change it', async ({ store, second }) => {
    const [running, done] = [newKey(), newKey()]
    await take(store, running, { fingerprint: 'at work' })
    await finish(store, done, samples[0]?.[1]())
    for (const client of [store, second, store]) {
      const found = await client.get(running)
      answers(found, { state: 'running', fingerprint: 'at work' })
      Object.assign(found as Acquisition, { state: 'abandoned', fingerprint: 'spoilt', leaseMs: 0 })
      const kept = await client.get(done)
      replays(kept, samples[0]?.[1]() as StoredRecord)
      if (kept?.state === 'completed') spoil(kept.record)
    }
  }),

  ...before.map(([name, prepare, attempt]) =>
    conformanceCase(
      `what is done to a claim of ${name} key after it was made does not change it`,
      async ({ store, second }) => {
        const key = newKey()
        await prepare(second, key)
        const mine = claim({ fingerprint: 'mine', takeover: true })
        const { token } = mine
        const acquired = store.acquire(key, mine)
        Object.assign(mine, { token: 'spoilt', fingerprint: 'spoilt', leaseMs: 1, retainMs: 1, takeover: false })
        answers(await acquired, { state: 'acquired', attempt })
        answers(await second.acquire(key, claim()), { state: 'running', fingerprint: 'mine' })
        equal(await store.renew(key, token, 1), true, 'renew')
        answers(await abandoned(second, key), { state: 'abandoned', fingerprint: 'mine', attempt })
      }
    )
  ),

  conformanceCase('what is done to an answer about a claim does not change it', async ({ store, second }) => {
    const key = newKey()
    const mine = claim({ fingerprint: 'mine' })
    for (const client of [store, second, store]) {
      const held = await client.acquire(key, mine)
      answers(held, { state: 'acquired', attempt: 1 })
      const found = await client.acquire(key, claim())
      answers(found, { state: 'running', fingerprint: 'mine' })
      Object.assign(held, { attempt: 7 })
      Object.assign(found, { state: 'abandoned', fingerprint: 'spoilt', leaseMs: 0, attempt: 7 })
    }
  }),

  caseWith('step', 'what is done to a step after it was stored does not change it', async ({ store, second }) => {
    const key = newKey()
    const mine = claim()
    answers(await store.acquire(key, mine), FRESH)
    for (const client of [store, second]) {
      const step: [string, string] = [client === store ? 'first' : 'second', 'done']
      const kept = client.step(key, mine.token, step)
      step.fill('spoilt')
      equal(await kept, true, 'step')
    }
    const steps: StoredStep[] = [['first', 'done']]
    if (second !== store) steps.push(['second', 'done'])
    for (const client of [store, second]) hasSteps(await client.acquire(key, mine), steps)
  }),

  caseWith('step', 'what is done to the steps of an answer does not change them', async ({ store, second }) => {
    const key = newKey()
    const mine = claim()
    answers(await store.acquire(key, mine), FRESH)
    for (const name of ['first', 'second']) equal(await store.step(key, mine.token, [name, 'done']), true, 'step')
    for (const client of [store, second, store, second]) {
      for (const asked of [mine, claim()]) {
        const found = (await client.acquire(key, asked)) as { steps?: [string, string][] }
        hasSteps(found as Acquisition, [
          ['first', 'done'],
          ['second', 'done']
        ])
        found.steps?.[0]?.fill('spoilt')
        found.steps?.push(['spoilt', 'spoilt'])
      }
    }
  })
]
