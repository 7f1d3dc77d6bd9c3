import { createHash } from 'node:crypto'
import { PassThrough } from 'node:stream'
import { ReadableStream } from 'node:stream/web'
import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { agree, canonicalJson, headOf, join, knowsPayload, payloadOf, payloadOfBody } from '../../lib/fingerprint.js'

const JSON_TYPE = { 'content-type': 'application/json', 'content-length': '4' }
const FORM_DATA = { 'content-type': 'multipart/form-data; boundary=----a', 'content-length': '100' }

function request(members: object): FastifyRequest {
  return { method: 'POST', originalUrl: '/charges', headers: {}, ...members } as unknown as FastifyRequest
}

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

t.test('the head covers method, path and query string', async (t) => {
  const head = (members: object) => headOf(request(members), false)
  t.equal(head({}), head({}))
  const others = [
    head({}),
    head({ method: 'PATCH' }),
    head({ originalUrl: '/refunds' }),
    head({ originalUrl: '/charges/' }),
    head({ originalUrl: '/charges?to=alice' }),
    head({ originalUrl: '/charges?to=mallory' }),
    head({ originalUrl: '/charges?' }),
    head({ method: 'POST/', originalUrl: 'charges' })
  ]
  t.equal(new Set(others).size, others.length)
})

t.test('the Authorization header is part of the head where there is no scope, and only there', async (t) => {
  const alice = request({ headers: { authorization: 'Bearer alice' } })
  const bob = request({ headers: { authorization: 'Bearer bob' } })
  const nobody = request({})
  t.not(headOf(alice, false), headOf(bob, false))
  t.not(headOf(alice, false), headOf(nobody, false))
  t.not(headOf(request({ headers: { authorization: '' } }), false), headOf(nobody, false))
  t.not(headOf(request({ headers: { authorization: 'null' } }), false), headOf(nobody, false))
  t.equal(headOf(alice, true), headOf(bob, true))
  t.equal(headOf(alice, true), headOf(nobody, true))
})

t.test('no other header is part of the head', async (t) => {
  const retry = request({ headers: { 'user-agent': 'curl', 'x-request-id': '2', cookie: 'a=b', host: 'b.example' } })
  t.equal(headOf(request({}), false), headOf(retry, false))
})

t.test('no client text reaches a fingerprint', async (t) => {
  const secret = request({ originalUrl: '/s.e.c.r.e.t', headers: { authorization: 'secret.secret' }, body: 'secret' })
  t.match(join(headOf(secret, false), payload('secret')), /^[\w-]{22}\.[\w-]{22}$/)
})

t.test('JSON is the same in whatever order its members are', async (t) => {
  t.equal(json('{"a":1,"b":{"c":[{"d":2,"e":3}],"f":null}}'), json('{"b":{"f":null,"c":[{"e":3,"d":2}]},"a":1}'))
  t.equal(json('{"2":"b","10":"c","1":"a"}'), json('{"10":"c","1":"a","2":"b"}'))
  t.equal(json('{"é":1,"e":2,"😀":3,"\uffff":4,"":5}'), json('{"":5,"\uffff":4,"😀":3,"e":2,"é":1}'))
})

