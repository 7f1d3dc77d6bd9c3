import type { FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isRefusal, KeyMissing, ScopeFailed, TransactionBroken } from '../errors.js'
import { Operation, type Verdict } from '../operation/operation.js'
import type { Policy } from '../options.js'
import type { Registration } from '../registration.js'
import type { Maybe } from '../util/sync-promise.js'
import { warn } from '../warnings.js'
import { stop, watchClient } from './client-close.js'
import { Exchange, exchangeOf, isClosed, kExchange, kRefusal, SKIPPED } from './exchange.js'
import { payloadOf as hashOf } from './fingerprint.js'
import { type Handler, protect } from './handler.js'
import { keyInBody, keyInHeader, keyInQuery, parseKey } from './key.js'
import { isAnswer, PROBLEM_TYPE, problemOf, watchAnswer } from './problem-details.js'
import { hasType, payloadOf, putOn, restore, takeOff } from './replay.js'
import {
  dropStream,
  headersSince,
  isBuffered,
  isResponse,
  type Payload,
  replyRecord,
  snapshot,
  takeOffUnsendable,
  tombstone
} from './reply-record.js'
import { RequestContext } from './request-context.js'
import { kSnapshot, RequestSnapshot } from './request-snapshot.js'
import { endOvertaken, finish, isFinalReply, sendStream } from './store-reply.js'

type Done = (error?: Error | null, payload?: unknown) => void

/** The hooks of one covered route, in the order of a request's life. */
export class Lifecycle {
  readonly #policy: Policy
  readonly #registration: Registration

  constructor(policy: Policy, registration: Registration) {
    this.#policy = policy
    this.#registration = registration
  }

  /** Last onRequest hook: reads a key that can be seen already, and refuses one that is none before any body is read. */
  readonly look = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    const { skip } = this.#policy
    if (!this.#covers(request)) return done()
    if (skip !== null) return this.#guarded(request, reply, this.#lookUnlessSkipped(request, skip))
    try {
      this.#look(request)
    } catch (error) {
      return done(this.#refuse(request, reply, error))
    }
    return done()
  }

  /** Last of an earlier phase, where the `hook` option names one: claims a key that can be seen already. */
  readonly reserve = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    const { getKey } = this.#policy
    const snapshot = request[kSnapshot]
    if (snapshot === null) return done()
    if (getKey !== null) return this.#guarded(request, reply, this.#reserveAsked(request, reply, getKey))
    if (snapshot.seenKey === undefined) return done()
    const reserved = this.#reserve(request, reply, snapshot.seenKey)
    return reserved instanceof Promise ? this.#guarded(request, reply, reserved) : done()
  }

  readonly reserveInPreParsing = (
    request: FastifyRequest,
    reply: FastifyReply,
    _payload: unknown,
    done: Done
  ): unknown => this.reserve(request, reply, done)

  /** Last preValidation hook: nothing more is to come of what the client has sent. */
  readonly finishLook = (request: FastifyRequest, _reply: FastifyReply, done: Done): unknown => {
    const pending = request[kSnapshot]?.finish()
    return pending ?? done()
  }

