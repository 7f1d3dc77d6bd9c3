import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { build, codeOf, REPLAYED } from '../support/app.js'

/* Where a key comes from, whose it is, and what makes two requests the same. */

interface Sent {
  url?: string
  method?: 'POST' | 'PUT'
  headers?: Record<string, string>
  payload?: object | string | Buffer
}

async function service(t: { teardown(fn: () => unknown): void }, options: IdempotencyOptions = {}) {
  const app = await build(t, options)
  const state = { runs: 0 }
  app.addContentTypeParser(
    'application/octet-stream',
    { parseAs: 'buffer' },
    async (_request: unknown, body: Buffer) => body
  )
  app.route({
    method: ['POST', 'PUT'],
    url: '/*',
    config: { idempotency: true },
    handler: async (request) => ({ run: ++state.runs, key: request.idempotency?.key ?? null })
  })
  const send = async ({ url = '/', method = 'POST', headers = {}, payload }: Sent = {}) => {
    const reply = await app.inject({ method, url, headers, ...(payload === undefined ? {} : { payload }) })
    if (reply.statusCode !== 200) return codeOf(reply)
    return reply.headers[REPLAYED] === 'true' ? 'replay' : 'ran'
  }
  return {
    app,
    state,
    send,
    keyOf: async (sent: Sent) => (await app.inject({ method: 'POST', url: '/', ...sent })).json().key
  }
}

const key = (value = 'k') => ({ 'idempotency-key': value })

t.test('the key is in Idempotency-Key, quoted or bare, and is the same key in both forms', async (t) => {
  const { send } = await service(t)
  t.equal(await send({ headers: key('abc') }), 'ran')
  t.equal(await send({ headers: key('"abc"') }), 'replay')
  t.equal(await send({ headers: key('"abc";v=1') }), 'replay')
  t.equal(await send({ headers: key('"ab\\\\c"') }), 'ran')
})

t.test('another header can carry it, and then the default one does not count', async (t) => {
  const { send } = await service(t, { header: 'X-Idempotent-Key' })
  t.equal(await send({ headers: { 'x-idempotent-key': 'k' } }), 'ran')
  t.equal(await send({ headers: { 'X-IDEMPOTENT-KEY': 'k' } }), 'replay')
  t.equal(await send({ headers: key() }), 'ran')
  t.equal(await send({ headers: key() }), 'ran')
})

t.test('a field can carry it in a JSON body, a form body or the query, and the header goes first', async (t) => {
  const { app, send, keyOf } = await service(t, { field: '__idempotent_key' })
  await app.register(import('@fastify/formbody'))
  t.equal(await keyOf({ payload: { __idempotent_key: 'json' } }), 'json')
  const form = { 'content-type': 'application/x-www-form-urlencoded' }
  t.equal(await keyOf({ headers: form, payload: '__idempotent_key=form&a=1' }), 'form')
  t.equal(await keyOf({ url: '/?__idempotent_key=query' }), 'query')
  t.equal(await keyOf({ headers: key('header'), payload: { __idempotent_key: 'json' } }), 'header')
  t.equal(await keyOf({ payload: { other: 'json' } }), null)
  t.equal(await send({ url: '/f', payload: { __idempotent_key: 'f', a: 1 } }), 'ran')
  t.equal(await send({ url: '/f', payload: { a: 1, __idempotent_key: '"f"' } }), 'FST_IDEMPOTENCY_KEY_REUSED')
  t.equal(await send({ url: '/f', payload: { a: 1, __idempotent_key: 'f' } }), 'replay')
})

t.test('prototype names are no keys', async (t) => {
  for (const field of ['constructor', '__proto__', 'toString']) {
    const { keyOf } = await service(t, { field })
    t.equal(await keyOf({ payload: { a: 1 } }), null, field)
    t.equal(await keyOf({ url: '/?a=1' }), null, field)
  }
})

t.test("with hook 'preHandler', a key that the route's own hooks provide counts", async (t) => {
  const app = await build(t, { hook: 'preHandler', field: 'f' })
  const preHandler = async (request: FastifyRequest) => {
    const { own } = request.headers
    if (own === 'header') request.headers['idempotency-key'] = 'in the header'
    if (own === 'body') request.body = { f: 'in the body' }
  }
  let runs = 0
  app.post('/', { preHandler, config: { idempotency: true } }, async (request) => [++runs, request.idempotency?.key])
  for (const [run, own] of ['header', 'body'].entries()) {
    for (const replayed of [undefined, 'true']) {
      const reply = await app.inject({ method: 'POST', url: '/', headers: { own } })
      t.same(reply.json(), [run + 1, `in the ${own}`])
      t.equal(reply.headers[REPLAYED], replayed)
    }
  }
})

const provide = async ({ headers }: FastifyRequest) => {
  headers['idempotency-key'] = 'k'
}

interface Way {
  sent?: { headers?: Record<string, string>; query?: string; payload?: object }
  options?: IdempotencyOptions
  hooks?: object
}

