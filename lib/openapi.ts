import type { FastifySchema, RouteOptions } from 'fastify'
import { PROBLEM_TYPE } from './http/problem-details.js'
import type { Policy } from './options.js'
import { policyOf } from './routes/covered-routes.js'

/* What documents made by @fastify/swagger show of covered routes. */

/** What @fastify/swagger gives to a `transform`, as far as it is used here. */
export interface RouteDocumentation {
  schema: FastifySchema
  url: string
  route: RouteOptions
}

/** What a `transform` gives back. */
interface Transformed {
  schema: FastifySchema
  url: string
}

/** For the option `transform` of @fastify/swagger. */
export interface OpenapiTransform {
  /** Adds to the schema of a covered route what the plugin does there. All other routes stay as they are. */
  (route: RouteDocumentation): Transformed
  /** The same behind another transform, such as `jsonSchemaTransform` of fastify-type-provider-zod. */
  <Route extends object>(transform: (route: Route) => Transformed): (route: Route) => Transformed
}

type Transform = (route: RouteDocumentation) => Transformed
type Schema = Record<string, unknown>

/** The parts of a route's schema that are added to. What @fastify/swagger knows beside Fastify's own is here as well. */
interface Documented {
  description?: string
  headers?: unknown
  response?: Schema
  produces?: readonly string[]
  body?: unknown
  params?: unknown
  querystring?: unknown
}

/** In Swagger 2.0, which @fastify/swagger writes as well, a reply has one schema for all media types. */
type Dialect = 'openapi' | 'swagger'

/**
 * Documents covered routes: the header of the key, the plugin's own errors, the mark of a replay, and how long keys
 * are kept, which draft-ietf-httpapi-idempotency-key-header (§2.3) wants to be published.
 */
export const openapiTransform = ((first: RouteDocumentation | Transform): unknown =>
  typeof first === 'function'
    ? (input: RouteDocumentation) => document(input, first(input))
    : document(first, first)) as OpenapiTransform

// The schema belongs to the route, which validates and serialises by it: whatever is added goes into copies.
function document(input: RouteDocumentation, { schema: transformed, url }: Transformed): Transformed {
  // @fastify/swagger does the same for a transform that gives nothing.
  const schema = (transformed ?? input.schema) as Documented | undefined
  const policy = policyOf(input.route)
  if (policy === undefined) return { schema: schema as FastifySchema, url }
  const dialect = 'swaggerObject' in input ? 'swagger' : 'openapi'
  const documented = {
    ...schema,
    description: join(schema?.description, describe(policy)),
    response: withReplies(policy, schema ?? {}, dialect)
  } as Documented
  if (policy.headerName !== null && policy.getKey === null) documented.headers = withHeader(schema?.headers, policy)
  return { schema: documented, url }
}

function join(...paragraphs: (string | undefined)[]): string {
  return paragraphs.filter(Boolean).join('\n\n')
}

function describe(policy: Policy): string {
  const { headerName, field, getKey, ttl, replayHeaderName, required, methods } = policy
  const places: string[] = []
  if (getKey === null && headerName !== null) places.push(`the header \`${headerName}\``)
  if (getKey === null && field !== null) places.push(`the field \`${field}\` of the query or the body`)
  const where = places.length === 0 ? '' : ` (in ${places.join(' or ')})`
  const mark = replayHeaderName === null ? '' : `, marked with \`${replayHeaderName}: true\``
  const who = methods === null ? 'Requests' : `${[...methods].join(' and ')} requests`
  return (
    `${who} can be retried with the same idempotency key${where}: a retry gets the first reply again${mark}. ` +
    `Keys ${expiry(ttl)}. ${required ? 'A key is required.' : 'Without a key, every request is carried out.'}`
  )
}

function expiry(ttl: number | null): string {
  return ttl === null ? 'do not expire' : `expire ${inWords(ttl)} after the reply to the first request`
}

