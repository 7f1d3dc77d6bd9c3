import { hash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { uuidOf } from '../util/uuid.js'
import { countedByReplies, type Executions, executionsIn } from './executions.js'
import { Ended, type Finding, failed, inWords, notApplicable, notDecidable, type Shown, shown } from './finding.js'
import { type Connection, type Exchange, type Request, send } from './http.js'
import { isObject } from './json-value.js'
import type { CompleteProfile, Headers, Variant } from './profile.js'

/* What rules are tried with: requests of the profile, and what is the same in most rules. */

export interface Limits {
  /** Milliseconds until a reply counts as missing. */
  readonly timeout: number
  /** Milliseconds for everything. */
  readonly maxDuration: number
  readonly maxRequests: number
}

/** What is asked in one request. */
export interface Ask {
  /** The value of the key's header; `null` for none; several for several lines. */
  readonly key?: string | null | readonly string[]
  readonly variant?: Variant | undefined
  /** In place of the body. */
  readonly body?: unknown
  /** In place of what the body is written as. */
  readonly text?: string
  /** In place of the first caller's headers. */
  readonly caller?: Headers | undefined
  readonly path?: string | undefined
  readonly query?: string
}

type KeyedAsk = Ask & { readonly key: string; readonly variant: Variant }

/** A slow request, and what was sent while it ran and after that. */
export interface Met {
  readonly first: Exchange
  readonly others: readonly Exchange[]
  /** How often all of that was carried out; `null` where that cannot be told. */
  readonly count: number | null
}

export interface Once {
  readonly exchanges: readonly Exchange[]
  /** How often it was carried out; `null` where that cannot be told. */
  readonly count: number | null
}

/** Duplicates of a request that runs are refused with one of these. A server that is busy may say 429 or 503. */
const LATER = new Set([409, 425, 429, 503])
/** How long a request that has ended may still count as running. */
export const PATIENCE_MS = 3_000
const NO_OTHER = 'no other payload was accepted, with a key of its own: name one in the profile ("otherBody")'
/** A shorter request is over before a duplicate of it arrives. */
const MIN_SLOW_MS = 100
/** So often a slow request is sent for others to meet. */
const MEETINGS = 3
/** What goes on behind a reply has begun by then. */
const SETTLING_MS = 50

export class Session {
  /** How many requests were sent. */
  sent = 0
  /** How long a slow request takes, in milliseconds. */
  slowMs = 0
  /** How executions are counted; not at all before it is known. */
  executions: Executions = countedByReplies(null)
  readonly #deadline: number
  #keys = 0
  /** What the profile says and is not so, and limits that were reached. */
  readonly problems: string[] = []
  /** Payloads other than the profile's that are accepted. */
  others: readonly unknown[] = []
  /** Why slow requests cannot be met; `null` for nothing. */
  #slowFault: string | null = null
  /** What was sent last, before nobody answered any more. */
  #last: Exchange | null = null
  /** Nobody answers any more. */
  isGone = false

  constructor(
    readonly base: URL,
    readonly profile: CompleteProfile,
    readonly seed: string,
    readonly limits: Limits
  ) {
    this.#deadline = performance.now() + limits.maxDuration
  }

  /** A UUID (RFC 9562 version 4) that no other request of this seed has. */
  uuid(): string {
    return uuidOf(hash('sha256', `${this.seed}:${this.#keys++}`))
  }

  /** A new key, as the header has it. */
  key(): string {
    return this.written(this.uuid())
  }

  /** A key as the header has it. */
  written(key: string): string {
    return this.profile.key.format === 'structured' ? `"${key}"` : key
  }

  request({ key = this.key(), variant = {}, body, text, caller, path, query }: Ask = {}): Request {
    const { profile } = this
    const url = new URL(path ?? variant.path ?? profile.path ?? '', this.base)
    if (query !== undefined) url.search += `${url.search === '' ? '?' : '&'}${query}`
    const named = { ...profile.headers, ...(caller ?? profile.callers?.[0]), ...variant.headers }
    const headers: [string, string][] = Object.entries(named)
    const keys = key === null ? [] : typeof key === 'string' ? [key] : key
    for (const value of keys) headers.push([profile.key.header, value])
    const payload = merged(body ?? profile.body, variant.body)
    const written = text ?? (typeof payload === 'string' ? payload : JSON.stringify(payload))
    return { method: profile.method, url, headers, body: written }
  }

  /** Sends a request. Rejects with `Ended` where a limit is reached or nobody answers any more, and never otherwise. */
  async send(request: Request, options: { connection?: Connection; signal?: AbortSignal } = {}): Promise<Exchange> {
    const { timeout, maxDuration, maxRequests } = this.limits
    const left = this.#deadline - performance.now()
    if (left <= 0) throw this.#limited(`the ${maxDuration} ms for everything are over`)
    if (this.sent >= maxRequests) throw this.#limited(`the ${maxRequests} requests are used up`)
    this.sent++
    const exchange = await send(request, { timeout: Math.min(timeout, Math.ceil(left)), ...options })
    if (exchange.failure === 'ECONNREFUSED') throw new Ended(this.gone(exchange))
    this.#last = exchange
    return exchange
  }

  #limited(reason: string): Ended {
    this.say(reason)
    return new Ended(notDecidable(reason))
  }

  /** Something that the person who made the run should know. */
  say(problem: string): void {
    if (!this.problems.includes(problem)) this.problems.push(problem)
  }

  /** Nobody answers any more: what was sent last is to blame. */
  gone(exchange: Exchange | null): Finding {
    this.isGone = true
    const last = this.#last ?? exchange
    return failed(
      'the server stopped answering',
      ...(last === null ? [] : [shown('the last request before that', last)])
    )
  }

  /** Another payload than the profile's. */
  otherBody(): unknown {
    if (this.others.length > 0) return this.others[0]
    throw new Ended(notDecidable(NO_OTHER))
  }

  /** Which payloads other than the profile's are accepted? */
  async tryOthers(): Promise<void> {
    const others: unknown[] = []
    for (const body of this.profile.otherBodies) {
      if (isAccepted(await this.send(this.request({ body })))) others.push(body)
    }
    this.others = others
    if (others.length === 0) this.say(NO_OTHER)
  }

  /** Sends a request with a new key, which the endpoint has to accept. */
  async first(ask: Ask = {}): Promise<{ ask: Ask & { key: string }; exchange: Exchange }> {
    const keyed = { ...ask, key: typeof ask.key === 'string' ? ask.key : this.key() }
    const exchange = await this.send(this.request(keyed))
    if (!isAccepted(exchange)) {
      throw new Ended(
        notDecidable(`the first request was not accepted: ${inWords(exchange)}`, shown('the first request', exchange))
      )
    }
    return { ask: keyed, exchange }
  }

  /** Repeats a request that has ended, until it is no longer taken for one that runs. */
  async retry(request: Request): Promise<Exchange> {
    const end = performance.now() + PATIENCE_MS
    for (;;) {
      const exchange = await this.send(request)
      if (!isLater(exchange) || performance.now() > end) return exchange
      await sleep(50)
    }
  }

  /** The retry of a request that has ended; it has to be accepted for the rule to say anything. */
  async replay(request: Request): Promise<Exchange> {
    const exchange = await this.retry(request)
    if (!isAccepted(exchange)) {
      throw new Ended(notDecidable(`the retry was not accepted: ${inWords(exchange)}`, shown('the retry', exchange)))
    }
    return exchange
  }

  /** How often is what is sent meanwhile carried out? */
  async counted(sending: () => Promise<readonly Exchange[]>): Promise<Once> {
    const { executions } = this
    if (!executions.exact) {
      const exchanges = await sending()
      return { exchanges, count: executionsIn(exchanges, executions) }
    }
    const before = await executions.total()
    const exchanges = await sending()
    await sleep(SETTLING_MS)
    return { exchanges, count: (await executions.total()) - before }
  }

  /** Sends one request. `isRun`: was it carried out? `null` where only replies could tell. */
  async probe(request: Request): Promise<{ exchange: Exchange; isRun: boolean | null }> {
    const { exchanges, count } = await this.counted(async () => [await this.send(request)])
    return { exchange: exchanges[0] as Exchange, isRun: this.executions.exact ? count !== 0 : null }
  }

  /**
   * Sends something while a slow request runs; again with another key where that had ended too early, as on a busy machine.
   * @param meanwhile Gets what was asked, and a way to hang up.
   * @param afterwards Sends something when the slow request has ended.
   */
  async whileRunning(
    meanwhile: (ask: KeyedAsk, hangUp: () => void) => Promise<readonly Exchange[]>,
    afterwards: (ask: KeyedAsk) => Promise<readonly Exchange[]> = async () => []
  ): Promise<Met> {
    const variant = this.profile.slow
    if (variant === undefined) {
      throw new Ended(notApplicable('the profile does not say how to make the endpoint slow ("slow")'))
    }
    if (this.#slowFault !== null) throw new Ended(notDecidable(this.#slowFault))
    for (let n = 1; ; n++) {
      const ask = { key: this.key(), variant }
      let isMet = false
      const { exchanges, count } = await this.counted(async () => {
        const aborting = new AbortController()
        let hasEnded = false
        const before = this.executions.exact ? await this.executions.total() : 0
        const running = this.send(this.request(ask), { signal: aborting.signal })
        const end = () => {
          hasEnded = true
        }
        running.then(end, end)
        await this.#untilBegun(before)
        try {
          const others = await meanwhile(ask, () => aborting.abort())
          isMet = !hasEnded || aborting.signal.aborted
          return [await running, ...others, ...(await afterwards(ask))]
        } finally {
          // What it does must not be counted with what comes next.
          await running.then(end, end)
        }
      })
      const [first, ...others] = exchanges as [Exchange, ...Exchange[]]
      // A server that lets duplicates wait never answers them before.
      if (isMet || n === MEETINGS) return { first, others, count }
    }
  }

  /** Waits for a slow request to have begun: where executions are counted, that is known. */
  async #untilBegun(before: number): Promise<void> {
    const end = performance.now() + this.slowMs / 3
    while (performance.now() < end) {
      if (this.executions.exact && (await this.executions.total()) > before) return
      await sleep(this.slowMs / 30)
    }
  }

  /** How long does a slow request take? */
  async measureSlow(): Promise<void> {
    const variant = this.profile.slow
    if (variant === undefined) return
    const begin = performance.now()
    const exchange = await this.send(this.request({ variant }))
    this.slowMs = performance.now() - begin
    if (!isAccepted(exchange)) this.#slowFault = `a request with "slow" is not accepted: ${inWords(exchange)}`
    else if (this.slowMs < MIN_SLOW_MS) {
      this.#slowFault = `a request with "slow" took ${Math.round(this.slowMs)} ms: too short to be met`
    }
    if (this.#slowFault !== null) this.say(this.#slowFault)
  }

  /** The variant that a rule needs. */
  variant(name: 'fail' | 'binary' | 'stream' | 'large', what: string): Variant {
    const variant = this.profile[name]
    if (variant === undefined) throw new Ended(notApplicable(`the profile does not say ${what} ("${name}")`))
    return variant
  }

  /** Do both replies tell of the same execution? By what tells executions apart, or else by the whole body. */
  isSame(one: Exchange, other: Exchange): boolean {
    const [mark, otherMark] = [this.executions.mark(one.reply), this.executions.mark(other.reply)]
    if (mark !== null && otherMark !== null) return mark === otherMark
    return one.reply !== null && other.reply !== null && one.reply.body.equals(other.reply.body)
  }

  /** Can replies be told from one another? */
  needsMarks(exchange: Exchange): void {
    if (this.executions.mark(exchange.reply) !== null) return
    throw new Ended(
      notDecidable('no member of the replies tells executions apart: name one in the profile ("count": { "reply": … })')
    )
  }
}

/** Requests that follow one another, as they were sent. */
export function inOrder(exchanges: readonly Exchange[]): Shown[] {
  return exchanges.map((exchange, n) => shown(n === 0 ? 'the first request' : `retry ${n}`, exchange))
}

export function isAccepted({ reply }: Exchange): boolean {
  return reply !== null && reply.status < 400
}

/** Refused as something that the client has to mend, or has to wait for. */
export function isRefused({ reply }: Exchange): boolean {
  return reply !== null && reply.status >= 400 && reply.status < 500
}

/** It limits rates, or is overloaded. */
export function isBusy({ reply }: Exchange): boolean {
  return reply?.status === 429 || reply?.status === 503
}

export function isLater({ reply }: Exchange): boolean {
  return reply !== null && LATER.has(reply.status)
}

function merged(body: unknown, change: unknown): unknown {
  if (change === undefined) return body
  return isObject(body) && isObject(change) ? { ...body, ...change } : change
}
