import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyError, FastifyReply } from 'fastify'
import t from 'tap'
import type { IdempotencyOptions, IdempotencyStore } from '../../index.js'
import { MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { latch } from '../support/latch.js'

/* How the plugin's own errors look: each of them, with and without `problemDetails` and `documentationUrl`. */

type Tap = { teardown(fn: () => unknown): void }

const DOCS = 'https://example.com/errors'
const LINK = `<${DOCS}>; rel="describedby"`

const post = (key?: string, url = '/') => ({
  method: 'POST' as const,
  url,
  headers: key === undefined ? {} : { 'idempotency-key': key }
})

const fail = () => Promise.reject(new Error('down'))
const down: IdempotencyStore = { acquire: fail, renew: fail, complete: fail, release: fail }

/** Every refusal, as a client gets it. */
async function refusals(t: Tap, options: IdempotencyOptions) {
  const memory = new MemoryStore()
  const store: IdempotencyStore = {
    acquire: (key, claim) =>
      key === storageKey(null, 'down') ? Promise.reject(new Error('down')) : memory.acquire(key, claim),
    renew: (...args) => memory.renew(...args),
    complete: (...args) => memory.complete(...args),
    release: (...args) => memory.release(...args)
  }
  const app = await build(t, { store, onAbandoned: 'reject', maxReplySize: 10, ...options })
  const [entered, leave] = [latch(), latch()]
  app.post('/', { config: { idempotency: { required: true } } }, async (request) => {
    if (request.idempotency?.key !== 'runs') return request.idempotency?.key === 'large' ? 'x'.repeat(11) : 'x'
    entered.open()
    await leave.promise
    return 'x'
  })
  app.post('/nobody', { config: { idempotency: { scope: () => '' } } }, async () => 'x')
  const dead = { token: 'dead', fingerprint: '', leaseMs: 1, retainMs: 60_000, takeover: true }
  await memory.acquire(storageKey(null, 'dies'), dead)
  for (const key of ['done', 'large']) await app.inject(post(key))
  const running = inject(app, post('runs'))
  await entered.promise
  const replies = {
    KEY_MISSING: await app.inject(post()),
    KEY_INVALID: await app.inject(post(',')),
    KEY_REUSED: await app.inject(post('done', '/?other')),
    IN_PROGRESS: await app.inject(post('runs')),
    NOT_REPLAYABLE: await app.inject(post('large')),
    ABANDONED: await app.inject(post('dies')),
    STORE_UNAVAILABLE: await app.inject(post('down')),
    SCOPE: await app.inject(post('k', '/nobody'))
  }
  leave.open()
  await running
  return { app, replies }
}

const STATUSES: Record<keyof Awaited<ReturnType<typeof refusals>>['replies'], [status: number, title: string]> = {
  KEY_MISSING: [400, 'Bad Request'],
  KEY_INVALID: [422, 'Unprocessable Entity'],
  KEY_REUSED: [422, 'Unprocessable Entity'],
  IN_PROGRESS: [409, 'Conflict'],
  NOT_REPLAYABLE: [409, 'Conflict'],
  ABANDONED: [409, 'Conflict'],
  STORE_UNAVAILABLE: [503, 'Service Unavailable'],
  SCOPE: [500, 'Internal Server Error']
}

for (const problemDetails of [false, true]) {
  for (const documentationUrl of [undefined, DOCS]) {
    const how = [problemDetails && 'problemDetails', documentationUrl && 'documentationUrl']
      .filter(Boolean)
      .join(' and ')
    t.test(`each error with ${how || 'neither problemDetails nor documentationUrl'}`, async (t) => {
      const options = { problemDetails, ...(documentationUrl && { documentationUrl }) }
      const { replies } = await refusals(t, options)
      for (const [name, [status, title]] of Object.entries(STATUSES)) {
        const { statusCode, headers, body } = replies[name as keyof typeof replies]
        const code = `FST_IDEMPOTENCY_${name}`
        t.equal(statusCode, status, name)
        t.equal(headers.link, documentationUrl && LINK, `${name}: Link`)
        const waits = name === 'IN_PROGRESS' || name === 'STORE_UNAVAILABLE'
        t.match(headers['retry-after'] ?? 'none', waits ? /^[1-9]\d*$/ : /^none$/, `${name}: Retry-After`)
        const told = JSON.parse(body)
        if (problemDetails) {
          t.equal(headers['content-type'], 'application/problem+json', name)
          const { detail, ...members } = told
          t.same(members, { type: documentationUrl ?? 'about:blank', title, status, code }, name)
          t.type(detail, 'string')
        } else {
          t.match(headers['content-type'], /^application\/json/, name)
          const { message, ...members } = told
          t.same(members, { statusCode: status, code, error: title }, name)
        }
      }
    })
  }
}

t.test('the Link comes alone, or behind all that the reply has already', async (t) => {
  for (const there of [[], ['</a>; rel="next"'], ['</a>; rel="next"', '</b>; rel="prev"']]) {
    const app = await build(t, { required: true, documentationUrl: DOCS })
    app.addHook('onRequest', async (_request, reply) => {
      if (there.length > 0) reply.header('link', there.length > 1 ? there : there[0])
    })
    app.post('/', { config: { idempotency: true } }, async () => 'x')
    t.equal((await app.inject(post())).headers.link, [...there, LINK].join(', '))
  }
})

t.test('problem details are whole, whatever schema the route has for its errors', async (t) => {
  const schema = { response: { '4xx': { type: 'object', properties: { message: { type: 'string' } } } } }
  const app = await build(t, { required: true, problemDetails: true })
  app.post('/', { schema, config: { idempotency: true } }, async () => 'x')
  const { headers, body } = await app.inject(post())
  t.equal(headers['content-length'], String(Buffer.byteLength(body)))
  t.match(JSON.parse(body), { title: 'Bad Request', status: 400, code: 'FST_IDEMPOTENCY_KEY_MISSING', detail: /./ })
})

t.test(
  'an error handler that passes the error on has problem details, one that answers itself has its way',
  async (t) => {
    const app = await build(t, { required: true, problemDetails: true })
    let handle: (error: FastifyError, reply: FastifyReply) => unknown = () => {}
    app.setErrorHandler((error: FastifyError, _request, reply) => handle(error, reply))
    app.post('/', { config: { idempotency: true } }, async () => 'x')
    const refused = () => app.inject(post())
    handle = (error, reply) => reply.send(error)
    t.equal((await refused()).headers['content-type'], 'application/problem+json')
    handle = () => {
      throw new Error('mine')
    }
    t.match((await refused()).json(), { statusCode: 500, message: 'mine' })
    handle = (_error, reply) => reply.code(418).send(new Error('mine'))
    t.match((await refused()).json(), { statusCode: 418, message: 'mine' })
    handle = (error, reply) => {
      reply.log.error(error)
      return reply.code(400).header('content-length', 13).type('application/json').send('{"mine":true}')
    }
    t.same((await refused()).json(), { mine: true })
  }
)

t.test(
  "what is not the plugin's own error has no Link of the plugin: replies, replays, errors of others",
  async (t) => {
    const app = await build(t, { documentationUrl: DOCS, problemDetails: true })
    app.post('/', { config: { idempotency: true } }, async () => 'x')
    app.post('/boom', { config: { idempotency: true } }, async () => Promise.reject(new Error('boom')))
    const replies = [await app.inject(post('k')), await app.inject(post('k')), await app.inject(post('b', '/boom'))]
    t.same(
      replies.map(({ statusCode, headers }) => [statusCode, headers.link, headers[REPLAYED]]),
      [
        [200, undefined, undefined],
        [200, undefined, 'true'],
        [500, undefined, undefined]
      ]
    )
    t.match(replies[2]?.headers['content-type'], /^application\/json/)
  }
)

t.test("an error handler of the application's own finds Link and Retry-After on the reply", async (t) => {
  const app = await build(t, { documentationUrl: DOCS, problemDetails: true, store: down })
  app.setErrorHandler((error: FastifyError, _request, reply) => reply.code(503).send({ mine: error.code }))
  app.post('/', { config: { idempotency: true } }, async () => 'x')
  const { headers, body } = await app.inject(post('k'))
  t.same(JSON.parse(body), { mine: 'FST_IDEMPOTENCY_STORE_UNAVAILABLE' })
  t.same([headers.link, headers['retry-after']], [LINK, '2'])
})

t.test('an error before the handler gives the key back before it leaves, as problem details too', async (t) => {
  for (const problemDetails of [false, true]) {
    const store = new MemoryStore()
    const release = store.release.bind(store)
    let released = false
    store.release = async (...args) => {
      await sleep(20)
      released = await release(...args)
      return released
    }
    const options = { hook: 'onRequest', fingerprint: (() => 1) as never } as const
    const app = await build(t, { store, problemDetails, ...options })
    app.post('/', { config: { idempotency: true } }, async () => 'x')
    const { statusCode, headers, body } = await app.inject(post('k'))
    t.same([statusCode, JSON.parse(body).code, released], [500, 'FST_IDEMPOTENCY_INVALID_OPTION', true])
    t.match(headers['content-type'], problemDetails ? /^application\/problem/ : /^application\/json/)
  }
})

t.test('a route may have a page of its own', async (t) => {
  const app = await build(t, { required: true, documentationUrl: DOCS })
  const documentationUrl = 'https://example.com/refunds'
  app.post('/', { config: { idempotency: { documentationUrl, problemDetails: true } } }, async () => 'x')
  const refused = await app.inject(post())
  t.same([refused.headers.link, refused.json().type], [`<${documentationUrl}>; rel="describedby"`, documentationUrl])
})
