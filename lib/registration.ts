import type { FastifyInstance } from 'fastify'
import type { IdempotencyStore } from '../types/index.js'
import type { Unfinished } from './http/captured-stream.js'
import type { Host, Ongoing } from './operation/host.js'
import { StoreContext } from './operation/store-context.js'
import { type Globals, inherited, type Policy, type RegistrationOptions } from './options.js'
import { warnOfSiblings } from './stores/memory/siblings.js'
import { waitAtMost } from './util/timeout.js'
import { LONGEST_DELAY } from './util/timer.js'
import { TransientSet } from './util/transient.js'

/* One `app.register(idempotency)`, and how it closes: what runs is waited for, for one lease at most. */

/**
 * Where an instance keeps the registration that is in force for its routes: its own, or the nearest above. One name for
 * all copies of this package in a process, so that none takes a route of another for unprotected.
 */
export const kRegistration = Symbol.for('fastify-idempotency.registration') as unknown as 'idempotencyRegistration'

/** The registration in force on an instance. One of another copy of this package is no `Registration`. */
export function registrationOf(instance: FastifyInstance): unknown {
  return (instance as { [kRegistration]?: unknown })[kRegistration]
}

/** What is in force on an instance and below: what its registration says, with what it inherits. */
export function globalsOf(instance: FastifyInstance): Globals | undefined {
  const registration = registrationOf(instance)
  if (!(registration instanceof Registration)) return undefined
  let at = instance
  while (!Object.hasOwn(at, kRegistration)) at = Object.getPrototypeOf(at)
  return inherited(registration.options.own, globalsOf(Object.getPrototypeOf(at)))
}

/** One `app.register(idempotency)`: what it covers, and what is going on in it. */
export class Registration implements Host {
  readonly options: RegistrationOptions
  /** The requests that hold a claim, wait for one, or still have a reply to store. */
  readonly operations = new TransientSet<Ongoing>()
  /** The streamed replies whose sources are open. */
  readonly streams = new TransientSet<Unfinished>()
  /** Nothing is waited for any more, and nothing is repeated. */
  closed = false
  #closing = false
  #longestLease = 0
  #idle: (() => void) | null = null
  readonly #stores = new Map<IdempotencyStore, StoreContext>()
  readonly #leases = new Map<string, number>()

  constructor(options: RegistrationOptions) {
    this.options = options
    this.use(options.routeDefaults.store)
  }

  get hashes(): RegistrationOptions['hashes'] {
    return this.options.hashes
  }

  get closing(): boolean {
    return this.#closing
  }

  /** A route of this registration has come. */
  cover(policy: Policy): void {
    this.use(policy.store)
    warnOfSiblings(policy.store)
    this.#leases.set(policy.route, policy.lease)
    this.#longestLease = Math.max(this.#longestLease, policy.lease)
  }

  use(store: Policy['store']): void {
    if (this.#stores.has(store)) return
    const inUse = StoreContext.of(store)
    this.#stores.set(store, inUse)
    inUse.enter()
  }

  /** The stores that its routes use, its own first. */
  get stores(): readonly IdempotencyStore[] {
    return [...this.#stores.keys()]
  }

  /** The lease of a route, as far as it is one of this registration. */
  leaseOf(route: string | undefined): number {
    return this.#leases.get(route ?? '') ?? this.options.routeDefaults.lease ?? 30_000
  }

  ended(operation: Ongoing): void {
    this.operations.delete(operation)
    if (this.operations.size === 0) this.#idle?.()
  }

  /** The server stops taking requests: whoever waits gets an answer, so that the server can close at all. */
  startClosing(): void {
    this.#closing = true
    for (const operation of this.operations.items()) operation.stopWaiting()
  }

  /**
   * Waits for what is running to be stored, for one lease at most, and lets go of the stores.
   * @throws what the closing of a store throws, when all are closed.
   */
  async close(): Promise<void> {
    this.startClosing()
    await waitAtMost(Math.min(this.#longestLease, LONGEST_DELAY), this.#drained())
    await Promise.all(this.streams.items().map((stream) => stream.giveUp()))
    this.closed = true
    for (const operation of this.operations.items()) operation.abandon()
    const closed = await Promise.allSettled([...this.#stores.values()].map((store) => store.leave()))
    for (const result of closed) if (result.status === 'rejected') throw result.reason
  }

  async #drained(): Promise<void> {
    if (this.operations.size === 0) return
    await new Promise<void>((resolve) => {
      this.#idle = resolve
    })
  }
}
