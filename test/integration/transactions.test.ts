import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { PassThrough, Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import t from 'tap'
import idempotency, {
  type IdempotencyEvent,
  type IdempotencyOptions,
  MemoryStore,
  PostgresStore,
  type RequestIdempotency,
  type StoredRecord
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { pgTransactions } from '../../lib/transactions.js'
import { build, inject, listen, post, REPLAYED, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import {
  created,
  held,
  IN_PROGRESS,
  KEY_REUSED,
  NOT_REPLAYABLE,
  RAN_1,
  RAN_2,
  REPLAYED_1,
  stage,
  told,
  type Work
} from '../support/transactions.js'

/* Routes with `transaction: true`: the claim, what the handler writes and the stored reply are one transaction. */

const { server, outside, test, open, gate } = await stage(t)
const statements = server.statements.bind(server)

const isStored = async ({ store }: { store: PostgresStore }) =>
  (await store.get(storageKey(null, 'k')))?.state === 'completed'
const isFree = async ({ store }: { store: PostgresStore }) => (await store.get(storageKey(null, 'k'))) === null

/* What a route takes */

t.test('a route that asks for what cannot be is an error at boot, which names the option and the route', async (t) => {
  const store = new PostgresStore({ pool: outside, sweepInterval: null })
  const wrong: [name: string, options: object, says: RegExp][] = [
    ['a store without transactions', { store: new MemoryStore() }, /"transaction" of POST \/pay .*got MemoryStore/],
    ['to run unprotected', { store, onStoreError: 'bypass' }, /"transaction" of POST \/pay .*onStoreError 'bypass'/],
    [
      'no such kind',
      { store, transaction: 'yes' },
      /"transaction" of POST \/pay takes true, false or 'nested', got 'yes'/
    ]
  ]
  for (const [name, options, message] of wrong) {
    const app = await build(t)
    const declare = () =>
      app.post('/pay', { config: { idempotency: { transaction: true, ...options } } }, async () => '')
    t.throws(declare, { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message }, name)
  }
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, { store: new MemoryStore(), transaction: true } as IdempotencyOptions)
  const declare = () => app.post('/pay', { config: { idempotency: true } }, async () => '')
  t.throws(declare, { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"transaction" of POST \/pay/ })
})

test('a step in a route with transaction: true takes transactions of its own', async (t) => {
  const { app, send } = await open(t)
  const db = pgTransactions(outside)
  await db.createTable()
  app.post<{ Params: { kind: string } }>(
    '/steps/:kind',
    { config: { idempotency: { transaction: true } } },
    async ({ idempotency, params }) => {
      const { step } = idempotency as RequestIdempotency
      return [params.kind === 'plain' ? await step('a', () => 1) : await step('a', db, () => 1)]
    }
  )
  t.match((await send('plain', { url: '/steps/plain' })).json(), {
    code: 'FST_IDEMPOTENCY_STEP',
    message: /would be forgotten when the route's transaction is rolled back/
  })
  t.same((await send('own', { url: '/steps/own' })).json(), [1])
})

test('only a keyed request of a route with transaction: true has a transaction', async (t) => {
  const { app, send } = await open(t)
  const look = async (request: FastifyRequest) => [request.idempotency && typeof request.idempotency.transaction]
  app.post('/without', { config: { idempotency: true } }, async ({ idempotency }) => [idempotency?.transaction])
  app.post('/with', { config: { idempotency: { transaction: true } } }, look)
  t.same((await send('k', { url: '/without' })).json(), [null])
  t.same((await send('l', { url: '/with' })).json(), ['object'])
  const { result, sent } = await statements(() => inject(app, { method: 'POST', url: '/with' }))
  t.same([result.json(), sent], [[null], []])
})

test('the option of the registration is the default of its routes, and a route may say no', async (t) => {
  const { store } = await open(t)
  const app = await build(t, { store, transaction: true, global: true })
  const look = async ({ idempotency }: FastifyRequest) => [idempotency?.transaction !== null]
  app.post('/yes', look)
  app.post('/no', { config: { idempotency: { transaction: false } } }, look)
  const headers = { 'idempotency-key': 'k' }
  t.same((await inject(app, { method: 'POST', url: '/yes', headers })).json(), [true])
  t.same((await inject(app, { method: 'POST', url: '/no', headers: { 'idempotency-key': 'l' } })).json(), [false])
})

test('by default the transaction begins behind all preHandler hooks, so that what ends before costs none', async (t) => {
  let allowed = false
  const preHandler = async (_request: FastifyRequest, reply: FastifyReply) =>
    allowed ? undefined : reply.code(401).send({ code: 'WHO' })
  const schema = { body: { type: 'object', required: ['sum'] } }
  const { send, runs } = await open(t, { route: { preHandler, schema } })
  const { sent } = await statements(async () => {
    t.equal((await send('k', { payload: { sum: 1 } })).statusCode, 401)
    t.equal((await send('k', { payload: {} })).statusCode, 400)
  })
  t.same([sent, runs()], [[], 0])
  allowed = true
  t.same(told(await send('k', { payload: { sum: 1 } })), RAN_1)
})

test('an earlier hook is an error at boot: no connection is held while a body is read', async (t) => {
  for (const hook of ['onRequest', 'preParsing', 'preValidation'] as const) {
    await t.rejects(open(t, { options: { hook } }), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message: /"transaction"/
    })
  }
})

/* Effects and reply are one */

test('effects and reply are committed together: others see neither while the handler runs, and both before its client does', async (t) => {
  const { first, entered, leave } = held()
  const inOnSend: unknown[] = []
  const rows = async () => [
    await scene.ledger(),
    (await outside.query(`SELECT state, attempt, status_code FROM keys_${scene.id}`)).rows
  ]
  const scene = await open(t, { first, route: { onSend: async () => void inOnSend.push(await rows()) } })
  const reply = scene.send()
  await entered
  t.same(await rows(), [[], []])
  leave()
  t.same(told(await reply), RAN_1)
  t.equal((await reply).headers.location, '/1')
  const both = [['run 1'], [{ state: 'completed', attempt: 1, status_code: 201 }]]
  t.same(inOnSend, [both])
  t.same(await rows(), both)
  const retry = await scene.send()
  t.same([told(retry), retry.headers.location], [REPLAYED_1, '/1'])
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

test('no byte of a buffered reply leaves before the commit is done', async (t) => {
  const scene = await open(t)
  const commit = await gate(scene)
  const port = await listen(scene.app)
  let received = false
  const client = start(port, { key: 'k' })
  void client.response.then(() => {
    received = true
  })
  await commit.reached()
  await sleep(20)
  t.same([received, await scene.ledger()], [false, []])
  await commit.open()
  const response = await client.response
  t.same([response.statusCode, await scene.ledger()], [201, ['run 1']])
  response.resume()
})

test('a refusal that is sent is a reply as any other: it is stored, and what was written with it stays', async (t) => {
  const { send, ledger, runs } = await open(t, {
    first: (_request, reply) => reply.code(409).send({ code: 'SOLD_OUT' })
  })
  t.same(told(await send()), [409, 'SOLD_OUT', 'fresh'])
  t.same(told(await send()), [409, 'SOLD_OUT', 'replay'])
  t.same([await ledger(), runs()], [['run 1'], 1])
})

test('a refusal that is thrown is stored as well, and what was written is undone', async (t) => {
  const soldOut = () => Object.assign(new Error('sold out'), { statusCode: 409, code: 'SOLD_OUT' })
  const ways: Work[] = [() => Promise.reject(soldOut()), (_request, reply) => reply.send(soldOut())]
  for (const first of ways) {
    const { send, ledger, runs } = await open(t, { first })
    t.same(told(await send()), [409, 'SOLD_OUT', 'fresh'])
    t.same(told(await send()), [409, 'SOLD_OUT', 'replay'])
    t.same([await ledger(), runs()], [[], 1])
  }
})

/* What becomes of the key, and of the effects with it */

const undone: Record<string, { first: Work; status: number }> = {
  fails: { first: () => Promise.reject(new Error('oops')), status: 500 },
  'replies 503': { first: (_request, reply) => reply.code(503).send({}), status: 503 },
  'replies 429': { first: (_request, reply) => reply.code(429).send({}), status: 429 },
  'discards its reply': {
    first: (request, reply) => {
      request.idempotency?.discard()
      return reply.code(201).send({})
    },
    status: 201
  },
  'discards a stream': {
    first: (request, reply) => {
      request.idempotency?.discard()
      return reply.code(201).send(Readable.from([Buffer.from('{}')]))
    },
    status: 201
  },
  'replies 503 with a stream': {
    first: (_request, reply) => reply.code(503).send(Readable.from([Buffer.from('{}')])),
    status: 503
  },
  'replies with a stream that fails half-way': {
    first: (_request, reply) => {
      const stream = new PassThrough()
      stream.write('half')
      setImmediate(() => stream.destroy(new Error('broken')))
      return reply.code(201).send(stream)
    },
    status: 500
  },
  'replies with a stream that fails before its first byte': {
    first: () => {
      const stream = new PassThrough()
      setImmediate(() => stream.destroy(new Error('broken')))
      return stream
    },
    status: 500
  }
}

for (const [what, { first, status }] of Object.entries(undone)) {
  test(`a handler that ${what} is rolled back: no effects, a free key, and a retry that runs as attempt 1`, async (t) => {
    const attempts: unknown[] = []
    const preSerialization = async (request: FastifyRequest, _reply: FastifyReply, payload: unknown) => {
      attempts.push(request.idempotency?.attempt)
      return payload
    }
    const scene = await open(t, { first, route: { preSerialization } })
    const port = await listen(scene.app)
    const reply = await post(port, { key: 'k' })
    t.same([reply.status, reply.headers[REPLAYED]], [status, undefined])
    await until(() => isFree(scene))
    t.same(await scene.ledger(), [])
    t.same(told(await post(port, { key: 'k' })), RAN_2)
    t.same(told(await post(port, { key: 'k' })), [201, 2, 'replay'])
    t.same([await scene.ledger(), attempts.at(-1)], [['run 2'], 1])
  })
}

test('with shouldStore: () => true every failure is stored, and what was written stays if it was sent, not thrown', async (t) => {
  const ways: [first: Work, effects: string[]][] = [
    [(_request, reply) => reply.code(500).send({ code: 'OOPS' }), ['run 1']],
    [() => Promise.reject(Object.assign(new Error('oops'), { code: 'OOPS' })), []]
  ]
  for (const [first, effects] of ways) {
    const { send, ledger, runs } = await open(t, { first, options: { shouldStore: () => true } })
    t.same(told(await send()), [500, 'OOPS', 'fresh'])
    t.same(told(await send()), [500, 'OOPS', 'replay'])
    t.same([await ledger(), runs()], [effects, 1])
  }
})

test('a reply that is too large to keep is committed with its effects, and leaves a tombstone', async (t) => {
  const { send, ledger, runs } = await open(t, { options: { maxReplySize: 5 } })
  t.same(told(await send()), RAN_1)
  t.same(told(await send()), NOT_REPLAYABLE)
  t.same([await ledger(), runs()], [['run 1'], 1])
})

test('no byte of a streamed reply leaves before the commit is done, and it replays byte for byte', async (t) => {
  const bytes = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))
  const lengths: Record<string, string>[] = [{}, { 'content-length': '259' }, { 'transfer-encoding': 'chunked' }]
  const makes: ((stream: Readable) => unknown)[] = [
    (stream) => stream,
    (stream) => Readable.toWeb(stream),
    (stream) => new Response(Readable.toWeb(stream) as ReadableStream, { status: 201 })
  ]
  for (const headers of lengths) {
    for (const make of makes) {
      const stream = new PassThrough()
      const first: Work = (_request, reply) => reply.code(201).type('image/png').headers(headers).send(make(stream))
      const scene = await open(t, { first, options: { storeTimeout: 60_000 } })
      const commit = await gate(scene)
      const port = await listen(scene.app)
      let received = false
      const whole = post(port, { key: 'k' }).then((reply) => {
        received = true
        return reply
      })
      stream.write('one')
      stream.end(bytes)
      await commit.reached()
      await sleep(20)
      t.same([received, await scene.ledger()], [false, []])
      await commit.open()
      const reply = await whole
      t.same([reply.status, reply.headers['content-length'], await scene.ledger()], [201, '259', ['run 1']])
      t.equal(reply.headers['transfer-encoding'], undefined)
      const retry = await post(port, { key: 'k' })
      t.same([retry.status, retry.headers['content-type'], retry.headers[REPLAYED]], [201, 'image/png', 'true'])
      t.ok(retry.body.equals(Buffer.concat([Buffer.from('one'), bytes])))
      t.ok(retry.body.equals(reply.body))
      t.equal(scene.runs(), 1)
    }
  }
})

test('a header that cannot be sent is an error of work that is done, which is committed with it', async (t) => {
  for (const make of [() => ({ a: 1 }), () => Readable.from(['one'])]) {
    const { send, ledger, runs } = await open(t, {
      first: (_request, reply) => reply.code(201).header('x-note', '日').send(make())
    })
    const first = await send()
    const again = await send()
    t.same([first.statusCode, again.statusCode, again.payload], [500, 500, first.payload])
    t.same([again.headers[REPLAYED], await ledger(), runs()], ['true', ['run 1'], 1])
  }
})

test('a stream that ends short of its content-length is rolled back, as one that breaks off', async (t) => {
  const { send, ledger, runs } = await open(t, {
    first: (_request, reply) => reply.header('content-length', 1000).send(Readable.from([Buffer.from('one')]))
  })
  t.equal((await send()).statusCode, 500)
  t.same(await ledger(), [])
  t.same(told(await send()), RAN_2)
  t.same([await ledger(), runs()], [['run 2'], 2])
})

test('clients that do not read their streamed replies hold no connection of the pool', async (t) => {
  const size = 1_000_000
  const endless = (type: string): Work => {
    return (_request, reply) => {
      const source = new Readable({
        read() {
          this.push(Buffer.alloc(60_000, '\n'))
        }
      })
      t.teardown(() => source.destroy())
      return reply.type(type).send(source)
    }
  }
  const kinds: [name: string, first: Work, options: object][] = [
    ['kept', (_request, reply) => reply.send(Readable.from([Buffer.alloc(size)])), { maxReplySize: size }],
    ['too large', endless('text/plain'), {}],
    ['events', endless('text/event-stream'), {}]
  ]
  for (const [name, first, options] of kinds) {
    const scene = await open(t, { first: created, pool: { max: 3 }, options: { lease: 60_000, ...options } })
    scene.app.post('/stream', { config: { idempotency: { transaction: true, ...options } } }, first as never)
    const port = await listen(scene.app)
    const lazy = ['1', '2', '3'].map((key) => start(port, { path: '/stream', key }))
    for (const { response } of lazy) (await response).pause()
    t.same(told(await post(port, { key: 'payment' })), RAN_1, name)
    for (const { response, hangUp } of lazy) {
      ;(await response).on('error', () => {})
      hangUp()
    }
  }
})

test('a stream that is too large to keep, takes longer than a lease or has events is committed, and then sent whole', async (t) => {
  const kinds: [name: string, reason: string, options: object, type: string][] = [
    ['too large', 'too-large', { maxReplySize: 4 }, 'text/plain'],
    ['takes longer', 'stream-failed', { lease: 50 }, 'text/plain'],
    ['events', 'hijacked', {}, 'text/event-stream']
  ]
  for (const [name, reason, options, type] of kinds) {
    const stream = new PassThrough()
    const scene = await open(t, { first: (_request, reply) => reply.type(type).send(stream), options })
    const port = await listen(scene.app)
    const client = start(port, { key: 'k' })
    stream.write('one')
    stream.write('two')
    const response = await client.response
    t.same(await scene.ledger(), ['run 1'], name)
    t.match(await scene.store.get(storageKey(null, 'k')), { record: { kind: 'tombstone', reason } }, name)
    stream.end('three')
    const chunks: Buffer[] = []
    for await (const chunk of response) chunks.push(chunk)
    t.equal(String(Buffer.concat(chunks)), 'onetwothree', name)
    t.same(told(await post(port, { key: 'k' })), NOT_REPLAYABLE)
  }
})

test('the transaction is open for as long as a streamed reply is being made', async (t) => {
  const scene = await open(t, {
    first: (request, reply) => {
      const parts = async function* () {
        yield '[1'
        await scene.write(request, 'streamed')
        yield ']'
      }
      return reply.send(Readable.from(parts()))
    }
  })
  t.equal((await scene.send()).body, '[1]')
  t.equal((await scene.send()).headers[REPLAYED], 'true')
  t.same(await scene.ledger(), ['run 1', 'streamed'])
})

test('a hijacked reply leaves a tombstone, and what was written stays', async (t) => {
  const first: Work = (_request, reply) => {
    reply.hijack()
    reply.raw.end('raw')
  }
  const scene = await open(t, { first })
  const port = await listen(scene.app)
  t.equal((await post(port, { key: 'k' })).text, 'raw')
  await until(() => isStored(scene))
  t.same(told(await post(port, { key: 'k' })), NOT_REPLAYABLE)
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

test('a failure whose error handler answers past Fastify is undone, and remembered if it is final', async (t) => {
  for (const [statusCode, then, effects] of [
    [402, NOT_REPLAYABLE, []],
    [503, RAN_2, ['run 2']]
  ] as const) {
    const first: Work = () => Promise.reject(Object.assign(new Error('no'), { statusCode }))
    const errorHandler = (error: Error, _request: FastifyRequest, reply: FastifyReply) => {
      if (error.message !== 'no') return reply.send(error)
      reply.hijack()
      reply.raw.statusCode = statusCode
      reply.raw.end('raw')
    }
    const scene = await open(t, { first, route: { errorHandler } })
    t.equal((await scene.send()).body, 'raw')
    await until(async () => (await scene.store.get(storageKey(null, 'k')))?.state !== 'running')
    t.same(told(await scene.send()), then)
    t.same(await scene.ledger(), effects)
  }
})

test('callNotFound: the 404 is the reply of the handler, stored with what was written', async (t) => {
  const { send, ledger, runs } = await open(t, {
    first: (_request, reply) => {
      reply.callNotFound()
      return reply
    }
  })
  const first = await send()
  const retry = await send()
  t.same([first.statusCode, first.headers[REPLAYED]], [404, undefined])
  t.same([retry.statusCode, retry.body, retry.headers[REPLAYED]], [404, first.body, 'true'])
  t.same([await ledger(), runs()], [['run 1'], 1])
})

test('a client that leaves while the handler runs changes nothing: it is committed, and replayed', async (t) => {
  const closed = latch()
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const port = await listen(scene.app)
  scene.app.server.on('request', (_request, response) => response.on('close', () => closed.open()))
  const client = start(port, { key: 'k', body: '{}' })
  await entered
  client.hangUp()
  await closed.promise
  leave()
  await until(() => isStored(scene))
  t.same(told(await post(port, { key: 'k', body: '{}' })), REPLAYED_1)
  t.same(await scene.ledger(), ['run 1'])
})

test('when the client leaves while its stream is read, it is read to its end and stored; an event stream is buried', async (t) => {
  for (const type of ['text/plain', 'text/event-stream']) {
    const stream = new PassThrough()
    const [sent, closed] = [latch(), latch()]
    const first: Work = (_request, reply) => {
      reply.raw.on('close', () => closed.open())
      sent.open()
      return reply.type(type).send(stream)
    }
    const scene = await open(t, { first })
    const port = await listen(scene.app)
    const client = start(port, { key: 'k' })
    stream.write('one')
    await sent.promise
    if (type !== 'text/plain') await (await client.response)[Symbol.asyncIterator]().next()
    client.hangUp()
    await closed.promise
    if (type === 'text/plain') stream.end('two')
    await until(() => isStored(scene))
    const retry = await post(port, { key: 'k' })
    if (type === 'text/plain') t.same([retry.text, retry.headers[REPLAYED]], ['onetwo', 'true'])
    else t.same(told(retry), NOT_REPLAYABLE)
    t.same([await scene.ledger(), scene.runs()], [['run 1'], 1], type)
  }
})

test('after handlerTimeout has answered 503 the transaction goes on, and ends as its handler does', async (t) => {
  const endings: [name: string, ending: Work, then: unknown[], effects: string[]][] = [
    ['a late reply is stored with its effects', created, REPLAYED_1, ['run 1']],
    ['a late failure is rolled back', () => Promise.reject(new Error('late')), RAN_2, ['run 2']],
    [
      'a late failure that is final is remembered, without its effects',
      () => Promise.reject(Object.assign(new Error('late'), { statusCode: 409, code: 'LATE' })),
      [409, 'LATE', 'replay'],
      []
    ],
    [
      'a late failure behind a hijacked reply is remembered, without its effects',
      (_request, reply) => {
        reply.hijack()
        throw new Error('late')
      },
      NOT_REPLAYABLE,
      []
    ]
  ]
  for (const [name, ending, then, effects] of endings) {
    const { first, entered, leave } = held(ending)
    const scene = await open(t, { first, route: { handlerTimeout: 200 } })
    const timedOut = scene.send()
    await entered
    t.equal((await timedOut).statusCode, 503)
    t.same(await scene.ledger(), [])
    t.same(told(await scene.send()), IN_PROGRESS)
    leave()
    await until(async () => (await scene.store.get(storageKey(null, 'k')))?.state !== 'running')
    t.same(told(await scene.send()), then, name)
    t.same(await scene.ledger(), effects, name)
  }
})

test('a handler that leaves its transaction idle for longer than the lease still commits', async (t) => {
  const first: Work = async (...args) => {
    await sleep(1_300)
    return created(...args)
  }
  const { send, ledger } = await open(t, { first, options: { lease: 500 } })
  t.same(told(await send()), RAN_1)
  t.same(told(await send()), REPLAYED_1)
  t.same(await ledger(), ['run 1'])
})

/* Closing */

test('app.close() waits for the running transaction, and duplicates that wait get their 409', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first, options: { onConflict: 'wait' } })
  const port = await listen(scene.app)
  const reply = post(port, { key: 'k' })
  await entered
  const requests: unknown[] = []
  scene.app.server.on('request', (request) => requests.push(request))
  const duplicate = post(port, { key: 'k' })
  await until(() => requests.length === 1)
  let closed = false
  const closing = scene.app.close().then(() => {
    closed = true
  })
  t.same(told(await duplicate), IN_PROGRESS)
  t.equal(closed, false)
  leave()
  t.same(told(await reply), RAN_1)
  await closing
  t.same(await scene.ledger(), ['run 1'])
  t.same(told(await (await scene.again()).send()), REPLAYED_1)
})

