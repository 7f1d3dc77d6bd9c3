import type { FastifyRequest } from 'fastify'

export function isJson(request: FastifyRequest): boolean {
  return /^application\/(?:[^;]*\+)?json\b/i.test(request.headers['content-type'] ?? '')
}

export function isMultipart(request: FastifyRequest): boolean {
  return /^multipart\//i.test(request.headers['content-type'] ?? '')
}
