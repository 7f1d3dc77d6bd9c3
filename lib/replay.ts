import type { FastifyReply } from 'fastify'
import type { StoredReply } from '../types/index.js'

/** Puts a stored reply's status and headers on a reply, and the mark of a replay. */
export function putOn(reply: FastifyReply, stored: StoredReply, replayHeader: string | null): void {
  reply.code(stored.statusCode)
  reply.removeHeader('content-length')
  for (const [name, value] of stored.headers) reply.header(name, value)
  if (replayHeader !== null) reply.header(replayHeader, 'true')
}

/** The stored payload, of the kind that it had when it was stored; `undefined` for none. */
export function payloadOf({ body, text }: StoredReply): string | Buffer | undefined {
  if (body.length === 0) return undefined
  return text ? body.toString() : body
}
