import type { Mock } from 'node:test'
import type { FastifyInstance, FastifyReply, FastifyRequest, LightMyRequestResponse } from 'fastify'
import type { IResolvers } from 'mercurius'
import type idempotency from '../../index.js'
import type { IdempotencyStore, RedisClient } from '../../index.js'
import type { IdempotentFetch } from '../../lib/client.js'
import type { TestStore } from '../../lib/testing.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** Whoever a hook has found the caller to be. */
    account: string
  }
  interface Session {
    account?: string
  }
}

type Charge = (amount: number) => Promise<{ id: string }>

/** What the snippets of the README and of docs/ use without declaring it. */
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
  /** The base URL of an API. */
  server: string
  chargeCard: (order: { idempotencyKey: string; signal?: AbortSignal }) => Promise<{ id: string }>
  send: IdempotentFetch
  callTool: (call: { name: string; arguments?: Record<string, unknown> }) => Promise<object>
  printLabel: (order: string, key: string) => Promise<string>
  /** What became of a payout; `null` when the bank does not know yet. */
  askBank: (operation: string) => Promise<{ done: boolean } | null>
  sendMail: (order: string, label: string, key: string) => Promise<void>
  /** What a browser has. */
  sessionStorage: {
    getItem(name: string): string | null
    setItem(name: string, value: string): void
    removeItem(name: string): void
  }
  /* What the first snippets of testing.md declare. */
  buildApp: (parts: {
    store: IdempotencyStore
    bank: { charge: Charge }
  }) => Promise<Pick<FastifyInstance, 'inject' | 'close' | 'listen'>>
  store: TestStore
  bank: { charge: Mock<Charge> }
  post: (url?: string, amount?: number) => Promise<LightMyRequestResponse>
}