test('app.close() waits for a commit that is on its way', async (t) => {
  const scene = await open(t, { options: { storeTimeout: 60_000 } })
  const commit = await gate(scene)
  const reply = scene.send()
  await commit.reached()
  let closed = false
  const closing = scene.app.close().then(() => {
    closed = true
  })
  await sleep(20)
  t.equal(closed, false)
  await commit.open()
  await closing
  t.same(told(await reply), RAN_1)
  t.same(await scene.ledger(), ['run 1'])
})

test('app.close() rolls back a transaction whose handler does not end within one lease', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first, options: { lease: 300 } })
  const reply = scene.send()
  const signal = (await entered).idempotency?.signal
  await scene.app.close()
  t.equal(scene.pool.totalCount, 0, 'nothing is left to a timeout')
  await until(() => signal?.aborted, { message: 'the handler to be told' })
  await until(() => isFree(scene))
  t.same(await scene.ledger(), [])
  t.same(told(await (await scene.again()).send()), RAN_2)
  leave()
  t.same(told(await reply), [503, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE', 'fresh'])
  t.same(await scene.ledger(), ['run 2'])
})

/* Duplicates */

test("onConflict 'reject': a duplicate gets its 409 at once, in the same process and elsewhere", async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const elsewhere = await scene.again()
  const reply = scene.send()
  await entered
  for (const { send } of [scene, elsewhere]) {
    const duplicate = await send()
    t.same(told(duplicate), IN_PROGRESS)
    t.match(duplicate.headers['retry-after'], /^[1-9]\d*$/)
  }
  leave()
  t.same(told(await reply), RAN_1)
  for (const { send } of [scene, elsewhere]) t.same(told(await send()), REPLAYED_1)
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

for (const where of ['in the same process', 'elsewhere']) {
  test(`onConflict 'wait', ${where}: a duplicate gets the reply that is committed`, async (t) => {
    const { first, entered, leave } = held()
    const options = { onConflict: 'wait' } as const
    const scene = await open(t, { first, options })
    const { send } = where === 'elsewhere' ? await scene.again({ options }) : scene
    const reply = scene.send()
    await entered
    const duplicates = Array.from({ length: 5 }, () => send())
    await sleep(100)
    leave()
    t.same(told(await reply), RAN_1)
    for (const duplicate of await Promise.all(duplicates)) t.same(told(duplicate), REPLAYED_1)
    t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
  })

  test(`onConflict 'wait', ${where}: after a rollback one duplicate runs, and the others get its reply`, async (t) => {
    const { first, entered, leave } = held(() => Promise.reject(new Error('oops')))
    const options = { onConflict: 'wait' } as const
    const scene = await open(t, { first, options })
    const { send } = where === 'elsewhere' ? await scene.again({ options }) : scene
    const reply = scene.send()
    await entered
    const duplicates = Array.from({ length: 5 }, () => send())
    await sleep(100)
    leave()
    t.equal((await reply).statusCode, 500)
    const replies = (await Promise.all(duplicates)).map(told)
    t.same(
      replies.filter((reply) => reply[2] === 'fresh'),
      [RAN_2]
    )
    t.same(
      replies.filter((reply) => reply[2] === 'replay'),
      Array(4).fill([201, 2, 'replay'])
    )
    t.same([await scene.ledger(), scene.runs()], [['run 2'], 2])
  })
}

test('duplicates that wait hold no client of the pool, here and elsewhere', async (t) => {
  const { first, entered, leave } = held()
  const options = { onConflict: 'wait' } as const
  const scene = await open(t, { first, options, pool: { max: 2 } })
  const elsewhere = await scene.again({ options, pool: { max: 1 } })
  const reply = scene.send()
  await entered
  const duplicates = [scene, elsewhere].flatMap(({ send }) => Array.from({ length: 20 }, () => send()))
  await sleep(100)
  t.same(told(await scene.send('other')), RAN_2)
  t.same(told(await elsewhere.send('another')), [201, 3, 'fresh'])
  leave()
  t.same(told(await reply), RAN_1)
  for (const duplicate of await Promise.all(duplicates)) t.same(told(duplicate), REPLAYED_1)
})

test('a duplicate that waits elsewhere is told of the end, and does not keep asking until then', async (t) => {
  const { first, entered, leave } = held()
  const options = { onConflict: 'wait' } as const
  const scene = await open(t, { first, options })
  const elsewhere = [await scene.again({ options }), await scene.again({ options })]
  const reply = scene.send()
  await entered
  const duplicates = elsewhere.map(({ send }) => send())
  await sleep(300)
  const { sent } = await statements(() => sleep(500))
  // Each asks once a second, in case a message was lost.
  const asked = sent.filter((statement) => statement.includes('SAVEPOINT'))
  t.ok(asked.length <= 4, `asked ${asked.length} times`)
  const end = await statements(async () => {
    leave()
    t.same(told(await reply), RAN_1)
    for (const duplicate of await Promise.all(duplicates)) t.same(told(duplicate), REPLAYED_1)
  })
  t.ok(end.sent.some((statement) => statement.startsWith('SELECT pg_notify')))
})

test('another payload under the same key is refused, after the commit and, in the same process, before', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const elsewhere = await scene.again()
  const reply = scene.send('k', { payload: { sum: 1 } })
  await entered
  t.same(told(await scene.send('k', { payload: { sum: 2 } })), KEY_REUSED)
  leave()
  t.same(told(await reply), RAN_1)
  for (const { send } of [scene, elsewhere]) t.same(told(await send('k', { payload: { sum: 2 } })), KEY_REUSED)
  t.same(told(await elsewhere.send('k', { payload: { sum: 1 } })), REPLAYED_1)
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

test('in a pool of one client duplicates get their answers while it is away, and nothing stands still', async (t) => {
  for (const onConflict of ['reject', 'wait'] as const) {
    const { first, entered, leave } = held()
    const scene = await open(t, { first, options: { onConflict }, pool: { max: 1 } })
    const reply = scene.send('k', { payload: { sum: 1 } })
    await entered
    const duplicate = scene.send('k', { payload: { sum: 1 } })
    t.same(told(await scene.send('k', { payload: { sum: 2 } })), KEY_REUSED)
    if (onConflict === 'reject') t.same(told(await duplicate), IN_PROGRESS)
    leave()
    t.same(told(await reply), RAN_1)
    if (onConflict === 'wait') t.same(told(await duplicate), REPLAYED_1)
    t.same(told(await scene.send('k', { payload: { sum: 1 } })), REPLAYED_1)
  }
})

for (const what of ['', ', also behind a store of somebody else']) {
  test(`of two requests at the very same time one runs, and the other is told so, be the only client of the pool away${what}`, async (t) => {
    const { first, entered, leave } = held()
    const scene = await open(t, { first, options: { storeTimeout: 60_000 }, pool: { max: 1 } })
    if (what) {
      const begin = scene.store.begin.bind(scene.store)
      scene.store.begin = async (...args) => await begin(...args)
    }
    const both = [scene.send(), scene.send()]
    await entered
    t.same(told(await Promise.race(both)), IN_PROGRESS)
    leave()
    const replies = (await Promise.all(both)).map(told)
    t.same(replies.sort(), [RAN_1, IN_PROGRESS])
    t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
  })
}

test('who asks when the reply has been seen gets it, also behind one who asked before, whose answer is late', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const elsewhere = await scene.again()
  const owner = scene.send()
  await entered
  const [asked, arrived] = [latch(), latch()]
  const { store } = elsewhere
  const begin = store.begin.bind(store)
  store.begin = async (...args) => {
    const found = await begin(...args)
    asked.open()
    await arrived.promise
    return found
  }
  const early = elsewhere.send()
  await asked.promise
  store.begin = begin
  leave()
  t.same(told(await owner), RAN_1)
  const late = [elsewhere.send(), elsewhere.send()]
  await sleep(0)
  arrived.open()
  t.same(told(await early), IN_PROGRESS)
  for (const reply of late) t.same(told(await reply), REPLAYED_1)
})

test('who comes without a transaction sees a key that one holds as running, without waiting, and cannot delete it', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const elsewhere = await scene.again({ options: { transaction: false } })
  const reply = scene.send()
  await entered
  const key = storageKey(null, 'k')
  const claim = { token: 'mine', fingerprint: '', leaseMs: 30_000, retainMs: 30_000, takeover: true }
  t.match(await elsewhere.store.acquire(key, claim), { state: 'running' })
  t.match(await elsewhere.store.get(key), { state: 'running' })
  t.match(await elsewhere.app.idempotency.get('k'), { state: 'running' })
  t.equal(await elsewhere.store.renew(key, 'mine', 30_000), false)
  t.equal(await elsewhere.store.delete(key), false)
  t.same(told(await elsewhere.send()), IN_PROGRESS)
  leave()
  t.same(told(await reply), RAN_1)
  t.same(told(await elsewhere.send()), REPLAYED_1)
  t.equal(await elsewhere.store.delete(key), true)
  t.same(told(await scene.send()), RAN_2)
})

