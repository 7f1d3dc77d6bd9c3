/*
 * The reply: what goes wrong when it is stored and replayed.
 *
 * guard                                            test
 * own refusals stored as the reply                 a duplicate's 409 does not end the running claim, nor become its reply
 *                                                  a mismatching retry does not destroy the stored reply
 * captured before serialisation                    what the response schema removes is in no replay
 * captured by patching reply.send                  an error of the handler replays as the error that it was
 * bytes and streams through JSON                   bytes replay as bytes
 *                                                  streams replay as the bytes that they gave, and are not opened again
 * other than JSON not protected                    a reply of any type protects its operation
 *                                                  a reply that cannot be kept leaves a mark, and the handler never runs again
 * JSON recognised too strictly, 204 dropped        content types with parameters, and replies without a body, are stored
 * claim released in the middle of a stream         the claim of a streamed reply is held until its last byte
 * set-cookie replayed, joined or split             cookies are never replayed
 * hop-by-hop headers replayed, others lost         a replay has the headers of the handler, and the framing of its own connection
 *                                                  the length of a reply is counted anew on each replay
 * headers with several values joined               headers with several values keep them apart
 * headers of the first request replayed            headers that belong to one request are fresh on a replay
 * stored after the bytes have left                 nothing leaves before it is stored
 *                                                  a retry on receipt of the reply is a replay, never a 409
 * strange statuses, no Retry-After                 a replay has the status of the first reply
 *                                                  refusals have the statuses that clients expect, and say when to come back
 */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createReadStream } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { Agent, request as httpRequest, type IncomingMessage } from 'node:http'
