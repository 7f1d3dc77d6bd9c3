import { EventEmitter } from 'node:events'
import { createReadStream } from 'node:fs'
import { PassThrough, Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, inject, listen, post, REPLAYED, type Reply, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* What is stored of a reply, and what a replay looks like. */

type Handler = (request: FastifyRequest, reply: FastifyReply) => unknown

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }
const file = new URL(import.meta.url)
const everyByte = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))
const web = (...chunks: (string | Uint8Array)[]) =>
  new ReadableStream({
    start(controller) {
      for (const chunk of chunks)
        controller.enqueue(typeof chunk === 'string' ? new TextEncoder().encode(chunk) : chunk)
      controller.close()
    }
  })

const payloads: Record<string, Handler> = {
  'an object': async () => ({ a: 1, b: ['ä', null] }),
  'a string': async () => 'text €',
  'an empty string': async () => '',
  null: async () => null,
  'a number': async () => 42,
  'no payload': async (_request, reply) => reply.send(),
  'undefined of an async handler': async () => undefined,
  'a 204': async (_request, reply) => reply.code(204).send(),
  'a 204 with an object': async (_request, reply) => reply.code(204).send({ a: 1 }),
  'a 304': async (_request, reply) => reply.code(304).send(),
  'a 201 without a body': async (_request, reply) => reply.code(201).header('location', '/1').send(),
  'a redirect': async (_request, reply) => reply.redirect('/elsewhere', 303),
  'JSON of a vendor': async (_request, reply) => reply.type('application/vnd.api+json').send({ a: 1 }),
  'JSON of a Buffer': async () => ({ type: 'Buffer', data: [1, 2, 3] }),
  'a lone surrogate': async () => ({ text: '\ud800' }),
  'a Buffer': async () => everyByte,
  'an empty Buffer': async () => Buffer.alloc(0),
  'a Buffer with a type': async (_request, reply) => reply.type('image/png').send(everyByte),
  'a Uint8Array': async () => new Uint8Array(everyByte),
  'a Uint16Array with an offset': async () => new Uint16Array(everyByte.buffer, everyByte.byteOffset + 2, 10),
  'a DataView': async () => new DataView(everyByte.buffer, everyByte.byteOffset, 7),
  'JSON as a string': async (_request, reply) => reply.type('application/json').send('{"a":1}'),
  'a custom serializer': async (_request, reply) => reply.serializer(() => 'custom').send({ a: 1 }),
  'a custom serializer to bytes': async (_request, reply) => reply.serializer(() => everyByte as never).send({ a: 1 }),
  'HTML with a status': async (_request, reply) => reply.code(202).type('text/html').send('<p>'),
  'a callback-style handler': (_request, reply) => void setImmediate(() => reply.send({ late: true })),
  'a sync handler that returns': () => ({ sync: true }),
  'a Node stream': async () => Readable.from([Buffer.from('one '), Buffer.from('two')]),
  'a Node stream of strings': async () => Readable.from(['ä ', '€'], { objectMode: false, encoding: 'utf8' }),
  'an empty Node stream': async () => Readable.from([]),
  'a file': async (_request, reply) => reply.type('text/javascript').send(createReadStream(file)),
  'a stream with a content-length': async (_request, reply) =>
    reply.header('content-length', 7).send(Readable.from([Buffer.from('one '), Buffer.from('two')])),
  'a stream with a 204': async (_request, reply) => reply.code(204).send(Readable.from([Buffer.from('nothing')])),
  'a stream with a 304': async (_request, reply) => reply.code(304).send(Readable.from([Buffer.from('nothing')])),
  'a web stream': async () => web('one ', everyByte),
  'a Response': async () => new Response('hello', { status: 202, headers: { 'x-a': '1', 'content-type': 'text/x' } }),
  'a Response without a body': async () => new Response(null, { status: 201, headers: { 'x-a': '1' } }),
  'a Response with a stream': async () => new Response(web('one ', 'two')),
  'many headers': async (_request, reply) =>
    reply
      .headers({ location: '/1', etag: '"v1"', 'x-number': 7, 'cache-control': 'no-store' })
      .header('x-list', ['a', 'b'])
      .send('x')
}

