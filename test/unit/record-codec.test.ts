import t from 'tap'
import { decodeRecord, encodeRecord, readLength, writeLength } from '../../lib/stores/record-codec.js'
import type { StoredRecord, StoredReply, Tombstone } from '../../types/index.js'

const NONE = Buffer.alloc(0)
const UNDECODABLE = { message: 'A stored idempotency record could not be decoded' }

const reply = (members: Partial<StoredReply> = {}): StoredReply => ({
  kind: 'reply',
  fingerprint: 'head.payload',
  createdAt: 1_763_000_000_000,
  statusCode: 201,
  headers: [
    ['content-type', 'application/json; charset=utf-8'],
    ['link', ['<a>; rel="next"', '<b>; rel="prev"']]
  ],
  body: Buffer.from('{"id":1}'),
  text: true,
  ...members
})

const tombstone = (reason: Tombstone['reason'] = 'too-large'): Tombstone => ({
  kind: 'tombstone',
  fingerprint: 'head.payload',
  createdAt: 1_763_000_000_000,
  reason
})

const roundTrip = (record: StoredRecord) => decodeRecord(encodeRecord(record, NONE), 0)

/** The bytes of a record whose head is this text. */
function withHead(head: string | Buffer, body = ''): Buffer {
  const bytes = Buffer.from(head)
  const lengths = Buffer.alloc(8)
  writeLength(lengths, bytes.length, 0)
  writeLength(lengths, Buffer.byteLength(body), 4)
  return Buffer.concat([lengths, bytes, Buffer.from(body)])
}

t.test('a reply comes back as it was', async (t) => {
  const every = Buffer.from(Array.from({ length: 256 }, (_, i) => i))
  for (const record of [
    reply(),
    reply({ body: NONE }),
    reply({ body: every, text: false }),
    reply({ body: Buffer.from('é🔑\u0000'), text: true }),
    reply({ headers: [] }),
    reply({ headers: [['x-empty', '']] }),
    reply({ headers: [['x-none', []]] }),
    reply({
      headers: [
        ['__proto__', 'a'],
        ['x', 'é\ud800"\\\n'],
        ['x', 'again']
      ]
    }),
    reply({ fingerprint: '' }),
    reply({ fingerprint: 'é"\\' }),
    reply({ statusCode: 100 }),
    reply({ statusCode: 599 }),
    reply({ createdAt: 0 }),
    reply({ createdAt: 1.5 })
  ]) {
    t.strictSame(roundTrip(record), record)
  }
})

t.test('a tombstone comes back as it was', async (t) => {
  for (const reason of ['too-large', 'stream-failed', 'hijacked'] as const) {
    t.strictSame(roundTrip(tombstone(reason)), tombstone(reason))
  }
})

t.test('a large body is neither cut nor changed', async (t) => {
  const body = Buffer.alloc(3_000_000, 'abcdefg')
  const { body: back } = roundTrip(reply({ body })) as StoredReply
  t.ok(back.equals(body))
})

t.test('a body of 28 bits of length is stored, a longer one is refused', async (t) => {
  // Nothing of them is looked at: so much memory would take its time.
  const bodyOf = (length: number) => ({ length, copy: () => length }) as unknown as Buffer
  const longest = roundTrip(reply({ body: bodyOf(2 ** 28 - 1) })) as StoredReply
  t.equal(longest.body.length, 2 ** 28 - 1)
  t.throws(
    () => encodeRecord(reply({ body: bodyOf(2 ** 28) }), NONE),
    new RangeError('The reply is too large to be stored')
  )
})

t.test('a length takes four bytes, and leaves the next one as it is', async (t) => {
  for (const length of [0, 1, 0x7f, 0x80, 2 ** 28 - 1]) {
    const bytes = Buffer.alloc(6, 0xee)
    writeLength(bytes, length, 1)
    t.equal(readLength(bytes, 1), length)
    t.strictSame([bytes[0], bytes[5]], [0xee, 0xee])
    t.ok(bytes.subarray(1, 5).every((byte) => byte < 0x80))
  }
})

t.test('a record stands behind a prefix, which is left as it is', async (t) => {
  const prefix = Buffer.from([0xff, 0, 1])
  for (const record of [reply(), tombstone()]) {
    const bytes = encodeRecord(record, prefix)
    t.strictSame(bytes.subarray(0, 3), prefix)
    t.strictSame(decodeRecord(bytes, 3), record)
  }
})

t.test('what was encoded does not change with the body that it was made of', async (t) => {
  const body = Buffer.from('before')
  const bytes = encodeRecord(reply({ body }), NONE)
  body.write('after!')
  t.equal((decodeRecord(bytes, 0) as StoredReply).body.toString(), 'before')
})

