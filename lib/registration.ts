import type { Operation } from './operation.js'
import type { Policy, RegistrationOptions } from './options.js'
import { StoreInUse } from './store-in-use.js'

/** One `app.register(idempotency)`: what it covers, and what is going on in it. */
export class Registration {
  readonly options: RegistrationOptions
  /** The requests that hold a claim, wait for one, or still have a reply to store. */
  readonly operations = new Set<Operation>()
  /** Nothing is waited for any more, and nothing is repeated. */
  closed = false
  #closing = false
  #longestLease = 0
  #idle: (() => void) | null = null
  readonly #stores = new Set<StoreInUse>()

  constructor(options: RegistrationOptions) {
    this.options = options
    this.use(options.routeDefaults.store)
  }

  get closing(): boolean {
    return this.#closing
  }

  /** A route of this registration has come. */
  cover(policy: Policy): void {
    this.use(policy.store)
    this.#longestLease = Math.max(this.#longestLease, policy.lease)
  }

  use(store: Policy['store']): void {
    const inUse = StoreInUse.of(store)
    if (this.#stores.has(inUse)) return
    this.#stores.add(inUse)
    inUse.enter()
  }

  ended(operation: Operation): void {
    this.operations.delete(operation)
    if (this.operations.size === 0) this.#idle?.()
  }

  /** The server stops taking requests: whoever waits gets an answer, so that the server can close at all. */
  startClosing(): void {
    this.#closing = true
    for (const operation of this.operations) operation.stopWaiting()
  }

  /** Waits for what is running to be stored, for one lease at most, and lets go of the stores. */
  async close(): Promise<void> {
    this.startClosing()
    if (this.operations.size > 0) await this.#within(new Promise<void>((resolve) => (this.#idle = resolve)))
    await this.#within(Promise.all([...this.#stores].map((store) => store.returned())))
    this.closed = true
    for (const store of this.#stores) await store.leave()
  }

  async #within(work: Promise<unknown>): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const limit = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, Math.min(this.#longestLease, 2 ** 31 - 1))
    })
    await Promise.race([work, limit])
    clearTimeout(timer)
  }
}
