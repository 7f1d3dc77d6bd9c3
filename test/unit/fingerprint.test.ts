import { createHash } from 'node:crypto'
import { PassThrough } from 'node:stream'
import { ReadableStream } from 'node:stream/web'
import type { FastifyRequest } from 'fastify'
import t from 'tap'
import {
  constraintsOf,
  type HeadRules,
  hashPayload,
  headOf,
  payloadFingerprint,
  payloadOfBody
} from '../../lib/http/fingerprint.js'
import { composeFingerprint, difference, knowsPayload } from '../../lib/operation/fingerprint.js'

const JSON_TYPE = { 'content-type': 'application/json', 'content-length': '4' }
const FORM_DATA = { 'content-type': 'multipart/form-data; boundary=----a', 'content-length': '100' }

function request(members: object): FastifyRequest {
  const usual = { method: 'POST', host: 'shop.example', params: {}, query: {}, headers: {}, raw: { url: '/charges' } }
  return { ...usual, ...members } as unknown as FastifyRequest
}

const RULES: HeadRules = { route: '/charges', constraints: '', target: null }
const head = (members: object = {}, rules: Partial<HeadRules> = {}, credentials: string | null = null) =>
  headOf(request(members), { ...RULES, ...rules }, credentials)

/** The payload of a body that Fastify has parsed. */
function payload(body: unknown, headers: object = JSON_TYPE): string {
  const hash = payloadOfBody(request({ body, headers }))
  if (typeof hash !== 'string') throw new Error('Only multipart bodies may take time')
  return hash
}

/** The same, as it came over the wire. */
const json = (text: string) => payload(JSON.parse(text))

const multipart = async (body: unknown, headers: object = FORM_DATA) => payloadOfBody(request({ body, headers }))

/** `depth` arrays or objects in each other. */
function nested(depth: number, leaf: unknown, kind: 'array' | 'object'): unknown {
  let value = leaf
  for (let i = 0; i < depth; i++) value = kind === 'array' ? [value] : { a: value }
  return value
}

const nullObject = (members: object) => Object.assign(Object.create(null), members)

t.test('the head covers method, host, route, constraints, parameters and query', async (t) => {
  const others = [
    head(),
    head({ method: 'PATCH' }),
    head({ host: 'other.example' }),
    head({ host: '' }),
    head({}, { route: '/refunds' }),
    head({}, { route: '' }),
    head({}, { constraints: constraintsOf({ version: '1.0.0' }) }),
    head({}, { constraints: constraintsOf({ version: '2.0.0' }) }),
    head({}, { constraints: constraintsOf({ host: '1.0.0' }) }),
    head({ params: { id: '1' } }),
    head({ params: { id: '2' } }),
    head({ params: { no: '1' } }),
    head({ params: { '*': '1' } }),
    head({ query: { id: '1' } }),
    head({ query: { id: '2' } }),
    head({ query: { id: '' } }),
    head({ query: { id: ['1', '2'] } }),
    head({ query: { id: ['2', '1'] } }),
    head({ query: { id: '1', to: '2' } }),
    head({ query: { id: { to: '2' } } }),
    head({ params: { id: '1' }, query: { id: '1' } }),
    head({ method: 'POST","shop.example', host: '' })
  ]
  t.equal(new Set(others).size, others.length)
  t.equal(head(), head(), 'and is the same for the same request')
})

t.test('what Fastify understands alike is alike, however it was written', async (t) => {
  t.equal(head({ query: { a: '1', b: '2' } }), head({ query: nullObject({ b: '2', a: '1' }) }), 'order of parameters')
  t.equal(head({ raw: { url: '/charges/' } }), head({ raw: { url: '/CHARGES?' } }), 'path')
  t.equal(head({ host: 'Shop.Example' }), head({ host: 'shop.example' }), 'case of the host')
  t.equal(head({ params: nullObject({}), query: undefined }), head({ params: null, query: nullObject({}) }), 'nothing')
  class Params {}
  Object.setPrototypeOf(Params.prototype, null)
  t.equal(head({ params: new Params() }), head(), 'as its router makes them')
})

t.test('a request is told from the one before to the same route', async (t) => {
  const rules = { ...RULES }
  const of = (members: object) => headOf(request(members), rules, null)
  const heads = [of({}), of({ method: 'PUT' }), of({ host: 'b' }), of({}), of({ params: { a: '1' } }), of({})]
  t.equal(heads[0], heads[3])
  t.equal(heads[0], heads[5])
  t.equal(new Set(heads).size, 4)
  t.not(of({}), headOf(request({}), { ...RULES, route: '/refunds' }, null))
})

