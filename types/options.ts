import type { KeyObject } from 'node:crypto'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { IdempotencyStore, StoredReply } from './store.js'

/** The phases of a request in which its key can be claimed. */
export type ClaimHook = 'onRequest' | 'preParsing' | 'preValidation' | 'preHandler'

/** What a key may look like. */
export type KeyFormat = 'any' | 'uuid' | 'structured' | RegExp

/** Milliseconds, or a text such as `'24h'`, `'30s'` or `'2 days'`. */
export type Duration = number | string

/**
 * 32 bytes or more that nobody can guess: as they are, as a `KeyObject`, or as a text. A text in hex or base64 stands for its
 * bytes, any other for its own in UTF-8.
 */
export type Secret = Uint8Array | string | KeyObject

/** Options that a route may set for itself in `config.idempotency`. Sizes are bytes. */
export interface IdempotencyRouteOptions {
  /**
   * Where claims and replies live. A registration below another one inherits its `store`, unless it says otherwise.
   * @default new MemoryStore()
   */
  store?: IdempotencyStore
  /**
   * Lets a request through unprotected when it returns `true`. Asked before anything else: in onRequest, where there is no
   * body yet. What depends on the body is for `getKey`.
   */
  skip?: (request: FastifyRequest) => boolean | Promise<boolean>
  /**
   * The request header that carries the key; `false` for none.
   * @default 'Idempotency-Key'
   */
  header?: string | false
  /** The name of a query parameter or body field that may carry the key instead of the header, as in HTML forms. */
  field?: string
  /** Finds the key in place of `header` and `field`; `undefined` for none. */
  getKey?: (request: FastifyRequest) => string | undefined | Promise<string | undefined>
  /**
   * What a key must look like: `'any'`, `'uuid'` (RFC 9562, version 4 or 7; letter case does not matter), `'structured'`
   * (only a quoted string, RFC 9651 §3.3.3), or a regular expression.
   * @default 'any'
   */
  keyFormat?: KeyFormat
  /**
   * The longest key, in UTF-8 bytes, without quotes and parameters. Of parameters, which are ignored, 1024 characters
   * are allowed.
   * @default 255
   */
  maxKeyLength?: number
  /**
   * Refuse a covered request that has no key.
   * @default false
   */
  required?: boolean
  /**
   * Who the caller is: a user, tenant or account. The same key in two scopes is two operations. It names the caller, and
   * does not check them: that is for hooks that come before. A request without a key never asks it. An error of it with a
   * 4xx `statusCode` is passed on; any other, or no name, is 500 FST_IDEMPOTENCY_SCOPE.
   *
   * Without it the request's credentials are part of the fingerprint: `Authorization`, else an API key (`X-API-Key`,
   * `Api-Key`, `X-Auth-Token`, `X-Access-Token`), else a client certificate, else all cookies; and `Proxy-Authorization`.
   * `false`: all callers are deliberately one, as in a public form, or for the webhooks of one sender. A registration below
   * another one inherits its `scope`, unless it says otherwise.
   */
  scope?: ((request: FastifyRequest) => string | Promise<string>) | false
  /**
   * What the request is for, in place of the comparison of host, route, parameters and query: for URLs that change
   * from retry to retry, as signed ones do. The method is always compared.
   */
  target?: (request: FastifyRequest) => string
  /**
   * Compare the payload of requests with the same key: by value (`true`), not at all (`false`), or by what a
   * function makes of the request. An empty result means unknown, and is never a mismatch.
   * @default true
   */
  fingerprint?:
    | boolean
    | ((request: FastifyRequest) => string | NodeJS.ArrayBufferView | Promise<string | NodeJS.ArrayBufferView>)
  /**
   * When the key is claimed: after the instance's and the route's own hooks of that phase. By default that is when the
   * caller is authenticated, and the body parsed and valid. Earlier, duplicates get their 409 before their body is read,
   * which is worth it for large uploads; the claim is not renewed then before the handler starts, and takes one more call
   * to the store. A key in the body is claimed in `preHandler`, whatever this says. Not with `transaction`.
   * @default 'preHandler'
   */
  hook?: ClaimHook
  /**
   * What becomes of a duplicate while the first request runs: refused with 409 (`'reject'`), or held until
   * the first one's reply is there (`'wait'`).
   * @default 'reject'
   */
  onConflict?: 'reject' | 'wait'
  /**
   * How long a duplicate waits before it gets its 409 after all.
   * @default 60_000
   */
  waitTimeout?: Duration
  /**
   * How long a claim outlives its process. Renewed for as long as the request runs. With `transaction`: how long
   * one outlives a process whose connection has not ended, because the process or its network has stopped.
   * @default 30_000
   */
  lease?: Duration
  /**
   * What becomes of a retry when the owner of the claim died: `'rerun'` the handler, or `'reject'` with 409
   * because the outcome is not known.
   * @default 'rerun'
   */
  onAbandoned?: 'rerun' | 'reject'
  /**
   * Claim the key, run the handler and store the reply in one transaction of the store's own database: exactly
   * once, for what the handler does on `request.idempotency.transaction`. Needs a store that can, such as
   * `PostgresStore`.
   *
   * `'nested'`: the same for handlers that call what begins and ends transactions of its own on that client. `BEGIN`
   * becomes `SAVEPOINT`; `COMMIT` becomes `RELEASE SAVEPOINT`, and `ROLLBACK` becomes `ROLLBACK TO SAVEPOINT` and
   * `RELEASE SAVEPOINT`, of the last one that was begun. With `true` they are refused.
   * @default false
   */
  transaction?: boolean | 'nested'
  /**
   * How long a stored reply is replayed, from its completion; `null` for ever.
   * @default 86_400_000
   */
  ttl?: Duration | null
  /**
   * Is this reply final? A reply that is not releases the key, so that a retry runs the handler again.
   * @default every status below 500 but 401, 408, 423, 425 and 429, and no reply with `Retry-After`
   */
  shouldStore?: (request: FastifyRequest, reply: FastifyReply) => boolean
  /**
   * Makes of a reply what is stored of it, and replayed: without what must not be kept. The first client gets the whole
   * reply. It answers at once; where it fails, nothing is kept but a tombstone.
   */
  redact?: (reply: StoredReply) => StoredReply
  /**
   * The largest reply body that is kept. A larger one leaves a tombstone.
   * @default 1_048_576
   */
  maxReplySize?: number
  /**
   * How many bytes the names and results of all steps of an operation take at most. They travel with the claim: a step
   * should give an id, not an object.
   * @default 65_536
   */
  maxStepsSize?: number
  /**
   * Names of reply headers that are not stored, besides those that never are.
   * @default []
   */
  excludeHeaders?: readonly string[]
  /**
   * The reply header that marks a replay with `true`; `false` for none.
   * @default 'Idempotent-Replayed'
   */
  replayHeader?: string | false
  /**
   * What becomes of a request whose key cannot be claimed because the store fails: refused with 503
   * (`'reject'`), or run without protection (`'bypass'`), unless another request is known to have the key, or the
   * store is there but full.
   * @default 'reject'
   */
  onStoreError?: 'reject' | 'bypass'
  /**
   * How long a call to the store may take before it counts as failed.
   * @default 2_000
   */
  storeTimeout?: Duration
  /**
   * Send the plugin's own errors as `application/problem+json` (RFC 9457).
   * @default false
   */
  problemDetails?: boolean
  /**
   * Where the errors are documented: sent as `Link: <url>; rel="describedby"`, and as the problem `type`. `{code}` in it stands
   * for the code of the error, so that each has a page, or a part of one, of its own.
   */
  documentationUrl?: string
}

