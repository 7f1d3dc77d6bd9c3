import { setImmediate as turn } from 'node:timers/promises'
import type { IdempotencyStore, ListedKey, ListedKind } from '../../types/index.js'
import {
  abandoned,
  answers,
  claim,
  equal,
  finish,
  LONG,
  lapsed,
  left,
  newKey,
  ok,
  reply,
  SHORT,
  SLACK,
  take,
  tombstone,
  until
} from './fixtures.js'
import { caseWith, shown } from './harness.js'

// What there is in a store: list. Other cases may be at work on the same data, so that only what a case has made is looked at.

const ALL = ['running', 'abandoned', 'reply', 'tombstone'] as const

/** What all pages say of these keys. */
async function listed(
  store: Required<Pick<IdempotencyStore, 'list'>>,
  kinds: readonly ListedKind[],
  keys: readonly string[]
): Promise<ListedKey[]> {
  const found: ListedKey[] = []
  let cursor: string | null = null
  do {
    const page: Awaited<ReturnType<typeof store.list>> = await store.list(kinds, cursor)
    found.push(...page.keys.filter(({ key }) => keys.includes(key)))
    cursor = page.cursor
    // Pages without end, and at once, would keep the case from being given up.
    if (cursor !== null) await turn()
  } while (cursor !== null)
  return found
}

async function one(...args: Parameters<typeof listed>): Promise<ListedKey> {
  const [found] = await listed(...args)
  ok(found !== undefined, `list of ${args[1].join(' and ')} does not show ${args[2].join()}`)
  return found as ListedKey
}

function says(found: ListedKey, expected: object): void {
  for (const [name, value] of Object.entries(expected)) {
    const actual = (found as unknown as Record<string, unknown>)[name]
    ok(Object.is(actual, value), `the ${name} of a listed key: ${shown(actual)} instead of ${shown(value)}`)
  }
}

