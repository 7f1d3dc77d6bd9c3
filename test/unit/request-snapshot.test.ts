import type { FastifyInstance, FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { kSnapshot } from '../../lib/http/request-snapshot.js'
import { build, codeOf, inject, REPLAYED } from '../support/app.js'

/* What the client has sent is read in the moment in which it is there, whatever hooks make of it since. */

interface Sent {
  key?: string | null
  body?: unknown
  type?: string
}

interface Setup extends IdempotencyOptions {
  /** Of the instance, which come before all hooks of a route. */
  hooks?: Partial<Record<'onRequest' | 'preParsing' | 'preValidation', (request: FastifyRequest) => unknown>>
  before?: (app: FastifyInstance) => unknown
}

/** An app whose handler replies with the number of its run, and shows what it has seen last. */
async function serve(t: Test, { hooks = {}, before = () => {}, ...options }: Setup = {}) {
  const app = await build(t, options)
  await before(app)
  for (const [name, hook] of Object.entries(hooks)) {
    app.addHook(name as 'preValidation', async (request) => void (await hook(request)))
  }
  let runs = 0
  const seen: { body?: unknown; own?: PropertyDescriptor | undefined } = {}
  app.post('/', { config: { idempotency: true } }, async (request) => {
    seen.body = request.body
    seen.own = Object.getOwnPropertyDescriptor(request, 'body')
    return `run ${++runs}`
  })
  const send = async ({ key = 'k', body, type = 'application/json' }: Sent) => {
    const reply = await inject(app, {
      method: 'POST',
      url: '/',
      headers: {
        ...(key === null ? {} : { 'idempotency-key': key }),
        ...(body === undefined ? {} : { 'content-type': type })
      },
      ...(body === undefined ? {} : { payload: body as string })
    })
    if (reply.statusCode >= 400) return `${reply.statusCode} ${codeOf(reply)}`
    return reply.headers[REPLAYED] === 'true' ? `replay of ${reply.payload}` : reply.payload
  }
  return { app, send, seen }
}

const REUSED = '422 FST_IDEMPOTENCY_KEY_REUSED'
const UNREADABLE = '500 FST_IDEMPOTENCY_KEY_UNREADABLE'
const EARLY = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const

let now = 0

const changes: Record<string, (request: FastifyRequest) => void> = {
  'replaces the body': (request) => {
    request.body = { ...(request.body as object), receivedAt: ++now }
  },
  'adds to the body': ({ body }) => {
    Object.assign(body as object, { receivedAt: ++now })
  },
  'changes what is in the body': ({ body }) => {
    ;(body as { items: { at?: number }[] }).items[0] = { at: ++now }
  },
  'takes from the body': ({ body }) => {
    for (const name of Object.keys(body as object)) delete (body as Record<string, unknown>)[name]
  },
  'takes the body away': (request) => {
    request.body = undefined
  }
}

for (const [what, change] of Object.entries(changes)) {
  t.test(`a hook of the instance that ${what} before validation makes no other request of a retry`, async (t) => {
    for (const hook of EARLY) {
      const { send } = await serve(t, { hook, hooks: { preValidation: change } })
      t.equal(await send({ body: '{"a":1,"items":[{}]}' }), 'run 1')
      t.equal(await send({ body: '{"items":[{}],"a":1}' }), 'replay of run 1')
      t.equal(await send({ body: '{"a":2,"items":[{}]}' }), REUSED, 'and no retry of another request')
    }
  })
}

t.test('what hooks have made of the body is what the handler gets', async (t) => {
  const { send, seen } = await serve(t, {
    hooks: {
      preValidation: (request) => {
        request.body = { ...(request.body as object), b: 2 }
      }
    }
  })
  await send({ body: '{"a":1}' })
  t.strictSame(seen.body, { a: 1, b: 2 })
})

t.test('what a hook puts in the place of a body before that is parsed does not stand for it', async (t) => {
  const found: unknown[] = []
  const hooks = {
    onRequest: (request: FastifyRequest) => {
      request.body = { of: 'the hook' }
    },
    preParsing: (request: FastifyRequest) => found.push(request.body)
  }
  const { send, seen } = await serve(t, { hooks })
  t.equal(await send({ body: '{"a":1}' }), 'run 1')
  t.strictSame([found, seen.body], [[{ of: 'the hook' }], { a: 1 }])
  t.equal(await send({ body: '{"a":1}' }), 'replay of run 1')
  t.equal(await send({ body: '{"a":2}' }), REUSED)
})

t.test('where no body is sent hooks may put there what they like', async (t) => {
  for (const name of ['preParsing', 'preValidation'] as const) {
    const hook = (request: FastifyRequest) => {
      request.body = { at: ++now }
    }
    const { send } = await serve(t, { hooks: { [name]: hook } })
    t.equal(await send({}), 'run 1')
    t.equal(await send({}), 'replay of run 1')
  }
})

t.test('a body of null is a payload like any other', async (t) => {
  const { send } = await serve(t)
  t.equal(await send({ body: 'null' }), 'run 1')
  t.equal(await send({ body: 'null' }), 'replay of run 1')
  t.equal(await send({ body: '0' }), REUSED)
  t.equal(await send({}), REUSED, 'and no body is another')
})

t.test('a body that a hook reads where the parser has left it is compared', async (t) => {
  const before = (app: FastifyInstance) => {
    app.addContentTypeParser('multipart/form-data', (_request, _payload, done) => done(null))
    // As @fastify/multipart does, with what it has read.
    app.addHook('preValidation', async (request) => {
      request.body = { amount: request.headers['x-amount'] ?? String(request.raw.headers['content-length']) }
    })
  }
  for (const hook of EARLY) {
    const { send } = await serve(t, { hook, before })
    const upload = (body: string) => send({ body, type: 'multipart/form-data; boundary=x' })
    t.equal(await upload('1'), 'run 1')
    t.equal(await upload('1'), 'replay of run 1')
    t.equal(await upload('22'), REUSED)
  }
})

t.test('a key in the body is that of the client, whatever hooks make of it', async (t) => {
  for (const hook of EARLY) {
    const hooks = {
      preValidation: (request: FastifyRequest) => {
        request.body = { a: 1, _key: `of the hook ${++now}` }
      }
    }
    const { send } = await serve(t, { hook, field: '_key', hooks })
    t.equal(await send({ key: null, body: '{"_key":"a","n":1}' }), 'run 1')
    t.equal(await send({ key: null, body: '{"_key":"a","n":1}' }), 'replay of run 1')
    t.equal(await send({ key: null, body: '{"_key":"a","n":2}' }), REUSED)
    t.equal(await send({ key: null, body: '{"_key":"b","n":1}' }), 'run 2')
    t.equal(await send({ key: null, body: '{"_key":7}' }), '422 FST_IDEMPOTENCY_KEY_INVALID')
  }
})

t.test('a body in which nobody can look for the key is an error, unless the key is elsewhere', async (t) => {
  const parsers: Record<string, (app: FastifyInstance) => unknown> = {
    bytes: (app) => {
      app.removeAllContentTypeParsers()
      app.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => done(null, body))
    },
    'a text': (app) => {
      app.removeAllContentTypeParsers()
      app.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => done(null, body))
    },
    'a stream': (app) => {
      app.removeAllContentTypeParsers()
      app.addContentTypeParser('*', (_request, payload, done) => done(null, payload))
    }
  }
  for (const [what, before] of Object.entries(parsers)) {
    for (const hook of EARLY) {
      const { send } = await serve(t, { hook, field: '_key', before })
      t.equal(await send({ key: null, body: '{"_key":"a"}' }), UNREADABLE, what)
      t.match(await send({ key: 'h', body: '{"_key":"a"}' }), /^run/, `${what}, and a key in the header`)
      t.match(await send({ key: null }), /^run/, `no body, where one would be ${what}`)
    }
  }
  const { send } = await serve(t, {
    field: '_key',
    before: (app) => app.addContentTypeParser('multipart/form-data', (_request, _payload, done) => done(null))
  })
  t.equal(await send({ key: null, body: 'x', type: 'multipart/form-data; boundary=x' }), UNREADABLE, 'a form unread')
  t.match(await send({ key: null, body: 'text', type: 'text/plain' }), /^run/, 'a plain text has no fields')
})

