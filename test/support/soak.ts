import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import http from 'node:http'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import idempotency, { type IdempotencyStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { StoreContext } from '../../lib/operation/store-context.js'
import { SERVICE } from './app.js'
import { Random } from './random.js'

/* Apps under load, clients that behave as clients do, and books that tell whether all promises were kept. */

/** What a key is used for. */
type Kind = 'plain' | 'wait' | 'flaky' | 'flaky wait' | 'stream' | 'broken' | 'large' | 'short' | 'short wait'

/** What a handler has to do. It is the request's body: the same for all duplicates, but for the variant. */
interface Job {
  key: string
  kind: Kind
  /** Two payloads for one key differ in it. */
  variant: 'a' | 'b'
  /** How long it takes. */
  ms: number
  /** How long its reply is. */
  size: number
  /** How the first runs end, before one is final. */
  failures: ('throw' | 'send' | 'discard')[]
}

interface HangUp {
  ms: number
  /** Does the client leave in the middle of its body? */
  halfway: boolean
}

interface Answer {
  status: number
  code: string | undefined
  text: string
  replayed: boolean
}

/** An answer, or why there is none. */
type Outcome = Answer | 'hung up' | 'broken off'

/** What is known of a key that is in use. */
interface Account {
  kind: Kind
  runs: number
  /** Runs that have ended, and whose reply is to be kept. */
  finals: number
  /** Runs that are at work now: never more than one. */
  active: number
  /** When the last final run had ended. */
  lastFinal: number
  /** The reply that all get. */
  text: string | null
}

const ROUTES: Record<Kind, string> = {
  plain: '/plain',
  wait: '/wait',
  flaky: '/plain',
  'flaky wait': '/wait',
  stream: '/plain',
  broken: '/plain',
  large: '/large',
  short: '/short',
  'short wait': '/short-wait'
}

const FAILED = 'SOAK_FAILED'
const OK = '201'
const BUSY = '409 FST_IDEMPOTENCY_IN_PROGRESS'
const GONE = '409 FST_IDEMPOTENCY_NOT_REPLAYABLE'
const REUSED = '422 FST_IDEMPOTENCY_KEY_REUSED'
const BROKEN = 'broken off'

/** What a client may be told. One that waits is never told to come again. */
const ALLOWED: Record<Kind, string[]> = {
  plain: [OK, BUSY],
  wait: [OK],
  flaky: [OK, BUSY, `500 ${FAILED}`],
  'flaky wait': [OK, `500 ${FAILED}`],
  stream: [OK, BUSY],
  broken: [BROKEN, BUSY, GONE],
  large: [OK, BUSY, GONE],
  short: [OK, BUSY],
  'short wait': [OK]
}

/** How often a key is used for what. */
const MIX: Kind[] = [
  ...(['plain', 'plain', 'plain', 'plain', 'plain', 'plain', 'wait', 'wait', 'wait', 'wait'] as const),
  ...(['flaky', 'flaky', 'flaky wait', 'flaky wait', 'stream', 'stream', 'stream', 'broken'] as const),
  ...(['large', 'large', 'short', 'short', 'short', 'short', 'short wait', 'short wait'] as const)
]

const EVENTS = [
  ...(['acquired', 'replayed', 'conflict', 'mismatch', 'stored', 'released', 'tombstoned'] as const),
  ...(['takeover', 'lease-lost', 'store-error', 'bypassed'] as const)
]
type EventName = (typeof EVENTS)[number]

export const SHORT_TTL = 300
/** The clocks of the store and of this process are read one after the other, and round differently. */
const CLOCK_SLACK = 50
const SHORT_KEYS = 8
const MOST_VIOLATIONS = 20
const MAX_REPLY_SIZE = 4_096

export interface SoakOptions {
  /** One app for each, as if they were processes of their own. */
  stores: IdempotencyStore[]
  transaction?: boolean
  seed: number
  seconds: number
  /** How many keys are being worked on at a time. */
  workers?: number
}

export class Soak {
  readonly #options: SoakOptions
  readonly #apps: FastifyInstance[] = []
  readonly #ports: number[] = []
  readonly #agent = new http.Agent({ keepAlive: true })
  readonly #accounts = new Map<string, Account>()
  readonly #shortKeys: { key: string; kind: Kind; users: number }[] = []
  readonly #signals = new Set<AbortSignal>()
  /** How many long keys there were: their names are counted. */
  #keys = 0
  /** What should not have happened: the first of it. */
  readonly violations: string[] = []
  /** What the plugin had to say in the log. */
  readonly log: string[] = []
  readonly events = Object.fromEntries(EVENTS.map((name) => [name, 0])) as Record<EventName, number>
  readonly numbers = { requests: 0, runs: 0, finals: 0, shortRuns: 0, replays: 0, hangUps: 0, brokenOff: 0 }
  readonly answers: Record<string, number> = {}
  /** Bytes, each with the part of the time that had passed. */
  readonly heap: { at: number; used: number }[] = []

  constructor(options: SoakOptions) {
    this.#options = options
  }

  /** Every key that is not used again once it has expired. */
  *longKeys(): Generator<string> {
    for (let n = 0; n < this.#keys; n++) yield this.#longKey(n)
  }

  /** Every key, whatever became of it. */
  *keys(): Generator<string> {
    yield* this.longKeys()
    for (const { key } of this.#shortKeys) yield key
  }

  /** What the plugin itself still remembers of requests. */
  get remembered(): number {
    const inUse = this.#options.stores.map((store) => StoreContext.of(store))
    return inUse.reduce((sum, { live, asking }) => sum + live.size + asking.size, 0)
  }

  /** Claims that have begun and not ended. */
  get unsettled(): number {
    const { acquired, stored, released, tombstoned } = this.events
    return acquired - (stored + released + tombstoned)
  }

  /** Starts the apps, loads them for the given time, and lets all that has begun come to its end. */
  async run(sample?: () => number): Promise<void> {
    const { stores, seconds, workers = 28 } = this.#options
    for (const name of EVENTS) subscribe(`fastify-idempotency:${name}`, this.#count)
    for (const store of stores) await this.#listen(store)
    for (let n = 0; n < SHORT_KEYS; n++) {
      const kind = n % 3 === 0 ? 'short wait' : 'short'
      const key = `short-${this.#options.seed}-${n}`
      this.#shortKeys.push({ key, kind, users: 0 })
      this.#accounts.set(key, accountOf(kind))
    }
    const start = performance.now()
    const passed = () => (performance.now() - start) / (seconds * 1_000)
    let episodes = 0
    // However slow the machine is, each worker has its turn, and so has each kind.
    const work = async () => {
      do {
        const random = new Random(this.#options.seed + 7_919 * episodes)
        await this.#episode(MIX[episodes++] ?? (MIX[random.between(0, MIX.length - 1)] as Kind), random)
      } while (passed() < 1 && this.violations.length < MOST_VIOLATIONS)
    }
    let over = false
    const watch = async () => {
      for (let n = 1; !over && sample; n++) {
        while (!over && passed() < n / 12) await sleep(20)
        if (!over) this.heap.push({ at: n / 12, used: sample() })
      }
    }
    const watching = watch()
    try {
      await Promise.all(Array.from({ length: workers }, work))
    } finally {
      over = true
      await watching
    }
  }

  /** The books at the end. */
  audit(): void {
    for (const [key, { kind, active, runs }] of this.#accounts) {
      if (active > 0) this.#violation(`${active} of the ${runs} runs of the ${kind} key ${key} never ended`)
      if (!kind.startsWith('short')) this.#violation(`the ${kind} key ${key} was not done with`)
    }
    for (const { aborted } of this.#signals) if (aborted) this.#violation('a signal was aborted')
    this.#signals.clear()
  }

  /** Ends the connections of the clients, then the apps. */
  async close(): Promise<void> {
    this.#agent.destroy()
    for (const app of this.#apps) await app.close()
    for (const name of EVENTS) unsubscribe(`fastify-idempotency:${name}`, this.#count)
  }

  // ---- The apps

  async #listen(store: IdempotencyStore): Promise<void> {
    const app = Fastify({
      logger: {
        level: 'warn',
        stream: {
          write: (line: string) => {
            const { msg } = JSON.parse(line)
            if (/idempotency/.test(msg) && this.log.length < 20) this.log.push(msg)
          }
        }
      }
    }) as unknown as FastifyInstance
    this.#apps.push(app)
    const { transaction = false } = this.#options
    // Nothing here depends on how fast the machine is: no limit is ever reached.
    const limits = { lease: 120_000, storeTimeout: 40_000, waitTimeout: 60_000 }
    await app.register(idempotency, { store, transaction, required: true, ...limits })
    const route = (url: string, options: object = {}) =>
      app.post(url, { config: { idempotency: { ...options } } }, this.#handle)
    route('/plain')
    route('/wait', { onConflict: 'wait' })
    route('/large', { maxReplySize: MAX_REPLY_SIZE })
    route('/short', { ttl: SHORT_TTL })
    route('/short-wait', { ttl: SHORT_TTL, onConflict: 'wait' })
    await app.listen({ host: '127.0.0.1', port: 0 })
    this.#ports.push((app.server.address() as AddressInfo).port)
  }

  readonly #handle = async (request: FastifyRequest, reply: FastifyReply): Promise<unknown> => {
    const job = request.body as Job
    const run = this.#begin(job)
    const context = request.idempotency
    if (run % 2 === 0 && context) this.#signals.add(context.signal)
    try {
      const sql = 'INSERT INTO ledger (key, run) VALUES ($1, $2)'
      await context?.transaction?.query(sql, [job.key, run])
      if (job.ms > 0) await sleep(job.ms)
    } catch (error) {
      this.#violation(`a handler could not work: ${error}`)
      this.#end(job, false)
      throw error
    } finally {
      if (context) this.#signals.delete(context.signal)
      if (context?.signal.aborted) this.#violation(`the signal of ${job.key} was aborted`)
    }
    const failure = job.failures[run - 1]
    reply.code(201).header('x-run', String(run))
    const text = JSON.stringify({ key: job.key, variant: job.variant, run, pad: 'x'.repeat(job.size) })
    if (job.kind === 'stream' || job.kind === 'broken') {
      return reply.type('application/json').send(Readable.from(this.#chunks(job, text, run), { objectMode: false }))
    }
    // What follows happens at once.
    this.#end(job, failure === undefined)
    if (failure === 'throw') throw Object.assign(new Error('as planned'), { statusCode: 500, code: FAILED })
    if (failure === 'send') return reply.code(500).send({ code: FAILED })
    if (failure === 'discard') {
      context?.discard()
      return { discarded: true }
    }
    return reply.type('application/json').send(text)
  }

  async *#chunks(job: Job, text: string, run: number): AsyncGenerator<Buffer> {
    let done = false
    // In a transaction nothing has been sent when the stream breaks off: it is undone, and the next run goes through.
    const isUndone = job.kind === 'broken' && this.#options.transaction === true && run === 1
    const breaks = job.kind === 'broken' && (isUndone || !this.#options.transaction)
    try {
      const step = Math.ceil(text.length / 4)
      for (let at = 0; at < text.length; at += step) {
        if (breaks && at >= 2 * step) {
          done = true
          throw Object.assign(new Error('broken off, as planned'), { code: FAILED })
        }
        yield Buffer.from(text.slice(at, at + step))
        if (job.ms > 0) await sleep(job.ms / 4)
      }
      done = true
    } finally {
      if (!done) this.#violation(`the stream of ${job.key} was not read to its end`)
      this.#end(job, !isUndone)
    }
  }

  #begin(job: Job): number {
    this.numbers.runs++
    const account = this.#accounts.get(job.key)
    if (account === undefined) {
      this.#violation(`the ${job.kind} key ${job.key} ran when all had been answered`)
      return 1
    }
    if (account.active > 0) this.#violation(`the ${job.kind} key ${job.key} ran twice at the same time`)
    if (job.kind.startsWith('short')) {
      this.numbers.shortRuns++
      const since = performance.now() - account.lastFinal
      if (account.finals > 0 && since < SHORT_TTL - CLOCK_SLACK) {
        this.#violation(`the ${job.kind} key ${job.key} ran again ${since} ms after its last run`)
      }
    } else if (account.finals > 0) {
      this.#violation(`the ${job.kind} key ${job.key} ran again after a final run`)
    }
    account.active++
    return ++account.runs
  }

  #end(job: Job, final: boolean): void {
    const account = this.#accounts.get(job.key)
    if (account === undefined) return
    account.active--
    if (!final) return
    this.numbers.finals++
    account.finals++
    account.lastFinal = performance.now()
  }

  // ---- The clients

  /** One key from its first request to its last one. */
  #episode(kind: Kind, random: Random): Promise<void> {
    return kind.startsWith('short') ? this.#useShortKey(random) : this.#useUp(kind, random)
  }

  async #useUp(kind: Kind, random: Random): Promise<void> {
    const key = this.#longKey(this.#keys++)
    const account = accountOf(kind)
    this.#accounts.set(key, account)
    const job = jobOf(key, kind, random)
    const contested = !kind.startsWith('flaky') && random.chance(0.2)
    const isUndone = kind === 'broken' && this.#options.transaction
    const answers = isUndone ? [OK, BUSY, `500 ${FAILED}`] : ALLOWED[kind]
    const allowed = [...answers, ...(contested ? [REUSED] : [])]
    const other: Job = { ...job, variant: 'b' }
    const send = async (job: Job, hangUp?: HangUp) => {
      const outcome = await this.#post(random, job, hangUp)
      this.#judge(job, account, outcome, allowed)
      return outcome
    }
    const first = Array.from({ length: random.between(1, 7) }, async () => {
      const [mine, hangUp, delay] = [contested && random.chance(0.3) ? other : job, hangUpOf(random), delayOf(random)]
      if (delay > 0) await sleep(delay)
      await send(mine, hangUp)
    })
    await Promise.all(first)
    for (let late = random.between(0, 2); late > 0; late--) await send(job, hangUpOf(random))
    await this.#conclude(job, contested ? other : job, send)

    if (account.finals !== 1) this.#violation(`the ${kind} key ${key} had ${account.finals} final runs`)
    if (random.chance(0.15)) {
      const outcome = await this.#post(random, { ...job, variant: 'b', size: job.size + 1 })
      this.#judge(job, account, outcome, [REUSED])
    }
    const held = await (this.#options.stores[0] as Required<IdempotencyStore>).get(storageKey(null, key))
    if (held !== null && held.state !== 'completed') this.#violation(`the ${kind} key ${key} is still ${held.state}`)
    this.#accounts.delete(key)
  }

  /** Asks until the operation is known to be over. */
  async #conclude(job: Job, other: Job, send: (job: Job) => Promise<Outcome>): Promise<void> {
    for (let tries = 0, next = job; tries < 1_000; tries++) {
      const outcome = await send(next)
      const told = toldBy(outcome)
      if (told === GONE) return
      if (told === OK && !isDiscarded(outcome) && job.kind !== 'large') return
      if (told === REUSED) next = next === job ? other : job
      else await sleep(5)
    }
    this.#violation(`the ${job.kind} key ${job.key} came to no end`)
  }

  async #useShortKey(random: Random): Promise<void> {
    const found = this.#shortKeys[random.between(0, SHORT_KEYS - 1)]
    if (found === undefined) return
    const { key, kind } = found
    const account = this.#accounts.get(key) as Account
    const job: Job = { key, kind, variant: 'a', ms: 4, size: 50, failures: [] }
    const ask = async () => {
      const [hangUp, delay] = [hangUpOf(random), delayOf(random)]
      if (delay > 0) await sleep(delay)
      this.#judge(job, account, await this.#post(random, job, hangUp), ALLOWED[kind])
    }
    await Promise.all(Array.from({ length: random.between(1, 4) }, ask))
    // A while: not all episodes are to end at once.
    if (random.chance(0.5)) await sleep(random.between(0, 50))
  }

  #longKey(n: number): string {
    return `long-${this.#options.seed}-${n}`
  }

  #judge(job: Job, account: Account, outcome: Outcome, allowed: string[]): void {
    const told = toldBy(outcome)
    this.answers[told] = (this.answers[told] ?? 0) + 1
    if (outcome === 'hung up') return
    if (!allowed.includes(told)) {
      const text = typeof outcome === 'string' ? '' : outcome.text.slice(0, 200)
      this.#violation(`a client of the ${job.kind} key ${job.key} was told ${told} ${text}`)
      return
    }
    if (typeof outcome === 'string' || told !== OK || isDiscarded(outcome)) return
    const { key, variant } = JSON.parse(outcome.text) as Job
    if (key !== job.key) this.#violation(`a client of ${job.key} got the reply of ${key}`)
    if (variant !== job.variant) this.#violation(`a client of ${job.key} got the reply to another payload`)
    if (job.kind.startsWith('short')) return
    account.text ??= outcome.text
    if (account.text !== outcome.text) this.#violation(`two replies for the ${job.kind} key ${job.key}`)
  }

  #post(random: Random, job: Job, hangUp?: HangUp): Promise<Outcome> {
    this.numbers.requests++
    const body = JSON.stringify(job)
    return new Promise((resolve) => {
      let left = false
      let timer: NodeJS.Timeout | undefined
      const failed = () => {
        clearTimeout(timer)
        this.numbers[left ? 'hangUps' : 'brokenOff']++
        resolve(left ? 'hung up' : BROKEN)
      }
      const request = http.request({
        host: '127.0.0.1',
        port: this.#ports[random.between(0, this.#ports.length - 1)],
        path: ROUTES[job.kind],
        method: 'POST',
        agent: this.#agent,
        headers: {
          host: SERVICE,
          'content-type': 'application/json',
          'content-length': Buffer.byteLength(body),
          'idempotency-key': job.key
        }
      })
      request.on('error', failed)
      request.on('response', (response) => {
        let text = ''
        response.setEncoding('utf8').on('data', (chunk) => {
          text += chunk
        })
        response.on('error', failed)
        response.on('end', () => {
          // Who left in the middle of the body has to go on doing so: the connection is of no more use.
          if (hangUp?.halfway) request.destroy()
          clearTimeout(timer)
          const { statusCode: status = 0, headers } = response
          const replayed = headers['idempotent-replayed'] === 'true'
          if (replayed) this.numbers.replays++
          resolve({ status, code: status < 400 ? undefined : codeOf(text), text, replayed })
        })
      })
      if (hangUp) {
        timer = setTimeout(() => {
          left = true
          request.destroy()
        }, hangUp.ms)
      }
      if (hangUp?.halfway) request.write(body.slice(0, body.length / 2))
      else request.end(body)
    })
  }

  readonly #count = (_message: unknown, name: string | symbol) => {
    this.events[String(name).slice('fastify-idempotency:'.length) as EventName]++
  }

  #violation(text: string): void {
    if (this.violations.length < MOST_VIOLATIONS) this.violations.push(text)
  }
}

