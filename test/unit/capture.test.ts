import { Duplex, PassThrough, Readable } from 'node:stream'
import { ReadableStream } from 'node:stream/web'
import type { FastifyReply } from 'fastify'
import t, { type Test } from 'tap'
import {
  CapturedStream,
  type CaptureOptions,
  type StreamFate,
  type Unfinished
} from '../../lib/http/captured-stream.js'
import { snapshot } from '../../lib/http/headers.js'
import { asStream, isBuffered, isResponse, type Payload } from '../../lib/http/payload.js'
import { headersSince, replyRecord } from '../../lib/http/reply-record.js'
import { TransientSet } from '../../lib/util/transient.js'
import { type Latch, latch, until } from '../support/latch.js'
import { VirtualTime } from '../support/virtual-time.js'

const LEASE = 30_000

type Headers = Record<string, number | string | string[] | undefined>

const replyWith = (headers: Headers) => ({ getHeaders: () => ({ ...headers }) }) as unknown as FastifyReply
const NOTHING_MORE = { excludeHeaders: new Set<string>(), replayHeader: null }

/** What is stored of a reply that had these headers when its handler started, and has those now. */
function stored(before: Headers, now: Headers, rules: Parameters<typeof headersSince>[2] = NOTHING_MORE) {
  return headersSince(snapshot(replyWith(before)), replyWith(now), rules)
}

t.test('headers that were there when the handler started, and have not changed, are not stored', async (t) => {
  const cors = { 'access-control-allow-origin': 'https://a.example', vary: ['origin', 'accept'], 'x-limit': 10 }
  t.strictSame(stored(cors, { ...cors, vary: ['origin', 'accept'] }), [])
})

t.test('headers that have come or changed since are stored', async (t) => {
  t.strictSame(
    stored(
      {
        vary: 'origin',
        'x-same': 'same',
        link: ['<a>'],
        'x-list': ['a'],
        'x-one': ['a', 'b'],
        'x-less': ['a', 'b'],
        'x-last': ['a', 'b']
      },
      {
        vary: 'accept',
        'x-same': 'same',
        link: ['<a>', '<b>'],
        'x-list': ['b'],
        'x-one': 'a',
        'x-less': ['a'],
        'x-last': ['a', 'c'],
        etag: '"1"'
      }
    ),
    [
      ['vary', 'accept'],
      ['link', ['<a>', '<b>']],
      ['x-list', ['b']],
      ['x-one', 'a'],
      ['x-less', ['a']],
      ['x-last', ['a', 'c']],
      ['etag', '"1"']
    ]
  )
})

t.test('a list that the handler adds to in place has changed', async (t) => {
  const headers: Headers = { link: ['<a>'] }
  const reply = replyWith(headers)
  const before = snapshot(reply)
  ;(headers.link as string[]).push('<b>')
  t.strictSame(headersSince(before, reply, NOTHING_MORE), [['link', ['<a>', '<b>']]])
})

t.test('what a handler says of its reply is stored, whatever it is', async (t) => {
  const headers = {
    'content-type': 'text/html',
    location: '/charges/1',
    etag: '"1"',
    'cache-control': 'no-store',
    'x-request-cost': '5',
    'last-modified': 'now',
    'content-encoding': 'identity',
    proxy: 'x'
  }
  t.strictSame(stored({}, headers), Object.entries(headers))
})

t.test('headers of one connection, one client or one moment are never stored', async (t) => {
  const never = [
    'set-cookie',
    'connection',
    'keep-alive',
    'transfer-encoding',
    'content-length',
    'trailer',
    'upgrade',
    'date',
    'www-authenticate',
    'proxy-authenticate',
    'proxy-authorization',
    'proxy-connection',
    'proxy-anything'
  ]
  for (const name of never) t.strictSame(stored({}, { [name]: 'a', 'x-other': 'b' }), [['x-other', 'b']], name)
  t.strictSame(stored({}, { 'set-cookie': ['a=1', 'b=2'] }), [])
})

