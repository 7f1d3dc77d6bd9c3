// For browsers, Deno, Bun and Node alike: imports nothing, and uses nothing but what the Web has. A test compiles it
// with the types of a browser alone.

/** Options of `idempotentFetch`. Durations are milliseconds. */
export interface IdempotentFetchOptions {
  /**
   * The request header that carries the key.
   * @default 'Idempotency-Key'
   */
  header?: string
  /**
   * The reply header that marks a replay with `true`.
   * @default 'Idempotent-Replayed'
   */
  replayHeader?: string
  /**
   * Send the key as a quoted string (RFC 9651), as the IETF draft has it, and servers with `keyFormat: 'structured'`.
   * @default false
   */
  quoted?: boolean
  /**
   * Makes the key of an operation that has none.
   * @default crypto.randomUUID
   */
  generateKey?: () => string
  /**
   * How often a request is sent at most.
   * @default 8
   */
  maxAttempts?: number
  /**
   * How long an operation may take, with all attempts and the pauses between them; `null` for ever.
   * @default 120_000
   */
  timeout?: number | null
  /**
   * How long one attempt may take before it counts as lost; `null` for as long as `timeout` lasts.
   * @default 30_000
   */
  attemptTimeout?: number | null
  /**
   * The pause after the first attempt, more or less; the following ones double. A longer `Retry-After` is waited for.
   * @default 500
   */
  minDelay?: number
  /**
   * The longest pause, unless the server asks for a longer one.
   * @default 10_000
   */
  maxDelay?: number
  /**
   * Is this reply worth another attempt? `undefined` leaves it to the default: 408, 425, 429, 500, 502, 503, 504, and
   * 409 while the first request is in progress, but never a replay. Gets a copy, which it may read.
   */
  shouldRetry?: (reply: Response) => boolean | undefined | Promise<boolean | undefined>
  /**
   * Return as soon as there is a status, for replies that are long or endless. By default the whole body is waited
   * for (but for an event stream), so that a reply that breaks off is asked for again.
   * @default false
   */
  streamReplies?: boolean
  /**
   * What sends a request.
   * @default fetch
   */
  fetch?: (request: Request) => Promise<Response>
}

/** What `fetch` takes, and the key of the operation: one that was kept from an earlier call, for instance. */
export interface IdempotentRequestInit extends RequestInit {
  idempotencyKey?: string
}

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

type Settings = Required<Omit<IdempotentFetchOptions, 'shouldRetry'>> & Pick<IdempotentFetchOptions, 'shouldRetry'>

/** A request that can be sent any number of times. */
interface Operation {
  readonly request: Request
  readonly body: ArrayBuffer | null
  readonly key: string
  readonly signal: AbortSignal | null
}

/** A reply that has come, all of it unless it is `streaming`. */
interface Answer {
  readonly response: Response
  readonly replayed: boolean
  readonly streaming: boolean
  /** The body, where it may tell a code. */
  readonly text: string
  /** Stops listening to the caller's signal. */
  readonly detach: () => void
}

/** Conflicts that say that another attempt is at work. */
const BUSY: ReadonlySet<unknown> = new Set(['FST_IDEMPOTENCY_IN_PROGRESS', 'FST_IDEMPOTENCY_CLAIM_LOST'])

/** What a server does not store by default, because it is no final answer. */
const RETRYABLE_STATUSES: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504])

/** A timer that is set to more than this fires at once. */
const LONGEST_DELAY = 2 ** 31 - 1

/**
 * A `fetch` whose requests may be sent again: each call is one operation, with a key of its own that all its attempts
 * share. For routes that honour the key: without that, an attempt whose reply was lost would be carried out twice.
 * @throws TypeError for an option that is unknown or invalid.
 */
export function idempotentFetch(options: IdempotentFetchOptions = {}): IdempotentFetch {
  const settings = settingsOf(options)
  return async (input, init = {}) => {
    const deadline = performance.now() + (settings.timeout ?? Number.POSITIVE_INFINITY)
    const operation = await prepare(settings, input, init)
    const { key, signal } = operation
    for (let attempts = 1; ; attempts++) {
      signal?.throwIfAborted()
      let answer: Answer | null = null
      let failure: unknown
      try {
        answer = await send(settings, operation, deadline - performance.now())
      } catch (error) {
        signal?.throwIfAborted()
        failure = error
      }
      const pause = pauseAfter(settings, attempts, answer)
      const isLast = attempts >= settings.maxAttempts || performance.now() + pause >= deadline
      if (answer !== null && (isLast || !(await isRetryable(settings, answer)))) {
        return handOver(answer, { key, attempts, replayed: answer.replayed })
      }
      if (isLast) throw new IdempotentFetchError(key, attempts, failure)
      answer?.detach()
      answer?.response.body?.cancel().catch(() => {})
      await sleep(pause, signal)
    }
  }
}

/** Reads the request once, so that every attempt is the same to the byte, whatever becomes of the caller's objects. */
async function prepare(
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
  return { request, body: request.bodyUsed ? bytes : null, key, signal }
}

/** What a request that is made of another one does not have from there. */
function referrerOf({ referrer, referrerPolicy }: Request): Pick<RequestInit, 'referrer' | 'referrerPolicy'> {
  return { referrer, referrerPolicy }
}