/** What has to be equal, in a first reply and its replay. */
function essence({ status, headers, body }: Reply) {
  const { date: _, connection: _c, 'keep-alive': _k, 'transfer-encoding': _t, 'content-length': _l, ...kept } = headers
  const { [REPLAYED]: _r, ...rest } = kept
  return { status, headers: rest, body: body.toString('latin1') }
}

t.test('every kind of payload replays byte for byte, with its status and headers', async (t) => {
  for (const [name, handler] of Object.entries(payloads)) {
    t.test(name, async (t) => {
      const app = await build(t)
      let runs = 0
      app.post('/', { config: { idempotency: true } }, (request, reply) => {
        runs++
        return handler(request, reply) as never
      })
      app.post('/bare', (request, reply) => handler(request, reply) as never)
      const port = await listen(app)
      const bare = await post(port, { path: '/bare' })
      const first = await post(port, { key: 'k' })
      t.same(essence(first), essence(bare), 'the first reply is what it would be without the plugin')
      t.equal(first.headers['content-length'], bare.headers['content-length'])
      t.equal(first.headers[REPLAYED], undefined)
      for (let i = 0; i < 2; i++) {
        const replay = await post(port, { key: 'k' })
        t.same(essence(replay), essence(first))
        t.equal(replay.headers[REPLAYED], 'true')
        t.equal(replay.headers['transfer-encoding'], undefined, 'it has a length')
        if (replay.headers['content-length'] !== undefined) {
          t.equal(replay.headers['content-length'], String(first.body.length))
        }
      }
      t.equal(runs, 1)
    })
  }
})

t.test('the filter of a response schema holds for the replay', async (t) => {
  const app = await build(t)
  const schema = { response: { 200: { type: 'object', properties: { open: { type: 'string' } } } } }
  app.post('/', { schema, config: { idempotency: true } }, async () => ({ open: 'yes', secret: 'no' }))
  await app.inject(keyed)
  const replay = await app.inject(keyed)
  t.same(replay.json(), { open: 'yes' })
  t.notMatch((await app.idempotency.get('k'))?.state === 'completed' && replay.body, /secret/)
})

t.test(
  'headers that were there before the handler are fresh on a replay, those of the handler are stored',
  async (t) => {
    const app = await build(t)
    let count = 0
    app.addHook('onRequest', async (_request, reply) => {
      reply.headers({ 'x-request': String(++count), 'x-changed': 'before', 'x-list': ['a'] })
    })
    app.post('/', { config: { idempotency: true } }, async (_request, reply) =>
      reply.headers({ 'x-changed': 'by the handler', location: '/1' }).header('link', ['</a>, </b>', '</c>']).send('x')
    )
    await app.inject(keyed)
    const { headers } = await app.inject(keyed)
    t.match(headers, { 'x-request': '2', 'x-changed': 'by the handler', location: '/1', 'x-list': ['a'] })
    t.same(headers.link, ['</a>, </b>', '</c>'], 'several values are kept apart')
  }
)

t.test('headers of one connection, client or moment are never stored', async (t) => {
  const app = await build(t, { excludeHeaders: ['X-Mine'] })
  const never = {
    'set-cookie': ['a=1', 'b=2'],
    connection: 'close',
    'keep-alive': 'timeout=5',
    'www-authenticate': 'Basic',
    'proxy-authenticate': 'Basic',
    'proxy-anything': 'x',
    upgrade: 'h2c',
    date: 'Thu, 01 Jan 1970 00:00:00 GMT',
    'x-mine': 'x'
  }
  app.post('/', { config: { idempotency: true } }, async (_request, reply) =>
    reply.headers({ ...never, 'x-kept': '1' }).send('x')
  )
  t.match((await app.inject(keyed)).headers, { 'set-cookie': ['a=1', 'b=2'], 'x-mine': 'x' })
  const found = await app.idempotency.get('k')
  t.ok(found?.state === 'completed' && found.record.kind === 'reply')
  if (found?.state === 'completed' && found.record.kind === 'reply') {
    t.same(found.record.headers.map(([name]) => name).sort(), ['content-type', 'x-kept'])
  }
  const replay = await app.inject(keyed)
  for (const [name, value] of Object.entries(never)) t.notSame(replay.headers[name], value, name)
})