test('who comes with a transaction sees a key that a lease holds as running, and takes it over once it is abandoned', async (t) => {
  const scene = await open(t, { options: { onAbandoned: 'reject' } })
  const elsewhere = await scene.again({ first: (_request, reply) => reply.code(500).send({}) })
  const key = storageKey(null, 'k')
  const claim = { token: 'dead', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: false }
  await scene.store.acquire(key, claim)
  t.same(told(await scene.send()), IN_PROGRESS)
  await scene.store.renew(key, 'dead', 1)
  await until(async () => (await scene.store.get(key))?.state === 'abandoned')
  t.same(told(await scene.send()), [409, 'FST_IDEMPOTENCY_ABANDONED', 'fresh'])
  t.equal((await elsewhere.send()).statusCode, 500)
  t.match(await scene.store.get(key), { state: 'abandoned', attempt: 1 }, 'a rollback undoes the takeover as well')
  t.same(told(await elsewhere.send()), RAN_2)
  t.same(told(await scene.send()), [201, 2, 'replay'])
  t.same(await scene.ledger(), ['run 2'])
})

test('of many requests at the same time with one key, from several processes, exactly one runs', async (t) => {
  const scene = await open(t)
  const apps = [scene, await scene.again(), await scene.again()]
  const replies = await Promise.all(Array.from({ length: 30 }, (_, i) => (apps[i % 3] ?? scene).send()))
  t.same(
    replies.map(told).filter((reply) => reply[0] === 201 && reply[2] === 'fresh'),
    [RAN_1]
  )
  for (const reply of replies.map(told)) if (reply[0] !== 201) t.same(reply, IN_PROGRESS)
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

/* What it costs, and what can be seen of it */

test("a request of a 'reject' route is one message to claim and two to complete, a replay one, a duplicate here none", async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const away = () => until(() => scene.pool.totalCount === scene.pool.idleCount)
  await (await scene.pool.connect()).release()
  let duplicates: string[] = []
  const run = await statements(async () => {
    const reply = scene.send()
    await entered
    duplicates = (await statements(() => scene.send())).sent
    leave()
    t.same(told(await reply), RAN_1)
    await away()
  })
  t.same(duplicates, [])
  t.equal(run.sent.length, 4, run.sent.join('\n\n'))
  t.match(run.sent, [/^BEGIN;[\s\S]+SAVEPOINT/, /^INSERT INTO ledger_/, /\bUPDATE [."a-z]*keys_\d+"/, /^COMMIT$/])
  const replay = await statements(async () => {
    t.same(told(await scene.send()), REPLAYED_1)
    await away()
  })
  t.equal(replay.sent.length, 2, replay.sent.join('\n\n'))
  t.match(replay.sent, [/^BEGIN;/, /^ROLLBACK$/])
})

const NAMES = ['acquired', 'replayed', 'conflict', 'mismatch', 'stored', 'released', 'tombstoned', 'takeover']

test('the events of a transaction are those of any other operation', async (t) => {
  const events: unknown[][] = []
  for (const name of NAMES) {
    const listener = (message: unknown) => {
      const { key, route, attempt } = message as IdempotencyEvent
      t.match([key, route], [/^[\w-]+$/, '/'])
      events.push([name, attempt])
    }
    subscribe(`fastify-idempotency:${name}`, listener)
    t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  }
  const during = async (work: () => Promise<unknown>) => {
    events.length = 0
    await work()
    return [...events]
  }
  const { first, entered, leave } = held((_request, reply) => reply.code(503).send({}))
  const scene = await open(t, { first })
  const small = await scene.again({ options: { maxReplySize: 1 } })
  const released = await during(async () => {
    const reply = scene.send()
    await entered
    await scene.send()
    leave()
    await reply
  })
  t.same(released, [
    ['acquired', 1],
    ['conflict', 0],
    ['released', 1]
  ])
  t.same(await during(() => scene.send()), [
    ['acquired', 1],
    ['stored', 1]
  ])
  t.same(await during(() => scene.send()), [['replayed', 0]])
  t.same(await during(() => scene.send('k', { payload: { other: true } })), [['mismatch', 0]])
  t.same(await during(() => small.send('large')), [
    ['acquired', 1],
    ['tombstoned', 1]
  ])
  const record: StoredRecord | undefined = await scene.store
    .get(storageKey(null, 'large'))
    .then((found) => (found?.state === 'completed' ? found.record : undefined))
  t.match(record, { kind: 'tombstone', reason: 'too-large' })
})
