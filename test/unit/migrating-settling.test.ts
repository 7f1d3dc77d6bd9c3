import t from 'tap'
import { reply, tombstone } from '../support/store-fixtures.js'
import {
  AT_REST,
  bothReplay,
  endable,
  kept,
  pairs,
  SETTLED,
  settleable,
  TRUTH,
  twoStores,
  UNFINISHED,
  UNSETTLED
} from '../support/two-stores.js'

/*
 * A MigratingStore settles what nobody is running in either of its stores, whatever processes of every deploy have left there.
 * Where it is interrupted is in migrating-settling-interrupted.
 */

/* Settling by a record */

t.test('whatever the two have that is not finished, it is settled in both', async (t) => {
  for (const pair of settleable) {
    const it = await twoStores(pair)
    t.equal(await it.process().settle(it.key, await it.fingerprint(), SETTLED), true, `${pair}`)
    await bothReplay(t, it)
  }
})

t.test('what is running in one of the two is not settled, and stays as it is in both', async (t) => {
  const others = [...AT_REST, 'running']
  for (const pair of [...pairs(['running'], others), ...pairs(others, ['running'])]) {
    const it = await twoStores(pair)
    const before = await it.look()
    for (const settlement of [SETTLED, 'ended'] as const) {
      for (const fingerprint of ['running', 'first', 'a tombstone', await it.fingerprint()]) {
        t.equal(await it.process().settle(it.key, fingerprint, settlement), false, `${pair}`)
      }
    }
    t.strictSame(await it.look(), before, `${pair}`)
  }
})

t.test('what has a reply in `from`, and what is free, is not settled', async (t) => {
  for (const pair of [...pairs(['a reply'], AT_REST), ['free', 'free'] as const]) {
    const it = await twoStores(pair)
    const before = await it.look()
    for (const fingerprint of ['a reply', 'first', 'second', 'a tombstone']) {
      t.equal(await it.process().settle(it.key, fingerprint, SETTLED), false, `${pair}`)
    }
    t.strictSame(await it.look(), before, `${pair}`)
  }
})

t.test('what has a reply in `to` alone is not settled: `from` is given that reply', async (t) => {
  for (const inFrom of UNSETTLED) {
    const it = await twoStores([inFrom, 'a reply'])
    t.equal(await it.process().settle(it.key, await it.fingerprint(), SETTLED), false, inFrom)
    await bothReplay(t, it, reply({ fingerprint: 'a reply' }))
  }
})

t.test('what does not look as it is said to is not settled, and stays as it is in both', async (t) => {
  for (const pair of pairs(AT_REST, AT_REST)) {
    const it = await twoStores(pair)
    const before = await it.look()
    for (const settlement of [SETTLED, 'ended'] as const) {
      for (const fingerprint of ['another', '']) {
        t.equal(await it.process().settle(it.key, fingerprint, settlement), false)
      }
    }
    t.strictSame(await it.look(), before, `${pair}`)
  }
})

t.test('what `get` does not say of the key is not what it looks like, although one of the two says so', async (t) => {
  for (const pair of [
    ['abandoned', 'abandoned twice, with a step'],
    ['abandoned twice, with a step', 'abandoned'],
    ['abandoned', 'a tombstone'],
    ['a tombstone', 'abandoned']
  ] as const) {
    const it = await twoStores(pair)
    const before = await it.look()
    t.equal(await it.process().settle(it.key, 'first', SETTLED), false)
    t.strictSame(await it.look(), before, `${pair}`)
  }
})

t.test('what is settled for a time is kept for that time in both', async (t) => {
  for (const pair of settleable) {
    const it = await twoStores(pair)
    const settlement = { record: TRUTH, ttlMs: 5_000 }
    t.equal(await it.process().settle(it.key, await it.fingerprint(), settlement), true)
    for (const found of await it.look()) t.match(found, { ttlMs: 5_000 }, `${pair}`)
  }
})

t.test('what the caller changes after its call is not settled', async (t) => {
  const it = await twoStores(['abandoned', 'abandoned'])
  const record = reply({ ...TRUTH, body: Buffer.from(TRUTH.body) })
  const settled = it.process().settle(it.key, 'first', { record, ttlMs: null })
  record.body.fill(0)
  record.statusCode = 500
  t.equal(await settled, true)
  await bothReplay(t, it)
})

t.test(
  'what was settled by a tombstone is not settled by the same one again, unless it looks as it is said to',
  async (t) => {
    const it = await twoStores(['abandoned', 'abandoned'])
    const settlement = { record: { ...tombstone('settled'), fingerprint: 'settled' }, ttlMs: null }
    t.equal(await it.process().settle(it.key, 'first', settlement), true)
    t.equal(await it.process().settle(it.key, 'first', settlement), false)
    t.equal(await it.process().settle(it.key, 'settled', settlement), true)
  }
)

/* Settling as ended */

t.test('what is settled as ended has ended wherever it is, with its attempt and its steps', async (t) => {
  for (const pair of endable) {
    const it = await twoStores(pair)
    const before = await it.process().get(it.key)
    if (before?.state !== 'abandoned') throw new Error('It is not abandoned')
    const { fingerprint, attempt, steps } = before
    for (let n = 0; n < 2; n++) t.equal(await it.process().settle(it.key, fingerprint, 'ended'), true)
    const after = await it.process().get(it.key)
    t.strictSame({ ...after, lapsedMs: 0 }, { ...before, ended: true, lapsedMs: 0 }, `${pair}`)
    for (const found of await it.look()) if (found !== null) t.match(found, { state: 'abandoned', ended: true })
    const heir = await it.inTime(() => it.process().acquire(it.key, kept({ takeover: true })))
    t.match(heir, { state: 'acquired', attempt: attempt + 1, ...(steps && { steps }) })
  }
})

t.test('a record in either is not settled as ended, and stays', async (t) => {
  for (const pair of [
    ...pairs(['a tombstone', 'a reply'], AT_REST),
    ...pairs(UNFINISHED, ['a tombstone', 'a reply'])
  ]) {
    const it = await twoStores(pair)
    const before = await it.look()
    for (const fingerprint of ['a tombstone', 'a reply', 'first', 'second']) {
      t.equal(await it.process().settle(it.key, fingerprint, 'ended'), false)
    }
    t.strictSame(await it.look(), before, `${pair}`)
  }
})
