import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type idempotency from '../../index.js'
import type { IdempotencyStore, RedisClient } from '../../index.js'

/** What the snippets of the README use without declaring it. */
export interface Given {
  app: FastifyInstance
  idempotency: typeof idempotency
  handler: (request: FastifyRequest, reply: FastifyReply) => Promise<unknown>
  verifySession: (request: FastifyRequest) => Promise<void>
  MapStore: new () => IdempotencyStore
  redis: RedisClient
  server: string
  chargeCard: (order: { idempotencyKey: string; signal: AbortSignal }) => Promise<object>
}
