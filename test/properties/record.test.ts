import { isDeepStrictEqual } from 'node:util'
import fc from 'fast-check'
import t from 'tap'
import { UnreadableAnswer } from '../../lib/errors.js'
import { decodeRecord, encodeRecord, writeLength } from '../../lib/stores/record-codec.js'
import type { StoredRecord } from '../../types/index.js'

const text = fc.oneof(fc.string({ unit: 'binary' }), fc.constantFrom('\ud800', 'a\udc00', '__proto__'))
const bytes = fc.uint8Array({ maxLength: 200 }).map((array) => Buffer.from(array))
const base = { fingerprint: text, createdAt: fc.maxSafeNat() }

const plain = { noNullPrototype: true }

const record: fc.Arbitrary<StoredRecord> = fc.oneof(
  fc.record(
    {
      kind: fc.constant('tombstone' as const),
      ...base,
      reason: fc.constantFrom('too-large' as const, 'stream-failed' as const, 'hijacked' as const)
    },
    plain
  ),
  fc.record(
    {
      kind: fc.constant('reply' as const),
      ...base,
      statusCode: fc.integer({ min: 100, max: 599 }),
      headers: fc.array(fc.tuple(text, fc.oneof(text, fc.array(text, { maxLength: 3 }))), { maxLength: 5 }),
      body: bytes,
      text: fc.boolean()
    },
    plain
  )
)

/** The record, or `null` where decoding says that there is none. Fails where it fails in any other way. */
function decoded(bytes: Buffer, offset: number): StoredRecord | null {
  try {
    return decodeRecord(bytes, offset)
  } catch (error) {
    if (!(error instanceof UnreadableAnswer)) throw error
    return null
  }
}

/** Can everything that handles records handle this one? */
function isRecord(record: StoredRecord): boolean {
  if (typeof record.fingerprint !== 'string' || !Number.isFinite(record.createdAt)) return false
  if (record.kind === 'tombstone') return ['too-large', 'stream-failed', 'hijacked'].includes(record.reason)
  const { statusCode, headers, body, text } = record
  if (!Number.isInteger(statusCode) || statusCode < 100 || statusCode > 599) return false
  if (!Buffer.isBuffer(body) || typeof text !== 'boolean') return false
  return headers.every(
    ([name, value]) => typeof name === 'string' && [value].flat().every((item) => typeof item === 'string')
  )
}

t.test('any record comes back as it was, behind any prefix', async () => {
  fc.assert(
    fc.property(record, bytes, (record, prefix) => {
      const encoded = encodeRecord(record, prefix)
      return isDeepStrictEqual(decodeRecord(encoded, prefix.length), record)
    }),
    { numRuns: 1_000 }
  )
})

t.test('flipped bits give an error, or a record of right form whose body is the end of its bytes', async () => {
  const flips = fc.uniqueArray(fc.nat(), { minLength: 1, maxLength: 3 })
  fc.assert(
    fc.property(record, bytes, flips, (record, prefix, flips) => {
      const encoded = encodeRecord(record, prefix)
      for (const flip of flips) {
        const at = prefix.length + (Math.floor(flip / 8) % (encoded.length - prefix.length))
        encoded[at] = (encoded[at] as number) ^ (1 << (flip % 8))
      }
      const found = decoded(encoded, prefix.length)
      if (found === null) return true
      return (
        isRecord(found) &&
        (found.kind === 'tombstone' || encoded.subarray(-found.body.length || encoded.length).equals(found.body))
      )
    }),
    { numRuns: 3_000 }
  )
})

t.test('a cut record is an error, or the same with less of its body', async () => {
  fc.assert(
    fc.property(record, fc.nat(), (record, cut) => {
      const encoded = encodeRecord(record, Buffer.alloc(0))
      const found = decoded(encoded.subarray(0, cut % encoded.length), 0)
      if (found === null) return true
      if (found.kind !== 'reply' || record.kind !== 'reply' || found.body.length >= record.body.length) return false
      return isDeepStrictEqual(found, { ...record, body: record.body.subarray(0, found.body.length) })
    }),
    { numRuns: 1_000 }
  )
})

t.test('any bytes at all give an error or a record of right form', async () => {
  const claiming = fc.tuple(fc.nat({ max: 300 }), fc.oneof(text, fc.json())).map(([length, head]) => {
    const bytes = Buffer.concat([Buffer.alloc(4), Buffer.from(head)])
    writeLength(bytes, length % (bytes.length + 1), 0)
    return bytes
  })
  fc.assert(
    fc.property(fc.oneof(bytes, claiming), fc.nat({ max: 10 }), (bytes, offset) => {
      const found = decoded(bytes, offset)
      return found === null || isRecord(found)
    }),
    { numRuns: 2_000 }
  )
})
