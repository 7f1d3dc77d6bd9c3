// @idempot/fastify-middleware 1.3.0, on Fastify 5.
// Set up as in its README: a preHandler of the route, SqliteIdempotencyStore with ':memory:'; a key is required by
// default. It has no setting for a caller.
// Two operations whose bodies are alike are one for it, whatever their keys: 409 "already processed with a different
// idempotency key" (docs/reference/errors.md). The suite sends one body with many keys. So that anything can be tried,
// each body gets a reference here, made of its key, as an order number would make two charges differ.

import { idempotency } from '@idempot/fastify-middleware'
import { SqliteIdempotencyStore } from '@idempot/sqlite-store'
import Fastify from 'fastify'
import { handler } from '../fastify-handler.mjs'
import { host, listening, port } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS } from '../payments.mjs'

const app = Fastify()
app.addHook('onRequest', async (request, reply) => {
  const caller = callerOf(request.headers.authorization)
  if (caller === undefined) return reply.code(401).send({ error: 'Unauthorized' })
})
app.addHook('preValidation', async (request) => {
  if (request.method === 'POST') request.body.reference = request.headers['idempotency-key']
})
const store = new SqliteIdempotencyStore({ path: ':memory:' })

for (const path of PATHS) app.post(path, { preHandler: idempotency({ store }) }, handler)
app.post(EXPIRING, { preHandler: idempotency({ store, ttlMs: LIFETIME_MS }) }, handler)
app.get('/executions', count)

await app.listen({ port, host })
listening(app.server.address())