t.test('every cut of a tombstone is an error', async (t) => {
  const bytes = encodeRecord(tombstone(), NONE)
  for (let length = 0; length < bytes.length; length++) {
    t.throws(() => decodeRecord(bytes.subarray(0, length), 0), UNDECODABLE, `${length} bytes`)
  }
})

// The length of the body is not written down: a record ends where its value in the store ends, and a store
// keeps or loses a value as a whole.
t.test('every cut of a reply is an error, in its head as in its body, and so is what is added', async (t) => {
  for (const record of [reply(), reply({ body: NONE }), reply({ body: Buffer.from('[0,1,"a",[]]'), text: false })]) {
    const bytes = encodeRecord(record, NONE)
    for (let length = 0; length < bytes.length; length++) {
      t.throws(() => decodeRecord(bytes.subarray(0, length), 0), UNDECODABLE, `${length} bytes`)
    }
    t.throws(() => decodeRecord(Buffer.concat([bytes, Buffer.from('x')]), 0), UNDECODABLE)
  }
})

t.test('an offset at or behind the end is an error', async (t) => {
  const bytes = encodeRecord(tombstone(), NONE)
  for (const offset of [bytes.length - 3, bytes.length, bytes.length + 1, bytes.length + 100]) {
    t.throws(() => decodeRecord(bytes, offset), UNDECODABLE)
  }
})

t.test('a head that is not that of a record is an error', async (t) => {
  for (const head of [
    '',
    'nonsense',
    '{',
    'null',
    '1',
    '"text"',
    '{}',
    '[]',
    '["f"]',
    '["f",1]',
    '[1,1,"too-large"]',
    '[null,1,"too-large"]',
    '["f","1","too-large"]',
    '["f",null,"too-large"]',
    '["f",1e999,"too-large"]',
    '["f",1,"too-small"]',
    '["f",1,""]',
    '["f",1,null]',
    '["f",1,200]',
    '["f",1,"too-large",1]',
    '["f",1,"too-large",1,[]]',
    '["f",1,200,1]',
    '["f",1,200,1,[],0]',
    '["f",1,"200",1,[]]',
    '["f",1,99,1,[]]',
    '["f",1,1000,1,[]]',
    '["f",1,200.5,1,[]]',
    '["f",1,-200,1,[]]',
    '["f",1,null,1,[]]',
    '["f",1,200,true,[]]',
    '["f",1,200,2,[]]',
    '["f",1,200,null,[]]',
    '["f",1,200,1,null]',
    '["f",1,200,1,{}]',
    '["f",1,200,1,"a"]',
    '["f",1,200,1,[null]]',
    '["f",1,200,1,["ab"]]',
    '["f",1,200,1,[[]]]',
    '["f",1,200,1,[["a"]]]',
    '["f",1,200,1,[["a","b","c"]]]',
    '["f",1,200,1,[[1,"b"]]]',
    '["f",1,200,1,[["a",1]]]',
    '["f",1,200,1,[["a",null]]]',
    '["f",1,200,1,[["a",{}]]]',
    '["f",1,200,1,[["a",["b",1]]]]',
    '["f",1,200,1,[["a","b"],["c"]]]',
    Buffer.from([0xff, 0xfe, 0x00])
  ]) {
    t.throws(() => decodeRecord(withHead(head, 'body'), 0), UNDECODABLE, `${head}`)
  }
  t.same(decodeRecord(withHead('["f",1,200,1,[["a","b"]]]', 'body'), 0), {
    kind: 'reply',
    fingerprint: 'f',
    createdAt: 1,
    statusCode: 200,
    headers: [['a', 'b']],
    body: Buffer.from('body'),
    text: true
  })
})

t.test('a head that claims to be longer than the value is an error, however long', async (t) => {
  const bytes = encodeRecord(tombstone(), NONE)
  for (const length of [bytes.length - 3, bytes.length, 0x7fffffff, 0x80000000, 0xffffffff]) {
    const claiming = Buffer.from(bytes)
    if (length < 2 ** 28) writeLength(claiming, length, 0)
    else claiming.writeUInt32BE(length)
    t.throws(() => decodeRecord(claiming, 0), UNDECODABLE)
  }
})

t.test('bytes that are no record at all are an error', async (t) => {
  for (const bytes of [NONE, Buffer.from('{"kind":"reply"}'), Buffer.alloc(1_000), Buffer.alloc(1_000, 0xff)]) {
    t.throws(() => decodeRecord(bytes, 0), UNDECODABLE)
  }
})
