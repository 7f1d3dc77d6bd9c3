import t from 'tap'
import { type Acquisition, EncryptedStore, type IdempotencyStore, type StoredRecord } from '../../index.js'
import { claim, reply } from '../support/store-fixtures.js'

/* What is encrypted must be readable by the versions to come; what it promises as a store is tried in stores/. */

const keys = [Buffer.alloc(32, 7)]

/** What is read when the store behind says this. */
function opened(found: Acquisition): Promise<Acquisition> {
  const yes = async () => true
  const inner: IdempotencyStore = { acquire: async () => found, renew: yes, complete: yes, release: yes }
  return new EncryptedStore(inner, { keys }).acquire('key', claim())
}

t.test('a claim that was stored by the first version can be read', async (t) => {
  const fingerprint = 'AXg1rC8lpntjoXSN5zQAUM-eF46kckwKBItX3EjpaFkL4PwcNuAnMEqex-U1ZqEjvk8WEzYtiDzRpImKMOp4--6OPU4'
  for (const found of [
    { state: 'running', leaseMs: 5 },
    { state: 'abandoned', attempt: 2 }
  ] as const) {
    t.strictSame(await opened({ ...found, fingerprint }), { ...found, fingerprint: 'a fingerprint' })
  }
})

t.test('a reply that was stored by the first version can be read', async (t) => {
  const record: StoredRecord = {
    kind: 'reply',
    fingerprint:
      'AXg1rC-Ivz2yWwzD3d1UCzPVgypHdgyoSDiQnIdR3pNqFddPjtx8B_joEd6ThwIPuLDNdVdji0Qwm3k1Roid_j5XdGQw53Zkkr8VQQGo09NPyhF0',
    createdAt: 0,
    statusCode: 200,
    headers: [],
    body: Buffer.from(
      'AXg1rC8z23Y+Tyx9KZXYdPXmo3ZPEfMeptLZZf96U3ebQgrGza2+7GFMnPS9Y4nGwzcN4TqFAnOBQGxFZJ2Z3CWyqO+LUKC73crnzhkW' +
        '2a2dahB0iIKzxdmtYeNZEkMm00ocSgMo8188YYtJCJrRjH45dWY+dZxs14cGbqAX9MwDiw9OvmQPetpBg7VmBSAuiSNaB9MJhxJwviW+Sw==',
      'base64'
    ),
    text: false
  }
  t.strictSame(await opened({ state: 'completed', record, ttlMs: null }), {
    state: 'completed',
    record: reply({
      fingerprint: 'a fingerprint',
      createdAt: 1_700_000_000_000,
      headers: [
        ['content-type', 'text/plain'],
        ['x-many', ['a', 'b']]
      ],
      body: Buffer.from('zwölf')
    }),
    ttlMs: null
  })
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
