import { STATUS_CODES } from 'node:http'
import type { FastifyReply } from 'fastify'
import type { Refusal } from '../errors.js'

export const PROBLEM_TYPE = 'application/problem+json'

/** The error as a problem document (RFC 9457 §3), with the error's `code` as an extension member. */
export function problemOf({ code, message, statusCode }: Refusal, documentationUrl: string | null): string {
  return JSON.stringify({
    type: documentationUrl ?? 'about:blank',
    title: STATUS_CODES[statusCode],
    status: statusCode,
    detail: message,
    code
  })
}

const answered = new WeakSet<Refusal>()

/**
 * Fastify's own error handler asks an error for its headers when it answers with it. That is how one can tell,
 * whatever handlers the error went through before. Not enumerable, so that loggers do not ask as well.
 */
export function watchAnswer(refusal: Refusal): void {
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
export function isAnswer(reply: FastifyReply, refusal: Refusal): boolean {
  return answered.has(refusal) && reply.statusCode === refusal.statusCode && reply.hasHeader('content-length')
}
