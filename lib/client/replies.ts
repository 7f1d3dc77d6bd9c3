import type { Settings } from './options.js'

/* What a reply says: whether it is worth another attempt, after which pause, and whether all of it has come. */

/** Conflicts that say that another attempt is at work. */
const BUSY: ReadonlySet<unknown> = new Set(['FST_IDEMPOTENCY_IN_PROGRESS', 'FST_IDEMPOTENCY_CLAIM_LOST'])

/** What a server does not store by default, because it is no final answer. */
const RETRYABLE_STATUSES: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504])

/** How much of a body is read to find out what it says. An error of the plugin takes some hundred bytes. */
const GLANCE = 16_384

/**
 * The rule without `shouldRetry`. A 409 with `Retry-After` says "in progress, come back", whatever its body is: a custom
 * error handler makes of the plugin's error what it likes. Where a browser does not show that header to another origin,
 * and without it, the code tells.
 */
export async function isRetryable(response: Response, streaming: boolean): Promise<boolean> {
  const { status, headers } = response
  if (status !== 409 && !RETRYABLE_STATUSES.has(status)) return false
  if (status === 409 && !headers.has('retry-after')) {
    return /\bjson\b/i.test(typeOf(response)) && BUSY.has(codeOf(await beginningOf(response)))
  }
  // A connection whose reply was read to its end serves the next attempt too.
  if (!streaming) await beginningOf(response).catch(() => {})
  return true
}

/** What the caller says of it, who may read a copy. */
export async function ask(
  shouldRetry: NonNullable<Settings['shouldRetry']>,
  response: Response
): Promise<boolean | undefined> {
  const copy = response.clone()
  try {
    return await shouldRetry(copy)
  } finally {
    // Unread, it would keep all that is read of the other one.
    drop(copy)
  }
}

/** The first bytes of a body, all of which stays in the response. */
async function beginningOf(response: Response): Promise<string> {
  const reader = response.clone().body?.getReader()
  const decoder = new TextDecoder()
  let text = ''
  for (let size = 0; reader !== undefined && size < GLANCE; ) {
    const { done, value } = await reader.read()
    if (done) return text
    size += value.byteLength
    text += decoder.decode(value, { stream: true })
  }
  reader?.cancel().catch(() => {})
  return text
}

/** Resolves when all of the body has come, which stays in the response. */
export async function arrival(response: Response): Promise<void> {
  const reader = response.clone().body?.getReader()
  while (reader !== undefined && !(await reader.read()).done) {}
}

/** Lets go of a reply that nobody reads. */
export function drop({ body }: Response): void {
  body?.cancel().catch(() => {})
}

/** Fastify's errors and problem details (RFC 9457) have it in the same place. */
function codeOf(text: string): unknown {
  try {
    return JSON.parse(text).code
  } catch {
    return undefined
  }
}

/** How long to wait: growing, in part by chance (0 to 1), and never less than the server asks for. */
export function pauseAfter(
  { minDelay, maxDelay }: Settings,
  attempts: number,
  chance: number,
  response: Response | null
): number {
  const half = Math.min(maxDelay, minDelay * 2 ** (attempts - 1)) / 2
  return Math.max(half, retryAfter(response?.headers.get('retry-after') ?? '')) + chance * half
}

/** RFC 9110 §10.2.3: whole seconds, or a date. In milliseconds; 0 when there is none. */
function retryAfter(value: string): number {
  if (/^\d+$/.test(value)) return Number(value) * 1_000
  const ms = Date.parse(value) - Date.now()
  return ms > 0 ? ms : 0
}

export function isEventStream(response: Response): boolean {
  return /^text\/event-stream\b/i.test(typeOf(response))
}

function typeOf(response: Response): string {
  return response.headers.get('content-type') ?? ''
}
