import { AsyncLocalStorage } from 'node:async_hooks'
import type { ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import { NowhereResponse } from './discarding-response.js'
import { type Exchange, exchangeOf, isClosed, noteSent } from './exchange.js'
import { restoreAll } from './replay.js'
import { type Headers, snapshot } from './reply-record.js'
import { buryHijacked, endUnkept, statusOf } from './store-reply.js'

/** What Fastify's handlerTimeout has interrupted: the reply as the handler had left it. */
export interface Timeout {
  readonly statusCode: number
  readonly headers: Headers
  /** Has the timeout's own reply left? */
  isOver: boolean
  /** Is the timeout's own reply on its way? */
  isPassed: boolean
  /** Has a reply been sent in its name? */
  isAnswered: boolean
  /** Has one been sent by anybody else, before the timeout's own was on its way? */
  isJoined: boolean
  /** Has the handler replied, or set a header, while the timeout's reply was being made? They have the same headers. */
  isMixed: boolean
  /** The status that the handler has set since. */
  statusSet: number | null
  /** The status of the timeout's own reply, if it has set one. */
  ownStatus: number | null
  /** Resolves when the timeout's own reply is over. */
  readonly over: Promise<void>
  end(): void
}

/** Notes where a handler has come when its time is up. */
export function interrupt(reply: FastifyReply): Timeout {
  let end!: () => void
  const over = new Promise<void>((resolve) => {
    end = resolve
  })
  const timeout: Timeout = {
    statusCode: reply.statusCode,
    headers: snapshot(reply),
    isOver: false,
    isPassed: false,
    isAnswered: false,
    isJoined: false,
    isMixed: false,
    statusSet: null,
    ownStatus: null,
    over,
    end
  }
  watchStatus(reply.raw, timeout)
  reply.send = sendMeanwhile as never
  reply.header = function (this: FastifyReply, name: string, value: unknown) {
    if (!isOf(timeout)) timeout.isMixed = true
    return Object.getPrototypeOf(this).header.call(this, name, value)
  } as never
  return timeout
}

/** The timeout in whose name code runs: its error handler, and all that its reply meets on its way. */
const answering = new AsyncLocalStorage<Timeout>()
/** Those whose handler may still reply. Before Node 24 the whole process pays for an AsyncLocalStorage in use. */
const pending = new Set<Timeout>()

/** Runs what answers in the handler's place, so that it can be told from the handler, which has the same reply. */
export function inNameOf(timeout: Timeout, run: () => void): void {
  pending.add(timeout)
  answering.run(timeout, run)
}

/** Is this the timeout's own reply, as far as it can be told? */
export function isOf(timeout: Timeout): boolean {
  return answering.getStore() === timeout
}

/**
 * Is a reply that has come without its context the timeout's own? It may have lost it in somebody's hooks; or in the
 * error handler, before a status was set and a reply was sent. A handler that has returned may have its reply here.
 */
export function mayBeOf(timeout: Timeout, { handler, reply }: Exchange): boolean {
  if (reply.statusCode !== 503 || handler === 'settled') return false
  return !timeout.isJoined || (!timeout.isAnswered && timeout.ownStatus === null)
}

/** The handler has replied, as far as it can be told: what comes now is no concern of the timeout. */
export function settle(exchange: Exchange, timeout: Timeout): void {
  exchange.timeout = null
  if (pending.delete(timeout) && pending.size === 0) answering.disable()
}

/** Fastify's handlerTimeout answers in the handler's place. The claim stays until the handler has ended. */
export function passTimeout(exchange: Exchange, timeout: Timeout): void {
  const { reply } = exchange
  if (isOf(timeout)) {
    // Who keeps the context did not set what was set without.
    if (timeout.ownStatus !== null) reply.raw.statusCode = timeout.ownStatus
  } else {
    // Whose context got lost has set it all.
    timeout.statusSet = null
    timeout.isMixed = false
  }
  leave(exchange, timeout, isClosed(reply))
}

/** The client has left before anything has answered it. */
export function passNothing(exchange: Exchange, timeout: Timeout): void {
  leave(exchange, timeout, true)
}

/** From here on what is sent or set without the timeout's context is the handler's, and has to wait. */
function leave(exchange: Exchange, timeout: Timeout, isOver: boolean): void {
  const { reply } = exchange
  exchange.sending = 'passed'
  timeout.isPassed = true
  Reflect.deleteProperty(reply, 'header')
  reply.send = sendLate as never
  const end = () => {
    if (exchange.timeout !== timeout || timeout.isOver) return
    timeout.isOver = true
    restoreAll(reply, timeout.headers)
    timeout.end()
  }
  if (isOver) setImmediate(end)
  else for (const event of ['prefinish', 'finish', 'close']) reply.raw.once(event, end)
}

/** From now on the response has the timeout's status for those who read it, and remembers another for the handler. */
function watchStatus(raw: ServerResponse, timeout: Timeout): void {
  let { statusCode } = raw
  Object.defineProperty(raw, 'statusCode', {
    configurable: true,
    get: () => statusCode,
    set: (status: number) => {
      if (isOf(timeout)) timeout.ownStatus = statusCode = status
      else if (!timeout.isPassed) timeout.statusSet = statusCode = status
      // As long as the timeout's reply has not left, Node sets its status once more.
      else if (status !== statusCode || timeout.isOver) timeout.statusSet = status
    }
  })
}

/** In the place of a reply's own `send`, until it is known what the timeout's reply is. */
function sendMeanwhile(this: FastifyReply, payload?: unknown): FastifyReply {
  const timeout = exchangeOf(this.request)?.timeout
  if (timeout && isOf(timeout)) {
    timeout.isAnswered = true
  } else if (timeout) {
    // Hijacked by what answers in the handler's place.
    if (this.sent) return sendLate.call(this, payload)
    timeout.isJoined = true
    timeout.isMixed = true
  }
  return sendBy(this, payload)
}

/** Fastify's own. */
function sendBy(reply: FastifyReply, payload: unknown): FastifyReply {
  return Object.getPrototypeOf(reply).send.call(reply, payload)
}

/** In the place of a reply's own `send`, once the timeout's reply is on its way: Fastify would drop another. */
function sendLate(this: FastifyReply, payload?: unknown): FastifyReply {
  const exchange = exchangeOf(this.request)
  const timeout = exchange?.timeout
  if (!exchange || !timeout) return this.send(payload)
  // The timeout's reply could not be sent, and this is the error's. Or its client has left meanwhile.
  if (isOf(timeout)) return sendBy(this, payload)
  if (timeout.isOver) {
    goOnNowhere(exchange, timeout)
    // Hijacked by what answered in the handler's place: Fastify drops what is sent.
    const isError = payload instanceof Error
    if (this.sent) endUnkept(exchange, isError ? statusOf(payload, this.statusCode) : this.statusCode, isError)
    return this.send(payload)
  }
  timeout.over.then(() => void this.send(payload)).catch((error) => void this.send(error))
  return this
}

/**
 * The handler replies after its time: it gets a response that leads nowhere, on which its reply takes the usual
 * way through all hooks and serialisers, until it is stored.
 */
export function goOnNowhere(exchange: Exchange, timeout: Timeout): void {
  const { reply } = exchange
  exchange.timeout = null
  exchange.isMixed = timeout.isMixed
  exchange.sending = 'no'
  exchange.failed = false
  exchange.sent = 'nothing'
  const nowhere = new NowhereResponse(reply.request.raw, () => {
    settle(exchange, timeout)
    endNowhere(exchange)
  })
  nowhere.statusCode = timeout.statusSet ?? timeout.statusCode
  reply.raw = nowhere as never
  refuse(exchange, timeout)
}

/** From now on the reply is the handler's alone: what an error handler still does to it comes too late. */
function refuse(exchange: Exchange, timeout: Timeout): void {
  const { reply } = exchange
  let { statusCode } = reply
  Object.defineProperty(reply.raw, 'statusCode', {
    configurable: true,
    get: () => statusCode,
    set: (status: number) => {
      if (!isOf(timeout)) statusCode = status
    }
  })
  for (const name of ['send', 'header'] as const) {
    reply[name] = function (this: FastifyReply, ...args: unknown[]) {
      if (isOf(timeout)) return this
      if (name === 'send') noteSent(exchange, args[0])
      return Object.getPrototypeOf(this)[name].apply(this, args)
    } as never
  }
}

/** A late reply that Fastify has not brought to onSend: an error that was sent, or raw bytes. */
function endNowhere(exchange: Exchange): void {
  const { reply, failed, error, sending, workDone } = exchange
  if (sending !== 'no') return
  if (workDone) buryHijacked(exchange.operation)
  else endUnkept(exchange, failed ? statusOf(error, reply.statusCode) : reply.statusCode, failed)
}