function accountOf(kind: Kind): Account {
  return { kind, runs: 0, finals: 0, active: 0, lastFinal: 0, text: null }
}

function jobOf(key: string, kind: Kind, random: Random): Job {
  const ms = random.chance(0.3) ? 0 : random.between(1, 25)
  const size = kind === 'large' ? MAX_REPLY_SIZE : random.between(0, 2_000)
  const failures = kind.startsWith('flaky') ? Array.from({ length: random.between(1, 3) }, () => failureOf(random)) : []
  return { key, kind, variant: 'a', ms, size, failures }
}

function failureOf(random: Random): Job['failures'][number] {
  return (['throw', 'send', 'discard'] as const)[random.between(0, 2)] ?? 'throw'
}

function hangUpOf(random: Random): HangUp | undefined {
  if (!random.chance(0.15)) return undefined
  return { ms: random.between(0, 30), halfway: random.chance(0.2) }
}

function delayOf(random: Random): number {
  return random.chance(0.6) ? 0 : random.between(1, 30)
}

function toldBy(outcome: Outcome): string {
  if (typeof outcome === 'string') return outcome
  return outcome.code === undefined ? String(outcome.status) : `${outcome.status} ${outcome.code}`
}

function isDiscarded(outcome: Outcome): boolean {
  return typeof outcome !== 'string' && outcome.text === '{"discarded":true}'
}

function codeOf(text: string): string {
  try {
    return JSON.parse(text).code ?? text
  } catch {
    return text.slice(0, 80)
  }
}