t.test('neither excluded headers nor the mark of a replay are stored', async (t) => {
  const headers = { 'x-secret': 'a', 'idempotent-replayed': 'true', 'x-other': 'b' }
  const excludeHeaders = new Set(['x-secret'])
  t.strictSame(stored({}, headers, { excludeHeaders, replayHeader: 'idempotent-replayed' }), [['x-other', 'b']])
  t.strictSame(stored({}, headers, { excludeHeaders, replayHeader: null }).length, 2)
})

t.test('stored values are texts, and nothing is stored of a header that was set to nothing', async (t) => {
  t.strictSame(stored({ 'x-none': 'a' }, { age: 0, 'x-list': ['a', 1 as never], 'x-none': undefined, 'x-empty': '' }), [
    ['age', '0'],
    ['x-list', ['a', '1']],
    ['x-empty', '']
  ])
})

t.test('the record of a buffered reply has its bytes, and whether they were text', async (t) => {
  const record = (body: string | Buffer | null | undefined) => replyRecord('f', 201, [['a', 'b']], body)
  const before = Date.now()
  const { createdAt, ...rest } = record('é')
  t.ok(createdAt >= before && createdAt <= Date.now())
  t.strictSame(rest, {
    kind: 'reply',
    fingerprint: 'f',
    statusCode: 201,
    headers: [['a', 'b']],
    body: Buffer.from([0xc3, 0xa9]),
    text: true
  })
  for (const [body, bytes, text] of [
    [Buffer.from([0xff]), Buffer.from([0xff]), false],
    ['', Buffer.alloc(0), true],
    [null, Buffer.alloc(0), false],
    [undefined, Buffer.alloc(0), false]
  ] as const) {
    t.match(record(body), { text })
    t.strictSame(record(body).body, bytes)
  }
})

t.test('texts, buffers and nothing are at hand, all else has to be read', async (t) => {
  for (const payload of ['', 'a', Buffer.alloc(0), null, undefined]) t.equal(isBuffered(payload), true)
  for (const payload of [new PassThrough(), new ReadableStream(), new Response('a')] as Payload[]) {
    t.equal(isBuffered(payload), false)
  }
})

t.test('a Response is known as one, and nothing else is', async (t) => {
  t.equal(isResponse(new Response('a')), true)
  for (const payload of [null, undefined, 'Response', {}, new PassThrough(), new ReadableStream()]) {
    t.equal(isResponse(payload), false)
  }
})

t.test('Node and web streams are streams, and what is locked or none is not', async (t) => {
  const node = new PassThrough()
  t.equal(asStream(node), node)
  const web = asStream(new Response('abc').body as Payload)
  t.equal(Buffer.concat((await web?.toArray()) ?? []).toString(), 'abc')
  const locked = new ReadableStream()
  locked.getReader()
  t.equal(asStream(locked), null)
  for (const payload of [null, undefined, 'a', Buffer.from('a'), {} as Payload])
    t.equal(asStream(payload as Payload), null)
})

t.test('a web stream of another make is read like one', async (t) => {
  const chunks = ['a', 'b']
  let cancelled = 0
  const foreign = (broken: boolean) => ({
    locked: false,
    getReader: () => ({
      read: async () => {
        if (broken && chunks.length === 0) throw new Error('broken')
        return chunks.length > 0 ? { done: false, value: Buffer.from(chunks.shift() as string) } : { done: true }
      },
      cancel: async () => {
        cancelled++
      }
    })
  })
  const whole = asStream(foreign(false) as unknown as Payload)
  t.equal(Buffer.concat((await whole?.toArray()) ?? []).toString(), 'ab')
  chunks.push('c')
  await t.rejects(asStream(foreign(true) as unknown as Payload)?.toArray() as Promise<unknown>, { message: 'broken' })
  chunks.push('d', 'e')
  const before = cancelled
  const left = asStream(foreign(false) as unknown as Payload)
  left?.once('data', () => left.destroy())
  await until(() => cancelled > before, { message: 'the source to be cancelled' })
})