t.test('what a query parser hides is read where it was', async (t) => {
  class Hidden {
    readonly #text: string
    constructor(text: string) {
      this.#text = text
    }
    get text() {
      return this.#text
    }
  }
  const of = (text: string) => head({ query: new Hidden(text), raw: { url: `/charges?${text}` } })
  t.equal(of('a=1'), of('a=1'))
  t.not(of('a=1'), of('a=2'))
  t.not(of('a=1'), head())
  const params = (text: string) => head({ query: new URLSearchParams(text) })
  t.equal(params('a=1&b=2'), params('b=2&a=1'), 'and what it shows need not be')
  t.not(params('a=1&b=2'), params('a=1&b=3'))
})

t.test('a target of its own replaces all but the method', async (t) => {
  const target = ({ headers }: FastifyRequest) => String(headers['x-target'])
  const of = (name: string, members: object = {}, rules: Partial<HeadRules> = {}) =>
    head({ headers: { 'x-target': name }, ...members }, { target, ...rules })
  t.equal(of('a'), of('a', { host: 'b', params: { c: 'd' }, query: { e: 'f' } }, { route: '/g', constraints: 'h' }))
  t.not(of('a'), of('b'))
  t.not(of('a'), of('a', { method: 'PATCH' }))
  t.not(of('a'), head({ headers: { 'x-target': 'a' } }, { target }, 'alice'), 'nor the credentials')
  t.ok(of(''))
})

t.test('a target that is no text is an error, not a comparison with nothing', async (t) => {
  for (const result of [undefined, null, 7, {}, ['a'], Promise.resolve('a')]) {
    t.throws(() => head({}, { target: () => result as string }), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message: `option "target" must return a string, got ${typeof result}`
    })
  }
})

t.test('constraints are the same text in every process, and others for other values', async (t) => {
  class Region {
    constructor(readonly name: string) {}
  }
  const all = [
    constraintsOf(undefined),
    constraintsOf({ version: '1.0.0' }),
    constraintsOf({ version: '1.0.1' }),
    constraintsOf({ host: 'a.example' }),
    constraintsOf({ host: /a.example/ }),
    constraintsOf({ host: /a.example/i }),
    constraintsOf({ host: 'a.example', version: '1.0.0' }),
    constraintsOf({ region: 1 }),
    constraintsOf({ region: '1' }),
    constraintsOf({ region: new Region('a') }),
    constraintsOf({ region: new Region('b') }),
    constraintsOf({ region: new WeakMap() }),
    constraintsOf({ other: new WeakMap() })
  ]
  t.equal(new Set(all).size, all.length)
  t.equal(constraintsOf({}), constraintsOf(undefined))
  t.equal(constraintsOf({ version: undefined }), constraintsOf(undefined))
  t.equal(constraintsOf({ a: '1', b: /2/ }), constraintsOf({ b: /2/, a: '1' }))
})

t.test('credentials are part of the head', async (t) => {
  const heads = [head({}, {}, null), head({}, {}, 'alice'), head({}, {}, 'bob'), head({}, {}, ''), head({}, {}, 'null')]
  t.equal(new Set(heads).size, heads.length)
  t.equal(head({}, {}, 'alice'), head({}, {}, 'alice'))
})

t.test('no other header is part of the head', async (t) => {
  t.equal(head(), head({ headers: { 'user-agent': 'curl', 'x-request-id': '2', 'accept-version': '1', host: 'b' } }))
})

t.test('no client text reaches a fingerprint', async (t) => {
  const secret = request({ query: { a: 's.e.c.r.e.t' }, headers: { authorization: 'secret.secret' }, body: 'secret' })
  t.match(composeFingerprint(headOf(secret, RULES, 'secret.secret'), payload('secret')), /^[\w-]{26}\.[\w-]{22}$/)
})

t.test('equal numbers are the same however they are written', async (t) => {
  t.equal(json('[1,100,0.1,0]'), json('[1.0,1e2,1e-1,-0]'))
  t.equal(json('{"a":-0}'), json('{"a":0}'))
  t.equal(json('1e21'), json('1000000000000000000000'))
  t.not(json('9007199254740992'), json('9007199254740994'))
  t.not(json('1.7976931348623157e308'), json('1.7976931348623155e308'))
  t.not(json('5e-324'), json('0'))
  t.not(payload(10n), payload(10), 'a parser that gives big integers')
  t.not(payload(9007199254740993n), payload(9007199254740992n))
})

t.test('values that look alike are told apart', async (t) => {
  const values = [
    ...['null', 'true', 'false', '0', '1', '""', '"null"', '"true"', '"0"', '"1"', '" "', '[]', '{}', '"[]"', '"{}"'],
    ...['[null]', '[""]', '[[]]', '[{}]', '[[],[]]', '[[[]]]', '{"":{}}', '{"":[]}', '{"":null}', '{"":""}'],
    ...['[1,2]', '[12]', '["1,2"]', '["1","2"]', '[[1],2]', '[1,[2]]', '{"0":1,"1":2}', '[{"a":1,"b":2}]'],
    ...['{"a":1}', '{"a":"1"}', '{"a":[1]}', '{"a":{"a":1}}', '{"A":1}', '{"a":1,"b":null}', '{"a":1,"b":2}'],
    ...['[{"a":1},{"b":2}]', '{"a":{"b":2}}', '{"a":{},"b":2}', '{"a\\":1,\\"b":2}', '{"a":"1,\\"b\\":2"}'],
    ...[
      '"é"',
      '"e\u0301"',
      '"\\ud800"',
      '"\\ud801"',
      '"\\udc00"',
      '"\ufffd"',
      '"\\\\ud800"',
      '"\\u0000"',
      '"*"',
      '["*"]'
    ],
    ...['{"__proto__":1}', '{"constructor":1}', '{"toString":null}', '{"toJSON":1}', '{"length":0}']
  ]
  t.equal(new Set(values.map(json)).size, values.length)
})