const UNITS: [name: string, ms: number, least: number][] = [
  ['day', 86_400_000, 2],
  ['hour', 3_600_000, 1],
  ['minute', 60_000, 1],
  ['second', 1_000, 1],
  ['millisecond', 1, 1]
]

/** In the largest unit that needs no fraction; 24 hours are not called a day. */
function inWords(ms: number): string {
  for (const [name, unit, least] of UNITS) {
    const count = ms / unit
    if (Number.isInteger(count) && count >= least) return `${count} ${name}${count === 1 ? '' : 's'}`
  }
  return `${ms} milliseconds`
}

/** The schema of the request's headers, and the key's. */
function withHeader(headers: unknown, policy: Policy): Schema {
  const name = policy.headerName as string
  // A key may also be in the field, and a route with safe methods needs none for them: only the server can tell.
  const required = policy.required && policy.field === null && policy.methods === null
  const ours = headerSchema(policy)
  if (isComposed(headers)) {
    return { allOf: [headers, { type: 'object', properties: { [name]: ours }, ...(required && { required: [name] }) }] }
  }
  const theirs = (headers ?? { type: 'object' }) as Schema
  const properties = (theirs.properties ?? {}) as Schema
  // Header names have no case: one that the route describes itself stays, under its own name.
  const known = Object.keys(properties).find((other) => other.toLowerCase() === policy.header) ?? name
  const needed = (theirs.required ?? []) as string[]
  return {
    ...theirs,
    properties: { ...properties, [known]: { ...ours, ...(properties[known] as object | undefined) } },
    ...(required && { required: [...needed.filter((other) => other !== known), known] })
  }
}

/** A schema whose properties are elsewhere. */
function isComposed(schema: unknown): boolean {
  if (!isObject(schema) || 'properties' in schema) return false
  return ['$ref', 'allOf', 'anyOf', 'oneOf'].some((keyword) => keyword in schema)
}

/** A key without parameters. Those whose limits cannot be said in a schema are described. */
function headerSchema({ keyFormat, maxKeyLength, ttl }: Policy): Schema {
  const isQuoted = keyFormat === 'structured'
  const schema: Schema = {
    type: 'string',
    description: `A new key for each operation, the same for its retries. At most ${maxKeyLength} bytes${isQuoted ? ', quotes aside' : ''}. Keys ${expiry(ttl)}.`,
    minLength: isQuoted ? 3 : 1,
    maxLength: isQuoted ? maxKeyLength + 2 : maxKeyLength
  }
  if (keyFormat === 'uuid') schema.format = 'uuid'
  // RFC 9651 §3.3.3
  if (isQuoted) schema.pattern = '^"[ -~]+"'
  if (keyFormat instanceof RegExp && isPattern(keyFormat)) schema.pattern = keyFormat.source
  return schema
}

/** JSON Schema has no flags, and reads patterns as with `u`. */
function isPattern({ source, flags }: RegExp): boolean {
  if (!['', 'u'].includes(flags)) return false
  try {
    new RegExp(source, 'u')
    return true
  } catch {
    return false
  }
}

/** The replies of a route, the plugin's own among them, and the mark of a replay on those that succeed. */
function withReplies(policy: Policy, schema: Documented, dialect: Dialect): Schema {
  const theirs = schema.response ?? { 200: { description: 'Default Response', type: 'null' } }
  const replies: Schema = { ...theirs }
  if (policy.replayHeaderName !== null) {
    const successes = Object.keys(theirs).filter((status) => /^[23]/.test(status))
    if (successes.length === 0 && 'default' in theirs) successes.push('default')
    for (const status of successes) replies[status] = withReplayHeader(theirs[status], policy.replayHeaderName)
  }
  for (const [status, refusal] of Object.entries(refusals(policy))) {
    const shared = `${status.charAt(0)}xx`
    // The most specific schema of a status is the one by which Fastify serialises, errors too.
    const exact = theirs[status]
    const inherited = theirs[shared] ?? theirs[shared.toUpperCase()] ?? theirs.default
    if (!policy.problemDetails || dialect === 'swagger') {
      replies[status] ??= inherited === undefined ? plain(refusal, dialect) : renamed(inherited, refusal)
    } else {
      const validates =
        status === '400' && [schema.body, schema.params, schema.querystring, schema.headers].some(Boolean)
      const content = contentOf(exact ?? inherited ?? (validates ? ERROR : undefined), schema.produces)
      const description = descriptionOf(exact) ?? refusal.description
      replies[status] = { ...refusal, description, content: { [PROBLEM_TYPE]: { schema: PROBLEM }, ...content } }
    }
  }
  return replies
}

