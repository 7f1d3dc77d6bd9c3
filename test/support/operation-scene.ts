import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import type { Test } from 'tap'
import { idempotencyEvents } from '../../lib/events.js'
import type { RequestSnapshot } from '../../lib/http/request-snapshot.js'
import { composeFingerprint } from '../../lib/operation/fingerprint.js'
import { PLAIN } from '../../lib/operation/hashes.js'
import type { HeldClaim } from '../../lib/operation/held-claim.js'
import { Operation, type Verdict } from '../../lib/operation/operation.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { StoreContext } from '../../lib/operation/store-context.js'
import type { Policy } from '../../lib/options.js'
import type { Registration } from '../../lib/registration.js'
import { resolved } from '../../lib/util/sync-promise.js'
import type { Acquisition, IdempotencyEvent, IdempotencyStore, StoredRecord, StoredReply } from '../../types/index.js'
import { reply } from './store-fixtures.js'
import { VirtualTime } from './virtual-time.js'

export const LEASE = 30_000
export const STORE_TIMEOUT = 1_500
export const WAIT_TIMEOUT = 10_000
export const TTL = 5_000

/** Of an actor that says nothing else. */
export const KEY = storageKey(null, 'k')
export const OURS = composeFingerprint('head', 'payload')
export const RECORD: StoredReply = { ...reply(), fingerprint: OURS }

export const running = (fingerprint = OURS): Acquisition => ({ state: 'running', fingerprint, leaseMs: LEASE })
export const completed = (record: StoredRecord = RECORD): Acquisition => ({ state: 'completed', record, ttlMs: 1_000 })

export const IN_PROGRESS = { code: 'FST_IDEMPOTENCY_IN_PROGRESS', statusCode: 409, headers: { 'retry-after': '1' } }
export const REUSED = { code: 'FST_IDEMPOTENCY_KEY_REUSED', statusCode: 422 }
export const UNAVAILABLE = {
  code: 'FST_IDEMPOTENCY_STORE_UNAVAILABLE',
  statusCode: 503,
  headers: { 'retry-after': '2' }
}

/** What a store can be asked for. */
type Method = 'acquire' | 'renew' | 'complete' | 'step' | 'release' | 'get' | 'begin'

/** What is answered: a value, or what a function of the call's arguments gives. */
type Answer = unknown

export const never = (): Promise<never> => new Promise(() => {})
export const failing = (error: Error) => (): Promise<never> => Promise.reject(error)
export const away = new Error('the store is away')

/** A store that says what it was told to say: one answer after the other, the last again and again. */
export class ScriptedStore {
  readonly asked: [Method, ...unknown[]][] = []
  readonly answers: Record<Method, Answer[]> = {
    acquire: [{ state: 'acquired', attempt: 1 }],
    renew: [true],
    complete: [true],
    step: [true],
    release: [true],
    get: [null],
    begin: [undefined]
  }
  sharesLocks = false
  /** Are answers shown at once, as by a store in memory? */
  readonly #shows: boolean

  constructor(shows: boolean) {
    this.#shows = shows
  }

  readonly acquire = (...args: unknown[]) => this.#answer('acquire', args)
  readonly renew = (...args: unknown[]) => this.#answer('renew', args)
  readonly complete = (...args: unknown[]) => this.#answer('complete', args)
  readonly step = (...args: unknown[]) => this.#answer('step', args)
  readonly release = (...args: unknown[]) => this.#answer('release', args)
  get?: IdempotencyStore['get'] = (...args: unknown[]) => this.#answer('get', args) as never
  readonly begin = (...args: unknown[]) => this.#answer('begin', args)

  /** The arguments of all calls of a method. */
  calls(method: Method): unknown[][] {
    return this.asked.filter(([name]) => name === method).map(([, ...args]) => args)
  }

  /** What was asked, by name. */
  get names(): string[] {
    return this.asked.map(([name]) => name)
  }

  /** The tokens of all claims, as they were asked for. */
  get tokens(): string[] {
    return this.calls('acquire').map(([, claim]) => (claim as { token: string }).token)
  }

  /** Which of the claims asked to take over. */
  get takeovers(): boolean[] {
    return this.calls('acquire').map(([, claim]) => (claim as { takeover: boolean }).takeover)
  }

  #answer(method: Method, args: unknown[]): unknown {
    this.asked.push([method, ...args])
    const answers = this.answers[method]
    const answer = answers.length > 1 ? answers.shift() : answers[0]
    const value = typeof answer === 'function' ? answer(...args) : answer
    if (value instanceof Promise) return value
    return this.#shows ? resolved(value) : Promise.resolve(value)
  }
}

