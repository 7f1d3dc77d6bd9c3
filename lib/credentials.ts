import type { TLSSocket } from 'node:tls'
import type { FastifyRequest } from 'fastify'

const AUTHORIZATION = ['authorization', 'proxy-authorization']
const API_KEYS = ['x-api-key', 'api-key', 'x-auth-token', 'x-access-token']

/**
 * What a request says of who sent it, for routes without a `scope`: `Authorization` and `Proxy-Authorization`, else the
 * headers of API keys, else the client's certificate, else all its cookies. `null` where it says nothing.
 */
export function credentialsOf(request: FastifyRequest): string | null {
  const { headers } = request
  return (
    inHeaders(headers, AUTHORIZATION) ??
    inHeaders(headers, API_KEYS) ??
    inCertificate(request.raw?.socket) ??
    inHeaders(headers, ['cookie'])
  )
}

/** Framed with their names. A header without a value, as pages send that have no token yet, tells nobody from another. */
function inHeaders(headers: FastifyRequest['headers'], names: readonly string[]): string | null {
  let found: unknown[] | null = null
  for (const name of names) {
    const value = headers[name]
    if (value === undefined || value.length === 0) continue
    found ??= []
    found.push(name, value)
  }
  return found && JSON.stringify(found)
}

function inCertificate(socket: object | undefined): string | null {
  const { encrypted, getPeerX509Certificate } = (socket ?? {}) as Partial<TLSSocket>
  if (encrypted !== true || typeof getPeerX509Certificate !== 'function') return null
  const fingerprint = getPeerX509Certificate.call(socket as TLSSocket)?.fingerprint256
  return fingerprint === undefined ? null : JSON.stringify(['certificate', fingerprint])
}
