import { RouteConfig } from '@nestjs/platform-fastify'
import type { IdempotencyRouteOptions } from 'fastify-idempotency'

/** For a method of a controller: `@Idempotent()`, `@Idempotent({ required: true })`. Above any other `@RouteConfig`. */
export const Idempotent = (options: IdempotencyRouteOptions | true = true): MethodDecorator =>
  RouteConfig({ idempotency: options })
