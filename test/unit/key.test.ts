import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { generateKey, type KeyRules, keyInBody, keyInHeader, keyInQuery, parseKey } from '../../lib/http/key.js'
import { deriveKey, storageKey } from '../../lib/operation/storage-key.js'

const RULES: KeyRules = { header: 'idempotency-key', field: 'key', keyFormat: 'any', maxKeyLength: 255 }
const UUID = '9b2f6a54-0d4c-4e5b-8c1d-2f3a4b5c6d7e'

const parse = (raw: unknown, rules: Partial<KeyRules> = {}) => parseKey(raw, { ...RULES, ...rules })

/** A request whose header has this text in UTF-8, as Node hands it over. */
function withHeader(value: string | string[] | undefined): FastifyRequest {
  const latin1 = typeof value === 'string' ? Buffer.from(value).toString('latin1') : value
  return { headers: { 'idempotency-key': latin1 } } as unknown as FastifyRequest
}

const fromHeader = (value: string | string[] | undefined) => keyInHeader(withHeader(value), RULES)
const fromQuery = (query: unknown, rules: Partial<KeyRules> = {}) =>
  keyInQuery({ query } as FastifyRequest, { ...RULES, ...rules })
const fromBody = (body: unknown, rules: Partial<KeyRules> = {}, type = 'application/json') =>
  keyInBody({ body, headers: { 'content-type': type } } as FastifyRequest, { ...RULES, ...rules })

/** What a 422 says of the key. */
const invalid = (message: string) => ({
  code: 'FST_IDEMPOTENCY_KEY_INVALID',
  statusCode: 422,
  message: `The idempotency key ${message}`
})
const TWICE = invalid('was sent more than once')
const BLANK = invalid('must not be blank')
const MALFORMED = invalid('is not a well-formed quoted string (RFC 9651)')
const UNQUOTED = invalid('must be a quoted string (RFC 9651)')
const NO_UUID = invalid('must be a UUID, version 4 or 7')
const NO_STRING = invalid('must be a string')
const TOO_LONG = invalid('must not be longer than 255 bytes')

t.test('a quoted and a bare key are the same', async (t) => {
  t.equal(parse('abc'), 'abc')
  t.equal(parse('"abc"'), 'abc')
  t.equal(parse(' "abc"\t'), 'abc', 'with white space around the quotes')
})

t.test('parameters after a quoted key are ignored', async (t) => {
  for (const parameters of [
    ';a',
    '; a',
    ';a=1',
    ';a=1;b=2.5;c=-7',
    ';a=token/with:chars*',
    ';a="text; with , and \\" and \\\\"',
    ';a=?0',
    ';a=:YWJj:',
    ';a=@1659578233',
    ';*a_-.*1=x',
    ';   a=1;   b'
  ]) {
    t.equal(parse(`"abc"${parameters}`), 'abc', parameters)
  }
})

t.test('the strings of RFC 9651 are read with their escapes and nothing else', async (t) => {
  const ascii = Array.from({ length: 0x5f }, (_, i) => String.fromCharCode(0x20 + i)).join('')
  t.equal(parse(`"${ascii.replaceAll(/["\\]/g, '\\$&')}"`), ascii, 'all of printable ASCII')
  t.equal(parse('"\\""'), '"')
  t.equal(parse('"\\\\"'), '\\')
  t.equal(parse('"\\\\\\""'), '\\"')
  t.equal(parse('"  a  "'), '  a  ', 'white space inside belongs to the key')
  t.equal(parse('"a;b=c"'), 'a;b=c')
  t.equal(parse(`"'"`), `'`)
})

t.test('a malformed structured string is refused', async (t) => {
  for (const raw of [
    '"',
    '"abc',
    '"abc\\"',
    '"abc\\',
    '"a\\bc"',
    '"a\\u0062c"',
    '"a"c"',
    '"clé"',
    '"a\tb"',
    '"a\u0000b"',
    '"a\u007fb"',
    '"a\nb"',
    '"abc"x',
    '"abc" x',
    '"abc" "def"',
    '"abc";',
    '"abc";=1',
    '"abc";A=1',
    '"abc";1=a',
    '"abc";a=',
    '"abc";a="b',
    '"abc";a=b c',
    '"abc";a=1,',
    '"abc" ;a=1',
    '"abc";a=???',
    '"abc";a=é',
    '"abc";a=1.2.3',
    '"abc","def"',
    '"abc", "def"',
    '"abc";a=1, "def"'
  ]) {
    for (const keyFormat of ['any', 'structured', 'uuid'] as const) {
      t.throws(() => parse(raw, { keyFormat }), MALFORMED, JSON.stringify(raw))
    }
  }
})

