import { type Operation, referrerOf } from './operation.js'
import type { Settings } from './options.js'
import { drop } from './replies.js'

/*
 * Left to itself, `fetch` takes the key along wherever a redirect leads, and with 307 and 308 the operation too. A server
 * on another origin has never seen the key: what the first one has carried out already, it would carry out again, and the
 * next attempt may be sent on to yet another one. So redirects are followed here:
 *
 * - An operation that stays one (307, 308) goes on within its origin, with its key. To another origin it is not followed:
 *   the redirect is the reply.
 * - What has become a GET (303; 301 and 302 of a POST) reads a page. That is followed anywhere, without the key.
 */

/** A reply, and whether a server has said on the way to it that it had run the request before. */
export interface Reply {
  readonly response: Response
  readonly replayed: boolean
}

/** As many as `fetch` follows. */
const MOST_HOPS = 20

const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308])
const ABOUT_THE_BODY = ['content-encoding', 'content-language', 'content-location', 'content-type']
/** What `fetch` does not show to another origin. */
const SECRETS = ['authorization', 'proxy-authorization', 'cookie', 'host']

/** Sends the operation once, to wherever that leads. */
export async function exchange(settings: Settings, operation: Operation, signal: AbortSignal): Promise<Reply> {
  const { fetch, replayHeader } = settings
  const { request } = operation
  const follows = request.redirect === 'follow'
  let url = request.url
  let replayed = false
  for (let hops = 0; ; hops++) {
    const response = await fetch(requestOf(operation, { signal, redirect: follows ? 'manual' : request.redirect }, url))
    replayed ||= response.headers.get(replayHeader) === 'true'
    if (follows && response.type === 'opaqueredirect') {
      return { response: await followUnseen(settings, operation, signal, response), replayed }
    }
    const target = follows && hops < MOST_HOPS ? targetOf(response, url) : null
    if (target !== null && isRead(response.status, request.method)) {
      drop(response)
      return { response: redirected(await fetch(readingOf(operation, settings.header, target, signal))), replayed }
    }
    if (target === null || target.origin !== new URL(url).origin) {
      return { response: hops === 0 ? response : redirected(response), replayed }
    }
    drop(response)
    url = target.href
  }
}

/** The operation's request, to its own URL or to where it was sent on. */
function requestOf({ request, body, init }: Operation, own: RequestInit, url: string): Request {
  const all = { ...referrerOf(request), body, ...own }
  if (url === request.url) return new Request(request, all)
  const { method, headers, credentials, mode, cache, integrity, keepalive } = request
  const kept = { method, headers, credentials, mode, cache, integrity, keepalive }
  return new Request(url, { ...init, ...kept, ...all })
}

/** The page that a redirect points to, asked for without the key. */
function readingOf(operation: Operation, header: string, target: URL, signal: AbortSignal): Request {
  const { request } = operation
  const headers = new Headers(request.headers)
  const isOurs = target.origin === new URL(request.url).origin
  for (const name of [header, ...ABOUT_THE_BODY, ...(isOurs ? [] : SECRETS)]) headers.delete(name)
  const method = request.method === 'HEAD' ? 'HEAD' : 'GET'
  return requestOf(operation, { method, headers, body: null, signal, redirect: 'follow' }, target.href)
}

/**
 * A browser does not show where a redirect leads, and follows it with the key. Within the page's own origin that does no
 * harm, and mode `same-origin` keeps it there. Where it would leave, the redirect is all there is to hand over; unless the
 * caller has said `redirect: 'follow'`. The server is asked a second time, with the same key, so that nothing happens twice.
 */
async function followUnseen(
  { fetch }: Settings,
  operation: Operation,
  signal: AbortSignal,
  redirect: Response
): Promise<Response> {
  const { request, init } = operation
  const isAllowed = init.redirect === 'follow'
  const mode = isAllowed ? request.mode : 'same-origin'
  try {
    return await fetch(requestOf(operation, { signal, mode, redirect: 'follow' }, request.url))
  } catch (error) {
    if (isAllowed || signal.aborted) throw error
    return redirect
  }
}

/** Where a reply sends its reader; `null` when it is no redirect, or leads to nothing that can be fetched. */
function targetOf({ status, headers }: Response, url: string): URL | null {
  const location = headers.get('location')
  if (!REDIRECTS.has(status) || location === null) return null
  try {
    const target = new URL(location, url)
    return /^https?:$/.test(target.protocol) ? target : null
  } catch {
    return null
  }
}

/** Does a redirect make a GET of the request, or leave it one (Fetch, "HTTP-redirect fetch")? */
function isRead(status: number, method: string): boolean {
  return status === 303 || method === 'GET' || method === 'HEAD' || (method === 'POST' && status < 303)
}

/** As `fetch` says it of what it has followed itself. */
function redirected(response: Response): Response {
  return Object.defineProperty(response, 'redirected', { value: true })
}
