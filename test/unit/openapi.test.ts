import type { RouteOptions } from 'fastify'
import t from 'tap'
import { openapiTransform, type RouteDocumentation } from '../../lib/openapi.js'
import type { Policy } from '../../lib/options.js'
import { cover } from '../../lib/routes/covered-routes.js'

type Json = Record<string, unknown>

const POLICY = {
  headerName: 'Idempotency-Key',
  header: 'idempotency-key',
  field: null,
  getKey: null,
  ttl: 86_400_000,
  replayHeaderName: 'Idempotent-Replayed',
  required: true,
  methods: null,
  keyFormat: 'any',
  maxKeyLength: 255,
  problemDetails: false,
  documentationUrl: null,
  reruns: true
}

/** What becomes of a route's schema. */
function documented(schema: Json | undefined, policy: object = {}, dialect: 'openapi' | 'swagger' = 'openapi'): Json {
  const route = { url: '/', config: {} } as unknown as RouteOptions
  cover(route, { ...POLICY, ...policy } as unknown as Policy)
  const input = { schema, url: '/', route, [`${dialect}Object`]: {} } as unknown as RouteDocumentation
  return openapiTransform(input).schema as Json
}

const responses = (schema: Json | undefined, policy?: object, dialect?: 'openapi' | 'swagger') =>
  documented(schema, policy, dialect).response as Record<string, Json>

const RETRY = { 'Retry-After': { type: 'integer', description: 'Seconds after which a retry makes sense' } }
const MARK = {
  'Idempotent-Replayed': {
    type: 'boolean',
    description: '`true` on a reply that was given before to a request with the same key'
  }
}
const ERROR = {
  type: 'object',
  required: ['statusCode', 'code', 'error', 'message'],
  properties: {
    statusCode: { type: 'integer' },
    code: { type: 'string' },
    error: { type: 'string' },
    message: { type: 'string' }
  }
}
const PROBLEM = {
  type: 'object',
  required: ['type', 'title', 'status', 'detail', 'code'],
  properties: {
    type: { type: 'string', format: 'uri-reference' },
    title: { type: 'string' },
    status: { type: 'integer' },
    detail: { type: 'string' },
    code: { type: 'string' }
  }
}
const DESCRIPTIONS = {
  400: 'There is no idempotency key (`FST_IDEMPOTENCY_KEY_MISSING`)',
  409:
    'The first request with this key is still in progress (`FST_IDEMPOTENCY_IN_PROGRESS`), or ' +
    'its reply could not be kept (`FST_IDEMPOTENCY_NOT_REPLAYABLE`)',
  422:
    'The idempotency key is not valid (`FST_IDEMPOTENCY_KEY_INVALID`), ' +
    'or was used with another request (`FST_IDEMPOTENCY_KEY_REUSED`)',
  503: 'The idempotency store is not available (`FST_IDEMPOTENCY_STORE_UNAVAILABLE`)'
}

t.test('all that is added to a route without a schema', async (t) => {
  const content = { 'application/json': { schema: ERROR } }
  t.strictSame(documented(undefined), {
    description:
      'Requests can be retried with the same idempotency key (in the header `Idempotency-Key`): a retry gets the ' +
      'first reply again, marked with `Idempotent-Replayed: true`. Keys expire 24 hours after the reply to the first ' +
      'request. A key is required.',
    response: {
      200: { description: 'Default Response', type: 'null', headers: MARK },
      400: { description: DESCRIPTIONS[400], content },
      409: { description: DESCRIPTIONS[409], headers: RETRY, content },
      422: { description: DESCRIPTIONS[422], content },
      503: { description: DESCRIPTIONS[503], headers: RETRY, content }
    },
    headers: {
      type: 'object',
      properties: {
        'Idempotency-Key': {
          type: 'string',
          description:
            'A new key for each operation, the same for its retries. At most 255 bytes. ' +
            'Keys expire 24 hours after the reply to the first request.',
          minLength: 1,
          maxLength: 255
        }
      },
      required: ['Idempotency-Key']
    }
  })
})