t.test('a key is measured before anything else looks at it', async (t) => {
  const huge = 32 * 1024 * 1024
  const tooLongQuoted = invalid('must not be longer than 1536 bytes, with quotes and parameters')
  for (const keyFormat of ['any', 'uuid', 'structured', /^a+$/] as const) {
    t.throws(() => parse(`"${'a'.repeat(huge)}"`, { keyFormat }), tooLongQuoted)
  }
  t.throws(() => parse(`"${'\\"'.repeat(huge / 2)}"`), tooLongQuoted)
  t.throws(() => parse(`"a";b="${'c'.repeat(huge)}"`), tooLongQuoted)
  t.throws(() => parse('a'.repeat(huge)), TOO_LONG)
  t.throws(() => parse(' '.repeat(huge)), BLANK)
  t.equal(parse(`"a";b="${'c'.repeat(1_526)}"`), 'a', '1536 bytes are allowed')
  t.throws(() => parse(`"a";b="${'c'.repeat(1_529)}"`), tooLongQuoted)
})

t.test('a bare key is taken as it is, quotes and backslashes inside included', async (t) => {
  for (const key of ['a"b"', "'abc'", 'a\\b', 'a;b=c', 'clé', '🔑', '{"a":1}', 'null', '0']) t.equal(parse(key), key)
})

t.test('a blank key is refused, quoted or not', async (t) => {
  for (const raw of ['', ' ', '\t', '\u00a0', '\u2003', '""', '" "', '"   ";a=1']) {
    t.throws(() => parse(raw), BLANK, JSON.stringify(raw))
  }
  t.throws(() => parse('', { keyFormat: 'structured' }), BLANK)
  t.throws(() => parse('""', { keyFormat: 'structured' }), BLANK)
  t.throws(() => parse('', { keyFormat: /.*/ }), BLANK)
})

t.test('a key is measured in UTF-8 bytes, without quotes, escapes and parameters', async (t) => {
  t.equal(parse('k'.repeat(255)).length, 255)
  t.throws(() => parse('k'.repeat(256)), TOO_LONG)
  t.equal(parse(`"${'k'.repeat(255)}";a="${'k'.repeat(255)}"`).length, 255)
  t.throws(() => parse(`"${'k'.repeat(256)}"`), TOO_LONG)
  t.equal(parse(`"${'\\"'.repeat(255)}"`), '"'.repeat(255))
  t.throws(() => parse(`"${'\\"'.repeat(256)}"`), TOO_LONG)
  t.equal(parse(`${'é'.repeat(127)}k`).length, 128, 'two bytes each, 255 in all')
  t.throws(() => parse('é'.repeat(128)), TOO_LONG, '128 characters, 256 bytes')
  t.equal(parse('中'.repeat(85)).length, 85, 'three bytes each, 255 in all')
  t.throws(() => parse(`${'中'.repeat(85)}k`), TOO_LONG)
  t.equal(parse(`${'🔑'.repeat(63)}kkk`).length, 129, 'four bytes each, 255 in all')
  t.throws(() => parse('🔑'.repeat(64)), TOO_LONG)
  t.equal(parse('kk', { maxKeyLength: 2 }), 'kk')
  t.throws(() => parse('kkk', { maxKeyLength: 2 }), invalid('must not be longer than 2 bytes'))
  t.throws(() => parse('é', { maxKeyLength: 1 }), invalid('must not be longer than 1 bytes'))
})

t.test('keyFormat uuid takes versions 4 and 7 of the RFC variant only, and letter case is nothing', async (t) => {
  const keyFormat = 'uuid'
  for (const key of [UUID, UUID.toUpperCase(), `${UUID.slice(0, 19)}9${UUID.slice(20)}`, generateKey()]) {
    t.equal(parse(key, { keyFormat }), key.toLowerCase())
    t.equal(parse(`"${key}";a=1`, { keyFormat }), key.toLowerCase())
  }
  for (const variant of ['8', '9', 'a', 'b', 'A', 'B']) {
    t.equal(parse(UUID.replace('-8', `-${variant}`), { keyFormat }), UUID.replace('-8', `-${variant.toLowerCase()}`))
    t.ok(parse(UUID.replace('-4', '-7').replace('-8', `-${variant}`), { keyFormat }))
  }
  for (const variant of '01234567cdef') {
    t.throws(() => parse(UUID.replace('-8', `-${variant}`), { keyFormat }), NO_UUID, `variant ${variant}`)
  }
  for (const version of '01235689abcdef') {
    t.throws(() => parse(UUID.replace('-4', `-${version}`), { keyFormat }), NO_UUID, `version ${version}`)
  }
  for (const key of [
    'c232ab00-9414-11ec-b3c8-9f6bdeced846',
    '2ed6657d-e927-568b-95e1-2665a8aea6a2',
    '017f22e2-79b0-8cc3-98c4-dc0c0c07398f',
    '017f22e2-79b0-7cc3-c8c4-dc0c0c07398f',
    '00000000-0000-0000-0000-000000000000',
    'ffffffff-ffff-ffff-ffff-ffffffffffff',
    UUID.replaceAll('-', ''),
    `{${UUID}}`,
    `urn:uuid:${UUID}`,
    `${UUID}\n`,
    `${UUID}0`,
    UUID.slice(1),
    UUID.replace('9', 'g'),
    'abc'
  ]) {
    t.throws(() => parse(key, { keyFormat }), NO_UUID, key)
  }
})