t.test('the replay header is configurable, and set on replays only', async (t) => {
  for (const [replayHeader, expected] of [
    ['X-Replay', 'x-replay'],
    [false, undefined]
  ] as const) {
    const app = await build(t, { replayHeader })
    app.post('/', { config: { idempotency: true } }, async (_request, reply) =>
      // As a proxy would, that passes on another service's headers.
      reply.header('x-replay', 'upstream').send('x')
    )
    await app.inject(keyed)
    const { headers } = await app.inject(keyed)
    t.equal(headers[REPLAYED], undefined)
    t.equal(headers['x-replay'], expected === undefined ? 'upstream' : 'true')
  }
})

t.test('no header of a client makes its request a replay', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  const names = [REPLAYED, 'x-idempotent-replayed', 'idempotency-replay', 'idempotency-status', 'x-cache', 'x-hit']
  const marked = Object.fromEntries(names.map((name) => [name, 'true']))
  for (const key of [{}, { 'idempotency-key': 'k' }]) {
    const reply = await app.inject({ method: 'POST', url: '/', headers: { ...marked, ...key } })
    t.same([reply.json(), reply.headers[REPLAYED]], [{ run: runs }, undefined])
  }
  t.equal(runs, 2)
})

t.test('what a handler does to its Buffer after sending it does not reach the replay', async (t) => {
  const app = await build(t)
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    const buffer = Buffer.from('before')
    reply.raw.on('close', () => buffer.fill('x'))
    return reply.send(buffer)
  })
  const port = await listen(app)
  await post(port, { key: 'k' })
  t.equal((await post(port, { key: 'k' })).text, 'before')
})

/* Streams */

const streamed = (options: IdempotencyOptions = {}) => ({ config: { idempotency: { ...options } } })
const chunksOf = async (client: ReturnType<typeof start>): Promise<AsyncIterator<Buffer>> =>
  (await client.response)[Symbol.asyncIterator]()

t.test(
  'a stream is passed on as it comes under its claim, and only its last part is held back until it is stored',
  async (t) => {
    for (const length of [null, 6]) {
      const app = await build(t)
      const stream = new PassThrough()
      const stored = latch()
      const complete = app.idempotency.store.complete.bind(app.idempotency.store)
      app.idempotency.store.complete = async (...args) => {
        await stored.promise
        return complete(...args)
      }
      app.post('/', streamed(), async (_request, reply) => {
        if (length !== null) reply.header('content-length', length)
        return reply.send(stream)
      })
      const port = await listen(app)
      const client = start(port, { key: 'k' })
      stream.write('one')
      const chunks = await chunksOf(client)
      t.equal(String((await chunks.next()).value), 'one')
      t.equal(codeOf(await post(port, { key: 'k' })), 'FST_IDEMPOTENCY_IN_PROGRESS')
      stream.write('two')
      // With a length the end is the chunk that completes it.
      if (length === null) t.equal(String((await chunks.next()).value), 'two')
      if (length === null) stream.end()
      const last = chunks.next()
      const early = await Promise.race([last.then(() => 'came'), sleep(30, 'held')])
      t.equal(early, 'held')
      stored.open()
      t.equal(String((await last).value), length === null ? 'undefined' : 'two')
      t.equal((await post(port, { key: 'k' })).text, 'onetwo')
      stream.end()
    }
  }
)