t.test('no body, an empty text, null and an empty object are four different payloads', async (t) => {
  const none = payload(undefined, {})
  const payloads = [none, payload(''), payload(null), payload({}), payload([])]
  t.equal(new Set(payloads).size, 5)
  t.notOk(payloads.includes(''), 'and all of them are known')
  t.equal(payload(null, {}), none, 'Fastify says null where there is no body')
  t.equal(payload(undefined, { 'content-length': '0' }), none)
  t.equal(payload(undefined, { 'content-length': '0', 'content-type': 'application/json' }), none)
})

t.test('null is a payload under every JSON media type', async (t) => {
  for (const type of ['application/json; charset=utf-8', 'Application/JSON', 'application/merge-patch+json']) {
    t.equal(payload(null, { 'content-type': type, 'content-length': '4' }), payload(null), type)
    t.equal(payload(null, { 'content-type': type, 'transfer-encoding': 'chunked' }), payload(null), type)
  }
})

t.test('a body that is not at hand gives an empty payload', async (t) => {
  const csv = { 'content-type': 'text/csv' }
  for (const headers of [
    { ...csv, 'content-length': '10' },
    { ...csv, 'transfer-encoding': 'chunked' },
    { ...FORM_DATA }
  ]) {
    t.equal(payload(undefined, headers), '')
    t.equal(payload(null, headers), '')
  }
  t.equal(payload(undefined), '', 'JSON that nobody has parsed')
  t.equal(payload(new PassThrough(), csv), '')
  t.equal(payload(new ReadableStream(), csv), '')
  t.equal(payload(new PassThrough(), FORM_DATA), '')
  t.equal(payload({ getReader() {}, amount: 1 }, csv), '', 'a stream of another platform')
  t.equal(payload(null, { 'content-type': 'text/x; a=application/json', 'content-length': '4' }), '')
})

t.test('a body that is a scalar is compared by value', async (t) => {
  const payloads = [payload('text'), payload(1), payload(true), payload(false), payload('1'), payload('true')]
  t.equal(new Set(payloads).size, payloads.length)
  t.equal(payload('text'), payload('text'))
  t.not(payload('\ud800'), payload('\ufffd'))
  t.not(payload(1, FORM_DATA), payload(2, FORM_DATA), 'whatever type it is said to be of')
})

t.test('bytes are compared as bytes, of whatever view they are', async (t) => {
  const bytes = Buffer.from([0, 1, 0xff, 0x80])
  const within = Uint8Array.from([9, 0, 1, 0xff, 0x80, 9]).subarray(1, 5)
  t.equal(payload(bytes), payload(Buffer.from(bytes)))
  t.equal(payload(bytes), payload(within), 'only the part that the view shows')
  t.equal(payload(bytes), payload(new DataView(within.buffer, 1, 4)))
  t.equal(payload(bytes), payload(new Uint16Array(Uint8Array.from(bytes).buffer)))
  t.not(payload(bytes), payload(Buffer.from([0, 1, 0xff, 0x81])))
  t.not(payload(bytes), payload(Buffer.from([0, 1, 0xff])))
  t.not(payload(Buffer.from([0xff])), payload(Buffer.from([0xfe])), 'not as text, where both are invalid')
  t.not(payload(Buffer.alloc(0)), payload(undefined, {}))
})

t.test('bytes inside of a body are compared as bytes', async (t) => {
  const of = (data: unknown) => payload({ name: 'x', data })
  t.equal(of(Buffer.from('abc')), of(new Uint8Array([97, 98, 99])))
  t.not(of(Buffer.from('abc')), of(Buffer.from('abd')))
  t.not(of(Buffer.from('abc')), of('abc'))
  t.not(of(Buffer.from('abc')), of(createHash('sha256').update('abc').digest('base64url')), 'nor of their hash')
  t.not(of(Buffer.from('a')), of({ 0: 97 }))
})

