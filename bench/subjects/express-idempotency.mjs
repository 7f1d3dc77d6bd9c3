import express from 'express'
import { getSharedIdempotencyService, idempotency } from 'express-idempotency'
import redisAdapter from 'express-idempotency-redis-adapter'
import inject from 'light-my-request'
import { COVERED, UNCOVERED } from './route.mjs'

const RedisAdapter = redisAdapter.default ?? redisAdapter

/** express-idempotency on Express 4: another framework, whose own bare route costs several times Fastify's. */
export async function expressIdempotencyOnRedis({ route, redis }) {
  const dataAdapter = new RedisAdapter({ connectionConfig: { socket: { path: redis.path }, database: redis.db } })
  await dataAdapter.connect()
  const app = express()
  app.use(express.json({ limit: '1mb' }))
  app.post(COVERED, idempotency({ dataAdapter }), async (request, response) => {
    if (!getSharedIdempotencyService().isHit(request)) response.json(await route.handle())
  })
  app.post(UNCOVERED, async (_request, response) => response.json(await route.handle()))
  app.use((error, _request, response, _next) => {
    if (response.statusCode === 200) response.status(500)
    response.send({ error: error.message })
  })
  let server
  return {
    inject: (request) => inject(app, request),
    listen: () =>
      new Promise((resolve) => {
        server = app.listen(0, '127.0.0.1', () => resolve(server.address().port))
      }),
    close: async () => {
      server?.close()
      await dataAdapter.disconnect()
    }
  }
}