t.test('a stream that knows pipe but not how to wait is read like one, and its error is heard', async (t) => {
  const piped = (fails: boolean) => {
    const listeners: ((error: Error) => void)[] = []
    return {
      on: (event: string, listener: (error: Error) => void) => event === 'error' && listeners.push(listener),
      pipe: (to: PassThrough) => {
        to.write('a')
        if (fails) setImmediate(() => listeners[0]?.(new Error('broken')))
        else to.end('b')
        return to
      }
    } as unknown as Payload
  }
  t.equal(Buffer.concat((await asStream(piped(false))?.toArray()) ?? []).toString(), 'ab')
  for (const half of ['pause', 'resume']) {
    const source = Object.assign(piped(false) as object, { [half]: () => {} }) as unknown as Payload
    t.equal(Buffer.concat((await asStream(source)?.toArray()) ?? []).toString(), 'ab', half)
  }
  await t.rejects(asStream(piped(true))?.toArray() as Promise<unknown>, { message: 'broken' })
})

/** Lets everything happen that can happen without the test. */
async function settle(): Promise<void> {
  for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve))
}

const OPTIONS = { limit: 1_000, expected: undefined, keeps: true, lease: 60_000, open: new TransientSet<Unfinished>() }

/** Notes how a stream ended, and holds its storing until the test lets go. */
class Fate implements StreamFate {
  /** `ended: <text>`, `ended without a copy`, `failed before` or `failed after` the first byte. */
  readonly calls: string[] = []
  body: Buffer | null = null
  readonly stored: Latch<void> = latch()

  /** The stream has ended, and whatever comes of that has come, but for the storing. */
  async known(): Promise<void> {
    await until(() => this.calls.length > 0)
    await settle()
  }

  ended(body: Buffer | null): Promise<void> {
    this.body = body
    this.calls.push(body === null ? 'ended without a copy' : `ended: ${body}`)
    return this.stored.promise
  }

  failed(beforeFirstByte: boolean): Promise<void> {
    this.calls.push(`failed ${beforeFirstByte ? 'before' : 'after'}`)
    return this.stored.promise
  }
}

/** A captured stream with somebody who reads it. */
function capture(source: Readable, options: Partial<CaptureOptions> = {}) {
  const fate = new Fate()
  const stream = new CapturedStream(source, { ...OPTIONS, ...options }, fate)
  const client = {
    chunks: [] as string[],
    bytes: Buffer.alloc(0),
    ended: false,
    error: null as Error | null,
    read(): void {
      stream.on('data', (chunk: Buffer) => {
        this.chunks.push(chunk.toString())
        this.bytes = Buffer.concat([this.bytes, chunk])
      })
    },
    leave(): void {
      stream.destroy()
    }
  }
  stream.on('end', () => {
    client.ended = true
  })
  stream.on('error', (error) => {
    client.error = error
  })
  return { fate, stream, client }
}

/** The same with a client that reads from the start. */
function read(source: Readable, options: Partial<CaptureOptions> = {}) {
  const captured = capture(source, options)
  captured.client.read()
  return captured
}

t.test('the end is held back until the copy is stored', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source)
  source.write('a')
  source.end('b')
  await fate.known()
  t.strictSame(fate.calls, ['ended: ab'])
  t.strictSame(client.chunks, ['a', 'b'], 'everything else has come')
  t.equal(client.ended, false)
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(fate.calls, ['ended: ab'])
})

t.test('a stream without a byte is stored as such', async (t) => {
  const { fate, client } = read(Readable.from([]))
  await until(() => fate.calls.length > 0)
  t.strictSame(fate.calls, ['ended: '])
  t.equal(client.ended, false)
  fate.stored.open()
  await until(() => client.ended)
})

t.test('the chunk that completes the content-length is held back until the copy is stored', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { expected: 4 })
  source.write('ab')
  await until(() => client.chunks.length === 1)
  t.strictSame(fate.calls, [])
  source.write('cd')
  await fate.known()
  t.strictSame(fate.calls, ['ended: abcd'])
  t.strictSame(client.chunks, ['ab'])
  fate.stored.open()
  await until(() => client.chunks.length === 2)
  t.strictSame(client.chunks, ['ab', 'cd'])
  source.end()
  await until(() => client.ended)
  t.strictSame(fate.calls, ['ended: abcd'])
})

t.test('what comes behind the content-length does not overtake the chunk that is held back', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { expected: 2 })
  for (const chunk of ['a', 'b', 'c']) source.write(chunk)
  source.end()
  await fate.known()
  t.strictSame(client.chunks, ['a'])
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(client.chunks, ['a', 'b', 'c'])
  t.strictSame(fate.calls, ['ended: ab'])
})

