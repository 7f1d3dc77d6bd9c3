/* What `idempotentFetch` takes: its options, their defaults, and how they are checked. */

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
   * 409 while the first request is in progress (with `Retry-After`, or one of this plugin's codes). Gets a copy, which
   * it may read. Is not asked about a replay, which is final: another attempt would bring the same again.
   */
  shouldRetry?: (reply: Response) => boolean | undefined | Promise<boolean | undefined>
  /**
   * Return as soon as there is a status, for replies that are long or endless. By default the whole body is waited
   * for (but for an event stream), so that a reply that breaks off is asked for again.
   * @default false
   */
  streamReplies?: boolean
  /**
   * What sends a request. It is told not to follow redirects: see `idempotentFetch`.
   * @default fetch
   */
  fetch?: (request: Request) => Promise<Response>
}

export type Settings = Required<Omit<IdempotentFetchOptions, 'shouldRetry'>> &
  Pick<IdempotentFetchOptions, 'shouldRetry'>

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

/** @throws TypeError for an option that is unknown or invalid. */
export function settingsOf(options: IdempotentFetchOptions): Settings {
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
