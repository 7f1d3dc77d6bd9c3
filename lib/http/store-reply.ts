import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Policy } from '../options.js'
import type { MaybePromise } from '../util/sync-promise.js'
import type { TransientSet } from '../util/transient.js'
import type { Unfinished } from './captured-stream.js'
import { endByStatus, storeThenSend } from './end-claim.js'
import type { Exchange, Running } from './exchange.js'
import { isFinalReply } from './finality.js'
import { takeOffUnsendable } from './headers.js'
import { dropStream, isBuffered, isResponse, type Payload } from './payload.js'
import { headersSince, replyRecord, tombstone } from './reply-record.js'
import { storeStream } from './store-stream.js'

/**
 * The handler's reply has come: decides what is kept of it, before it leaves.
 * @param open Where streams are to be found for as long as their sources are open.
 * @returns The payload that is to be sent. Rejects with the error that is to be sent in its place.
 */
export function storeReply(
  exchange: Exchange,
  running: Running,
  payload: Payload,
  policy: Policy,
  open: TransientSet<Unfinished>
): MaybePromise<Payload> {
  const { operation, reply, request } = exchange
  const { storedFingerprint: fingerprint } = operation
  if (running.reply === 'overtaken') {
    endByStatus(exchange, running.failure?.error)
    return payload
  }
  // A part of it was written past Fastify.
  if (reply.raw.headersSent) return storeThenSend(exchange, running, payload, tombstone(fingerprint, 'hijacked'))
  if (isResponse(payload) && payload.bodyUsed) return payload
  const body = isResponse(payload) ? unwrap(reply, payload) : payload
  const unsendable = takeOffUnsendable(reply)
  if (unsendable !== undefined && running.failure === null) {
    // Node would say so when the reply is stored already, and no replay of it could ever be sent.
    dropStream(body)
    return Promise.reject(unsendable)
  }
  const isFinal = running.reply === 'broken' || isFinalReply(policy, request, reply, running.failure?.error)
  if (running.reply === 'broken') warnOfBroken(request, running)
  if (!isBuffered(body) && !hasNoBody(reply.statusCode)) return storeStream(exchange, running, body, isFinal, open)
  if (!isFinal) return storeThenSend(exchange, running, body, null)
  const kept = isBuffered(body) ? body : undefined
  const record =
    sizeOf(kept) > policy.maxReplySize
      ? tombstone(fingerprint, 'too-large')
      : replyRecord(fingerprint, reply.statusCode, headersSince(running.headersBefore, reply, policy), kept)
  return storeThenSend(exchange, running, body, record)
}

/** What Fastify would do with a `Response` after the last hook, which is too late to decide about the reply. */
function unwrap(reply: FastifyReply, { status, headers, body }: Response): Payload {
  reply.code(status)
  for (const [name, value] of headers) reply.header(name, value)
  return body as Payload
}

function warnOfBroken(request: FastifyRequest, { failure }: Running): void {
  request.log.warn({ err: failure?.error }, 'handler succeeded, but its reply failed: the error is stored as the reply')
}

/** RFC 9110 §6.4.1: such replies end with their head, whatever the handler gave. */
function hasNoBody(statusCode: number): boolean {
  return statusCode === 204 || statusCode === 304
}

function sizeOf(body: string | Buffer | null | undefined): number {
  return body === undefined || body === null ? 0 : Buffer.byteLength(body)
}