export const listing = [
  caseWith('list', 'list shows running claims, and what is left of their leases', async ({ store, second }) => {
    const key = newKey()
    const before = performance.now()
    const token = await take(store, key, { fingerprint: 'at work' })
    for (const client of [second, store]) {
      const found = await one(client, ['running'], [key])
      says(found, { state: 'running', fingerprint: 'at work', attempt: 1 })
      left((found as { leaseMs: number }).leaseMs, LONG, before)
    }
    equal(await store.renew(key, token, LONG), true, 'renew by the owner')
  }),

  caseWith('list', 'list shows abandoned claims, and for how long they have been so', async ({ store, second }) => {
    const key = newKey()
    const before = performance.now()
    await lapsed(store, key, { fingerprint: 'the dead' })
    const found = await one(second, ['abandoned'], [key])
    says(found, { state: 'abandoned', fingerprint: 'the dead', attempt: 1, ended: undefined })
    const { lapsedMs } = found as { lapsedMs: number }
    ok(lapsedMs <= performance.now() - before + SLACK, `${lapsedMs} ms since a lease has lapsed that began later`)
    const later = await until(
      async () => {
        const found = await one(second, ['abandoned'], [key])
        return (found as { lapsedMs: number }).lapsedMs >= 2 * SHORT
      },
      { message: 'the time since a lease has lapsed to grow' }
    )
    equal(later, true, 'growing')
  }),

  caseWith('list', 'list shows what its owner has given back, as abandoned and ended', async ({ store, second }) => {
    const key = newKey()
    await lapsed(store, key)
    const heir = claim({ fingerprint: 'the heir', takeover: true })
    answers(await second.acquire(key, heir), { state: 'acquired', attempt: 2 })
    equal(await second.release(key, heir.token), true, 'release')
    const found = await one(store, ['abandoned'], [key])
    says(found, { state: 'abandoned', fingerprint: 'the heir', attempt: 2, ended: true })
    ok((found as { lapsedMs: number }).lapsedMs < LONG, 'what was given back now is not listed as if it were long ago')
  }),

  caseWith('list', 'list shows replies by their status, and tombstones by their reason', async ({ store, second }) => {
    const [done, lost, kept] = [newKey(), newKey(), newKey()]
    const before = performance.now()
    await finish(store, done, reply({ statusCode: 402, fingerprint: 'a reply' }))
    await finish(store, lost, tombstone('stream-failed'))
    await finish(store, kept, reply(), null)
    const [found, dead] = [await one(second, ['reply'], [done]), await one(second, ['tombstone'], [lost])]
    const createdAt = reply().createdAt
    says(found, { state: 'completed', fingerprint: 'a reply', outcome: 402, createdAt })
    left((found as { ttlMs: number }).ttlMs, LONG, before)
    says(dead, { state: 'completed', outcome: 'stream-failed', createdAt })
    says(await one(second, ['reply'], [kept]), { state: 'completed', outcome: 201, ttlMs: null })
  }),

  caseWith('list', 'list shows the kinds that it is asked for, and no others', async ({ store, second }) => {
    const keys = [newKey(), newKey(), newKey(), newKey()] as const
    const [running, dead, done, lost] = keys
    await take(store, running)
    await lapsed(store, dead)
    await finish(store, done)
    await finish(store, lost, tombstone('too-large'))
    const kinds = [
      [['running'], [running]],
      [['abandoned'], [dead]],
      [['reply'], [done]],
      [['tombstone'], [lost]],
      [
        ['abandoned', 'tombstone'],
        [dead, lost]
      ],
      [ALL, keys]
    ] as const
    for (const [asked, expected] of kinds) {
      const found = new Set((await listed(second, asked, keys)).map(({ key }) => key))
      ok(
        found.size === expected.length && expected.every((key) => found.has(key)),
        `list of ${asked.join(' and ')} shows ${found.size} keys of ${expected.length}, or others`
      )
    }
  }),

  caseWith('list', 'list comes to an end, and shows every key on the way', async ({ store, second }) => {
    const keys = Array.from({ length: 50 }, newKey)
    await Promise.all(keys.map((key, n) => (n % 2 === 0 ? take(store, key) : finish(store, key))))
    const found = new Set((await listed(second, ALL, keys)).map(({ key }) => key))
    equal(found.size, keys.length, 'how many of 50 keys are listed')
  }),

  caseWith(
    'list',
    'list does not show what is free: released, expired, forgotten or deleted',
    async ({ store, second }) => {
      const keys = [newKey(), newKey(), newKey()] as const
      const [released, expired, forgotten] = keys
      await store.release(released, await take(store, released))
      await finish(store, expired, reply(), 1)
      await take(store, forgotten, { leaseMs: 1, retainMs: 1 })
      const isEmpty = async () => (await listed(second, ALL, keys)).length === 0
      await until(isEmpty, { message: 'list to show none of them' })
    }
  ),

  caseWith('list', 'list shows a reply with a large body and many headers, and keys as they are', async (harness) => {
    const { store, second } = harness
    const key = `${newKey()} \\ ü 😀`
    const headers = Array.from({ length: 100 }, (_, n): [string, string] => [`x-header-${n}`, 'value '.repeat(20)])
    await finish(store, key, reply({ headers, body: Buffer.alloc(100_000, 'x') }))
    says(await one(second, ['reply'], [key]), { outcome: 201, key })
  }),

  caseWith('list', 'list changes nothing', async ({ store, second }) => {
    const [running, dead] = [newKey(), newKey()]
    await take(store, running, { leaseMs: 50 })
    await lapsed(store, dead)
    await listed(second, ALL, [running, dead])
    await abandoned(store, running)
    answers(await store.acquire(dead, claim({ takeover: true })), { state: 'acquired', attempt: 2 })
  }),

  caseWith(['list', 'get'], 'get tells the same of a key as list', async ({ store, second }) => {
    const [running, dead] = [newKey(), newKey()]
    await take(store, running)
    await lapsed(store, dead)
    answers(await second.get(running), { state: 'running', attempt: 1 })
    const { lapsedMs } = (await one(store, ['abandoned'], [dead])) as { lapsedMs: number }
    const found = (await second.get(dead)) as { lapsedMs?: number }
    ok((found.lapsedMs ?? -1) >= lapsedMs, `get tells ${shown(found.lapsedMs)} ms, where list has told ${lapsedMs}`)
  }),

  caseWith('list', 'list leaves out what cannot be decoded, and shows the rest', async ({ store, second, spoil }) => {
    if (spoil === undefined) return
    const keys = [newKey(), newKey(), newKey()] as const
    for (const key of keys) await finish(store, key)
    await spoil(keys[1])
    const found = (await listed(second, ALL, keys)).map(({ key }) => key)
    ok(found.includes(keys[0]) && found.includes(keys[2]), 'list does not show keys beside a damaged one')
    equal(found.includes(keys[1]), false, 'list shows a record that cannot be decoded')
  })
]