/** The ways in which a request may come to its key: what the client sends, and what the server does about it. */
const WAYS_OF_KEYS: Record<string, Way> = {
  'in the header': { sent: { headers: key('k') } },
  'in the query': { sent: { query: '?f=k' }, options: { field: 'f' } },
  'in the body': { sent: { payload: { f: 'k' } }, options: { field: 'f' } },
  'from getKey': { options: { getKey: () => 'k' } },
  'from an async getKey': { options: { getKey: async () => 'k' } },
  'from getKey, in the body': {
    sent: { payload: { f: 'k' } },
    options: { getKey: ({ body }) => (body as { f?: string } | undefined)?.f }
  },
  ...Object.fromEntries(
    (['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const).flatMap((phase) =>
      [undefined, 'f'].map((field) => [
        `from a hook in ${phase}, ${field === undefined ? 'without' : 'with'} a field`,
        {
          options: field === undefined ? {} : { field },
          hooks: { [phase]: provide }
        }
      ])
    )
  )
}

for (const [way, { sent = {}, options = {}, hooks = {} }] of Object.entries(WAYS_OF_KEYS)) {
  t.test(`a key that comes ${way} is compared with its caller, its target and its payload`, async (t) => {
    for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
      const app = await build(t, { hook, ...options })
      app.post('/:id', { ...hooks, config: { idempotency: true } }, async ({ body }) => body)
      const send = (url: string, authorization: string, payload: object) =>
        app.inject({
          method: 'POST',
          url: `${url}${sent.query ?? ''}`,
          headers: { ...sent.headers, authorization },
          payload: { ...payload, ...sent.payload }
        })
      const first = await send('/1', 'alice', { a: 1 })
      t.same(first.json(), { a: 1, ...sent.payload })
      for (const [differs, url, who, payload] of [
        ['caller', '/1', 'bob', { a: 1 }],
        ['target', '/2', 'alice', { a: 1 }],
        ['payload', '/1', 'alice', { a: 2 }]
      ] as const) {
        t.equal(codeOf(await send(url, who, payload)), 'FST_IDEMPOTENCY_KEY_REUSED', `${hook}: ${differs}`)
      }
      t.equal((await send('/1', 'alice', { a: 1 })).headers[REPLAYED], 'true', hook)
    }
  })
}

t.test('a malformed key is 422: blank, too long, several, not well-formed', async (t) => {
  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
    const { send, state } = await service(t, { hook, field: 'f' })
    for (const value of [
      '',
      ' ',
      '""',
      '" "',
      'a,b',
      'a, b',
      '"a',
      '"a"b',
      '"a", "b"',
      'x'.repeat(256),
      'é'.repeat(128)
    ]) {
      t.equal(await send({ headers: key(value) }), 'FST_IDEMPOTENCY_KEY_INVALID', JSON.stringify(value))
    }
    for (const f of ['', ' ', 7, true, ['a'], { a: 1 }, null]) {
      t.equal(await send({ payload: { f } }), 'FST_IDEMPOTENCY_KEY_INVALID', JSON.stringify(f))
    }
    t.equal(await send({ url: '/?f=a&f=b' }), 'FST_IDEMPOTENCY_KEY_INVALID')
    t.equal(state.runs, 0)
    t.equal(await send({ headers: key('x'.repeat(255)) }), 'ran')
  }
})

t.test(
  'keyFormat: uuid is version 4 or 7 and nothing else, structured is quoted, a RegExp is asked every time',
  async (t) => {
    const uuid = await service(t, { keyFormat: 'uuid' })
    t.equal(await uuid.send({ headers: key('8f14e45f-ceea-467a-9c1e-3f2504e04f89') }), 'ran')
    t.equal(await uuid.send({ headers: key('"8f14e45f-ceea-467a-9c1e-3f2504e04f89"') }), 'replay')
    t.equal(await uuid.send({ headers: key('018c2b65-6b0a-7e35-9f1a-9c3d7f0a1b2c') }), 'ran')
    for (const bad of ['8f14e45f-ceea-167a-9c1e-3f2504e04f89', '8f14e45f-ceea-467a-cc1e-3f2504e04f89', 'k']) {
      t.equal(await uuid.send({ headers: key(bad) }), 'FST_IDEMPOTENCY_KEY_INVALID', bad)
    }
    const structured = await service(t, { keyFormat: 'structured' })
    t.equal(await structured.send({ headers: key('"k"') }), 'ran')
    t.equal(await structured.send({ headers: key('k') }), 'FST_IDEMPOTENCY_KEY_INVALID')
    const regexp = await service(t, { keyFormat: /^op-\d+$/g })
    for (const value of ['op-1', 'op-2', 'op-3']) t.equal(await regexp.send({ headers: key(value) }), 'ran')
    t.equal(await regexp.send({ headers: key('op-') }), 'FST_IDEMPOTENCY_KEY_INVALID')
  }
)