import { connect } from 'node:net'
import { PassThrough, Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import Fastify, { type FastifyReply } from 'fastify'
import t from 'tap'
import idempotency, { MemoryStore, type StoredReply } from '../../index.js'
import { all, isReplay, post } from '../interop/kit.js'
import { post as request } from '../support/app.js'
import { latch, listening, until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { Delegate, kinds, serve, times } from './kit.js'

const redis = await startRedis()
t.teardown(() => redis.close())

/** All byte values, in an order that is no text in any encoding. */
const bytes = Buffer.concat(
  times(4, (i) => createHash('sha512').update(String(i)).digest()).concat(Buffer.from(times(256, (i) => i)))
)

function typedArray(): Float64Array {
  return new Float64Array([1.5, -0, Number.NaN, Number.POSITIVE_INFINITY])
}

const buffered: Record<string, () => unknown> = {
  Buffer: () => bytes,
  Uint8Array: () => new Uint8Array(bytes),
  'part of an ArrayBuffer': () => new Uint8Array(bytes.buffer, bytes.byteOffset + 3, 100),
  Float64Array: typedArray,
  'empty Buffer': () => Buffer.alloc(0),
  'JSON of a Buffer': () => ({ type: 'Buffer', data: [1, 2, 3] }),
  'text beyond ASCII': () => 'Grüße, 世界 👋 \u0000',
  'a lone surrogate': () => ({ text: '\ud800' })
}

const streams: Record<string, () => unknown> = {
  'node stream': () => Readable.from([bytes.subarray(0, 100), bytes.subarray(100)]),
  'node stream of text': () => Readable.from(['Grü', 'ße']),
  'web stream': () => new Blob([bytes]).stream(),
  Response: () => new Response(bytes, { status: 202, headers: { 'content-type': 'image/png', 'x-of': 'Response' } }),
  'empty stream': () => Readable.from([]),
  file: () => createReadStream(fileURLToPath(import.meta.url))
}

for (const { name, fresh } of kinds(redis)) {
  t.test(name, async (t) => {
    t.test("a duplicate's 409 does not end the running claim, nor become its reply", async (t) => {
      const open = fresh()
      const goOn = latch()
      let runs = 0
      // Whatever the reply: the plugin's own are not stored.
      const app = await serve(t, { store: await open(), shouldStore: () => true }, async () => {
        runs++
        await goOn.promise
        return { run: runs }
      })
      const first = post(app, { key: 'key' }).then((reply) => reply)
      await until(() => runs === 1)
      for (let i = 0; i < 3; i++) {
        t.equal((await post(app, { key: 'key' })).statusCode, 409)
        t.match(await app.idempotency.get('key'), { state: 'running' })
      }
      goOn.open()
      t.equal((await first).statusCode, 200)
      const retry = await post(app, { key: 'key' })
      t.ok(isReplay(retry))
      t.same(retry.json(), { run: 1 })
      t.equal(runs, 1)
    })

    t.test('a mismatching retry does not destroy the stored reply', async (t) => {
      const open = fresh()
      let runs = 0
      const app = await serve(t, { store: await open(), shouldStore: () => true }, async () => ({ run: ++runs }))
      const first = await post(app, { key: 'key', payload: { amount: 1 } })
      const before = await app.idempotency.get('key')
      for (let i = 0; i < 3; i++) t.equal((await post(app, { key: 'key', payload: { amount: 2 } })).statusCode, 422)
      const after = await app.idempotency.get('key')
      t.same({ ...after, ttlMs: 0 }, { ...before, ttlMs: 0 })
      const retry = await post(app, { key: 'key', payload: { amount: 1 } })
      t.ok(isReplay(retry))
      t.equal(retry.body, first.body)
      t.equal(runs, 1)
    })

    t.test('bytes replay as bytes', async (t) => {
      for (const [kind, make] of Object.entries(buffered)) {
        const open = fresh()
        let runs = 0
        const app = await serve(t, { store: await open() }, async () => {
          runs++
          return make()
        })
        const first = await post(app, { key: 'key' })
        t.equal(first.statusCode, 200)
        const made = make()
        if (ArrayBuffer.isView(made)) {
          t.same(first.rawPayload, Buffer.from(made.buffer, made.byteOffset, made.byteLength), `first reply: ${kind}`)
        }
        const retry = await post(app, { key: 'key' })
        t.ok(isReplay(retry))
        t.same(retry.rawPayload, first.rawPayload, kind)
        t.equal(retry.headers['content-type'], first.headers['content-type'])
        t.equal(retry.headers['content-length'], first.headers['content-length'])
        t.equal(runs, 1)
      }
    })

    t.test('streams replay as the bytes that they gave, and are not opened again', async (t) => {
      const file = await readFile(fileURLToPath(import.meta.url))
      for (const [kind, make] of Object.entries(streams)) {
        const open = fresh()
        let opened = 0
        const app = await serve(t, { store: await open() }, async () => {
          opened++
          return make()
        })
        const url = await listening(app)
        const send = async () => {
          const response = await fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key' } })
          return { response, body: Buffer.from(await response.arrayBuffer()) }
        }
        const first = await send()
        if (kind === 'file') t.same(first.body, file)
        else if (['node stream', 'web stream', 'Response'].includes(kind)) t.same(first.body, bytes)
        const retry = await send()
        t.equal(retry.response.headers.get('idempotent-replayed'), 'true', kind)
        t.equal(retry.response.status, first.response.status)
        t.same(retry.body, first.body)
        for (const name of ['content-type', 'x-of']) {
          t.equal(retry.response.headers.get(name), first.response.headers.get(name))
        }
        t.equal(opened, 1)
      }
    })
  })
}

t.test('what the response schema removes is in no replay', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  const schema = { response: { 200: { type: 'object', properties: { shown: { type: 'string' } } } } }
  app.post('/', { config: { idempotency: true }, schema }, async () => ({ shown: 'yes', password: 'hidden' }))
  for (const replayed of [false, true]) {
    const reply = await post(app, { key: 'key' })
    t.equal(isReplay(reply), replayed)
    t.equal(reply.body, '{"shown":"yes"}')
  }
})

t.test('an error of the handler replays as the error that it was', async (t) => {
  const errors: Record<string, (reply: FastifyReply) => unknown> = {
    thrown: () => {
      throw Object.assign(new Error('declined'), { statusCode: 402, code: 'CARD_DECLINED' })
    },
    sent: (reply) => reply.code(402).send(new Error('declined')),
    rejected: async () => {
      throw Object.assign(new Error('declined'), { statusCode: 402 })
    },
    'of the server': () => {
      throw new Error('crashed')
    },
    'of no type': () => {
      throw 'a string'
    }
  }
  for (const [kind, fail] of Object.entries(errors)) {
    let runs = 0
    const app = await serve(t, { shouldStore: () => true }, (_request, reply) => {
      runs++
      return fail(reply)
    })
    const first = await post(app, { key: 'key' })
    t.ok(first.statusCode >= 400)
    t.not(first.body, '{}')
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry), kind)
    t.equal(retry.statusCode, first.statusCode)
    t.equal(retry.body, first.body)
    t.equal(retry.headers['content-type'], first.headers['content-type'])
    t.equal(runs, 1)
  }
})

