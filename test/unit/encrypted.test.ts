import t from 'tap'
import {
  type Acquisition,
  EncryptedStore,
  type IdempotencyStore,
  type ListedKey,
  MemoryStore,
  type Settlement,
  type StoredRecord
} from '../../index.js'
import { claim, finish, lapsed, newKey, reply, same, tombstone } from '../support/store-fixtures.js'

/* What is encrypted must be readable by the versions to come; what it promises as a store is tried in stores/. */

const keys = [Buffer.alloc(32, 7)]

/** What is read when the store behind says this. */
function opened(found: Acquisition): Promise<Acquisition> {
  const yes = async () => true
  const inner: IdempotencyStore = { acquire: async () => found, renew: yes, complete: yes, release: yes }
  return new EncryptedStore(inner, { keys }).acquire('key', claim())
}

const CLAIM = 'AXg1rC8lpntjoXSN5zQAUM-eF46kckwKBItX3EjpaFkL4PwcNuAnMEqex-U1ZqEjvk8WEzYtiDzRpImKMOp4--6OPU4'

/** What is listed when the store behind lists this. */
async function listedAs(found: ListedKey): Promise<readonly ListedKey[]> {
  const inner = Object.assign(new MemoryStore(), { list: async () => ({ keys: [found], cursor: 'next' }) })
  const page = await new EncryptedStore(inner, { keys }).list?.(['running'], null)
  return page?.cursor === 'next' ? page.keys : Promise.reject(new Error('The cursor is another one'))
}

t.test('a claim that was stored by the first version can be read', async (t) => {
  for (const found of [
    { state: 'running', leaseMs: 5 },
    { state: 'abandoned', attempt: 2 }
  ] as const) {
    t.strictSame(await opened({ ...found, fingerprint: CLAIM }), { ...found, fingerprint: 'a fingerprint' })
  }
})

/** Of the key that everything here is stored under. */
const REPLY_BASE =
  'AXg1rC8MfcD8obkBQCEPdGHCzi7iFW2MXFxnpyk4pKFws9QHe70aMZP7MmIz8a-WXZk-oFNsPhJctGVQ1FPzt4gTLnAItqmbuigGrb5_l2f_Yse2ajS66Q'
const TOMBSTONE_BASE =
  'AXg1rC8mKeidijDUWIe8zryRsuLk86WUv2XVim-RBIOplsaPLKf2b_n8hgRn4DguN9FgU8mwrJDZdDNa2bavF6Oz9WVdm0cP9ISII9Py1i53ocIAiC32kNVvIHj8YYo'
const base = { fingerprint: 'a fingerprint', createdAt: 1_700_000_000_000 }

t.test('a reply that was stored by the first version can be read', async (t) => {
  const record: StoredRecord = {
    kind: 'reply',
    fingerprint: REPLY_BASE,
    createdAt: 0,
    statusCode: 200,
    headers: [],
    body: Buffer.from(
      'AXg1rC/1zy56dH9PGx1P00Z3fVQwStPrBqyeIS9PS6OIOad8SWEOfUeSsYMg+7kv8sKGul8RtZ2XeCrgkNeMT9Tw6laDLnHFZ3v8GuBmhxTG' +
        'Foelf6ORbq3hBeEtDPM+x1MPA4sSTUCKJLoXY8uNIRKsClfWYeKl0JrUXQ2dLy9D9o/nhaDwzZkHts/iEJEljcpwxQdQiwcSsSKmOg==',
      'base64'
    ),
    text: false
  }
  t.strictSame(await opened({ state: 'completed', record, ttlMs: null }), {
    state: 'completed',
    record: reply({
      ...base,
      headers: [
        ['content-type', 'text/plain'],
        ['x-many', ['a', 'b']]
      ],
      body: Buffer.from('zwölf')
    }),
    ttlMs: null
  })
})

t.test('a tombstone that was stored by the first version can be read', async (t) => {
  const outside = { kind: 'tombstone', fingerprint: TOMBSTONE_BASE, createdAt: 0 } as const
  for (const reason of ['hijacked', 'too-large'] as const) {
    const found = await opened({ state: 'completed', record: { ...outside, reason }, ttlMs: null })
    t.strictSame(found, { state: 'completed', record: { kind: 'tombstone', reason, ...base }, ttlMs: null })
  }
})

t.test('what is listed shows what was sealed, and what stands beside it goes with it', async (t) => {
  const listed = { key: 'key', state: 'completed', createdAt: 0, ttlMs: 5 } as const
  const of = (found: Partial<ListedKey>) => listedAs({ ...listed, ...found } as ListedKey)
  const shown = (outcome: unknown) => [{ ...listed, ...base, outcome }]
  t.strictSame(await of({ fingerprint: REPLY_BASE, outcome: 200 }), shown(201))
  t.strictSame(await of({ fingerprint: TOMBSTONE_BASE, outcome: 'hijacked' }), shown('hijacked'))
  for (const fingerprint of [REPLY_BASE, TOMBSTONE_BASE]) {
    t.strictSame(await of({ fingerprint, outcome: 'too-large' }), shown('too-large'))
    for (const wrong of [
      { outcome: 'stream-failed' },
      { outcome: 201 },
      { outcome: fingerprint === REPLY_BASE ? 'hijacked' : 200 },
      { outcome: fingerprint === REPLY_BASE ? 200 : 'hijacked', createdAt: 1 },
      { outcome: fingerprint === REPLY_BASE ? 200 : 'hijacked', key: 'another' }
    ] as const) {
      t.strictSame(await of({ fingerprint, ...wrong }), [], `${wrong.outcome}`)
    }
  }
  for (const fingerprint of ['', 'in the clear', CLAIM]) t.strictSame(await of({ fingerprint, outcome: 200 }), [])
})