t.test('the same key with another payload is 422, and the stored reply stays as it is', async (t) => {
  const { send, state } = await service(t)
  t.equal(await send({ headers: key(), payload: { a: 1, b: [1, 2] } }), 'ran')
  for (const payload of [{ a: 1 }, { a: 1, b: [2, 1] }, { a: '1', b: [1, 2] }, [], undefined]) {
    t.equal(await send({ headers: key(), ...(payload === undefined ? {} : { payload }) }), 'FST_IDEMPOTENCY_KEY_REUSED')
  }
  t.equal(await send({ headers: key(), payload: { b: [1, 2], a: 1 } }), 'replay')
  const spaced = { ...key(), 'content-type': 'application/json' }
  t.equal(await send({ headers: spaced, payload: '{ "b" : [1,2.0],\n"a":1 }' }), 'replay')
  t.equal(state.runs, 1)
})

t.test('method, path and query are always compared, even with fingerprint: false', async (t) => {
  for (const fingerprint of [true, false]) {
    const { send } = await service(t, { fingerprint })
    t.equal(await send({ url: '/pay?to=alice', headers: key() }), 'ran')
    t.equal(await send({ url: '/pay?to=mallory', headers: key() }), 'FST_IDEMPOTENCY_KEY_REUSED')
    t.equal(await send({ url: '/refund?to=alice', headers: key() }), 'FST_IDEMPOTENCY_KEY_REUSED')
    t.equal(await send({ url: '/pay?to=alice', method: 'PUT', headers: key() }), 'FST_IDEMPOTENCY_KEY_REUSED')
    t.equal(await send({ url: '/pay?to=alice', headers: key() }), 'replay')
  }
})

t.test('with scope, the same key of two callers is two operations, and a refreshed token still replays', async (t) => {
  const { app, send } = await service(t, { scope: async (request) => String(request.headers['x-user']) })
  const as = (user: string, token: string) => ({ headers: { ...key(), 'x-user': user, authorization: token } })
  t.equal(await send(as('alice', '1')), 'ran')
  t.equal(await send(as('bob', '2')), 'ran')
  t.equal(await send(as('alice', '3')), 'replay')
  t.equal((await app.idempotency.get('k', { scope: 'alice' }))?.state, 'completed')
  t.equal((await app.idempotency.get('"k"', { scope: 'alice' }))?.state, 'completed', 'pasted from the header')
  t.equal(await app.idempotency.get('k'), null)
  t.equal(await app.idempotency.delete('k', { scope: 'alice' }), true)
  t.equal(await send(as('alice', '3')), 'ran')
  t.equal(await send(as('bob', '2')), 'replay')
})

t.test('nothing of a request reaches the store but hashes', async (t) => {
  const headers = {
    authorization: 'Bearer sesame',
    cookie: 'session=sesame',
    'x-api-key': 'sesame',
    'user-agent': 'sesame',
    'x-user': 'sesame'
  }
  for (const scope of [undefined, (request: FastifyRequest) => String(request.headers['x-user'])]) {
    const store = new MemoryStore()
    const written: string[] = []
    for (const name of ['acquire', 'complete'] as const) {
      const method = store[name].bind(store) as (...args: unknown[]) => Promise<never>
      store[name] = (...args: unknown[]) => {
        written.push(
          JSON.stringify(args, (_, value) => (value?.type === 'Buffer' ? String(Buffer.from(value)) : value))
        )
        t.match(args[0], /^[\w-]{43}$/)
        return method(...args)
      }
    }
    const app = await build(t, { store, ...(scope && { scope }) })
    app.post('/:id', { config: { idempotency: true } }, async () => 'the reply')
    const request = { method: 'POST' as const, url: '/sesame?q=sesame', payload: { card: 'sesame' } }
    await app.inject({ ...request, headers: { ...headers, ...key('a*../sesame') } })
    t.equal(written.length, 2)
    t.match(written[1], 'the reply')
    t.notMatch(written.join(), /sesame/)
  }
})

t.test('deriveKey gives the same UUID on every attempt, and another for another label, key or scope', async (t) => {
  const app = await build(t, { scope: (request) => String(request.headers['x-user']) })
  const derived: string[] = []
  app.post('/', { config: { idempotency: true } }, async (request, reply) => {
    derived.push(request.idempotency?.deriveKey('stripe') ?? '', request.idempotency?.deriveKey('mail') ?? '')
    return reply.code(500).send()
  })
  const as = (user: string, value: string) =>
    ({ method: 'POST', url: '/', headers: { 'x-user': user, ...key(value) } }) as const
  await app.inject(as('alice', 'k'))
  await app.inject(as('alice', 'k'))
  await app.inject(as('bob', 'k'))
  await app.inject(as('alice', 'l'))
  t.same(derived.slice(0, 2), derived.slice(2, 4))
  t.equal(new Set(derived).size, 6)
  for (const uuid of derived) t.match(uuid, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
})

t.test('request.idempotency tells a replay from a run', async (t) => {
  const app = await build(t)
  const seen: unknown[] = []
  app.addHook('onSend', async ({ idempotency }) => {
    seen.push(idempotency && [idempotency.key, idempotency.attempt, idempotency.replayed])
  })
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  for (const headers of [key('"k"'), key('k'), {}]) await app.inject({ method: 'POST', url: '/', headers })
  t.same(seen, [['k', 1, false], ['k', 0, true], null])
})
