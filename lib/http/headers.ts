import { validateHeaderName, validateHeaderValue } from 'node:http'
import type { FastifyReply } from 'fastify'

/* Headers of a reply: remembered, put back, and taken off. */

export type Headers = ReturnType<FastifyReply['getHeaders']>

/** The headers on a reply, as they are now. */
export function snapshot(reply: FastifyReply): Headers {
  const headers = reply.getHeaders()
  for (const name in headers) {
    const value = headers[name as keyof Headers]
    if (Array.isArray(value)) headers[name as keyof Headers] = [...value] as never
  }
  return headers
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

/** Takes off what HTTP cannot carry, as a name in a header that is not Latin-1. Returns why, for the first of them. */
export function takeOffUnsendable(reply: FastifyReply): unknown {
  const now = reply.getHeaders()
  let first: unknown
  for (const name in now) {
    try {
      validateHeaderName(name)
      const value = now[name as keyof Headers]
      if (!Array.isArray(value)) validateHeaderValue(name, value as string)
      else for (const one of value) validateHeaderValue(name, one)
    } catch (error) {
      reply.removeHeader(name)
      first ??= error
    }
  }
  return first
}