t.test('a reply of any type protects its operation', async (t) => {
  for (const type of ['text/html', 'text/csv; charset=utf-8', 'application/pdf', 'application/xml', 'image/png']) {
    for (const payload of ['text', bytes]) {
      let runs = 0
      const app = await serve(t, {}, (_request, reply) => {
        runs++
        return reply.type(type).send(payload)
      })
      const first = await post(app, { key: 'key' })
      const retry = await post(app, { key: 'key' })
      t.ok(isReplay(retry), type)
      t.same(retry.rawPayload, first.rawPayload)
      t.equal(retry.headers['content-type'], first.headers['content-type'])
      t.equal(runs, 1)
    }
  }
})

t.test('a reply that cannot be kept leaves a mark, and the handler never runs again', async (t) => {
  const unkept: Record<string, (reply: FastifyReply) => unknown> = {
    'too large': () => 'x'.repeat(1001),
    'a stream that is too large': () => Readable.from([Buffer.alloc(600), Buffer.alloc(600)]),
    hijacked: (reply) => {
      reply.hijack()
      reply.raw.end('by hand')
    },
    'written by hand': (reply) => {
      reply.raw.end('by hand')
    },
    'an event stream by hand': (reply) => {
      reply.raw.writeHead(200, { 'content-type': 'text/event-stream' })
      reply.raw.write('data: 1\n\n')
      reply.raw.end()
    }
  }
  for (const [kind, make] of Object.entries(unkept)) {
    let runs = 0
    const app = await serve(t, { maxReplySize: 1000 }, (_request, reply) => {
      runs++
      return make(reply)
    })
    const url = await listening(app)
    const send = () => fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key' } })
    const first = await send()
    t.equal(first.status, 200, `${kind}: the first caller gets it`)
    await first.arrayBuffer()
    await until(async () => (await app.idempotency.get('key'))?.state === 'completed', { message: kind })
    for (let i = 0; i < 2; i++) {
      const retry = await send()
      t.equal(retry.status, 409)
      t.equal(((await retry.json()) as { code: string }).code, 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
    }
    t.equal(runs, 1)
  }
})

t.test('content types with parameters, and replies without a body, are stored', async (t) => {
  const replies: Record<string, (reply: FastifyReply) => unknown> = {
    'JSON with a charset': (reply) => reply.type('application/json; charset=utf-8').send({ a: 1 }),
    'JSON of a vendor': (reply) => reply.type('application/vnd.api+json').send({ a: 1 }),
    'JSON that is null': (reply) => reply.type('application/json').send('null'),
    '204': (reply) => reply.code(204).send(),
    '204 with a payload': (reply) => reply.code(204).send({ a: 1 }),
    '201 without a body': (reply) => reply.code(201).header('location', '/1').send(),
    '304': (reply) => reply.code(304).send(),
    redirect: (reply) => reply.redirect('/elsewhere', 303)
  }
  for (const [kind, make] of Object.entries(replies)) {
    let runs = 0
    const app = await serve(t, {}, (_request, reply) => {
      runs++
      return make(reply)
    })
    const first = await post(app, { key: 'key' })
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry), kind)
    t.equal(retry.statusCode, first.statusCode)
    t.equal(retry.body, first.body)
    for (const header of ['content-type', 'content-length', 'location']) {
      t.equal(retry.headers[header], first.headers[header], `${kind}: ${header}`)
    }
    t.equal(runs, 1)
  }
})

