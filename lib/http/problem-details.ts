import { STATUS_CODES } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { isRefusal, type Refusal } from '../errors.js'
import { tellRefused } from '../operation/report.js'
import type { Policy } from '../options.js'
import { kRefusal } from './exchange.js'

/* How the plugin's own errors are answered: their headers, the link to the documentation, and problem details (RFC 9457). */

export const PROBLEM_TYPE = 'application/problem+json'

/** The error as a problem document (RFC 9457 §3), with the error's `code` as an extension member. */
function problemOf(refusal: Refusal, documentationUrl: string | null): string {
  const { code, message, statusCode } = refusal
  return JSON.stringify({
    type: documentationUrl === null ? 'about:blank' : pageOf(refusal, documentationUrl),
    title: STATUS_CODES[statusCode],
    status: statusCode,
    detail: message,
    code
  })
}

function pageOf({ code }: Refusal, documentationUrl: string): string {
  return documentationUrl.replaceAll('{code}', code)
}

const answered = new WeakSet<Refusal>()

/**
 * Fastify's own error handler asks an error for its headers when it answers with it. That is how one can tell,
 * whatever handlers the error went through before. Not enumerable, so that loggers do not ask as well.
 */
export function watchHeaders(refusal: Refusal): void {
  const { headers = {} } = refusal
  Object.defineProperty(refusal, 'headers', {
    configurable: true,
    enumerable: false,
    get() {
      answered.add(refusal)
      return headers
    },
    set(value: unknown) {
      Object.defineProperty(refusal, 'headers', { value, configurable: true, enumerable: true, writable: true })
    }
  })
}

/** Is it Fastify's serialisation of this error that is being sent? Nobody else knows the length so early. */
export function wasSentByFastify(reply: FastifyReply, refusal: Refusal): boolean {
  return answered.has(refusal) && reply.statusCode === refusal.statusCode && reply.hasHeader('content-length')
}

/** Refusals of requests that have no storage key yet, of which nothing else tells. */
const WITHOUT_KEY: ReadonlySet<string> = new Set([
  'FST_IDEMPOTENCY_KEY_MISSING',
  'FST_IDEMPOTENCY_KEY_INVALID',
  'FST_IDEMPOTENCY_SCOPE',
  'FST_IDEMPOTENCY_KEY_UNREADABLE'
])

/** Marks an error if it is the plugin's own, and puts its headers on the reply, whoever handles errors. */
export function refuse(policy: Policy, request: FastifyRequest, reply: FastifyReply, error: unknown): Error {
  if (isRefusal(error)) {
    if (WITHOUT_KEY.has(error.code) && request[kRefusal] !== error) {
      tellRefused({ request, log: request.log, storageKey: '', policy, attempt: 0 }, error)
    }
    const { documentationUrl, problemDetails } = policy
    request[kRefusal] = error
    if (error.headers !== undefined) reply.headers(error.headers)
    if (problemDetails) watchHeaders(error)
    if (documentationUrl !== null) {
      const links = [reply.getHeader('link') ?? [], `<${pageOf(error, documentationUrl)}>; rel="describedby"`].flat()
      reply.header('link', links.join(', '))
    }
  }
  return error as Error
}

/**
 * The problem document in the place of Fastify's own serialisation of the error; `null` where that is not what is being
 * sent: a custom error handler decides for itself.
 */
export function problemInPlaceOf(request: FastifyRequest, reply: FastifyReply, policy: Policy): string | null {
  const refusal = request[kRefusal]
  if (refusal === null || !wasSentByFastify(reply, refusal)) return null
  reply.removeHeader('content-length').header('content-type', PROBLEM_TYPE)
  return problemOf(refusal, policy.documentationUrl)
}