t.test('dates, maps and sets of a parser of its own are compared by value', async (t) => {
  t.equal(payload({ at: new Date(5) }), payload({ at: new Date(5) }))
  t.not(payload({ at: new Date(5) }), payload({ at: new Date(6) }))
  t.not(payload({ at: new Date(5) }), payload({ at: {} }))
  t.not(payload({ at: new Date(5) }), payload({ at: 5 }))
  t.not(payload({ at: new Date(5) }), payload({ at: '@5' }))
  t.not(payload({ at: new Date(Number.NaN) }), payload({ at: new Date(0) }))
  t.equal(payload(new Map([['a', 1]])), payload(new Map([['a', 1]])))
  t.not(payload(new Map([['a', 1]])), payload(new Map([['a', 2]])))
  t.not(payload(new Set([1])), payload(new Set([2])))
  t.not(payload(new Map()), payload({}))
})

t.test('numbers that JSON cannot write are not null', async (t) => {
  t.not(json('[1e999]'), json('[null]'))
  t.not(json('[1e999]'), json('[-1e999]'))
  t.not(payload([Number.NaN]), payload([null]))
})

t.test('forms and buffers of the platform are compared by value', async (t) => {
  const form = (...pairs: [string, string][]) => new URLSearchParams(pairs)
  t.equal(payload(form(['a', '1'])), payload(form(['a', '1'])))
  t.equal(payload(form(['a', '1'], ['b', '2'])), payload(form(['b', '2'], ['a', '1'])), 'whatever field comes first')
  t.not(payload(form(['a', '1'], ['a', '2'])), payload(form(['a', '2'], ['a', '1'])))
  t.not(payload(form(['a', '1'])), payload(form(['a', '2'])))
  t.not(payload(form(['a', '1'])), payload(form(['a', '1'], ['a', '1'])))
  const { buffer: one } = Uint8Array.of(1)
  t.equal(payload({ one }), payload({ one: Uint8Array.of(1) }))
  t.not(payload({ one }), payload({ one: Uint8Array.of(2).buffer }))
})

t.test('a value that hides what is in it makes the payload unknown', async (t) => {
  class Hidden {
    readonly #value: number
    constructor(value: number) {
      this.#value = value
    }
    get value() {
      return this.#value
    }
  }
  for (const opaque of [new Hidden(1), new WeakMap(), Promise.resolve(), new Response('a'), [1].values()]) {
    t.equal(payload(opaque), '')
    t.equal(payload({ a: [opaque] }), '')
    t.equal(payload(new Map([['a', opaque]])), '')
  }
  class Point {
    constructor(readonly x: number) {}
  }
  t.not(payload(new Point(1)), '', 'a class is as good as an object')
  t.not(payload(new Point(1)), payload(new Point(2)))
  t.equal(payload(Object.create(null)), payload({}))
})

t.test('an error that a value throws of itself is not taken for a value that hides', async (t) => {
  const body = {
    get amount() {
      throw new Error('not to be read')
    }
  }
  t.throws(() => payload(body), { message: 'not to be read' })
})

t.test('members of large objects are put in order too', async (t) => {
  for (const count of [2, 12, 13, 31, 32, 33, 64, 100]) {
    const names = Array.from({ length: count }, (_, n) => `m${String(n).padStart(3, '0')}`)
    const of = (names: string[]) => payload(Object.fromEntries(names.map((name) => [name, 1])))
    t.equal(of(names.toReversed()), of(names))
    const [first, ...rest] = names as [string, ...string[]]
    t.equal(of([...rest, first]), of(names))
    t.not(of([...rest, `${first}x`]), of(names))
  }
  const [one, two] = [
    { a: 1, b: 2 },
    { b: 2, a: 1 }
  ]
  t.equal(payload([one, two, one, { c: 1, a: 2 }, two]), payload([two, one, two, { a: 2, c: 1 }, one]), 'side by side')
})

t.test('a member that is undefined is not a member that is null', async (t) => {
  t.not(payload({ a: undefined }), payload({ a: null }))
  t.not(payload({ a: undefined }), payload({ a: 'undefined' }))
})

t.test('the same object at two places is no cycle', async (t) => {
  const shared = { a: [1] }
  t.equal(payload([shared, shared, { shared }]), json('[{"a":[1]},{"a":[1]},{"shared":{"a":[1]}}]'))
  const deep = nested(100, [shared, shared], 'array')
  t.equal(payload(deep), payload(nested(100, [{ a: [1] }, { a: [1] }], 'array')), 'below any depth')
})

t.test('a cycle is written, and ends', async (t) => {
  const cycle = (leaf: unknown) => {
    const object: Record<string, unknown> = { leaf }
    object.self = object
    return object
  }
  t.equal(payload(cycle(1)), payload(cycle(1)))
  t.not(payload(cycle(1)), payload(cycle(2)))
  const array: unknown[] = []
  array.push(array, array)
  t.ok(payload(array))
  const map = new Map<string, unknown>()
  map.set('self', map)
  t.ok(payload(map))
  const [a, b]: Record<string, unknown>[] = [{}, {}]
  Object.assign(a as object, { b, twice: b })
  Object.assign(b as object, { a, twice: a })
  t.ok(payload(a))
  t.ok(payload(nested(1_000, cycle(1), 'object')))
  const endless: Record<string, unknown> = {}
  endless.self = endless
  t.ok(payload(endless))
  t.ok(payload({ last: 1, endless, at: { endless } }))
})

