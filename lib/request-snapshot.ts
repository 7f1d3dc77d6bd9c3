import type { FastifyRequest } from 'fastify'
import { credentialsOf } from './credentials.js'
import { KeyUnreadable } from './errors.js'
import { headOf, payloadOfBody } from './fingerprint.js'
import { isInUnparsedBody, keyInBody, parseKey } from './key.js'
import type { Policy } from './options.js'

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
  /** What `request.body` is, until it has been read. */
  #body: unknown
  #isWatching = false
  #isRead = false

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

  /**
   * Reads the body in the moment in which the parser hands it over: the instance's preValidation hooks, which come
   * before all hooks of a route, may replace or change it.
   */
  watchBody(): void {
    const { body } = this.request
    if (body !== undefined && body !== null) {
      this.#readBody()
    } else {
      this.#isWatching = true
      Object.defineProperty(this.request, 'body', WATCHED_BODY)
    }
  }

  get body(): unknown {
    return this.#body
  }

  set body(body: unknown) {
    this.#body = body
    // Of a multipart body the parser knows nothing: a hook that is still to come reads it.
    if (body !== undefined && body !== null) this.#readBody()
  }

  /** Nothing more is to come before the validation. Resolves when all of it has been read. */
  finish(): void | Promise<void> {
    if (!this.#isRead) this.#readBody()
    // A key that getKey will find needs one all the same.
    if (this.head === '' && (this.key !== undefined || this.policy.getKey !== null)) this.readHead()
    if (this.payload instanceof Promise) {
      return this.payload.then((payload) => {
        this.payload = payload
      })
    }
  }

  #readBody(): void {
    const { request, policy } = this
    this.#isRead = true
    if (this.#isWatching) {
      this.#isWatching = false
      Object.defineProperty(request, 'body', {
        configurable: true,
        enumerable: true,
        writable: true,
        value: this.#body
      })
    }
    if (this.key === undefined && policy.getKey === null) this.key = this.#keyInBody()
    if (this.key === undefined && policy.getKey === null) return
    if (policy.fingerprint === true && !(this.key instanceof Error)) this.payload = payloadOfBody(request)
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
    return this[kSnapshot]?.body
  },
  set(body: unknown) {
    if (this[kSnapshot] !== null) this[kSnapshot].body = body
  }
}
