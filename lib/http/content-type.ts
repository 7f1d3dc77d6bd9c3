import type { FastifyRequest } from 'fastify'

/* What a body says that it is. */

export function isJson(request: FastifyRequest): boolean {
  return /^application\/(?:[^;]*\+)?json\b/i.test(request.headers['content-type'] ?? '')
}

export function isMultipart(request: FastifyRequest): boolean {
  return /^multipart\//i.test(request.headers['content-type'] ?? '')
}