/** As @fastify/multipart makes it: part of all the fields of its form. */
function field(value: unknown): Record<string, unknown> {
  const part = { type: 'field', fieldname: 'f', mimetype: 'text/plain', value }
  return Object.assign(part, { fields: { other: [], f: [part] } })
}
const file = (content: string | Error, filename = 'a.txt', mimetype = 'text/plain') => ({
  type: 'file',
  fieldname: 'f',
  filename,
  mimetype,
  toBuffer: async () => {
    if (typeof content !== 'string') throw content
    return Buffer.from(content)
  }
})

t.test('a multipart body is compared by its fields and files, not by its boundary', async (t) => {
  const one = await multipart({ name: field('x'), doc: file('content') })
  const boundary = { 'content-type': 'Multipart/Form-Data; boundary=----b', 'content-length': '102' }
  t.not(one, '')
  t.equal(await multipart({ name: field('x'), doc: file('content') }, boundary), one)
  t.equal(await multipart({ doc: file('content'), name: field('x') }), one, 'in whatever order the fields come')
  const others = [
    await multipart({ name: field('y'), doc: file('content') }),
    await multipart({ nom: field('x'), doc: file('content') }),
    await multipart({ name: field('x'), doc: file('other content') }),
    await multipart({ name: field('x'), doc: file('content', 'b.txt') }),
    await multipart({ name: field('x'), doc: file('content', 'a.txt', 'text/html') }),
    await multipart({ name: field('x') }),
    await multipart({ name: [field('x'), field('x')], doc: file('content') }),
    await multipart({ name: [field('x'), field('y')], doc: file('content') }),
    await multipart({ name: [field('y'), field('x')], doc: file('content') }),
    await multipart({})
  ]
  t.equal(new Set([one, ...others]).size, others.length + 1)
})

t.test('a multipart body with plain values is compared alike', async (t) => {
  const one = await multipart({ name: 'x', doc: Buffer.from('content') })
  t.equal(await multipart({ doc: Buffer.from('content'), name: 'x' }), one)
  t.not(await multipart({ name: 'y', doc: Buffer.from('content') }), one)
  t.not(await multipart({ name: 'x', doc: Buffer.from('contents') }), one)
  t.not(await multipart({ name: ['x', 'y'] }), await multipart({ name: ['y', 'x'] }))
  t.not(await multipart({ name: null }), await multipart({ name: 'null' }))
  t.not(await multipart({ name: null }), '')
  t.not(await multipart({ name: { first: 1 } }), await multipart({ name: { first: 2 } }))
  t.not(await multipart({ name: { first: 1 } }), '')
  t.not(await multipart({ name: 'x' }), await multipart({ name: ['x'] }))
  t.not(await multipart(JSON.parse('{"__proto__":"x"}')), await multipart({}))
})

t.test('of a field in a multipart body its value counts, and of a file its name, type and content', async (t) => {
  const encoded = (encoding: string) => Object.assign(field('x'), { encoding })
  t.equal(await multipart({ name: encoded('7bit') }), await multipart({ name: encoded('8bit') }))
  const { fieldname, ...anonymous } = file('')
  t.equal(await multipart({ doc: anonymous }), await multipart({ doc: file('') }), 'a file of which no more is known')
  t.not(await multipart({ doc: anonymous }), '')
})

t.test('a body is multipart by its type, not by a parameter of it', async (t) => {
  const type = { 'content-type': 'application/x; like=multipart/form-data', 'content-length': '4' }
  t.equal(payload({ a: 1 }, type), payload({ a: 1 }))
})

t.test('a file that cannot be read any more makes the payload unknown', async (t) => {
  t.equal(await multipart({ name: field('x'), doc: file(new Error('consumed')) }), '')
  const readByOthers = { ...file(''), file: { bytesRead: 7 } }
  t.equal(await multipart({ name: field('x'), doc: readByOthers }), '')
  const readable = { ...file('content'), file: { bytesRead: 7 } }
  t.equal(await multipart({ doc: readable }), await multipart({ doc: file('content') }))
  const empty = { ...file(''), file: { bytesRead: 0 } }
  t.not(await multipart({ name: field('x'), doc: empty }), '', 'a file that is really empty is known')
})

t.test('what a function makes of a request is the payload, text or bytes', async (t) => {
  t.equal(hashPayload('abc'), hashPayload('abc'))
  t.equal(hashPayload('abc'), hashPayload(Buffer.from('abc')))
  t.equal(hashPayload('abc'), hashPayload(new Uint8Array([1, 97, 98, 99]).subarray(1)))
  t.not(hashPayload('abc'), hashPayload('abd'))
  t.match(hashPayload('secret'), /^[\w-]{22}$/)
})

t.test('an empty result of the function means unknown', async (t) => {
  for (const empty of ['', Buffer.alloc(0), new Uint8Array()]) t.equal(hashPayload(empty), '')
})

