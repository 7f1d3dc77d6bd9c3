import {
  abandoned,
  answers,
  claim,
  equal,
  FRESH,
  LONG,
  newKey,
  ok,
  parallel,
  replays,
  reply,
  take,
  until
} from './fixtures.js'
import { conformanceCase, type Harness } from './harness.js'

// Keys, tokens and fingerprints are text. A store knows nothing of what it says, and loses nothing of it.

export const unusual = [
  ' ',
  ':',
  '::',
  'a',
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
  'null',
  '"quoted"',
  "'; DROP TABLE idempotency; --",
  '%s%d$1',
  'a\\0b',
  '../a',
  '🚲',
  '日本語'
]

/** What a store takes for the same that trims, folds or normalises. */
export const alike = [
  'b',
  'B',
  ' b',
  'b ',
  'b\n',
  'b\u0000',
  'é',
  'e\u0301',
  'É',
  'ß',
  'ss',
  'ﬁ',
  'fi',
  '1',
  '01',
  '1.0'
]

const long = ['j', 'k', 'kk'].map((end) => 'k'.repeat(20_000) + end)

/** Each of these is a key of its own, through all of its life. */
async function apart({ store, second }: Harness, keys: string[]): Promise<void> {
  const tokens: string[] = []
  for (const key of keys) {
    const mine = claim({ fingerprint: `of ${key}` })
    tokens.push(mine.token)
    answers(await store.acquire(key, mine), FRESH, `the key ${JSON.stringify(key.slice(0, 40))}`)
  }
  for (const [n, key] of keys.entries()) {
    answers(await second.acquire(key, claim()), { state: 'running', fingerprint: `of ${key}` })
    const record = reply({ fingerprint: `of ${key}` })
    equal(await second.complete(key, tokens[n] as string, record, LONG), true, 'complete')
  }
  for (const key of keys) {
    const record = reply({ fingerprint: `of ${key}` })
    replays(await store.acquire(key, claim()), record)
    if (store.get) replays(await store.get(key), record)
  }
}

/** No token passes for another. */
async function strangers({ store, second }: Harness, tokens: string[]): Promise<void> {
  await parallel(tokens.length, [store, second], async (client, n) => {
    const key = newKey()
    const token = tokens[n] as string
    const mine = claim({ token, fingerprint: token })
    for (const each of [client, store, second]) answers(await each.acquire(key, mine), FRESH, 'a key of its owner')
    const others = tokens.filter((other) => other !== token)
    const tried = others.map((other, n) => {
      if (n % 3 === 0) return second.renew(key, other, LONG)
      return n % 3 === 1 ? second.release(key, other) : second.complete(key, other, reply(), LONG)
    })
    ok(!(await Promise.all(tried)).includes(true), `another token passed for ${JSON.stringify(token)}`)
    equal(await store.complete(key, token, reply(), LONG), true, 'complete by the owner')
    const again = others.map((other) => second.complete(key, other, reply(), LONG))
    ok(!(await Promise.all(again)).includes(true), `the completion of ${JSON.stringify(token)} passed for another's`)
  })
}

async function comeBack({ store, second }: Harness, fingerprints: string[]): Promise<void> {
  await parallel(fingerprints.length, [store, second], async (client, n) => {
    const key = newKey()
    const fingerprint = fingerprints[n] as string
    const token = await take(store, key, { fingerprint })
    answers(await client.acquire(key, claim()), { state: 'running', fingerprint })
    await store.renew(key, token, 1)
    answers(await abandoned(client, key), { state: 'abandoned', fingerprint, attempt: 1 })
  })
}

export const text = [
  conformanceCase('keys are told apart whatever is in them', (harness) => apart(harness, around(newKey(), unusual))),

  conformanceCase(
    'keys are told apart that differ in case, in white space or in the form of a letter only',
    (harness) => apart(harness, around(newKey(), alike))
  ),

  conformanceCase('keys of 20,000 characters are told apart by the last of them', (harness) =>
    apart(harness, around(newKey(), long))
  ),

  conformanceCase('keys may be empty, or the names of other things', async ({ store, second }) => {
    for (const key of ['', ' ', '*', '0', 'null', 'key', '__proto__', 'constructor', 'hasOwnProperty', 'toString']) {
      // Whoever else tries this on the same data has the same keys, and gives them back or lets them lapse.
      const brief = { leaseMs: 9_000, retainMs: 1 }
      const mine = claim({ ...brief, fingerprint: newKey(), takeover: true })
      const acquired = async () => (await store.acquire(key, mine)).state === 'acquired'
      await until(acquired, { message: `the key ${JSON.stringify(key)} to be free` })
      const before = performance.now()
      const isInTime = () => performance.now() - before < brief.leaseMs
      const found = await second.acquire(key, claim(brief))
      if (isInTime()) answers(found, { state: 'running', fingerprint: mine.fingerprint })
      const released = await second.release(key, mine.token)
      ok(released || !isInTime(), `release of the key ${JSON.stringify(key)}`)
    }
  }),

  conformanceCase('tokens are told apart whatever is in them', (harness) => strangers(harness, unusual)),

  conformanceCase(
    'tokens are told apart that differ in case, in white space or in the form of a letter only',
    (harness) => strangers(harness, alike)
  ),

  conformanceCase('tokens of up to 255 bytes are told apart', (harness) =>
    strangers(harness, ['t'.repeat(254), 't'.repeat(255), `${'t'.repeat(254)}T`, `${'é'.repeat(127)}t`])
  ),

  conformanceCase('fingerprints come back whatever is in them', (harness) =>
    comeBack(harness, ['', ...unusual, ...alike])
  ),

  conformanceCase('a fingerprint of 20,000 characters comes back', (harness) => comeBack(harness, ['f'.repeat(20_000)]))
]

/** Keys that nobody else has, with each part in front and at the end. */
function around(own: string, parts: string[]): string[] {
  return parts.flatMap((part) => [own + part, part + own])
}
