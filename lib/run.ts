import type { FastifyBaseLogger } from 'fastify'
import type { RunContext, RunOptions, Stored, StoredReply } from '../types/index.js'
import { digest } from './http/byte-writer.js'
import { payloadFingerprint } from './http/fingerprint.js'
import { replyRecord } from './http/reply-record.js'
import { RequestContext } from './http/request-context.js'
import { HINT_LENGTH } from './operation/fingerprint.js'
import { Operation } from './operation/operation.js'
import { unavailable } from './operation/report.js'
import { decodeResult, encodeResult, textOrReason, Unkeepable } from './operation/step-result.js'
import { type RegistrationOptions, runPolicy } from './options.js'
import type { Registration } from './registration.js'

/* `app.idempotency.run`: the life of a key without a request. Its reply is the result of a function, as JSON. */

/** In the place of what a request is for: a key that a request has used is another's. */
const HEAD = digest('run') + digest('run').slice(0, HINT_LENGTH)

/** Runs what is no request, under the options of a registration. */
export class Runner {
  readonly #registration: Registration
  readonly #defaults: RegistrationOptions['routeDefaults']
  readonly #log: FastifyBaseLogger

  constructor(registration: Registration, log: FastifyBaseLogger) {
    this.#registration = registration
    this.#defaults = registration.options.routeDefaults
    this.#log = log
  }

  async run<T>(key: string, options: RunOptions, fn: (run: RunContext) => T | Promise<T>): Promise<Stored<T>> {
    const { scope, fingerprint, ...own } = options
    const policy = runPolicy(own, this.#defaults)
    // Nothing would renew its claim, and its store may be closed.
    if (this.#registration.closed) throw unavailable(policy, new Error('The server has closed'))
    this.#registration.cover(policy)
    const origin = { request: null, log: this.#log }
    const caller = { head: HEAD, credentials: null }
    const operation = new Operation(
      origin,
      policy,
      this.#registration,
      key,
      scope === undefined ? null : String(scope),
      caller
    )
    operation.learn(fingerprint === undefined ? '' : payloadFingerprint(fingerprint))
    await operation.claim()
    const { reply } = operation
    if (reply !== null) return resultOf(reply) as Stored<T>
    if (operation.phase !== 'unprotected') operation.start()
    let value: T
    try {
      value = await fn(new RequestContext(operation))
    } catch (error) {
      await operation.release()
      throw error
    }
    // What was done cannot be undone.
    const text = textOrReason(() => encode(value, policy.maxReplySize))
    const record = replyRecord(operation.storedFingerprint, 200, [], text)
    await operation.complete(record)
    return resultOf(record) as Stored<T>
  }
}

/** @throws Unkeepable */
function encode(value: unknown, limit: number): string {
  const text = encodeResult(value)
  const size = Buffer.byteLength(text)
  if (size <= limit) return text
  throw new Unkeepable(`its result takes ${size} bytes, of ${limit} allowed: return an id, not an object`)
}

function resultOf({ body }: StoredReply): unknown {
  return decodeResult('run', body.toString())
}
