import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { StoredRecord, TombstoneReason } from '../../types/index.js'
import type { Operation } from '../operation/operation.js'
import { isFinal, type Policy } from '../options.js'
import { isThenable, type Maybe } from '../util/sync-promise.js'
import type { Exchange } from './exchange.js'
import { restoreAll } from './replay.js'
import {
  asStream,
  CapturedStream,
  type CaptureOptions,
  headersSince,
  type Payload,
  replyRecord,
  type StreamFate,
  tombstone,
  type Unfinished
} from './reply-record.js'

/* The ways in which a claim ends, by what has become of the reply. */

/** Ends the claim, by a record or a release, while the reply waits; and hands the reply on as it was. */
export function finish(exchange: Exchange, payload: Payload, record: StoredRecord | null): Maybe<Payload> {
  const { operation } = exchange
  exchange.sending = 'storing'
  const ended =
    record === null || operation.discarded
      ? giveBack(exchange)
      : operation.complete(record, exchange.failed && !exchange.workDone)
  if (ended instanceof Promise) return finishLater(exchange, payload, ended)
  exchange.sending = 'passed'
  return payload
}

/** A key is not given back while its handler is at work, though it has replied: a retry would run beside it. */
function giveBack(exchange: Exchange): Promise<void> {
  return exchange.handler === 'started' ? giveBackAtEnd(exchange) : exchange.operation.release()
}

async function giveBackAtEnd(exchange: Exchange): Promise<void> {
  // Whoever has nothing more to do after its reply has returned by then.
  await turn()
  if (exchange.handler === 'started' && !exchange.isReturned) exchange.givesBackLate = true
  else await exchange.operation.release()
}

/** @param ended May resolve with another payload. */
async function finishLater(exchange: Exchange, payload: Payload, ended: Promise<unknown>): Promise<Payload> {
  const { reply } = exchange
  const { statusCode } = reply
  const headers = reply.getHeaders()
  let sent: Payload
  try {
    sent = ((await ended) as Payload) ?? payload
  } catch (error) {
    // A transaction that was not committed: nothing of this reply is true, and the error is another reply.
    restoreAll(reply, exchange.headersBefore)
    reply.code(statusOf(error, 500))
    throw error
  } finally {
    exchange.sending = 'passed'
  }
  // What was done to the reply meanwhile came too late, as it would if nothing had been stored.
  if (!reply.raw.headersSent) {
    if (reply.statusCode !== statusCode) reply.code(statusCode)
    restoreAll(reply, headers)
  }
  return sent
}

/** RFC 9110 §8.3.1: the type is known in any case. */
const EVENT_STREAM = /^\s*text\/event-stream\s*(?:[;,]|$)/i

/**
 * Ends the claim when the stream has come to its end, while that is held back.
 * @param open Where the stream is to be found for as long as its source is open.
 */
export function sendStream(
  exchange: Exchange,
  payload: Payload,
  final: boolean,
  open: Set<Unfinished>
): Maybe<Payload> {
  const { operation, reply, headersBefore, failed } = exchange
  const { policy, fingerprint } = operation
  const source = asStream(payload)
  // Neither a stream nor anything else that can be sent: Fastify will say so.
  if (source === null) return payload
  const { statusCode } = reply
  const headers = headersSince(headersBefore, reply, policy)
  const length = Number(reply.getHeader('content-length') ?? Number.NaN)
  const isEventStream = EVENT_STREAM.test(String(reply.getHeader('content-type') ?? ''))
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
    exchange.sending = 'storing'
    return sendCommitted(exchange, new CapturedStream(source, options, OVER), isEventStream, end)
  }
  // An event stream that has ended has not failed, but has gone past us.
  const unkept = isEventStream ? 'hijacked' : 'too-large'
  exchange.stream = new CapturedStream(source, options, {
    ended: (body) => end(body ?? unkept),
    failed: (beforeFirstByte) => (beforeFirstByte ? operation.release() : end('stream-failed'))
  })
  // A reply that comes too late for its client.
  if (exchange.isLate) exchange.stream.leave()
  exchange.sending = 'passed'
  return exchange.stream
}

/** Of a stream whose claim has ended before it was sent. */
const OVER: StreamFate = { ended: async () => {}, failed: async () => {} }

/**
 * A stream in a transaction is read, committed, and then sent: the connection is the pool's, and its client has time.
 * What cannot be read is sent after the commit.
 */
async function sendCommitted(
  exchange: Exchange,
  stream: CapturedStream,
  isEventStream: boolean,
  end: (body: Buffer | TombstoneReason) => Promise<void>
): Promise<Payload> {
  const { operation, reply } = exchange
  const sent = await finishLater(exchange, undefined, commit())
  // The length of what was read is known.
  if (Buffer.isBuffer(sent)) reply.removeHeader('transfer-encoding')
  return sent

  async function commit(): Promise<Payload> {
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
      exchange.stream = stream
      if (exchange.isLate) stream.leave()
      return stream
    }
    stream.leave()
    return read
  }
}

/**
 * The operation has run, but its reply has gone its own way: whoever got it cannot be told when a transaction fails.
 * @param failed The handler has thrown: in a transaction its writes are undone.
 */
export function buryHijacked(operation: Operation, failed = false): void {
  Promise.resolve(operation.complete(tombstone(operation.fingerprint, 'hijacked'), failed)).catch(() => {})
}

/** Ends the claim by the status alone: final, and not kept; or not final. */
export function endUnkept(exchange: Exchange, statusCode: number, failed: boolean): void {
  const { operation } = exchange
  if (isFinalStatus(exchange, statusCode)) buryHijacked(operation, failed)
  else void operation.release()
}

/** The same by the status of the handler's error, where the reply may be that of its timeout. */
export function endOvertaken(exchange: Exchange): void {
  endUnkept(exchange, statusOf(exchange.error, exchange.reply.statusCode), true)
}

/** Would a reply with this status be stored? */
function isFinalStatus({ operation, reply }: Exchange, statusCode: number): boolean {
  const { statusCode: before } = reply
  reply.raw.statusCode = statusCode
  const final = isFinalReply(operation.policy, operation.request, reply)
  reply.raw.statusCode = before
  return final
}

export function isFinalReply(policy: Policy, request: FastifyRequest, reply: FastifyReply): boolean {
  try {
    const answer: unknown = policy.shouldStore(request, reply)
    if (!isThenable(answer)) return Boolean(answer)
    throw new TypeError('option "shouldStore" must answer at once, got a promise')
  } catch (error) {
    // The handler has succeeded: whoever decides about its reply must not undo that.
    request.log.error({ err: error }, 'idempotency option shouldStore failed: the default decides')
    return isFinal(request, reply)
  }
}

/** The status that Fastify gives to an error. */
export function statusOf(error: unknown, current: number): number {
  const { statusCode, status } = (error ?? {}) as { statusCode?: number; status?: number }
  const isError = (code: number | undefined) => code !== undefined && code >= 400 && code <= 599
  return [statusCode, status, current].find(isError) ?? 500
}