t.test('JSON is the same with whatever white space and escapes it is written', async (t) => {
  t.equal(json('{"a":[1,2],"b":"x"}'), json(' {\n\t"a" : [ 1 , 2 ] ,\r\n"b":"x"\n}\n'))
  t.equal(json('{"a":"\\u00e9\\u0022\\/"}'), json('{"a":"é\\"/"}'))
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

t.test('the order of an array matters', async (t) => {
  t.not(json('[1,2]'), json('[2,1]'))
  t.not(json('[{"a":1},{"b":1}]'), json('[{"b":1},{"a":1}]'))
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

t.test('an own member called __proto__ counts', async (t) => {
  t.not(json('{"a":1,"__proto__":{"b":2}}'), json('{"a":1}'))
  t.not(json('{"a":1,"__proto__":{"b":2}}'), json('{"a":1,"__proto__":{"b":3}}'))
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

t.test('what JSON cannot write is written beside it, in the same grammar', async (t) => {
  const value = {
    b: [1n, null, true, 'x"', 1.5, {}, [], [0, 0]],
    a: new Map<unknown, unknown>([['k', undefined]]),
    10: { d: 1n, c: -1 }
  }
  const text = '{"10":{"c":-1,"d":1n},"a":[["k",undefined]],"b":[1n,null,true,"x\\"",1.5,{},[],[0,0]]}'
  t.equal(canonicalJson(value), text)
})

t.test('forms and buffers of the platform are compared by value', async (t) => {
  const form = (...pairs: [string, string][]) => new URLSearchParams(pairs)
  t.equal(payload(form(['a', '1'])), payload(form(['a', '1'])))
  t.not(payload(form(['a', '1'])), payload(form(['a', '2'])))
  t.not(payload(form(['a', '1'])), payload(form(['a', '1'], ['a', '1'])))
  const data = (value: string) => {
    const form = new FormData()
    form.set('a', value)
    return form
  }
  t.equal(payload(data('1')), payload(data('1')))
  t.not(payload(data('1')), payload(data('2')))
  t.not(payload(data('1')), '')
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
  for (const opaque of [new Hidden(1), new Blob(['a']), new WeakMap(), Promise.resolve()]) {
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

t.test('members of large objects are put in order too, and left where they are in order', async (t) => {
  const names = Array.from({ length: 100 }, (_, n) => `m${String(n).padStart(3, '0')}`)
  const of = (names: string[]) => canonicalJson(Object.fromEntries(names.map((name) => [name, 1])))
  t.equal(of(names.toReversed()), of(names))
  t.equal(of(names), JSON.stringify(Object.fromEntries(names.map((name) => [name, 1]))))
  const [first, ...rest] = names as [string, ...string[]]
  t.equal(of([...rest, first]), of(names))
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
  t.equal(canonicalJson(endless), `${'{"self":'.repeat(64)}*${'}'.repeat(64)}`, 'looked out for below some depth')
})

t.test('canonical JSON is JSON where there is nothing to put in order', async (t) => {
  for (const text of [
    'null',
    'true',
    '1.5',
    '"a\\"b\\n"',
    '[]',
    '{}',
    '[1,[2,[]],{}]',
    '{"a":{"b":[{"c":null}]},"d":""}'
  ]) {
    t.equal(canonicalJson(JSON.parse(text)), text)
  }
  t.equal(canonicalJson({ b: 1, a: { d: 2, c: 3 } }), '{"a":{"c":3,"d":2},"b":1}')
})

const field = (value: unknown) => ({ type: 'field', fieldname: 'f', mimetype: 'text/plain', value })
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
  t.not(await multipart(JSON.parse('{"__proto__":"x"}')), await multipart({}))
})

t.test('of a field in a multipart body its value counts, and of a file its name, type and content', async (t) => {
  const encoded = (encoding: string) => ({ ...field('x'), encoding })
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
  t.equal(payloadOf('abc'), payloadOf('abc'))
  t.equal(payloadOf('abc'), payloadOf(Buffer.from('abc')))
  t.equal(payloadOf('abc'), payloadOf(new Uint8Array([1, 97, 98, 99]).subarray(1)))
  t.not(payloadOf('abc'), payloadOf('abd'))
  t.match(payloadOf('secret'), /^[\w-]{22}$/)
})

t.test('an empty result of the function means unknown', async (t) => {
  for (const empty of ['', Buffer.alloc(0), new Uint8Array()]) t.equal(payloadOf(empty), '')
})

t.test('a function that gives neither text nor bytes is told so, and does not switch the comparison off', async (t) => {
  for (const result of [undefined, null, 1, true, {}, ['abc'], new Date()]) {
    t.throws(() => payloadOf(result), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message: `option "fingerprint" must return a string or a Buffer, got ${typeof result}`
    })
  }
})

t.test('fingerprints agree when all agrees that both know', async (t) => {
  const [a, b] = [join('head', 'a'), join('head', 'b')]
  const unknown = join('head', '')
  const elsewhere = join('other', 'a')
  for (const [x, y, expected] of [
    [a, a, true],
    [a, b, false],
    [a, unknown, true],
    [unknown, unknown, true],
    [a, elsewhere, false],
    [unknown, elsewhere, false],
    [unknown, join('other', ''), false],
    [a, '', true],
    [unknown, '', true],
    ['', '', true]
  ] as const) {
    t.equal(agree(x, y), expected, `${x} and ${y}`)
    t.equal(agree(y, x), expected, `${y} and ${x}`)
  }
})

t.test('the fingerprints of real requests agree and disagree as the contract says', async (t) => {
  const of = (members: { body?: unknown; originalUrl?: string }) => {
    const made = request({ headers: JSON_TYPE, ...members })
    return join(headOf(made, false), payloadOfBody(made) as string)
  }
  t.equal(agree(of({ body: { a: 1, b: 2 } }), of({ body: { b: 2, a: 1 } })), true)
  t.equal(agree(of({ body: { a: 1 } }), of({ body: { a: 2 } })), false)
  t.equal(agree(of({ body: { a: 1 } }), of({ body: { a: 1 }, originalUrl: '/charges?x' })), false)
  t.equal(agree(of({ body: { a: 1 } }), of({ body: new PassThrough() })), true, 'one payload is not known')
})

t.test('a fingerprint says whether it knows the payload', async (t) => {
  t.equal(knowsPayload(join('head', 'payload')), true)
  t.equal(knowsPayload(join('head', '')), false)
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
