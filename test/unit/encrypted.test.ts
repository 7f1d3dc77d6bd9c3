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
  const fingerprint = 'AXg1rC_4wYhJLkkYA-5TA559JNauNL_b00a7tofQj2vZWFZXO3MUYqW9trIfn8IJ3zFqQI0kDrXtgTlY'
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
    fingerprint: 'AXg1rC-g41bdzOcZ2Gp33nWd5XCWf-R77QXDS8atpl5yHaBXh84e4K0IurBrtQtcY_ACNsuIo6aiP5do',
    createdAt: 1_700_000_000_000,
    statusCode: 200,
    headers: [],
    body: Buffer.from(
      'AXg1rC/skNzvY4ZWx4zUue6O09VPTpXOzhwpHJeiDm4F62UYvbuV1M7dr1ADEiT0TMcrnj2CKCtimQTlSajFyNa4DgTK3AbgaW76kgWV0n6ibm9C' +
        'RNHyzPqA2u/X8RxuG8jJmU/GFdnu0LarWXoCq+88pELnEy3dP54MNV+sPSMTUkcUUTJGTnZoi1lPG0TArgnKtWg=',
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

t.test('a claim in a transaction of another process shows nothing that could be decrypted', async (t) => {
  const found: Acquisition = { state: 'running', fingerprint: '', leaseMs: 5 }
  t.strictSame(await opened(found), found)
  await t.rejects(opened({ state: 'abandoned', fingerprint: '', attempt: 1 }))
})
