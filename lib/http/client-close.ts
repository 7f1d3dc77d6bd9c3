import type { ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import type { Exchange } from './exchange.js'
import { buryHijacked, endOvertaken } from './store-reply.js'

/** The exchanges whose responses wait behind another on their connection, by the connection's socket. */
const queued = new WeakMap<object, Set<Exchange>>()

/** From now on it is noticed when the client leaves. */
export function watchClient(exchange: Exchange): void {
  const { raw } = exchange.reply
  // Less than what it takes to find the exchange by its response.
  raw.on('close', () => onClose(exchange, raw))
  // A response that waits behind another on its connection is not told when the connection ends.
  if (raw.socket === null) watchConnection(exchange)
}

function watchConnection(exchange: Exchange): void {
  const { socket } = exchange.reply.request
  let exchanges = queued.get(socket)
  if (exchanges === undefined) {
    exchanges = new Set()
    queued.set(socket, exchanges)
    socket.once('close', onConnectionClose)
  }
  exchanges.add(exchange)
}

function onConnectionClose(this: object): void {
  for (const exchange of queued.get(this) ?? []) onClose(exchange, exchange.reply.raw)
}

/** A response's 'close', in whatever way it ended. */
function onClose(exchange: Exchange, response: ServerResponse): void {
  if (response.req?.socket) queued.get(response.req.socket)?.delete(exchange)
  const { operation, reply } = exchange
  if (reply.raw !== response) {
    // The client got the timeout's reply: the handler has another one now.
  } else if (exchange.handler === 'waiting') {
    void operation.cancel()
  } else if (exchange.sending === 'no') {
    exchange.clientGone = true
    // The response was ended without Fastify: by the handler itself, or because sending its reply failed.
    if (response.writableEnded && exchange.isOvertaken) endOvertaken(exchange)
    else if (response.writableEnded && exchange.failed && !exchange.workDone) void operation.release()
    else if (response.writableEnded || isHijacked(reply)) buryHijacked(operation)
    // Else the client has left, and the handler is still at work: its reply will be stored, or its raw end seen.
    else response.once('prefinish', () => onClose(exchange, response))
  } else {
    // Nobody reads a stream any more that is still going on: it is read to its end for the record.
    exchange.stream?.destroy()
  }
}

function isHijacked(reply: FastifyReply): boolean {
  return reply.sent && !reply.raw.writableEnded
}

/** Nobody is there to answer, and nothing must run: Fastify stops where a reply counts as sent. */
export function stop(reply: FastifyReply): void {
  reply.hijack()
}
