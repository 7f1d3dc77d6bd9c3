import type { FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import type { Maybe } from './at-hand.js'
import { headersSince, isBuffered, isResponse, type Payload, replyRecord, snapshot, tombstone } from './capture.js'
import { stop, watchClient } from './client-watch.js'
import { finish, isFinalReply, sendStream } from './ending.js'
import { isRefusal, KeyMissing, ScopeFailed, TransactionBroken } from './errors.js'
import { Exchange, exchangeOf, isClosed, kExchange, kRefusal, kSight, SKIPPED } from './exchange.js'
import { payloadOf as hashOf, headOf, payloadOfBody } from './fingerprint.js'
import { type Handler, protect } from './handler.js'
import {
  goOnNowhere,
  inNameOf,
  interrupt,
  isOf,
  mayBeOf,
  passTimeout,
  settle,
  type Timeout
} from './handler-timeout.js'
import { keyInBody, keyInHeader, keyInQuery, parseKey } from './key.js'
import { Operation, type Verdict } from './operation.js'
import type { Policy } from './options.js'
import { isAnswer, PROBLEM_TYPE, problemOf, watchAnswer } from './problem.js'
import type { Registration } from './registration.js'
import { hasType, payloadOf, putOn, restore, takeOff } from './replay.js'
import { RequestContext } from './request-context.js'

const HANDLER_TIMEOUT = 'FST_ERR_HANDLER_TIMEOUT'

type Done = (error?: Error | null, payload?: unknown) => void

/** The hooks of one covered route, in the order of a request's life. */
export class Lifecycle {
  readonly #policy: Policy
  readonly #registration: Registration
  /** Is the key looked for once more when the body is there? */
  readonly #claimsLate: boolean

  constructor(policy: Policy, registration: Registration) {
    this.#policy = policy
    this.#registration = registration
    this.#claimsLate = policy.hook === 'preHandler' || (policy.field !== null && policy.getKey === null)
  }

  /** Last of the phase that the `hook` option names: claims the key, if it can be seen already. */
  readonly claim = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    const { skip, getKey } = this.#policy
    if (!this.#covers(request)) return done()
    if (skip !== null || getKey !== null) return this.#guarded(request, reply, this.#claim(request, reply, false))
    // A promise is paid for only where there is something to wait for.
    let begun: Maybe<void> | undefined
    try {
      const raw = this.#keyBeforeBody(request)
      if (raw === undefined) this.#missing(this.#claimsLate)
      else begun = this.#begin(request, reply, raw, false)
    } catch (error) {
      return done(this.#refuse(request, reply, error))
    }
    return begun instanceof Promise ? this.#guarded(request, reply, begun) : done()
  }

  readonly claimInPreParsing = (request: FastifyRequest, reply: FastifyReply, _payload: unknown, done: Done): unknown =>
    this.claim(request, reply, done)

  /** Last preValidation hook: sees the request as the client sent it, before validation and handlers change it. */
  readonly look = (request: FastifyRequest, _reply: FastifyReply, done: Done): unknown => {
    if (!this.#covers(request) || request[kExchange] === SKIPPED) return done()
    if (request[kExchange] === null) {
      const { getKey, hook, scope } = this.#policy
      if (!this.#claimsLate && hook !== 'preValidation') return done()
      const key = this.#keyAnywhere(request)
      if (key === undefined && getKey === null) return done()
      request[kSight] = { key, head: headOf(request, scope !== null), payload: '' }
    }
    if (this.#policy.fingerprint !== true) return done()
    const payload = payloadOfBody(request)
    if (typeof payload !== 'string') return payload.then((hash) => learn(request, hash))
    learn(request, payload)
    return done()
  }

  /** Last preHandler hook: claims a key that came with the body, and gives the verdict. */
  readonly settle = (request: FastifyRequest, reply: FastifyReply, done: Done): unknown => {
    if (!this.#covers(request)) return done()
    const exchange = exchangeOf(request)
    if (exchange === null) {
      if (!this.#claimsLate || request[kExchange] === SKIPPED) return done()
      return this.#guarded(request, reply, this.#claimAndSettle(request, reply))
    }
    if (typeof this.#policy.fingerprint === 'function') {
      return this.#guarded(request, reply, this.#learnAndSettle(request, exchange))
    }
    let answer: Maybe<FastifyReply | undefined>
    try {
      answer = this.#settle(exchange)
    } catch (error) {
      return done(this.#refuse(request, reply, error))
    }
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
      return operation.cancel().then(() => payload)
    }
    if (exchange.sending === 'storing') {
      // Somebody sends twice, or the handler's timeout strikes: the first reply is on its way.
      return new Promise(() => {})
    }
    const { timeout } = exchange
    if (exchange.sending === 'passed' && timeout !== null && !isOf(timeout)) {
      // The handler had sent its reply, but hooks held it up until the timeout's was on its way.
      const kept = timeout.over.then(() => this.#keepLate(exchange, request, payload, timeout))
      return this.#guarded(request, reply, kept)
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
    if (exchange !== null) {
      exchange.failed = true
      exchange.error = error
      // What a handler meets of the plugin's own, where it misuses its transaction. What comes from onSend is known.
      if (error instanceof TransactionBroken && error !== request[kRefusal]) this.#refuse(request, reply, error)
      const { replayHeader } = this.#policy
      if (exchange.operation.reply !== null)
        takeOff(reply, exchange.operation.reply, replayHeader, exchange.headersBefore)
      // What the handler has returned may still be on its way through hooks.
      const working = exchange.handler !== 'waiting' && exchange.handler !== 'failed'
      if (error?.code === HANDLER_TIMEOUT && working && exchange.sending === 'no') {
        exchange.timeout = interrupt(reply)
        inNameOf(exchange.timeout, done)
        return
      }
    }
    done()
  }

  #covers(request: FastifyRequest): boolean {
    return this.#policy.methods === null || this.#policy.methods.has(request.method)
  }

  #keyBeforeBody(request: FastifyRequest): string | undefined {
    return keyInHeader(request, this.#policy) ?? keyInQuery(request, this.#policy)
  }

  /** A key that is none is an error, for which it is too early: `skip` may have to be asked yet. */
  #keyAnywhere(request: FastifyRequest): string | Error | undefined {
    try {
      return this.#keyBeforeBody(request) ?? keyInBody(request, this.#policy)
    } catch (error) {
      return error as Error
    }
  }

  /** @throws FST_IDEMPOTENCY_KEY_MISSING when there is no other place left where a key may be. */
  #missing(mayComeLater: boolean): void {
    const { required, header, field, getKey } = this.#policy
    if (!required || mayComeLater) return
    const places: string[] = []
    if (getKey === null && header !== null) places.push(`the header ${header}`)
    if (getKey === null && field !== null) places.push(`the field ${field}`)
    throw new KeyMissing(places.join(' or ') || 'see the documentation of this service')
  }

  async #claim(request: FastifyRequest, reply: FastifyReply, late: boolean): Promise<void> {
    const { skip, getKey, hook } = this.#policy
    if (skip !== null && (!late || hook === 'preHandler') && (await skip(request))) {
      request[kExchange] = SKIPPED
      return
    }
    let raw: unknown
    if (getKey !== null) raw = (await getKey(request)) ?? undefined
    // What the client sent goes before what hooks have made of it since.
    else raw = late ? (request[kSight]?.key ?? this.#keyAnywhere(request)) : this.#keyBeforeBody(request)
    if (raw instanceof Error) throw raw
    if (raw !== undefined) return this.#begin(request, reply, raw, late)
    this.#missing(!late && this.#claimsLate)
  }

  /** A key has been found: the request becomes an operation. */
  #begin(request: FastifyRequest, reply: FastifyReply, raw: unknown, late: boolean): Maybe<void> {
    const { scope } = this.#policy
    const key = parseKey(raw, this.#policy)
    if (scope !== null) return this.#beginScoped(request, reply, key, scope, late)
    return this.#open(request, reply, key, null, late)
  }

  async #beginScoped(
    request: FastifyRequest,
    reply: FastifyReply,
    key: string,
    scope: NonNullable<Policy['scope']>,
    late: boolean
  ): Promise<void> {
    return this.#open(request, reply, key, await scopeOf(request, scope), late)
  }

  #open(request: FastifyRequest, reply: FastifyReply, key: string, scope: string | null, late: boolean): Maybe<void> {
    const { fingerprint, hook } = this.#policy
    const sight = request[kSight]
    const head = sight?.head ?? headOf(request, scope !== null)
    const operation = new Operation(request, this.#policy, this.#registration, key, scope, head)
    const exchange = new Exchange(operation, reply)
    request[kExchange] = exchange
    request.idempotency = new RequestContext(operation)
    if (isClosed(reply)) return operation.cancel().then(() => stop(reply))
    watchClient(exchange)
    if (typeof fingerprint === 'function' && hook === 'preHandler') {
      return claimKnowing(operation, reply, Promise.resolve(fingerprint(request)).then(hashOf))
    }
    if (sight !== null) {
      operation.learn(sight.payload)
    } else if (late && fingerprint === true) {
      // Nobody saw the key coming: a hook has provided it.
      return claimKnowing(operation, reply, payloadOfBody(request))
    }
    const verdict = operation.claim()
    if (verdict instanceof Promise) return verdict.then((verdict) => obey(verdict, reply))
    obey(verdict, reply)
  }

  async #claimAndSettle(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    await this.#claim(request, reply, true)
    const exchange = exchangeOf(request)
    return exchange === null ? undefined : this.#learnAndSettle(request, exchange)
  }

  async #learnAndSettle(request: FastifyRequest, exchange: Exchange): Promise<unknown> {
    const { fingerprint, hook } = this.#policy
    if (typeof fingerprint === 'function' && hook !== 'preHandler') {
      exchange.operation.learn(hashOf(await fingerprint(request)))
    }
    return this.#settle(exchange)
  }

  /** The verdict, and the reply if it is on its way now. */
  #settle(exchange: Exchange): Maybe<FastifyReply | undefined> {
    const verdict = exchange.operation.settle()
    return verdict instanceof Promise ? this.#answerLater(verdict, exchange) : this.#answer(verdict, exchange)
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

  /** The same for a reply that met the timeout's on its way. */
  #keepLate(exchange: Exchange, request: FastifyRequest, payload: Payload, timeout: Timeout): Maybe<unknown> {
    if (exchange.timeout !== null) goOnNowhere(exchange, timeout)
    return this.#keep(exchange, request, payload)
  }

  /** The handler's reply has come: decides what is kept of it. */
  #keep(exchange: Exchange, request: FastifyRequest, payload: Payload): Maybe<unknown> {
    const { operation, reply, timeout } = exchange
    if (timeout !== null && (isOf(timeout) || mayBeOf(timeout, exchange))) return passTimeout(exchange, timeout)
    const { fingerprint } = operation
    // The handler's, which was faster than an error handler; or that of one whose context got lost: who can tell?
    if (timeout !== null) settle(exchange, timeout)
    if (timeout !== null || reply.raw.headersSent) return finish(exchange, payload, tombstone(fingerprint, 'hijacked'))
    let body = payload
    if (isResponse(payload)) {
      if (payload.bodyUsed) return payload
      // What Fastify would do after the last hook, which is too late to decide about the reply.
      reply.code(payload.status)
      for (const [name, value] of payload.headers) reply.header(name, value)
      body = payload.body as Payload
    }
    const final = isFinalReply(this.#policy, request, reply)
    if (final && exchange.isMixed) return finish(exchange, payload, tombstone(fingerprint, 'hijacked'))
    if (!isBuffered(body) && !hasNoBody(reply.statusCode))
      return sendStream(exchange, body, final, this.#registration.streams)
    if (!final) return finish(exchange, body, null)
    const kept = isBuffered(body) ? body : undefined
    if (sizeOf(kept) > this.#policy.maxReplySize) return finish(exchange, body, tombstone(fingerprint, 'too-large'))
    const headers = headersSince(exchange.headersBefore, reply, this.#policy)
    return finish(exchange, body, replyRecord(fingerprint, reply.statusCode, headers, kept))
  }
}

async function claimKnowing(operation: Operation, reply: FastifyReply, payload: Maybe<string>): Promise<void> {
  operation.learn(await payload)
  obey(await operation.claim(), reply)
}

function obey(verdict: Verdict, reply: FastifyReply): void {
  if (verdict === 'gone') stop(reply)
}

function learn(request: FastifyRequest, payload: string): void {
  exchangeOf(request)?.operation.learn(payload)
  if (request[kSight] !== null) request[kSight].payload = payload
}

async function scopeOf(request: FastifyRequest, scope: NonNullable<Policy['scope']>): Promise<string> {
  let value: unknown
  try {
    value = await scope(request)
  } catch (cause) {
    throw new ScopeFailed('the option "scope" failed', { cause })
  }
  if (typeof value === 'bigint' || Number.isFinite(value)) return String(value)
  if (typeof value === 'string' && value !== '') return value
  throw new ScopeFailed('the option "scope" gave nothing')
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
