import {
  type IdempotentFetch,
  IdempotentFetchError,
  type IdempotentFetchOptions,
  type IdempotentRequestInit,
  type IdempotentResponse,
  idempotentFetch,
  type OperationInfo
} from '../../lib/client.js'

/* Compiled, never run: what the types of the client promise. */

export async function usage(): Promise<void> {
  const options: IdempotentFetchOptions = {
    timeout: null,
    attemptTimeout: null,
    shouldRetry: (reply) => (reply.status === 500 ? false : undefined),
    fetch: globalThis.fetch
  }
  const send: IdempotentFetch = idempotentFetch(options)
  const init: IdempotentRequestInit = { method: 'POST', body: 'x', idempotencyKey: 'k', signal: AbortSignal.timeout(1) }
  const noted: IdempotentResponse = await send('https://example.com', init)
  const plain: Response = await send(new URL('https://example.com'))
  // It goes wherever fetch goes.
  const asFetch: (input: string | URL | Request, init?: RequestInit) => Promise<Response> = idempotentFetch()
  await asFetch(new Request('https://example.com'), { method: 'PUT' })
  const info: OperationInfo = noted.idempotency
  const told: [string, number, boolean] = [info.key, info.attempts, info.replayed]
  try {
    await send('https://example.com', { ...init, headers: plain.headers })
  } catch (error) {
    if (error instanceof IdempotentFetchError) await send('https://example.com', { idempotencyKey: error.key })
  }
  // @ts-expect-error: how a reply was come by, nobody changes
  noted.idempotency.attempts = told[1]
  // @ts-expect-error: a reply of fetch has no note
  plain.idempotency
  // @ts-expect-error: not an option
  idempotentFetch({ retries: 3 })
  // @ts-expect-error: milliseconds
  idempotentFetch({ timeout: '1m' })
  // @ts-expect-error: null is for the limits of time only
  idempotentFetch({ maxAttempts: null })
  // @ts-expect-error: a key is a string
  await send('https://example.com', { idempotencyKey: 1 })
}
