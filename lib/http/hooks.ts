import type { FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isMetInHandler } from '../errors.js'
import type { Policy } from '../options.js'
import type { Registration } from '../registration.js'
import type { MaybePromise } from '../util/sync-promise.js'
import { warn } from '../warnings.js'
import { Claims } from './claim.js'
import { type Exchange, exchangeOf, kExchange, kRefusal, type Replaying, SKIPPED } from './exchange.js'
import { isFinalReply } from './finality.js'
import { type Handler, protect } from './handler.js'
import { restore } from './headers.js'
import { keyInHead, missKey } from './key.js'
import type { Payload } from './payload.js'
import { problemInPlaceOf, refuse } from './problem-details.js'
import { hasType, putOn, takeOff } from './replay.js'
import { kSnapshot, RequestSnapshot } from './request-snapshot.js'
import { storeReply } from './store-reply.js'

/* Fastify's hooks for a covered route. They decide nothing: what is done is in the files that they call. */

type Done = (error?: Error | null, payload?: unknown) => void

/** The hooks of one covered route, in the order of a request's life. What they do is in other files. */
export class RouteHooks {
  readonly #policy: Policy
  readonly #registration: Registration
  readonly #claims: Claims

  constructor(policy: Policy, registration: Registration) {
    this.#policy = policy
    this.#registration = registration
    this.#claims = new Claims(policy, registration)
  }