/** One operation, and what is heard of it. */
export interface Actor {
  readonly operation: Operation
  readonly events: string[]
  /** The errors that came with events, by the event's name. */
  readonly errors: Record<string, unknown>
  /** What was logged as a warning or an error: the level, and the error. */
  readonly logged: [level: string, error: unknown][]
  /** What the log says in words. */
  readonly words: string[]
  /** What every entry of the log says of the operation. */
  readonly bindings: unknown[]
}

interface Cast {
  key?: string
  head?: string
  policy?: Partial<Policy>
  registration?: Registration
}

/** A store, a registration, and operations that use them. */
export interface Scene {
  readonly store: ScriptedStore
  readonly registration: Registration
  readonly inUse: StoreContext
  /** The time of timers, leases and limits. */
  readonly time: VirtualTime
  actor(cast?: Cast): Actor
  registrationOf(): Registration
}

/** The time of all scenes of a file: timers that are shared go on from one to the next. */
const time = new VirtualTime()

export function scene(t: Test, { shows = true, policy = {} as Partial<Policy> } = {}): Scene {
  time.install()
  const store = new ScriptedStore(shows)
  const actors = new Map<unknown, Actor>()
  const hear = (message: unknown, channel: string | symbol) => {
    const { request, error } = message as IdempotencyEvent
    const actor = actors.get(request)
    const name = String(channel).replace('fastify-idempotency:', '')
    actor?.events.push(name)
    if (actor !== undefined && error !== undefined) actor.errors[name] = error
  }
  for (const name of idempotencyEvents) subscribe(`fastify-idempotency:${name}`, hear)
  t.teardown(() => {
    // What is still going on comes to its end.
    Object.assign(registration, { closed: true })
    Object.assign(store.answers, { complete: [true], step: [true], release: [true] })
    time.uninstall()
    for (const name of idempotencyEvents) unsubscribe(`fastify-idempotency:${name}`, hear)
  })
  const registrationOf = () => {
    const operations = new Set<Operation>()
    const ended = (operation: Operation) => operations.delete(operation)
    return { hashes: [PLAIN], operations, closed: false, closing: false, ended } as unknown as Registration
  }
  const registration = registrationOf()
  const given = {
    route: '/orders',
    store: store as unknown as IdempotencyStore,
    lease: LEASE,
    retain: 60_000,
    ttl: TTL,
    storeTimeout: STORE_TIMEOUT,
    waits: false,
    waitTimeout: WAIT_TIMEOUT,
    reruns: true,
    transaction: false,
    bypasses: false,
    redact: null,
    maxStepsSize: 65_536,
    ...policy
  } as Policy
  return {
    store,
    registration,
    inUse: StoreContext.of(given.store),
    time,
    registrationOf,
    actor(cast = {}) {
      const logged: [string, unknown][] = []
      const bindings: unknown[] = []
      const words: string[] = []
      const level = (name: string) => (entry: { err?: unknown; idempotency: unknown }, said: string) => {
        bindings.push(entry.idempotency)
        words.push(said)
        if (name !== 'debug') logged.push([name, entry.err])
      }
      const request = { log: { debug: level('debug'), warn: level('warn'), error: level('error') } }
      const operation = new Operation(
        { request: request as unknown as FastifyRequest, log: request.log as never },
        { ...given, ...cast.policy },
        cast.registration ?? registration,
        cast.key ?? 'k',
        null,
        { head: cast.head ?? 'head', credentials: null } as RequestSnapshot
      )
      const actor = { operation, events: [], errors: {}, logged, words, bindings }
      actors.set(request, actor)
      return actor
    }
  }
}

/** Runs a test on a store that shows its answers at once, and on one that makes promises. */
export function onBoth(t: Test, name: string, test: (t: Test, scene: Scene) => Promise<void>, policy = {}): void {
  for (const shows of [true, false]) {
    t.test(`${name} (${shows ? 'at hand' : 'promised'})`, (t) => test(t, scene(t, { shows, policy })))
  }
}

/** The claim that an actor holds. */
export function claimOf({ inUse }: Scene, { operation }: Actor): HeldClaim {
  return inUse.live.get(operation.storageKey) as HeldClaim
}

/** What a step gives or throws, at once or later. */
export async function outcome(step: () => unknown): Promise<unknown> {
  try {
    return await step()
  } catch (error) {
    return error
  }
}

/** The verdict on a request whose payload is known. */
export async function verdictOf({ operation }: Actor, payload = 'payload'): Promise<Verdict | unknown> {
  operation.learn(payload)
  return outcome(() => operation.claim())
}
