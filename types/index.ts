import type { IdempotencyRouteConfig } from './options.js'
import type { InstanceIdempotency, RequestIdempotency } from './request.js'

export type * from './events.js'
export type * from './options.js'
export type * from './request.js'
export type * from './steps.js'
export type * from './store.js'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** Makes the route safe to retry: `true`, or options for this route; `false` opts out of `global`. */
    idempotency?: IdempotencyRouteConfig
  }
  interface FastifyRequest {
    /** The operation that this request belongs to; `null` without a key. */
    idempotency: RequestIdempotency | null
  }
  interface FastifyInstance {
    idempotency: InstanceIdempotency
  }
}