t.test('a listed claim shows what was sealed, and is left out where it cannot be opened', async (t) => {
  for (const found of [
    { key: 'key', state: 'running', leaseMs: 5, attempt: 1 },
    { key: 'key', state: 'abandoned', lapsedMs: 5, attempt: 2, ended: true }
  ] as const) {
    t.strictSame(await listedAs({ ...found, fingerprint: CLAIM }), [{ ...found, fingerprint: 'a fingerprint' }])
    for (const fingerprint of ['', 'in the clear', REPLY_BASE])
      t.strictSame(await listedAs({ ...found, fingerprint }), [])
  }
})

t.test('an error of the store behind is an error of a list', async (t) => {
  const inner = Object.assign(new MemoryStore(), { list: () => Promise.reject(new Error('down')) })
  await t.rejects(new EncryptedStore(inner, { keys }).list?.(['reply'], null) as Promise<unknown>, { message: 'down' })
})

t.test('a step that was stored by the first version can be read', async (t) => {
  const sealed = 'AXg1rC-bcPVfuqsUTulqHVz-eURV6gUIYZcGwjXvM2HHQkuFsmp61hHT96RHhjcUNK-cQFAKPJWnzsoZBFryjdGGs3Y'
  const found = { state: 'acquired', attempt: 2, steps: [['charge', sealed]] } as const
  t.strictSame(await opened(found), { ...found, steps: [['charge', '{"id":"zwölf"}']] })
})

t.test('a claim in a transaction of another process shows nothing that could be decrypted', async (t) => {
  const found: Acquisition = { state: 'running', fingerprint: '', leaseMs: 5 }
  t.strictSame(await opened(found), found)
  await t.rejects(opened({ state: 'abandoned', fingerprint: '', attempt: 1 }))
})

/* Settling: the store behind compares what is sealed, and nothing is sealed twice alike */

const SETTLED = { record: reply({ statusCode: 299 }), ttlMs: null }

/** Does something behind the back of who settles, between its look and the settlement itself, for the first time. */
function beforeSettling(inner: MemoryStore, then: () => Promise<unknown>): EncryptedStore {
  let isFirst = true
  const settle = async (key: string, fingerprint: string, settlement: Settlement) => {
    if (isFirst) {
      isFirst = false
      await then()
    }
    return inner.settle(key, fingerprint, settlement)
  }
  const between = new Proxy(inner, {
    get: (target, name) => {
      const value = name === 'settle' ? settle : Reflect.get(target, name)
      return typeof value === 'function' ? value.bind(target) : value
    }
  })
  return new EncryptedStore(between, { keys })
}

t.test(
  'what was put in the place of a tombstone while it was being settled is settled, if it looks the same',
  async (t) => {
    for (const [fingerprint, isSettled] of [
      ['fingerprint', true],
      ['another', false]
    ] as const) {
      const inner = new MemoryStore()
      const [other, key] = [new EncryptedStore(inner, { keys }), newKey()]
      await finish(other, key, tombstone('hijacked'))
      const record = { ...tombstone('settled'), fingerprint }
      const store = beforeSettling(inner, () => other.settle?.(key, 'fingerprint', { record, ttlMs: null }) as never)
      t.equal(await store.settle?.(key, 'fingerprint', SETTLED), isSettled)
      same(t, (await other.get?.(key)) ?? null, isSettled ? SETTLED.record : record)
    }
  }
)

t.test('what was taken over while it was being settled is not settled', async (t) => {
  const inner = new MemoryStore()
  const [other, key] = [new EncryptedStore(inner, { keys }), newKey()]
  await lapsed(other, key)
  const store = beforeSettling(inner, () => other.acquire(key, claim({ takeover: true })))
  t.equal(await store.settle?.(key, 'fingerprint', SETTLED), false)
  t.match(await other.get?.(key), { state: 'running', attempt: 2 })
})

t.test('what cannot be opened is not settled, and that is an error', async (t) => {
  const inner = new MemoryStore()
  const [store, key] = [new EncryptedStore(inner, { keys }), newKey()]
  await lapsed(inner, key)
  await t.rejects(store.settle?.(key, 'fingerprint', SETTLED) as Promise<unknown>, { message: /not encrypted/ })
  t.match(await inner.get(key), { state: 'abandoned' })
})

t.test('what the caller changes after its call is not settled', async (t) => {
  const [store, key] = [new EncryptedStore(new MemoryStore(), { keys }), newKey()]
  await lapsed(store, key)
  const record = reply({ statusCode: 299 })
  const settled = store.settle?.(key, 'fingerprint', { record, ttlMs: null })
  record.body.fill(0)
  t.equal(await settled, true)
  same(t, (await store.get?.(key)) ?? null, SETTLED.record)
})

t.test('it settles in front of a store that can settle and look', (t) => {
  const blind: IdempotencyStore = Object.assign(new MemoryStore(), { get: undefined })
  t.equal(new EncryptedStore(blind, { keys }).settle, undefined)
  t.type(new EncryptedStore(new MemoryStore(), { keys }).settle, 'function')
  t.end()
})
