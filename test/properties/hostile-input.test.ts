import { connect } from 'node:net'
import fc from 'fast-check'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import { MemoryStore } from '../../index.js'
import { UnreadableAnswer } from '../../lib/errors.js'
import { type KeyRules, keyInBody, keyInHeader, keyInQuery, parseKey } from '../../lib/http/key.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { StoreContext } from '../../lib/operation/store-context.js'
import { decodeRecord, encodeRecord, readLength, writeLength } from '../../lib/stores/record-codec.js'
import type { StoredHeader, StoredRecord } from '../../types/index.js'
import { build, codeOf, listen, post, REPLAYED, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { finish, reply, tombstone } from '../support/store-fixtures.js'

// What nobody means to send, and what nobody means to store.

const RULES: KeyRules = { header: 'idempotency-key', field: 'key', keyFormat: 'any', maxKeyLength: 255 }
const FORMATS = ['any', 'uuid', 'structured', /^a+$/, /./] satisfies KeyRules['keyFormat'][]
const PLACES = ['header', 'query', 'body'] as const
const PROTOTYPE_NAMES = ['__proto__', 'constructor', 'toString', 'hasOwnProperty', 'valueOf', 'prototype', 'then']

/** The key of a request that has this raw value in one place; `undefined` without one, `null` for a refused one. */
function keyIn(
  place: (typeof PLACES)[number],
  raw: unknown,
  changes: Partial<KeyRules> = {}
): string | undefined | null {
  const rules = { ...RULES, ...changes }
  const request = { headers: { 'idempotency-key': raw }, query: { key: raw }, body: { key: raw } }
  const find = { header: keyInHeader, query: keyInQuery, body: keyInBody }[place]
  try {
    const found = find(request as unknown as FastifyRequest, rules)
    return found === undefined ? undefined : parseKey(found, rules)
  } catch (error) {
    if ((error as { code?: string }).code !== 'FST_IDEMPOTENCY_KEY_INVALID') throw error
    return null
  }
}

/** As it arrives: Node hands the bytes of a header over as Latin-1. */
const inHeader = (text: string, changes: Partial<KeyRules> = {}) =>
  keyIn('header', Buffer.from(text).toString('latin1'), { keyFormat: 'structured', maxKeyLength: 1_000, ...changes })

t.test('the test vectors of structured field strings are read as RFC 9651 says', async (t) => {
  const long = 'foo '.repeat(65)
  const vectors: [name: string, raw: string, expected: string | null][] = [
    ['basic string', '"foo bar"', 'foo bar'],
    ['long string', `"${long}"`, long],
    ['string quoting', String.raw`"foo \"bar\" \\ baz"`, String.raw`foo "bar" \ baz`],
    ['two spaces inside', '"a  b"', 'a  b'],
    ['spaces at the ends', '" a "', ' a '],
    ['a comma inside', '"a, b"', 'a, b'],
    ['a semicolon inside', '"a;b=1"', 'a;b=1'],
    ['spaces around', '  "a"  ', 'a'],
    ['non-ascii string', '"füü"', null],
    ['tab in string', '"\t"', null],
    ['newline in string', '" \n "', null],
    ['single quoted string', "'foo'", null],
    ['unbalanced string', '"foo', null],
    ['unbalanced string the other way', 'foo"', null],
    ['a lone quote', '"', null],
    ['bad string quoting', String.raw`"foo \,"`, null],
    ['ending string quote', String.raw`"foo \"`, null],
    ['abruptly ending string quote', '"foo \\', null],
    ['bytes behind', '"a"b', null],
    ['another string behind', '"a" "b"', null],
    ['a list', '"a", "b"', null],
    ['a list of one', '"a",', null],
    ['a token', 'foo', null],
    ['a number', '1', null],
    ['a byte sequence', ':Zm9v:', null],
    ['a display string', '%"foo"', null],
    ['an inner list', '("foo")', null]
  ]
  for (const [name, raw, expected] of vectors) t.equal(inHeader(raw), expected, name)
  for (const raw of ['""', '"   "']) t.equal(inHeader(raw), null, 'a string, but blank: no key')
})

t.test('of all ASCII characters RFC 9651 takes the printable ones, and escapes only quote and backslash', async (t) => {
  for (let code = 0; code < 128; code++) {
    const char = String.fromCharCode(code)
    const special = char === '"' || char === '\\'
    const printable = code >= 0x20 && code <= 0x7e
    t.equal(inHeader(`"a${char}b"`), printable && !special ? `a${char}b` : null, `0x${code.toString(16)}`)
    t.equal(inHeader(`"a\\${char}b"`), special ? `a${char}b` : null, `escaped 0x${code.toString(16)}`)
  }
})

t.test('parameters are read as RFC 9651 says, and do not belong to the key', async (t) => {
  const good = ';b ; b ;  b ;*b ;b_-.*1 ;b=1 ;b=-0 ;b=1.5 ;b=999999999999999 ;b=a/b:c ;b="c;d" ;b="\\"" ;b=:Zm9v: ;b=::'
  const valid = [...good.split(/ (?=;)/), ';b=?0', ';b=@1659578233', ';b=%"f%c3%bc"', ';b;c;d', ';b=1;b=2', ';b  ']
  for (const rest of valid) t.equal(inHeader(`"a"${rest}`), 'a', rest)
  for (const rest of [
    ...[';', '; ', ' ;b', ';B', ';1', ';_b', ';b =1', ';b= 1', ';b=', ';=1', ';b;', ';b=1 c', ';\tb', ';b,'],
    ...[';b=1.', ';b=.5', ';b=1.2345', ';b=1234567890123.1', ';b=9999999999999999', ';b=-', ';b=--1', ';b=+1'],
    ...[';b=?2', ';b=?', ';b=?true', ';b=@', ';b=@1.5', ';b=:a', ';b=:*:', ';b="', ';b="\\a"', ';b=(1 2)', ';b=ü'],
    ...[';b=%"%C3%BC"', ';b=%"%g0"', ';b=%"%c"', ';b=%"', ';b=%a']
  ]) {
    t.equal(inHeader(`"a"${rest}`), null, rest)
  }
})

t.test('whatever bytes are sent, wherever a key may be, are a key within its limits or refused', async () => {
  const bytes = fc.uint8Array({ maxLength: 60 }).map((array) => Buffer.from(array).toString('latin1'))
  const nearly = fc.tuple(fc.constantFrom('"', ' "', '', '\t'), bytes, fc.constantFrom('"', '";a', '"\x00', '\\"', ' '))
  const raw = fc.oneof(
    bytes,
    nearly.map((parts) => parts.join('')),
    fc.string({ unit: 'binary' })
  )
  const place = fc.constantFrom(...PLACES)
  fc.assert(
    fc.property(
      raw,
      place,
      fc.constantFrom(...FORMATS),
      fc.integer({ min: 1, max: 80 }),
      (raw, place, keyFormat, max) => {
        const key = keyIn(place, raw, { keyFormat, maxKeyLength: max })
        if (key === null) return
        if (typeof key !== 'string' || key.trim() === '') throw new Error(`no key: ${JSON.stringify(key)}`)
        if (Buffer.byteLength(key) > max) throw new Error('too long')
      }
    ),
    { numRuns: 10_000 }
  )
})

t.test('every single byte, quoted or not, is a key or refused, and the same in a query as in a body', async (t) => {
  for (let code = 0; code < 256; code++) {
    const char = String.fromCharCode(code)
    for (const raw of [char, `a${char}b`, `"${char}`, `"${char}"`, `"\\${char}"`, `${char}"a"`, `"a"${char}`]) {
      const keys = PLACES.map((place) => keyIn(place, raw))
      if (keys.some((key) => key === undefined || key === '')) t.fail(`not judged: ${JSON.stringify(raw)}`)
      if (keys[1] !== keys[2]) t.fail(`another key in a body: ${JSON.stringify(raw)}`)
    }
  }
})

t.test('values of every type but text are refused as a key, not taken for one', async () => {
  const place = fc.constantFrom('query' as const, 'body' as const)
  fc.assert(
    fc.property(fc.jsonValue(), place, (value, place) => {
      fc.pre(typeof value !== 'string' && !(typeof value === 'object' && value !== null && 'value' in value))
      return keyIn(place, value) === null
    }),
    { numRuns: 1_000 }
  )
})

// With effort that grows by the square of the length this would take hours.
t.test('a hostile key of half a megabyte is judged without delay', async (t) => {
  const many = (part: string) => part.repeat(Math.ceil(500_000 / part.length))
  const keys = {
    backslashes: `"${many('\\')}`,
    quotes: many('"'),
    'escaped quotes': `"${many('\\"')}`,
    parameters: `"a"${many(';a=')}`,
    'semicolons and spaces': `"a"${many(';  ')}`,
    digits: `"a";a=${many('1')}!`,
    'display strings': `"a";a=%"${many('%c3')}`,
    'a byte sequence': `"a";a=:${many('A')}`,
    letters: many('a'),
    'half characters': many('\ud800'),
    'Latin-1': many('\xc3'),
    commas: many(','),
    'spaces inside': `a${many(' ')}a`,
    'tabs inside': `a${many('\t')}a`,
    'spaces in a parameter': `"a";${many(' ')}!`,
    nulls: many('\0')
  }
  for (const [name, raw] of Object.entries(keys)) {
    for (const keyFormat of FORMATS) {
      for (const place of PLACES) t.equal(keyIn(place, raw, { keyFormat }), null, name)
    }
  }
})

/** An app with a route whose key may be in a field of this name; what it was sent comes back. */
async function fieldApp(t: Test, field: string): Promise<FastifyInstance> {
  const app = await build(t, { field }, { onProtoPoisoning: 'ignore', onConstructorPoisoning: 'ignore' })
  app.post('/', { config: { idempotency: true } }, async (request) => ({ key: request.idempotency?.key ?? null }))
  return app
}

t.test('a field may have the name of something on a prototype, and is not found there', async (t) => {
  for (const field of PROTOTYPE_NAMES) {
    const app = await fieldApp(t, field)
    const json = { 'content-type': 'application/json' }
    const without = await app.inject({ method: 'POST', url: '/', headers: json, payload: '{"a":1}' })
    t.strictSame([without.statusCode, without.json()], [200, { key: null }], `${field} is not in {"a":1}`)
    const inBody = await app.inject({ method: 'POST', url: '/', headers: json, payload: `{"${field}":"in a body"}` })
    t.strictSame([inBody.statusCode, inBody.json()], [200, { key: 'in a body' }], `${field} in a body`)
    const inQuery = await app.inject({ method: 'POST', url: `/?${field}=in%20a%20query` })
    t.strictSame([inQuery.statusCode, inQuery.json()], [200, { key: 'in a query' }], `${field} in a query`)
    for (const payload of [`{"${field}":{}}`, `{"${field}":null}`, `{"${field}":[]}`, `{"${field}":{"value":1}}`]) {
      const refused = await app.inject({ method: 'POST', url: '/', headers: json, payload })
      t.strictSame([refused.statusCode, codeOf(refused)], [422, 'FST_IDEMPOTENCY_KEY_INVALID'], payload)
    }
  }
})

t.test('a key may have the name of something on a prototype, and is a key like another', async (t) => {
  const app = await fieldApp(t, 'key')
  for (const key of PROTOTYPE_NAMES) {
    const ways = [
      { url: `/?by=header&${key}=1`, headers: { 'idempotency-key': key } },
      { url: `/?key=${key}` },
      { url: `/?by=body&${key}=1`, payload: { key } }
    ]
    for (const [n, way] of ways.entries()) {
      const first = await app.inject({ method: 'POST', ...way })
      const expected = n === 0 ? [200, { key }] : [422, 'FST_IDEMPOTENCY_KEY_REUSED']
      t.strictSame([first.statusCode, n === 0 ? first.json() : codeOf(first)], expected, `${key} in ${way.url}`)
    }
    const again = await app.inject({ method: 'POST', ...ways[0] })
    t.strictSame([again.json(), again.headers[REPLAYED]], [{ key }, 'true'])
  }
})

t.test('any field and any value, in JSON or in a query, give an answer below 500', async (t) => {
  const field = fc.oneof(fc.constantFrom(...PROTOTYPE_NAMES), fc.string({ unit: 'binary', maxLength: 5 }))
  const apps = await Promise.all(PROTOTYPE_NAMES.map((name) => fieldApp(t, name)))
  await fc.assert(
    fc.asyncProperty(
      fc.constantFrom(...apps),
      field,
      fc.jsonValue(),
      fc.boolean(),
      async (app, name, value, inQuery) => {
        const text = JSON.stringify(value)
        const answer = await app.inject(
          inQuery
            ? { method: 'POST', url: `/?${new URLSearchParams([[name, text]])}` }
            : {
                method: 'POST',
                url: '/',
                headers: { 'content-type': 'application/json' },
                payload: `{${JSON.stringify(name)}:${text}}`
              }
        )
        if (answer.statusCode >= 500) throw new Error(`${answer.statusCode}: ${answer.payload}`)
      }
    ),
    { numRuns: 300 }
  )
})

const text = fc.oneof(fc.string({ unit: 'binary', maxLength: 20 }), fc.constantFrom('\ud800', '__proto__', '\r\n', '"'))
const record: fc.Arbitrary<StoredRecord> = fc.oneof(
  fc.constantFrom('too-large' as const, 'stream-failed' as const, 'hijacked' as const).map(tombstone),
  fc
    .record({
      fingerprint: text,
      createdAt: fc.maxSafeNat(),
      statusCode: fc.integer({ min: 100, max: 599 }),
      headers: fc.array(fc.tuple(text, fc.oneof(text, fc.array(text, { maxLength: 3 }))), { maxLength: 4 }),
      body: fc.uint8Array({ maxLength: 60 }).map((array) => Buffer.from(array)),
      text: fc.boolean()
    })
    .map(reply)
)

/** Fails unless the bytes are an error, or a record that can be handled. */
function judge(bytes: Buffer, offset = 0): 'error' | 'record' {
  let found: StoredRecord
  try {
    found = decodeRecord(bytes, offset)
  } catch (error) {
    if (!(error instanceof UnreadableAnswer)) throw error
    return 'error'
  }
  const { fingerprint, createdAt } = found
  let good = typeof fingerprint === 'string' && Number.isFinite(createdAt)
  if (found.kind === 'tombstone') {
    good &&= ['too-large', 'stream-failed', 'hijacked'].includes(found.reason)
  } else {
    const { statusCode, headers, body, text } = found
    good &&= Number.isInteger(statusCode) && statusCode >= 100 && statusCode <= 599
    good &&= Buffer.isBuffer(body) && typeof text === 'boolean' && Array.isArray(headers)
    good &&= headers.every(
      (header) => header.length === 2 && [header[0], header[1]].flat().every((part) => typeof part === 'string')
    )
  }
  if (!good) throw new Error(`malformed: ${JSON.stringify(found)}`)
  return 'record'
}

t.test('every cut of any record is an error', async () => {
  fc.assert(
    fc.property(record, (record) => {
      const bytes = encodeRecord(record, Buffer.alloc(0))
      for (let end = 0; end < bytes.length; end++) if (judge(bytes.subarray(0, end)) !== 'error') return false
      return judge(bytes) === 'record'
    }),
    { numRuns: 150 }
  )
})

t.test('every flipped bit of any record gives an error or a record of right form', async () => {
  fc.assert(
    fc.property(record, fc.nat({ max: 5 }), (record, offset) => {
      const bytes = encodeRecord(record, Buffer.alloc(offset))
      for (let bit = offset * 8; bit < bytes.length * 8; bit++) {
        const mask = 1 << (bit % 8)
        bytes[bit >> 3] = (bytes[bit >> 3] as number) ^ mask
        judge(bytes, offset)
        bytes[bit >> 3] = (bytes[bit >> 3] as number) ^ mask
      }
      return judge(bytes, offset) === 'record'
    }),
    { numRuns: 50 }
  )
})

t.test('bytes put into a record, taken out of it or overwritten give an error or a record of right form', async () => {
  const edit = fc.record({
    at: fc.nat(),
    remove: fc.nat({ max: 10 }),
    insert: fc.oneof(
      fc.uint8Array({ maxLength: 10 }).map((array) => Buffer.from(array)),
      fc.constantFrom('[', ']', ',', 'null', '{}', '1e999', '-1', '"', '\\u0000', '[[["a","b"]]]').map(Buffer.from)
    ),
    corrects: fc.boolean()
  })
  fc.assert(
    fc.property(record, fc.array(edit, { minLength: 1, maxLength: 4 }), (record, edits) => {
      let bytes: Buffer = encodeRecord(record, Buffer.alloc(0))
      for (const { at, remove, insert, corrects } of edits) {
        const from = at % (bytes.length + 1)
        const added = insert.length - Math.min(remove, bytes.length - from)
        bytes = Buffer.concat([bytes.subarray(0, from), insert, bytes.subarray(from + remove)])
        // Some of the damage is such that the lengths still fit.
        if (corrects && from >= 8) writeLength(bytes, readLength(bytes, 0) + added, 0)
      }
      judge(bytes)
    }),
    { numRuns: 5_000 }
  )
})

/** Everything that the server sends for a POST on a connection of its own. */
async function raw(port: number, key: string): Promise<string> {
  const socket = connect(port, '127.0.0.1')
  socket.write(
    `POST / HTTP/1.1\r\nhost: a\r\nidempotency-key: ${key}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n`
  )
  let received = ''
  for await (const chunk of socket.setEncoding('latin1')) received += chunk
  return received
}

const split: StoredHeader[] = [
  ['x-a', 'b\r\nx-injected: 1'],
  ['x-a', 'b\nx-injected: 1'],
  ['x-a', 'b\rx-injected: 1'],
  ['x-a', 'b\r\n\r\nHTTP/1.1 200 OK\r\nx-injected: 1\r\n\r\n'],
  ['x-a', ['b', 'c\r\nx-injected: 1']],
  ['set-cookie', ['a=1', 'b=2\r\nx-injected: 1']],
  ['x-a\r\nx-injected', '1'],
  ['x-a: b\r\nx-injected', '1'],
  ['\r\nx-injected', '1'],
  ['x a', '1'],
  ['x:a', '1'],
  ['', '1'],
  ['x-é', '1'],
  ['x-a', '\u0000'],
  ['x-a', '\u010d\u010ax-injected: 1'],
  ['content-type', 'text/plain\r\nx-injected: 1'],
  ['location', '/\r\nx-injected: 1']
]

t.test('a stored header that would split the reply is an error, and nothing of it is sent', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ++runs)
  const port = await listen(app)
  for (const [n, header] of split.entries()) {
    const shown = JSON.stringify(header)
    await finish(store, storageKey(null, `${n}`), reply({ fingerprint: '', headers: [header] }))
    for (const time of ['at first', 'again']) {
      const received = await raw(port, `${n}`)
      const head = received.slice(0, received.indexOf('\r\n\r\n'))
      t.match(received, /^HTTP\/1\.1 5\d\d /, `${shown} ${time}`)
      t.notMatch(head, /injected|idempotent-replayed/i, shown)
      t.equal(received.split('HTTP/1.1 ').length, 2, `one reply for ${shown}`)
    }
  }
  t.equal(runs, 0, 'the handler does not run')
  t.match(await raw(port, 'fresh'), /^HTTP\/1\.1 200 /, 'the server goes on')
})