  /** Last onRequest hook: reads a key that can be seen already, and refuses a malformed one before any body is read. */
  readonly readHead = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    const { skip } = this.#policy
    if (!this.#covers(request)) return done()
    if (skip !== null) return this.#guard(request, reply, this.#readUnlessSkipped(request, skip))
    try {
      this.#read(request)
    } catch (error) {
      return done(refuse(this.#policy, request, reply, error))
    }
    return done()
  }

  /** Last of an earlier phase, where the `hook` option names one. */
  readonly reserve = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    const reserved = this.#claims.reserve(request, reply)
    return reserved instanceof Promise ? this.#guard(request, reply, reserved) : done()
  }

  readonly reserveInPreParsing = (
    request: FastifyRequest,
    reply: FastifyReply,
    _payload: unknown,
    done: Done
  ): unknown => this.reserve(request, reply, done)

  /** Last preValidation hook: nothing more is to come of what the client has sent. */
  readonly finishSnapshot = (request: FastifyRequest, _reply: FastifyReply, done: Done): unknown => {
    const pending = request[kSnapshot]?.finish()
    return pending ?? done()
  }

  /** Last preHandler hook: claims the key, and gives the verdict. */
  readonly claim = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    if (!this.#covers(request) || request[kExchange] === SKIPPED) return done()
    let answer: MaybePromise<FastifyReply | undefined>
    try {
      answer = this.#claims.claim(request, reply)
    } catch (error) {
      return done(refuse(this.#policy, request, reply, error))
    }
    if (answer instanceof Promise) return this.#guard(request, reply, answer)
    // A reply was sent: `done` must not be called.
    if (answer === undefined) done()
    return undefined
  }

  /** In the handler's place: starts the operation, and sees how the handler ends. */
  wrap(handler: Handler): RouteHandlerMethod {
    return protect(handler, (request, reply, error) => refuse(this.#policy, request, reply, error))
  }

  /** First onSend hook of the route, behind the instance's: stores the reply before it leaves. */
  readonly onSend = (request: FastifyRequest, reply: FastifyReply, payload: Payload, done: Done): unknown => {
    payload = problemInPlaceOf(request, reply, this.#policy) ?? payload
    const exchange = exchangeOf(request)
    if (exchange === null) return done(null, payload)
    // The claim stays until the handler has ended.
    if (exchange.isOfTimeout(reply)) return done(null, payload)
    const { stage } = exchange
    switch (stage.is) {
      case 'claiming':
        return this.#sendInPlace(exchange, stage.failed, payload, done)
      case 'unprotected':
        return done(null, payload)
      case 'replaying':
        return done(null, this.#replayedPayload(reply, stage, payload))
      case 'running': {
        const sent = storeReply(exchange, stage, payload, this.#policy, this.#registration.streams)
        return sent instanceof Promise ? this.#guard(request, reply, sent) : done(null, sent)
      }
      case 'storing':
        // Somebody sends twice, or the handler's timeout strikes: the first reply is on its way, and this one is dropped. It
        // never comes out of this hook, on purpose.
        return new Promise(() => {})
      case 'sent':
        // Sending the first reply failed: a stream that nobody reads any more is read to its end for the record.
        stage.stream?.destroy()
        return done(null, payload)
    }
  }

  /** Last onError hook. */
  readonly onError = (request: FastifyRequest, reply: FastifyReply, error: unknown, done: () => void): void => {
    const exchange = exchangeOf(request)
    if (exchange !== null && !exchange.isOfTimeout(reply)) {
      exchange.fail(error, () => isFinalReply(this.#policy, request, reply))
      // What a handler meets of the plugin's own, in its steps or its transaction. What comes from onSend is known.
      if (isMetInHandler(error) && error !== request[kRefusal]) refuse(this.#policy, request, reply, error)
      const { stage } = exchange
      if (stage.is === 'replaying') takeOff(reply, stage.stored, this.#policy.replayHeader, stage.headersBefore)
    }
    done()
  }

  #covers(request: FastifyRequest): boolean {
    return this.#policy.methods === null || this.#policy.methods.has(request.method)
  }

  async #readUnlessSkipped(request: FastifyRequest, skip: NonNullable<Policy['skip']>): Promise<void> {
    if (await skip(request)) request[kExchange] = SKIPPED
    else this.#read(request)
  }

  #read(request: FastifyRequest): void {
    const { field, fingerprint, getKey } = this.#policy
    const key = getKey === null ? keyInHead(request, this.#policy) : undefined
    if (key === undefined && field === null && getKey === null) {
      // There is no other place left for one.
      missKey(this.#policy)
      return
    }
    const snapshot = new RequestSnapshot(request, this.#policy, key)
    request[kSnapshot] = snapshot
    if (fingerprint === true || (key === undefined && field !== null)) snapshot.watchBody()
  }

  /** Something has answered in the handler's place: a refusal, or a hook behind ours. */
  #sendInPlace({ operation }: Exchange, failed: boolean, payload: Payload, done: Done): unknown {
    // No reply may be held up for nothing: Fastify would take it for unsent, and send another.
    if (operation.phase === 'over') return done(null, payload)
    // Nothing of ours or Fastify's runs between the claim and the handler: another plugin has replaced our handler.
    if (operation.phase === 'held' && !failed) this.#warnOfHandler()
    return operation.cancel().then(() => payload)
  }

  /** The stored payload. What the instance's hooks have made of it now is void: they saw it when it was stored. */
  #replayedPayload(reply: FastifyReply, stage: Replaying, payload: Payload): Payload {
    const { stored, headersBefore, failed } = stage
    // The replay could not be sent: this is the error's reply.
    if (failed) return payload
    // So is the type that Fastify gave to a payload that had none.
    if (!hasType(stored)) restore(reply, 'content-type', headersBefore)
    putOn(reply, stored, this.#policy.replayHeader)
    return stage.payload ?? (payload === undefined || payload === null ? undefined : '')
  }

  async #guard(request: FastifyRequest, reply: FastifyReply, work: Promise<unknown>): Promise<unknown> {
    try {
      return await work
    } catch (error) {
      throw refuse(this.#policy, request, reply, error)
    }
  }

  /** An onRoute hook that was added behind the plugin has put another handler in the place of the one that is watched. */
  #warnOfHandler(): void {
    warn(
      'FST_IDEMPOTENCY_HANDLER',
      `a request to ${this.#policy.route} was answered by a handler that another plugin has put in the place of its own, and runs ` +
        'unprotected: add such onRoute hooks before fastify-idempotency is registered'
    )
  }
}