const keyOf = ({ headers }: FastifyRequest) => headers['idempotency-key'] as string

t.test('behind it the body is a property like any other', async (t) => {
  const plain = { configurable: true, enumerable: true, writable: true }
  const bodies: [body: string | undefined, value: unknown][] = [
    ['{"a":1}', { a: 1 }],
    ['null', null],
    ['0', 0],
    [undefined, undefined]
  ]
  for (const options of [{}, { field: '_key' }, { getKey: keyOf }, { fingerprint: false }, { hook: 'onRequest' }]) {
    const { send, seen } = await serve(t, options as IdempotencyOptions)
    for (const [n, [body, value]] of bodies.entries()) {
      await send({ key: `${n}`, body })
      t.match(seen.own, plain)
      t.strictSame([seen.own?.value, seen.body], [value, value])
      delete seen.own
    }
  }
})

t.test('a body that is refused, or never parsed, leaves no accessor behind that would tell lies', async (t) => {
  const bodies: unknown[] = []
  const { app, send } = await serve(t)
  app.addHook('onError', async (request) => void bodies.push(request.body))
  t.match(await send({ body: '{"a":' }), /^400/)
  t.strictSame(bodies, [undefined])
})

t.test('a request without a key that can only be in its header has nothing read of it', async (t) => {
  const { app, send } = await serve(t)
  const snapshots: unknown[] = []
  app.addHook('onResponse', async (request) => void snapshots.push(request[kSnapshot]))
  t.equal(await send({ key: null, body: '{"a":1}' }), 'run 1')
  t.strictSame(snapshots, [null])
})