t.test('any stored header is sent as one header, or is an error', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ++runs)
  const port = await listen(app)
  const bits = fc.constantFrom('a', 'x-', '\r', '\n', '\r\n', ':', ' ', '\0', '\u010a', '\x7f', '"', ',', '1')
  const part = fc.array(bits, { maxLength: 6 }).map((parts) => parts.join(''))
  let n = 0
  await fc.assert(
    fc.asyncProperty(part, part, async (name, value) => {
      const key = `k${n++}`
      await finish(store, storageKey(null, key), reply({ fingerprint: '', headers: [[`x-${name}`, `!${value}`]] }))
      const received = await raw(port, key)
      const [head = ''] = received.split('\r\n\r\n', 1)
      if (/^HTTP\/1\.1 5\d\d /.test(head)) return
      const lines = head.split(/\r\n|\r|\n/)
      if (!lines[0]?.startsWith('HTTP/1.1 201 ')) throw new Error(`${lines[0]}`)
      const expected = Buffer.from(`x-${name}: !${value}`, 'latin1').toString('latin1')
      if (!lines.some((line) => line.trim() === expected.trim())) throw new Error(`not sent: ${JSON.stringify(head)}`)
      const others = lines.slice(1).filter((line) => line.trim() !== expected.trim())
      const known = /^(content-length|idempotent-replayed|date|connection|content-type): /i
      if (!others.every((line) => known.test(line))) throw new Error(`split: ${JSON.stringify(head)}`)
    }),
    { numRuns: 300 }
  )
  t.equal(runs, 0, 'the handler does not run')
})

