import swagger, { type FastifyDynamicSwaggerOptions } from '@fastify/swagger'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import { Validator } from '@seriousme/openapi-schema-validator'
import Fastify, { type FastifyInstance, type FastifySchema } from 'fastify'
import { jsonSchemaTransform, serializerCompiler, validatorCompiler } from 'fastify-type-provider-zod'
import t, { type Test } from 'tap'
import { Type } from 'typebox'
import { z } from 'zod'
import idempotency, { type IdempotencyOptions, type IdempotencyRouteConfig, openapiTransform } from '../../index.js'
import { isReplay, orders, post, register } from './kit.js'

const validator = new Validator()

const VERSIONS = ['3.0.3', '3.1.0'] as const

type Transform = NonNullable<FastifyDynamicSwaggerOptions['transform']>
type Json = Record<string, unknown>

interface Operation {
  description?: string
  parameters?: { name: string; in: string; required: boolean; description?: string; schema: Json }[]
  responses: Record<string, { description: string; headers?: Record<string, Json>; content?: Record<string, Json> }>
}

interface Setup {
  options?: IdempotencyOptions
  version?: string
  transform?: Transform
}

/** An app with both plugins. What it declares, `operation` shows, in a document that is valid. */
async function documented(t: Test, { options = {}, version = '3.1.0', transform = openapiTransform }: Setup = {}) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(swagger, { openapi: { openapi: version, info: { title: 'A', version: '1' } }, transform })
  await app.register(idempotency, options)
  return app
}

async function documentOf(t: Test, app: FastifyInstance) {
  await app.ready()
  const document = app.swagger() as unknown as { openapi: string; paths: Record<string, Record<string, Operation>> }
  const { valid, errors } = await validator.validate(structuredClone(document) as never)
  t.ok(valid, `a valid ${document.openapi} document`, { errors })
  return document
}

async function operationOf(t: Test, app: FastifyInstance, url = '/', method = 'post'): Promise<Operation> {
  const operation = (await documentOf(t, app)).paths[url]?.[method]
  if (operation === undefined) throw new Error(`${method} ${url} is not documented`)
  return operation
}

/** What is documented of one route. */
async function shown(
  t: Test,
  config: IdempotencyRouteConfig | undefined,
  schema?: FastifySchema,
  setup?: Setup
): Promise<Operation> {
  const app = await documented(t, setup)
  app.post(
    '/',
    { ...(schema && { schema }), ...(config !== undefined && { config: { idempotency: config } }) },
    handler
  )
  return operationOf(t, app)
}

const handler = async () => ({ id: 'a' })

const header = ({ parameters = [] }: Operation) => parameters.filter((parameter) => parameter.in === 'header')

/* The header of the key */

t.test('a covered route shows the header of its key, with its limits', async (t) => {
  for (const version of VERSIONS) {
    const operation = await shown(t, true, undefined, { version })
    t.match(header(operation), [
      { name: 'Idempotency-Key', required: false, schema: { type: 'string', minLength: 1, maxLength: 255 } }
    ])
    t.equal(header(operation).length, 1)
    t.match(header(operation)[0]?.description, /255 bytes.*expire 24 hours after/s)
  }
})

t.test('the header is named and limited as the route has it, over what the plugin has', async (t) => {
  const options = { header: 'X-Request-Key', keyFormat: 'uuid', required: true, maxKeyLength: 64 } as const
  t.match(header(await shown(t, true, undefined, { options })), [
    { name: 'X-Request-Key', required: true, schema: { type: 'string', format: 'uuid', maxLength: 64 } }
  ])
  const own = { header: 'X-Own', keyFormat: 'any', required: false, maxKeyLength: 10 } as const
  const [parameter] = header(await shown(t, own, undefined, { options }))
  t.match(parameter, { name: 'X-Own', required: false, schema: { maxLength: 10 } })
  t.notOk(parameter?.schema.format)
})

