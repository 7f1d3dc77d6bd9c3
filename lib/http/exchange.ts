import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Refusal } from '../errors.js'
import type { Operation } from '../operation/operation.js'
import type { CapturedStream, Headers } from './reply-record.js'

/** Where a request keeps its exchange; `null` without a key, `SKIPPED` when `skip` said so. */
export const kExchange = Symbol('fastify-idempotency.exchange')
/** Where a request keeps the plugin's own error that answers it. */
export const kRefusal = Symbol('fastify-idempotency.refusal')

/** `skip` has said so. */
export const SKIPPED = Symbol('skipped')

declare module 'fastify' {
  interface FastifyRequest {
    [kExchange]: Exchange | typeof SKIPPED | null
    [kRefusal]: Refusal | null
  }
}

const NO_HEADERS = Object.freeze({}) as Headers

/** One request and its reply, on the way of one operation. */
export class Exchange {
  readonly operation: Operation
  /** The client's, or the handler's own where a `handlerTimeout` may overtake it. */
  reply: FastifyReply
  /** The headers that were on the reply when the handler started, or the replay. */
  headersBefore: Headers = NO_HEADERS
  /**
   * `detached`: the handler has returned without a promise, and replies from a callback, if ever. `failed`: it has thrown.
   */
  handler: 'waiting' | 'started' | 'detached' | 'settled' | 'failed' = 'waiting'
  /** Where the reply is: not there yet, being stored, or handed on to Fastify. */
  sending: 'no' | 'storing' | 'passed' = 'no'
  /** Has an error come up, and which? */
  failed = false
  error: unknown = null
  /** What was sent first, by the handler or in its place. */
  sent: 'nothing' | 'value' | 'error' = 'nothing'
  /** The handler's reply was final, but what comes behind it failed: the error's reply is that of work that is done. */
  workDone = false
  /** Has a reply been refused for a header that cannot be sent? The next one goes without such headers. */
  refusedHeader = false
  clientGone = false
  /** Has an async handler returned its reply? Whoever does has ended. */
  isReturned = false
  /** The reply was not final and has gone, but the handler is still at work: the key is given back when it ends. */
  givesBackLate = false
  /** Was somebody told who waited for the reply, as an async handler does that returns it, that it is over? */
  toldOver = false
  stream: CapturedStream | null = null
  /** Has `handlerTimeout` answered the client in the handler's place? */
  isLate = false
  /** The timeout's reply has come to onSend. */
  isClientAnswered = false
  /** Something was sent on the client's reply after that: Fastify has dropped it. */
  isStray = false
  /** The time was up while the handler's error was on its way to us: which of the two the client gets cannot be told. */
  isOvertaken = false

  constructor(operation: Operation, reply: FastifyReply) {
    this.operation = operation
    this.reply = reply
  }
}

export function exchangeOf(request: FastifyRequest): Exchange | null {
  const exchange = request[kExchange]
  return exchange instanceof Exchange ? exchange : null
}

/** Has the client gone? HTTP/2 has no `destroyed` on its responses. */
export function isClosed({ raw, request }: FastifyReply): boolean {
  const { stream } = raw as { stream?: { destroyed: boolean } }
  return raw.destroyed || stream?.destroyed || request.raw.aborted || request.socket?.destroyed || false
}

/** Something is sent, by the handler or in its place: what came first counts. */
export function noteSent(exchange: Exchange, payload: unknown): void {
  if (exchange.sent !== 'nothing') return
  exchange.sent = payload instanceof Error || exchange.handler === 'failed' ? 'error' : 'value'
}