/** An app that takes large bodies; `send` gives the status of a request with this body, or whether it was a replay. */
async function bodyApp(t: Test) {
  const app = await build(t, {}, { bodyLimit: 16 * 1024 ** 2, onProtoPoisoning: 'ignore' })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  await app.ready()
  return async (key: string, payload: string) => {
    const headers = { 'idempotency-key': key, 'content-type': 'application/json' }
    const answer = await app.inject({ method: 'POST', url: '/', headers, payload })
    return answer.headers[REPLAYED] === 'true' ? 'replay' : answer.statusCode
  }
}

t.test('huge, wide and deep bodies are compared by value to their last bit', async (t) => {
  const send = await bodyApp(t)
  const deep = (open: string, inner: string, close: string) => open.repeat(100_000) + inner + close.repeat(100_000)
  const list = (item: (n: number) => string) => Array.from({ length: 100_000 }, (_, n) => item(n)).join(',')
  const huge = 'x'.repeat(5 * 1024 ** 2)
  const bodies: Record<string, [one: string, same: string, other: string]> = {
    'a text of 5 MiB': [`"${huge}a"`, ` "${huge}\\u0061" `, `"${huge}b"`],
    'a member of 5 MiB': [`{"a":"${huge}a"}`, `{ "a":"${huge}a"}`, `{"a":"${huge}b"}`],
    'a name of 5 MiB': [`{"${huge}a":1}`, `{"${huge}\\u0061":1.0}`, `{"${huge}b":1}`],
    '100 000 arrays in each other': [deep('[', '', ']'), deep('[ ', '', ']'), deep('[', '1', ']')],
    '100 000 objects in each other': [deep('{"a":', '1', '}'), deep('{ "a":', '1', '}'), deep('{"a":', '2', '}')],
    'a list of 100 000 numbers': [
      `[${list(String)}]`,
      `[${list((n) => `${n}.0`)}]`,
      `[${list((n) => `${n - (n === 99_999 ? 1 : 0)}`)}]`
    ],
    'a list of 100 000 objects': [
      `[${list((n) => `{"a":${n},"b":0}`)}]`,
      `[${list((n) => `{"b":0,"a":${n}}`)}]`,
      `[${list((n) => `{"a":${n},"b":${n === 99_999 ? 1 : 0}}`)}]`
    ],
    '100 000 members': [
      `{${list((n) => `"m${n}":0`)}}`,
      `{${list((n) => `"m${99_999 - n}":0`)}}`,
      `{${list((n) => `"m${n}":${n === 500 ? 1 : 0}`)}}`
    ]
  }
  for (const [name, [one, same, other]] of Object.entries(bodies)) {
    t.strictSame([await send(name, one), await send(name, same), await send(name, other)], [200, 'replay', 422], name)
  }
})

