import t from 'tap'
import { MemoryEntry, sizeOf } from '../../lib/stores/memory/entry.js'
import type { StoredRecord, StoredReply } from '../../types/index.js'
import { reply, tombstone } from '../support/store-fixtures.js'

/* Replies as they are kept in the memory of the process. */

type Headers = StoredReply['headers']

const kept = (record: StoredRecord, expires = 1_000) => new MemoryEntry('key', record, expires)
const headersOf = (entry: MemoryEntry) => (entry.at(0).record as StoredReply).headers

t.test('what is kept comes back as it was', async (t) => {
  for (const record of [
    reply(),
    reply({ text: false, body: Buffer.from([0, 128, 255]) }),
    reply({ text: true, body: Buffer.from('zwölf €') }),
    reply({ text: true, body: Buffer.from([255, 254, 0]) }),
    reply({ text: false, body: Buffer.alloc(0), headers: [], statusCode: 204 }),
    reply({ fingerprint: '', createdAt: 0 }),
    reply({ fingerprint: 'f~1~~/route' }),
    reply({ fingerprint: 'g~2~~/route' }),
    reply({ fingerprint: 'g~2~~/another~' }),
    reply({ fingerprint: '~' }),
    reply({ fingerprint: 'ÿ' }),
    reply({ fingerprint: '€ 𝄞 \ud800' }),
    tombstone('too-large'),
    tombstone('hijacked')
  ]) {
    t.strictSame(kept(record).at(0), { state: 'completed', record, ttlMs: 1_000 })
  }
})

t.test('each reply keeps its own headers, however like those of the one before they are', async (t) => {
  const all: Headers[] = [
    [['a', '1']],
    [['a', '2']],
    [['b', '2']],
    [['b', '2']],
    [
      ['b', '2'],
      ['a', '1']
    ],
    [
      ['a', '1'],
      ['b', '2']
    ],
    [
      ['a', '1'],
      ['b', '3']
    ],
    [
      ['a', '1'],
      ['c', '3']
    ],
    [
      ['d', '1'],
      ['c', '3']
    ],
    [
      ['d', '1'],
      ['c', ['3', '4']]
    ],
    [
      ['d', '1'],
      ['c', ['3', '5']]
    ],
    [['d', '1']],
    [],
    [['d', '1']]
  ]
  const entries = all.map((headers) => kept(reply({ headers: structuredClone(headers) })))
  t.strictSame(entries.map(headersOf), all)
})

t.test('each has its own outcome, where the headers are those of the one before', async (t) => {
  const records = [
    reply({ headers: [], statusCode: 200 }),
    reply({ headers: [], statusCode: 204 }),
    tombstone('hijacked'),
    tombstone('too-large'),
    reply({ headers: [], statusCode: 201 })
  ]
  const entries = records.map((record) => kept(record))
  t.strictSame(
    entries.map((entry) => entry.at(0).record),
    records
  )
})

t.test('what is kept is nobody else’s, and what comes back neither', async (t) => {
  const headers: Headers = [['set-cookie', ['a', 'b']]]
  const given = reply({ text: false, headers, body: Buffer.from('body') })
  const before = structuredClone({ ...given, body: [...given.body] })
  const entry = kept(given)
  for (const record of [given, entry.at(0).record as StoredReply]) {
    record.body.fill(0)
    for (const [, value] of record.headers) (value as string[]).push('c')
    record.headers.push(['x', 'y'])
  }
  const { body, ...after } = entry.at(0).record as StoredReply
  t.strictSame({ ...after, body: [...body] }, before)
})

t.test('what is left of its life is told in whole milliseconds, and nothing where it has no end', async (t) => {
  const entry = kept(reply(), 1_000.9)
  t.equal(entry.expires, 1_000)
  t.equal(entry.at(0.5).ttlMs, 1_000)
  t.equal(entry.at(999).ttlMs, 1)
  t.equal(kept(reply(), Number.POSITIVE_INFINITY).at(5).ttlMs, null)
})

t.test('an entry takes more the more is in it', async (t) => {
  const least = sizeOf('', tombstone('hijacked'))
  const fingerprint = 'f'.repeat(1_000)
  const many: Headers = Array.from({ length: 10 }, () => ['', ''])
  const bare = reply({ headers: [], body: Buffer.alloc(0) })
  for (const [more, less] of [
    [sizeOf('k'.repeat(1_000), tombstone('hijacked')), least + 1_000],
    [sizeOf('', { ...tombstone('hijacked'), fingerprint }), least + 900],
    [sizeOf('', { ...bare, body: Buffer.alloc(1_000) }), sizeOf('', bare) + 1_000],
    [sizeOf('', { ...bare, headers: [['n'.repeat(1_000), '']] }), sizeOf('', bare) + 1_000],
    [sizeOf('', { ...bare, headers: [['', 'v'.repeat(1_000)]] }), sizeOf('', bare) + 1_000],
    [sizeOf('', { ...bare, headers: many }), sizeOf('', bare) + 100]
  ] as const) {
    t.ok(more >= less, `${more} of ${less}`)
  }
  for (const record of [
    bare,
    reply(),
    reply({
      text: false,
      body: Buffer.from([0, 255]),
      headers: [
        ['set-cookie', ['a', 'bc']],
        ['x', 'y']
      ]
    }),
    reply({ text: true, body: Buffer.from('zwölf €'), fingerprint: '€ 𝄞' }),
    tombstone('too-large')
  ]) {
    t.equal(kept(record).size, sizeOf('key', record))
  }
})