/** One attempt: rejects when there is no reply, or not all of it. */
async function send(settings: Settings, { request, body, signal }: Operation, timeLeft: number): Promise<Answer> {
  const { attemptTimeout, fetch, replayHeader, streamReplies } = settings
  const controller = new AbortController()
  const onAbort = () => controller.abort(signal?.reason)
  const detach = () => signal?.removeEventListener('abort', onAbort)
  const limit = Math.min(timeLeft, attemptTimeout ?? Number.POSITIVE_INFINITY)
  const onTimeout = () => controller.abort(new DOMException(`No reply within ${Math.round(limit)} ms`, 'TimeoutError'))
  const timer = limit > LONGEST_DELAY ? undefined : setTimeout(onTimeout, limit)
  signal?.addEventListener('abort', onAbort)
  let streaming = false
  try {
    const init: RequestInit = { ...referrerOf(request), body, signal: controller.signal }
    const response = await fetch(new Request(request, init))
    const replayed = response.headers.get(replayHeader) === 'true'
    streaming = (streamReplies || /^text\/event-stream\b/i.test(typeOf(response))) && response.status !== 409
    const text = streaming ? '' : await arrival(response)
    return { response, replayed, streaming, text, detach }
  } finally {
    clearTimeout(timer)
    if (!streaming) detach()
  }
}

/** Resolves when all of the body has come, which stays in the response; with the text, where it may tell a code. */
async function arrival(response: Response): Promise<string> {
  const copy = response.clone()
  if (response.status === 409 && /\bjson\b/i.test(typeOf(response))) return copy.text()
  const reader = copy.body?.getReader()
  while (reader !== undefined && !(await reader.read()).done) {}
  return ''
}

async function isRetryable({ shouldRetry }: Settings, { response, replayed, text }: Answer): Promise<boolean> {
  const decision = await shouldRetry?.(response.clone())
  if (decision !== undefined) return decision
  if (replayed) return false
  return response.status === 409 ? BUSY.has(codeOf(text)) : RETRYABLE_STATUSES.has(response.status)
}

/** Fastify's errors and problem details (RFC 9457) have it in the same place. */
function codeOf(text: string): unknown {
  try {
    return JSON.parse(text).code
  } catch {
    return undefined
  }
}

/** The bodies that are still being read, and what makes them abortable meanwhile. */
const unread = new FinalizationRegistry<() => void>((detach) => detach())

function handOver({ response, streaming, detach }: Answer, info: OperationInfo): IdempotentResponse {
  if (streaming && response.body !== null) unread.register(response.body, detach)
  else detach()
  return Object.defineProperty(response, 'idempotency', { value: Object.freeze(info) }) as IdempotentResponse
}

/** How long to wait: growing, with jitter, and never less than the server asks for. */
function pauseAfter({ minDelay, maxDelay }: Settings, attempts: number, answer: Answer | null): number {
  const half = Math.min(maxDelay, minDelay * 2 ** (attempts - 1)) / 2
  return Math.max(half, retryAfter(answer?.response.headers.get('retry-after') ?? '')) + Math.random() * half
}

/** RFC 9110 §10.2.3: whole seconds, or a date. In milliseconds; 0 when there is none. */
function retryAfter(value: string): number {
  if (/^\d+$/.test(value)) return Number(value) * 1_000
  const ms = Date.parse(value) - Date.now()
  return ms > 0 ? ms : 0
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

function typeOf(response: Response): string {
  return response.headers.get('content-type') ?? ''
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

/** Where a page is not served by HTTPS, browsers have no `randomUUID`. */
function randomKey(): string {
  if (typeof crypto.randomUUID === 'function') return crypto.randomUUID()
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  // RFC 9562 §5.4: version 4, variant 10xx.
  bytes[6] = ((bytes.at(6) ?? 0) & 0x0f) | 0x40
  bytes[8] = ((bytes.at(8) ?? 0) & 0x3f) | 0x80
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')
}

const isText = (value: unknown) => typeof value === 'string' && value !== ''
const isFunction = (value: unknown) => typeof value === 'function'
const isBoolean = (value: unknown) => typeof value === 'boolean'
const isCount = (value: unknown) => Number.isSafeInteger(value) && (value as number) > 0
const isCountOrNull = (value: unknown) => value === null || isCount(value)

const RULES: Record<keyof IdempotentFetchOptions, [takes: string, accepts: (value: unknown) => boolean]> = {
  header: ['a header name', isText],
  replayHeader: ['a header name', isText],
  quoted: ['true or false', isBoolean],
  generateKey: ['a function', isFunction],
  maxAttempts: ['a positive integer', isCount],
  timeout: ['a positive integer of milliseconds, or null', isCountOrNull],
  attemptTimeout: ['a positive integer of milliseconds, or null', isCountOrNull],
  minDelay: ['a positive integer of milliseconds', isCount],
  maxDelay: ['a positive integer of milliseconds', isCount],
  shouldRetry: ['a function', isFunction],
  streamReplies: ['true or false', isBoolean],
  fetch: ['a function', isFunction]
}

function settingsOf(options: IdempotentFetchOptions): Settings {
  const given = Object.entries(options).filter(([, value]) => value !== undefined)
  for (const [name, value] of given) {
    if (!Object.hasOwn(RULES, name)) {
      throw new TypeError(`option "${name}" is not known; known are ${Object.keys(RULES).join(', ')}`)
    }
    const [takes, accepts] = RULES[name as keyof IdempotentFetchOptions]
    if (!accepts(value)) throw new TypeError(`option "${name}" takes ${takes}, got ${String(value)} (${typeof value})`)
  }
  return {
    header: 'Idempotency-Key',
    replayHeader: 'Idempotent-Replayed',
    quoted: false,
    generateKey: randomKey,
    maxAttempts: 8,
    timeout: 120_000,
    attemptTimeout: 30_000,
    minDelay: 500,
    maxDelay: 10_000,
    streamReplies: false,
    // Looked up when it is called: others may put theirs in its place, as test tools and tracers do.
    fetch: (request) => globalThis.fetch(request),
    ...Object.fromEntries(given)
  }
}
