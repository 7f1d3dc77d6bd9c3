import type { FastifyReply, FastifyRequest } from 'fastify'
import type { StoredRecord, TombstoneReason } from '../types/index.js'
import { isThenable, type Maybe } from './at-hand.js'
import { asStream, CapturedStream, headersSince, type Payload, replyRecord, tombstone } from './capture.js'
import type { Exchange } from './exchange.js'
import type { Operation } from './operation.js'
import { isFinal, type Policy } from './options.js'
import { restoreAll } from './replay.js'

/* The ways in which a claim ends, by what has become of the reply. */

/** Ends the claim, by a record or a release, while the reply waits; and hands the reply on as it was. */
export function finish(exchange: Exchange, payload: Payload, record: StoredRecord | null): Maybe<Payload> {
  const { operation } = exchange
  exchange.sending = 'storing'
  const ended =
    record === null ? operation.release() : operation.complete(record, exchange.failed && !exchange.workDone)
  if (ended instanceof Promise) return finishLater(exchange, payload, ended)
  exchange.sending = 'passed'
  return payload
}

async function finishLater(exchange: Exchange, payload: Payload, ended: Promise<void>): Promise<Payload> {
  const { reply } = exchange
  const { statusCode } = reply
  const headers = reply.getHeaders()
  try {
    await ended
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
  return payload
}

export function sendStream(exchange: Exchange, payload: Payload, final: boolean): Payload {
  const { operation, reply, headersBefore, failed } = exchange
  const { policy } = operation
  const source = asStream(payload)
  // Neither a stream nor anything else that can be sent: Fastify will say so.
  if (source === null) return payload
  const { statusCode } = reply
  const headers = headersSince(headersBefore, reply, policy)
  const length = Number(reply.getHeader('content-length') ?? Number.NaN)
  const isEventStream = /^text\/event-stream\b/i.test(String(reply.getHeader('content-type') ?? ''))
  exchange.stream = new CapturedStream(
    source,
    {
      limit: final ? policy.maxReplySize : 0,
      expected: Number.isNaN(length) ? undefined : length,
      drain: !isEventStream
    },
    {
      ended: async (body) => {
        if (!final) return operation.release()
        if (body === null) return bury(operation, 'too-large')
        return operation.complete(replyRecord(operation.fingerprint, statusCode, headers, body), failed)
      },
      failed: (beforeFirstByte) => (final && !beforeFirstByte ? bury(operation, 'stream-failed') : operation.release())
    }
  )
  exchange.sending = 'passed'
  return exchange.stream
}

/** The operation has run, but its reply cannot be kept. */
async function bury(operation: Operation, reason: TombstoneReason): Promise<void> {
  return operation.complete(tombstone(operation.fingerprint, reason))
}

/** The same when the reply has gone its own way: whoever got it cannot be told when a transaction fails. */
export function buryHijacked(operation: Operation): void {
  bury(operation, 'hijacked').catch(() => {})
}

/** Ends the claim by the status alone: final, and not kept; or not final. */
export function endUnkept({ operation, reply }: Exchange, statusCode: number): void {
  const { statusCode: before } = reply
  reply.raw.statusCode = statusCode
  const final = isFinalReply(operation.policy, operation.request, reply)
  reply.raw.statusCode = before
  if (final) buryHijacked(operation)
  else void operation.release()
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