t.test('the claim of a streamed reply is held until its last byte', async (t) => {
  for (const type of ['application/x-ndjson', 'application/json', 'text/event-stream']) {
    const stream = new PassThrough()
    let runs = 0
    const app = await serve(t, {}, (_request, reply) => {
      runs++
      return reply.type(type).send(stream)
    })
    const url = await listening(app)
    const send = () => fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key' } })
    stream.write('{"part":1}\n\n')
    const first = await send()
    const reader = first.body?.getReader()
    t.equal(Buffer.from((await reader?.read())?.value ?? []).toString(), '{"part":1}\n\n', 'it comes as it is made')
    t.equal((await send()).status, 409)
    stream.write('{"part":2}\n\n')
    t.equal(Buffer.from((await reader?.read())?.value ?? []).toString(), '{"part":2}\n\n')
    t.equal((await send()).status, 409)
    stream.end()
    t.ok((await reader?.read())?.done)
    const retry = await send()
    // An event stream has no end that could be waited for: there is no copy of it.
    if (type === 'text/event-stream') {
      t.equal(retry.status, 409)
    } else {
      t.equal(retry.headers.get('idempotent-replayed'), 'true', type)
      t.equal(await retry.text(), '{"part":1}\n\n{"part":2}\n\n')
    }
    t.equal(runs, 1)
  }
})

t.test('cookies are never replayed', async (t) => {
  for (const cookies of ['a=1', ['a=1, 2', 'b=2; Expires=Wed, 21 Oct 2065 07:28:00 GMT']]) {
    const app = await serve(t, {}, async (_request, reply) => {
      reply.header('set-cookie', cookies)
      return 'done'
    })
    t.same(
      all((await post(app, { key: 'key' })).headers['set-cookie']),
      [cookies].flat(),
      'they reach the first caller'
    )
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.headers['set-cookie'], undefined)
    t.notMatch(JSON.stringify(await app.idempotency.get('key')), 'cookie')
  }
})

/** A request whose answer is shown as it came, header by header. */
async function raw(url: string, agent?: Agent): Promise<{ message: IncomingMessage; body: Buffer }> {
  const sent = httpRequest(url, {
    method: 'POST',
    headers: { 'idempotency-key': 'key' },
    ...(agent && { agent })
  }).end()
  const [message] = (await once(sent, 'response')) as [IncomingMessage]
  return { message, body: await buffer(message) }
}

t.test('a replay has the headers of the handler, and the framing of its own connection', async (t) => {
  const app = await serve(t, {}, (_request, reply) =>
    reply
      .code(201)
      .header('location', '/things/1')
      .header('etag', '"1"')
      .header('content-disposition', 'attachment; filename="a.txt"')
      .header('x-number', 7)
      .header('connection', 'close')
      .header('date', 'Thu, 01 Jan 1970 00:00:00 GMT')
      .header('www-authenticate', 'Basic')
      .header('proxy-authenticate', 'Basic')
      .send(Readable.from(['Grü', 'ße']))
  )
  const url = await listening(app)
  const agent = new Agent({ keepAlive: true })
  t.teardown(() => agent.destroy())
  const first = await raw(url, agent)
  t.equal(first.message.headers['transfer-encoding'], 'chunked', 'a stream has no length')
  const { message, body } = await raw(url, agent)
  t.equal(message.statusCode, 201)
  t.match(message.headers, {
    'idempotent-replayed': 'true',
    location: '/things/1',
    etag: '"1"',
    'content-disposition': 'attachment; filename="a.txt"',
    'x-number': '7',
    'content-length': '7',
    connection: 'keep-alive'
  })
  t.equal(body.toString(), 'Grüße')
  for (const name of ['transfer-encoding', 'www-authenticate', 'proxy-authenticate']) {
    t.notOk(name in message.headers, name)
  }
  t.notMatch(message.headers.date, '1970')
  const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
  t.same(record.headers.map(([name]) => name).sort(), ['content-disposition', 'etag', 'location', 'x-number'])
  t.equal(message.rawHeaders.filter((name) => name.toLowerCase() === 'content-length').length, 1)
})

