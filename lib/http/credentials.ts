import type { TLSSocket } from 'node:tls'
import type { FastifyRequest } from 'fastify'

/* Nobody gets another's reply: who asks, by the credentials that were sent, where no `scope` says so. */

const PROXY = ['proxy-authorization']
const AUTHORIZATION = ['authorization']
const API_KEYS = ['x-api-key', 'api-key', 'x-auth-token', 'x-access-token']
const COOKIES = ['cookie']
const NAMES: ReadonlySet<string> = new Set([...PROXY, ...AUTHORIZATION, ...API_KEYS, ...COOKIES])

/** By lower-case name, the values in the order in which they came. */
type SentHeaders = Readonly<Record<string, readonly string[]>>

/**
 * What a request says of who sent it, for routes without a `scope`: `Authorization`, else the headers of API keys, else the
 * client's certificate, else all its cookies. `null` where it says nothing. `Proxy-Authorization` is for a proxy on the way,
 * where many may be one (RFC 9110 §11.7.2): it counts beside them, and stands for none of them.
 */
export function credentialsOf(request: FastifyRequest): string | null {
  const sent = credentialsIn(request.raw?.rawHeaders ?? [])
  const own =
    inHeaders(sent, AUTHORIZATION) ??
    inHeaders(sent, API_KEYS) ??
    inCertificate(request.raw?.socket) ??
    inHeaders(sent, COOKIES)
  const proxy = inHeaders(sent, PROXY)
  return proxy === null ? own : JSON.stringify([proxy, own])
}

/**
 * As the client sent them: hooks take credentials off a request once they are verified, to keep them out of logs, or put
 * those of a gateway in their place, which are the same for all.
 */
function credentialsIn(rawHeaders: readonly string[]): SentHeaders {
  const sent: Record<string, string[]> = {}
  for (let at = 0; at < rawHeaders.length; at += 2) {
    const name = (rawHeaders[at] as string).toLowerCase()
    if (!NAMES.has(name)) continue
    sent[name] ??= []
    sent[name].push(rawHeaders[at + 1] as string)
  }
  return sent
}

/** What pages send that have no token yet. */
const NO_TOKEN = /^\s*(?:(?:bearer|basic|digest|token|apikey|jwt)\b)?\s*(?:null|undefined)?\s*$/i

/** Framed with their names. A header without a token tells nobody from another. */
function inHeaders(sent: SentHeaders, names: readonly string[]): string | null {
  let found: unknown[] | null = null
  for (const name of names) {
    const values = sent[name]?.filter((value) => !NO_TOKEN.test(value)) ?? []
    if (values.length === 0) continue
    found ??= []
    found.push(name, values)
  }
  return found && JSON.stringify(found)
}

function inCertificate(socket: object | undefined): string | null {
  const { encrypted, getPeerX509Certificate } = (socket ?? {}) as Partial<TLSSocket>
  if (encrypted !== true || typeof getPeerX509Certificate !== 'function') return null
  const fingerprint = getPeerX509Certificate.call(socket as TLSSocket)?.fingerprint256
  return fingerprint === undefined ? null : JSON.stringify(['certificate', fingerprint])
}
