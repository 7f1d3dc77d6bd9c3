import type { TombstoneReason } from '../../types/index.js'
import type { MaybePromise } from '../util/sync-promise.js'
import type { TransientSet } from '../util/transient.js'
import { CapturedStream, type CaptureOptions, type StreamFate, type Unfinished } from './captured-stream.js'
import { giveBack, sendAfter } from './end-claim.js'
import { type Exchange, isFailure, type Running } from './exchange.js'
import type { Headers } from './headers.js'
import { asStream, type Payload } from './payload.js'
import { headersSince, replyRecord, tombstone } from './reply-record.js'

/* A streamed reply: passed on as it comes and stored at its end; but in a transaction read, committed, and then sent. */

/** RFC 9110 §8.3.1: the type is known in any case. */
const EVENT_STREAM = /^\s*text\/event-stream\s*(?:[;,]|$)/i

/**
 * Ends the claim when the stream has come to its end, while that is held back.
 * @param open Where the stream is to be found for as long as its source is open.
 */
export function storeStream(
  exchange: Exchange,
  running: Running,
  payload: Payload,
  final: boolean,
  open: TransientSet<Unfinished>
): MaybePromise<Payload> {
  const { operation, reply, isLate } = exchange
  const { policy, storedFingerprint: fingerprint } = operation
  const { headersBefore } = running
  const source = asStream(payload)
  // Neither a stream nor anything else that can be sent: Fastify will say so.
  if (source === null) return payload
  const { statusCode } = reply
  const headers = headersSince(headersBefore, reply, policy)
  const length = Number(reply.getHeader('content-length') ?? Number.NaN)
  const isEventStream = EVENT_STREAM.test(String(reply.getHeader('content-type') ?? ''))
  const failed = isFailure(running)
  const recordOf = (body: Buffer | TombstoneReason) =>
    typeof body === 'string' ? tombstone(fingerprint, body) : replyRecord(fingerprint, statusCode, headers, body)
  const end = async (body: Buffer | TombstoneReason) =>
    final ? operation.complete(recordOf(body), failed) : giveBack(exchange)
  const options: CaptureOptions = {
    limit: policy.maxReplySize,
    expected: Number.isNaN(length) ? undefined : length,
    keeps: !isEventStream && (final || policy.transaction),
    lease: policy.lease,
    open
  }
  if (policy.transaction) {
    const stream = new CapturedStream(source, options, OVER)
    exchange.store()
    return sendCommitted(exchange, headersBefore, commit(exchange, stream, isEventStream, end))
  }
  // An event stream that has ended has not failed, but has gone past us.
  const unkept = isEventStream ? 'hijacked' : 'too-large'
  const stream = new CapturedStream(source, options, {
    ended: (body) => end(body ?? unkept),
    failed: (beforeFirstByte) => (beforeFirstByte ? operation.release() : end('stream-failed'))
  })
  if (isLate) stream.leave()
  exchange.send(stream)
  return stream
}

async function sendCommitted(
  exchange: Exchange,
  headersBefore: Headers,
  committed: Promise<Payload>
): Promise<Payload> {
  const sent = await sendAfter(exchange, headersBefore, undefined, committed)
  // The length of what was read is known.
  if (Buffer.isBuffer(sent)) exchange.reply.removeHeader('transfer-encoding')
  return sent
}

/** Of a stream whose claim has ended before it was sent. */
const OVER: StreamFate = { ended: async () => {}, failed: async () => {} }

/**
 * In a transaction: the connection is the pool's, and a client has time. What cannot be read is sent after the commit.
 * Resolves with what is to be sent.
 */
async function commit(
  exchange: Exchange,
  stream: CapturedStream,
  isEventStream: boolean,
  end: (body: Buffer | TombstoneReason) => Promise<void>
): Promise<Payload> {
  const { operation, isLate } = exchange
  let read: Buffer | TombstoneReason
  try {
    read = isEventStream ? 'hijacked' : await stream.readAhead()
  } catch (error) {
    // Nothing was sent yet: it can still be an error.
    await operation.release()
    throw error
  }
  try {
    await end(read)
  } catch (error) {
    stream.leave()
    throw error
  }
  if (typeof read === 'string') {
    if (isLate) stream.leave()
    exchange.send(stream)
    return stream
  }
  stream.leave()
  return read
}
