import type { StoredRecord } from '../../types/index.js'
import {
  answers,
  claim,
  equal,
  FRESH,
  finish,
  LONG,
  newKey,
  refuses,
  replays,
  reply,
  take,
  tombstone
} from './fixtures.js'
import { conformanceCase } from './harness.js'

// What was completed comes back as it was, byte for byte.

const everyByte = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))

const samples: [name: string, record: StoredRecord][] = [
  ['a text reply', reply({ body: Buffer.from('{"a":1}'), text: true })],
  ['a reply of bytes that could be text', reply({ body: Buffer.from('{"a":1}'), text: false })],
  ['a text reply in many scripts', reply({ body: Buffer.from('naïve 🚲 日本語 \u0000 \u2028'), text: true })],
  ['a text reply that looks like base64', reply({ body: Buffer.from('AAECAw=='), text: true })],
  ['a reply of every byte value', reply({ body: everyByte, text: false })],
  ['a reply of every byte value that counts as text', reply({ body: everyByte, text: true })],
  ['an empty text', reply({ body: Buffer.alloc(0), text: true })],
  ['an empty body', reply({ body: Buffer.alloc(0), text: false })],
  ['a reply of 1 MiB', reply({ body: Buffer.alloc(1 << 20, everyByte), text: false })],
  ['a reply of 1 MiB of text', reply({ body: Buffer.alloc(1 << 20, 'ü'), text: true })],
  ['a reply with a part of a larger buffer as its body', reply({ body: everyByte.subarray(13, 77), text: false })],
  ['a reply without headers', reply({ headers: [] })],
  [
    'a reply with headers of several values, in their order',
    reply({
      headers: [
        ['link', ['</a>; rel="next"', '</b>; rel="prev"']],
        ['x-one', ['alone']],
        ['x-none', []],
        ['x-comma', 'a, b'],
        ['x-empty', ''],
        ['content-type', 'text/plain'],
        ['1', 'a name that is a number'],
        ['x-number', '1']
      ]
    })
  ],
  [
    'a reply with unusual text in its headers',
    reply({
      headers: [
        ['__proto__', 'a'],
        ['constructor', 'b'],
        ['x-unicode', 'ü 🚲 "quoted" \\ \u0000 \n'],
        ['x-long', 'x'.repeat(100_000)]
      ]
    })
  ],
  ['a reply with an empty fingerprint', reply({ fingerprint: '' })],
  ['a reply with unusual text in its fingerprint', reply({ fingerprint: 'ü:🚲\n"\\\u0000,][' })],
  ['a reply of the earliest time', reply({ createdAt: 0, statusCode: 200 })],
  ['a reply with a status that nobody knows', reply({ statusCode: 599 })],
  ['a tombstone of a reply that was too large', tombstone('too-large')],
  ['a tombstone of a stream that failed', tombstone('stream-failed')],
  ['a tombstone of a hijacked reply', tombstone('hijacked')]
]

export const records = [
  ...samples.map(([name, record]) =>
    conformanceCase(`${name} comes back as it was stored, every time`, async ({ store, second }) => {
      const key = newKey()
      await finish(store, key, record)
      for (const client of [store, second, store]) replays(await client.acquire(key, claim()), record)
      replays(await second.acquire(key, claim({ withTtl: true })), record)
      if (second.get) replays(await second.get(key), record)
    })
  ),

  conformanceCase('the fingerprint of a completed key is the one of its record', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key, { fingerprint: 'of the claim' })
    await store.complete(key, token, reply({ fingerprint: 'of the record' }), LONG)
    replays(await second.acquire(key, claim({ fingerprint: 'another' })), reply({ fingerprint: 'of the record' }))
  }),

  conformanceCase(
    'a record that cannot be decoded is an error, and no answer and no free key, and others go on',
    async ({ store, second, spoil }) => {
      if (spoil === undefined) return
      const [key, other] = [newKey(), newKey()]
      const token = await finish(store, key)
      await finish(store, other)
      await spoil(key)
      for (const client of [store, second]) {
        for (const asked of [claim(), claim({ takeover: true }), claim({ token })]) {
          await refuses(client.acquire(key, asked), 'acquire of a record that cannot be decoded')
        }
        if (client.get) await refuses(client.get(key), 'get of a record that cannot be decoded')
        replays(await client.acquire(other, claim()), reply(), 'another key')
        answers(await client.acquire(newKey(), claim()), FRESH, 'another key')
      }
      if (second.delete) {
        equal(await second.delete(key), true, 'delete of a record that cannot be decoded')
        answers(await store.acquire(key, claim()), FRESH, 'a key whose record was deleted')
      }
    }
  )
]
