import type { ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import { TransientSet } from '../util/transient.js'
import { endByStatus, storeHijacked } from './end-claim.js'
import { type Exchange, isFailure } from './exchange.js'

/* A client that leaves: before the handler starts its key is given back, afterwards nothing changes. */

/** The exchanges whose responses wait behind another on their connection, by the connection's socket. */
const queued = new WeakMap<object, TransientSet<Exchange>>()

/** From now on it is noticed when the client leaves. */
export function watchClient(exchange: Exchange): void {
  const { raw } = exchange.reply
  // Who keeps the response, as the result of an `inject` does, is not to keep the request with its body.
  let watched: Exchange | null = exchange
  raw.on('close', () => {
    if (watched !== null) onClose(watched, raw)
    watched = null
  })
  // A response that waits behind another on its connection is not told when the connection ends.
  if (raw.socket === null) watchConnection(exchange)
}

function watchConnection(exchange: Exchange): void {
  const { socket } = exchange.reply.request
  let exchanges = queued.get(socket)
  if (exchanges === undefined) {
    exchanges = new TransientSet()
    queued.set(socket, exchanges)
    socket.once('close', onConnectionClose)
  }
  exchanges.add(exchange)
}

function onConnectionClose(this: object): void {
  for (const exchange of queued.get(this)?.items() ?? []) onClose(exchange, exchange.reply.raw)
}

/** A response's 'close', in whatever way it ended. */
function onClose(exchange: Exchange, response: ServerResponse): void {
  if (response.req?.socket) queued.get(response.req.socket)?.delete(exchange)
  const { operation, reply, stage } = exchange
  // The client had the timeout's reply: the handler has another one now.
  if (reply.raw !== response) return
  if (stage.is === 'running') {
    // Where the response was ended, that was done without Fastify: by the handler itself, or because sending its reply failed.
    if (response.writableEnded && isFailure(stage)) endByStatus(exchange, stage.failure?.error)
    else if (response.writableEnded || isHijacked(reply)) storeHijacked(operation)
    // Else the client has left, and the handler is still at work: its reply will be stored, or its raw end seen.
    else response.once('prefinish', () => onClose(exchange, response))
  } else if (stage.is === 'sent') {
    // Nobody reads a stream any more that is still going on: it is read to its end for the record.
    stage.stream?.destroy()
  } else if (stage.is !== 'storing') {
    void operation.cancel()
  }
}

function isHijacked(reply: FastifyReply): boolean {
  return reply.sent && !reply.raw.writableEnded
}

/** Has the client gone? HTTP/2 has no `destroyed` on its responses. */
export function isClosed({ raw, request }: FastifyReply): boolean {
  const { stream } = raw as { stream?: { destroyed: boolean } }
  return raw.destroyed || stream?.destroyed || request.raw.aborted || request.socket?.destroyed || false
}

/** Nobody is there to answer, and nothing must run: Fastify stops where a reply counts as sent. */
export function stop(reply: FastifyReply): void {
  reply.hijack()
}
