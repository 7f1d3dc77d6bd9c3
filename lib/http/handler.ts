import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isThenable } from '../util/sync-promise.js'
import { isClosed, stop } from './client-close.js'
import { storeHijacked } from './end-claim.js'
import { type Exchange, exchangeOf, type Running } from './exchange.js'
import { giveOwnReply, sendReturned, sendThrown } from './handler-reply.js'
import { snapshot } from './headers.js'

/* In the place of a route's handler: it starts under a claim that counts, and its end is seen, however it ends. */

export type Handler = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply) => unknown
/** What becomes of an error that refuses the request. */
type Refuse = (request: FastifyRequest, reply: FastifyReply, error: unknown) => Error

/** In the handler's place: starts the operation, and sees how the handler ends. */
export function protect(handler: Handler, refuse: Refuse): RouteHandlerMethod {
  // Other plugins may still change it when the route is declared.
  let mayBeOvertaken: boolean | null = null
  return function idempotent(this: FastifyInstance, request: FastifyRequest, reply: FastifyReply): unknown {
    const exchange = exchangeOf(request)
    if (exchange === null || exchange.stage.is === 'unprotected') return handler.call(this, request, reply)
    try {
      if (!exchange.operation.start()) return stop(reply)
    } catch (error) {
      throw refuse(request, reply, error)
    }
    const isOver = exchange.stage.is === 'claiming' && exchange.stage.failed
    exchange.start(snapshot(reply))
    mayBeOvertaken ??= (request.routeOptions.handlerTimeout ?? 0) > 0
    if (mayBeOvertaken) giveOwnReply(exchange, isOver)
    else watchReply(reply)
    let result: unknown
    try {
      result = handler.call(this, request, exchange.reply)
    } catch (error) {
      return afterThrow(exchange, reply, error)
    }
    if (result === undefined || result === exchange.reply) {
      exchange.end('elsewhere')
      // Fastify need not wait for a reply that comes from elsewhere.
      return undefined
    }
    if (!isThenable(result)) return afterReturn(exchange, reply, result)
    // Promise.resolve, because a thenable that is not a promise may do its work once per `then`.
    return Promise.resolve(result).then(
      (value) => afterReturn(exchange, reply, value),
      (error) => afterThrow(exchange, reply, error)
    )
  } as RouteHandlerMethod
}

/** Notes what a handler does with a reply that nobody else has. */
function watchReply(reply: FastifyReply): void {
  // biome-ignore lint/suspicious/noThenProperty: a reply is a thenable, and who waits for it tells something.
  reply.then = awaitReply as never
  reply.send = sendFirst as never
}

/** In the place of a reply's own `then`, while a handler runs: it resolves when the response is over. */
function awaitReply(this: FastifyReply, fulfilled: () => void, rejected: (error: Error) => void): void {
  const exchange = exchangeOf(this.request)
  exchange?.awaitReply()
  const told = () => {
    exchange?.replyIsOver()
    fulfilled()
  }
  Object.getPrototypeOf(this).then.call(this, told, rejected)
}

/** In the place of a reply's own `send`, while a handler runs: notes whether it is a reply that it sends, or an error. */
function sendFirst(this: FastifyReply, payload?: unknown): FastifyReply {
  exchangeOf(this.request)?.noteSent(payload)
  return Object.getPrototypeOf(this).send.call(this, payload)
}

/** The handler has returned, or its promise has: what Fastify is to see of it. */
function afterReturn(exchange: Exchange, client: FastifyReply, value: unknown): unknown {
  const { operation, reply, stage } = exchange
  if (stage.is !== 'running') {
    if (exchange.end('ended')) void operation.release()
    // Fastify takes the reply for unsent while it is being stored, and would send what was returned as well.
    if (value !== undefined) reply.log.warn('handler returned a value after its reply was sent')
    return client
  }
  if (value === undefined && exchange.handler === 'told' && !reply.sent) {
    // The response is over, but nothing was sent: the handler replies from elsewhere, like one with a callback.
    exchange.end('elsewhere')
    return client
  }
  exchange.end('ended')
  if (exchange.isLate) {
    sendLate(exchange, stage, value)
    return client
  }
  if (value === undefined && isClosed(reply)) {
    if (reply.sent) storeHijacked(operation)
    // Fastify sends nothing to a client that is gone: then nothing would be stored either.
    else return reply.send()
  }
  if (reply === client) return value
  // Sent by Fastify, it could not be told from the reply of a timeout that strikes while hooks hold it.
  const isMissing = stage.reply === 'awaited' && !reply.raw.headersSent
  if (!reply.sent && (value !== undefined || isMissing)) sendReturned(reply, value)
  return client
}

/** What a handler returns after its time: Fastify does not look at it any more. */
function sendLate(exchange: Exchange, running: Running, value: unknown): void {
  const { operation, reply } = exchange
  const isMissing = value === undefined && running.reply === 'awaited'
  if (reply.sent || (isMissing && exchange.isStray)) storeHijacked(operation)
  // Unless what it has sent is still on its way through hooks.
  else if (value !== undefined || isMissing) sendReturned(reply, value)
}

function afterThrow(exchange: Exchange, client: FastifyReply, error: unknown): unknown {
  const { operation, reply, stage } = exchange
  if (exchange.end('failed')) void operation.release()
  if (stage.is === 'running' && !exchange.isLate) throw error
  if (stage.is === 'running' && stage.reply === 'awaited' && !reply.sent) {
    sendThrown(reply, error)
    return client
  }
  reply.log.error({ err: error }, 'handler failed after its reply was sent')
  if (stage.is === 'running' && reply.sent) storeHijacked(operation, true)
  return client
}
