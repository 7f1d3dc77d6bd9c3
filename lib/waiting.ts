import type { Acquisition, IdempotencyStore } from '../types/index.js'
import { Deadlines } from './deadlines.js'
import { attempt } from './within.js'

/** Whether or not somebody tells of changes, the store is asked again after this many milliseconds. */
const SAFETY_POLL_MS = 1_000
/** How often a store is asked that cannot tell of changes. */
const POLL_MS = 100
/** The least time between two looks at a key that is still running, and until a takeover has had its chance. */
const SHORT_PAUSE_MS = 20
/** More than these in one process are not held, but answered as if they had waited long enough. */
const MAX_WAITERS = 20_000

/** How waiting ended: with what was found, or for another reason. */
export type WaitResult = Acquisition | 'timeout' | 'left'

/** A duplicate that waits for the first request's reply. */
export interface Waiter {
  readonly storageKey: string
  readonly waitTimeout: number
  /** May it take over a claim whose owner died? */
  readonly takesOver: boolean
  /** Asks the store once, and claims the key if it is free. */
  look(): Promise<Acquisition>
  /** A claim that came too late for this waiter. */
  disown(): void
}

/** The duplicates of this process that wait on one store. */
export class WaitingRoom {
  readonly #store: IdempotencyStore
  readonly #queues = new Map<string, Queue>()

  constructor(store: IdempotencyStore) {
    this.#store = store
  }

  /** Waits until the key is free for this waiter, or finished, or has lost its owner. */
  wait(waiter: Waiter): Promise<WaitResult> {
    if (waiting >= MAX_WAITERS) return Promise.resolve('timeout')
    let queue = this.#queues.get(waiter.storageKey)
    if (queue === undefined) {
      queue = new Queue(this.#store, waiter.storageKey, this.#forget)
      this.#queues.set(waiter.storageKey, queue)
    }
    const place = new Place(waiter, queue)
    queue.join(place)
    return place.result
  }

  /** Ends the waiting of one waiter, if it waits. */
  leave(waiter: Waiter): void {
    places.get(waiter)?.end('left')
  }

  readonly #forget = (queue: Queue) => {
    this.#queues.delete(queue.key)
  }
}

const places = new WeakMap<Waiter, Place>()
let waiting = 0

// One timer for all who wait equally long; there are as many limits as `waitTimeout` options.
const limits = new Map<number, Deadlines<Place>>()

function limit(ms: number): Deadlines<Place> {
  let deadlines = limits.get(ms)
  if (deadlines === undefined) {
    deadlines = new Deadlines(ms, (place) => place.end('timeout'), true)
    limits.set(ms, deadlines)
  }
  return deadlines
}

/** One waiter's place in a queue. */
class Place {
  readonly waiter: Waiter
  readonly result: Promise<WaitResult>
  readonly #queue: Queue
  #resolve!: (result: WaitResult) => void
  #reject!: (error: unknown) => void

  constructor(waiter: Waiter, queue: Queue) {
    this.waiter = waiter
    this.#queue = queue
    waiting++
    places.set(waiter, this)
    limit(waiter.waitTimeout).add(this)
    this.result = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
    })
  }

  /** `false` when the waiter had already gone. */
  end(result: WaitResult): boolean {
    if (!this.#leave()) return false
    this.#resolve(result)
    return true
  }

  fail(error: unknown): void {
    if (this.#leave()) this.#reject(error)
  }

  #leave(): boolean {
    if (!this.#queue.remove(this)) return false
    waiting--
    places.delete(this.waiter)
    limit(this.waiter.waitTimeout).delete(this)
    return true
  }
}

/**
 * The waiters of one key, in the order in which they came. Whatever their number, there is one subscription,
 * and one look at the store per wake-up: the first in the queue looks for all. A record is everybody's; a key
 * that has become free is the first one's alone, so that after a failure exactly one runs next.
 */
class Queue {
  readonly key: string
  readonly #store: IdempotencyStore
  readonly #places = new Set<Place>()
  readonly #whenEmpty: (queue: Queue) => void
  #watching = false
  #subscription: AbortController | null = null
  #stirred = false
  #wake: (() => void) | null = null

  constructor(store: IdempotencyStore, key: string, whenEmpty: (queue: Queue) => void) {
    this.#store = store
    this.key = key
    this.#whenEmpty = whenEmpty
  }

  join(place: Place): void {
    this.#places.add(place)
    if (!this.#watching) void this.#watch()
  }

  remove(place: Place): boolean {
    const was = this.#places.delete(place)
    if (was && this.#places.size === 0) this.#wake?.()
    return was
  }

  async #watch(): Promise<void> {
    this.#watching = true
    // Who was woken in vain takes a breath: a store may call out all the time.
    let woken = false
    for (let first = this.#first(); first !== undefined; first = this.#first()) {
      this.#subscribe()
      let found: Acquisition
      try {
        found = await first.waiter.look()
      } catch (error) {
        for (const place of this.#places) place.fail(error)
        continue
      }
      if (found.state === 'running') {
        if (woken) await this.#rest(SHORT_PAUSE_MS, false)
        woken = await this.#pause(found.leaseMs)
        continue
      }
      woken = false
      if (found.state === 'completed') {
        for (const place of this.#places) place.end(found)
      } else if (found.state === 'abandoned') {
        for (const place of this.#places) if (!place.waiter.takesOver) place.end(found)
        // One goes to take it over; the others must not all try.
        if (this.#first()?.end(found)) await this.#rest(SHORT_PAUSE_MS, false)
      } else if (!first.end(found)) {
        first.waiter.disown()
      }
    }
    // The end of this queue: who comes now gets a new one.
    this.#subscription?.abort()
    this.#whenEmpty(this)
  }

  #first(): Place | undefined {
    for (const place of this.#places) return place
    return undefined
  }

  /** Subscribes before the look that follows, so that no change falls between the two. */
  #subscribe(): void {
    if (this.#store.changed === undefined || this.#subscription !== null) return
    const subscription = new AbortController()
    this.#subscription = subscription
    this.#stirred = false
    const stir = () => {
      this.#stirred = true
      this.#subscription = null
      this.#wake?.()
    }
    // A subscription that fails is tried again with the next look.
    attempt(() => (this.#store as Required<IdempotencyStore>).changed(this.key, subscription.signal)).then(stir, () => {
      this.#subscription = null
    })
  }

  /** Until there is a reason to look again: a change (`true`), the end of the lease, or that it has been long. */
  async #pause(leaseMs: number): Promise<boolean> {
    if (!this.#stirred) {
      const longest = this.#subscription === null ? POLL_MS : SAFETY_POLL_MS
      await this.#rest(Math.max(SHORT_PAUSE_MS, Math.min(longest, Math.ceil(leaseMs) + 1)), true)
    }
    return this.#stirred
  }

  /** A pause that ends early when nobody waits any more, and, if it may, upon a change. */
  #rest(ms: number, wakeable: boolean): Promise<void> {
    if (this.#places.size === 0) return Promise.resolve()
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer)
        this.#wake = null
        resolve()
      }
      const timer = setTimeout(done, ms)
      this.#wake = () => {
        if (wakeable || this.#places.size === 0) done()
      }
    })
  }
}
