import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { IResolvers } from 'mercurius'
import type idempotency from '../../index.js'
import type { IdempotencyStore, RedisClient } from '../../index.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** Whoever a hook has found the caller to be. */
    account: string
  }
  interface Session {
    account?: string
  }
}

/** What the snippets of the README use without declaring it. */
export interface Given {
  app: FastifyInstance
  idempotency: typeof idempotency
  handler: (request: FastifyRequest, reply: FastifyReply) => Promise<unknown>
  /** Whose credentials these are. Rejects with a 401 where they are nobody's. */
  accountOf: (credentials: string | string[] | undefined) => Promise<string>
  /** Sets `request.account`, or rejects with a 401. */
  verifySession: (request: FastifyRequest) => Promise<void>
  /** Rejects with a 401 where the sender is another. */
  verifySignature: (request: FastifyRequest) => Promise<void>
  AppModule: new () => object
  schema: string
  resolvers: IResolvers
  MapStore: new () => IdempotencyStore
  redis: RedisClient
  server: string
  chargeCard: (order: { idempotencyKey: string; signal?: AbortSignal }) => Promise<{ id: string }>
}
