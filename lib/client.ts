import { type IdempotentRequestInit, type Operation, prepare } from './client/operation.js'
import { type IdempotentFetchOptions, type Settings, settingsOf } from './client/options.js'
import { exchange } from './client/redirects.js'
import { arrival, ask, drop, isEventStream, isRetryable, pauseAfter } from './client/replies.js'

export type { IdempotentRequestInit } from './client/operation.js'
export type { IdempotentFetchOptions } from './client/options.js'

// For browsers, Deno, Bun and Node alike: imports nothing but its own parts, and uses nothing but what the Web has. A test
// compiles it with the types of a browser alone.

/** How a reply was come by. */
export interface OperationInfo {
  /** The key of the operation, without quotes. */
  readonly key: string
  /** How often the request was sent. */
  readonly attempts: number
  /** The server had run the request before, and this is what it had replied. */
  readonly replayed: boolean
}

/** The reply as `fetch` gave it, with a note. */
export interface IdempotentResponse extends Response {
  readonly idempotency: OperationInfo
}

/** Sends an operation for as long as it takes, always with the same key. */
export type IdempotentFetch = (
  input: string | URL | Request,
  init?: IdempotentRequestInit
) => Promise<IdempotentResponse>

/** No reply came in time: whether the operation has run is not known. Ask again with the same key. */
export class IdempotentFetchError extends Error {
  override readonly name = 'IdempotentFetchError'
  readonly key: string
  readonly attempts: number

  constructor(key: string, attempts: number, cause: unknown) {
    const times = attempts === 1 ? '1 attempt' : `${attempts} attempts`
    super(`No reply after ${times}: whether the request was carried out is not known`, { cause })
    this.key = key
    this.attempts = attempts
  }
}

/** A reply that has come: all of it where it may be handed over, unless it is `streaming`. */
interface Answer {
  readonly response: Response
  readonly replayed: boolean
  readonly streaming: boolean
  /** Is it worth another attempt? A function where the caller is to be asked. */
  readonly again: boolean | (() => Promise<boolean>)
  /** Stops listening to the caller's signal. */
  readonly detach: () => void
}

/** A timer that is set to more than this fires at once. */
const LONGEST_DELAY = 2 ** 31 - 1

/**
 * A `fetch` whose requests may be sent again: each call is one operation, with a key of its own that all its attempts
 * share. For routes that honour the key: without that, an attempt whose reply was lost would be carried out twice.
 *
 * The key stays on its origin. A redirect that keeps the method (307, 308) is followed within it, and is the reply where
 * it leads elsewhere; one that makes a GET of it (303, and 301 and 302 of a POST) is followed without the key.
 * @throws TypeError for an option that is unknown or invalid.
 */
export function idempotentFetch(options: IdempotentFetchOptions = {}): IdempotentFetch {
  const settings = settingsOf(options)
  const { maxAttempts, timeout } = settings
  return async (input, init = {}) => {
    const deadline = performance.now() + (timeout ?? Number.POSITIVE_INFINITY)
    const operation = await prepare(settings, input, init)
    const { key, signal } = operation
    for (let attempts = 1; ; attempts++) {
      signal?.throwIfAborted()
      const chance = Math.random()
      const pauseFor = (response: Response | null) => pauseAfter(settings, attempts, chance, response)
      const isLast = (response: Response | null) =>
        attempts >= maxAttempts || performance.now() + pauseFor(response) >= deadline
      let answer: Answer | null = null
      let failure: unknown
      try {
        answer = await send(settings, operation, deadline - performance.now(), isLast)
      } catch (error) {
        signal?.throwIfAborted()
        failure = error
      }
      if (answer === null) {
        if (isLast(null)) throw new IdempotentFetchError(key, attempts, failure)
      } else {
        const { again, response, replayed, detach } = answer
        if (!(typeof again === 'function' ? await again() : again)) {
          return handOver(answer, { key, attempts, replayed })
        }
        detach()
        drop(response)
      }
      await sleep(pauseFor(answer?.response ?? null), signal)
    }
  }
}

/** One attempt: rejects when there is no reply, or not all of one that may be handed over. */
async function send(
  settings: Settings,
  operation: Operation,
  timeLeft: number,
  isLast: (response: Response) => boolean
): Promise<Answer> {
  const { attemptTimeout, replayHeader, shouldRetry, streamReplies } = settings
  const { signal } = operation
  const controller = new AbortController()
  const onAbort = () => controller.abort(signal?.reason)
  const detach = () => signal?.removeEventListener('abort', onAbort)
  const limit = Math.min(timeLeft, attemptTimeout ?? Number.POSITIVE_INFINITY)
  const onTimeout = () => controller.abort(new DOMException(`No reply within ${Math.round(limit)} ms`, 'TimeoutError'))
  const timer = limit > LONGEST_DELAY ? undefined : setTimeout(onTimeout, limit)
  signal?.addEventListener('abort', onAbort)
  let streaming = false
  try {
    const { response, replayed } = await exchange(settings, operation, controller.signal)
    streaming = streamReplies || isEventStream(response)
    // Another attempt would bring the same replay.
    const isFinal = response.headers.get(replayHeader) === 'true' || isLast(response)
    const byDefault = !isFinal && (await isRetryable(response, streaming))
    const again =
      shouldRetry === undefined || isFinal
        ? byDefault
        : async () => !isLast(response) && ((await ask(shouldRetry, response)) ?? byDefault)
    // Whoever reads it, or is asked about it, has all of it.
    if (again !== true && !streaming) await arrival(response)
    return { response, replayed, streaming, again, detach }
  } catch (error) {
    detach()
    throw error
  } finally {
    clearTimeout(timer)
    if (!streaming) detach()
  }
}

/** The bodies that are still being read, and what makes them abortable meanwhile. */
const unread = new FinalizationRegistry<() => void>((detach) => detach())

function handOver({ response, streaming, detach }: Answer, info: OperationInfo): IdempotentResponse {
  if (streaming && response.body !== null) unread.register(response.body, detach)
  else detach()
  return Object.defineProperty(response, 'idempotency', { value: Object.freeze(info) }) as IdempotentResponse
}

async function sleep(ms: number, signal: AbortSignal | null): Promise<void> {
  signal?.throwIfAborted()
  return new Promise((resolve, reject) => {
    const onAbort = () => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      reject(signal?.reason)
    }
    const timer = setTimeout(
      () => {
        signal?.removeEventListener('abort', onAbort)
        resolve()
      },
      Math.min(ms, LONGEST_DELAY)
    )
    signal?.addEventListener('abort', onAbort)
  })
}