t.test('a quoted key has room for its quotes, and a pattern', async (t) => {
  const [parameter] = header(await shown(t, { keyFormat: 'structured', maxKeyLength: 10 }))
  t.match(parameter?.schema, { minLength: 3, maxLength: 12 })
  const pattern = new RegExp(parameter?.schema.pattern as string)
  t.match('"abc"', pattern)
  t.notMatch('abc', pattern)
})

t.test('an expression is the pattern of the header, unless a schema cannot say it', async (t) => {
  const patternOf = async (keyFormat: RegExp) => header(await shown(t, { keyFormat }))[0]?.schema.pattern
  t.equal(await patternOf(/^ord_[0-9]+$/), '^ord_[0-9]+$')
  t.equal(await patternOf(/^ord_[0-9]+$/u), '^ord_[0-9]+$')
  t.equal(await patternOf(/^ord_[0-9]+$/i), undefined)
  // An expression that is none where all of them are read as with the flag u.
  t.equal(await patternOf(/^[\w-.]+$/), undefined)
})

t.test('the header is added to those that the route describes itself', async (t) => {
  const headers = { type: 'object', properties: { 'x-tenant': { type: 'string' } }, required: ['x-tenant'] }
  const operation = await shown(t, { required: true }, { headers })
  t.match(
    header(operation).map(({ name, required }) => [name, required]),
    [
      ['x-tenant', true],
      ['Idempotency-Key', true]
    ]
  )
})

t.test('a description of the header that the route has already is kept, and completed', async (t) => {
  const own = { type: 'string', description: 'Our own words', maxLength: 40 }
  const headers = { type: 'object', properties: { 'idempotency-key': own } }
  t.match(header(await shown(t, { required: true }, { headers })), [
    { name: 'idempotency-key', required: true, description: 'Our own words', schema: { minLength: 1, maxLength: 40 } }
  ])
})

t.test('the header is added to headers without properties, and to composed and shared ones', async (t) => {
  const tenant = { type: 'object', properties: { 'x-tenant': { type: 'string' } }, required: ['x-tenant'] }
  const forms: [name: string, headers: object, others: unknown[]][] = [
    ['none', { type: 'object' }, []],
    ['allOf', { allOf: [tenant] }, [['x-tenant', true]]],
    ['a reference', { $ref: 'tenant#' }, [['x-tenant', true]]]
  ]
  for (const version of VERSIONS) {
    for (const [name, headers, others] of forms) {
      const app = await documented(t, { version })
      app.addSchema({ $id: 'tenant', ...tenant })
      for (const required of [true, false]) {
        app.post(`/${required}`, { schema: { headers }, config: { idempotency: { required } } }, handler)
      }
      for (const required of [true, false]) {
        const found = header(await operationOf(t, app, `/${required}`)).map(({ name, required }) => [name, required])
        t.same(found, [...others, ['Idempotency-Key', required]], name)
      }
    }
  }
})

t.test('a key that may be elsewhere is not a required header, and words say where', async (t) => {
  const options = { field: '__key', required: true }
  const form = await shown(t, options)
  t.match(header(form), [{ name: 'Idempotency-Key', required: false }])
  t.match(form.description, /header `Idempotency-Key` or the field `__key`/)
  const field = await shown(t, { ...options, header: false })
  t.same(header(field), [])
  t.match(field.description, /field `__key`/)
  const own = await shown(t, { getKey: () => 'k', required: true })
  t.same(header(own), [])
})

/* How long keys are kept */

t.test('how long keys are kept is said in words, behind the words of the route', async (t) => {
  const times: [ttl: number | null, words: RegExp][] = [
    [86_400_000, /Keys expire 24 hours after the reply to the first request\./],
    [604_800_000, /expire 7 days after/],
    [3_600_000, /expire 1 hour after/],
    [90_000, /expire 90 seconds after/],
    [1_500, /expire 1500 milliseconds after/],
    [null, /do not expire/]
  ]
  for (const [ttl, words] of times) {
    const { description } = await shown(t, { ttl }, { description: 'Charges a card.' } as FastifySchema)
    t.match(description, words)
    t.match(description, /^Charges a card\.\n\n/)
  }
  t.match((await shown(t, true)).description, /^Requests can be retried.*`Idempotent-Replayed: true`.*Without a key/s)
  t.match((await shown(t, { required: true })).description, /A key is required/)
})