t.test('a single chunk that is the whole content-length is held back', async (t) => {
  const { fate, client } = read(Readable.from([Buffer.from('abcd')]), { expected: 4 })
  await fate.known()
  t.strictSame(client.chunks, [])
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(client.chunks, ['abcd'])
  t.strictSame(fate.calls, ['ended: abcd'])
})

t.test('a stream that ends short of its content-length has failed', async (t) => {
  for (const [chunks, call] of [
    [['abc'], 'failed after'],
    [[], 'failed before']
  ] as const) {
    const { fate, client } = read(Readable.from(chunks.map((chunk) => Buffer.from(chunk))), { expected: 4 })
    await fate.known()
    t.strictSame([client.chunks, client.ended, client.error], [chunks, false, null])
    fate.stored.open()
    await until(() => client.error !== null)
    t.match(client.error, {
      message: `The reply stream gave ${chunks.join('').length} of the 4 bytes of its content-length`
    })
    t.strictSame([fate.calls, client.ended], [[call], false])
  }
})

t.test('a source that fails when its content-length was complete has been stored', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { expected: 2 })
  source.write('ab')
  await until(() => fate.calls.length > 0)
  source.destroy(new Error('late'))
  await settle()
  fate.stored.open()
  await until(() => client.error !== null)
  t.strictSame(fate.calls, ['ended: ab'])
})

t.test('a reply larger than the limit is passed on as a whole, and not kept', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { limit: 4 })
  for (const chunk of ['ab', 'cd', 'e', 'fg']) source.write(chunk)
  source.end()
  await fate.known()
  t.equal(client.bytes.toString(), 'abcdefg')
  t.equal(client.ended, false, 'the tombstone is stored before the end as well')
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(fate.calls, ['ended without a copy'])
})

t.test('the limit itself is not too large, and counts bytes', async (t) => {
  for (const [text, limit, expected] of [
    ['abcd', 4, 'ended: abcd'],
    ['abcde', 4, 'ended without a copy'],
    ['éé', 4, 'ended: éé'],
    ['ééé', 4, 'ended without a copy'],
    ['', 0, 'ended: '],
    ['a', 0, 'ended without a copy']
  ] as const) {
    const { fate, client } = read(Readable.from(text === '' ? [] : [text]), { limit })
    fate.stored.open()
    await until(() => client.ended)
    t.strictSame(fate.calls, [expected])
    t.equal(client.bytes.toString(), text)
  }
})

t.test('a chunk that completes the content-length and is too large is held back as well', async (t) => {
  const { fate, client } = read(Readable.from([Buffer.from('abcd')]), { expected: 4, limit: 3 })
  await fate.known()
  t.strictSame(client.chunks, [])
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(fate.calls, ['ended without a copy'])
  t.strictSame(client.chunks, ['abcd'])
})

t.test(
  'a source that fails before its first byte, or after it, is known as such, and its client hears of it',
  async (t) => {
    for (const [chunks, call] of [
      [[], 'failed before'],
      [['a'], 'failed after']
    ] as const) {
      const source = new PassThrough()
      const { fate, client } = read(source)
      const error = new Error('broken')
      for (const chunk of chunks) source.write(chunk)
      await until(() => client.chunks.length === chunks.length)
      source.destroy(error)
      await fate.known()
      t.equal(client.error, null, 'when that is stored')
      fate.stored.open()
      await until(() => client.error !== null)
      t.strictSame([client.error, client.ended, fate.calls], [error, false, [call]])
    }
  }
)

t.test('a source that is closed before its end has failed, even without an error', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source)
  source.write('a')
  await until(() => client.chunks.length === 1)
  source.destroy()
  fate.stored.open()
  await until(() => client.error !== null)
  t.equal(client.ended, false)
  t.strictSame(fate.calls, ['failed after'])
})

t.test('a source that had failed before it was captured is not waited for', async (t) => {
  const source = new PassThrough()
  source.on('error', () => {})
  source.destroy(new Error('early'))
  await settle()
  const { fate, client } = read(source)
  fate.stored.open()
  await until(() => client.error !== null)
  t.strictSame(fate.calls, ['failed before'])
})

