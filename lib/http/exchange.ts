import type { FastifyReply, FastifyRequest } from 'fastify'
import type { StoredReply } from '../../types/index.js'
import type { Refusal } from '../errors.js'
import type { Operation } from '../operation/operation.js'
import type { Transient } from '../util/transient.js'
import type { CapturedStream } from './captured-stream.js'
import type { Headers } from './headers.js'

/* Where a request is on its way. All that changes about that changes here, by transitions that have names. */

/** Where a request keeps its exchange; `null` without a key, `SKIPPED` when `skip` said so. */
export const kExchange = Symbol('fastify-idempotency.exchange')
/** Where a request keeps the plugin's own error that answers it. */
export const kRefusal = Symbol('fastify-idempotency.refusal')

/** `skip` has said so. */
export const SKIPPED = Symbol('skipped')

declare module 'fastify' {
  interface FastifyRequest {
    [kExchange]: Exchange | typeof SKIPPED | null
    [kRefusal]: Refusal | null
  }
}

/**
 * Where a request with a key is on its way:
 *
 *   claiming ──> running ──> storing ──> sent
 *    │    └────> unprotected      (running ──> sent: a stream, whose record is stored at its end)
 *    └─────────> replaying
 */
export type Stage = Claiming | Replaying | Unprotected | Running | Storing | Sent

/** The key is being claimed, or was claimed or refused; the handler has not started. */
interface Claiming {
  readonly is: 'claiming'
  failed: boolean
}

/** A duplicate: the stored reply is sent in the handler's place. `failed`: it could not be, and an error is. */
export interface Replaying {
  readonly is: 'replaying'
  readonly stored: StoredReply
  /** The stored payload, as `replayPayload` gives it. */
  readonly payload: string | Buffer | undefined
  readonly headersBefore: Headers
  failed: boolean
}

/** The store has failed, and the route prefers to run all the same: nothing is kept. */
interface Unprotected {
  readonly is: 'unprotected'
}

/** The handler runs, or its reply is on its way through serialisers and hooks to us. */
export interface Running {
  readonly is: 'running'
  /** The headers that were on the reply when the handler started. */
  readonly headersBefore: Headers
  /**
   * What was sent first, by the handler or in its place.
   *
   *   awaited    nothing yet
   *   value      a reply, which may yet fail in a serialiser or a hook
   *   error      an error: the reply is what the error handlers make of it
   *   broken     a reply that was final, behind which something has failed: the error's reply is that of work that is done
   *   overtaken  an error; and before its reply has come to us, `handlerTimeout` has sent another: either may be the client's
   */
  reply: 'awaited' | 'value' | 'error' | 'broken' | 'overtaken'
  /** The error that the reply is made of, if it is. */
  failure: { readonly error: unknown } | null
}

/** The record is on its way to the store, and the reply waits for it. */
interface Storing {
  readonly is: 'storing'
}

/** The reply was handed on to Fastify. */
interface Sent {
  readonly is: 'sent'
  readonly stream: CapturedStream | null
}

/**
 * What the handler does, which may go on when its reply was sent.
 *
 *   working     has not returned
 *   awaiting    waits for the end of its own reply, as an async handler does that returns it: it has nothing more to do
 *   told        was told that its reply is over, while it waited for that
 *   elsewhere   has returned without a reply, which comes from a callback, if ever
 *   ended       has returned
 *   failed      has thrown
 *   gives back  is still working, though it has replied: the key is given back when it ends
 */
type HandlerState = 'working' | 'awaiting' | 'told' | 'elsewhere' | 'ended' | 'failed' | 'gives back'

/**
 * Has `handlerTimeout` answered the client in the handler's place?
 *
 *   no
 *   struck     it has, or is about to: the handler has a reply of its own from now on
 *   stray      something else was sent on the client's reply, by code that should have had the handler's own
 */
type Timeout = 'no' | 'struck' | 'stray'

const UNPROTECTED: Unprotected = { is: 'unprotected' }
const STORING: Storing = { is: 'storing' }
const SENT: Sent = { is: 'sent', stream: null }

/** One request and its reply, on the way of one operation. All that changes on that way changes here. */
export class Exchange implements Transient {
  previous: Transient | null = null
  next: Transient | null = null
  readonly operation: Operation
  readonly request: FastifyRequest
  #reply: FastifyReply
  #stage: Stage = { is: 'claiming', failed: false }
  #handler: HandlerState = 'working'
  #timeout: Timeout = 'no'

