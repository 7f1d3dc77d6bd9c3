// @node-idempotency/fastify 1.0.7, on Fastify 4, which it depends on.
// Set up as in its README: `idempotencyAsPlugin` in fastify-plugin, with its store in memory; `enforceIdempotency` of
// its IdempotencyOptions for a payments API. It covers all routes where it is registered: those of POST have a scope of
// their own. It has no setting for a caller; its lifetime is one for all routes of a registration.

import { idempotencyAsPlugin, StorageAdapterEnum } from '@node-idempotency/fastify'
// Elsewhere: import fastify from 'fastify'
import fastify from 'fastify-4'
import fp from 'fastify-plugin'
import { handler } from '../fastify-handler.mjs'
import { host, listening, port } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS } from '../payments.mjs'

const app = fastify()
app.addHook('onRequest', async (request, reply) => {
  const caller = callerOf(request.headers.authorization)
  if (caller === undefined) return reply.code(401).send({ error: 'Unauthorized' })
})
app.get('/executions', count)
await app.register(protectedRoutes(PATHS, {}))
await app.register(protectedRoutes([EXPIRING], { cacheTTLMS: LIFETIME_MS }))

function protectedRoutes(paths, options) {
  return async (scope) => {
    await scope.register(fp(idempotencyAsPlugin), {
      storage: { adapter: StorageAdapterEnum.memory },
      enforceIdempotency: true,
      ...options
    })
    for (const path of paths) scope.post(path, handler)
  }
}

await app.listen({ port, host })
listening(app.server.address())