t.test('what could not be ended does not come to an end, and its source is stopped', async (t) => {
  for (const [expected, seen] of [
    [undefined, ['ab']],
    [2, []]
  ] as const) {
    // A stream of Node's destroys itself at its end.
    for (const isStoppable of expected === undefined ? [true] : [true, false]) {
      const source = new PassThrough()
      const { destroy } = source
      if (!isStoppable) Object.assign(source, { destroy: undefined })
      const error = new Error('not committed')
      const calls: string[] = []
      const fate = { ended: () => Promise.reject(error), failed: async () => void calls.push('failed') }
      const stream = new CapturedStream(source, { ...OPTIONS, expected }, fate)
      const got: string[] = []
      let ended = false
      stream
        .on('data', (chunk) => got.push(String(chunk)))
        .on('end', () => {
          ended = true
        })
      const failed = new Promise((resolve) => stream.on('error', resolve))
      source.write('ab')
      if (expected === undefined) source.end()
      t.equal(await failed, error)
      await settle()
      t.strictSame([got, ended, calls], [seen, false, []])
      if (isStoppable) t.equal(source.destroyed, true)
      else destroy.call(source)
    }
  }
})

t.test('a source that can still be written to has come to its end all the same', async (t) => {
  const source = new Duplex({ read() {}, write() {}, autoDestroy: false })
  const { fate, client } = read(source)
  source.push('ab')
  source.push(null)
  fate.stored.open()
  await until(() => client.ended)
  t.strictSame(fate.calls, ['ended: ab'])
  source.destroy()
})

t.test('a source that cannot be destroyed is left alone when nobody needs it', async (t) => {
  const source = Object.assign(new PassThrough(), { destroy: undefined }) as unknown as PassThrough
  const { fate, client } = read(source, { limit: 1 })
  source.write('ab')
  await until(() => client.chunks.length === 1)
  client.leave()
  fate.stored.open()
  await settle()
  t.strictSame(fate.calls, ['ended without a copy'])
})

t.test('a source that had stopped for a slow client is read to its end when that leaves', async (t) => {
  const source = Readable.from(Array.from({ length: 200 }, () => Buffer.alloc(1_000, 'x')))
  const { fate, stream, client } = capture(source, { limit: 1_000_000, expected: 200_000 })
  await until(() => source.isPaused())
  t.ok(stream.readableLength < 100_000)
  client.leave()
  await until(() => fate.calls.length > 0)
  t.equal(fate.body?.length, 200_000)
})

t.test('a source that fails when the client has left has failed', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source)
  source.write('a')
  await until(() => client.chunks.length === 1)
  client.leave()
  source.destroy(new Error('half-way'))
  fate.stored.open()
  await fate.known()
  t.strictSame(fate.calls, ['failed after'])
})

t.test('when the client has left the source is stopped as soon as it is too large', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { limit: 2 })
  source.write('a')
  await until(() => client.chunks.length === 1)
  client.leave()
  source.write('b')
  await settle()
  t.strictSame(fate.calls, [])
  t.equal(source.destroyed, false)
  source.write('c')
  await until(() => source.destroyed)
  fate.stored.open()
  await settle()
  t.strictSame(fate.calls, ['ended without a copy'])
})

t.test('a source that is too large already is stopped when the client leaves', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { limit: 1 })
  source.write('ab')
  await until(() => client.chunks.length === 1)
  t.equal(source.destroyed, false)
  client.leave()
  await until(() => source.destroyed)
  fate.stored.open()
  await settle()
  t.strictSame(fate.calls, ['ended without a copy'])
})

t.test('a source that is of no use without its client is stopped when that leaves', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { keeps: false })
  source.write('event: a\n\n')
  await until(() => client.chunks.length === 1)
  client.leave()
  await until(() => source.destroyed)
  fate.stored.open()
  await settle()
  t.strictSame(fate.calls, ['failed after'])
})

