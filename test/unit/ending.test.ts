import { PassThrough, type Readable } from 'node:stream'
import type { FastifyReply, FastifyRequest } from 'fastify'
import t from 'tap'
import { Exchange } from '../../lib/http/exchange.js'
import type { Payload, Unfinished } from '../../lib/http/reply-record.js'
import { endUnkept, finish, isFinalReply, sendStream, statusOf } from '../../lib/http/store-reply.js'
import type { Operation } from '../../lib/operation/operation.js'
import type { Policy } from '../../lib/options.js'
import { latch, until } from '../support/latch.js'
import { reply as stored } from '../support/store-fixtures.js'

type Headers = Record<string, string>

/** A reply on its way, and what is done to its claim; `storing` is how long, and with what outcome. */
function onItsWay({
  headers = {} as Headers,
  maxReplySize = 100,
  storing = () => undefined as Promise<void> | undefined
} = {}) {
  const calls: unknown[][] = []
  const operation = {
    fingerprint: 'f',
    policy: {
      maxReplySize,
      excludeHeaders: new Set<string>(),
      replayHeader: null,
      shouldStore: (_request: unknown, { raw }: FastifyReply) => raw.statusCode < 500
    },
    release: async () => {
      calls.push(['release'])
      await storing()
    },
    complete: (...args: unknown[]) => {
      calls.push(args)
      return storing()
    }
  }
  const current = { ...headers }
  const reply = {
    statusCode: 200,
    raw: { headersSent: false, statusCode: 200 },
    request: { log: { error: () => {} } },
    getHeaders: () => ({ ...current }),
    getHeader: (name: string) => current[name],
    header: (name: string, value: string) => {
      current[name] = value
    },
    removeHeader: (name: string) => {
      delete current[name]
    },
    code: (status: number) => {
      reply.statusCode = status
    }
  }
  const exchange = new Exchange(operation as unknown as Operation, reply as never)
  return { calls, exchange, headers: current, reply }
}

t.test('a reply that is stored at once is handed on at once', async (t) => {
  const { calls, exchange } = onItsWay()
  const record = stored()
  t.equal(finish(exchange, 'payload', record), 'payload')
  t.strictSame(calls, [[record, false]])
  t.equal(exchange.sending, 'passed')
  exchange.failed = true
  finish(exchange, 'payload', record)
  t.strictSame(calls[1], [record, true], 'of an error nothing but the record counts')
})

t.test('a reply that is not to be stored gives the key back', async (t) => {
  const { calls, exchange } = onItsWay()
  t.equal(await finish(exchange, 'payload', null), 'payload')
  t.strictSame(calls, [['release']])
})

t.test('a reply waits for its storing, as it was when that began', async (t) => {
  for (const headersSent of [false, true]) {
    const storing = latch()
    const { exchange, headers, reply } = onItsWay({ headers: { etag: '1' }, storing: () => storing.promise })
    const sent = finish(exchange, 'payload', stored())
    t.equal(exchange.sending, 'storing')
    Object.assign(headers, { etag: '2', 'x-late': '1' })
    reply.statusCode = 418
    reply.raw.headersSent = headersSent
    storing.open()
    t.equal(await sent, 'payload')
    t.equal(exchange.sending, 'passed')
    t.strictSame([reply.statusCode, headers], headersSent ? [418, { etag: '2', 'x-late': '1' }] : [200, { etag: '1' }])
  }
})

t.test('a status that is right is not set once more', async (t) => {
  const { exchange, reply } = onItsWay({ storing: async () => {} })
  reply.code = () => t.fail('set')
  t.equal(await finish(exchange, 'payload', stored()), 'payload')
})

t.test(
  'a reply that is not true because its transaction failed is an error, without what the handler had set',
  async (t) => {
    for (const [error, status] of [
      [Object.assign(new Error('serialization'), { statusCode: 503 }), 503],
      [new Error('constraint'), 500]
    ] as const) {
      const { exchange, headers, reply } = onItsWay({ headers: { etag: '1' }, storing: () => Promise.reject(error) })
      exchange.headersBefore = { vary: 'origin' } as unknown as typeof exchange.headersBefore
      reply.statusCode = 418
      await t.rejects(finish(exchange, 'payload', stored()) as Promise<unknown>, error)
      t.equal(exchange.sending, 'passed')
      t.equal(reply.statusCode, status)
      t.strictSame(headers, { vary: 'origin' })
    }
  }
)

/** Sends a stream, and reads it as a client does. */
function streamed(final: boolean, options: Parameters<typeof onItsWay>[0] = {}) {
  const source = new PassThrough()
  const scene = onItsWay(options)
  const sent = sendStream(scene.exchange, source, final, new Set()) as Readable
  const client = { text: '', ended: false, failed: false }
  sent.on('data', (chunk) => {
    client.text += chunk
  })
  sent.on('end', () => {
    client.ended = true
  })
  sent.on('error', () => {
    client.failed = true
  })
  return { ...scene, client, sent, source }
}