/* Replies */

t.test('a covered route shows the errors of the plugin, in the shape of Fastify', async (t) => {
  for (const version of VERSIONS) {
    const { responses } = await shown(t, { required: true }, undefined, { version })
    t.same(Object.keys(responses), ['200', '400', '409', '422', '503'])
    const codes = {
      400: /KEY_MISSING/,
      409: /IN_PROGRESS.*NOT_REPLAYABLE/,
      422: /KEY_INVALID.*KEY_REUSED/,
      503: /STORE_UN/
    }
    for (const [status, code] of Object.entries(codes)) {
      const { description, content } = responses[status] as Operation['responses'][string]
      t.match(description, code)
      t.same(Object.keys(content ?? {}), ['application/json'])
      t.match(content?.['application/json'], { schema: { properties: { code: { type: 'string' }, statusCode: {} } } })
    }
    for (const status of ['409', '503'])
      t.match(responses[status]?.headers, { 'Retry-After': { schema: { type: 'integer' } } })
    t.notOk(responses['422']?.headers)
  }
})

t.test('a key that is not required is not missed, and an outcome is unknown only where that is refused', async (t) => {
  const { responses } = await shown(t, true)
  t.notOk(responses['400'])
  t.notMatch(responses['409']?.description, /ABANDONED/)
  const careful = await shown(t, { onAbandoned: 'reject' })
  t.match(careful.responses['409']?.description, /ABANDONED/)
})

t.test('with problemDetails the errors are problem documents, and link to their documentation', async (t) => {
  const options = { problemDetails: true, documentationUrl: 'https://example.com/errors', required: true }
  for (const version of VERSIONS) {
    const { responses } = await shown(t, options, undefined, { version })
    for (const status of ['400', '409', '422', '503']) {
      const { content, headers } = responses[status] as Operation['responses'][string]
      t.same(Object.keys(content ?? {}), ['application/problem+json'])
      t.match(content?.['application/problem+json'], { schema: { properties: { type: {}, title: {}, detail: {} } } })
      t.match(headers, { Link: { schema: { type: 'string' } } })
    }
  }
  const body = { type: 'object' }
  const { responses } = await shown(t, options, { body })
  const types = Object.keys(responses['400']?.content ?? {}).sort()
  t.same(types, ['application/json', 'application/problem+json'], 'validation still answers as Fastify does')
})

t.test('a reply that the route describes itself stays as it is, but for another media type', async (t) => {
  const own = { type: 'object', description: 'The card was declined', properties: { reason: { type: 'string' } } }
  const schema = { response: { 201: { type: 'object' }, 409: own } }
  const plain = await shown(t, true, schema)
  t.match(plain.responses['409'], {
    description: 'The card was declined',
    content: { 'application/json': { schema: { properties: { reason: {} } } } }
  })
  t.notOk(plain.responses['200'], 'no reply that the route does not give')
  const { responses } = await shown(t, { problemDetails: true }, schema)
  t.match(responses['409'], {
    description: 'The card was declined',
    content: {
      'application/json': { schema: { properties: { reason: {} } } },
      'application/problem+json': { schema: { properties: { detail: {} } } }
    }
  })
})