t.test('keyFormat structured takes quoted strings only', async (t) => {
  const keyFormat = 'structured'
  t.equal(parse('"abc"', { keyFormat }), 'abc')
  t.equal(parse('"a,b";p', { keyFormat }), 'a,b')
  for (const raw of ['abc', UUID, "'abc'", ':YWJj:', '?1', '1', 'a"b"', '("abc")']) {
    t.throws(() => parse(raw, { keyFormat }), UNQUOTED, raw)
  }
})

t.test('keyFormat as a RegExp is asked about the key without its quotes', async (t) => {
  const refused = invalid('does not have the required form')
  const keyFormat = /^k-\d+$/
  t.equal(parse('k-1', { keyFormat }), 'k-1')
  t.equal(parse('"k-1"', { keyFormat }), 'k-1')
  t.throws(() => parse('k-x', { keyFormat }), refused)
  t.throws(() => parse('"k-x"', { keyFormat }), refused)
  t.equal(parse('a"b', { keyFormat: /^[^"]+"/ }), 'a"b')
})

t.test('what is not a string is no key', async (t) => {
  for (const raw of [1, 0, true, null, undefined, {}, ['abc'], Buffer.from('abc'), Symbol('abc'), 1n]) {
    t.throws(() => parse(raw), invalid('must be a single string'))
  }
})

t.test('the message never repeats the key', async (t) => {
  for (const [raw, rules] of [
    ['"secret', {}],
    ['secret', { keyFormat: 'uuid' }],
    ['secret', { keyFormat: 'structured' }],
    ['secret', { keyFormat: /^k/ }],
    ['secret', { maxKeyLength: 1 }]
  ] as const) {
    try {
      parse(raw, rules)
      t.fail('was not refused')
    } catch (error) {
      t.notMatch(String(error), 'secret')
    }
  }
})

t.test('the header is looked for by its lower-case name, and may be switched off', async (t) => {
  t.equal(fromHeader('abc'), 'abc')
  t.equal(fromHeader(undefined), undefined)
  t.equal(keyInHeader(withHeader('abc'), { ...RULES, header: 'x-key' }), undefined)
  t.equal(keyInHeader(withHeader('abc'), { ...RULES, header: null }), undefined)
  const namedNull = { headers: { null: 'abc' } } as unknown as FastifyRequest
  t.equal(keyInHeader(namedNull, { ...RULES, header: null }), undefined, 'not even one of that name is read')
})

t.test('an empty header is a blank key, not a missing one', async (t) => {
  t.equal(fromHeader(''), '')
  t.equal(fromHeader('  '), '')
})

t.test('white space around a key is not part of it, in a header as in a field', async (t) => {
  t.equal(parse(fromBody({ key: ' abc\t' })), 'abc')
  t.equal(fromHeader(' abc \t'), 'abc')
  t.equal(fromHeader(' "abc" '), '"abc"')
})

t.test('a header that was sent with two values is refused', async (t) => {
  for (const value of ['a, b', 'a,b', 'a,', ',a', 'a, a, b', 'a, A', 'a, "b"', 'a, "a"', 'a,,a', 'a"b,c"']) {
    t.throws(() => fromHeader(value), TWICE, value)
  }
  t.throws(() => fromHeader(['a', 'b']), TWICE)
  for (const value of ['"a", "b"', '"a", b', '"a", a', '"a",', '"a", "a', '"a", "a";b', '"a" "a", "a"']) {
    t.throws(() => parse(fromHeader(value)), MALFORMED, value)
  }
})

t.test('a header that was sent twice with one value is one key', async (t) => {
  for (const value of ['a, a', 'a,a', 'a , a', ' a,\ta,  a ']) t.equal(parse(fromHeader(value)), 'a', value)
  t.equal(parse(fromHeader(['a', 'a'])), 'a')
  t.equal(parse(fromHeader('é, é')), 'é')
  for (const key of ['a', 'a,b', 'a, a', 'a"b', 'a\\', 'a\\",', ',']) {
    const quoted = `"${key.replaceAll(/["\\]/g, '\\$&')}"`
    for (const value of [`${quoted}, ${quoted}`, `${quoted},${quoted}`, `${quoted};b="c,d", ${quoted};b="c,d"`]) {
      t.equal(parse(fromHeader(value)), key, value)
    }
  }
  t.throws(() => parse(fromHeader(', ,')), BLANK)
})

t.test('UTF-8 in a header is the same key as in a body', async (t) => {
  for (const key of ['clé', 'ключ', '中文', '🔑', 'a\u0301']) {
    t.equal(fromHeader(key), key)
    t.equal(fromHeader(key), fromBody({ key }))
  }
})

t.test('a header that is Latin-1 and not UTF-8 is taken as Latin-1', async (t) => {
  const request = { headers: { 'idempotency-key': 'cl\u00e9' } } as unknown as FastifyRequest
  t.equal(keyInHeader(request, RULES), 'clé')
})

t.test('the query string and the body may carry the key in a field', async (t) => {
  t.equal(fromQuery({ key: 'abc' }), 'abc')
  t.equal(fromBody({ key: 'abc' }), 'abc')
  t.equal(fromQuery(Object.assign(Object.create(null), { key: 'abc' })), 'abc', "as Fastify's parser makes it")
  t.equal(fromBody({ key: '' }), '', 'a blank key, not a missing one')
  t.equal(fromBody({ key: 'a,b' }), 'a,b', 'a comma is nothing special')
})

t.test('no field, no key', async (t) => {
  t.equal(fromQuery({ other: 'abc' }), undefined)
  t.equal(fromQuery({ key: 'abc' }, { field: null }), undefined)
  t.equal(fromBody({ key: 'abc' }, { field: null }), undefined)
  t.equal(fromQuery({ null: 'abc' }, { field: null }), undefined, 'not even one of that name is read')
  t.equal(fromBody({ null: 'abc' }, { field: null }), undefined)
  for (const body of [undefined, null, 'key', 1, true, [], ['key'], Buffer.from('key'), {}, { key: undefined }]) {
    t.equal(fromBody(body), undefined)
  }
  t.equal(fromBody(Object.assign(['a'], { key: 'abc' })), undefined, 'an array has no fields')
})

t.test('a field is never found on the prototype', async (t) => {
  for (const field of ['__proto__', 'constructor', 'toString', 'hasOwnProperty']) {
    t.equal(fromBody({}, { field }), undefined, field)
    t.equal(fromQuery({}, { field }), undefined, field)
    t.equal(fromBody(JSON.parse(`{"${field}":"abc"}`), { field }), 'abc', `an own ${field}`)
  }
  t.equal(fromBody(Object.create({ key: 'inherited' })), undefined)
})

t.test('a field with several values is refused', async (t) => {
  t.throws(() => fromQuery({ key: ['a', 'b'] }), TWICE)
  t.throws(() => fromBody({ key: ['a', 'b'] }), TWICE)
  t.throws(() => fromBody({ key: ['a'] }), TWICE)
  t.throws(() => fromBody({ key: [] }), TWICE)
})

t.test('a field that is not a string is refused', async (t) => {
  for (const key of [1, 0, true, false, null, {}, { key: 'abc' }, Buffer.from('abc')]) {
    t.throws(() => fromBody({ key }), NO_STRING)
  }
})

t.test('a field of @fastify/multipart is read from its wrapper', async (t) => {
  const part = (value: unknown) => {
    const part = { type: 'field', fieldname: 'key', mimetype: 'text/plain', value }
    return Object.assign(part, { fields: { key: part } })
  }
  const fromForm = (key: unknown) => fromBody({ key }, {}, 'multipart/form-data; boundary=x')
  t.equal(fromForm(part('abc')), 'abc')
  t.equal(fromForm('abc'), 'abc', 'with attachFieldsToBody: keyValues')
  t.equal(fromForm(part(undefined)), undefined)
  t.throws(() => fromForm(part(1)), NO_STRING)
  t.throws(() => fromForm([part('a'), part('b')]), TWICE)
  t.throws(() => fromForm({ type: 'file', fieldname: 'key', filename: 'key.txt' }), NO_STRING)
  t.throws(() => fromForm({ value: 'abc' }), NO_STRING, 'an object that only looks like one')
  t.throws(() => fromForm({ type: 'field', fieldname: 'key', mimetype: 'text/plain', value: 'abc' }), NO_STRING)
})

t.test('what looks like a field of @fastify/multipart is none in a body of another type, or in a query', async (t) => {
  const part = { type: 'field', fieldname: 'key', mimetype: 'text/plain', value: 'abc' }
  Object.assign(part, { fields: { key: part } })
  for (const type of ['application/json', 'application/x-www-form-urlencoded', 'text/multipart/form-data', '']) {
    t.throws(() => fromBody({ key: part }, {}, type), NO_STRING, type)
  }
  t.throws(() => fromQuery({ key: part }), NO_STRING)
})

t.test('a storage key is a SHA-256, without a trace of scope and key', async (t) => {
  for (const [scope, key] of [
    ['alice@example.com', 'key-of-alice'],
    [null, ''],
    ['x'.repeat(10_000), 'é\ud800\u0000']
  ] as const) {
    t.match(storageKey(scope, key), /^[\w-]{43}$/)
  }
  // Of `["alice","k-1"]`: what is stored by one release must be found by the next.
  t.equal(storageKey('alice', 'k-1'), 'dbCw0b81nVQLr-P9NNsx8NcFGHoKaZvybQNs1-yI8nM')
  t.equal(storageKey(null, 'k-1'), storageKey(null, 'k-1'))
})

t.test('no two pairs of scope and key share a storage key', async (t) => {
  const pairs: [string | null, string][] = [
    ['a', 'bc'],
    ['ab', 'c'],
    ['', 'abc'],
    ['abc', ''],
    [null, 'abc'],
    ['null', 'abc'],
    ['undefined', 'abc'],
    [null, 'null'],
    ['a', ',b'],
    ['a,', 'b'],
    ['a","b', 'c'],
    ['a', 'b","c'],
    ['a\\', 'b'],
    ['a', '\\b'],
    ['a\u0000', 'b'],
    ['a', '\u0000b'],
    [null, '\ud800'],
    [null, '\ud801'],
    [null, '\udc00'],
    [null, '\ufffd'],
    [null, '\\ud800'],
    ['\ud800', 'x'],
    ['\ufffd', 'x'],
    [null, 'é'],
    [null, 'e\u0301'],
    [null, 'ABC'],
    [null, ' abc']
  ]
  const keys = new Map(pairs.map(([scope, key]) => [storageKey(scope, key), [scope, key]]))
  t.equal(keys.size, pairs.length)
})

t.test('a generated key is a new UUID of version 4 each time', async (t) => {
  const keys = Array.from({ length: 100 }, generateKey)
  t.equal(new Set(keys).size, 100)
  for (const key of keys) t.equal(parse(key, { keyFormat: 'uuid' }), key)
})

t.test('a derived key is the same for the same operation, label and caller, and no other', async (t) => {
  const operation = storageKey('alice', 'k-1')
  t.equal(deriveKey(operation, 'stripe', null), deriveKey(operation, 'stripe', null))
  t.equal(deriveKey(operation, 'stripe', 'bob'), deriveKey(operation, 'stripe', 'bob'))
  t.equal(deriveKey(operation, 'stripe', null), 'f3756b55-23cb-4a36-98cf-dbae47ed7f64', 'in every release')
  const others = [
    deriveKey(operation, 'stripe', null),
    deriveKey(operation, 'stripe', 'alice'),
    deriveKey(operation, 'stripe', 'bob'),
    deriveKey(operation, 'stripe', ''),
    deriveKey(operation, 'stripe', 'null'),
    deriveKey(operation, 'stripe","alice', null),
    deriveKey(operation, 'Stripe', null),
    deriveKey(operation, '', null),
    deriveKey(operation, 'null', null),
    deriveKey(operation, '\ud800', null),
    deriveKey(operation, '\ufffd', null),
    deriveKey(storageKey('bob', 'k-1'), 'stripe', null),
    deriveKey(storageKey('alice', 'k-2'), 'stripe', null),
    deriveKey(`${operation}s`, 'tripe', null)
  ]
  t.equal(new Set(others).size, others.length)
})

t.test('a letter whose UTF-8 looks like a space in Latin-1 stays in the key', async (t) => {
  for (const key of ['à', 'voilà', 'Р', '頠']) t.equal(fromHeader(key), key)
})

t.test('a sticky RegExp starts at the start of the key, every time', async (t) => {
  const keyFormat = /[a-z]+/y
  for (let i = 0; i < 2; i++) {
    t.equal(parse('abc', { keyFormat }), 'abc')
    t.throws(() => parse('1abc', { keyFormat }), { code: 'FST_IDEMPOTENCY_KEY_INVALID' })
  }
})
