import type { Settings } from './options.js'

/* A call of the client, read once: what every attempt at it sends. */

/** What `fetch` takes, and the key of the operation: one that was kept from an earlier call, for instance. */
export interface IdempotentRequestInit extends RequestInit {
  idempotencyKey?: string
}

/** A request that can be sent any number of times. */
export interface Operation {
  readonly request: Request
  readonly body: ArrayBuffer | null
  readonly key: string
  readonly signal: AbortSignal | null
  /** What the caller had said, with settings that a Request does not show, such as `dispatcher` in Node. */
  readonly init: RequestInit
}

/** Reads the request once, so that every attempt is the same to the byte, whatever becomes of the caller's objects. */
export async function prepare(
  { header, generateKey, quoted }: Settings,
  input: string | URL | Request,
  { idempotencyKey, ...init }: IdempotentRequestInit
): Promise<Operation> {
  if (isStream(init.body)) {
    throw new TypeError('A stream cannot be sent twice: read it first, with new Response(stream).blob() for instance')
  }
  const signal = init.signal === undefined ? (input instanceof Request ? input.signal : null) : init.signal
  signal?.throwIfAborted()
  // Without the signal, to which each attempt listens by itself.
  const kept = input instanceof Request ? referrerOf(input) : {}
  const request = new Request(input, { ...kept, ...init, signal: null })
  if (request.mode === 'no-cors') throw new TypeError('A request in mode no-cors cannot carry an idempotency key')
  const key = idempotencyKey ?? unquoted(request.headers.get(header)) ?? generateKey()
  if (typeof key !== 'string' || key.trim() === '') throw new TypeError('An idempotency key must not be blank')
  request.headers.set(header, quoted ? quote(key) : key)
  const bytes = await request.arrayBuffer()
  // Not all browsers tell no body from an empty one before it is read.
  return { request, body: request.bodyUsed ? bytes : null, key, signal, init }
}

/** What a request that is made of another one does not have from there. */
export function referrerOf({ referrer, referrerPolicy }: Request): Pick<RequestInit, 'referrer' | 'referrerPolicy'> {
  return { referrer, referrerPolicy }
}

/** Streams of the Web and, where there are such, of Node. */
function isStream(body: unknown): boolean {
  return typeof body === 'object' && body !== null && ('getReader' in body || Symbol.asyncIterator in body)
}

/** RFC 9651 §3.3.3. */
function quote(key: string): string {
  if (!/^[\x20-\x7e]*$/.test(key)) throw new TypeError('A quoted idempotency key takes printable ASCII only')
  return `"${key.replaceAll(/["\\]/g, '\\$&')}"`
}

function unquoted(value: string | null): string | undefined {
  if (value === null) return undefined
  const quoted = /^"((?:[^"\\]|\\["\\])*)"$/.exec(value)?.[1]
  return quoted === undefined ? value : quoted.replaceAll(/\\(["\\])/g, '$1')
}