  /** Last preHandler hook: claims the key, and gives the verdict. */
  readonly claim = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    if (!this.#covers(request) || request[kExchange] === SKIPPED) return done()
    let answer: Maybe<FastifyReply | undefined>
    try {
      answer = this.#claim(request, reply)
    } catch (error) {
      return done(this.#refuse(request, reply, error))
    }
    // A promise is paid for only where there is something to wait for.
    if (answer instanceof Promise) return this.#guarded(request, reply, answer)
    // Behind a reply that is on its way nothing more is to come.
    if (answer === undefined) done()
    return undefined
  }

  /** In the handler's place: starts the operation, and sees how the handler ends. */
  wrap(handler: Handler): RouteHandlerMethod {
    return protect(handler, this.#refuse.bind(this))
  }

  /** First onSend hook of the route, behind the instance's: stores the reply before it leaves. */
  readonly onSend = (request: FastifyRequest, reply: FastifyReply, payload: Payload, done: Done): unknown => {
    const { documentationUrl, replayHeader } = this.#policy
    const refusal = request[kRefusal]
    // Fastify's own error handler has answered, with this very error; a custom one decides for itself.
    if (refusal !== null && isAnswer(reply, refusal)) {
      reply.removeHeader('content-length').header('content-type', PROBLEM_TYPE)
      payload = problemOf(refusal, documentationUrl)
    }
    const exchange = exchangeOf(request)
    if (exchange === null) return done(null, payload)
    if (exchange.isLate && reply !== exchange.reply) {
      // Of the timeout: the claim stays until the handler has ended.
      exchange.isClientAnswered = true
      return done(null, payload)
    }
    const { operation } = exchange
    if (operation.reply !== null) {
      // The replay could not be sent: this is the error's reply.
      if (exchange.failed) return done(null, payload)
      // The instance's hooks have seen this payload before, when it was stored: what they made of it now is void.
      // So is the type that Fastify gave to a payload that had none.
      if (!hasType(operation.reply)) restore(reply, 'content-type', exchange.headersBefore)
      putOn(reply, operation.reply, replayHeader)
      return done(null, payloadOf(operation.reply) ?? (isNothing(payload) ? undefined : ''))
    }
    if (exchange.handler === 'waiting') {
      // Of what runs unprotected, too, no reply may be held up: Fastify would take it for unsent, and send another.
      if (operation.phase === 'over' || operation.phase === 'unprotected') return done(null, payload)
      // Between the claim and the handler there is nothing of ours, nor of Fastify's.
      if (operation.phase === 'held' && !exchange.failed) this.#warnOfHandler()
      return operation.cancel().then(() => payload)
    }
    if (exchange.sending === 'storing') {
      // Somebody sends twice, or the handler's timeout strikes: the first reply is on its way.
      return new Promise(() => {})
    }
    if (exchange.sending === 'passed') {
      // Sending the first reply failed: a stream that nobody reads any more is read to its end for the record.
      exchange.stream?.destroy()
      return done(null, payload)
    }
    const kept = this.#keep(exchange, request, payload)
    return kept instanceof Promise ? this.#guarded(request, reply, kept) : done(null, kept)
  }

  readonly onError = (
    request: FastifyRequest,
    reply: FastifyReply,
    error: { code?: string },
    done: () => void
  ): void => {
    const exchange = exchangeOf(request)
    if (exchange === null || (exchange.isLate && reply !== exchange.reply)) {
      done()
      return
    }
    exchange.failed = true
    if (!exchange.isOvertaken) exchange.error = error
    if (exchange.sent === 'value' && exchange.handler !== 'failed' && exchange.sending === 'no') {
      exchange.workDone ||= isFinalReply(this.#policy, request, reply)
    }
    // What a handler meets of the plugin's own, where it misuses its transaction. What comes from onSend is known.
    if (error instanceof TransactionBroken && error !== request[kRefusal]) this.#refuse(request, reply, error)
    const { replayHeader } = this.#policy
    if (exchange.operation.reply !== null)
      takeOff(reply, exchange.operation.reply, replayHeader, exchange.headersBefore)
    done()
  }

  /** An onRoute hook that was added behind the plugin has put another handler in the place of the one that is watched. */
  #warnOfHandler(): void {
    warn(
      'FST_IDEMPOTENCY_HANDLER',
      `a request to ${this.#policy.route} was answered by a handler that another plugin has put in the place of its own, and runs ` +
        'unprotected: add such onRoute hooks before fastify-idempotency is registered'
    )
  }

  #covers(request: FastifyRequest): boolean {
    return this.#policy.methods === null || this.#policy.methods.has(request.method)
  }

  async #lookUnlessSkipped(request: FastifyRequest, skip: NonNullable<Policy['skip']>): Promise<void> {
    if (await skip(request)) request[kExchange] = SKIPPED
    else this.#look(request)
  }

  #look(request: FastifyRequest): void {
    const { field, fingerprint, getKey } = this.#policy
    let key: string | undefined
    if (getKey === null) {
      const raw = keyInHeader(request, this.#policy) ?? keyInQuery(request, this.#policy)
      if (raw !== undefined) key = parseKey(raw, this.#policy)
      else if (field === null) {
        this.#missing()
        return
      }
    }
    const snapshot = new RequestSnapshot(request, this.#policy, key)
    request[kSnapshot] = snapshot
    if (fingerprint === true || (key === undefined && field !== null)) snapshot.watchBody()
  }

  /** @throws FST_IDEMPOTENCY_KEY_MISSING where a key is required, and there is no other place left for one. */
  #missing(): void {
    const { required, header, field, getKey } = this.#policy
    if (!required) return
    const places: string[] = []
    if (getKey === null && header !== null) places.push(`the header ${header}`)
    if (getKey === null && field !== null) places.push(`the field ${field}`)
    throw new KeyMissing(places.join(' or ') || 'see the documentation of this service')
  }

  #reserve(request: FastifyRequest, reply: FastifyReply, key: string): Maybe<void> {
    const { scope } = this.#policy
    if (scope !== null) return this.#reserveScoped(request, reply, key, scope)
    return reserveOn(this.#open(request, reply, key, null))
  }

  async #reserveScoped(
    request: FastifyRequest,
    reply: FastifyReply,
    key: string,
    scope: NonNullable<Policy['scope']>
  ): Promise<void> {
    return reserveOn(this.#open(request, reply, key, await scopeOf(request, scope)))
  }

  async #reserveAsked(
    request: FastifyRequest,
    reply: FastifyReply,
    getKey: NonNullable<Policy['getKey']>
  ): Promise<void> {
    const raw = (await getKey(request)) ?? undefined
    // It may find one when there is a body.
    if (raw !== undefined) await this.#reserve(request, reply, parseKey(raw, this.#policy))
  }

