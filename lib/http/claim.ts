import type { FastifyReply, FastifyRequest } from 'fastify'
import { Operation, type Verdict } from '../operation/operation.js'
import type { Policy } from '../options.js'
import type { Registration } from '../registration.js'
import type { MaybePromise } from '../util/sync-promise.js'
import { isClosed, stop, watchClient } from './client-close.js'
import { Exchange, exchangeOf, kExchange } from './exchange.js'
import { hashPayload } from './fingerprint.js'
import { snapshot } from './headers.js'
import { othersHook } from './hooks-of-others.js'
import { keyAnywhere, missKey, parseKey } from './key.js'
import { putOn, replayPayload } from './replay.js'
import { RequestContext } from './request-context.js'
import { kSnapshot, RequestSnapshot } from './request-snapshot.js'
import { scopeOf } from './scope.js'

/* Between the hooks and the operation: from the key of a request to what is to be done with it. */

type GetKey = NonNullable<Policy['getKey']>
type Scope = NonNullable<Policy['scope']>
/** The reply, if it is on its way now. */
type Answer = MaybePromise<FastifyReply | undefined>

/**
 * From a key to a verdict: finds the key, opens its operation, claims it, and lets the handler run, replays or refuses. A
 * promise is paid for only where there is something to wait for.
 */
export class Claims {
  readonly #policy: Policy
  readonly #registration: Registration

  constructor(policy: Policy, registration: Registration) {
    this.#policy = policy
    this.#registration = registration
  }

  /** Claims a key that can be seen already, for one lease, where the option `hook` names an early phase. */
  reserve(request: FastifyRequest, reply: FastifyReply): MaybePromise<void> {
    const { getKey, scope } = this.#policy
    const snapshot = request[kSnapshot]
    if (snapshot === null) return
    if (getKey !== null) return this.#reserveAsked(request, reply, getKey)
    if (snapshot.seenKey === undefined) return
    if (scope !== null) return this.#reserveScoped(request, reply, snapshot.seenKey, scope)
    return reserve(this.#open(request, reply, snapshot.seenKey, null))
  }

  /** Claims the key of a request of which all is known. */
  claim(request: FastifyRequest, reply: FastifyReply): Answer {
    const { getKey } = this.#policy
    const snapshot = request[kSnapshot]
    snapshot?.finishLate()
    const seen = snapshot?.key
    if (seen instanceof Error) throw seen
    const exchange = exchangeOf(request)
    if (exchange !== null) return this.#decide(exchange)
    if (getKey !== null) return this.#claimAsked(request, reply, getKey)
    const key = seen ?? keyAnywhere(request, this.#policy)
    if (key !== undefined) return this.#claimKey(request, reply, key)
    missKey(this.#policy)
    return undefined
  }

  async #reserveAsked(request: FastifyRequest, reply: FastifyReply, getKey: GetKey): Promise<void> {
    const { scope } = this.#policy
    const raw = (await getKey(request)) ?? undefined
    // It may find one when there is a body.
    if (raw === undefined) return
    const key = parseKey(raw, this.#policy)
    if (scope !== null) await this.#reserveScoped(request, reply, key, scope)
    else await reserve(this.#open(request, reply, key, null))
  }

  async #reserveScoped(request: FastifyRequest, reply: FastifyReply, key: string, scope: Scope): Promise<void> {
    return reserve(this.#open(request, reply, key, await scopeOf(request, scope)))
  }

  async #claimAsked(request: FastifyRequest, reply: FastifyReply, getKey: GetKey): Promise<FastifyReply | undefined> {
    const raw = (await getKey(request)) ?? undefined
    if (raw !== undefined) return this.#claimKey(request, reply, parseKey(raw, this.#policy))
    missKey(this.#policy)
    return undefined
  }

  #claimKey(request: FastifyRequest, reply: FastifyReply, key: string): Answer {
    const { scope } = this.#policy
    if (scope !== null) return this.#claimScoped(request, reply, key, scope)
    return this.#decide(this.#open(request, reply, key, null))
  }

  async #claimScoped(
    request: FastifyRequest,
    reply: FastifyReply,
    key: string,
    scope: Scope
  ): Promise<FastifyReply | undefined> {
    return this.#decide(this.#open(request, reply, key, await scopeOf(request, scope)))
  }

  /** The request becomes an operation. */
  #open(request: FastifyRequest, reply: FastifyReply, key: string, scope: string | null): Exchange {
    const snapshot = this.#snapshotOf(request)
    const operation = new Operation(
      { request, log: request.log },
      this.#policy,
      this.#registration,
      key,
      scope,
      snapshot
    )
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
    if (known !== null) {
      known.expectKey()
      return known
    }
    // Nobody saw the key coming: a hook has provided it.
    const snapshot = new RequestSnapshot(request, this.#policy, '')
    request[kSnapshot] = snapshot
    void snapshot.finish()
    return snapshot
  }

  #decide(exchange: Exchange): Answer {
    const { operation, request } = exchange
    const { fingerprint } = this.#policy
    const snapshot = request[kSnapshot]
    const payload = snapshot?.payload ?? ''
    if (typeof fingerprint === 'function') {
      return this.#decideKnowing(exchange, Promise.resolve(fingerprint(request)).then(hashPayload))
    }
    if (payload instanceof Promise) return this.#decideKnowing(exchange, payload)
    if (snapshot?.key instanceof Error) throw snapshot.key
    operation.learn(payload)
    const verdict = operation.claim()
    return verdict instanceof Promise ? this.#obeyLater(verdict, exchange) : this.#obey(verdict, exchange)
  }

  async #decideKnowing(exchange: Exchange, payload: Promise<string>): Promise<FastifyReply | undefined> {
    exchange.operation.learn(await payload)
    const { key } = exchange.request[kSnapshot] ?? {}
    if (key instanceof Error) throw key
    return this.#obey(await exchange.operation.claim(), exchange)
  }

  async #obeyLater(verdict: Promise<Verdict>, exchange: Exchange): Promise<FastifyReply | undefined> {
    return this.#obey(await verdict, exchange)
  }

  #obey(verdict: Verdict, exchange: Exchange): FastifyReply | undefined {
    const { operation, reply, request } = exchange
    if (verdict === 'gone') stop(reply)
    if (operation.phase === 'unprotected') exchange.runUnprotected()
    const { reply: stored } = operation
    if (stored === null) return undefined
    const payload = replayPayload(stored, othersHook(request, 'onSend'))
    exchange.replay(stored, payload, snapshot(reply))
    putOn(reply, stored, this.#policy.replayHeader)
    return reply.send(payload)
  }
}

async function reserve({ operation, reply }: Exchange): Promise<void> {
  if ((await operation.reserve()) === 'gone') stop(reply)
}
