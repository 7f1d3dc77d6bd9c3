import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyReply } from 'fastify'
import type { StoredRecord } from '../../types/index.js'
import { statusOf } from '../errors.js'
import type { Operation } from '../operation/operation.js'
import type { MaybePromise } from '../util/sync-promise.js'
import { type Exchange, isFailure, type Running } from './exchange.js'
import { isFinalReply } from './finality.js'
import { type Headers, restoreAll } from './headers.js'
import type { Payload } from './payload.js'
import { tombstone } from './reply-record.js'

/* The ways in which a claim ends: by a record or a release, while the reply waits or has gone its own way. */

/** Stores the record, or gives the key back where there is none, while the reply waits; and hands it on as it was. */
export function storeThenSend(
  exchange: Exchange,
  running: Running,
  payload: Payload,
  record: StoredRecord | null
): MaybePromise<Payload> {
  const { operation } = exchange
  exchange.store()
  const ended =
    record === null || operation.discarded ? giveBack(exchange) : operation.complete(record, isFailure(running))
  if (ended instanceof Promise) return sendAfter(exchange, running.headersBefore, payload, ended)
  exchange.send()
  return payload
}

/** A key is not given back while its handler is at work, though it has replied: a retry would run beside it. */
export async function giveBack(exchange: Exchange): Promise<void> {
  if (exchange.handler === 'working') {
    // Whoever has nothing more to do after its reply has returned by then.
    await turn()
    if (exchange.giveBackAtEnd()) return
  }
  await exchange.operation.release()
}

/**
 * @param headersBefore Those of before the handler, for the case that nothing of its reply is true.
 * @param ended May resolve with another payload.
 */
export async function sendAfter(
  exchange: Exchange,
  headersBefore: Headers,
  payload: Payload,
  ended: Promise<unknown>
): Promise<Payload> {
  const { reply } = exchange
  const { statusCode } = reply
  const headers = reply.getHeaders()
  let sent: Payload
  try {
    sent = ((await ended) as Payload) ?? payload
  } catch (error) {
    // A transaction that was not committed: the error is another reply.
    restoreAll(reply, headersBefore)
    reply.code(statusOf(error, 500))
    throw error
  } finally {
    if (exchange.stage.is === 'storing') exchange.send()
  }
  undoChanges(reply, statusCode, headers)
  return sent
}

/** What was done to the reply while it was being stored came too late, as it would if nothing had been stored. */
function undoChanges(reply: FastifyReply, statusCode: number, headers: Headers): void {
  if (reply.raw.headersSent) return
  if (reply.statusCode !== statusCode) reply.code(statusCode)
  restoreAll(reply, headers)
}

/**
 * The operation has run, but its reply has gone its own way: whoever got it cannot be told when a transaction fails.
 * @param failed The handler has thrown: in a transaction its writes are undone.
 */
export function storeHijacked(operation: Operation, failed = false): void {
  Promise.resolve(operation.complete(tombstone(operation.storedFingerprint, 'hijacked'), failed)).catch(() => {})
}

/** Ends the claim by the status of an error, whose reply is not known: final, and not kept; or not final. */
export function endByStatus({ operation, reply, request }: Exchange, error: unknown): void {
  const { statusCode: before } = reply
  reply.raw.statusCode = statusOf(error, before)
  const final = isFinalReply(operation.policy, request, reply, error)
  reply.raw.statusCode = before
  if (final) storeHijacked(operation, true)
  else void operation.release()
}
