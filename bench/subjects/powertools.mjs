import { IdempotencyConfig, makeIdempotent } from '@aws-lambda-powertools/idempotency'
import { CachePersistenceLayer } from '@aws-lambda-powertools/idempotency/cache'
import { createClient } from '@redis/client'
import Fastify from 'fastify'
import { COVERED, UNCOVERED } from './route.mjs'
import { served } from './served.mjs'

/**
 * @aws-lambda-powertools/idempotency around the handler. Without payload validation, with which each of its replays
 * is refused. It stores what the handler returns, not the reply.
 */
export async function powertoolsOnRedis({ route, redis }) {
  const client = await createClient({ socket: { path: redis.path }, database: redis.db }).connect()
  const app = Fastify()
  const config = new IdempotencyConfig({})
  // Without one it warns at each request. The time is also the life of a claim, which has to outlive its measurement.
  config.registerLambdaContext({ getRemainingTimeInMillis: () => 600_000 })
  const run = makeIdempotent((_key) => route.handle(), {
    persistenceStore: new CachePersistenceLayer({ client }),
    config
  })
  app.post(COVERED, async (request, reply) => {
    const key = request.headers['idempotency-key']
    if (key === undefined) return route.handle()
    try {
      return await run(key)
    } catch (error) {
      if (error.name !== 'IdempotencyAlreadyInProgressError') throw error
      return reply.code(409).send({ error: 'in progress' })
    }
  })
  app.post(UNCOVERED, route.handle)
  await app.ready()
  return served(app, async () => client.destroy())
}
