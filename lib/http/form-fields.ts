import type { FastifyInstance } from 'fastify'
import { warn } from '../warnings.js'

/* A `field` that no form can bring, because none is parsed, is warned of at boot. */

/** A covered route whose key may come in a field of the body. */
export interface FieldedRoute {
  readonly instance: FastifyInstance
  readonly route: string
}

/** What HTML forms send. */
const FORM_TYPES = ['application/x-www-form-urlencoded', 'multipart/form-data']

/**
 * Warns of routes that wait for a key in a form, and whose instance parses none: Fastify answers it with a 415. Known
 * when all is declared, because a parser may come after the route.
 */
export function warnOfForms(routes: readonly FieldedRoute[]): void {
  const formless = routes.filter(({ instance }) => !FORM_TYPES.some((type) => instance.hasContentTypeParser(type)))
  if (formless.length === 0) return
  warn(
    'FST_IDEMPOTENCY_FIELD',
    `option "field" is set for ${formless.map(({ route }) => route).join(', ')}, which can get it in JSON or the query ` +
      'only: for HTML forms, await app.register(require("@fastify/formbody")) on the same instance or one above it'
  )
}
