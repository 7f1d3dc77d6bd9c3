import type { ServerResponse } from 'node:http'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import type { StoredRecord, TombstoneReason } from '../types/index.js'
import type { Maybe } from './at-hand.js'
import {
  asStream,
  CapturedStream,
  headersSince,
  isBuffered,
  isResponse,
  type Payload,
  replyRecord,
  snapshot,
  tombstone
} from './capture.js'
import { KeyMissing, type Refusal, ScopeFailed } from './errors.js'
import { payloadOf as hashOf, headOf, payloadOfBody } from './fingerprint.js'
import { keyInBody, keyInHeader, keyInQuery, parseKey } from './key.js'
import { NowhereResponse } from './nowhere-response.js'
import { Operation, type Verdict } from './operation.js'
import { isFinal, type Policy } from './options.js'
import { PROBLEM_TYPE, problemOf } from './problem.js'
import type { Registration } from './registration.js'
import { hasType, payloadOf, putOn, restore, restoreAll, takeOff } from './replay.js'
import { RequestContext } from './request-context.js'

/** Where a request keeps its exchange; `null` without a key, `SKIPPED` when `skip` said so. */
export const kExchange = Symbol('fastify-idempotency.exchange')
/** Where a request keeps the plugin's own error that answers it. */
export const kRefusal = Symbol('fastify-idempotency.refusal')
/** Where a request that has not claimed yet keeps what was seen of it before validation. */
export const kSight = Symbol('fastify-idempotency.sight')

const SKIPPED = Symbol('skipped')
const HANDLER_TIMEOUT = 'FST_ERR_HANDLER_TIMEOUT'

declare module 'fastify' {
  interface FastifyRequest {
    [kExchange]: Exchange | typeof SKIPPED | null
    [kRefusal]: Refusal | null
    [kSight]: Sight | null
  }
}

type Done = (error?: Error | null, payload?: unknown) => void
type Handler = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply) => unknown
type Headers = ReturnType<typeof snapshot>

const NO_HEADERS = Object.freeze({}) as Headers

/** One request and its reply, on the way of one operation. */
class Exchange {
  readonly operation: Operation
  readonly reply: FastifyReply
  /** The headers that were on the reply when the handler started, or the replay. */
  headersBefore: Headers = NO_HEADERS
  /** `detached`: the handler has returned without a promise, and replies from a callback, if ever. */
  handler: 'waiting' | 'started' | 'detached' | 'settled' = 'waiting'
  /** Where the reply is: not there yet, being stored, or handed on to Fastify. */
  sending: 'no' | 'storing' | 'passed' = 'no'
  /** Has an error come up, and which? */
  failed = false
  error: unknown = null
  clientGone = false
  /** Was somebody told who waited for the reply, as an async handler does that returns it, that it is over? */
  toldOver = false
  stream: CapturedStream | null = null
  timeout: Timeout | null = null

  constructor(operation: Operation, reply: FastifyReply) {
    this.operation = operation
    this.reply = reply
  }
}

/**
 * What a claim in preHandler needs of the request. Validation coerces values, fills in defaults, and removes
 * what a schema does not know: the key, for instance, or the credentials.
 */
interface Sight {
  readonly key: string | Error | undefined
  readonly head: string
  payload: string
}

/** What Fastify's handlerTimeout has interrupted: the reply as the handler had left it. */
interface Timeout {
  readonly statusCode: number
  readonly headers: Headers
  /** Is this still the call in which it struck? Then what is sent is its own reply. */
  isNew: boolean
  /** Has the timeout's own reply left? */
  isOver: boolean
  /** The status that the handler has set since. */
  statusSet: number | null
  /** Resolves when the timeout's own reply is over. */
  readonly over: Promise<void>
  end(): void
}

