import type { FastifyBaseLogger } from 'fastify'
import { isNoOutage, StoreTimeout } from '../errors.js'
import { clock } from '../util/clock.js'
import { isResolved } from '../util/sync-promise.js'
import { withTimeout } from '../util/timeout.js'

/**
 * How long a request waits that finds out whether the store is back. One that is back answers in a few milliseconds, and
 * whoever has come for nothing is to get its 503 at once.
 */
const PROBE_MS = 100
/** So many keys in a row have to fail by errors, without a success between: one key alone may be damaged, or locked. */
const DIFFERENT_KEYS = 3
/** What Node says where there is nobody to talk to: not of a connection that breaks, which others may outlive. */
const NO_CONNECTION = /^(?:ECONNREFUSED|EHOST|ENET|ETIMEDOUT|ENOTFOUND|EAI_)/

/** May a request ask the store, and how long does it wait for the answer? */
export interface Permit {
  readonly patience: number
}

/** What the store could not be told, and is to be told when it is back. */
export interface Waiting {
  storeIsBack(): void
}

/** So many of them go at once, and the next a moment later: a store that is back is not to be overrun. */
const WOKEN_AT_ONCE = 16
const WAKING_PAUSE_MS = 10

const UNLIMITED: Permit = { patience: Number.POSITIVE_INFINITY }

/**
 * Whether a store is known to be down, as its answers to this process tell: while it is, requests need not wait for it.
 *
 * It is down when a call has had no answer within its limit, or no connection, while no other call had one; or when calls
 * for several keys have failed one after the other. Calls that were under way together have failed together: a connection
 * that breaks ends all that go by it, and a store may have several, to several servers. It is up again with the first
 * answer, to whomever. So the failure of one key closes the store to nobody: with others at work it stands against their
 * answers, and without them the next request is the probe. An answer that makes no sense, and that there is no room, are
 * answers.
 */
export class StoreHealth {
  #isDown = false
  #downSince = 0
  /** The last of the errors that have come since there was an answer, of which the first is logged. */
  #error: unknown = null
  /** The keys that have failed one after the other since the last success. */
  readonly #failed = new Set<string>()
  /** How many answers there were, so that a call can tell whether there was one while it waited. */
  #answers = 0
  /** How many failures have counted, for the same. */
  #failures = 0
  #probe: { readonly patience: number; readonly until: number } | null = null
  /** Where that was. */
  #log: FastifyBaseLogger | null = null
  #waiting = new Set<Waiting>()

  get isDown(): boolean {
    return this.#isDown
  }

  /** Why the store was found to be down. */
  get error(): unknown {
    return this.#error
  }

  /**
   * Leave for a request to ask the store: `null` while it is known to be down, but for one at a time, which finds out
   * whether it is back.
   */
  admit(): Permit | null {
    if (!this.#isDown) return UNLIMITED
    const now = clock.now()
    if (this.#probe !== null && now < this.#probe.until) return null
    this.#probe = { patience: PROBE_MS, until: now + PROBE_MS }
    return this.#probe
  }

  /**
   * The answer to a call about a key, or a `StoreTimeout` when there is none after `ms` milliseconds. The call of a probe
   * goes on being waited for when its request does not wait any more.
   */
  ask<T>(key: string, ms: number, call: () => Promise<T>, permit = UNLIMITED): Promise<T> {
    const answers = this.#answers
    const failures = this.#failures
    const answer = withTimeout(ms, call, {
      answered: () => {
        this.#answers++
        this.answered()
      },
      failed: (error) => {
        if (this.#probe === permit) this.#probe = null
        if (!isNoOutage(error) && answers === this.#answers) this.#fail(key, error, failures)
      }
    })
    if (isResolved(answer)) this.answered()
    if (permit.patience >= ms) return answer
    return withTimeout(permit.patience, () => answer)
  }

  /** The store has answered. */
  answered(): void {
    if (this.#error === null) return
    const wasDown = this.#isDown
    if (wasDown) {
      const downForMs = Math.round(clock.now() - this.#downSince)
      this.#log?.warn({ idempotency: { downForMs } }, 'idempotency store is back')
    }
    this.#isDown = false
    this.#error = null
    this.#log = null
    this.#probe = null
    this.#failed.clear()
    if (wasDown) this.#wake()
  }

  /**
   * Is told once when the store, which is down, is back. Whoever only tries again from time to time may miss each moment in
   * which a store is there that comes and goes.
   */
  tellWhenBack(waiting: Waiting): void {
    if (this.#isDown) this.#waiting.add(waiting)
  }

  /** A pause before another try, which does not keep the process alive: it ends early when a store that was down is back. */
  pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const storeIsBack = () => {
        clock.clearTimer(timer)
        this.#waiting.delete(waiting)
        resolve()
      }
      const waiting = { storeIsBack }
      const timer = clock.setTimer(storeIsBack, ms)
      timer.unref()
      this.#waiting.add(waiting)
    })
  }

  /** Logs the failure of a step: an outage is one error, whatever the number of steps that meet it. */
  report(error: unknown, log: FastifyBaseLogger, bindings: object): void {
    const isOutage = this.#error !== null && !isNoOutage(error)
    if (isOutage && this.#log !== null) {
      log.debug({ ...bindings, err: error }, 'idempotency store still fails')
      return
    }
    if (isOutage) this.#log = log
    log.error({ ...bindings, err: error }, 'idempotency store failed')
  }

  #wake(): void {
    const woken = this.#waiting
    this.#waiting = new Set()
    const next = () => {
      let left = WOKEN_AT_ONCE
      for (const waiting of woken) {
        if (this.#isDown) this.#waiting.add(waiting)
        else if (left-- > 0) waiting.storeIsBack()
        else break
        woken.delete(waiting)
      }
      if (woken.size > 0) clock.setTimer(next, WAKING_PAUSE_MS).unref()
    }
    next()
  }

  /** @param before How many failures had counted when the call began. */
  #fail(key: string, error: unknown, before: number): void {
    this.#error = error ?? new Error('The idempotency store has failed')
    if (this.#isDown || !(isSilence(error) || this.#isLastOfSeveral(key, before))) return
    this.#isDown = true
    this.#downSince = clock.now()
  }

  #isLastOfSeveral(key: string, before: number): boolean {
    if (before !== this.#failures || this.#failed.has(key)) return false
    this.#failures++
    return this.#failed.add(key).size === DIFFERENT_KEYS
  }
}

/** Has nobody answered, if only by an error? */
function isSilence(error: unknown): boolean {
  return error instanceof StoreTimeout || NO_CONNECTION.test(String((error as { code?: unknown } | null)?.code))
}