  #claim(request: FastifyRequest, reply: FastifyReply): Maybe<FastifyReply | undefined> {
    const { getKey } = this.#policy
    const snapshot = request[kSnapshot]
    snapshot?.finishLate()
    const seen = snapshot?.key
    if (seen instanceof Error) throw seen
    const exchange = exchangeOf(request)
    if (exchange !== null) return this.#settle(exchange)
    if (getKey !== null) return this.#claimAsked(request, reply, getKey)
    const key = seen ?? this.#providedKey(request)
    if (key !== undefined) return this.#begin(request, reply, key)
    this.#missing()
    return undefined
  }

  /** A key that a hook has provided since. */
  #providedKey(request: FastifyRequest): string | undefined {
    const policy = this.#policy
    const raw = keyInHeader(request, policy) ?? keyInQuery(request, policy) ?? keyInBody(request, policy)
    return raw === undefined ? undefined : parseKey(raw, policy)
  }

  async #claimAsked(
    request: FastifyRequest,
    reply: FastifyReply,
    getKey: NonNullable<Policy['getKey']>
  ): Promise<FastifyReply | undefined> {
    const raw = (await getKey(request)) ?? undefined
    if (raw !== undefined) return this.#begin(request, reply, parseKey(raw, this.#policy))
    this.#missing()
    return undefined
  }

  /** A key has been found: the request becomes an operation. */
  #begin(request: FastifyRequest, reply: FastifyReply, key: string): Maybe<FastifyReply | undefined> {
    const { scope } = this.#policy
    if (scope !== null) return this.#beginScoped(request, reply, key, scope)
    return this.#settle(this.#open(request, reply, key, null))
  }

  async #beginScoped(
    request: FastifyRequest,
    reply: FastifyReply,
    key: string,
    scope: NonNullable<Policy['scope']>
  ): Promise<FastifyReply | undefined> {
    return this.#settle(this.#open(request, reply, key, await scopeOf(request, scope)))
  }

  #open(request: FastifyRequest, reply: FastifyReply, key: string, scope: string | null): Exchange {
    const snapshot = this.#snapshotOf(request)
    const operation = new Operation(request, this.#policy, this.#registration, key, scope, snapshot)
    // Before preValidation is over it is not known yet.
    if (typeof snapshot.payload === 'string') operation.learn(snapshot.payload)
    const exchange = new Exchange(operation, reply)
    request[kExchange] = exchange
    request.idempotency = new RequestContext(operation)
    if (isClosed(reply)) void operation.cancel()
    else watchClient(exchange)
    return exchange
  }

  #snapshotOf(request: FastifyRequest): RequestSnapshot {
    const known = request[kSnapshot]
    if (known !== null) return known
    // Nobody saw the key coming: a hook has provided it.
    const snapshot = new RequestSnapshot(request, this.#policy, '')
    request[kSnapshot] = snapshot
    void snapshot.finish()
    return snapshot
  }

  /** The verdict, and the reply if it is on its way now. */
  #settle(exchange: Exchange): Maybe<FastifyReply | undefined> {
    const { operation } = exchange
    const { fingerprint } = this.#policy
    const payload = operation.request[kSnapshot]?.payload ?? ''
    if (typeof fingerprint === 'function') {
      return this.#settleKnowing(exchange, Promise.resolve(fingerprint(operation.request)).then(hashOf))
    }
    if (payload instanceof Promise) return this.#settleKnowing(exchange, payload)
    operation.learn(payload)
    const verdict = operation.claim()
    return verdict instanceof Promise ? this.#answerLater(verdict, exchange) : this.#answer(verdict, exchange)
  }

  async #settleKnowing(exchange: Exchange, payload: Promise<string>): Promise<FastifyReply | undefined> {
    exchange.operation.learn(await payload)
    return this.#answer(await exchange.operation.claim(), exchange)
  }

  async #answerLater(verdict: Promise<Verdict>, exchange: Exchange): Promise<FastifyReply | undefined> {
    return this.#answer(await verdict, exchange)
  }

  #answer(verdict: Verdict, exchange: Exchange): FastifyReply | undefined {
    const { operation, reply } = exchange
    if (verdict === 'gone') stop(reply)
    if (operation.reply === null) return undefined
    exchange.headersBefore = snapshot(reply)
    putOn(reply, operation.reply, this.#policy.replayHeader)
    return reply.send(payloadOf(operation.reply))
  }

  async #guarded(request: FastifyRequest, reply: FastifyReply, work: Promise<unknown>): Promise<unknown> {
    try {
      return await work
    } catch (error) {
      throw this.#refuse(request, reply, error)
    }
  }

  /** Marks the plugin's own errors, and puts their headers on the reply, whoever handles errors. */
  #refuse(request: FastifyRequest, reply: FastifyReply, error: unknown): Error {
    if (isRefusal(error)) {
      const { documentationUrl, problemDetails } = this.#policy
      request[kRefusal] = error
      if (error.headers !== undefined) reply.headers(error.headers)
      if (problemDetails) watchAnswer(error)
      if (documentationUrl !== null) {
        const links = [reply.getHeader('link') ?? [], `<${documentationUrl}>; rel="describedby"`].flat()
        reply.header('link', links.join(', '))
      }
    }
    return error as Error
  }

  /** The handler's reply has come: decides what is kept of it. */
  #keep(exchange: Exchange, request: FastifyRequest, payload: Payload): Maybe<unknown> {
    const { operation, reply } = exchange
    const { fingerprint } = operation
    if (reply.raw.headersSent) return finish(exchange, payload, tombstone(fingerprint, 'hijacked'))
    if (exchange.isOvertaken) {
      endOvertaken(exchange)
      return payload
    }
    let body = payload
    if (isResponse(payload)) {
      if (payload.bodyUsed) return payload
      // What Fastify would do after the last hook, which is too late to decide about the reply.
      reply.code(payload.status)
      for (const [name, value] of payload.headers) reply.header(name, value)
      body = payload.body as Payload
    }
    const unsendable = takeOffUnsendable(reply)
    if (unsendable !== undefined && !exchange.refusedHeader) {
      // Node would say so when the reply is stored already, and no replay of it could ever be sent.
      exchange.refusedHeader = true
      dropStream(body)
      return Promise.reject(unsendable)
    }
    const final = exchange.workDone || isFinalReply(this.#policy, request, reply)
    if (exchange.workDone) {
      request.log.warn(
        { err: exchange.error },
        'handler succeeded, but its reply failed: the error is stored as the reply'
      )
    }
    if (!isBuffered(body) && !hasNoBody(reply.statusCode))
      return sendStream(exchange, body, final, this.#registration.streams)
    if (!final) return finish(exchange, body, null)
    const kept = isBuffered(body) ? body : undefined
    if (sizeOf(kept) > this.#policy.maxReplySize) return finish(exchange, body, tombstone(fingerprint, 'too-large'))
    const headers = headersSince(exchange.headersBefore, reply, this.#policy)
    return finish(exchange, body, replyRecord(fingerprint, reply.statusCode, headers, kept))
  }
}

async function reserveOn({ operation, reply }: Exchange): Promise<void> {
  if ((await operation.reserve()) === 'gone') stop(reply)
}

async function scopeOf(request: FastifyRequest, scope: NonNullable<Policy['scope']>): Promise<string> {
  let value: unknown
  try {
    value = await scope(request)
  } catch (cause) {
    // An answer to the client, such as 403 for somebody who is no member of the account.
    if (isClientError(cause)) throw cause
    throw new ScopeFailed('the option "scope" failed', { cause })
  }
  if (typeof value === 'bigint' || Number.isFinite(value)) return String(value)
  if (typeof value === 'string' && !NO_NAMES.has(value)) return value
  throw new ScopeFailed('the option "scope" gave nothing')
}

/** What comes of nothing in a template or by String(): everybody's scope would be the same. */
const NO_NAMES: ReadonlySet<unknown> = new Set(['', 'undefined', 'null', '[object Object]'])

function isClientError(error: unknown): boolean {
  const { statusCode } = (error ?? {}) as { statusCode?: unknown }
  return Number.isInteger(statusCode) && Number(statusCode) >= 400 && Number(statusCode) < 500
}

function isNothing(payload: unknown): boolean {
  return payload === undefined || payload === null
}

/** RFC 9110 §6.4.1: such replies end with their head, whatever the handler gave. */
function hasNoBody(statusCode: number): boolean {
  return statusCode === 204 || statusCode === 304
}

function sizeOf(body: string | Buffer | null | undefined): number {
  return body === undefined || body === null ? 0 : Buffer.byteLength(body)
}
