import type { Mock } from 'node:test'
import type { FastifyInstance, LightMyRequestResponse } from 'fastify'
import type idempotency from '../../index.js'
import type { IdempotencyStore, RedisClient } from '../../index.js'
import type { IdempotentFetch } from '../../lib/client.js'
import type { TestStore } from '../../lib/testing.js'

type Charge = (amount: number) => Promise<{ id: string }>

/** What the snippets of docs/ use without declaring it. */
export interface Given {
  app: FastifyInstance
  idempotency: typeof idempotency
  send: IdempotentFetch
  /** The base URL of an API. */
  server: string
  callTool: (call: { name: string; arguments?: Record<string, unknown> }) => Promise<object>
  redis: RedisClient
  AppModule: new () => object
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
