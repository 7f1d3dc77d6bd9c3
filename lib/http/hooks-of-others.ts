import type { FastifyRequest } from 'fastify'

/*
 * Whether hooks of others run on a request's way beside the plugin's own. Where none do, what is done for their eyes only
 * need not be done. Fastify tells nobody which hooks an instance has: the route's context is read, which is its own affair.
 * Where it is not found, or looks otherwise than expected, others are taken to be there.
 */

/** Phases in which every covered route has a hook of the plugin's: where there is one hook, it is that. */
type Phase = 'preValidation' | 'onSend'

type Context = Partial<Record<Phase, unknown>>

let kContext: symbol | undefined

/** Might anybody else's hook see the request in this phase? */
export function othersHook(request: FastifyRequest, phase: Phase): boolean {
  kContext ??= Object.getOwnPropertySymbols(request).find(({ description }) => description === 'fastify.context')
  if (kContext === undefined) return true
  const hooks = (request as unknown as Record<symbol, Context | undefined>)[kContext]?.[phase]
  return !Array.isArray(hooks) || hooks.length !== 1
}