t.test('a stream is stored at its end, with the status and headers that it began with', async (t) => {
  const { calls, client, exchange, headers, reply, sent, source } = streamed(true, {
    headers: { etag: '1', date: 'x' }
  })
  t.equal(exchange.stream, sent)
  t.equal(exchange.sending, 'passed')
  Object.assign(headers, { etag: '2' })
  reply.statusCode = 500
  source.end('body')
  await until(() => client.ended)
  t.match(calls, [
    [{ kind: 'reply', fingerprint: 'f', statusCode: 200, headers: [['etag', '1']], body: Buffer.from('body') }, false]
  ])
})

t.test('the stream of an error is stored as one', async (t) => {
  const scene = onItsWay()
  scene.exchange.failed = true
  const source = new PassThrough()
  const sent = sendStream(scene.exchange, source, true, new Set()) as Readable
  source.end('body')
  await sent.toArray()
  t.equal(scene.calls[0]?.[1], true)
})

t.test('a stream that is not final gives the key back at its end, whatever its size and end', async (t) => {
  const { calls, client, source } = streamed(false)
  source.end('x'.repeat(1_000))
  await until(() => client.ended)
  t.strictSame(calls, [['release']])
  const broken = streamed(false)
  broken.source.write('x')
  await until(() => broken.client.text === 'x')
  broken.source.destroy(new Error('x'))
  await until(() => broken.client.failed)
  t.strictSame(broken.calls, [['release']])
})

t.test('nothing is kept of a stream that is not final: what its client does not want is not read', async (t) => {
  const { calls, client, sent, source } = streamed(false)
  source.write('x')
  await until(() => client.text === 'x')
  sent.destroy()
  await until(() => source.destroyed)
  t.strictSame(calls, [['release']])
})

t.test('a final stream that is too large, or breaks off, is a tombstone; without a byte it is none', async (t) => {
  const large = streamed(true, { maxReplySize: 3 })
  large.source.end('1234')
  await until(() => large.client.ended)
  t.match(large.calls, [[{ kind: 'tombstone', reason: 'too-large' }]])
  for (const bytes of ['', 'x']) {
    const { calls, client, source } = streamed(true)
    if (bytes !== '') source.write(bytes)
    await until(() => client.text === bytes)
    source.destroy(new Error('x'))
    await until(() => client.failed)
    t.match(calls, bytes === '' ? [['release']] : [[{ kind: 'tombstone', reason: 'stream-failed' }]])
  }
})

t.test('the chunk that completes the content-length waits for the storing, and without one none does', async (t) => {
  for (const [headers, text] of [
    [{ 'content-length': '2' }, ''],
    [{ 'content-length': '3' }, 'ab'],
    [{}, 'ab']
  ] as [Record<string, string>, string][]) {
    const storing = latch()
    const { calls, client, source } = streamed(true, { headers: { ...headers }, storing: () => storing.promise })
    source.write('ab')
    await new Promise((resolve) => setImmediate(resolve))
    t.equal(client.text, text)
    t.equal(calls.length, text === '' ? 1 : 0)
    const rest = headers['content-length'] === '3' ? 'c' : ''
    source.end(rest)
    storing.open()
    await until(() => client.ended)
    t.equal(client.text, `ab${rest}`)
  }
})

t.test('without its client an event stream has broken off, and any other stream goes on', async (t) => {
  for (const [type, isEvents] of [
    ['text/event-stream', true],
    ['Text/Event-Stream; charset=utf-8', true],
    ['text/plain', false],
    ['text/event-streams', false],
    ['x-text/event-stream', false],
    [undefined, false]
  ] as const) {
    const { calls, client, sent, source } = streamed(
      true,
      type === undefined ? {} : { headers: { 'content-type': type } }
    )
    source.write('a')
    await until(() => client.text === 'a')
    sent.destroy()
    if (!isEvents) source.end('b')
    await until(() => calls.length > 0)
    t.match(calls, [[isEvents ? { reason: 'stream-failed' } : { body: Buffer.from('ab') }]], `${type}`)
  }
})

t.test('an event stream is not kept, whatever its end, and its tombstone says which that was', async (t) => {
  for (const [end, reason] of [
    [(source: PassThrough) => source.end(), 'hijacked'],
    [(source: PassThrough) => source.destroy(new Error('broken')), 'stream-failed']
  ] as const) {
    const { calls, client, source } = streamed(true, { headers: { 'content-type': 'text/event-stream' } })
    source.write('data: 1')
    await until(() => client.text === 'data: 1')
    end(source)
    await until(() => client.ended || client.failed)
    t.match(calls, [[{ kind: 'tombstone', reason }]])
  }
})

/** Sends a stream of a route with `transaction: true`. */
function committed(final: boolean, options: Parameters<typeof onItsWay>[0] = {}) {
  const scene = onItsWay(options)
  Object.assign(scene.exchange.operation.policy, { transaction: true })
  const source = new PassThrough()
  const open = new Set<Unfinished>()
  return { ...scene, open, source, sent: sendStream(scene.exchange, source, final, open) as Promise<unknown> }
}

