// @aws-lambda-powertools/idempotency 2.35.0, behind Fastify, which stands in for API Gateway: it makes an event of the
// request, and sends the response that the function gives.
// Set up as in its documentation: `makeIdempotent` around the function, `eventKeyJmesPath` with the header and the
// caller ("Choosing a payload subset for idempotency"), `payloadValidationJmesPath` ("Payload validation"),
// `throwOnNoIdempotencyKey` ("Making idempotency key required"), `responseHook` ("Manipulating the Idempotent Response").
// Its errors become the statuses of the draft: that is the application's to do. Its store is one of our own ("Bring your
// own persistent store") that keeps in memory what its layer for DynamoDB keeps. CachePersistenceLayer, for Redis and Valkey, drops the
// hash of the payload from a finished record, so that with payload validation it refuses every replay.

import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import {
  IdempotencyConfig,
  IdempotencyItemAlreadyExistsError,
  IdempotencyItemNotFoundError,
  makeIdempotent
} from '@aws-lambda-powertools/idempotency'
import { BasePersistenceLayer, IdempotencyRecord } from '@aws-lambda-powertools/idempotency/persistence'
import Fastify from 'fastify'
import { host, listening, port } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS, run } from '../payments.mjs'

/** What the layer for DynamoDB does, with a Map in place of the table. */
class MemoryPersistenceLayer extends BasePersistenceLayer {
  #items = new Map()

  async _putRecord(record) {
    const now = Date.now()
    const found = this.#items.get(record.idempotencyKey)
    const isFree =
      found === undefined ||
      found.expiryTimestamp < now / 1_000 ||
      (found.status === 'INPROGRESS' && found.inProgressExpiryTimestamp < now)
    if (!isFree) throw new IdempotencyItemAlreadyExistsError('', new IdempotencyRecord(found))
    this.#items.set(record.idempotencyKey, fieldsOf(record))
  }

  async _getRecord(idempotencyKey) {
    const found = this.#items.get(idempotencyKey)
    if (found === undefined) throw new IdempotencyItemNotFoundError()
    return new IdempotencyRecord(found)
  }

  async _updateRecord(record) {
    this.#items.set(record.idempotencyKey, fieldsOf(record))
  }

  async _deleteRecord({ idempotencyKey }) {
    this.#items.delete(idempotencyKey)
  }
}

function fieldsOf(record) {
  const { idempotencyKey, expiryTimestamp, inProgressExpiryTimestamp, responseData, payloadHash } = record
  return {
    idempotencyKey,
    status: record.getStatus(),
    expiryTimestamp,
    inProgressExpiryTimestamp,
    responseData,
    payloadHash
  }
}

/** A Lambda function for API Gateway: an event in, the whole HTTP response out. */
async function handler(event) {
  const { status, headers, body } = await run(event.path, JSON.parse(event.body))
  if (Buffer.isBuffer(body))
    return { statusCode: status, headers, body: body.toString('base64'), isBase64Encoded: true }
  if (Symbol.asyncIterator in body) return { statusCode: status, headers, body: await text(Readable.from(body)) }
  return { statusCode: status, headers: { 'content-type': 'application/json', ...headers }, body: JSON.stringify(body) }
}

const KEY = 'headers."idempotency-key"'
const idempotent = (expiresAfterSeconds) => {
  const config = new IdempotencyConfig({
    // Nothing, and so an error, where there is no key.
    eventKeyJmesPath: `${KEY} && [httpMethod, path, ${KEY}, requestContext.authorizer.principalId]`,
    payloadValidationJmesPath: '[powertools_json(body), queryStringParameters]',
    throwOnNoIdempotencyKey: true,
    responseHook: (response) => ({ ...response, headers: { ...response.headers, 'idempotent-replayed': 'true' } }),
    expiresAfterSeconds
  })
  return makeIdempotent(handler, { persistenceStore: new MemoryPersistenceLayer(), config })
}
const day = idempotent(86_400)
const briefly = idempotent(LIFETIME_MS / 1_000)
/** A function with half a minute left to run. */
const context = { getRemainingTimeInMillis: () => 30_000 }
const STATUS = { IdempotencyKeyError: 400, IdempotencyAlreadyInProgressError: 409, IdempotencyValidationError: 422 }

const app = Fastify()
app.decorateRequest('caller', '')
app.addHook('onRequest', async (request, reply) => {
  request.caller = callerOf(request.headers.authorization)
  if (request.caller === undefined) return reply.code(401).send({ error: 'Unauthorized' })
})
app.addContentTypeParser('application/json', { parseAs: 'string' }, async (_request, body) => body)
for (const path of [...PATHS, EXPIRING]) {
  app.post(path, async (request, reply) => {
    const event = {
      httpMethod: 'POST',
      path,
      headers: request.headers,
      queryStringParameters: request.query,
      requestContext: { authorizer: { principalId: request.caller } },
      body: request.body
    }
    try {
      const response = await (path === EXPIRING ? briefly : day)(event, context)
      const body = response.isBase64Encoded ? Buffer.from(response.body, 'base64') : response.body
      return reply.code(response.statusCode).headers(response.headers).send(body)
    } catch (error) {
      // A failure of the store has the error that made it fail.
      const { name, message } = error.name === 'IdempotencyPersistenceLayerError' ? error.cause : error
      return reply.code(STATUS[name] ?? 500).send({ error: name, message })
    }
  })
}
app.get('/executions', count)

await app.listen({ port, host })
listening(app.server.address())
