import { EventEmitter } from 'node:events'
import { PassThrough, Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyError, FastifyInstance, FastifyReply, FastifyRequest, RouteShorthandOptions } from 'fastify'
import t, { type Test } from 'tap'
import { type IdempotencyOptions, type IdempotencyStore, MemoryStore } from '../../index.js'
import { build, codeOf, inject, listen, post, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { settled, VirtualTime } from '../support/virtual-time.js'
import { settle } from '../support/waiter.js'

/*
 * A handler that Fastify's handlerTimeout overtakes: its client has the timeout's reply, and its key stays claimed until it
 * has ended. Then it counts what it replied, on a reply of its own.
 */

const config = (options: IdempotencyOptions = {}) => ({ config: { idempotency: { ...options } } })
const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

type Handler = (request: FastifyRequest, reply: FastifyReply) => unknown
/** Who is given a reply itself waits for its end. */
type Replying = { reply: FastifyReply }

const TIME = 1_000

/** Time that passes when it is told to: until then no handler's is up, however slow the machine. */
function holdTime(t: Test): { up(): Promise<void> } {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  return { up: () => time.pass(TIME) }
}

/** An app with one covered route whose handler may be overtaken. */
async function serve(
  t: Test,
  handler: Handler,
  { before = () => {}, ...route }: RouteShorthandOptions & { before?: (app: FastifyInstance) => void } = {}
): Promise<FastifyInstance> {
  const app = await build(t)
  before(app)
  app.post('/', { ...route, ...config(), handlerTimeout: TIME }, handler as never)
  return app
}

const send = (app: FastifyInstance) => inject(app, keyed)

/** What a client makes of a reply: its status, its error's code or its body, and whether it is a replay. */
function told(reply: Awaited<ReturnType<typeof inject>>): unknown[] {
  const isError = reply.headers['content-type']?.toString().includes('json') === true
  return [
    reply.statusCode,
    isError ? codeOf(reply) : reply.payload,
    reply.headers[REPLAYED] === 'true' ? 'replay' : 'fresh'
  ]
}

const TIMED_OUT = [503, 'FST_ERR_HANDLER_TIMEOUT', 'fresh']
const IN_PROGRESS = [409, 'FST_IDEMPOTENCY_IN_PROGRESS', 'fresh']
const NOT_REPLAYABLE = [409, 'FST_IDEMPOTENCY_NOT_REPLAYABLE', 'fresh']

type Ending = [
  name: string,
  end: (reply: FastifyReply) => unknown,
  then: { status: number; text?: RegExp; code?: string; runs: number }
]
const LATE_ENDINGS: Ending[] = [
  ['a value is stored', () => ({ late: true }), { status: 200, text: /{"late":true}/, runs: 1 }],
  [
    'with the status that it has set',
    (reply) => {
      reply.code(201).header('location', '/1')
      return 'late'
    },
    { status: 201, text: /late/, runs: 1 }
  ],
  [
    'a failure that is not final is released',
    () => {
      throw new Error('late')
    },
    { status: 200, text: /again/, runs: 2 }
  ],
  [
    'a final failure is stored, with the reply that the error handlers make of it',
    () => {
      throw Object.assign(new Error('late'), { statusCode: 402 })
    },
    { status: 402, text: /"message":"late"/, runs: 1 }
  ],
  [
    'a refusal of a step is not stored, whatever its status',
    () => {
      throw Object.assign(new Error('late'), { statusCode: 422, code: 'FST_IDEMPOTENCY_KEY_REUSED' })
    },
    { status: 200, runs: 2 }
  ],
  [
    'something thrown that is no Error is what Fastify makes of it',
    () => {
      throw { statusCode: 402, message: 'late' }
    },
    { status: 402, text: /"message":"late"/, runs: 1 }
  ],
  [
    'a status that is not final is released, be it the same as the timeout has',
    (reply) => reply.code(503).send('late'),
    { status: 200, text: /again/, runs: 2 }
  ],
  [
    'a stream is stored',
    (reply) => reply.send(Readable.from([Buffer.from('late '), Buffer.alloc(100_000, 'x')])),
    { status: 200, text: /^late x/, runs: 1 }
  ],
  [
    'a Response is stored',
    () => new Response('late', { status: 202, headers: { 'x-late': '1' } }),
    { status: 202, text: /^late$/, runs: 1 }
  ],
  [
    'raw bytes leave a tombstone',
    (reply) => {
      reply.hijack()
      reply.raw.end('late')
    },
    { status: 409, code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE', runs: 1 }
  ],
  [
    'raw bytes that are not announced leave one as well',
    (reply) => void reply.raw.end('late'),
    { status: 409, code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE', runs: 1 }
  ],
  [
    'an async handler that returns its reply and answers later decides then',
    (reply) => {
      setTimeout(() => reply.code(201).send('late'), 20)
      return reply
    },
    { status: 201, text: /late/, runs: 1 }
  ],
  [
    'a reply that it sends without returning it is stored',
    (reply) => void reply.code(202).send('late'),
    { status: 202, text: /late/, runs: 1 }
  ],
  [
    'a reply that it sends and returns is stored',
    (reply) => reply.send('late'),
    { status: 200, text: /late/, runs: 1 }
  ],
  ['a redirect is stored', (reply) => reply.redirect('/1', 303), { status: 303, text: /^$/, runs: 1 }],
  [
    'a failure that it sends is released',
    (reply) => void reply.send(new Error('late')),
    { status: 200, text: /again/, runs: 2 }
  ],
  [
    'a reply that cannot be serialised is the error that it is in time',
    (reply) => {
      reply.type('text/x').serializer(() => {
        throw Object.assign(new Error('cannot'), { statusCode: 422 })
      })
      return 'late'
    },
    { status: 422, text: /"message":"cannot"/, runs: 1 }
  ],
  ['no reply at all is an empty one', () => undefined, { status: 200, text: /^$/, runs: 1 }]
]

for (const [name, end, then] of LATE_ENDINGS) {
  t.test(`the timeout is answered with 503, the key stays claimed until the handler ends: ${name}`, async (t) => {
    const app = await build(t)
    const leave = latch()
    let runs = 0
    app.post('/', { ...config(), handlerTimeout: 20 }, async (_request, reply) => {
      if (++runs > 1) return 'again'
      await leave.promise
      return end(reply)
    })
    t.equal((await app.inject(keyed)).statusCode, 503)
    const meanwhile = await app.inject(keyed)
    t.same([meanwhile.statusCode, codeOf(meanwhile)], [409, 'FST_IDEMPOTENCY_IN_PROGRESS'])
    leave.open()
    await until(async () => (await app.idempotency.get('k'))?.state !== 'running')
    const retry = await app.inject(keyed)
    t.equal(retry.statusCode, then.status)
    if (then.text) t.match(retry.body, then.text)
    if (then.code) t.equal(codeOf(retry), then.code)
    t.equal(runs, then.runs)
  })
}

t.test('a handler that replies from a callback is waited for as well', async (t) => {
  const time = holdTime(t)
  const entered = latch<Replying>()
  const app = await serve(t, (_request, reply) => entered.open({ reply }))
  const first = send(app)
  const { reply } = await entered.promise
  await time.up()
  t.same(told(await first), TIMED_OUT)
  t.same(told(await send(app)), IN_PROGRESS)
  reply.code(201).send('late')
  await settled()
  t.same(told(await send(app)), [201, 'late', 'replay'])
})

t.test('a late reply passes all hooks and serialisers, as one in time', async (t) => {
  const app = await build(t)
  app.addHook('preSerialization', async (_request, _reply, payload) => ({ ...(payload as object), secret: undefined }))
  app.addHook('onSend', async (_request, _reply, payload) => `${payload}!`)
  const leave = latch()
  const schema = { response: { 201: { type: 'object', properties: { open: { type: 'string' }, secret: {} } } } }
  app.post('/', { ...config(), schema, handlerTimeout: 20 }, async (_request, reply) => {
    reply.header('x-early', '1')
    await leave.promise
    return reply.code(201).header('location', '/1').send({ open: 'yes', secret: 'no', hidden: 'no' })
  })
  const timedOut = await app.inject(keyed)
  t.equal(timedOut.statusCode, 503)
  leave.open()
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  const retry = await app.inject(keyed)
  t.same([retry.statusCode, retry.body], [201, '{"open":"yes"}!'])
  t.match(retry.headers, { location: '/1', 'x-early': '1', 'content-type': /^application\/json/ })
})

t.test('a late reply keeps what hooks and the handler have put on it before', async (t) => {
  const time = holdTime(t)
  const [entered, leave] = [latch(), latch()]
  const kMark = Symbol('fastify.reply.setCookies')
  const before = (app: FastifyInstance) => {
    app.decorateReply('mark', '')
    app.addHook(
      'onRequest',
      async (_request, reply) => void Object.assign(reply, { mark: 'hook', [kMark]: ['cookie'] })
    )
    app.addHook('onSend', async (_request, reply, payload) => {
      const { mark, [kMark]: cookies } = reply as unknown as { mark: string; [kMark]: string[] }
      return `${payload} ${mark} ${cookies}`
    })
  }
  const handler: Handler = async (_request, reply) => {
    reply.type('text/plain').serializer((payload) => `<${(payload as { text: string }).text}>`)
    entered.open()
    await leave.promise
    return { text: 'late' }
  }
  const app = await serve(t, handler, { before })
  const first = send(app)
  await entered.promise
  await time.up()
  t.equal((await first).statusCode, 503)
  leave.open()
  await settled()
  t.same(told(await send(app)), [200, '<late> hook cookie', 'replay'])
})

t.test('a late error passes the error handlers, as one in time, and they have the late reply', async (t) => {
  const time = holdTime(t)
  const [entered, leave] = [latch(), latch()]
  const handler: Handler = async () => {
    entered.open()
    await leave.promise
    throw Object.assign(new Error('declined'), { statusCode: 402 })
  }
  const errors: string[] = []
  const app = await serve(t, handler, {
    onError: async (_request, _reply, error) => void errors.push(error.message),
    errorHandler: (error, _request, reply) =>
      reply.header('x-mine', '1').send({ code: `MY_${error.code ?? error.message}` })
  })
  const first = send(app)
  await entered.promise
  await time.up()
  t.same(told(await first), [200, 'MY_FST_ERR_HANDLER_TIMEOUT', 'fresh'])
  leave.open()
  await settled()
  const retry = await send(app)
  t.same(told(retry), [200, 'MY_declined', 'replay'])
  t.equal(retry.headers['x-mine'], '1')
  t.equal(errors.length, 2)
})

t.test('a late reply with a header that cannot be sent is an error that never runs again, as in time', async (t) => {
  for (const when of ['before', 'after']) {
    const app = await build(t)
    const leave = latch()
    let runs = 0
    app.post('/', { ...config(), handlerTimeout: 20 }, async (_request, reply) => {
      runs++
      if (when === 'before') reply.header('x-note', '日')
      await leave.promise
      return reply.header('x-note', '日').send('late')
    })
    t.equal((await app.inject(keyed)).statusCode, 503)
    t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
    leave.open()
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    for (let i = 0; i < 2; i++) t.same(told(await send(app)), [500, 'ERR_INVALID_CHAR', 'replay'])
    t.equal(runs, 1)
  }
})

t.test('an error handler may take its time, answer as it likes, and return its reply', async (t) => {
  const time = holdTime(t)
  for (const answer of [
    async (error: FastifyError, reply: FastifyReply) => {
      await settle()
      return reply.code(error.statusCode ?? 500).send('slow')
    },
    (_error: FastifyError, reply: FastifyReply) => reply.code(503).send('slow'),
    async (_error: FastifyError, reply: FastifyReply) => {
      reply.code(504)
      await settle()
      return 'slow'
    }
  ]) {
    const leave = latch()
    const app = await serve(t, async () => leave.promise.then(() => 'late'), {
      errorHandler: (error, _request, reply) =>
        error.code === 'FST_ERR_HANDLER_TIMEOUT' ? answer(error, reply) : reply.send(error)
    })
    const first = send(app)
    await time.up()
    t.match(told(await first), [/50[34]/, 'slow', 'fresh'])
    t.same(told(await send(app)), IN_PROGRESS)
    leave.open()
    await settled()
    t.same(told(await send(app)), [200, 'late', 'replay'])
  }
})

/** An error handler that answers a timeout when it is told to, by code that knows nothing of the request. */
function elsewhere(status: number) {
  const told = new EventEmitter()
  const errorHandler = (error: FastifyError, _request: FastifyRequest, reply: FastifyReply) => {
    if (error.code !== 'FST_ERR_HANDLER_TIMEOUT') return reply.send(error)
    told.once('answer', () => reply.code(status).header('x-slow', '1').send('slow'))
  }
  return { errorHandler, answer: () => told.emit('answer') }
}

t.test(
  "what the handler does while the timeout's reply is being made is the handler's, whoever is first",
  async (t) => {
    const time = holdTime(t)
    for (const status of [503, 504, 201]) {
      for (const isReplyFirst of [false, true]) {
        const [entered, leave] = [latch<Replying>(), latch()]
        const { errorHandler, answer } = elsewhere(status)
        const handler: Handler = async (_request, reply) => {
          entered.open({ reply })
          await leave.promise
          return 'late'
        }
        const app = await serve(t, handler, { errorHandler })
        const first = send(app)
        const { reply } = await entered.promise
        await time.up()
        reply.code(202).header('x-mine', '1')
        if (isReplyFirst) {
          leave.open()
          await settled()
        }
        answer()
        t.same(told(await first), [status, 'slow', 'fresh'])
        t.equal((await first).headers['x-mine'], undefined)
        leave.open()
        await settled()
        const retry = await send(app)
        t.same(told(retry), [202, 'late', 'replay'])
        t.match(retry.headers, { 'x-mine': '1', 'x-slow': undefined })
      }
    }
  }
)

t.test("a reply that is sent while the timeout's is held by hooks is stored at once", async (t) => {
  const time = holdTime(t)
  for (const [answer, outcome, type] of [
    ['late', [201, 'late', 'replay'], 'text/plain; charset=utf-8'],
    [{ code: 'LATE' }, [201, 'LATE', 'replay'], 'application/json; charset=utf-8'],
    [Response.error(), [500, 'FST_ERR_BAD_STATUS_CODE', 'replay'], 'application/json; charset=utf-8']
  ] as const) {
    const [entered, leaving] = [latch<Replying>(), latch()]
    const handler: Handler = async (_request, reply) => {
      entered.open({ reply })
      return reply
    }
    const app = await serve(t, handler, {
      onSend: async (_request, reply) => {
        if (reply.statusCode === 503) await leaving.promise
      }
    })
    const first = send(app)
    const { reply } = await entered.promise
    await time.up()
    reply.code(201).send(answer)
    await settled()
    const retry = await send(app)
    t.same(told(retry), outcome)
    t.equal(retry.headers['content-type'], type)
    leaving.open()
    t.same(told(await first), TIMED_OUT)
  }
})

t.test("a reply in time that hooks have held up until the timeout's has left is stored all the same", async (t) => {
  const time = holdTime(t)
  for (const handler of [
    (_request, reply) => void reply.code(201).send('mine'),
    async (_request, reply) => reply.code(201).send('mine'),
    async (_request, reply) => {
      reply.code(201)
      return 'mine'
    },
    (_request, reply) => {
      reply.code(201)
      return 'mine'
    },
    // Sent, and then nothing is returned while hooks hold it.
    async (_request, reply) => void reply.code(201).send('mine')
  ] as Handler[]) {
    const [entered, leave] = [latch(), latch()]
    let runs = 0
    const counted: Handler = (request, reply) => {
      runs++
      return handler(request, reply)
    }
    const before = (app: FastifyInstance) =>
      app.addHook('onSend', async (_request, reply, payload) => {
        if (payload !== 'mine' || reply.getHeader(REPLAYED) !== undefined) return
        entered.open()
        await leave.promise
      })
    const app = await serve(t, counted, { before })
    const first = send(app)
    await entered.promise
    await time.up()
    t.same(told(await first), TIMED_OUT)
    t.same(told(await send(app)), IN_PROGRESS)
    leave.open()
    await settled()
    const retry = await send(app)
    t.same(told(retry), [201, 'mine', 'replay'])
    t.equal(retry.headers['content-type'], 'text/plain; charset=utf-8')
    t.equal(runs, 1)
  }
})

t.test('a reply that hooks hold up is that of its handler, whatever the handler does meanwhile', async (t) => {
  const time = holdTime(t)
  const endings: Record<string, () => unknown> = {
    'returns nothing': () => undefined,
    throws: () => Promise.reject(new Error('afterwards'))
  }
  for (const [name, end] of Object.entries(endings)) {
    for (const isInTime of [true, false]) {
      const [entered, leave, ending, held] = [latch(), latch(), latch(), latch()]
      let runs = 0
      const handler: Handler = async (_request, reply) => {
        if (++runs > 1) return 'again'
        if (!isInTime) {
          entered.open()
          await leave.promise
        }
        void reply.code(201).send('mine')
        entered.open()
        await ending.promise
        return end()
      }
      const before = (app: FastifyInstance) =>
        app.addHook('onSend', async (_request, reply, payload) => {
          if (payload === 'mine' && reply.getHeader(REPLAYED) === undefined) await held.promise
        })
      const app = await serve(t, handler, { before })
      const first = send(app)
      await entered.promise
      await time.up()
      t.same(told(await first), TIMED_OUT)
      leave.open()
      await settled()
      ending.open()
      await settled()
      t.same(told(await send(app)), IN_PROGRESS, name)
      held.open()
      await settled()
      t.same(told(await send(app)), [201, 'mine', 'replay'], name)
    }
  }
})

t.test(
  "of a failure in time that hooks hold up until the timeout's reply has left only the error's status and code count",
  async (t) => {
    const time = holdTime(t)
    for (const [error, isFinal] of [
      [Object.assign(new Error('mine'), { statusCode: 402 }), true],
      [Object.assign(new Error('mine'), { statusCode: 500 }), false],
      // As of a step under a key that is another request's.
      [Object.assign(new Error('mine'), { statusCode: 422, code: 'FST_IDEMPOTENCY_KEY_REUSED' }), false],
      [{ message: 'mine', statusCode: 402 }, true]
    ] as const) {
      const { statusCode } = error
      const [failed, leave] = [latch(), latch()]
      let runs = 0
      const handler: Handler = async () => {
        if (++runs > 1) return 'again'
        throw error
      }
      const before = (app: FastifyInstance) =>
        app.addHook('onSend', async (_request, _reply, payload) => {
          if (!String(payload).includes('"mine"')) return
          failed.open()
          await leave.promise
        })
      const app = await serve(t, handler, { before })
      const first = send(app)
      await failed.promise
      await time.up()
      // Fastify leaves a status that is one of an error.
      t.match((await first).json(), { statusCode, code: 'FST_ERR_HANDLER_TIMEOUT' })
      leave.open()
      await settled()
      t.same(told(await send(app)), isFinal ? NOT_REPLAYABLE : [200, 'again', 'fresh'])
    }
  }
)

t.test("the handler's reply is kept apart from one that was hijacked in its place", async (t) => {
  const time = holdTime(t)
  for (const isOpen of [false, true]) {
    for (const [end, outcome] of [
      ['late', [200, 'late', 'replay']],
      [Object.assign(new Error('no'), { statusCode: 503 }), [200, 'again', 'fresh']]
    ] as const) {
      const entered = latch<Replying>()
      let runs = 0
      const handler: Handler = (_request, reply) => {
        if (++runs > 1) return reply.send('again')
        entered.open({ reply })
      }
      const hijacked = latch<Replying>()
      const app = await serve(t, handler, {
        errorHandler: (error, _request, reply) => {
          if (error.code !== 'FST_ERR_HANDLER_TIMEOUT') return reply.send(error)
          reply.hijack()
          reply.raw.statusCode = 503
          if (isOpen) reply.raw.write('raw')
          else reply.raw.end('raw')
          hijacked.open({ reply })
        }
      })
      const first = send(app)
      const { reply } = await entered.promise
      await time.up()
      reply.send(end)
      await settled()
      const { reply: clients } = await hijacked.promise
      if (isOpen) clients.raw.end()
      t.same(told(await first), [503, 'raw', 'fresh'])
      t.same(told(await send(app)), outcome)
    }
  }
})

t.test("an error that comes of the timeout's reply is answered as well, and is no reply of the handler", async (t) => {
  const time = holdTime(t)
  const leave = latch()
  let isBroken = true
  const app = await serve(t, async () => leave.promise.then(() => 'late'), {
    onSend: async () => {
      if (!isBroken) return
      isBroken = false
      throw Object.assign(new Error('broken'), { statusCode: 504 })
    }
  })
  const first = send(app)
  await time.up()
  t.match((await first).json(), { message: 'broken' })
  t.same(told(await send(app)), IN_PROGRESS)
  leave.open()
  await settled()
  t.same(told(await send(app)), [200, 'late', 'replay'])
})

t.test('it is all the same to the handler whether the client has left when its timeout is answered', async (t) => {
  const time = holdTime(t)
  const [entered, leave, answering] = [latch(), latch(), latch()]
  const client = latch<Replying>()
  const handler: Handler = async (_request, reply) => {
    entered.open()
    await leave.promise
    return reply.code(201).send('late')
  }
  const app = await serve(t, handler, {
    errorHandler: async (error, _request, reply) => {
      client.open({ reply })
      await answering.promise
      return reply.code(504).send(error.message)
    }
  })
  send(app).catch(() => {})
  await entered.promise
  await time.up()
  const { reply } = await client.promise
  reply.raw.destroy()
  await settled()
  answering.open()
  await settled()
  t.match(await app.idempotency.get('k'), { state: 'running' })
  leave.open()
  await settled()
  t.same(told(await send(app)), [201, 'late', 'replay'])
})

t.test('a timeout that strikes when the reply is being stored changes nothing', async (t) => {
  const time = holdTime(t)
  const logged: string[] = []
  const [stored, leave] = [latch(), latch()]
  class SlowStore extends MemoryStore {
    override async complete(...args: Parameters<IdempotencyStore['complete']>) {
      await stored.promise
      return super.complete(...args)
    }
  }
  const stream = { write: (line: string) => logged.push(line) }
  const app = await build(t, { store: new SlowStore() }, { logger: { level: 'error', stream } })
  app.post('/', { ...config(), handlerTimeout: TIME }, async (_request, reply) => {
    reply.send('first')
    await leave.promise
    throw new Error('afterwards')
  })
  const first = send(app)
  await time.up()
  t.match(logged, [/FST_ERR_HANDLER_TIMEOUT/], 'it has struck')
  stored.open()
  t.same(told(await first), [200, 'first', 'fresh'])
  leave.open()
  await settled()
  t.match(logged[1], /handler failed after its reply was sent/)
  t.match(logged[1], /afterwards/)
  t.same(told(await send(app)), [200, 'first', 'replay'])
})

t.test('what a handler does after its late reply changes nothing', async (t) => {
  const time = holdTime(t)
  for (const end of [() => 'more', () => Promise.reject(new Error('afterwards'))]) {
    const [entered, leave, ending] = [latch(), latch(), latch()]
    const handler: Handler = async (_request, reply) => {
      entered.open()
      await leave.promise
      void reply.code(201).send('late')
      await ending.promise
      return end()
    }
    const app = await serve(t, handler)
    const first = send(app)
    await entered.promise
    await time.up()
    t.same(told(await first), TIMED_OUT)
    leave.open()
    await settled()
    ending.open()
    await settled()
    t.same(told(await send(app)), [201, 'late', 'replay'])
  }
})

t.test('who waits for the end of its reply is told of its own, not of the timeout’s', async (t) => {
  const time = holdTime(t)
  const entered = latch<Replying>()
  let isOver = false
  const handler: Handler = async (_request, reply) => {
    entered.open({ reply })
    await reply
    isOver = true
  }
  const app = await serve(t, handler)
  const first = send(app)
  const { reply } = await entered.promise
  await time.up()
  t.same(told(await first), TIMED_OUT)
  await settled()
  t.equal(isOver, false)
  reply.send('late')
  await settled()
  t.equal(isOver, true)
  t.same(told(await send(app)), [200, 'late', 'replay'])
})

t.test('a timeout is logged and hooked as what it was, also when the handler ends meanwhile', async (t) => {
  const app = await build(t)
  const [late, seen] = [latch(), latch<number>()]
  app.addHook('onResponse', async (_request, reply) => {
    late.open()
    await sleep(20)
    seen.open(reply.statusCode)
  })
  app.post('/', { ...config(), handlerTimeout: 20 }, async (_request, reply) => {
    await late.promise
    await sleep(40)
    return reply.code(201).send('late')
  })
  await app.inject(keyed)
  t.equal(await seen.promise, 503)
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
})

t.test("a handler that sends on the client's reply, which a hook has kept for it, has a tombstone", async (t) => {
  const time = holdTime(t)
  for (const [isEarly, isAsync] of [
    [false, true],
    [true, true],
    [false, false],
    [true, false]
  ]) {
    const [entered, leave, held] = [latch(), latch(), latch()]
    let clients: FastifyReply | undefined
    const before = (app: FastifyInstance) => {
      app.addHook('onRequest', async (_request, reply) => {
        clients = reply
      })
      app.addHook('onSend', async (_request, _reply, payload) => {
        if (payload === 'mine') await held.promise
      })
    }
    const app = await serve(
      t,
      () => {
        const work = async () => {
          if (isEarly) clients?.send('mine')
          entered.open()
          await leave.promise
          if (!isEarly) clients?.send('mine')
        }
        const working = work()
        return isAsync ? working : undefined
      },
      { before }
    )
    const first = send(app)
    await entered.promise
    await time.up()
    t.same(told(await first), TIMED_OUT)
    leave.open()
    held.open()
    await settled()
    t.same(told(await send(app)), NOT_REPLAYABLE)
  }
})

t.test(
  "what else is sent on the client's reply after the timeout's is nothing to a handler that has its own",
  async (t) => {
    const time = holdTime(t)
    for (const [name, isAsync] of [
      ['at work', true],
      ['whose reply is held by hooks', false]
    ] as const) {
      const [entered, leave, held] = [latch(), latch(), latch()]
      let clients: FastifyReply | undefined
      const before = (app: FastifyInstance) => {
        app.addHook('onRequest', async (_request, reply) => {
          clients ??= reply
        })
        app.addHook('onSend', async (_request, reply, payload) => {
          if (payload === 'mine' && reply.getHeader(REPLAYED) === undefined) await held.promise
        })
      }
      const handler: Handler = (_request, reply) => {
        entered.open()
        if (isAsync) return leave.promise.then(() => 'mine')
        void leave.promise.then(() => reply.send('mine'))
      }
      const app = await serve(t, handler, { before })
      const first = send(app)
      await entered.promise
      await time.up()
      t.same(told(await first), TIMED_OUT)
      if (!isAsync) leave.open()
      await settled()
      clients?.send('again')
      await settled()
      t.same(told(await send(app)), IN_PROGRESS, name)
      leave.open()
      held.open()
      await settled()
      t.same(told(await send(app)), [200, 'mine', 'replay'], name)
    }
  }
)

t.test('an empty reply in time that hooks have held up is stored as well', async (t) => {
  const time = holdTime(t)
  const [entered, leave] = [latch(), latch()]
  const before = (app: FastifyInstance) =>
    app.addHook('onSend', async (_request, reply) => {
      if (reply.statusCode !== 204 || reply.getHeader(REPLAYED) !== undefined) return
      entered.open()
      await leave.promise
    })
  const app = await serve(t, async (_request, reply) => void reply.code(204), { before })
  const first = send(app)
  await entered.promise
  await time.up()
  t.equal((await first).json().code, 'FST_ERR_HANDLER_TIMEOUT')
  leave.open()
  await settled()
  const retry = await send(app)
  t.same([retry.statusCode, retry.headers[REPLAYED]], [204, 'true'])
})

t.test('raw bytes that come late leave a tombstone, however many they are, and however they end', async (t) => {
  const time = holdTime(t)
  const endings: Record<string, (reply: FastifyReply) => unknown> = {
    'more than a buffer': (reply) => pipeline(Readable.from([Buffer.alloc(100_000), Buffer.alloc(100_000)]), reply.raw),
    'broken off': (reply) => pipeline(Readable.from(broken()), reply.raw).catch(() => {}),
    'never ended': (reply) => reply.raw.destroy(new Error('no more'))
  }
  for (const [name, end] of Object.entries(endings)) {
    for (const isAsync of [true, false]) {
      const [entered, leave] = [latch(), latch()]
      const work = async (reply: FastifyReply) => {
        entered.open()
        await leave.promise
        reply.hijack()
        await end(reply)
      }
      const app = await serve(t, (_request, reply) => {
        const working = work(reply)
        return isAsync ? working : undefined
      })
      const first = send(app)
      await entered.promise
      await time.up()
      t.same(told(await first), TIMED_OUT)
      leave.open()
      await until(async () => (await app.idempotency.get('k'))?.state === 'completed', { message: name })
      t.same(told(await send(app)), NOT_REPLAYABLE, name)
    }
  }
})

t.test('what a late handler has begun to send counts, though the handler throws behind it', async (t) => {
  const time = holdTime(t)
  const source = new PassThrough()
  const beginnings: [begin: (reply: FastifyReply) => unknown, then: () => unknown, outcome: unknown[]][] = [
    [(reply) => reply.hijack(), () => {}, NOT_REPLAYABLE],
    [(reply) => reply.send(source), () => source.end('late'), [200, 'late', 'replay']]
  ]
  for (const [begin, then, outcome] of beginnings) {
    const [entered, leave] = [latch(), latch()]
    let runs = 0
    const app = await serve(t, async (_request, reply) => {
      if (++runs > 1) return 'again'
      entered.open()
      await leave.promise
      begin(reply)
      throw new Error('afterwards')
    })
    const first = send(app)
    await entered.promise
    await time.up()
    t.same(told(await first), TIMED_OUT)
    leave.open()
    await settled()
    then()
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    t.same(told(await send(app)), outcome)
  }
})

t.test(
  'a late failure whose every reply fails in the hooks gives the key back, and what succeeded is not run again',
  async (t) => {
    const time = holdTime(t)
    for (const [end, outcome] of [
      [() => Promise.reject(new Error('late')), [200, 'again', 'fresh']],
      [async () => 'late', NOT_REPLAYABLE]
    ] as const) {
      const [entered, leave] = [latch(), latch()]
      let runs = 0
      let isBroken = false
      const handler: Handler = async () => {
        if (++runs > 1) return 'again'
        entered.open()
        await leave.promise
        isBroken = true
        return end()
      }
      const before = (app: FastifyInstance) =>
        app.addHook('onSend', async () => {
          if (isBroken) throw new Error('broken')
        })
      const app = await serve(t, handler, { before })
      const first = send(app)
      await entered.promise
      await time.up()
      t.same(told(await first), TIMED_OUT)
      leave.open()
      await until(async () => (await app.idempotency.get('k'))?.state !== 'running')
      isBroken = false
      t.same(told(await send(app)), outcome)
    }
  }
)

async function* broken(): AsyncGenerator<Buffer> {
  yield Buffer.from('one')
  throw new Error('broken')
}

t.test('a late handler that waits for the end of its stream is told when that has ended', async (t) => {
  const time = holdTime(t)
  const [entered, leave] = [latch(), latch()]
  const source = new PassThrough()
  let isOver = false
  const app = await serve(t, async (_request, reply) => {
    entered.open()
    await leave.promise
    await reply.send(source)
    isOver = true
  })
  const first = send(app)
  await entered.promise
  await time.up()
  t.same(told(await first), TIMED_OUT)
  leave.open()
  source.write('one ')
  await settled()
  t.equal(isOver, false)
  source.end('two')
  await until(() => isOver)
  t.same(told(await send(app)), [200, 'one two', 'replay'])
})

t.test('what a decorator of the reply sends for a late handler is the handler’s', async (t) => {
  const time = holdTime(t)
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  const before = (app: FastifyInstance) =>
    app.decorateReply('api', {
      getter(this: FastifyReply) {
        return { fail: () => this.code(500).send({ code: 'FAILED' }) }
      }
    } as never)
  const handler: Handler = async (_request, reply) => {
    if (++runs > 1) return 'again'
    entered.open()
    await leave.promise
    return (reply as unknown as { api: { fail(): unknown } }).api.fail()
  }
  const app = await serve(t, handler, { before })
  const first = send(app)
  await entered.promise
  await time.up()
  t.same(told(await first), TIMED_OUT)
  leave.open()
  await settled()
  t.same(told(await send(app)), [200, 'again', 'fresh'])
})

t.test('the reply of a handler that may be overtaken has the properties of any other', async (t) => {
  const before = (app: FastifyInstance) => app.decorateReply('mark', '')
  const handler: Handler = async (_request, reply) => {
    const marked = reply as unknown as Record<string, unknown>
    marked.mark = 'set'
    Object.defineProperty(marked, 'other', { value: 'defined', configurable: true, enumerable: true })
    const seen = ['other' in marked, Object.hasOwn(marked, 'mark'), marked.mark, marked.other]
    return [...seen, delete marked.other, 'other' in marked]
  }
  const app = await serve(t, handler, { before })
  t.same((await send(app)).json(), [true, true, 'set', 'defined', true, false])
})

t.test('a final error in time is stored, with the reply that the error handlers make of it', async (t) => {
  let runs = 0
  const app = await serve(t, async () => {
    runs++
    throw Object.assign(new Error('no'), { statusCode: 402, code: 'NO' })
  })
  t.same(told(await send(app)), [402, 'NO', 'fresh'])
  t.same(told(await send(app)), [402, 'NO', 'replay'])
  t.equal(runs, 1)
})

t.test('a timeout that strikes before the handler starts is answered by itself', async (t) => {
  const time = holdTime(t)
  const [asked, claimed, answer] = [latch(), latch(), latch()]
  class SlowStore extends MemoryStore {
    override async acquire(...args: Parameters<IdempotencyStore['acquire']>) {
      const found = await super.acquire(...args)
      asked.open()
      await claimed.promise
      return found
    }
  }
  const app = await build(t, { store: new SlowStore(), storeTimeout: 60_000 })
  const route = {
    handlerTimeout: TIME,
    errorHandler: async (error: FastifyError, _request: FastifyRequest, reply: FastifyReply) => {
      await answer.promise
      return reply.code(402).send(error.code)
    }
  }
  app.post('/', { ...config(), ...route }, async (_request, reply) => reply.code(201).send('mine'))
  const first = send(app)
  await asked.promise
  await time.up()
  claimed.open()
  await settled()
  answer.open()
  t.same(told(await first), [402, 'FST_ERR_HANDLER_TIMEOUT', 'fresh'])
  await settled()
  t.same(told(await send(app)), [201, 'mine', 'replay'])
})

t.test("an error that only looks like the timeout's is an error of the handler", async (t) => {
  for (const route of [{}, { handlerTimeout: 60_000 }]) {
    let runs = 0
    const app = await build(t)
    app.post('/', { ...config(), ...route }, async () => {
      if (++runs > 1) return `run ${runs}`
      throw Object.assign(new Error('of a service behind'), { code: 'FST_ERR_HANDLER_TIMEOUT', statusCode: 503 })
    })
    t.equal((await send(app)).statusCode, 503)
    t.same(told(await send(app)), [200, 'run 2', 'fresh'])
  }
})

t.test('over a socket, a slow error handler and a handler that ends meanwhile each have their reply', async (t) => {
  for (const style of ['callback', 'send', 'value']) {
    const app = await build(t)
    const [struck, replied] = [latch(), latch()]
    app.setErrorHandler(async (error: FastifyError, _request, reply) => {
      if (error.code !== 'FST_ERR_HANDLER_TIMEOUT') return reply.send(error)
      struck.open()
      await replied.promise
      return reply.code(504).send(error.message)
    })
    let runs = 0
    app.post('/', { ...config(), handlerTimeout: 20 }, (_request, reply) => {
      runs++
      const work = async () => {
        await struck.promise
        setTimeout(() => replied.open(), 20)
        if (style === 'value') return 'mine'
        void reply.code(201).send('mine')
      }
      const working = work()
      if (style !== 'callback') return working as never
    })
    const port = await listen(app)
    t.equal((await post(port, { key: 'k' })).status, 504)
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    const retry = await post(port, { key: 'k' })
    t.same([retry.headers[REPLAYED], retry.text, runs], ['true', 'mine', 1], style)
  }
})