t.test('bodies at the edges of JSON are the same if and only if their values are', async (t) => {
  const send = await bodyApp(t)
  const groups = [
    ['0', '-0', '0.0', '0e5', '1e-400'],
    ['1e400', '1e401', '9e999'],
    ['-1e400'],
    ['"1e400"'],
    ['"Infinity"'],
    ['null'],
    ['"null"'],
    ['9007199254740992', '9007199254740993'],
    ['"\\ud800"'],
    ['"\\udc00"'],
    ['"\\ufffd"', '"\ufffd"'],
    ['"\\ud83d\\ude00"', '"😀"'],
    ['"\\ude00\\ud83d"'],
    ['"é"', '"\\u00e9"'],
    ['"e\\u0301"'],
    ['{}'],
    ['{"__proto__":1}', '{"__proto__":2,"__proto__":1}'],
    ['{"__proto__":{}}'],
    ['{"__proto__":{"a":1}}'],
    ['{"a":1}', '{"a":2,"a":1}', '{"\\u0061":1}'],
    ['{"a":2}', '{"a":1,"a":2}'],
    ['{"hasOwnProperty":1}'],
    ['{"toJSON":1}'],
    ['{"pipe":1}'],
    ['{"pipe":2}'],
    ['{"getReader":1}'],
    ['{"getReader":2}'],
    ['{"length":0}'],
    ['{"0":1}'],
    ['[1]'],
    ['{"\\ud800":1}'],
    ['{"\\ufffd":1}'],
    ['{"":1}']
  ]
  for (const [n, group] of groups.entries()) {
    const key = `group ${n}`
    const [one = ''] = group
    t.equal(await send(key, one), 200, one)
    for (const same of group) t.equal(await send(key, same), 'replay', `${same} is ${one}`)
    for (const other of groups.flatMap((other) => (other === group ? [] : other))) {
      const found = await send(key, other)
      if (found !== 422) t.fail(`${other} is taken for ${one}: ${found}`)
    }
  }
})