t.test('a stream of which there is to be no copy has none, to its end', async (t) => {
  const { fate, client } = read(Readable.from(['event: a\n\n']), { keeps: false })
  fate.stored.open()
  await until(() => client.ended)
  await settle()
  t.strictSame([fate.calls, client.chunks], [['ended without a copy'], ['event: a\n\n']])
})

t.test('who leaves while the end is stored changes nothing', async (t) => {
  for (const options of [{}, { expected: 2 }, { keeps: false }, { limit: 1 }]) {
    const { fate, stream, client } = read(Readable.from([Buffer.from('ab')]), options)
    await until(() => fate.calls.length > 0)
    client.leave()
    await until(() => stream.closed)
    fate.stored.open()
    await settle()
    t.strictSame(fate.calls, ['limit' in options || 'keeps' in options ? 'ended without a copy' : 'ended: ab'])
    t.equal(client.ended, false)
    t.equal(client.error, null)
  }
})

t.test('a slow client slows the source down', async (t) => {
  let made = 0
  const source = new Readable({
    read() {
      made++
      this.push(Buffer.alloc(10_000))
    }
  })
  const { stream } = capture(source, { limit: 1_000_000_000 })
  await until(() => source.isPaused())
  await settle()
  const before = made
  t.ok(before < 100, `${before} chunks for nobody`)
  await settle()
  t.equal(made, before)
  stream.read()
  await until(() => made > before)
  source.destroy()
})

t.test('a stream that decodes itself is kept and passed on as the response would have written it', async (t) => {
  const bytes = Buffer.from('clé 🔑', 'utf8')
  for (const encoding of ['hex', 'base64', 'base64url', 'latin1', 'utf16le', 'utf8'] as const) {
    const source = new PassThrough()
    source.setEncoding(encoding)
    const { fate, client } = read(source)
    source.end(bytes)
    fate.stored.open()
    await until(() => client.ended)
    t.equal(client.bytes.toString(), bytes.toString(encoding), encoding)
    t.equal(fate.body?.toString(), bytes.toString(encoding), encoding)
  }
})

t.test('characters that are split between chunks stay whole', async (t) => {
  const bytes = Buffer.from('é🔑é')
  for (const encoding of [null, 'utf8'] as const) {
    const source = new PassThrough()
    if (encoding !== null) source.setEncoding(encoding)
    const { fate, client } = read(source)
    for (const byte of bytes) source.write(Buffer.from([byte]))
    source.end()
    fate.stored.open()
    await until(() => client.ended)
    t.ok(client.bytes.equals(bytes))
    t.ok(fate.body?.equals(bytes))
  }
})

t.test('texts and bytes of an object stream are kept as bytes', async (t) => {
  const view = Uint8Array.from([0, 0xff, 0xfe, 0]).subarray(1, 3)
  const { fate, client } = read(Readable.from(['é', Buffer.from('b'), view, '']))
  fate.stored.open()
  await until(() => client.ended)
  const expected = Buffer.from([0xc3, 0xa9, 0x62, 0xff, 0xfe])
  t.ok(client.bytes.equals(expected))
  t.ok(fate.body?.equals(expected))
})

t.test('a stream of anything else fails, and is stopped', async (t) => {
  for (const garbage of [1, {}, [], true, Symbol('a'), new Date(), new Uint16Array(1), new ArrayBuffer(1)]) {
    const source = Readable.from(['a', garbage])
    const { fate, client } = read(source)
    fate.stored.open()
    await until(() => client.error !== null)
    t.match(client.error, { name: 'TypeError', message: 'A reply stream must give strings or bytes' })
    t.equal(source.destroyed, true)
    t.equal(client.bytes.toString(), 'a')
    t.strictSame(fate.calls, ['failed after'])
  }
})

t.test('garbage in the place of the first byte is a failure before it', async (t) => {
  const { fate, client } = read(Readable.from([{}]))
  fate.stored.open()
  await until(() => client.error !== null)
  t.strictSame(fate.calls, ['failed before'])
})

t.test('a stream with something unreadable in its middle is never stored', async (t) => {
  const calls: string[] = []
  const fate: StreamFate = {
    ended: async (body) => void calls.push(`ended ${body}`),
    failed: async () => void calls.push('failed')
  }
  const stream = new CapturedStream(Readable.from(['a', 1, 'b']), { ...OPTIONS, expected: 2 }, fate)
  const got: string[] = []
  stream.on('data', (chunk) => got.push(String(chunk))).on('error', () => {})
  await new Promise((resolve) => stream.on('close', resolve))
  t.strictSame([calls, got], [['failed'], ['a']])
})

