import awsLambdaFastify, { type LambdaFastifyOptions, type LambdaResponse } from '@fastify/aws-lambda'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyStore, MemoryStore } from '../../index.js'
import { isReplay } from './kit.js'

/*
 * A function on AWS Lambda: events in, replies out, and nothing runs in between. What becomes of a process that is stopped in
 * the middle of a request is tried in faults/processes.test.ts.
 */

type Invoke = (event: object) => Promise<LambdaResponse>

/** One environment of a function; the store is that of all of them. */
async function environment(t: Test, store: IdempotencyStore, options: LambdaFastifyOptions = {}) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(idempotency, { store })
  const invoke = awsLambdaFastify(app, options) as unknown as (
    event: object,
    context: object
  ) => Promise<LambdaResponse>
  const state = { runs: 0 }
  app.post('/charges', { config: { idempotency: true } }, async ({ body }, reply) =>
    reply.code(201).send({ run: ++state.runs, body })
  )
  app.post('/receipts', { config: { idempotency: true } }, async (_request, reply) =>
    reply.type('application/pdf').send(Buffer.from([0, 255, 128, ++state.runs]))
  )
  return { app, state, invoke: ((event) => invoke(event, {})) as Invoke }
}

interface Sent {
  path?: string
  key?: string
  body?: string
  base64?: boolean
}

const EVENTS: Record<string, (sent: Sent) => object> = {
  'of an HTTP API': ({ path = '/charges', key = 'k', body = '{"amount":1}', base64 = false }) => ({
    version: '2.0',
    rawPath: path,
    headers: { host: 'api.example.com', 'content-type': 'application/json', 'idempotency-key': key },
    requestContext: { http: { method: 'POST' }, requestId: Math.random().toString() },
    body: base64 ? Buffer.from(body).toString('base64') : body,
    isBase64Encoded: base64
  }),
  'of a REST API': ({ path = '/charges', key = 'k', body = '{"amount":1}', base64 = false }) => ({
    httpMethod: 'POST',
    path,
    headers: { Host: 'api.example.com', 'Content-Type': 'application/json', 'Idempotency-Key': key },
    multiValueHeaders: { 'Idempotency-Key': [key] },
    requestContext: { requestId: Math.random().toString() },
    body: base64 ? Buffer.from(body).toString('base64') : body,
    isBase64Encoded: base64
  })
}

for (const [kind, eventOf] of Object.entries(EVENTS)) {
  t.test(`an event ${kind}`, async (t) => {
    t.test('what an invocation has answered another environment replays', async (t) => {
      const store = new MemoryStore()
      const [one, other] = [await environment(t, store), await environment(t, store)]
      const first = await one.invoke(eventOf({}))
      t.match(first, { statusCode: 201, body: '{"run":1,"body":{"amount":1}}' })
      t.notOk(isReplay(first))
      for (const { invoke } of [other, one]) {
        const replay = await invoke(eventOf({}))
        t.ok(isReplay(replay))
        t.same([replay.statusCode, replay.body], [first.statusCode, first.body])
      }
      t.same([one.state.runs, other.state.runs], [1, 0])
    })

    t.test(
      'a reply is stored when its invocation is over, so that nothing is left to be done in a freeze',
      async (t) => {
        const { app, invoke } = await environment(t, new MemoryStore())
        await invoke(eventOf({}))
        t.equal((await app.idempotency.get('k'))?.state, 'completed')
      }
    )

    t.test('a body is the same in base64 and in clear, and another one is not', async (t) => {
      const { invoke } = await environment(t, new MemoryStore())
      const first = await invoke(eventOf({ base64: true }))
      t.equal(first.statusCode, 201)
      const replay = await invoke(eventOf({ base64: false }))
      t.same([isReplay(replay), replay.body], [true, first.body])
      t.equal((await invoke(eventOf({ base64: true, body: '{"amount":2}' }))).statusCode, 422)
    })

    t.test('a binary reply is replayed byte for byte, in base64', async (t) => {
      const { invoke } = await environment(t, new MemoryStore(), { binaryMimeTypes: ['application/pdf'] })
      const first = await invoke(eventOf({ path: '/receipts' }))
      const replay = await invoke(eventOf({ path: '/receipts' }))
      t.ok(isReplay(replay))
      t.match(first, { isBase64Encoded: true, body: Buffer.from([0, 255, 128, 1]).toString('base64') })
      t.same([replay.isBase64Encoded, replay.body], [first.isBase64Encoded, first.body])
    })
  })
}

t.test('two values of the key in one event are refused', async (t) => {
  const { invoke } = await environment(t, new MemoryStore())
  const event = { httpMethod: 'POST', path: '/charges', multiValueHeaders: { 'Idempotency-Key': ['a', 'b'] } }
  t.equal((await invoke(event)).statusCode, 422)
})