t.test('thousands of keys of one client are answered, and what is kept of them stays within its bounds', async (t) => {
  const [maxEntries, maxBytes, count] = [50, 20_000, 2_000]
  const store = new MemoryStore({ maxEntries, maxBytes })
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async (request) => 'x'.repeat(Number(request.id.slice(4)) % 3_000))
  const names = Array.from({ length: count }, (_, n) => `key ${n}`)
  const kept = async () => {
    const found = await Promise.all(names.map((name) => store.get(storageKey(null, name))))
    const bodies = found.map((held) =>
      held?.state === 'completed' && held.record.kind === 'reply' ? held.record.body.length : 0
    )
    return { entries: found.filter(Boolean).length, bytes: bodies.reduce((sum, length) => sum + length, 0) }
  }
  for (const [n, name] of names.entries()) {
    const answer = await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': name } })
    if (answer.statusCode !== 200) t.fail(`${name}: ${answer.statusCode}`)
    if (n % 500 !== 499) continue
    const { entries, bytes } = await kept()
    t.ok(entries > 0 && entries <= maxEntries && bytes <= maxBytes, `${entries} entries, ${bytes} bytes`)
  }
  t.equal(StoreContext.of(store).live.size, 0, 'no operation is left')
})

t.test('more operations at a time than the store holds are refused, and none of the others is forgotten', async (t) => {
  const store = new MemoryStore({ maxEntries: 20 })
  const app = await build(t, { store })
  const gate = latch()
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => {
    runs++
    await gate.promise
    return 'done'
  })
  const port = await listen(app)
  const first = Array.from({ length: 20 }, (_, n) => post(port, { key: `first ${n}` }))
  await until(() => runs === 20)
  const refused = await Promise.all(Array.from({ length: 100 }, (_, n) => post(port, { key: `late ${n}` })))
  t.ok(refused.every(({ status }) => status === 503))
  t.equal(runs, 20, 'nobody runs without a claim')
  gate.open()
  t.ok((await Promise.all(first)).every(({ status }) => status === 200))
  t.equal((await post(port, { key: 'first 0' })).headers[REPLAYED], 'true')
  t.equal((await post(port, { key: 'late 0' })).status, 200)
})