t.test('the same with problem documents', async (t) => {
  const headers = { Link: { type: 'string', description: 'Where these errors are documented' } }
  const content = { 'application/problem+json': { schema: PROBLEM } }
  t.strictSame(responses(undefined, { problemDetails: true, documentationUrl: 'https://docs.example' }), {
    200: { description: 'Default Response', type: 'null', headers: MARK },
    400: { description: DESCRIPTIONS[400], headers, content },
    409: { description: DESCRIPTIONS[409], headers: { ...RETRY, ...headers }, content },
    422: { description: DESCRIPTIONS[422], headers, content },
    503: { description: DESCRIPTIONS[503], headers: { ...RETRY, ...headers }, content }
  })
})

t.test('the same in Swagger 2.0, where replies have one schema', async (t) => {
  for (const problemDetails of [false, true]) {
    t.strictSame(responses(undefined, { problemDetails }, 'swagger'), {
      200: { description: 'Default Response', type: 'null', headers: MARK },
      400: { description: DESCRIPTIONS[400], ...ERROR },
      409: { description: DESCRIPTIONS[409], headers: RETRY, ...ERROR },
      422: { description: DESCRIPTIONS[422], ...ERROR },
      503: { description: DESCRIPTIONS[503], headers: RETRY, ...ERROR }
    })
  }
})

t.test('how long keys are kept is said in the largest unit that needs no fraction', async (t) => {
  for (const [ttl, words] of [
    [null, 'Keys do not expire. '],
    [0.5, 'Keys expire 0.5 milliseconds after'],
    [1, 'Keys expire 1 millisecond after'],
    [1_500, 'Keys expire 1500 milliseconds after'],
    [1_000, 'Keys expire 1 second after'],
    [90_000, 'Keys expire 90 seconds after'],
    [60_000, 'Keys expire 1 minute after'],
    [120_000, 'Keys expire 2 minutes after'],
    [3_600_000, 'Keys expire 1 hour after'],
    [86_400_000, 'Keys expire 24 hours after'],
    [172_800_000, 'Keys expire 2 days after']
  ] as const) {
    t.match(documented({}, { ttl }).description, words)
  }
})

t.test('a quoted key is said to be one', async (t) => {
  const { headers } = documented({}, { keyFormat: 'structured' }) as { headers: { properties: Record<string, Json> } }
  t.match(headers.properties['Idempotency-Key'], {
    description: /At most 255 bytes, quotes aside\. Keys/,
    minLength: 3,
    maxLength: 257,
    pattern: '^"[ -~]+"'
  })
})

t.test('headers whose properties are elsewhere are combined with the key, others are added to', async (t) => {
  for (const keyword of ['$ref', 'allOf', 'anyOf', 'oneOf']) {
    const theirs = { [keyword]: [] }
    const { allOf } = documented({ headers: theirs }).headers as { allOf: Json[] }
    t.equal(allOf[0], theirs)
    t.match(allOf[1], {
      type: 'object',
      properties: { 'Idempotency-Key': { type: 'string' } },
      required: ['Idempotency-Key']
    })
    const both = { [keyword]: [], properties: { a: {} } }
    t.match(documented({ headers: both }).headers, { [keyword]: [], properties: { a: {}, 'Idempotency-Key': {} } })
  }
})

t.test('a header that the route knows under another case is required once', async (t) => {
  const headers = {
    type: 'object',
    properties: { 'idempotency-KEY': { minLength: 5 } },
    required: ['idempotency-KEY', 'other']
  }
  t.match(documented({ headers }).headers, {
    properties: { 'idempotency-KEY': { type: 'string', minLength: 5 } },
    required: ['other', 'idempotency-KEY']
  })
  t.equal((documented({ headers }).headers as { required: string[] }).required.length, 2)
})