t.test('errors look as the route says of all of their kind, because Fastify serialises them so', async (t) => {
  const kind = { type: 'object', properties: { message: { type: 'string' } } }
  for (const version of VERSIONS) {
    for (const response of [
      { '4xx': kind },
      { '4XX': kind },
      { default: kind },
      { '4xx': { $ref: 'kind#' } }
    ] as const) {
      const app = await documented(t, { version })
      app.addSchema({ $id: 'kind', ...kind })
      app.post('/', { schema: { response }, config: { idempotency: true } }, handler)
      const { responses } = await operationOf(t, app)
      t.match(responses['409']?.description, /IN_PROGRESS/)
      t.match(responses['409']?.headers, { 'Retry-After': {} })
      const content = responses['409']?.content?.['application/json']
      t.match(content, '$ref' in (Object.values(response)[0] as object) ? { schema: { $ref: /./ } } : { schema: kind })
    }
  }
})

t.test('the mark of a replay is on every reply that succeeds, and on no other', async (t) => {
  const response = {
    200: { type: 'object', headers: { 'x-own': { type: 'string' } } },
    '2xx': { type: 'null' },
    303: { description: 'See other', type: 'null' },
    404: { type: 'object' }
  }
  const { responses } = await shown(t, true, { response })
  const marked = Object.keys(responses).filter((status) => responses[status]?.headers?.['Idempotent-Replayed'])
  t.same(marked, ['200', '303', '2XX'])
  t.match(responses['200']?.headers, { 'x-own': {}, 'Idempotent-Replayed': { schema: { type: 'boolean' } } })
  const undeclared = await shown(t, true)
  t.ok(undeclared.responses['200']?.headers?.['Idempotent-Replayed'])
  t.notOk(undeclared.responses['200']?.content)
  const renamed = await shown(t, { replayHeader: 'X-Again' })
  t.same(Object.keys(renamed.responses['200']?.headers ?? {}), ['X-Again'])
  t.match(renamed.description, /`X-Again: true`/)
  const none = await shown(t, { replayHeader: false })
  t.notOk(none.responses['200']?.headers)
  const other = await shown(t, true, { response: { default: { type: 'object' } } })
  t.ok(other.responses.default?.headers?.['Idempotent-Replayed'])
})

t.test('a reply for all the rest is marked only where no other one succeeds', async (t) => {
  const { responses } = await shown(t, true, { response: { 200: { type: 'object' }, default: { type: 'object' } } })
  t.ok(responses['200']?.headers?.['Idempotent-Replayed'])
  t.notOk(responses.default?.headers?.['Idempotent-Replayed'])
})

t.test('words say where the key is, and how a replay is told, as far as it is known', async (t) => {
  for (const [config, words] of [
    [
      true,
      'key (in the header `Idempotency-Key`): a retry gets the first reply again, marked with `Idempotent-Replayed: true`.'
    ],
    [{ field: 'k' }, 'key (in the header `Idempotency-Key` or the field `k` of the query or the body): a retry'],
    [{ header: false, field: 'k' }, 'key (in the field `k` of the query or the body): a retry'],
    [{ getKey: () => 'a' }, 'key: a retry'],
    [{ getKey: () => 'a', field: 'k' }, 'key: a retry'],
    [{ replayHeader: false }, 'a retry gets the first reply again. Keys']
  ] as [IdempotencyRouteConfig, string][]) {
    const { description } = await shown(t, config)
    t.ok(description?.includes(words), words)
  }
})

t.test('a problem document is the only form of an error that Fastify itself never sends', async (t) => {
  const types = ({ responses }: Operation, status: string) => Object.keys(responses[status]?.content ?? {}).sort()
  const own = { body: { type: 'object' } }
  const checked = await shown(t, { problemDetails: true, required: true }, own)
  t.same(types(checked, '400'), ['application/json', 'application/problem+json'])
  t.same(types(checked, '409'), ['application/problem+json'])
  const produces = ['application/vnd.own+json']
  const other = await shown(t, { problemDetails: true }, {
    produces,
    response: { 409: { type: 'object' } }
  } as FastifySchema)
  t.same(types(other, '409'), ['application/problem+json', ...produces])
})

/* Which routes */