t.test('the length of a reply is counted anew on each replay', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  let sent = 0
  const onSend = async (_request: unknown, reply: FastifyReply, payload: unknown) => {
    const counted = `${payload}${'!'.repeat(sent++)}`
    reply.header('content-length', Buffer.byteLength(counted))
    return counted
  }
  app.post('/', { config: { idempotency: true }, onSend }, async (_request, reply) =>
    reply.header('content-length', 4).send('done')
  )
  for (const body of ['done', 'done!', 'done!!']) {
    const reply = await post(app, { key: 'key' })
    t.equal(reply.body, body)
    t.equal(reply.headers['content-length'], String(body.length))
  }
  t.notMatch(JSON.stringify(await app.idempotency.get('key')), 'content-length')
})

t.test('headers with several values keep them apart', async (t) => {
  const links = ['</a>; rel="next", </b>; rel="prev"', '</c>; rel="last"']
  const app = await serve(t, {}, (_request, reply) => reply.header('link', links).header('x-list', 'a, b').send('done'))
  const url = await listening(app)
  const linksOf = ({ rawHeaders }: IncomingMessage) =>
    rawHeaders.filter((_, i) => i % 2 === 1 && rawHeaders[i - 1]?.toLowerCase() === 'link')
  t.same(linksOf((await raw(url)).message), links)
  const { message } = await raw(url)
  t.equal(message.headers['idempotent-replayed'], 'true')
  t.same(linksOf(message), links)
  t.equal(message.headers['x-list'], 'a, b')
})

t.test('headers that belong to one request are fresh on a replay', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  let requests = 0
  const perRequest = ['x-request-id', 'x-ratelimit-remaining', 'access-control-allow-origin', 'x-whatever']
  app.addHook('onRequest', async (_request, reply) => {
    requests++
    for (const name of perRequest) reply.header(name, `${name} ${requests}`)
  })
  app.post('/', { config: { idempotency: true } }, (_request, reply) =>
    reply.header('x-of-the-handler', `${requests}`).header('x-whatever', 'changed').send('done')
  )
  await post(app, { key: 'key' })
  const retry = await post(app, { key: 'key' })
  t.ok(isReplay(retry))
  for (const name of perRequest.slice(0, 3)) t.equal(retry.headers[name], `${name} 2`)
  t.equal(retry.headers['x-of-the-handler'], '1', 'what the handler set is replayed')
  t.equal(retry.headers['x-whatever'], 'changed', 'and so is what it changed')
  const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
  t.same(record.headers.map(([name]) => name).sort(), ['content-type', 'x-of-the-handler', 'x-whatever'])
})

/** Holds the storing of replies until the test lets it go on. */
class Held extends Delegate {
  readonly storing = latch()
  readonly goOn = latch()
  override async complete(...args: Parameters<Delegate['complete']>) {
    this.storing.open()
    await this.goOn.promise
    return super.complete(...args)
  }
}

