import type { FastifyInstance } from 'fastify'
import type idempotency from '../../index.js'
import type { IdempotentFetch } from '../../lib/client.js'

/** What the snippets of docs/ use without declaring it. */
export interface Given {
  app: FastifyInstance
  idempotency: typeof idempotency
  send: IdempotentFetch
  printLabel: (order: string, key: string) => Promise<string>
  sendMail: (order: string, label: string, key: string) => Promise<void>
  /** What a browser has. */
  sessionStorage: {
    getItem(name: string): string | null
    setItem(name: string, value: string): void
    removeItem(name: string): void
  }
}