t.test('a function that gives neither text nor bytes is told so, and does not switch the comparison off', async (t) => {
  for (const result of [undefined, null, 1, true, {}, ['abc'], new Date()]) {
    t.throws(() => hashPayload(result), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message: `option "fingerprint" must return a string or a Buffer, got ${typeof result}`
    })
  }
})

t.test('fingerprints differ when something differs that both know, and say what', async (t) => {
  const [ours, credentials, target] = ['0'.repeat(22), '1'.repeat(22), '2'.repeat(22)]
  const a = composeFingerprint(`${ours}hint`, 'a')
  const unknown = composeFingerprint(`${ours}hint`, '')
  for (const [x, y, expected] of [
    [a, a, null],
    [a, composeFingerprint(`${ours}hint`, 'b'), 'payload'],
    [a, unknown, null],
    [unknown, unknown, null],
    [a, composeFingerprint(`${credentials}hint`, 'a'), 'credentials'],
    [a, composeFingerprint(`${credentials}hint`, 'b'), 'credentials'],
    [unknown, composeFingerprint(`${credentials}hint`, 'a'), 'credentials'],
    [unknown, composeFingerprint(`${credentials}hint`, ''), 'credentials'],
    [a, composeFingerprint(`${target}tnih`, 'a'), 'target'],
    [unknown, composeFingerprint(`${target}tnih`, 'b'), 'target'],
    [a, '', null],
    [unknown, '', null],
    ['', '', null]
  ] as const) {
    t.equal(difference(x, y), expected, `${x} and ${y}`)
    t.equal(difference(y, x), expected, `${y} and ${x}`)
  }
})

t.test('a fingerprint says whether it knows the payload', async (t) => {
  t.equal(knowsPayload(composeFingerprint('head', 'payload')), true)
  t.equal(knowsPayload(composeFingerprint('head', '')), false)
  t.equal(knowsPayload(''), false)
})

t.test('bytes are told apart from no body and from null, whatever they are', async (t) => {
  const all = [
    payload(undefined, {}),
    payload(null),
    ...['none', '-', 'null', 'vnull'].map((text) => payload(Buffer.from(text)))
  ]
  t.equal(new Set(all).size, all.length)
})

const form = (fields: [string, string | Blob][]) => {
  const data = new FormData()
  for (const [name, value] of fields) data.append(name, value as string)
  return data
}

t.test(
  'form data is compared by its fields and the content of its files, of whatever type the body is said to be',
  async (t) => {
    for (const headers of [FORM_DATA, JSON_TYPE]) {
      const of = (...fields: [string, string | Blob][]) => multipart(form(fields), headers)
      const doc = (content: string, name = 'a.txt', type = 'text/plain') =>
        ['doc', new File([content], name, { type })] as [string, Blob]
      const one = await of(['amount', '1'], doc('content'))
      t.match(one, /^[\w-]{22}$/)
      t.equal(await of(doc('content'), ['amount', '1']), one, 'in whatever order the fields come')
      const others = await Promise.all([
        of(['amount', '2'], doc('content')),
        of(['Amount', '1'], doc('content')),
        of(['amount', '1'], doc('Content')),
        of(['amount', '1'], doc('content', 'b.txt')),
        of(['amount', '1'], doc('content', 'a.txt', 'text/html')),
        of(['amount', '1'], ['doc', 'content']),
        of(['amount', '1'], doc('content'), doc('content')),
        of(['amount', '1'], doc('content'), doc('other')),
        of(['amount', '1'], doc('other'), doc('content')),
        of(['amount', '1']),
        of()
      ])
      t.equal(new Set([one, ...others]).size, others.length + 1)
      t.notOk(others.includes(''))
    }
  }
)

t.test('files are compared by content wherever they are in a body', async (t) => {
  for (const wrap of [
    (file: Blob) => file,
    (file: Blob) => ({ a: [file] }),
    (file: Blob) => new Map([['a', file]]),
    (file: Blob) => new Set([file, file])
  ]) {
    const of = (content: string) => payloadOfBody(request({ body: wrap(new Blob([content])), headers: JSON_TYPE }))
    t.equal(await of('a'), await of('a'))
    t.not(await of('a'), await of('b'))
    t.not(await of('a'), '')
  }
})

t.test('a file that cannot be read makes the payload unknown', async (t) => {
  const file = new File(['a'], 'a.txt')
  file.arrayBuffer = async () => Promise.reject(new Error('gone'))
  t.equal(await payloadOfBody(request({ body: form([['a', '1']]), headers: JSON_TYPE })), payload(form([['a', '1']])))
  t.equal(await payloadOfBody(request({ body: { file }, headers: JSON_TYPE })), '')
})

