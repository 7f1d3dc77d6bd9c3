import { type IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { Writable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import { endByStatus, storeHijacked } from './end-claim.js'
import { type Exchange, isFailure } from './exchange.js'

/*
 * A handler that Fastify's `handlerTimeout` overtakes goes on, and what it replies is still the reply of its operation. So
 * on routes with a timeout the handler has a reply of its own. Until its time is up it stands for the client's; from then
 * on for a late one, which takes the usual way through serialisers, hooks and error handlers to the store, and ends
 * there. Whoever holds the client's reply after that is not the handler.
 *
 * One corner is left: a hook may have kept the client's reply for the handler, which then sends on that. If its time is up
 * before that has been stored, and it gives nothing else, its key gets a tombstone.
 */

type Fastify = { send: FastifyReply['send']; then: Then }
type Then = (fulfilled: () => void, rejected?: (error: Error) => void) => void

/**
 * Gives the exchange a reply for a handler that may be overtaken.
 * @param isOver The time was up before the handler could start: the client's reply is the timeout's already.
 */
export function giveOwnReply(exchange: Exchange, isOver: boolean): void {
  const client = exchange.reply
  const fastify = Object.getPrototypeOf(client) as Fastify
  let current = client
  let isUsed = false
  let isClientUsed = false

  function send(payload?: unknown): FastifyReply {
    isUsed = true
    exchange.noteSent(payload)
    return fastify.send.call(own, payload)
  }

  // Whoever waits for a reply that has been overtaken waits for the late one.
  const then: Then = (fulfilled, rejected) => {
    exchange.awaitReply()
    const awaited = current
    const told = () => {
      exchange.replyIsOver()
      fulfilled()
    }
    const unlessLate = (end: () => void) => {
      if (current === awaited) end()
      else fastify.then.call(current, told, rejected)
    }
    const failed = (error: Error) => unlessLate(() => rejected?.(error))
    fastify.then.call(awaited, () => unlessLate(told), failed)
  }

  client.send = function (this: FastifyReply, payload?: unknown) {
    if (exchange.isLate) {
      // Fastify drops it.
      if (this.sent) stray(exchange)
    } else if (isTimeout(payload) && exchange.stage.is === 'running' && exchange.handler !== 'failed') {
      current = late(exchange, client)
      exchange.timeoutStruck(isUsed)
      if (isClientUsed) stray(exchange)
    } else {
      if (isTimeout(payload)) exchange.timeoutStruckError()
      isClientUsed = true
      exchange.noteSent(payload)
    }
    return fastify.send.call(this, payload)
  }

  const own: FastifyReply = new Proxy(Object.create(fastify), {
    get(_, name) {
      if (name === 'send') return send
      if (name === 'then') return then
      // Decorators that are getters make something of the reply that they are asked of.
      return Reflect.get(current, name, own)
    },
    set: (_, name, value) => Reflect.set(current, name, value),
    has: (_, name) => Reflect.has(current, name),
    deleteProperty: (_, name) => Reflect.deleteProperty(current, name),
    defineProperty: (_, name, descriptor) => Reflect.defineProperty(current, name, descriptor),
    getOwnPropertyDescriptor: (_, name) => Reflect.getOwnPropertyDescriptor(current, name),
    ownKeys: () => Reflect.ownKeys(current)
  })
  exchange.giveOwn(own)
  if (!isOver) return
  current = late(exchange, client)
  exchange.timeoutStruck(false)
}

/** Something was sent on the client's reply that should have gone to the handler's own. If that was all, the claim ends. */
function stray(exchange: Exchange): void {
  exchange.sentOnClientReply()
  const { handler, operation, stage } = exchange
  if (stage.is === 'running' && stage.reply === 'awaited' && handler !== 'working') storeHijacked(operation)
}

/** Fastify has nothing to tell its timeout by but the code of its error. */
function isTimeout(error: unknown): boolean {
  return error instanceof Error && (error as { code?: unknown }).code === 'FST_ERR_HANDLER_TIMEOUT'
}

/** What Fastify knows of a reply's way to its client, by the descriptions of its symbols. */
const STATE_OF_SENDING =
  /^fastify\.reply\.(?:isError|errorHandlerCalled|hijacked|isRunningOnErrorHook|nextErrorHandler|headers|endTime)$/

/** A reply as the handler has left the client's, with all that others have put on it, that nobody receives. */
function late(exchange: Exchange, client: FastifyReply): FastifyReply {
  const { request, log } = client
  const response = discardingResponse(request.raw)
  const Reply = client.constructor as new (...args: unknown[]) => FastifyReply
  const reply = new Reply(response, request, log)
  for (const name of Reflect.ownKeys(client)) {
    const isOurs = name === 'raw' || name === 'send'
    const isState = typeof name === 'symbol' && STATE_OF_SENDING.test(name.description ?? '')
    if (!isOurs && !isState) Reflect.set(reply, name, Reflect.get(client, name))
  }
  reply.headers(client.getHeaders())
  response.statusCode = client.statusCode
  // Raw bytes, or an error whose handlers have all failed: Fastify does not bring those to onSend.
  response.once('prefinish', () => {
    const { operation, stage } = exchange
    if (stage.is !== 'running') return
    if (isFailure(stage)) endByStatus(exchange, stage.failure?.error)
    else storeHijacked(operation)
  })
  // Raw bytes that broke off.
  response.once('close', () => {
    if (exchange.stage.is === 'running' && reply.sent) storeHijacked(exchange.operation)
  })
  return reply
}

/** A response that takes whatever it is given, and sends it nowhere. */
function discardingResponse(request: IncomingMessage): ServerResponse {
  const response = new ServerResponse(request)
  // Never full: nobody passes its 'drain' on to the response.
  const nowhere = new Writable({ highWaterMark: Number.MAX_SAFE_INTEGER, write: (_chunk, _encoding, done) => done() })
  // Of a response that is destroyed. There is nobody whom that concerns.
  nowhere.on('error', () => {})
  response.assignSocket(nowhere as Socket)
  // As a connection would: whoever waits for 'close' is told.
  response.once('finish', () => nowhere.destroy())
  return response
}

/** What Fastify does with a value that a handler has returned. */
export function sendReturned(reply: FastifyReply, value: unknown): void {
  try {
    reply.send(value)
  } catch (error) {
    sendThrown(reply, error)
  }
}

/** What Fastify does with an error that a handler has thrown. */
export function sendThrown(reply: FastifyReply, error: unknown): void {
  for (const name of Object.getOwnPropertySymbols(reply)) {
    // What is thrown need not be an Error.
    if (name.description === 'fastify.reply.isError') Reflect.set(reply, name, true)
  }
  reply.send(error)
}