/** Options of `app.register(idempotency, options)`. */
export interface IdempotencyOptions extends IdempotencyRouteOptions {
  /**
   * Cover every route whose method is in `methods`, unless its `config.idempotency` is `false`. A registration below
   * another one inherits `global` and `methods` of it, unless it sets them itself.
   * @default false
   */
  global?: boolean
  /**
   * The methods that `global` covers, one or more that the server has. Safe methods are never covered.
   * @default ['POST', 'PATCH']
   */
  methods?: readonly string[]
  /**
   * Makes HMACs of what the store sees of keys, scopes and requests: of storage keys, of the marks of callers, and of
   * fingerprints. Without it they are hashes, and who reads the store can try guesses. Another secret makes other keys of
   * all: what was kept before is not found, and runs again.
   *
   * A list is for its rotation: keys are claimed under the first secret, and looked for under the others as well; `null` in it
   * stands for none. In a first deploy a new secret goes to the end of the list, in a second one to its front, and the old
   * one is left out when what was kept under it is over. While there are several, requests ask the store more often, and
   * routes with `transaction` do not boot.
   */
  secret?: Secret | readonly (Secret | null)[]
}

/** What a route may say in `config.idempotency`. */
export type IdempotencyRouteConfig = boolean | IdempotencyRouteOptions