t.test('in a transaction a stream is sent as it was when it was read, whatever happens meanwhile', async (t) => {
  const { calls, exchange, headers, open, reply, sent, source } = committed(true, {
    headers: { etag: '1', 'transfer-encoding': 'chunked' }
  })
  t.strictSame([exchange.sending, open.size], ['storing', 1])
  source.write('bo')
  // The handler's time is up, and an error handler has its turn.
  Object.assign(headers, { etag: '2', 'x-late': '1' })
  reply.statusCode = 503
  exchange.failed = true
  source.end('dy')
  t.strictSame(await sent, Buffer.from('body'))
  t.strictSame([reply.statusCode, headers, exchange.sending, open.size], [200, { etag: '1' }, 'passed', 0])
  t.match(calls, [[{ kind: 'reply', statusCode: 200, headers: [['etag', '1']], body: Buffer.from('body') }, false]])
  t.equal(exchange.stream, null)
})

t.test('in a transaction a stream that is not final gives the key back, and is sent', async (t) => {
  const { calls, sent, source } = committed(false)
  source.end('body')
  t.strictSame([await sent, calls], [Buffer.from('body'), [['release']]])
})

t.test(
  'in a transaction a stream that breaks off, or whose app closes, is an error that gives the key back',
  async (t) => {
    for (const [spoil, message] of [
      [({ source }: ReturnType<typeof committed>) => source.destroy(new Error('broken')), 'broken'],
      [({ open }: ReturnType<typeof committed>) => [...open][0]?.giveUp(), 'Nobody waits for this reply any more']
    ] as const) {
      const scene = committed(true)
      scene.source.write('half')
      await new Promise((resolve) => setImmediate(resolve))
      spoil(scene)
      await t.rejects(scene.sent, { message })
      t.strictSame([scene.calls, scene.reply.statusCode, scene.source.destroyed], [[['release']], 500, true])
    }
  }
)

t.test('in a transaction that is not committed the source is stopped, and nothing is sent', async (t) => {
  for (const maxReplySize of [2, 100]) {
    const { sent, source } = committed(true, { maxReplySize, storing: () => Promise.reject(new Error('refused')) })
    source.end('body')
    await t.rejects(sent, { message: 'refused' })
    t.equal(source.destroyed, true)
  }
})

t.test('what is no stream is left to Fastify', async (t) => {
  const { calls, exchange } = onItsWay()
  const payload = { no: 'stream' } as unknown as Payload
  t.equal(sendStream(exchange, payload, true, new Set()), payload)
  t.same([exchange.stream, exchange.sending, calls], [null, 'no', []])
})

t.test(
  'a reply of which only the status is known is a tombstone if that is final, and the reply is left alone',
  async (t) => {
    for (const [status, call] of [
      [201, [{ kind: 'tombstone', reason: 'hijacked' }]],
      [503, ['release']]
    ] as const) {
      const { calls, exchange, reply } = onItsWay({
        storing: () => Promise.reject(new Error('a transaction that failed'))
      })
      reply.raw.statusCode = reply.statusCode = 302
      if (status === 503) exchange.operation.release = async () => void calls.push(['release'])
      endUnkept(exchange, status, false)
      t.match(calls, [call])
      t.equal(reply.raw.statusCode, 302)
    }
  }
)

t.test("an error's status is its own where that is one of an error, else the reply's, else 500", async (t) => {
  for (const [error, current, status] of [
    [{ statusCode: 400 }, 200, 400],
    [{ statusCode: 599 }, 200, 599],
    [{ status: 404 }, 200, 404],
    [{ statusCode: 409, status: 404 }, 200, 409],
    [{ statusCode: 399, status: 404 }, 200, 404],
    [{ statusCode: 600 }, 503, 503],
    [{ statusCode: 200 }, 302, 500],
    [undefined, 200, 500],
    [null, 422, 422]
  ] as const) {
    t.equal(statusOf(error, current), status)
  }
})

t.test('shouldStore must answer at once: what else it gives is logged, and the default decides', async (t) => {
  const logged: unknown[] = []
  const request = { log: { error: (...args: unknown[]) => logged.push(args) } } as unknown as FastifyRequest
  const decide = (shouldStore: unknown, statusCode: number) =>
    isFinalReply({ shouldStore } as Policy, request, { statusCode, hasHeader: () => false } as never)
  t.equal(
    decide(() => 1, 500),
    true
  )
  t.equal(
    decide(() => undefined, 200),
    false
  )
  t.same(logged, [])
  const fail = () => {
    throw new Error('no decision')
  }
  for (const undecided of [async () => true, async () => false, fail]) {
    t.equal(decide(undecided, 500), false)
    t.equal(decide(undecided, 201), true)
  }
  t.equal(logged.length, 6)
  t.match(logged[0], [{ err: { message: /must answer at once/ } }, /shouldStore failed/])
  t.match(logged[4], [{ err: { message: 'no decision' } }, /shouldStore failed/])
})