t.test('no body with something in it is taken for an empty object', async (t) => {
  class Money {
    constructor(readonly amount: number) {}
  }
  class List {
    readonly #items: number[]
    constructor(...items: number[]) {
      this.#items = items
    }
    [Symbol.iterator]() {
      return this.#items.values()
    }
  }
  class Decimal {
    readonly #value: number
    constructor(value: number) {
      this.#value = value
    }
    toJSON() {
      return this.#value
    }
  }
  const make: ((value: number) => object)[] = [
    (value) => new Map([['amount', value]]),
    (value) => new Map([[value, 'amount']]),
    (value) => new Set([value]),
    (value) => new URLSearchParams({ amount: String(value) }),
    (value) => form([['amount', String(value)]]),
    (value) => new Headers({ amount: String(value) }),
    (value) => new URL(`a:${value}`),
    (value) => new RegExp(String(value)),
    (value) => new Date(value),
    (value) => Uint8Array.of(value),
    (value) => Uint8Array.of(value).buffer,
    (value) => Object(value),
    (value) => Object(BigInt(value)),
    (value) => Object(String(value)),
    (value) => new Money(value),
    (value) => new List(value),
    (value) => new Decimal(value)
  ]
  for (const headers of [JSON_TYPE, FORM_DATA]) {
    const empty = await multipart({}, headers)
    for (const of of make) {
      const hash = async (body: unknown) => multipart(body, headers)
      t.equal(await hash(of(1)), await hash(of(1)), String(of))
      t.not(await hash(of(1)), await hash(of(2)), String(of))
      t.not(await hash(of(1)), empty, String(of))
      t.not(await hash(of(1)), '', String(of))
      t.not(await hash({ a: [of(1)] }), await hash({ a: [of(2)] }), `inside: ${of}`)
    }
  }
})

t.test('what can be read only once is left for the handler', async (t) => {
  const items = [1, 2].values()
  t.equal(payload(items), '')
  t.same([...items], [1, 2])
  const endless = {
    *[Symbol.iterator]() {
      for (;;) yield 1
    }
  }
  t.equal(payload(Object.create(endless)), '')
})

t.test('maps with names for keys are the same in whatever order', async (t) => {
  const of = (...entries: [unknown, unknown][]) => payload(new Map(entries))
  t.equal(of(['a', 1], ['b', 2]), of(['b', 2], ['a', 1]))
  t.not(of(['a', 1], ['b', 2]), of(['b', 1], ['a', 2]))
  t.not(of(['a', 1]), payload({ a: 1 }))
  t.not(of([1, 'a'], [2, 'b']), of([2, 'b'], [1, 'a']))
})

t.test('what looks like a part of a form in the JSON of its client is a value', async (t) => {
  const looks = (amount: number) => [
    { type: 'field', value: 1, amount },
    { type: 'field', fieldname: 'f', mimetype: 'text/plain', value: 1, amount },
    { type: 'field', fieldname: 'f', value: 1, fields: { f: { type: 'field', fieldname: 'f', value: 1 }, amount } },
    { type: 'field', fieldname: 'f', value: 1, fields: null, amount },
    { type: 'field', fieldname: 'f', value: 1, fields: {}, amount },
    { type: 'field', fieldname: 'constructor', value: 1, fields: {}, amount },
    { type: 'file', fieldname: 'f', filename: 'a', mimetype: 'b', toBuffer: 'c', file: { bytesRead: 0 }, amount },
    { value: 1, amount }
  ]
  for (const [n, one] of looks(1).entries()) {
    const other = looks(2)[n]
    t.not(await multipart({ f: one }), await multipart({ f: other }), JSON.stringify(one))
    t.not(await multipart({ f: [one] }), await multipart({ f: [other] }))
    t.not(await multipart({ f: one }), '')
  }
})

t.test('all small values are told apart: where one ends, and the next begins', async (t) => {
  const scalars = [null, true, false, 0, 1, '', 'a', 'b']
  /** All arrays of at most two of these values, and all objects of at most two of them. */
  const containersOf = (values: unknown[]): unknown[] => [
    [],
    {},
    ...values.flatMap((a) => [[a], { a }, { b: a }]),
    ...values.flatMap((a) => values.flatMap((b) => [[a, b], { a, b }]))
  ]
  const flat = containersOf(scalars)
  const few = [null, 0, 'a']
  // Two levels deep: [[1], 2] and [[1, 2]], {a: {b: 1}, c: 2} and {a: {b: 1, c: 2}}.
  const values = [...scalars, ...flat, ...containersOf([...few, ...containersOf(few)])]
  const texts = new Map(values.map((value) => [JSON.stringify(value), value]))
  t.ok(texts.size > 2_000)
  t.equal(new Set([...texts.values()].map((value) => payload(value))).size, texts.size)
})

t.test('a long string is not taken for a short one and what comes after it', async (t) => {
  // What is in the long one is what the others are written as, byte by byte, should lengths be cut to a byte.
  const flags = Array.from({ length: 256 }, () => true)
  t.not(payload([`abc${'t'.repeat(256)}`]), payload(['abc', ...flags]))
  t.not(payload(['t'.repeat(256)]), payload(['', ...flags]))
})

