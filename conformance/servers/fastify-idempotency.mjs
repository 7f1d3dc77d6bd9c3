// fastify-idempotency, this repository's build.
// Set up as in its README: "Security: scope first" (a hook authenticates, `scope` is who it has found) and "Options".

import Fastify from 'fastify'
import { Redis } from 'ioredis'
// Elsewhere: import idempotency, { RedisStore } from 'fastify-idempotency'
import idempotency, { RedisStore } from '../../dist/index.mjs'
import { handler } from '../fastify-handler.mjs'
import { host, listening, port, redisUrl, store } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS } from '../payments.mjs'

const app = Fastify()
app.decorateRequest('caller', '')
app.addHook('onRequest', async (request, reply) => {
  request.caller = callerOf(request.headers.authorization)
  if (request.caller === undefined) return reply.code(401).send({ error: 'Unauthorized' })
})
await app.register(idempotency, {
  ...(store === 'redis' && { store: new RedisStore(new Redis(redisUrl)) }),
  scope: (request) => request.caller,
  required: true,
  problemDetails: true
})

for (const path of PATHS) app.post(path, { config: { idempotency: true } }, handler)
app.post(EXPIRING, { config: { idempotency: { ttl: LIFETIME_MS } } }, handler)
app.get('/executions', count)

await app.listen({ port, host })
listening(app.server.address())
