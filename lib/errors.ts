import createError, { type FastifyError } from '@fastify/error'
import type { Difference } from '../types/index.js'

/* Every error that the plugin makes, one line for each code, and what errors of others tell. */

/** An error of the plugin's own that answers a request. */
export interface Refusal extends FastifyError {
  statusCode: number
  /** Reply headers that belong to the error; Fastify's default error handler sends them. */
  headers?: Record<string, string>
}

/** Expected answers carry no stack: nobody reads it, and taking it costs more than the answer itself. */
const expected = (code: string, message: string, statusCode: number) =>
  createError<[string?]>(code, message, statusCode, Error, false)

export const KeyMissing = expected('FST_IDEMPOTENCY_KEY_MISSING', 'This request needs an idempotency key: %s', 400)
export const KeyInvalid = expected('FST_IDEMPOTENCY_KEY_INVALID', 'The idempotency key %s', 422)
const KeyReusedError = expected(
  'FST_IDEMPOTENCY_KEY_REUSED',
  'The idempotency key was already used with another request%s',
  422
)
export const InProgress = expected(
  'FST_IDEMPOTENCY_IN_PROGRESS',
  'A request with this idempotency key is still in progress',
  409
)
export const NotReplayable = expected(
  'FST_IDEMPOTENCY_NOT_REPLAYABLE',
  'The request with this idempotency key has run, but its reply could not be kept; retrying cannot help',
  409
)
export const Abandoned = expected(
  'FST_IDEMPOTENCY_ABANDONED',
  'The request with this idempotency key was interrupted, and its outcome is not known',
  409
)
export const ClaimLost = expected(
  'FST_IDEMPOTENCY_CLAIM_LOST',
  'The claim on this idempotency key was lost: another request has it now',
  409
)
export const StoreUnavailable = createError<[{ cause: unknown }]>(
  'FST_IDEMPOTENCY_STORE_UNAVAILABLE',
  'The idempotency store is not available',
  503
)
export const ScopeFailed = createError<[string, { cause?: unknown }?]>(
  'FST_IDEMPOTENCY_SCOPE',
  'The scope of the idempotency key is not known: %s',
  500
)
export const KeyUnreadable = createError<[string]>(
  'FST_IDEMPOTENCY_KEY_UNREADABLE',
  'The field "%s" may hold an idempotency key, but this route does not parse its body: ' +
    'add a parser for it, or use the option "getKey"',
  500
)
export const TransactionBroken = createError<[string, { cause?: unknown }?]>('FST_IDEMPOTENCY_TRANSACTION', '%s', 500)
export const NotSettled = createError<[string]>('FST_IDEMPOTENCY_SETTLE', 'The operation cannot be settled: %s', 409)
export const StepFailed = createError<[string]>('FST_IDEMPOTENCY_STEP', '%s', 500)
export const InvalidOption = createError<[string]>('FST_IDEMPOTENCY_INVALID_OPTION', '%s', 500, TypeError)
export const RouteTooEarly = createError<[string]>('FST_IDEMPOTENCY_ROUTE_TOO_EARLY', '%s', 500)
export const NotCovered = createError<[string]>('FST_IDEMPOTENCY_NOT_COVERED', '%s', 500)
export const AlreadyRegistered = createError<[]>(
  'FST_IDEMPOTENCY_ALREADY_REGISTERED',
  'fastify-idempotency is registered already on this instance: give a route options of its own in config.idempotency, ' +
    'or put the routes that need another registration into a plugin of their own (without fastify-plugin) and register it there',
  500
)

const DIFFERENCES = { payload: ': its payload differs', target: ': its method, host or URL differs', credentials: '' }

/** What differs is told to the caller who has used the key before, and to nobody else. */
export function keyReused(differs: Difference): FastifyError & { differs?: Difference } {
  const error = new KeyReusedError(DIFFERENCES[differs])
  return differs === 'credentials' ? error : Object.assign(error, { differs })
}

/** Adds `Retry-After` (RFC 9110 §10.2.3), in whole seconds. */
export function withRetryAfter<E extends FastifyError>(error: E, seconds: number): E {
  return Object.assign(error, { headers: { 'retry-after': String(Math.max(1, seconds)) } })
}

/**
 * A store has no room for a claim: it is there, and refuses. What runs unprotected where a store is away must not run
 * unprotected because many have come.
 */
export class StoreFull extends Error {
  override name = 'StoreFull'
  readonly code = 'FST_IDEMPOTENCY_STORE_FULL'
}

/** A store call got no answer in time. Its outcome is not known. */
export class StoreTimeout extends Error {
  override name = 'StoreTimeout'
  constructor(ms: number) {
    super(`The idempotency store did not answer within ${ms} ms`)
  }
}

/** What a store has under a key cannot be read, or its answer makes no sense. Somebody has the key, for all one knows. */
export class UnreadableAnswer extends Error {
  /** Is it known that the key is free, or this caller's? */
  readonly isFree: boolean
  constructor(message = 'The idempotency store gave no valid answer', isFree = false) {
    super(message)
    this.isFree = isFree
  }
}

/** A store that has no room for another claim is not down, nor is one whose answer cannot be read. */
export function isNoOutage(error: unknown): boolean {
  return error instanceof UnreadableAnswer || isFull(error)
}

/** Has the store no room for another claim? */
export function isFull(error: unknown): boolean {
  return (error as { code?: unknown } | null | undefined)?.code === 'FST_IDEMPOTENCY_STORE_FULL'
}

const MET_IN_HANDLERS: ReadonlySet<unknown> = new Set([
  'FST_IDEMPOTENCY_STEP',
  'FST_IDEMPOTENCY_CLAIM_LOST',
  'FST_IDEMPOTENCY_KEY_REUSED',
  'FST_IDEMPOTENCY_IN_PROGRESS',
  'FST_IDEMPOTENCY_NOT_REPLAYABLE',
  'FST_IDEMPOTENCY_ABANDONED',
  'FST_IDEMPOTENCY_STORE_UNAVAILABLE',
  'FST_IDEMPOTENCY_TRANSACTION'
])

/** Is it what a handler meets of the plugin's own, in its steps, its transaction, or a run? */
export function isMetInHandler(error: unknown): error is Refusal {
  return error instanceof Error && 'code' in error && MET_IN_HANDLERS.has(error.code)
}

export function isRefusal(error: unknown): error is Refusal {
  return error instanceof Error && 'code' in error && String(error.code).startsWith('FST_IDEMPOTENCY_')
}

/** The status that Fastify gives to an error. */
export function statusOf(error: unknown, current: number): number {
  const { statusCode, status } = (error ?? {}) as { statusCode?: number; status?: number }
  const isError = (code: number | undefined) => code !== undefined && code >= 400 && code <= 599
  return [statusCode, status, current].find(isError) ?? 500
}

/** An answer to the client, such as 403, which a function of the application has thrown. */
export function isClientError(error: unknown): boolean {
  const { statusCode } = (error ?? {}) as { statusCode?: unknown }
  return Number.isInteger(statusCode) && Number(statusCode) >= 400 && Number(statusCode) < 500
}