/* What nobody reads */

const time = new VirtualTime()

/** A source that gives chunks of 40 kB for as long as somebody takes them. */
function plenty(chunks = Number.POSITIVE_INFINITY) {
  const source = Object.assign(
    new Readable({
      read() {
        this.push(source.given++ < chunks ? Buffer.alloc(40_000, 'x') : null)
      }
    }),
    { given: 0 }
  )
  return source
}

function timed(name: string, test: (t: Test) => Promise<void>): void {
  t.test(name, async (t) => {
    const { lease } = OPTIONS
    // Timers are shared by all of one lease: there must be no real one.
    OPTIONS.lease = LEASE
    time.install()
    try {
      await test(t)
    } finally {
      time.uninstall()
      OPTIONS.lease = lease
    }
  })
}

timed('what a client does not take is not read for it before one lease has passed', async (t) => {
  const source = plenty(20)
  const { fate, stream } = capture(source, { limit: 1_000_000 })
  await time.pass(LEASE - 1)
  t.strictSame([fate.calls, source.isPaused()], [[], true])
  await time.pass(1)
  t.equal(fate.body?.length, 800_000)
  fate.stored.open()
  t.equal(
    (await stream.toArray()).reduce((size, { length }) => size + length, 0),
    800_000
  )
})

timed('a source that is read for a client which takes nothing has one more lease', async (t) => {
  const source = new PassThrough()
  const open = new TransientSet<Unfinished>()
  const { fate, client } = capture(source, { limit: 1_000_000, open })
  source.write(Buffer.alloc(100_000))
  await time.pass(2 * LEASE - 1)
  t.strictSame([fate.calls, source.destroyed, open.size], [[], false, 1])
  await time.pass(1)
  t.strictSame([fate.calls, source.destroyed, open.size], [['failed after'], true, 0])
  t.match(client.error, { message: 'The client does not read its reply' })
})

timed('no more than the limit is read for a client that takes nothing', async (t) => {
  const source = plenty()
  const { fate, client } = capture(source, { limit: 1_000_000 })
  await time.pass(LEASE)
  t.strictSame([fate.calls, source.destroyed], [['ended without a copy'], true])
  t.ok(source.given < 30, `${source.given} chunks`)
  t.match(client.error, { message: 'The client does not read its reply' })
})

timed('what is not kept is given up when its client has taken nothing for a lease', async (t) => {
  for (const [options, call] of [
    [{ limit: 1_000 }, 'ended without a copy'],
    [{ keeps: false }, 'failed after']
  ] as const) {
    const source = plenty()
    const { fate, client } = capture(source, options)
    await time.pass(LEASE)
    t.strictSame([fate.calls, source.destroyed, source.given < 10], [[call], true, true])
    t.not(client.error, null)
  }
})

timed('a client that takes something within each lease is never given up', async (t) => {
  for (const options of [{ limit: 1_000 }, { keeps: false }, { limit: 1_000_000 }]) {
    const source = plenty()
    const { stream, client } = capture(source, options)
    for (let turn = 0; turn < 40; turn++) {
      await time.pass(LEASE - 1)
      stream.read(1_000)
    }
    t.strictSame([source.destroyed, client.error], [false, null])
    stream.destroy()
    await settle()
  }
})

timed('a client that takes something while the source is read for it slows the source down again', async (t) => {
  const source = new PassThrough()
  const { fate, stream } = capture(source, { limit: 1_000_000 })
  source.write(Buffer.alloc(300_000))
  await time.pass(LEASE)
  t.equal(source.isPaused(), false)
  stream.read(1_000)
  await time.pass(LEASE)
  t.strictSame([source.isPaused(), source.destroyed, fate.calls], [true, false, []])
  stream.resume()
  source.end()
  await settle()
  t.equal(fate.body?.length, 300_000)
})