function exchangeOf(request: FastifyRequest): Exchange | null {
  const exchange = request[kExchange]
  return exchange instanceof Exchange ? exchange : null
}

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
    if (exchange.operation.phase === 'held') return done()
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
    const refuse = this.#refuse.bind(this)
    return function idempotent(this: FastifyInstance, request: FastifyRequest, reply: FastifyReply): unknown {
      const exchange = exchangeOf(request)
      if (exchange === null || exchange.operation.phase === 'unprotected') return handler.call(this, request, reply)
      try {
        if (!exchange.operation.start()) return stop(reply)
      } catch (error) {
        throw refuse(request, reply, error)
      }
      exchange.handler = 'started'
      exchange.headersBefore = snapshot(reply)
      // biome-ignore lint/suspicious/noThenProperty: a reply is a thenable, and who waits for it tells something.
      reply.then = awaitReply as never
      let result: unknown
      try {
        result = handler.call(this, request, reply)
      } catch (error) {
        return afterThrow(exchange, error)
      }
      if (result === undefined || result === reply) {
        exchange.handler = 'detached'
        // Fastify need not wait for a reply that comes from elsewhere.
        return undefined
      }
      if (!isThenable(result)) return afterReturn(exchange, result)
      // Promise.resolve, because a thenable that is not a promise may do its work once per `then`.
      return Promise.resolve(result).then(
        (value) => afterReturn(exchange, value),
        (error) => afterThrow(exchange, error)
      )
    } as RouteHandlerMethod
  }

  /** First onSend hook of the route, behind the instance's: stores the reply before it leaves. */
  readonly onSend = (request: FastifyRequest, reply: FastifyReply, payload: Payload, done: Done): unknown => {
    const { documentationUrl, replayHeader } = this.#policy
    const refusal = request[kRefusal]
    // Fastify's own error handler has answered, with this very error; a custom one decides for itself.
    if (refusal !== null && answered.has(refusal) && isAnswer(reply, refusal)) {
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
      if (operation.phase === 'over' || operation.phase === 'unprotected') return done(null, payload)
      return operation.cancel().then(() => payload)
    }
    if (exchange.sending === 'storing') {
      // Somebody sends twice, or the handler's timeout strikes: the first reply is on its way.
      return new Promise(() => {})
    }
    if (exchange.sending === 'passed' && exchange.timeout !== null) {
      // The handler replies while its timeout's reply is still leaving.
      const { timeout } = exchange
      return timeout.over.then(() => {
        if (exchange.timeout !== null) goOnNowhere(exchange, timeout)
        return this.#sendLate(exchange, request, payload)
      })
    }
    if (exchange.sending === 'passed') {
      // Sending the first reply failed: a stream that nobody reads any more is read to its end for the record.
      exchange.stream?.destroy()
      return done(null, payload)
    }
    let kept: Maybe<unknown>
    try {
      kept = this.#keep(exchange, request, payload)
    } catch (error) {
      return done(this.#refuse(request, reply, error))
    }
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
      const { replayHeader } = this.#policy
      if (exchange.operation.reply !== null)
        takeOff(reply, exchange.operation.reply, replayHeader, exchange.headersBefore)
      const working = exchange.handler === 'started' || exchange.handler === 'detached'
      if (error?.code === HANDLER_TIMEOUT && working && exchange.sending === 'no') exchange.timeout = interrupt(reply)
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
    if (verdict !== 'replay' || operation.reply === null) return undefined
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

  async #sendLate(exchange: Exchange, request: FastifyRequest, payload: Payload): Promise<unknown> {
    try {
      return await this.#keep(exchange, request, payload)
    } catch (error) {
      throw this.#refuse(request, exchange.reply, error)
    }
  }

  /** The handler's reply has come: decides what is kept of it. */
  #keep(exchange: Exchange, request: FastifyRequest, payload: Payload): Maybe<unknown> {
    const { operation, reply, timeout } = exchange
    if (timeout !== null && (timeout.isNew || reply.statusCode === 503)) return passTimeout(exchange, timeout)
    const { fingerprint } = operation
    // Either the timeout's reply, from a slow error handler, or the handler's, which was faster: who can tell?
    const isAmbiguous = timeout !== null
    if (isAmbiguous || reply.raw.headersSent) return finish(exchange, payload, tombstone(fingerprint, 'hijacked'))
    let body = payload
    if (isResponse(payload)) {
      if (payload.bodyUsed) return payload
      // What Fastify would do after the last hook, which is too late to decide about the reply.
      reply.code(payload.status)
      for (const [name, value] of payload.headers) reply.header(name, value)
      body = payload.body as Payload
    }
    const final = isFinalReply(this.#policy, request, reply)
    if (!isBuffered(body) && !hasNoBody(reply.statusCode)) return sendStream(exchange, body, final)
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

/** Nobody is there to answer, and nothing must run: Fastify stops where a reply counts as sent. */
function stop(reply: FastifyReply): void {
  reply.hijack()
}

/** Ends the claim, by a record or a release, while the reply waits; and hands the reply on as it was. */
function finish(exchange: Exchange, payload: Payload, record: StoredRecord | null): Maybe<Payload> {
  const { operation } = exchange
  exchange.sending = 'storing'
  const ended = record === null ? operation.release() : operation.complete(record, exchange.failed)
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

function sendStream(exchange: Exchange, payload: Payload, final: boolean): Payload {
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
function buryHijacked(operation: Operation): void {
  bury(operation, 'hijacked').catch(() => {})
}

/** Notes where a handler has come when its time is up. */
function interrupt(reply: FastifyReply): Timeout {
  let end!: () => void
  const over = new Promise<void>((resolve) => {
    end = resolve
  })
  const timeout: Timeout = {
    statusCode: reply.statusCode,
    headers: snapshot(reply),
    isNew: true,
    isOver: false,
    statusSet: null,
    over,
    end
  }
  queueMicrotask(() => {
    timeout.isNew = false
  })
  return timeout
}

/** Fastify's handlerTimeout answers in the handler's place. The claim stays until the handler has ended. */
function passTimeout(exchange: Exchange, timeout: Timeout, isOver = isClosed(exchange.reply)): void {
  const { reply } = exchange
  exchange.sending = 'passed'
  watchStatus(reply.raw, timeout)
  const end = () => {
    if (exchange.timeout !== timeout || timeout.isOver) return
    timeout.isOver = true
    restoreAll(reply, timeout.headers)
    reply.send = sendLate as never
    timeout.end()
  }
  if (isOver) setImmediate(end)
  else for (const event of ['prefinish', 'finish', 'close']) reply.raw.once(event, end)
}

/** From now on the response has one status for those who read it, and remembers another for those who set it. */
function watchStatus(raw: ServerResponse, timeout: Timeout): void {
  const { statusCode } = raw
  Object.defineProperty(raw, 'statusCode', {
    configurable: true,
    get: () => statusCode,
    set: (status: number) => {
      // As long as the timeout's reply has not left, Node sets its status once more.
      if (status !== statusCode || timeout.isOver) timeout.statusSet = status
    }
  })
}

/** In the place of a reply's own `send`, when the reply is over, and another `send` would be dropped. */
function sendLate(this: FastifyReply, payload?: unknown): FastifyReply {
  const exchange = exchangeOf(this.request)
  if (exchange !== null && exchange.timeout !== null) goOnNowhere(exchange, exchange.timeout)
  return this.send(payload)
}

/**
 * The handler replies after its time: it gets a response that leads nowhere, on which its reply takes the usual
 * way through all hooks and serialisers, until it is stored.
 */
function goOnNowhere(exchange: Exchange, timeout: Timeout): void {
  const { reply } = exchange
  // Fastify's own again.
  Reflect.deleteProperty(reply, 'send')
  exchange.timeout = null
  exchange.sending = 'no'
  exchange.failed = false
  reply.raw = new NowhereResponse(reply.request.raw, () => endNowhere(exchange)) as never
  reply.raw.statusCode = timeout.statusSet ?? timeout.statusCode
}

/** A late reply that Fastify has not brought to onSend: an error that was sent, or raw bytes. */
function endNowhere(exchange: Exchange): void {
  const { reply, failed, error, sending } = exchange
  if (sending === 'no') endUnkept(exchange, failed ? statusOf(error, reply.statusCode) : reply.statusCode)
}

/** Ends the claim by the status alone: final, and not kept; or not final. */
function endUnkept({ operation, reply }: Exchange, statusCode: number): void {
  const { statusCode: before } = reply
  reply.raw.statusCode = statusCode
  const final = isFinalReply(operation.policy, operation.request, reply)
  reply.raw.statusCode = before
  if (final) buryHijacked(operation)
  else void operation.release()
}

/** In the place of a reply's own `then`, while a handler runs: it resolves when the response is over. */
function awaitReply(this: FastifyReply, fulfilled: () => void, rejected: (error: Error) => void): void {
  const exchange = exchangeOf(this.request)
  const told = () => {
    if (exchange !== null) exchange.toldOver = true
    fulfilled()
  }
  Object.getPrototypeOf(this).then.call(this, told, rejected)
}

/** The handler has returned, or its promise has: what Fastify is to see of it. */
function afterReturn(exchange: Exchange, value: unknown): unknown {
  const { operation, reply, timeout } = exchange
  if (timeout !== null) return timeout.over.then(() => afterReturnLate(exchange, value))
  if (exchange.sending !== 'no') {
    exchange.handler = 'settled'
    // Fastify takes the reply for unsent while it is being stored, and would send what was returned as well.
    if (value !== undefined && value !== reply) reply.log.warn('handler returned a value after its reply was sent')
    return reply
  }
  if (value === undefined && exchange.toldOver && !reply.sent) {
    // The response is over, but nothing was sent: the handler replies from elsewhere, like one with a callback.
    exchange.handler = 'detached'
    return reply
  }
  exchange.handler = 'settled'
  if (value === undefined && (exchange.clientGone || isClosed(reply))) {
    if (reply.sent) buryHijacked(operation)
    // Fastify sends nothing to a client that is gone: then nothing would be stored either.
    else return reply.send()
  }
  return value
}

/** The same after the handler's time was up. */
function afterReturnLate(exchange: Exchange, value: unknown): unknown {
  const { operation, reply, timeout } = exchange
  // It has replied meanwhile.
  if (timeout === null) return afterReturn(exchange, value)
  if (value === undefined && exchange.toldOver) {
    exchange.handler = 'detached'
    return reply
  }
  goOnNowhere(exchange, timeout)
  if (value !== undefined) return afterReturn(exchange, value)
  exchange.handler = 'settled'
  if (!reply.sent) return reply.send()
  buryHijacked(operation)
  return reply
}

function afterThrow(exchange: Exchange, error: unknown): unknown {
  const { reply, timeout } = exchange
  exchange.handler = 'settled'
  if (timeout !== null) {
    return timeout.over.then(() => {
      if (exchange.timeout !== null) goOnNowhere(exchange, timeout)
      return afterThrow(exchange, error)
    })
  }
  const isLate = reply.raw instanceof NowhereResponse
  if (exchange.sending === 'no' && !isLate) throw error
  reply.log.error({ err: error }, 'handler failed after its reply was sent')
  // The error's reply cannot be made any more: Fastify's error handlers have had their turn.
  if (exchange.sending === 'no') endUnkept(exchange, statusOf(error, reply.statusCode))
  return reply
}

/** The status that Fastify gives to an error. */
function statusOf(error: unknown, current: number): number {
  const { statusCode, status } = (error ?? {}) as { statusCode?: number; status?: number }
  const isError = (code: number | undefined) => code !== undefined && code >= 400 && code <= 599
  return [statusCode, status, current].find(isError) ?? 500
}

/** The exchanges whose responses wait behind another on their connection, by the connection's socket. */
const queued = new WeakMap<object, Set<Exchange>>()

/** From now on it is noticed when the client leaves. */
function watchClient(exchange: Exchange): void {
  const { raw } = exchange.reply
  // Less than what it takes to find the exchange by its response.
  raw.on('close', () => onClose(exchange, raw))
  // A response that waits behind another on its connection is not told when the connection ends.
  if (raw.socket === null) watchConnection(exchange)
}

function watchConnection(exchange: Exchange): void {
  const { socket } = exchange.reply.request
  let exchanges = queued.get(socket)
  if (exchanges === undefined) {
    exchanges = new Set()
    queued.set(socket, exchanges)
    socket.once('close', onConnectionClose)
  }
  exchanges.add(exchange)
}

function onConnectionClose(this: object): void {
  for (const exchange of queued.get(this) ?? []) onClose(exchange, exchange.reply.raw)
}

/** A response's 'close', in whatever way it ended. */
function onClose(exchange: Exchange, response: ServerResponse): void {
  if (response.req?.socket) queued.get(response.req.socket)?.delete(exchange)
  const { operation, reply } = exchange
  if (reply.raw !== response) {
    // The response of a timeout: the handler has another one now.
  } else if (exchange.handler === 'waiting') {
    void operation.cancel()
  } else if (exchange.sending === 'no') {
    exchange.clientGone = true
    // The handler has not ended, only its time.
    if (exchange.timeout !== null) passTimeout(exchange, exchange.timeout, true)
    // The response was ended without Fastify: by the handler itself, or because sending its reply failed.
    else if (response.writableEnded && exchange.failed) void operation.release()
    else if (response.writableEnded || isHijacked(reply)) buryHijacked(operation)
    // Else the client has left, and the handler is still at work: its reply will be stored, or its raw end seen.
    else response.once('prefinish', () => onClose(exchange, response))
  } else {
    // Nobody reads a stream any more that is still going on: it is read to its end for the record.
    exchange.stream?.destroy()
  }
}

function isFinalReply(policy: Policy, request: FastifyRequest, reply: FastifyReply): boolean {
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

async function scopeOf(request: FastifyRequest, scope: NonNullable<Policy['scope']>): Promise<string> {
  let value: unknown
  try {
    value = await scope(request)
  } catch (cause) {
    throw new ScopeFailed('the option "scope" failed', { cause })
  }
  if (typeof value === 'bigint' || Number.isFinite(value)) return String(value)
  if (typeof value === 'string' && value !== '') return value
  throw new ScopeFailed('the option "scope" gave nothing', { cause: undefined })
}

function isRefusal(error: unknown): error is Refusal {
  return error instanceof Error && 'code' in error && String(error.code).startsWith('FST_IDEMPOTENCY_')
}

const answered = new WeakSet<Refusal>()

/**
 * Fastify's own error handler asks an error for its headers when it answers with it. That is how one can tell,
 * whatever handlers the error went through before. Not enumerable, so that loggers do not ask as well.
 */
function watchAnswer(refusal: Refusal): void {
  const { headers = {} } = refusal
  Object.defineProperty(refusal, 'headers', {
    configurable: true,
    enumerable: false,
    get() {
      answered.add(refusal)
      return headers
    },
    set(value: unknown) {
      Object.defineProperty(refusal, 'headers', { value, configurable: true, enumerable: true, writable: true })
    }
  })
}

/** Is it Fastify's serialisation of this error that is being sent? Nobody else knows the length so early. */
function isAnswer(reply: FastifyReply, refusal: Refusal): boolean {
  return reply.statusCode === refusal.statusCode && reply.hasHeader('content-length')
}

/** Has the client gone? HTTP/2 has no `destroyed` on its responses. */
function isClosed({ raw, request }: FastifyReply): boolean {
  const { stream } = raw as { stream?: { destroyed: boolean } }
  return raw.destroyed || stream?.destroyed || request.raw.aborted || request.socket?.destroyed || false
}

function isHijacked(reply: FastifyReply): boolean {
  return reply.sent && !reply.raw.writableEnded
}

function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof value === 'object' && value !== null && 'then' in value && typeof value.then === 'function'
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
