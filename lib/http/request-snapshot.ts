import type { FastifyRequest } from 'fastify'
import { KeyUnreadable } from '../errors.js'
import type { Policy } from '../options.js'
import { warn } from '../warnings.js'
import { credentialsOf } from './credentials.js'
import { hasBody, headOf, payloadOfBody } from './fingerprint.js'
import { othersHook } from './hooks-of-others.js'
import { isInUnparsedBody, keyInBody, parseKey } from './key.js'

/* What the client sent counts, not what hooks and validation make of it. */

/** Where a request keeps what was read of it before others could change it; `null` when there was no key to be seen. */
export const kSnapshot = Symbol('fastify-idempotency.snapshot')

declare module 'fastify' {
  interface FastifyRequest {
    [kSnapshot]: RequestSnapshot | null
  }
}

/**
 * What the client sent, as far as it decides about its key: read before hooks and validation, which coerce values, fill
 * in defaults, add members of their own, and remove what a schema does not know, such as the key or the credentials.
 */
export class RequestSnapshot {
  readonly request: FastifyRequest
  readonly policy: Policy
  /** The key that could be seen before there was a body: one that comes with the body is not claimed early. */
  readonly seenKey: string | undefined
  /** The client's key; an error where there is one that is none, which is for the claim to throw. */
  key: string | Error | undefined
  /** Who asks; `null` where a scope says so, or nobody does. */
  credentials: string | null = null
  /** The first part of the fingerprint: what the request is for, and who asks. */
  head = ''
  /** The hash of the payload; empty while it is not known. */
  payload: string | Promise<string> = ''
  /** What hooks had put in the place of the body before it was parsed. */
  before: unknown
  #isWatching = false
  #isRead = false
  /** A body was sent, and nobody has read it yet. */
  #isUnread = false

  constructor(request: FastifyRequest, policy: Policy, key: string | undefined) {
    this.request = request
    this.policy = policy
    this.seenKey = key
    this.key = key
    // Without a key so far, this can wait until one has come with the body.
    if (key !== undefined) this.readHead()
  }

  /** Reads what is known as soon as the request has headers. */
  readHead(): void {
    const { policy, request } = this
    if (!policy.scoped) this.credentials = credentialsOf(request)
    this.head = headOf(request, policy, this.credentials)
  }

  /** There is a key after all, from `getKey` or a hook: what the client sent with it counts. */
  expectKey(): void {
    if (this.head === '') this.readHead()
    if (this.key !== undefined) return
    this.key = ''
    if (!this.#isRead || this.policy.getKey !== null) return
    this.#readPayload()
    this.#warnUnlessKnown()
  }

  /**
   * Reads the body in the moment in which the parser hands it over: the instance's preValidation hooks, which come
   * before all hooks of a route, may replace or change it. Where nobody has such a hook, `finish` is early enough, and the
   * request keeps its shape: with an accessor in it, all that looks at it would be slower.
   */
  watchBody(): void {
    const { body, headers } = this.request
    // A body that has not been sent is not parsed, whatever hooks put in its place.
    const isSent = hasBody(this.request) || headers['content-type'] !== undefined
    if (!isSent) {
      this.#readBody()
    } else if (othersHook(this.request, 'preValidation')) {
      this.before = body
      this.#isWatching = true
      Object.defineProperty(this.request, 'body', WATCHED_BODY)
    }
  }

  /** The parser has done its work. What comes behind it is that of hooks. */
  parsed(body: unknown): void {
    this.#stopWatching(body)
    // Nothing: the parser has left it to others, as that of @fastify/multipart does, whose hook is still to come.
    if (body !== undefined) this.#readBody()
  }

  /** Nothing more is to come before the validation. Resolves when all of it has been read. */
  finish(): void | Promise<void> {
    this.#stopWatching(this.before)
    if (!this.#isRead) {
      const { body } = this.request
      this.#isUnread = (body === undefined || body === null) && hasBody(this.request)
      if (!this.#isUnread) this.#readBody()
    }
    // A key that getKey will find, or a hook that reads the body, needs one all the same: the validation may change it.
    if (this.head === '' && (this.key !== undefined || this.#isUnread || this.policy.getKey !== null)) this.readHead()
    if (this.payload instanceof Promise) {
      return this.payload.then((payload) => {
        this.payload = payload
        this.#warnUnlessKnown()
      })
    }
    if (!this.#isUnread) this.#warnUnlessKnown()
  }

  /** The last moment before the claim: a preHandler hook may have read the body, as those do that take uploads. */
  finishLate(): void {
    if (!this.#isUnread) return
    this.#isUnread = false
    this.#readBody()
    this.#warnUnlessKnown()
  }

  /** Who compares payloads is told where there is none to be compared, as in a gateway that passes bodies on unread. */
  #warnUnlessKnown(): void {
    const { fingerprint, getKey, route } = this.policy
    if (this.payload !== '' || fingerprint !== true) return
    if (this.key instanceof Error || (this.key === undefined && getKey === null)) return
    warn(
      'FST_IDEMPOTENCY_PAYLOAD',
      `the payloads of ${route} are not compared, because its bodies are not parsed: the same key with another body gets ` +
        'the first reply. Parse them, compare what a function "fingerprint" makes of a request, or say so by fingerprint: false'
    )
  }

  #stopWatching(body: unknown): void {
    if (!this.#isWatching) return
    this.#isWatching = false
    Object.defineProperty(this.request, 'body', { configurable: true, enumerable: true, writable: true, value: body })
  }

  #readBody(): void {
    const { policy } = this
    this.#isRead = true
    if (this.key === undefined && policy.getKey === null) this.key = this.#keyInBody()
    if (this.key !== undefined || policy.getKey !== null) this.#readPayload()
  }

  #readPayload(): void {
    if (this.policy.fingerprint !== true || this.key instanceof Error) return
    // What a body throws that is looked at is for the claim to throw: here it would be in the way of the parser.
    const failed = (error: unknown) => {
      this.key = error as Error
      return ''
    }
    try {
      const payload = payloadOfBody(this.request)
      this.payload = typeof payload === 'string' ? payload : payload.catch(failed)
    } catch (error) {
      failed(error)
    }
  }

  #keyInBody(): string | Error | undefined {
    const { request, policy } = this
    if (policy.field === null) return undefined
    if (isInUnparsedBody(request)) return new KeyUnreadable(policy.field)
    try {
      const raw = keyInBody(request, policy)
      return raw === undefined ? undefined : parseKey(raw, policy)
    } catch (error) {
      return error as Error
    }
  }
}

/** One for all requests, so that they keep one shape. */
const WATCHED_BODY: PropertyDescriptor & ThisType<FastifyRequest> = {
  configurable: true,
  enumerable: true,
  get() {
    return this[kSnapshot]?.before
  },
  set(body: unknown) {
    this[kSnapshot]?.parsed(body)
  }
}