timed('the source of a client that has left has one lease', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source)
  await time.pass(10 * LEASE)
  t.strictSame(fate.calls, [], 'a client that waits is not one that does not read')
  client.leave()
  source.write('a')
  await time.pass(LEASE - 1)
  t.strictSame([fate.calls, source.destroyed], [[], false])
  await time.pass(1)
  t.strictSame([fate.calls, source.destroyed], [['failed after'], true])
})

timed('a source that has given its content-length is not waited for when its client has left', async (t) => {
  const source = new PassThrough()
  const { fate, client } = read(source, { expected: 2 })
  source.write('a')
  await settle()
  client.leave()
  source.write('b')
  await settle()
  t.strictSame([fate.calls, source.destroyed], [['ended: ab'], true])
})

timed('a client that has all its content-length gets a proper end, however late it reads', async (t) => {
  const source = new PassThrough()
  const { fate, stream, client } = capture(source, { limit: 200_000, expected: 100_000 })
  fate.stored.open()
  source.write(Buffer.alloc(100_000))
  await time.pass(3 * LEASE)
  t.equal(source.destroyed, true)
  stream.resume()
  await settle()
  t.strictSame([client.ended, client.error, fate.calls.length], [true, null, 1])
})

timed('a stream without a client is read for a lease, and comes to its end', async (t) => {
  for (const make of [() => new PassThrough(), () => plenty(), () => Readable.from(['a'])]) {
    const source = make()
    const { stream, fate, client } = read(source)
    stream.leave()
    await time.pass(LEASE)
    t.strictSame([source.destroyed, fate.calls.length, client.error], [true, 1, null])
    fate.stored.open()
    await settle()
    t.equal(client.ended, true)
  }
})

t.test('a stream is known as open until its source has ended, failed or is given up', async (t) => {
  const ends: ((source: PassThrough, stream: CapturedStream) => unknown)[] = [
    (source) => source.end(),
    (source) => source.destroy(new Error('broken')),
    (_source, stream) => stream.giveUp()
  ]
  for (const end of ends) {
    const open = new TransientSet<Unfinished>()
    const source = new PassThrough()
    const { fate, stream } = read(source, { open })
    fate.stored.open()
    t.strictSame(open.items(), [stream])
    await end(source, stream)
    await until(() => source.destroyed && open.size === 0)
    t.equal(fate.calls.length, 1)
  }
})

/* What is read ahead of its client */

t.test('a stream that is read ahead is there as a whole, or fails, and its fate is not asked for', async (t) => {
  const whole = capture(Readable.from(['a', 'b']))
  t.strictSame(await whole.stream.readAhead(), Buffer.from('ab'))
  const long = new PassThrough()
  const lengthy = capture(long, { expected: 2 })
  const promised = lengthy.stream.readAhead()
  long.write('ab')
  t.strictSame(await promised, Buffer.from('ab'))
  lengthy.stream.leave()
  t.equal(long.destroyed, true)
  const source = new PassThrough()
  const broken = capture(source)
  const failure = broken.stream.readAhead()
  source.destroy(new Error('broken'))
  await t.rejects(failure, { message: 'broken' })
  const stopped = capture(new PassThrough())
  const given = stopped.stream.readAhead()
  await stopped.stream.giveUp()
  await t.rejects(given, { message: 'Nobody waits for this reply any more' })
  for (const { fate } of [whole, lengthy, broken, stopped]) t.strictSame(fate.calls, [])
})

timed('what is too large to be read ahead, or takes longer than a lease, is sent from its beginning', async (t) => {
  for (const [size, options, reason] of [
    [100_000, { limit: 50_000 }, 'too-large'],
    [100_000, { limit: 50_000, expected: 100_000 }, 'too-large'],
    [3, {}, 'stream-failed'],
    [100_000, { limit: 200_000 }, 'stream-failed']
  ] as const) {
    const source = new PassThrough()
    const { fate, stream, client } = capture(source, options)
    const read = stream.readAhead()
    source.write(Buffer.alloc(size))
    await time.pass(LEASE)
    t.equal(await read, reason)
    client.read()
    source.end('end')
    fate.stored.open()
    await until(() => client.ended)
    t.equal(client.bytes.length, size + 3)
    t.strictSame(fate.calls, ['ended without a copy'])
  }
})