function withReplayHeader(reply: unknown, name: string): unknown {
  if (!isObject(reply)) return reply
  const ours = {
    type: 'boolean',
    description: '`true` on a reply that was given before to a request with the same key'
  }
  return { ...reply, headers: { [name]: ours, ...(reply.headers as object | undefined) } }
}

interface Refusal {
  description: string
  headers?: Schema
}

/** The plugin's own errors, by status. */
function refusals({ required, reruns, documentationUrl }: Policy): Record<string, Refusal> {
  const retry = { 'Retry-After': { type: 'integer', description: 'Seconds after which a retry makes sense' } }
  const link = documentationUrl !== null && {
    Link: { type: 'string', description: 'Where these errors are documented' }
  }
  const refusal = (description: string, headers: Schema | false = false): Refusal => {
    const all = { ...headers, ...link }
    return Object.keys(all).length === 0 ? { description } : { description, headers: all }
  }
  const conflicts = [
    'The first request with this key is still in progress (`FST_IDEMPOTENCY_IN_PROGRESS`)',
    'its reply could not be kept (`FST_IDEMPOTENCY_NOT_REPLAYABLE`)'
  ]
  if (!reruns) conflicts.push('its outcome is not known (`FST_IDEMPOTENCY_ABANDONED`)')
  return {
    ...(required && { 400: refusal('There is no idempotency key (`FST_IDEMPOTENCY_KEY_MISSING`)') }),
    409: refusal(conflicts.join(', or '), retry),
    422: refusal(
      'The idempotency key is not valid (`FST_IDEMPOTENCY_KEY_INVALID`), ' +
        'or was used with another request (`FST_IDEMPOTENCY_KEY_REUSED`)'
    ),
    503: refusal('The idempotency store is not available (`FST_IDEMPOTENCY_STORE_UNAVAILABLE`)', retry)
  }
}

/** An error as Fastify sends it. */
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

/** RFC 9457 §3.1, and the error's code. */
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

function plain(refusal: Refusal, dialect: Dialect): Schema {
  return dialect === 'swagger'
    ? { ...refusal, ...ERROR }
    : { ...refusal, content: { 'application/json': { schema: ERROR } } }
}

/** A reply that looks like another one, and means this. */
function renamed(reply: unknown, { description, headers }: Refusal): unknown {
  if (!isObject(reply)) return reply
  const name = 'content' in reply || '$ref' in reply ? 'description' : 'x-response-description'
  return { ...reply, [name]: description, ...(headers && { headers: { ...headers, ...(reply.headers as object) } }) }
}

/** The media types of a reply, and their schemas. */
function contentOf(reply: unknown, produces: readonly string[] = []): object {
  if (!isObject(reply)) return {}
  if (isObject(reply.content)) return reply.content
  const types = produces.length === 0 ? ['application/json'] : produces
  return Object.fromEntries(types.map((type) => [type, { schema: reply }]))
}

function descriptionOf(reply: unknown): unknown {
  return isObject(reply) ? (reply['x-response-description'] ?? reply.description) : undefined
}

/** Other kinds of schema, which a transform would have to translate, stay as they are. */
function isObject(value: unknown): value is Schema {
  if (typeof value !== 'object' || value === null) return false
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}