t.test('duplicates that wait and hang up leave nothing behind', async (t) => {
  let listening = 0
  class Counting extends MemoryStore {
    override changed(key: string, signal: AbortSignal): Promise<void> {
      listening++
      return super.changed(key, signal).finally(() => listening--)
    }
  }
  const store = new Counting({ maxEntries: 100 })
  const app = await build(t, { store, onConflict: 'wait' })
  const gate = latch()
  let [runs, arrived, closed] = [0, 0, 0]
  app.addHook('onRequest', async (request) => {
    arrived++
    request.raw.socket.once('close', () => closed++)
  })
  app.post('/', { config: { idempotency: true } }, async () => {
    runs++
    await gate.promise
    return 'done'
  })
  const port = await listen(app)
  const keys = Array.from({ length: 10 }, (_, n) => `key ${n}`)
  const owners = keys.map((key) => post(port, { key }))
  await until(() => runs === keys.length)
  for (const round of [1, 2, 3]) {
    const waiters = keys.flatMap((key) => Array.from({ length: 20 }, () => start(port, { key })))
    await until(() => arrived === keys.length + round * waiters.length && listening === keys.length)
    for (const waiter of waiters) waiter.hangUp()
    await until(() => closed === round * waiters.length && listening === 0, { message: 'nobody to listen any more' })
    t.equal(StoreContext.of(store).live.size, keys.length, 'the owners go on')
  }
  gate.open()
  for (const owner of owners) t.equal((await owner).text, 'done')
  t.equal(runs, keys.length)
  t.equal(StoreContext.of(store).live.size, 0, 'no operation is left')
  t.equal((await post(port, { key: 'key 0' })).headers[REPLAYED], 'true')
})