t.test('nothing leaves before it is stored', async (t) => {
  const kinds: Record<string, { make: (reply: FastifyReply) => unknown; early: RegExp | null }> = {
    string: { make: () => 'the end', early: null },
    Buffer: { make: () => Buffer.from('the end'), early: null },
    stream: { make: () => Readable.from(['one ', 'two ', 'the end']), early: /two/ },
    'stream with a length': {
      make: (reply) => reply.header('content-length', 15).send(Readable.from(['one ', 'two ', 'the end'])),
      early: /two/
    }
  }
  for (const [kind, { make, early }] of Object.entries(kinds)) {
    const store = new Held(new MemoryStore())
    const app = await serve(t, { store }, (_request, reply) => make(reply))
    const { port } = new URL(await listening(app))
    const socket = connect(Number(port), '127.0.0.1')
    t.teardown(() => socket.destroy())
    let received = ''
    socket.on('data', (chunk) => {
      received += chunk
    })
    socket.write('POST / HTTP/1.1\r\nHost: a\r\nIdempotency-Key: key\r\nContent-Length: 0\r\n\r\n')
    await store.storing.promise
    if (early !== null) await until(() => early.test(received), { message: `the beginning of the ${kind}` })
    await sleep(20)
    // The end of a chunked stream is its last, empty chunk.
    const isComplete = () => (kind === 'stream' ? /\r\n0\r\n\r\n$/.test(received) : /the end/.test(received))
    t.notOk(isComplete(), kind)
    if (early === null) t.equal(received, '', 'not a byte')
    store.goOn.open()
    await until(isComplete, { message: `the end of the ${kind}` })
  }
})

t.test('a retry on receipt of the reply is a replay, never a 409', async (t) => {
  for (const { fresh } of kinds(redis)) {
    const open = fresh()
    const makes = [() => 'text', () => Readable.from(['a', 'b']), () => undefined] as const
    const apps: string[] = []
    let runs = 0
    for (let i = 0; i < 2; i++) {
      const app = await serve(t, { store: await open() }, (request, reply) => {
        runs++
        return reply.send((makes[(request.body as { make: number }).make] as () => unknown)())
      })
      apps.push(await listening(app))
    }
    const client = async (name: number) => {
      for (let i = 0; i < 12; i++) {
        // One service, on two ports.
        const send = (url: string | undefined) =>
          request(Number(new URL(String(url)).port), { key: `${name}-${i}`, body: `{"make":${i % makes.length}}` })
        const first = await send(apps[0])
        if (first.status !== 200) t.fail(`first request: ${first.status}`)
        const retry = await send(apps[1])
        if (retry.headers['idempotent-replayed'] !== 'true') t.fail(`retry: ${retry.status}`)
        if (retry.text !== first.text) t.fail('another body')
      }
    }
    await Promise.all(times(10, client))
    t.equal(runs, 120)
  }
})

t.test('a replay has the status of the first reply', async (t) => {
  for (const status of [200, 201, 202, 204, 299, 301, 400, 403, 404, 409, 410, 418, 422, 451]) {
    let runs = 0
    const app = await serve(t, {}, (_request, reply) => {
      runs++
      return reply.code(status).send('done')
    })
    t.equal((await post(app, { key: 'key' })).statusCode, status)
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.statusCode, status)
    t.equal(runs, 1)
  }
})

t.test('refusals have the statuses that clients expect, and say when to come back', async (t) => {
  class Failing extends Delegate {
    fails = false
    override async acquire(...args: Parameters<Delegate['acquire']>) {
      if (this.fails) throw new Error('connection refused')
      return super.acquire(...args)
    }
  }
  for (const options of [{}, { onConflict: 'wait', waitTimeout: 30 } as const]) {
    const store = new Failing()
    const goOn = latch()
    let runs = 0
    const app = await serve(t, { store, required: true, ...options }, async () => {
      runs++
      await goOn.promise
      return 'done'
    })
    const first = post(app, { key: 'key' }).then((reply) => reply)
    await until(() => runs === 1)
    const conflict = await post(app, { key: 'key' })
    t.equal(conflict.statusCode, 409)
    t.equal(conflict.json().code, 'FST_IDEMPOTENCY_IN_PROGRESS')
    t.match(conflict.headers['retry-after'], /^[1-9]\d*$/)
    goOn.open()
    await first
    t.equal((await post(app, { key: 'key', payload: { other: true } })).statusCode, 422)
    t.equal((await post(app, { key: ' ' })).statusCode, 422)
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 400)
    store.fails = true
    const unavailable = await post(app, { key: 'key' })
    t.equal(unavailable.statusCode, 503)
    t.match(unavailable.headers['retry-after'], /^[1-9]\d*$/)
  }
})
