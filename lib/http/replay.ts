import type { FastifyReply } from 'fastify'
import type { StoredReply } from '../../types/index.js'

type Headers = ReturnType<FastifyReply['getHeaders']>

/** Puts a stored reply's status and headers on a reply, and the mark of a replay. */
export function putOn(reply: FastifyReply, stored: StoredReply, replayHeader: string | null): void {
  // To look is cheaper than to set: mostly all is there when this is done for the second time.
  if (reply.statusCode !== stored.statusCode) reply.code(stored.statusCode)
  if (reply.hasHeader('content-length')) reply.removeHeader('content-length')
  for (const [name, value] of stored.headers) if (reply.getHeader(name) !== value) reply.header(name, value)
  if (replayHeader !== null && reply.getHeader(replayHeader) !== 'true') reply.header(replayHeader, 'true')
}

export function hasType(stored: StoredReply): boolean {
  for (const [name] of stored.headers) if (name === 'content-type') return true
  return false
}

/** Takes it all off again, when a replay could not be sent: an error must not look like one. */
export function takeOff(reply: FastifyReply, stored: StoredReply, replayHeader: string | null, before: Headers): void {
  for (const [name] of stored.headers) restore(reply, name, before)
  if (replayHeader !== null) restore(reply, replayHeader, before)
}

/** Gives a header the value that it had before, if it had one. */
export function restore(reply: FastifyReply, name: string, before: Headers): void {
  const value = before[name as keyof Headers]
  if (value === undefined) reply.removeHeader(name)
  else reply.header(name, value)
}

/** Gives all headers the values that they had before. */
export function restoreAll(reply: FastifyReply, before: Headers): void {
  const now = reply.getHeaders()
  for (const name in now) if (!(name in before)) reply.removeHeader(name)
  for (const name in before) {
    const key = name as keyof Headers
    if (now[key] === before[key]) continue
    // What is there already would be added to, in the case of cookies.
    reply.removeHeader(name)
    reply.header(name, before[key])
  }
}

/** The stored payload, of the kind that it had when it was stored; `undefined` for none. */
export function payloadOf({ body, text }: StoredReply): string | Buffer | undefined {
  if (body.length === 0) return undefined
  return text ? body.toString() : body
}