t.test('a stream that is larger than maxReplySize reaches its client whole, and leaves a tombstone', async (t) => {
  const app = await build(t, { maxReplySize: 1000 })
  app.post('/', streamed(), async () => Readable.from(Array.from({ length: 50 }, () => Buffer.alloc(1000, 'x'))))
  const port = await listen(app)
  t.equal((await post(port, { key: 'k' })).body.length, 50_000)
  const retry = await post(port, { key: 'k' })
  t.same([retry.status, codeOf(retry)], [409, 'FST_IDEMPOTENCY_NOT_REPLAYABLE'])
})

t.test('a stream that fails half-way leaves a tombstone', async (t) => {
  for (const kind of ['node', 'web'] as const) {
    const app = await build(t)
    const node = new PassThrough()
    const payload = kind === 'node' ? node : Readable.toWeb(node)
    app.post('/', streamed(), async (_request, reply) => reply.send(payload))
    const port = await listen(app)
    const client = start(port, { key: 'k' })
    node.write('half')
    const chunks = await chunksOf(client)
    await chunks.next()
    node.destroy(new Error('broken'))
    await t.rejects(chunks.next(), { code: 'ECONNRESET' })
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    t.equal(codeOf(await post(port, { key: 'k' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
  }
})

t.test(
  'a stream that fails before its first byte is a 500 that is not final, even where every status is',
  async (t) => {
    for (const kind of ['node', 'web'] as const) {
      const app = await build(t, { shouldStore: () => true })
      let runs = 0
      app.post('/', streamed(), async () => {
        if (++runs > 1) return 'fine'
        const node = new PassThrough()
        setImmediate(() => node.destroy(new Error('broken')))
        return kind === 'node' ? node : Readable.toWeb(node)
      })
      const port = await listen(app)
      t.equal((await post(port, { key: 'k' })).status, 500)
      t.equal((await post(port, { key: 'k' })).text, 'fine')
    }
  }
)

t.test('when the client leaves in the middle of a stream, the rest is read and stored', async (t) => {
  const app = await build(t)
  const stream = new PassThrough()
  const closed = latch()
  app.post('/', streamed(), async (_request, reply) => {
    reply.raw.on('close', () => closed.open())
    return reply.send(stream)
  })
  const port = await listen(app)
  const client = start(port, { key: 'k' })
  stream.write('one')
  await (await chunksOf(client)).next()
  client.hangUp()
  await closed.promise
  stream.write('two')
  stream.end()
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  t.equal((await post(port, { key: 'k' })).text, 'onetwo')
})

t.test('when the client leaves before the handler returns its stream, it is read and stored', async (t) => {
  const app = await build(t)
  const [entered, closed] = [latch(), latch()]
  app.post('/', streamed(), async (_request, reply) => {
    reply.raw.on('close', () => closed.open())
    entered.open()
    await closed.promise
    return reply.send(Readable.from([Buffer.from('one'), Buffer.from('two')]))
  })
  const port = await listen(app)
  const client = start(port, { key: 'k', body: '{}' })
  await entered.promise
  client.hangUp()
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  t.equal((await post(port, { key: 'k', body: '{}' })).text, 'onetwo')
})

t.test('when the client leaves a stream that is too large to keep, the rest is not read', async (t) => {
  const app = await build(t, { maxReplySize: 10 })
  const stream = new PassThrough()
  app.post('/', streamed(), async (_request, reply) => reply.send(stream))
  const port = await listen(app)
  const client = start(port, { key: 'k' })
  stream.write('one')
  await (await chunksOf(client)).next()
  client.hangUp()
  const end = setInterval(() => stream.write('more'), 5)
  t.teardown(() => clearInterval(end))
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  await until(() => stream.destroyed)
  clearInterval(end)
  t.equal(codeOf(await post(port, { key: 'k' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
})

/** A source that gives as much as is taken, without end; how many bytes it was asked for. */
function endless(t: Test) {
  const source = Object.assign(
    new Readable({
      read() {
        source.given += 20_000
        this.push(Buffer.alloc(20_000, 'x'))
      }
    }),
    { given: 0 }
  )
  t.teardown(() => source.destroy())
  return source
}

/** One that gives something, and then nothing any more. */
function silent(t: Test) {
  const source = new PassThrough()
  source.write('one')
  t.teardown(() => source.destroy())
  return source
}

const recordOf = async (app: FastifyInstance, key = 'k') => {
  const found = await app.idempotency.get(key)
  return found?.state === 'completed' ? found.record : undefined
}

t.test('a source that does not end is read for one lease when its client has left, and then destroyed', async (t) => {
  const app = await build(t, { lease: 60 })
  const sources: Readable[] = []
  app.post('/', streamed(), async (_request, reply) => {
    const source = silent(t)
    sources.push(source)
    return reply.send(source)
  })
  const port = await listen(app)
  const keys = Array.from({ length: 20 }, (_, n) => `k${n}`)
  for (const key of keys) {
    const client = start(port, { key })
    await (await chunksOf(client)).next()
    client.hangUp()
  }
  await until(() => sources.every((source) => source.destroyed))
  for (const key of keys) t.match(await recordOf(app, key), { kind: 'tombstone', reason: 'stream-failed' })
})

t.test('a source whose client has left is destroyed when the server closes, and its tombstone is stored', async (t) => {
  for (const type of ['web', 'foreign web', 'node', 'legacy'] as const) {
    const store = new MemoryStore()
    const app = await build(t, { lease: 100, store })
    const source = silent(t)
    let stopped = false
    const stop = () => {
      stopped = true
    }
    source.on('close', stop)
    const reader = {
      read: async () => (source.readableLength > 0 ? { done: false, value: source.read() } : new Promise(() => {})),
      cancel: async () => stop()
    }
    const payloads = {
      node: () => source,
      web: () => Readable.toWeb(source),
      'foreign web': () => ({ locked: false, getReader: () => reader }),
      legacy: () => ({ on: () => {}, pipe: (to: PassThrough) => source.pipe(to), abort: stop })
    }
    app.post('/', streamed(), async (_request, reply) => reply.send(payloads[type]()))
    const port = await listen(app)
    const client = start(port, { key: 'k' })
    await (await chunksOf(client)).next()
    client.hangUp()
    await app.close()
    await until(() => stopped, { message: type })
    t.match(await store.get(storageKey(null, 'k')), { record: { kind: 'tombstone' } }, type)
  }
})

t.test('what a client does not read is read for it after one lease, and stored', async (t) => {
  const app = await build(t, { lease: 60, maxReplySize: 40_000_000 })
  let left = 1_000
  const source: Readable = new Readable({
    read() {
      this.push(left-- > 0 ? Buffer.alloc(20_000, 'x') : null)
    }
  })
  app.post('/', streamed(), async (_request, reply) => reply.send(source))
  const port = await listen(app)
  const client = start(port, { key: 'k' })
  const response = await client.response
  response.pause()
  await until(async () => (await recordOf(app)) !== undefined)
  t.match(await recordOf(app), { kind: 'reply' })
  t.equal(source.destroyed, true)
  let size = 0
  for await (const chunk of response) size += chunk.length
  t.equal(size, 20_000_000, 'who reads it after all gets it whole')
})

t.test(
  'what a client does not read, and cannot be kept, is a tombstone; source and connection are ended',
  async (t) => {
    const kinds: [type: string, reason: string, status: number][] = [
      ['text/plain', 'too-large', 200],
      ['text/event-stream', 'stream-failed', 200],
      ['text/plain', 'released', 503]
    ]
    for (const [type, reason, status] of kinds) {
      const app = await build(t, { lease: 60, maxReplySize: 1_000 })
      const source = endless(t)
      app.post('/', streamed(), async (_request, reply) => reply.code(status).type(type).send(source))
      const port = await listen(app)
      const client = start(port, { key: 'k' })
      const response = await client.response
      response.pause()
      await until(() => source.destroyed)
      await until(async () => (await app.idempotency.get('k'))?.state !== 'running')
      if (status === 503) t.equal(await app.idempotency.get('k'), null)
      else t.match(await recordOf(app), { kind: 'tombstone', reason })
      await t.rejects(response.toArray(), { code: 'ECONNRESET' })
    }
  }
)

t.test('a client that does not read does not keep the server from closing', async (t) => {
  const app = await build(t, { lease: 60 })
  const source = endless(t)
  app.post('/', streamed(), async (_request, reply) => reply.send(source))
  const port = await listen(app)
  const response = await start(port, { key: 'k' }).response
  response.on('error', () => {})
  response.pause()
  await app.close()
  t.equal(source.destroyed, true)
})

t.test('the stream of a reply that comes after the timeout has no client: it is read for one lease', async (t) => {
  for (const make of [silent, endless]) {
    const app = await build(t, { lease: 60 })
    const path = `/${make.name}`
    const late = latch()
    const source = make(t)
    app.post(path, { ...streamed(), handlerTimeout: 20 }, async () => {
      await late.promise
      return source
    })
    t.equal((await inject(app, { method: 'POST', url: path, headers: { 'idempotency-key': path } })).statusCode, 503)
    late.open()
    await until(() => source.destroyed)
    await until(async () => (await recordOf(app, path)) !== undefined)
    t.match(await recordOf(app, path), { kind: 'tombstone' })
  }
})

const EVENT_STREAMS: Record<string, (reply: FastifyReply, source: Readable) => unknown> = {
  plain: (reply, source) => reply.type('text/event-stream').send(source),
  'with a charset': (reply, source) => reply.type('Text/Event-Stream; charset=utf-8').send(source),
  'with a list of types': (reply, source) => reply.header('content-type', ['text/event-stream']).send(source),
  'by the raw response': (reply, source) => {
    reply.raw.setHeader('content-type', 'text/event-stream')
    return reply.send(source)
  },
  'as a Response': (_reply, source) =>
    new Response(Readable.toWeb(source) as never, { headers: { 'content-type': 'text/event-stream' } }),
  'as a web stream': (reply, source) => reply.type('text/event-stream').send(Readable.toWeb(source))
}

for (const [how, send] of Object.entries(EVENT_STREAMS)) {
  t.test(
    `an event stream, ${how}, is not copied: it is a tombstone at its end, and at once when its client leaves`,
    async (t) => {
      const app = await build(t)
      let stream = new PassThrough()
      app.post('/', streamed(), async (_request, reply) => send(reply, stream))
      const port = await listen(app)
      const whole = post(port, { key: 'whole' })
      stream.end('data: 1\n\n')
      t.equal((await whole).text, 'data: 1\n\n')
      t.match(await recordOf(app, 'whole'), { kind: 'tombstone', reason: 'hijacked' })
      t.equal(codeOf(await post(port, { key: 'whole' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
      stream = new PassThrough()
      const client = start(port, { key: 'k' })
      stream.write('data: 1\n\n')
      await (await chunksOf(client)).next()
      client.hangUp()
      await until(() => stream.destroyed)
      await until(async () => (await recordOf(app)) !== undefined)
      t.match(await recordOf(app), { kind: 'tombstone', reason: 'stream-failed' })
    }
  )
}

t.test('a stream that a later onSend hook replaces is read to its end, and stored', async (t) => {
  const app = await build(t)
  const onSend = async () => 'replaced'
  app.post('/', { ...streamed(), onSend }, async () =>
    Readable.from(Array.from({ length: 50 }, () => Buffer.alloc(9000, 'x')))
  )
  const port = await listen(app)
  t.equal((await post(port, { key: 'k' })).text, 'replaced')
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  t.equal((await post(port, { key: 'k' })).headers[REPLAYED], 'true')
})

t.test(
  'a stream that a later onSend hook replaces, and that fails, is a tombstone and ends nothing else',
  async (t) => {
    const app = await build(t)
    const source = new PassThrough()
    const onSend = async () => {
      source.write('one')
      source.destroy(new Error('broken'))
      await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
      return 'replaced'
    }
    app.post('/', { ...streamed(), onSend }, async () => source)
    const port = await listen(app)
    t.equal((await post(port, { key: 'k' })).text, 'replaced')
    t.match(await recordOf(app), { kind: 'tombstone', reason: 'stream-failed' })
  }
)

t.test('streams that are not of this platform are sent and stored', async (t) => {
  const app = await build(t)
  app.post('/pipe', streamed(), (_request, reply) => {
    const legacy = new EventEmitter() as EventEmitter & { pipe(to: NodeJS.WritableStream): unknown }
    legacy.pipe = (to) => {
      setImmediate(() => {
        to.end('piped')
        legacy.emit('end')
        legacy.emit('close')
      })
      return to
    }
    reply.send(legacy)
  })
  app.post('/web', streamed(), (_request, reply) => {
    const chunks = [Buffer.from('hel'), Buffer.from('lo')]
    const reader = { read: async () => ({ done: chunks.length === 0, value: chunks.shift() }), cancel: async () => {} }
    reply.send({ locked: false, getReader: () => reader })
  })
  const port = await listen(app)
  for (const [path, text] of [
    ['/pipe', 'piped'],
    ['/web', 'hello']
  ] as const) {
    t.equal((await post(port, { path, key: path })).text, text)
    const replay = await post(port, { path, key: path })
    t.same([replay.text, replay.headers[REPLAYED]], [text, 'true'])
  }
})

t.test('a stream with an encoding sends and stores what it would without the plugin', async (t) => {
  const app = await build(t)
  for (const encoding of ['hex', 'latin1', 'utf8'] as const) {
    const handler = async () => Readable.from([Buffer.from('hé')]).setEncoding(encoding)
    app.post(`/bare/${encoding}`, handler)
    app.post(`/${encoding}`, streamed(), handler)
  }
  const port = await listen(app)
  for (const encoding of ['hex', 'latin1', 'utf8']) {
    const bare = await post(port, { path: `/bare/${encoding}` })
    for (let i = 0; i < 2; i++) t.same((await post(port, { path: `/${encoding}`, key: encoding })).body, bare.body)
  }
})

t.test("a Response's cookies reach its client once, and no other", async (t) => {
  const app = await build(t)
  app.post('/', streamed(), async () => {
    const response = new Response('x')
    response.headers.append('set-cookie', 'a=1')
    response.headers.append('set-cookie', 'b=2')
    return response
  })
  const port = await listen(app)
  t.same((await post(port, { key: 'k' })).headers['set-cookie'], ['a=1', 'b=2'])
  t.equal((await post(port, { key: 'k' })).headers['set-cookie'], undefined)
})

/** Headers that Node does not send. */
const UNSENDABLE: Record<string, [name: string, value: unknown]> = {
  'text beyond Latin-1': ['content-disposition', 'attachment; filename="日本.pdf"'],
  'a line break': ['x-note', 'a\r\nb: c'],
  'one of several values': ['x-list', ['a', '日']],
  'a symbol': ['x-symbol', Symbol('a')],
  'a value that is undefined': ['x-list', [undefined]],
  'a name with a blank': ['a b', 'x'],
  'a header that is not stored': ['set-cookie', 'name=日']
}
const BODIES: Record<string, () => unknown> = {
  'an object': () => ({ a: 1 }),
  'a stream': () => Readable.from(['one', 'two']),
  'a web stream': () => web('one'),
  'a Response': () => new Response(web('one'), { status: 201 })
}

t.test('a header that cannot be sent is an error of work that is done: its reply is stored, and replays', async (t) => {
  for (const [what, [name, value]] of Object.entries(UNSENDABLE)) {
    for (const [kind, make] of Object.entries(BODIES)) {
      const app = await build(t)
      let runs = 0
      app.post('/', streamed(), async (_request, reply) => {
        runs++
        return reply.header(name, value).send(make())
      })
      const port = await listen(app)
      const first = await post(port, { key: 'k' })
      t.same([first.status, JSON.parse(first.text).statusCode], [500, 500], `${what}, ${kind}`)
      for (let i = 0; i < 2; i++) {
        const again = await post(port, { key: 'k' })
        t.same([again.status, again.text, again.headers[REPLAYED], runs], [500, first.text, 'true', 1])
      }
    }
  }
})

t.test('a header that cannot be sent is the same to a handler that replies from a callback', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', streamed(), (_request, reply) => {
    runs++
    setImmediate(() => reply.header('x-note', '日').send('x'))
  })
  const first = await app.inject(keyed)
  const again = await app.inject(keyed)
  t.same([first.statusCode, again.statusCode, again.body, runs], [500, 500, first.body, 1])
})

t.test('a stream that is not sent for the sake of a header is closed', async (t) => {
  const app = await build(t)
  const source = new PassThrough()
  app.post('/', streamed(), async (_request, reply) => reply.header('x-note', '日').send(source))
  t.equal((await app.inject(keyed)).statusCode, 500)
  t.equal(source.destroyed, true)
})

t.test("an error's reply with a header that cannot be sent is an ordinary 500: the handler runs again", async (t) => {
  const app = await build(t)
  let runs = 0
  app.setErrorHandler((_error, _request, reply) => reply.code(503).header('x-note', '日').send({ mine: true }))
  app.post('/', streamed(), async () => {
    if (++runs === 1) throw new Error('failed')
    return { runs }
  })
  const port = await listen(app)
  t.same((await post(port, { key: 'k' })).status, 503)
  t.match(await post(port, { key: 'k' }), { status: 200, text: '{"runs":2}' })
})

t.test('a header that comes back on the reply of its error is left off', async (t) => {
  for (const place of ['error handler', 'onSend']) {
    const app = await build(t)
    let runs = 0
    const spoil = (reply: FastifyReply) => reply.headers({ 'x-note': '日', 'x-other': 'ok' })
    if (place === 'onSend') app.addHook('onSend', async (_request, reply) => void spoil(reply))
    else app.setErrorHandler((_error, _request, reply) => spoil(reply).code(500).send({ mine: true }))
    app.post('/', streamed(), async (_request, reply) => {
      runs++
      return spoil(reply).send({ a: 1 })
    })
    const port = await listen(app)
    const first = await post(port, { key: 'k' })
    t.match(first, { status: 500, headers: { 'x-other': 'ok', 'x-note': undefined } }, place)
    if (place === 'error handler') {
      const again = await post(port, { key: 'k' })
      t.same([again.status, again.text, again.headers[REPLAYED], runs], [500, first.text, 'true', 1])
    }
    t.match(await recordOf(app, 'k'), { kind: 'reply', statusCode: 500 }, place)
  }
})

t.test('a stream that ends short of its content-length has broken off', async (t) => {
  for (const make of [(source: Readable) => source, (source: Readable) => Readable.toWeb(source)]) {
    const app = await build(t)
    let runs = 0
    app.post('/', streamed(), async (_request, reply) => {
      runs++
      return reply.header('content-length', 1000).send(make(Readable.from([Buffer.from('only the beginning')])))
    })
    const port = await listen(app)
    await t.rejects(post(port, { key: 'k' }))
    t.match(await recordOf(app, 'k'), { kind: 'tombstone', reason: 'stream-failed' })
    t.equal(codeOf(await post(port, { key: 'k' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
    t.equal(runs, 1)
  }
})

t.test('a content-length of a reply that has no body promises nothing', async (t) => {
  for (const statusCode of [204, 304]) {
    const app = await build(t)
    let runs = 0
    app.post('/', streamed(), async (_request, reply) => {
      runs++
      return reply.code(statusCode).header('content-length', 1000).send(Readable.from([]))
    })
    t.equal((await app.inject(keyed)).statusCode, statusCode)
    const again = await app.inject(keyed)
    t.same([again.statusCode, again.headers[REPLAYED], runs], [statusCode, 'true', 1])
  }
})
