import { EventEmitter } from 'node:events'
import { Readable } from 'node:stream'
import type { FastifyError, FastifyInstance, FastifyReply, FastifyRequest, RouteShorthandOptions } from 'fastify'
import t, { type Test } from 'tap'
import {
  type IdempotencyOptions,
  type IdempotencyRouteOptions,
  type IdempotencyStore,
  MemoryStore,
  type StoredRecord
} from '../../index.js'
import { TransactionBroken } from '../../lib/errors.js'
import { kExchange, kRefusal } from '../../lib/http/exchange.js'
import { RouteHooks } from '../../lib/http/hooks.js'
import { kSnapshot } from '../../lib/http/request-snapshot.js'
import { type Policy, registrationOptions, routePolicy } from '../../lib/options.js'
import { Registration } from '../../lib/registration.js'
import type { TransactionAcquisition, TransactionOutcome } from '../../types/index.js'
import { build, codeOf, inject, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { settled } from '../support/virtual-time.js'
import { settle } from '../support/waiter.js'
import { warningsOf } from '../support/warnings.js'

type Reply = Awaited<ReturnType<typeof inject>>
/** Who is given a reply itself waits for its end. */
type Replying = { reply: FastifyReply }
type Handler = (request: FastifyRequest, reply: FastifyReply) => unknown

const HOOKS = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const

interface Sent {
  key?: string | null
  body?: unknown
  headers?: Record<string, string>
  method?: 'POST' | 'PUT'
  url?: string
}

/** Sends a request, with the key `k` unless it is said otherwise. */
function send(app: FastifyInstance, { key = 'k', body, headers = {}, method = 'POST', url = '/' }: Sent = {}) {
  return inject(app, {
    method,
    url,
    headers: { ...(key === null ? {} : { 'idempotency-key': key }), ...headers },
    ...(body === undefined ? {} : { payload: body as object })
  })
}

/** An app with one covered route. */
async function serve(
  t: Test,
  options: IdempotencyOptions = {},
  handler: Handler = async () => 'done',
  { before = () => {}, ...route }: RouteShorthandOptions & { before?: (app: FastifyInstance) => void } = {}
): Promise<FastifyInstance> {
  const app = await build(t, options)
  before(app)
  app.post('/', { ...route, config: { idempotency: true } }, handler as never)
  return app
}

/** A handler that replies with the number of the run. */
function counting(): Handler {
  let runs = 0
  return async () => `run ${++runs}`
}

/** What a client makes of a reply: its status, its error's code or its body, and whether it is a replay. */
function told(reply: Reply): unknown[] {
  const isError = reply.headers['content-type']?.toString().includes('json') === true
  return [
    reply.statusCode,
    isError ? codeOf(reply) : reply.payload,
    reply.headers[REPLAYED] === 'true' ? 'replay' : 'fresh'
  ]
}

/** Replies with the key that the handler finds. */
const keyOf = async ({ idempotency }: FastifyRequest) => (idempotency === null ? 'none' : idempotency.key)

const RAN_1 = [200, 'run 1', 'fresh']
const RAN_2 = [200, 'run 2', 'fresh']
const REPLAYED_1 = [200, 'run 1', 'replay']
const REUSED = [422, 'FST_IDEMPOTENCY_KEY_REUSED', 'fresh']
const IN_PROGRESS = [409, 'FST_IDEMPOTENCY_IN_PROGRESS', 'fresh']
const NOT_REPLAYABLE = [409, 'FST_IDEMPOTENCY_NOT_REPLAYABLE', 'fresh']

/** Hooks that note when they are called. */
function noting(notes: string[]): RouteShorthandOptions {
  return Object.fromEntries(HOOKS.map((name) => [name, async () => void notes.push(name)]))
}

/** All hooks, and what is noted between one of them and the next. */
const behind = (hook: string, note: string) => HOOKS.flatMap((name) => (name === hook ? [name, note] : [name]))

/** A store whose answers take some turns of the event loop, as those of a server do; it notes what it was asked. */
class RemoteStore extends MemoryStore {
  readonly notes: string[]
  readonly records: StoredRecord[] = []

  constructor(notes: string[] = []) {
    super()
    this.notes = notes
  }

  override async acquire(...args: Parameters<IdempotencyStore['acquire']>) {
    this.notes.push('claim')
    await settle()
    return super.acquire(...args)
  }

  override async complete(...args: Parameters<IdempotencyStore['complete']>) {
    await settle()
    this.records.push(args[2])
    this.notes.push('stored')
    return super.complete(...args)
  }

  override async release(...args: Parameters<IdempotencyStore['release']>) {
    await settle()
    this.notes.push('released')
    return super.release(...args)
  }
}

/* A request's way */

/** The hooks of a route, and a request's way through them as long as nothing has to be waited for. */
function route(options: IdempotencyOptions = {}) {
  const registration = new Registration(registrationOptions(options))
  const declaration = { method: 'POST', url: '/', config: { idempotency: true } }
  const hooks = new RouteHooks(routePolicy(declaration, registration.options) as Policy, registration)
  const request = (key?: string, body?: unknown) =>
    ({
      method: 'POST',
      host: 'shop.example',
      params: {},
      query: {},
      headers: { 'content-length': '1', ...(key === undefined ? {} : { 'idempotency-key': key }) },
      body,
      raw: {},
      log: { debug: () => {} },
      routeOptions: {},
      [kExchange]: null,
      [kRefusal]: null,
      [kSnapshot]: null
    }) as unknown as FastifyRequest
  return { hooks, request }
}

/** A reply of which nothing is known but what it was sent. */
function replyTo(request: FastifyRequest) {
  const sent: unknown[] = []
  const headers: Record<string, unknown> = {}
  const reply = {
    raw: Object.assign(new EventEmitter(), { socket: {}, headersSent: false, destroyed: false }),
    request,
    statusCode: 200,
    getHeaders: () => ({ ...headers }),
    getHeader: (name: string) => headers[name],
    hasHeader: (name: string) => name in headers,
    removeHeader: (name: string) => {
      delete headers[name]
    },
    header: (name: string, value: unknown) => {
      headers[name] = value
    },
    send: (payload: unknown) => {
      sent.push(payload)
      return reply
    }
  }
  return { reply: reply as unknown as FastifyReply, sent }
}

/** What comes out of a hook, which has to be there when the hook returns. */
function atOnce(hook: (done: (error?: Error | null, payload?: unknown) => void) => unknown): unknown {
  let outcome: unknown = 'nothing'
  const result = hook((error, payload) => {
    outcome = (error as FastifyError | undefined)?.code ?? payload ?? 'next'
  })
  return result instanceof Promise ? 'a promise' : outcome
}

t.test('where all answers are at hand a request goes its whole way without being held up', async (t) => {
  const { hooks, request: requestWith } = route()
  const handler = hooks.wrap(() => 'done')
  const go = (key?: string, body: unknown = 'body') => {
    const request = requestWith(key)
    const { reply, sent } = replyTo(request)
    const before = (['readHead', 'finishSnapshot', 'claim'] as const).map((name) => {
      // The parser comes behind the first.
      if (name === 'finishSnapshot') request.body = body
      return atOnce((done) => hooks[name](request, reply, done))
    })
    const way = before.every((outcome) => outcome === 'next') ? [handler.call({} as never, request, reply)] : sent
    return [...before, ...way, atOnce((done) => hooks.onSend(request, reply, 'done', done))]
  }
  t.same(go(), ['next', 'next', 'next', 'done', 'done'], 'without a key')
  t.same(go('k'), ['next', 'next', 'next', 'done', 'done'], 'a first request')
  t.same(go('k'), ['next', 'next', 'nothing', 'done', 'done'], 'its replay')
  t.same(go('k', 'other'), ['next', 'next', 'FST_IDEMPOTENCY_KEY_REUSED', 'done'], 'another with its key')
  t.equal(go(',')[0], 'FST_IDEMPOTENCY_KEY_INVALID', 'a malformed key')
})

t.test('an error of a request without a key, or one that is nothing, is left to Fastify', async (t) => {
  const { hooks, request: requestWith } = route()
  for (const isKeyed of [false, true]) {
    for (const error of [new Error('x'), undefined, null]) {
      const request = requestWith(isKeyed ? `${error}` : undefined)
      const { reply } = replyTo(request)
      hooks.claim(request, reply, () => {})
      t.equal(
        atOnce((done) => hooks.onError(request, reply, error as FastifyError, done)),
        'next'
      )
    }
  }
})

/* Which requests are covered */

/** Bodies with a file, as @fastify/multipart gives them. A file is read at most once in earnest, at a price. */
function takeFiles(app: FastifyInstance) {
  const files = { reads: 0 }
  app.addContentTypeParser('multipart/form-data', { parseAs: 'string' }, (_request, content, done) => {
    const toBuffer = async () => {
      files.reads++
      return Buffer.from(content)
    }
    done(null, { file: { type: 'file', toBuffer } })
  })
  return files
}

const upload = (content = 'content') => ({ body: content, headers: { 'content-type': 'multipart/form-data' } })

t.test('of a route with several methods only those are covered that are in methods', async (t) => {
  let asked = 0
  const asks = { skip: () => ++asked < 0, getKey: () => (++asked > 0 ? 'k' : undefined) }
  const variants: IdempotencyOptions[] = [{}, { field: '_key' }, { hook: 'preHandler' }, asks]
  for (const options of variants) {
    const app = await build(t, { global: true, methods: ['POST'], ...options })
    const files = takeFiles(app)
    app.route({ method: ['POST', 'PUT'], url: '/', handler: keyOf })
    t.equal((await send(app)).payload, 'k')
    asked = 0
    for (const body of [undefined, { _key: 'k' }]) {
      const reply = await send(app, { method: 'PUT', body })
      t.strictSame([reply.payload, reply.headers[REPLAYED]], ['none', undefined])
    }
    t.equal((await send(app, { method: 'PUT', ...upload() })).payload, 'none')
    t.strictSame([files.reads, asked], [0, 0], 'nor is anything done for the others')
  }
})

t.test('what is not to be compared is not looked at', async (t) => {
  const cases: [name: string, options: IdempotencyOptions, sent: Sent, reads: number][] = [
    ['a request with a key', {}, {}, 1],
    ['a request without one', {}, { key: null }, 0],
    ['the same where it might come with the body', { field: '_key' }, { key: null }, 0],
    ['the same where it is claimed before the validation', { hook: 'preValidation' }, { key: null }, 0],
    // Whether it finds one is known in preHandler, and by then hooks may have changed the body.
    ['a request for which getKey may find a key', { getKey: () => undefined }, {}, 1],
    ['a request that is skipped', { skip: () => true }, {}, 0],
    ['a route that compares nothing', { fingerprint: false }, {}, 0],
    ['a route that compares by itself', { fingerprint: () => 'x' }, {}, 0]
  ]
  for (const [name, options, sent, reads] of cases) {
    let files = { reads: 0 }
    const app = await serve(t, options, undefined, {
      before: (app) => {
        files = takeFiles(app)
      }
    })
    t.equal((await send(app, { ...upload(), ...sent })).payload, 'done')
    t.equal(files.reads, reads, name)
  }
})

t.test('skip is asked once, behind the onRequest hooks, and before anything is asked of the key', async (t) => {
  for (const hook of HOOKS) {
    for (const field of [undefined, '_key']) {
      const notes: string[] = []
      const skip = async ({ headers }: FastifyRequest) => {
        notes.push('skip')
        return headers['x-skip'] !== undefined
      }
      const store = new RemoteStore(notes)
      const options: IdempotencyOptions = { skip, hook, required: true, ...(field && { field }), store }
      const app = await serve(t, options, keyOf, noting(notes))
      const asked = behind('onRequest', 'skip')
      for (const key of ['k', ',', null]) {
        for (const body of [undefined, { _key: 'k' }, { _key: 7 }]) {
          notes.length = 0
          t.equal((await send(app, { key, headers: { 'x-skip': '1' }, body })).payload, 'none')
          t.strictSame(notes, asked)
        }
      }
      notes.length = 0
      t.equal((await send(app)).payload, 'k')
      t.strictSame(
        notes.filter((note) => note === 'skip'),
        ['skip']
      )
      if (field === undefined) continue
      notes.length = 0
      t.equal((await send(app, { key: null, body: { _key: 'b' } })).payload, 'b')
      t.strictSame(
        notes.filter((note) => note === 'skip'),
        ['skip']
      )
    }
  }
})

/* Where the key is, and when it is claimed */

/** A key that can be seen is claimed behind the hooks of its phase, and once more when all is known. */
const claimedBehind = (hook: string) =>
  hook === 'preHandler' ? [...HOOKS, 'claim'] : [...behind(hook, 'claim'), 'claim']

t.test(
  'a key is claimed behind all hooks, and behind those of an earlier phase as well if that is wanted',
  async (t) => {
    for (const hook of [undefined, ...HOOKS]) {
      const notes: string[] = []
      const options: IdempotencyOptions = { store: new RemoteStore(notes), ...(hook && { hook }) }
      const app = await serve(t, options, undefined, noting(notes))
      t.equal((await send(app, { body: {} })).payload, 'done')
      t.strictSame(notes, [...claimedBehind(hook ?? 'preHandler'), 'stored'])
    }
  }
)

t.test('a malformed key in the header is refused with 422 before the body is read, whatever the hook', async (t) => {
  for (const hook of HOOKS) {
    for (const options of [{ hook }, { hook, skip: () => false }, { hook, field: '_key' }]) {
      const notes: string[] = []
      const app = await serve(t, options, async () => t.fail('it ran'), noting(notes))
      t.same(told(await send(app, { key: ' ', body: {} })), [422, 'FST_IDEMPOTENCY_KEY_INVALID', 'fresh'])
      t.strictSame(notes, ['onRequest'])
    }
  }
})

t.test('a key that comes with the body is claimed when the body is there, behind all hooks', async (t) => {
  for (const hook of HOOKS) {
    const notes: string[] = []
    const options: IdempotencyOptions = { hook, field: '_key', store: new RemoteStore(notes) }
    const app = await serve(t, options, keyOf, noting(notes))
    t.equal((await send(app, { key: null, body: { _key: 'b' } })).payload, 'b')
    t.strictSame(notes, [...HOOKS, 'claim', 'stored'])
    notes.length = 0
    t.equal((await send(app, { key: 'h', body: { _key: 'b' } })).payload, 'h', 'the header goes first')
    t.equal((await send(app, { key: null, url: '/?_key=q', body: { _key: 'b' } })).payload, 'q', 'then the query')
    const early = [...claimedBehind(hook), 'stored']
    t.strictSame(notes, [...early, ...early], 'which can be seen at once')
  }
})

t.test('getKey goes for header and field, may find nothing, and is asked again when there is a body', async (t) => {
  const keys: unknown[] = ['g1', Promise.resolve('g2'), undefined, null, Promise.resolve(undefined)]
  for (const hook of HOOKS) {
    let found: unknown
    let asked = 0
    const getKey = () => {
      asked++
      return found as string
    }
    const app = await serve(t, { hook, getKey, field: '_key' }, keyOf)
    for (found of keys) {
      asked = 0
      t.equal((await send(app, { key: 'h', body: { _key: 'b' } })).payload, (await found) ?? 'none')
      t.equal(asked, hook === 'preHandler' || (await found) ? 1 : 2)
    }
  }
})

t.test('what is malformed in header or field does not matter where getKey finds the key', async (t) => {
  for (const hook of HOOKS) {
    const app = await serve(t, { hook, getKey: () => 'mine', field: '_key' }, keyOf)
    t.equal((await send(app, { key: ',', body: { _key: 7 }, url: '/?_key=a&_key=b' })).payload, 'mine', hook)
  }
})

t.test('a key that the client sent in its body counts, whatever hooks make of that body', async (t) => {
  for (const fingerprint of [true, false]) {
    for (const hook of HOOKS) {
      const app = await serve(t, { hook, field: '_key', fingerprint }, counting(), {
        before: (app) =>
          app.addHook('preValidation', async (request) => {
            request.body = {}
          })
      })
      t.same(told(await send(app, { key: null, body: { _key: 'k' } })), RAN_1, hook)
      t.same(told(await send(app, { key: null, body: { _key: 'k' } })), REPLAYED_1, hook)
      t.match(await app.idempotency.get('k'), { state: 'completed' })
    }
  }
})

t.test('getKey may look into the body, whenever the key is claimed', async (t) => {
  for (const hook of [undefined, ...HOOKS]) {
    const getKey = ({ body }: FastifyRequest) => (body as { id?: string } | null | undefined)?.id
    const app = await serve(t, { getKey, ...(hook && { hook }) }, counting())
    t.same(told(await send(app, { key: null, body: { id: 'a' } })), RAN_1)
    t.same(told(await send(app, { key: null, body: { id: 'a' } })), REPLAYED_1)
    t.same(told(await send(app, { key: null, body: { id: 'b' } })), RAN_2)
  }
})

t.test('a required key is missed as soon as there is no place left for it, and all places are named', async (t) => {
  const header = 'the header idempotency-key'
  const documentation = 'see the documentation of this service'
  const [first, last] = [['onRequest'], [...HOOKS]]
  const cases: [options: IdempotencyRouteOptions, places: string, hooks: readonly string[]][] = [
    [{}, header, first],
    [{ hook: 'preParsing' }, header, first],
    [{ hook: 'preHandler' }, header, first],
    [{ skip: () => false }, header, first],
    [{ field: '_key' }, `${header} or the field _key`, last],
    [{ field: '_key', skip: () => false }, `${header} or the field _key`, last],
    [{ field: '_key', header: false }, 'the field _key', last],
    [{ getKey: () => undefined }, documentation, last],
    [{ getKey: () => undefined, field: '_key' }, documentation, last],
    [{ getKey: () => undefined, hook: 'onRequest' }, documentation, last]
  ]
  for (const [options, places, hooks] of cases) {
    const notes: string[] = []
    const app = await serve(t, options, undefined, noting(notes))
    const required = { ...noting(notes), config: { idempotency: { required: true } } }
    app.post('/required', required, async () => t.fail('it ran'))
    t.equal((await send(app, { key: null, body: { a: 1 } })).payload, 'done', 'where it is not required it runs')
    notes.length = 0
    const { statusCode, code, message } = (await send(app, { key: null, body: { a: 1 }, url: '/required' })).json()
    t.strictSame([statusCode, code], [400, 'FST_IDEMPOTENCY_KEY_MISSING'])
    t.equal(message, `This request needs an idempotency key: ${places}`)
    t.strictSame(notes, hooks, places)
  }
})

t.test('what the client sent counts, not what hooks have made of it since', async (t) => {
  let runs = 0
  const app = await serve(
    t,
    { hook: 'preHandler', field: '_key' },
    async ({ idempotency }) => `${idempotency?.key} ${++runs}`,
    {
      preHandler: async (request) => {
        request.headers['idempotency-key'] = 'of the hook'
        request.headers.authorization = `${Math.random()}`
        request.body = { random: Math.random() }
      }
    }
  )
  const alice: Sent = { headers: { authorization: 'alice' }, body: { a: 1 } }
  t.same(told(await send(app, alice)), [200, 'k 1', 'fresh'])
  t.same(told(await send(app, alice)), [200, 'k 1', 'replay'])
  t.same(told(await send(app, { ...alice, body: { a: 2 } })), REUSED)
  t.same(told(await send(app, { ...alice, headers: { authorization: 'bob' } })), REUSED)
  const inBody = { ...alice, key: null, body: { _key: 'b' } }
  t.same(told(await send(app, inBody)), [200, 'b 2', 'fresh'])
  t.same(told(await send(app, inBody)), [200, 'b 2', 'replay'])
})

t.test('what the client sent is compared, also where the key is not a part of it', async (t) => {
  const app = await serve(t, { hook: 'preHandler', getKey: () => 'k' }, counting(), {
    preHandler: async (request) => {
      request.body = { random: Math.random() }
    }
  })
  t.same(told(await send(app, { key: null, body: { a: 1 } })), RAN_1)
  t.same(told(await send(app, { key: null, body: { a: 1 } })), REPLAYED_1)
  t.same(told(await send(app, { key: null, body: { a: 2 } })), REUSED)
})

/* What makes two requests the same */

t.test('payloads are compared, unless that is not wanted; files by what is in them', async (t) => {
  for (const hook of HOOKS) {
    for (const fingerprint of [true, false]) {
      const app = await serve(t, { hook, fingerprint }, counting(), { before: takeFiles })
      for (const [key, send1, send2] of [
        ['json', { body: { a: 1 } }, { body: { a: 2 } }],
        ['file', upload('1'), upload('2')]
      ] as const) {
        const first = told(await send(app, { key, ...send1 }))
        t.same(told(await send(app, { key, ...send1 })), [200, first[1], 'replay'])
        t.same(told(await send(app, { key, ...send2 })), fingerprint ? REUSED : [200, first[1], 'replay'])
      }
    }
  }
})

t.test(
  'who compares payloads is told of a route whose bodies are not there to be compared, and of no other',
  async (t) => {
    const unread: Sent = { body: 'text', headers: { 'content-type': 'text/unread' } }
    const before = (app: FastifyInstance) => {
      app.addContentTypeParser('text/unread', (_request, _payload, done) => done(null))
      app.addContentTypeParser('text/stream', (_request, payload, done) => done(null, payload))
    }
    const read: RouteShorthandOptions = {
      preHandler: async (request) => {
        request.body = 'read by a hook'
      }
    }
    const cases: [told: number, name: string, Sent, (IdempotencyOptions & RouteShorthandOptions)?][] = [
      [1, 'a body that nobody parses', unread],
      [1, 'a body that its parser hands on as it comes', { ...unread, headers: { 'content-type': 'text/stream' } }],
      [1, 'the same where getKey finds the key', unread, { getKey: () => 'k' }],
      [0, 'without a key', { ...unread, key: null }],
      [0, 'fingerprint: false', unread, { fingerprint: false }],
      [0, 'a fingerprint function', unread, { fingerprint: () => 'text' }],
      [0, 'a function that says that it does not know', unread, { fingerprint: () => '' }],
      [0, 'a body that a preHandler hook reads', unread, read],
      [0, 'a body', { body: { amount: 1 } }],
      [0, 'no body', {}],
      [0, 'a key in the body that is none', { key: null, body: { k: '' } }, { field: 'k' }]
    ]
    for (const [told, name, sent, { preHandler, ...options } = {}] of cases) {
      const app = await build(t, options)
      before(app)
      const url = `/${name.replaceAll(' ', '-')}`
      app.post(url, { ...(preHandler && { preHandler }), config: { idempotency: true } }, async () => 'done')
      let reply: Reply | undefined
      const warnings = await warningsOf('FST_IDEMPOTENCY_PAYLOAD', async () => {
        reply = await send(app, { ...sent, url })
      })
      t.equal(warnings.length, told, name)
      t.equal(reply?.statusCode, options.field === undefined ? 200 : 422)
      if (told > 0) t.ok(warnings[0]?.startsWith(`the payloads of ${url} are not compared`))
    }
  }
)

t.test('a route that does not compare payloads any more replays what it stored when it did', async (t) => {
  for (const hook of HOOKS) {
    const store = new MemoryStore()
    const handler = counting()
    t.same(told(await send(await serve(t, { store, hook }, handler), { body: { a: 1 } })), RAN_1)
    const app = await serve(t, { store, hook, fingerprint: false }, handler)
    t.same(told(await send(app, { body: { a: 2 } })), REPLAYED_1)
  }
})

t.test('the query counts as it was sent, whatever a schema makes of it, and wherever the key is', async (t) => {
  const schema = { querystring: { type: 'object', properties: {}, additionalProperties: false } }
  const places: [options: IdempotencyOptions, sent: Sent][] = [
    [{}, { body: {} }],
    [{ field: '_key' }, { key: null, body: { _key: 'k' } }],
    [{ getKey: () => 'k' }, { key: null, body: {} }],
    // In a body that a hook reads behind the validation.
    [{ field: '_key' }, { key: null, ...upload() }]
  ]
  const before = (app: FastifyInstance) =>
    app.addContentTypeParser('multipart/form-data', { parseAs: 'string' }, (_request, _content, done) => done(null))
  const preHandler = async (request: FastifyRequest) => {
    request.body ??= { _key: 'k' }
  }
  for (const hook of HOOKS) {
    for (const [options, sent] of places) {
      const app = await serve(t, { hook, ...options }, counting(), { schema, before, preHandler })
      t.same(told(await send(app, { ...sent, url: '/?a=1' })), RAN_1, hook)
      t.same(told(await send(app, { ...sent, url: '/?a=1' })), REPLAYED_1, hook)
      t.same(told(await send(app, { ...sent, url: '/?a=2' })), REUSED, hook)
    }
  }
})

t.test("a fingerprint of the user's own is asked for once, and compared", async (t) => {
  const functions: ((request: FastifyRequest) => string | Promise<string>)[] = [
    ({ body }) => (body as { a: string }).a,
    async ({ body }) => (body as { a: string }).a
  ]
  for (const hook of ['onRequest', 'preHandler'] as const) {
    for (const make of functions) {
      let asked = 0
      const fingerprint = (request: FastifyRequest) => {
        asked++
        return make(request)
      }
      const app = await serve(t, { hook, fingerprint, field: '_key' }, counting())
      for (const [sent, outcome] of [
        [{ body: { a: 'x', b: 1 } }, RAN_1],
        [{ body: { a: 'x', b: 2 } }, REPLAYED_1],
        [{ body: { a: 'y' } }, REUSED],
        [{ key: null, body: { a: 'x', _key: 'b' } }, RAN_2],
        [{ key: null, body: { a: 'y', _key: 'b' } }, REUSED]
      ] as const) {
        asked = 0
        t.same(told(await send(app, sent)), outcome)
        t.equal(asked, 1)
      }
    }
  }
})

t.test('another payload goes before a conflict where it is known at the claim', async (t) => {
  const isA = ({ body }: FastifyRequest) => `${(body as { a: number }).a}`
  const cases: [options: IdempotencyOptions, outcome: unknown[]][] = [
    [{ hook: 'onRequest' }, IN_PROGRESS],
    [{ hook: 'preValidation' }, REUSED],
    [{ hook: 'preHandler' }, REUSED],
    [{ hook: 'preValidation', fingerprint: false }, IN_PROGRESS],
    [{ hook: 'preHandler', fingerprint: false }, IN_PROGRESS],
    [{ hook: 'onRequest', fingerprint: isA }, IN_PROGRESS],
    [{ hook: 'preHandler', fingerprint: isA }, REUSED]
  ]
  for (const [options, outcome] of cases) {
    for (const store of [new MemoryStore(), new RemoteStore()]) {
      const [entered, leave] = [latch(), latch()]
      const app = await serve(t, { ...options, store }, async () => {
        entered.open()
        await leave.promise
        return 'done'
      })
      const first = send(app, { body: { a: 1 } })
      await entered.promise
      t.same(told(await send(app, { body: { a: 1 } })), IN_PROGRESS)
      t.same(told(await send(app, { body: { a: 2 } })), outcome, `${options.hook}`)
      leave.open()
      t.equal((await first).payload, 'done')
    }
  }
})

t.test('callers are kept apart by their scope: a text, or a number of any size', async (t) => {
  const scopes = new Map<string, unknown>([
    ['text', 'tenant'],
    ['number', 7],
    ['zero', 0],
    ['fraction', 1.5],
    ['bigint', 7_000_000_000_000_000_000_000n],
    ['promise', Promise.resolve('promised')]
  ])
  const scope = ({ headers }: FastifyRequest) => scopes.get(`${headers['x-who']}`) as string
  const app = await serve(t, { scope }, counting())
  let run = 0
  for (const [who, value] of scopes) {
    t.same(told(await send(app, { headers: { 'x-who': who } })), [200, `run ${++run}`, 'fresh'])
    t.same(told(await send(app, { headers: { 'x-who': who } })), [200, `run ${run}`, 'replay'])
    t.match(await app.idempotency.get('k', { scope: `${await value}` }), { state: 'completed' })
  }
})

t.test('a scope keeps callers apart in every hook, wherever their key is', async (t) => {
  const scope = ({ headers }: FastifyRequest) => `${headers['x-who']}`
  for (const options of [{}, { getKey: ({ headers }: FastifyRequest) => headers['x-key'] as string }]) {
    for (const hook of HOOKS) {
      const app = await serve(t, { scope, hook, ...options }, counting())
      const key = 'getKey' in options ? null : 'k'
      const of = (who: string) => ({ key, body: {}, headers: { 'x-who': who, 'x-key': 'k' } })
      t.same(told(await send(app, of('alice'))), [200, 'run 1', 'fresh'], hook)
      t.same(told(await send(app, of('bob'))), [200, 'run 2', 'fresh'], hook)
      t.same(told(await send(app, of('alice'))), [200, 'run 1', 'replay'], hook)
      t.match(await app.idempotency.get('k', { scope: 'bob' }), { state: 'completed' })
      t.equal(await app.idempotency.get('k'), null)
    }
  }
})

t.test('a scope that fails, or gives nothing, lets nothing run, and the reason is known', async (t) => {
  const why = new Error('who is that?')
  const fail = () => {
    throw why
  }
  const cases: [scope: () => unknown, message: RegExp, cause: unknown][] = [
    [fail, /"scope" failed/, why],
    [() => Promise.reject(why), /"scope" failed/, why],
    ...['', undefined, null, Number.NaN, Number.POSITIVE_INFINITY, true, {}].map(
      (value): [() => unknown, RegExp, unknown] => [() => value, /"scope" gave nothing/, undefined]
    )
  ]
  for (const [scope, message, cause] of cases) {
    let error: FastifyError | undefined
    let runs = 0
    const app = await serve(t, { scope: scope as () => string }, async () => ++runs, {
      onError: async (_request, _reply, met) => {
        error = met
      }
    })
    const refused = await send(app)
    t.same([refused.statusCode, runs], [500, 0])
    t.notMatch(refused.payload, why.message, 'which is for nobody else')
    t.match(error, { code: 'FST_IDEMPOTENCY_SCOPE', message })
    t.equal(error?.cause, cause)
    t.equal((await send(app, { key: null })).payload, '1', 'a request without a key has no scope')
  }
})

/* Before the handler */

t.test(
  'a client that leaves before its duplicate is answered has nothing run, nor what is around a handler',
  async (t) => {
    for (const hook of ['onRequest', 'preHandler'] as const) {
      const notes: string[] = []
      const [entered, leave] = [latch<Replying>(), latch()]
      const preHandler = async (request: FastifyRequest, reply: FastifyReply) => {
        if (request.headers['x-leave'] === undefined) return
        entered.open({ reply })
        await leave.promise
      }
      const app = await serve(t, { hook, store: new RemoteStore(notes) }, async () => 'done', {
        preHandler,
        before: (app) =>
          app.addHook('onRoute', (route) => {
            const { handler } = route
            route.handler = function (request, reply) {
              notes.push('handler')
              return handler.call(this, request, reply)
            }
          })
      })
      t.equal((await send(app)).payload, 'done')
      t.strictSame(notes.slice(-3), ['claim', 'handler', 'stored'])
      notes.length = 0
      send(app, { headers: { 'x-leave': '1' } }).catch(() => {})
      const { reply } = await entered.promise
      reply.raw.destroy()
      await settle()
      leave.open()
      await until(() => reply.sent, { message: 'Fastify to be told' })
      await settle()
      t.strictSame(notes, hook === 'onRequest' ? ['claim'] : [])
    }
  }
)

t.test('what ends a request before its handler leaves when the key is free again, as it is', async (t) => {
  for (const hook of HOOKS) {
    for (const status of [401, 200]) {
      const notes: string[] = []
      const app = await serve(t, { hook, store: new RemoteStore(notes) }, counting(), {
        preHandler: async ({ headers }, reply) => {
          if (headers['x-stop'] !== undefined) return reply.code(status).header('x-hook', '1').send('stopped')
        }
      })
      const reply = await send(app, { headers: { 'x-stop': '1' } })
      notes.push('replied')
      t.same([...told(reply), reply.headers['x-hook']], [status, 'stopped', 'fresh', '1'])
      t.strictSame(notes, hook === 'preHandler' ? ['replied'] : ['claim', 'released', 'replied'])
      t.same(told(await send(app)), RAN_1)
    }
  }
})

t.test('what ends a duplicate before its replay, or a request that runs unprotected, touches no key', async (t) => {
  const stop: RouteShorthandOptions['preHandler'] = async ({ headers }, reply) => {
    if (headers['x-stop'] !== undefined) return reply.code(401).send('stopped')
  }
  for (const hook of ['onRequest', 'preHandler'] as const) {
    const notes: string[] = []
    const app = await serve(t, { hook, store: new RemoteStore(notes) }, counting(), { preHandler: stop })
    t.same(told(await send(app)), RAN_1)
    notes.length = 0
    t.same(told(await send(app, { headers: { 'x-stop': '1' } })), [401, 'stopped', 'fresh'])
    t.same(told(await send(app)), REPLAYED_1)
    t.strictSame(notes, hook === 'preHandler' ? ['claim'] : ['claim', 'claim'])

    const down = new RemoteStore()
    down.acquire = async () => {
      throw new Error('down')
    }
    const bypass = await serve(t, { hook, store: down, onStoreError: 'bypass' }, counting(), { preHandler: stop })
    t.same(told(await send(bypass, { headers: { 'x-stop': '1' } })), [401, 'stopped', 'fresh'])
    t.same(told(await send(bypass)), RAN_1)
    t.same(told(await send(bypass)), RAN_2)
    // What may have been written all the same is given back.
    t.notOk(down.notes.includes('stored'))
  }
})

t.test("an error of the user's own functions is the reply, as it is, and leaves the key free", async (t) => {
  const fail = (error: Error) => () => {
    throw error
  }
  for (const reject of [fail, (error: Error) => () => Promise.reject(error)]) {
    for (const hook of ['onRequest', 'preHandler'] as const) {
      for (const name of ['skip', 'getKey', 'fingerprint']) {
        const error = Object.assign(new Error('mine'), { statusCode: 418, headers: { 'x-mine': '1' } })
        const notes: string[] = []
        const app = await serve(
          t,
          {
            hook,
            [name]: reject(error),
            store: new RemoteStore(notes),
            problemDetails: true,
            documentationUrl: 'https://a.example'
          },
          async () => t.fail('it ran')
        )
        const reply = await send(app)
        t.strictSame(reply.json(), { statusCode: 418, error: "I'm a Teapot", message: 'mine' })
        t.equal(reply.headers.link, undefined, 'it is none of ours')
        t.strictSame(notes, name === 'fingerprint' && hook === 'onRequest' ? ['claim', 'released'] : [])
      }
    }
  }
})

/* The replay */

t.test('a replay has the type of the first reply, be it none, or that of a hook', async (t) => {
  for (const type of [undefined, 'text/csv']) {
    for (const text of ['x', '']) {
      const app = await serve(t, {}, async () => Readable.from(text === '' ? [] : [Buffer.from(text)]), {
        onRequest: async (_request, reply) => {
          if (type !== undefined) reply.type(type)
        }
      })
      for (const isReplay of [false, true]) {
        const reply = await send(app)
        t.same([reply.payload, reply.headers['content-type']], [text, type])
        t.equal(reply.headers[REPLAYED], isReplay ? 'true' : undefined)
      }
    }
  }
})

t.test("what the instance's hooks make of a replay is void, also where there is nothing to replay", async (t) => {
  for (const [status, body] of [
    [200, 'body'],
    [200, undefined],
    [204, undefined],
    [304, undefined]
  ] as const) {
    for (const made of ['made', null, undefined]) {
      let isFirst = true
      const app = await serve(t, {}, async (_request, reply) => reply.code(status).send(body), {
        before: (app) =>
          app.addHook('onSend', async (_request, reply, payload) => {
            if (isFirst) return payload
            reply.code(418).header('x-made', '1').type('text/made')
            return made
          })
      })
      const first = await send(app)
      isFirst = false
      const again = await send(app)
      t.same([again.statusCode, again.payload], [status, body ?? ''])
      t.equal(again.headers[REPLAYED], 'true')
      t.equal(again.headers['content-type'], first.headers['content-type'])
      if (status !== 304 || made !== 'made') t.equal(again.headers['content-length'], first.headers['content-length'])
    }
  }
})

t.test('a replay that cannot be sent is an error, with nothing of the replay on it', async (t) => {
  for (const level of ['instance', 'route']) {
    let isBroken = false
    const onSend = async () => {
      if (!isBroken) return
      isBroken = false
      throw new Error('broken')
    }
    const app = await serve(t, {}, async (_request, reply) => reply.code(201).header('x-run', '1').send('done'), {
      ...(level === 'route' ? { onSend } : { before: (app) => app.addHook('onSend', onSend) }),
      onRequest: async (_request, reply) => void reply.header('x-run', 'before')
    })
    t.same(told(await send(app)), [201, 'done', 'fresh'])
    isBroken = true
    const broken = await send(app)
    t.match(broken.json(), { statusCode: 500, message: 'broken' })
    t.match(broken.headers, { 'x-run': 'before', [REPLAYED]: undefined })
    const again = await send(app)
    t.same([...told(again), again.headers['x-run']], [201, 'done', 'replay', '1'])
  }
})

/* What is kept of a reply */

t.test('a reply leaves when it is stored', async (t) => {
  const notes: string[] = []
  const app = await serve(t, { store: new RemoteStore(notes) }, async () => 'done')
  t.same(told(await send(app)), [200, 'done', 'fresh'])
  notes.push('replied')
  t.strictSame(notes, ['claim', 'stored', 'replied'])
})

t.test('an error behind a reply that is stored already is the reply, and changes nothing that is stored', async (t) => {
  let isBroken = true
  const stream = Readable.from(['do', 'ne'])
  for (const body of ['done', stream]) {
    isBroken = true
    const app = await serve(t, {}, async () => body, {
      onSend: async () => {
        if (isBroken) throw new Error('broken behind it')
      }
    })
    isBroken = true
    t.match((await send(app)).json(), { statusCode: 500, message: 'broken behind it' })
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    isBroken = false
    t.same(told(await send(app)), [200, 'done', 'replay'])
  }
  t.equal(stream.readableEnded, true, 'a stream is read to its end')
})

t.test('a Response that cannot be sent is the error that it is elsewhere, and nothing runs again', async (t) => {
  const unfit: (() => Promise<Response>)[] = [
    async () => Response.error(),
    async () => {
      const response = new Response('x', { status: 201, headers: { 'x-a': '1' } })
      await response.text()
      return response
    }
  ]
  for (const make of unfit) {
    let runs = 0
    const app = await serve(t, {}, async () => (++runs === 1 ? make() : 'done'))
    app.post('/bare', make)
    const bare = await send(app, { url: '/bare' })
    const reply = await send(app)
    t.equal(reply.statusCode, 500)
    t.strictSame(reply.json(), bare.json())
    t.equal(reply.headers['x-a'], bare.headers['x-a'])
    t.same(told(await send(app)), [500, bare.json().code, 'replay'])
    t.equal(runs, 1)
  }
})

t.test('a reply is kept up to maxReplySize bytes', async (t) => {
  for (const [body, isKept] of [
    ['12345', true],
    ['123456', false],
    ['1234ä', false],
    [Buffer.from('12345'), true],
    [Buffer.from('123456'), false],
    [Readable.from(['12345']), true],
    [Readable.from(['123456']), false]
  ] as const) {
    const store = new RemoteStore()
    const app = await serve(t, { store, maxReplySize: 5 }, async () => body)
    const first = await send(app)
    t.equal(first.statusCode, 200)
    t.same(told(await send(app)), isKept ? [200, first.payload, 'replay'] : NOT_REPLAYABLE)
    t.match(store.records, [isKept ? { kind: 'reply' } : { kind: 'tombstone', reason: 'too-large' }])
  }
})

t.test('of a status without a body nothing but the head is kept, whatever the handler gave', async (t) => {
  for (const status of [204, 304]) {
    const store = new RemoteStore()
    const app = await serve(t, { store, maxReplySize: 2 }, async (_request, reply) =>
      reply
        .code(status)
        .header('x-a', '1')
        .send(Readable.from(['too large']))
    )
    for (const isReplay of [false, true]) {
      const reply = await send(app)
      t.equal(reply.statusCode, status)
      t.equal(reply.headers['x-a'], '1')
      t.equal(reply.headers[REPLAYED], isReplay ? 'true' : undefined)
    }
    t.match(store.records, [{ kind: 'reply', body: Buffer.alloc(0) }])
  }
})

t.test('a reply that is not final gives the key back, of whatever kind it is', async (t) => {
  for (const [status, make] of [
    [500, () => 'text'],
    [500, () => Readable.from(['stream'])],
    [204, () => Readable.from(['stream'])],
    [200, () => new Response('response')],
    [200, () => 'x'.repeat(100)]
  ] as const) {
    const store = new RemoteStore()
    let asked = 0
    const shouldStore = () => ++asked < 0
    const app = await serve(t, { store, shouldStore, maxReplySize: 50 }, async (_request, reply) =>
      reply.code(status).send(make())
    )
    t.equal((await send(app)).statusCode, status)
    await until(() => store.notes.includes('released'))
    t.strictSame([store.notes, asked], [['claim', 'released'], 1])
  }
})

t.test('a reply of which a part was written past Fastify cannot be kept', async (t) => {
  const store = new RemoteStore()
  const app = await serve(t, { store }, async (_request, reply) => {
    reply.raw.write('past ')
    return 'behind'
  })
  await send(app).catch(() => {})
  await until(() => store.records.length > 0)
  t.match(store.records, [{ kind: 'tombstone', reason: 'hijacked' }])
  t.same(told(await send(app)), NOT_REPLAYABLE)
})

t.test('a reply that runs unprotected is sent at once, as without the plugin', async (t) => {
  const store = new RemoteStore()
  store.acquire = async () => Promise.reject(new Error('down'))
  const errors: unknown[] = []
  const app = await serve(t, { store, onStoreError: 'bypass' }, async (_request, reply) => void reply.send('mine'), {
    onError: async (_request, _reply, error) => void errors.push(error)
  })
  t.same(told(await send(app)), [200, 'mine', 'fresh'])
  await settled()
  t.same(errors, [], 'Fastify would send once more what it takes for unsent')
})

t.test('an error of a handler in time is its reply, thrown or sent: stored if it is final', async (t) => {
  const error = (statusCode: number) => Object.assign(new Error('no'), { statusCode, code: 'NO' })
  for (const fail of [
    async (statusCode: number) => Promise.reject(error(statusCode)),
    (statusCode: number, reply: FastifyReply) => void reply.send(error(statusCode))
  ]) {
    for (const [statusCode, outcome] of [
      [402, [402, 'NO', 'replay']],
      [503, RAN_2]
    ] as const) {
      let runs = 0
      const app = await serve(t, {}, (_request, reply) =>
        ++runs > 1 ? Promise.resolve(`run ${runs}`) : fail(statusCode, reply)
      )
      t.same(told(await send(app)), [statusCode, 'NO', 'fresh'])
      t.same(told(await send(app)), outcome)
    }
  }
})

/* Transactions */

/** A store with transactions that do nothing; `outcome` is how they end. */
function transactional(outcome: TransactionOutcome) {
  const undone: unknown[] = []
  class Store extends MemoryStore {
    async begin(key: string): Promise<TransactionAcquisition> {
      const transaction = {
        client: {} as never,
        lost: new AbortController().signal,
        complete: async (_record: unknown, _ttl: unknown, undo: unknown) => {
          undone.push(undo)
          return outcome
        },
        rollback: async () => {
          undone.push('all')
          return true
        },
        keepAlive: () => {},
        abandon: () => {}
      }
      return { state: 'acquired', attempt: key.length > 0 ? 1 : 0, transaction }
    }
  }
  return { store: new Store(), undone }
}

const LINK = '<https://a.example>; rel="describedby"'

t.test('what a handler does in a transaction counts with its reply, and not with that of an error', async (t) => {
  const { store, undone } = transactional({ state: 'committed' })
  let isFailing = false
  const app = await serve(t, { store, transaction: true }, async (_request, reply) => {
    if (isFailing) throw Object.assign(new Error('no'), { statusCode: 402 })
    return reply.code(402).send('no')
  })
  t.equal((await send(app)).statusCode, 402)
  isFailing = true
  t.equal((await send(app)).statusCode, 402)
  t.strictSame(undone, [false, true])
})

t.test('the misuse of a transaction is an error of the plugin, wherever it is found out', async (t) => {
  const broken = () => new TransactionBroken('The transaction was misused')
  for (const where of ['in the handler', 'at the end']) {
    const { store, undone } = transactional({ state: 'refused', error: broken() })
    const options: IdempotencyOptions = { store, transaction: true, documentationUrl: 'https://a.example' }
    const app = await serve(t, { ...options, problemDetails: true }, async () => {
      if (where === 'in the handler') throw broken()
      return 'done'
    })
    const reply = await send(app)
    t.equal(reply.headers['content-type'], 'application/problem+json')
    t.match(reply.json(), { status: 500, code: 'FST_IDEMPOTENCY_TRANSACTION', detail: 'The transaction was misused' })
    t.equal(reply.headers.link, LINK, 'which is linked to once')
    t.strictSame(undone, [where === 'in the handler' ? 'all' : false])
  }
})

t.test("any other error of a handler is its own, whatever the plugin's are", async (t) => {
  const app = await serve(t, { documentationUrl: 'https://a.example', problemDetails: true }, async () => {
    throw Object.assign(new Error('mine'), { code: 'FST_IDEMPOTENCY_MINE' })
  })
  const reply = await send(app)
  t.strictSame(reply.json(), {
    statusCode: 500,
    code: 'FST_IDEMPOTENCY_MINE',
    error: 'Internal Server Error',
    message: 'mine'
  })
  t.equal(reply.headers.link, undefined)
})