t.test('what an object shows of itself is not taken for its members', async (t) => {
  class Shows {
    *[Symbol.iterator]() {
      yield 'x'
      yield 'y'
    }
  }
  const all = [{ x: 'y' }, new Shows(), ['x', 'y'], new Set(['x', 'y']), new Map([['x', 'y']]), form([['x', 'y']])]
  t.equal(new Set(all.map((value) => payload(value))).size, all.length)
})

t.test('in large bodies the last value counts, wherever it comes to lie', async (t) => {
  // The writer's first 16 KiB end within each of them once; true takes one byte.
  const long = (last: string) => [`${'a'.repeat(90)}${last}`, `${'a'.repeat(200)}${last}`]
  const last = [true, false, 1, 2, 1.5, 2.5, ...long('a'), ...long('b'), [], {}, { a: 1 }, { a: 2 }, { b: 1 }]
  for (let length = 16_384 - 100; length < 16_384 + 4; length++) {
    const before = Array.from({ length }, () => true)
    const hashes = new Set(last.map((value) => payload([before, value])))
    if (hashes.size !== last.length) t.fail(`after ${length} others`)
  }
  t.not(payload(Array.from({ length: 20_000 }, () => 1)), payload(Array.from({ length: 20_001 }, () => 1)))
})

t.test('objects side by side, the second with the names of the first and more: all of its members count', async (t) => {
  const names = Array.from({ length: 34 }, (_, n) => `m${n}`)
  const small = { m0: 1, m1: 1 }
  const large = Object.fromEntries(names.map((name) => [name, 1]))
  for (const name of names) t.not(payload([small, { ...large, [name]: 2 }]), payload([small, large]), name)
})

t.test(
  'a value that is in itself so often that it has no end makes the payload unknown; many others do not',
  async (t) => {
    let doubled: unknown = [1]
    for (let n = 0; n < 60; n++) doubled = [doubled, doubled]
    t.equal(payload(doubled), '')
    const many = Array.from({ length: 600_000 }, () => [1])
    t.not(payload(many), '')
  }
)

t.test('strings of any length and alphabet are told apart', async (t) => {
  const strings = ['', 'a', 'é', '中', '\ud800', '\udc00', '\ufffd'].flatMap((char) =>
    [0, 1, 2, 3, 94, 95, 96, 97, 98, 255, 256, 257, 5_000, 20_000, 20_001].map((length) => 'b'.repeat(length) + char)
  )
  const all = new Set(strings)
  t.equal(new Set([...all].map((string) => payload(string))).size, all.size)
  t.equal(new Set([...all].map((string) => payload({ [string]: string }))).size, all.size)
  t.equal(new Set([...all].map((string) => payload([string, string]))).size, all.size)
})

t.test('numbers of all sizes are told apart', async (t) => {
  const numbers = [0, 1, 2, 255, 256, 257, 65_536, 2 ** 31, 2 ** 32, 2 ** 53, -1, -255, 0.5, 1.5, 255.5, 1e21, 5e-324]
  t.equal(new Set(numbers.map((number) => payload(number))).size, numbers.length)
  t.equal(payload(-0), payload(0))
})

t.test('a hash that is asked for while another is made disturbs neither', async (t) => {
  const body = {
    a: 'x',
    get b() {
      return payloadFingerprint({ other: [1, 2, 3] })
    },
    c: ['y']
  }
  t.equal(payload(body), payload({ a: 'x', b: payloadFingerprint({ other: [1, 2, 3] }), c: ['y'] }))
  t.throws(
    () =>
      payloadFingerprint({
        a: {
          get b() {
            throw new Error('not to be read')
          }
        }
      }),
    { message: 'not to be read' }
  )
  t.equal(payloadFingerprint([1]), payloadFingerprint([1]))
})

t.test('payloadFingerprint gives equal values one hash, and others another', async (t) => {
  t.equal(payloadFingerprint({ a: 1, b: [2] }), payloadFingerprint({ b: [2], a: 1 }))
  t.match(payloadFingerprint({ secret: 'secret' }), /^[\w-]{22}$/)
  const values = [undefined, null, '', 'a', 0, {}, [], new Map(), new Date(0), Buffer.from('a'), form([['a', '1']])]
  t.equal(new Set(values.map(payloadFingerprint)).size, values.length)
})

t.test('payloadFingerprint takes nothing that hides what is in it', async (t) => {
  for (const value of [
    new Blob(['a']),
    form([['a', new Blob(['a'])]]),
    new PassThrough(),
    new ReadableStream(),
    Promise.resolve(1)
  ]) {
    for (const given of [value, [value]]) {
      t.throws(() => payloadFingerprint(given), {
        code: 'FST_IDEMPOTENCY_INVALID_OPTION',
        message: 'payloadFingerprint takes a value that shows what is in it; read files and streams first'
      })
    }
  }
})
