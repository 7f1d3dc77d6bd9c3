import type { FastifyRequest } from 'fastify'
import { isClientError } from '../errors.js'
import { isThenable } from '../util/sync-promise.js'

/**
 * A function of the application's that decides about a request: where it fails, the log names the option, which the error
 * itself does not.
 */
export function blamed<Decide extends (request: FastifyRequest) => unknown>(option: string, decide: Decide): Decide {
  const blame = (request: FastifyRequest, error: unknown): never => {
    // An answer to the client, such as 400 for a key that is none, is no failure.
    if (!isClientError(error)) request.log.error({ err: error }, `idempotency option ${option} failed`)
    throw error
  }
  return ((request) => {
    try {
      const result = decide(request)
      return isThenable(result) ? Promise.resolve(result).catch((error) => blame(request, error)) : result
    } catch (error) {
      return blame(request, error)
    }
  }) as Decide
}