  constructor(operation: Operation, reply: FastifyReply) {
    this.operation = operation
    this.request = reply.request
    this.#reply = reply
  }

  get stage(): Stage {
    return this.#stage
  }

  get handler(): HandlerState {
    return this.#handler
  }

  /** The client's, or the handler's own where a `handlerTimeout` may overtake it. */
  get reply(): FastifyReply {
    return this.#reply
  }

  /** The handler replies to nobody: its client has the timeout's reply. */
  get isLate(): boolean {
    return this.#timeout !== 'no'
  }

  /** Was something sent on the client's reply that should have gone to the handler's own? */
  get isStray(): boolean {
    return this.#timeout === 'stray'
  }

  /** Is this the client's reply, which now is the timeout's, and no concern of the operation? */
  isOfTimeout(reply: FastifyReply): boolean {
    return this.isLate && reply !== this.#reply
  }

  replay(stored: StoredReply, payload: Replaying['payload'], headersBefore: Headers): void {
    this.#stage = { is: 'replaying', stored, payload, headersBefore, failed: false }
  }

  runUnprotected(): void {
    this.#stage = UNPROTECTED
  }

  start(headersBefore: Headers): void {
    this.#stage = { is: 'running', headersBefore, reply: 'awaited', failure: null }
  }

  /** The handler is given another reply than the client has. */
  giveOwn(reply: FastifyReply): void {
    this.#reply = reply
  }

  /** Something is sent, by the handler or in its place: what came first counts. */
  noteSent(payload: unknown): void {
    const stage = this.#stage
    if (stage.is !== 'running' || stage.reply !== 'awaited') return
    stage.reply = payload instanceof Error || this.#handler === 'failed' ? 'error' : 'value'
  }

  /**
   * An error has come up: the reply is to be made of it.
   * @param isFinal Is the reply final on whose way it came up? Asked where that matters.
   */
  fail(error: unknown, isFinal: () => boolean): void {
    const stage = this.#stage
    if (stage.is === 'claiming' || stage.is === 'replaying') stage.failed = true
    if (stage.is !== 'running' || stage.reply === 'overtaken') return
    stage.failure = { error }
    if (stage.reply === 'value' && this.#handler !== 'failed' && isFinal()) stage.reply = 'broken'
  }

  store(): void {
    this.#stage = STORING
  }

  send(stream: CapturedStream | null = null): void {
    this.#stage = stream === null ? SENT : { is: 'sent', stream }
  }

  /* The handler */

  awaitReply(): void {
    if (this.#handler === 'working') this.#handler = 'awaiting'
  }

  replyIsOver(): void {
    if (this.#handler === 'awaiting') this.#handler = 'told'
  }

  /** Puts off giving the key back until the handler ends. `false`: there is nothing to wait for. */
  giveBackAtEnd(): boolean {
    if (this.#handler !== 'working') return false
    this.#handler = 'gives back'
    return true
  }

  /** The handler has come to its end, in one way or another. `true`: its key is to be given back now. */
  end(how: 'elsewhere' | 'ended' | 'failed'): boolean {
    const givesBack = this.#handler === 'gives back'
    this.#handler = how
    return givesBack
  }

  /* Its timeout */

  /**
   * The time is up before the handler's reply has come to us.
   * @param isUsed Has the handler sent something on its own reply, which is still on its way through hooks?
   */
  timeoutStruck(isUsed: boolean): void {
    this.#timeout = 'struck'
    const stage = this.#stage
    if (isUsed || stage.is !== 'running') return
    // What was sent on the client's reply, and what came of that, is not the handler's.
    stage.reply = 'awaited'
    stage.failure = null
  }

  /** The time is up after the handler has failed, perhaps before that reply has come to us. */
  timeoutStruckError(): void {
    const stage = this.#stage
    if (stage.is === 'running' && stage.reply === 'error') stage.reply = 'overtaken'
  }

  sentOnClientReply(): void {
    this.#timeout = 'stray'
  }
}

export function exchangeOf(request: FastifyRequest): Exchange | null {
  const exchange = request[kExchange]
  return exchange instanceof Exchange ? exchange : null
}

/**
 * Does the reply tell of a failure? Then a transaction commits its record only. Where the reply is broken the work is done,
 * and all of it is committed.
 */
export function isFailure({ failure, reply }: Running): boolean {
  return failure !== null && reply !== 'broken'
}
