import type { FastifyReply, FastifyRequest } from 'fastify'
import { isMetInHandler } from '../errors.js'
import { isThenable } from '../util/sync-promise.js'

/* Which replies are final: the end of their operation, to be stored. After any other the key is given back, and a retry runs. */

/**
 * Below 500, and yet an invitation to try again: with other credentials (RFC 9110 §15.5.2), or later (RFC 9110 §15.5.9,
 * RFC 4918 §11.3, RFC 8470 §5.2, RFC 6585 §4).
 */
const RETRYABLE_STATUSES: ReadonlySet<number> = new Set([401, 408, 423, 425, 429])

/** The default `shouldStore`: is this an answer, or an invitation to try again? */
export function isFinal(_request: FastifyRequest, reply: FastifyReply): boolean {
  const { statusCode } = reply
  return statusCode < 500 && !RETRYABLE_STATUSES.has(statusCode) && !reply.hasHeader('retry-after')
}

/**
 * Is the reply final, as the route's `shouldStore` has it?
 * @param error That it is made of. What the plugin refuses to a handler, such as a step under a claim that was lost, is no
 * reply of the operation.
 */
export function isFinalReply(
  policy: { readonly shouldStore: (request: FastifyRequest, reply: FastifyReply) => boolean },
  request: FastifyRequest,
  reply: FastifyReply,
  error?: unknown
): boolean {
  if (isMetInHandler(error)) return false
  try {
    const answer: unknown = policy.shouldStore(request, reply)
    if (!isThenable(answer)) return Boolean(answer)
    throw new TypeError('option "shouldStore" must answer at once, got a promise')
  } catch (error) {
    // The handler has succeeded: whoever decides about its reply must not undo that.
    request.log.error({ err: error }, 'idempotency option shouldStore failed: the default decides')
    return isFinal(request, reply)
  }
}
