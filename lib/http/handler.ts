import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isThenable } from '../util/sync-promise.js'
import { stop } from './client-close.js'
import { NowhereResponse } from './discarding-response.js'
import { type Exchange, exchangeOf, isClosed, noteSent } from './exchange.js'
import { goOnNowhere } from './handler-timeout.js'
import { snapshot } from './reply-record.js'
import { buryHijacked, endUnkept, statusOf } from './store-reply.js'

export type Handler = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply) => unknown
/** What becomes of an error that refuses the request. */
type Refuse = (request: FastifyRequest, reply: FastifyReply, error: unknown) => Error

/** In the handler's place: starts the operation, and sees how the handler ends. */
export function protect(handler: Handler, refuse: Refuse): RouteHandlerMethod {
  return function idempotent(this: FastifyInstance, request: FastifyRequest, reply: FastifyReply): unknown {
    const exchange = exchangeOf(request)
    if (exchange === null || exchange.operation.phase === 'unprotected') return handler.call(this, request, reply)
    try {
      if (!exchange.operation.start()) return stop(reply)
    } catch (error) {
      throw refuse(request, reply, error)
    }
    exchange.handler = 'started'
    exchange.headersBefore = snapshot(reply)
    // biome-ignore lint/suspicious/noThenProperty: a reply is a thenable, and who waits for it tells something.
    reply.then = awaitReply as never
    reply.send = sendFirst as never
    let result: unknown
    try {
      result = handler.call(this, request, reply)
    } catch (error) {
      return afterThrow(exchange, error)
    }
    if (result === undefined || result === reply) {
      exchange.handler = 'detached'
      // Fastify need not wait for a reply that comes from elsewhere.
      return undefined
    }
    if (!isThenable(result)) return afterReturn(exchange, result)
    // Promise.resolve, because a thenable that is not a promise may do its work once per `then`.
    return Promise.resolve(result).then(
      (value) => afterReturn(exchange, value),
      (error) => afterThrow(exchange, error)
    )
  } as RouteHandlerMethod
}

/** In the place of a reply's own `then`, while a handler runs: it resolves when the response is over. */
function awaitReply(this: FastifyReply, fulfilled: () => void, rejected: (error: Error) => void): void {
  const exchange = exchangeOf(this.request)
  if (exchange !== null) exchange.isReturned = true
  const told = () => {
    if (exchange !== null) exchange.toldOver = true
    fulfilled()
  }
  Object.getPrototypeOf(this).then.call(this, told, rejected)
}

/** In the place of a reply's own `send`, while a handler runs: notes whether it is a reply that it sends, or an error. */
function sendFirst(this: FastifyReply, payload?: unknown): FastifyReply {
  const exchange = exchangeOf(this.request)
  if (exchange !== null) noteSent(exchange, payload)
  return Object.getPrototypeOf(this).send.call(this, payload)
}

/** The handler has returned, or its promise has: what Fastify is to see of it. */
function afterReturn(exchange: Exchange, value: unknown): unknown {
  const { operation, reply, timeout } = exchange
  giveBackLate(exchange)
  if (timeout !== null) return timeout.over.then(() => afterReturnLate(exchange, value))
  if (exchange.sending !== 'no') {
    exchange.handler = 'settled'
    // Fastify takes the reply for unsent while it is being stored, and would send what was returned as well.
    if (value !== undefined) reply.log.warn('handler returned a value after its reply was sent')
    return reply
  }
  if (value === undefined && exchange.toldOver && !reply.sent) {
    // The response is over, but nothing was sent: the handler replies from elsewhere, like one with a callback.
    exchange.handler = 'detached'
    return reply
  }
  exchange.handler = 'settled'
  if (value === undefined && (exchange.clientGone || isClosed(reply))) {
    if (reply.sent) buryHijacked(operation)
    // Fastify sends nothing to a client that is gone: then nothing would be stored either.
    else return reply.send()
  }
  return value
}

/** The handler had replied, and has ended now. */
function giveBackLate(exchange: Exchange): void {
  if (!exchange.givesBackLate) return
  exchange.givesBackLate = false
  void exchange.operation.release()
}

/** The same after the handler's time was up. */
function afterReturnLate(exchange: Exchange, value: unknown): unknown {
  const { operation, reply, timeout } = exchange
  // It has replied meanwhile.
  if (timeout === null) return afterReturn(exchange, value)
  if (value === undefined && exchange.toldOver) {
    exchange.handler = 'detached'
    return reply
  }
  goOnNowhere(exchange, timeout)
  exchange.handler = 'settled'
  // Hijacked, by the handler or by what answered in its place: Fastify drops what is sent.
  if (reply.sent) buryHijacked(operation)
  else if (value !== undefined) return afterReturn(exchange, value)
  else return reply.send()
  return reply
}

function afterThrow(exchange: Exchange, error: unknown): unknown {
  const { reply, timeout } = exchange
  giveBackLate(exchange)
  exchange.handler = 'failed'
  if (timeout !== null) {
    return timeout.over.then(() => {
      if (exchange.timeout !== null) goOnNowhere(exchange, timeout)
      return afterThrow(exchange, error)
    })
  }
  const isLate = reply.raw instanceof NowhereResponse
  if (exchange.sending === 'no' && !isLate) throw error
  reply.log.error({ err: error }, 'handler failed after its reply was sent')
  // The error's reply cannot be made any more: Fastify's error handlers have had their turn.
  if (exchange.sending === 'no') endUnkept(exchange, statusOf(error, reply.statusCode), true)
  return reply
}