t.test('only replies that succeed are marked as replays', async (t) => {
  const reply = { type: 'object' }
  const theirs = { 201: reply, 302: reply, '2xx': reply, 422: reply, 404: reply, 523: reply, default: reply }
  const marked = Object.entries(responses({ response: theirs })).filter(
    ([, { headers }]) => headers && 'Idempotent-Replayed' in (headers as Json)
  )
  t.strictSame(
    marked.map(([status]) => status),
    ['201', '302', '2xx']
  )
})

t.test('errors look as the route says of all of their kind, whatever its case, and mean what they mean', async (t) => {
  for (const kind of ['4xx', '4XX', 'default']) {
    for (const [reply, name] of [
      [{ type: 'object' }, 'x-response-description'],
      [{ content: {} }, 'description'],
      [{ $ref: 'e#' }, 'description']
    ] as const) {
      const { 409: conflict, 422: reused } = responses({ response: { 200: {}, [kind]: reply } })
      t.strictSame(conflict, { ...reply, [name]: DESCRIPTIONS[409], headers: RETRY })
      t.strictSame(reused, { ...reply, [name]: DESCRIPTIONS[422] })
    }
  }
})

t.test("a route's own headers of an error stay", async (t) => {
  const { 409: conflict } = responses({
    response: { 200: {}, '4xx': { headers: { 'Retry-After': { type: 'string' }, x: {} } } }
  })
  t.match(conflict?.headers, { 'Retry-After': { type: 'string' }, x: {} })
})

t.test('a reply that the route describes itself stays, beside a problem document', async (t) => {
  const problems = { problemDetails: true }
  const own = { 'text/plain': { schema: { type: 'string' } } }
  const problem = { 'application/problem+json': { schema: PROBLEM } }
  const conflictOf = (reply: unknown, schema: Json = {}) =>
    responses({ response: { 200: {}, 409: reply }, ...schema }, problems)[409]
  t.match(conflictOf({ description: 'mine', content: own }), { description: 'mine', content: { ...problem, ...own } })
  const plain = { type: 'object', description: 'theirs', 'x-response-description': 'mine' }
  t.strictSame(conflictOf(plain)?.content, { ...problem, 'application/json': { schema: plain } })
  t.equal(conflictOf(plain)?.description, 'mine')
  t.strictSame(conflictOf(plain, { produces: ['a/b', 'c/d'] })?.content, {
    ...problem,
    'a/b': { schema: plain },
    'c/d': { schema: plain }
  })
  t.strictSame(conflictOf(plain, { produces: [] })?.content, { ...problem, 'application/json': { schema: plain } })
})

t.test('where a route validates, a 400 may also be an error of Fastify', async (t) => {
  const both = ['application/problem+json', 'application/json']
  for (const part of ['body', 'params', 'querystring', 'headers']) {
    const { 400: missing, 409: conflict } = responses({ [part]: { type: 'object' } }, { problemDetails: true })
    t.strictSame(Object.keys(missing?.content as Json), both, part)
    t.match(missing?.content, { 'application/json': { schema: ERROR } })
    t.strictSame(Object.keys(conflict?.content as Json), both.slice(0, 1))
  }
})

t.test('schemas of another make, which a transform would have to translate, stay as they are', async (t) => {
  class Zod {}
  for (const reply of [new Zod(), null, 'text']) {
    const { 200: ok, 409: conflict, 422: reused } = responses({ response: { 200: reply, 409: reply, '4xx': reply } })
    t.equal(ok, reply)
    // What is null is not there.
    if (reply !== null) t.same([conflict, reused], [reply, reply])
    const problems = responses({ response: { 200: reply, 409: reply } }, { problemDetails: true })
    t.strictSame(problems[409]?.content, { 'application/problem+json': { schema: PROBLEM } })
    t.equal(problems[409]?.description, DESCRIPTIONS[409])
  }
  const bare = Object.assign(Object.create(null), { type: 'object' })
  t.match(responses({ response: { 200: bare } })[200], { type: 'object', headers: MARK })
})