t.test('a route that is not covered is documented as without the plugin', async (t) => {
  const schema = { headers: { type: 'object', properties: { 'x-a': { type: 'string' } } }, description: 'Mine' }
  const declare = (app: FastifyInstance) => {
    app.get('/get', { schema }, handler)
    app.put('/put', { schema }, handler)
    app.post('/off', { schema, config: { idempotency: false } }, handler)
    app.post('/bare', { config: { idempotency: false } }, handler)
    app.delete('/none', handler)
  }
  const app = await documented(t, { options: { global: true } })
  declare(app)
  const bare = await documented(t, { transform: ({ schema, url }) => ({ schema, url }) })
  declare(bare)
  t.same((await documentOf(t, app)).paths, (await documentOf(t, bare)).paths)
})

t.test('a route of several methods says which of them are covered, and requires nothing', async (t) => {
  const app = await documented(t, { options: { required: true } })
  app.route({ method: ['GET', 'POST', 'PATCH'], url: '/', config: { idempotency: true }, handler })
  const operation = await operationOf(t, app)
  t.match(operation.description, /^POST and PATCH requests can be retried/)
  t.match(header(operation), [{ required: false }])
})

for (const order of orders) {
  t.test(`each scope is documented by its own registration, registered ${order} swagger`, async (t) => {
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => app.close())
    const openapi = { openapi: '3.1.0', info: { title: 'A', version: '1' } }
    const transform = openapiTransform
    await register(
      order,
      () => app.register(idempotency, { header: 'X-Outer', global: true }),
      () => app.register(swagger, { openapi, transform })
    )
    app.post('/outer', handler)
    await app.register(
      async (child) => {
        child.post('/inherited', handler)
        await child.register(async (grandchild) => {
          await grandchild.register(idempotency, { header: 'X-Inner', global: true })
          grandchild.post('/own', handler)
        })
      },
      { prefix: '/inner' }
    )
    const { paths } = await documentOf(t, app)
    const names = Object.entries(paths).map(([url, methods]) => [url, header(methods.post as Operation)[0]?.name])
    t.same(Object.fromEntries(names), { '/outer': 'X-Outer', '/inner/inherited': 'X-Outer', '/inner/own': 'X-Inner' })
  })
}

t.test('what is hidden stays hidden', async (t) => {
  const app = await documented(t)
  app.post('/', { schema: { hide: true } as FastifySchema, config: { idempotency: true } }, handler)
  t.same((await documentOf(t, app)).paths, {})
})

t.test('Swagger 2.0 gets replies without media types', async (t) => {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(swagger, { swagger: { info: { title: 'A', version: '1' } }, transform: openapiTransform })
  await app.register(idempotency, { required: true, problemDetails: true })
  app.post('/', { config: { idempotency: true } }, handler)
  await app.ready()
  const document = app.swagger() as unknown as { paths: Record<string, Record<string, Operation>> }
  const { valid, errors } = await validator.validate(structuredClone(document) as never)
  t.ok(valid, 'a valid document', { errors })
  const operation = document.paths['/']?.post as Operation
  t.match(header(operation), [{ name: 'Idempotency-Key', required: true, type: 'string' }])
  t.match(operation.responses['409'], { schema: { properties: { code: {} } } })
  t.notOk(operation.responses['409']?.content)
})

/* The route itself */

t.test('the schema by which a route validates and serialises is not touched', async (t) => {
  const headers = { type: 'object', properties: { 'x-a': { type: 'string' } } }
  const response = { 200: { type: 'object', properties: { id: { type: 'string' } } } }
  const schema = deepFreeze({ headers, response, description: 'Mine' }) as FastifySchema
  const input = { schema, url: '/', route: {} as never }
  const app = await documented(t, { options: { required: true } })
  app.addHook('onRoute', (route) => {
    input.route = route as never
  })
  app.post('/', { schema: structuredClone(schema), config: { idempotency: true } }, async () => ({
    id: 'a',
    secret: 1
  }))
  t.ok(openapiTransform(input).schema.headers, 'frozen, and no error')
  await documentOf(t, app)
  // A missing key is our own error, and not that of a schema that has grown.
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), { code: 'FST_IDEMPOTENCY_KEY_MISSING' })
  const [first, replay] = [await post(app, { key: 'k' }), await post(app, { key: 'k' })]
  t.same(first.json(), { id: 'a' })
  t.ok(isReplay(replay))
})

