import type { FastifyRequest } from 'fastify'

/** The events that are published on the diagnostics channels `fastify-idempotency:<name>`. */
export type IdempotencyEventName =
  | 'acquired'
  | 'replayed'
  | 'conflict'
  | 'mismatch'
  | 'stored'
  | 'released'
  | 'tombstoned'
  | 'takeover'
  | 'lease-lost'
  | 'store-error'
  | 'bypassed'
  | 'step-stored'
  | 'step-resumed'
  | 'refused'
  | 'settled'

/** What tells two requests with the same key apart: what they are for, who asks, or what they bring. */
export type Difference = 'target' | 'credentials' | 'payload'

/**
 * What is known of how a claim was lost: another request has the key now, or has finished it (`taken`); the key was deleted on
 * purpose (`deleted`); the connection of its transaction has ended (`connection`); or the store does not know the claim any
 * more, and does not say why (`unknown`).
 */
export type Loss = 'taken' | 'deleted' | 'connection' | 'unknown'

/** The message of every event. */
export interface IdempotencyEvent {
  /** `null` for `app.idempotency.run`. */
  request: FastifyRequest | null
  /** The storage key: a hash, never the client's key. Empty for `refused`: then there is none. */
  key: string
  /** The route's URL pattern; `'run'` for `app.idempotency.run`. */
  route: string
  attempt: number
  error?: unknown
  /** Of `mismatch`: what differs from the request that has used the key before. */
  differs?: Difference
  /** Of `lease-lost`: what is known of it. */
  loss?: Loss
  /** Of `step-stored` and `step-resumed`: the name of the step. */
  step?: string
}