function deepFreeze<T>(value: T): T {
  if (typeof value === 'object' && value !== null)
    for (const part of Object.values(Object.freeze(value))) deepFreeze(part)
  return value
}

/* Other transforms */

t.test('another transform goes first, and what it makes of schema and URL is added to', async (t) => {
  const transform = openapiTransform(({ url, schema }: { url: string; schema: FastifySchema }) => ({
    url: `/v1${url}`,
    schema: { ...schema, description: 'By the other' } as FastifySchema
  }))
  const app = await documented(t, { transform })
  app.post('/covered', { config: { idempotency: true } }, handler)
  app.post('/not', handler)
  const { paths } = await documentOf(t, app)
  t.match(paths['/v1/covered']?.post?.description, /^By the other\n\nRequests can be retried/)
  t.equal(paths['/v1/not']?.post?.description, 'By the other')
})

t.test('one route may use it alone, by config.swaggerTransform', async (t) => {
  const app = await documented(t, { transform: ({ schema, url }) => ({ schema, url }) })
  app.post('/', { config: { idempotency: true, swaggerTransform: openapiTransform } }, handler)
  app.post('/other', { config: { idempotency: true } }, handler)
  t.match(header(await operationOf(t, app)), [{ name: 'Idempotency-Key' }])
  t.same(header(await operationOf(t, app, '/other')), [])
})

t.test('routes with TypeBox schemas are documented, and validate and serialise as before', async (t) => {
  for (const version of VERSIONS) {
    const app = (await documented(t, { version })).withTypeProvider<TypeBoxTypeProvider>()
    app.post(
      '/',
      {
        schema: {
          headers: Type.Object({ 'x-tenant': Type.String() }),
          body: Type.Object({ amount: Type.Integer({ minimum: 1 }) }),
          response: { 201: Type.Object({ id: Type.String() }) }
        },
        config: { idempotency: true }
      },
      async (request, reply) => reply.code(201).send({ id: `${request.headers['x-tenant']} ${request.body.amount}` })
    )
    const operation = await operationOf(t, app as unknown as FastifyInstance)
    t.same(
      header(operation).map(({ name, required }) => [name, required]),
      [
        ['x-tenant', true],
        ['Idempotency-Key', false]
      ]
    )
    t.same(Object.keys(operation.responses), ['201', '409', '422', '503'])
  }
})

t.test('routes with Zod schemas are documented behind jsonSchemaTransform', async (t) => {
  for (const version of VERSIONS) {
    const app = await documented(t, { version, transform: openapiTransform(jsonSchemaTransform) })
    app.setValidatorCompiler(validatorCompiler)
    app.setSerializerCompiler(serializerCompiler)
    app.post(
      '/',
      {
        schema: {
          headers: z.object({ 'x-tenant': z.string() }),
          body: z.object({ amount: z.int() }),
          response: { 201: z.object({ id: z.string() }), '4xx': z.object({ message: z.string() }) }
        },
        config: { idempotency: { required: true } }
      },
      async (_request, reply) => reply.code(201).send({ id: 'a' })
    )
    const operation = await operationOf(t, app)
    t.same(
      header(operation).map(({ name, required }) => [name, required]),
      [
        ['x-tenant', true],
        ['Idempotency-Key', true]
      ]
    )
    t.match(operation.responses['201'], { headers: { 'Idempotent-Replayed': {} } })
    t.match(operation.responses['409'], {
      content: { 'application/json': { schema: { properties: { message: {} } } } }
    })
  }
})
