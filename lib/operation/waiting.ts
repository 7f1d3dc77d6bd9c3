import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import { clock, type SetTimer } from '../util/clock.js'
import { promiseTry } from '../util/timeout.js'
import { LONGEST_DELAY, Timer } from '../util/timer.js'

/*
 * Duplicates that wait: in the order in which they came, with one question to the store for all of them, and no more
 * than there is room for.
 */

/** Whether or not somebody tells of changes, a key is asked for again after this many milliseconds, if it is its turn. */
const SAFETY_POLL_MS = 1_000
/** How often a store is asked that cannot tell of changes, if it is the key's turn. */
const POLL_MS = 100
/** The least time between two looks at a key that is still running, and until a takeover has had its chance. */
const SHORT_PAUSE_MS = 20
/**
 * The least time between two looks at one store for no other reason than that it has been long: twenty a second, whatever
 * the number of keys. Somebody tells of changes, so they find what got lost, which is rare.
 */
const SAFETY_TURN_MS = 50
/** The same where there is a reason: nobody tells of changes, or the owner's lease is over. A hundred a second. */
const PRESSING_TURN_MS = 10
/**
 * More than these do not wait for one key: the last are answered as if they had waited long enough. Each is an open
 * request of the same operation, so that an honest client has one or a few of them.
 */
const MAX_PER_KEY = 10_000
/**
 * More than these do not wait on one store. When it is full, who comes for a key with few waiters takes the place of one
 * of the key with most: whoever wants to fill it has to do so with as many keys as there are places, all of which are
 * running.
 */
const MAX_WAITERS = 50_000

/** How waiting ended: with what was found, or for another reason. */
export type WaitResult = Acquisition | 'timeout' | 'left'

/** A duplicate that waits for the first request's reply. */
export interface Waiter {
  readonly storageKey: string
  readonly waitTimeout: number
  /** May it take over a claim whose owner died? */
  readonly takesOver: boolean
  /** Asks the store once, and claims the key if it is free. */
  poll(): Promise<Acquisition>
  /** A claim that came too late for this waiter. */
  drop(): void
}

/** The duplicates of this process that wait on one store. */
export class WaitingRoom {
  readonly store: IdempotencyStore
  readonly safetyLine = new Line(SAFETY_TURN_MS)
  readonly pressingLine = new Line(PRESSING_TURN_MS)
  readonly #queues = new Map<string, Queue>()
  /** The queues by their length, so that the longest is found at once. There are none of length 0. */
  readonly #byLength: Set<Queue>[] = []
  #waiting = 0

  constructor(store: IdempotencyStore) {
    this.store = store
  }

  /** Waits until the key is free for this waiter, or finished, or has lost its owner. */
  wait(waiter: Waiter): Promise<WaitResult> {
    if (!this.#makeRoom(this.#queues.get(waiter.storageKey)?.length ?? 0)) return Promise.resolve('timeout')
    let queue = this.#queues.get(waiter.storageKey)
    if (queue === undefined) {
      queue = new Queue(this, waiter.storageKey)
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

  /** A queue has become longer by one, or shorter. */
  grown(queue: Queue, by: 1 | -1): void {
    this.#waiting += by
    const { length } = queue
    this.#byLength[length - by]?.delete(queue)
    if (length > 0) {
      this.#byLength[length] ??= new Set()
      this.#byLength[length].add(queue)
    }
    while (this.#byLength.at(-1)?.size === 0) this.#byLength.pop()
  }

  forget(queue: Queue): void {
    this.#queues.delete(queue.key)
  }

  /** Is there room for one more, where so many wait already? */
  #makeRoom(length: number): boolean {
    if (length >= MAX_PER_KEY) return false
    if (this.#waiting < MAX_WAITERS) return true
    const longest = this.#byLength.length - 1
    // Among equals who has come first stays.
    if (longest <= length + 1) return false
    for (const queue of this.#byLength[longest] as Set<Queue>) {
      queue.shorten()
      break
    }
    return true
  }
}

/** Those who have a turn one after the other, at a bounded rate. */
class Line {
  readonly #ms: number
  readonly #waiting = new Set<() => void>()
  #timer: SetTimer | null = null
  #last = Number.NEGATIVE_INFINITY

  constructor(ms: number) {
    this.#ms = ms
  }

  /** Calls `go` when it is its turn, which may be at once. */
  enter(go: () => void): void {
    this.#waiting.add(go)
    if (this.#timer === null) this.#advance()
  }

  leave(go: () => void): void {
    this.#waiting.delete(go)
    if (this.#waiting.size > 0 || this.#timer === null) return
    clock.clearTimer(this.#timer)
    this.#timer = null
  }

  readonly #advance = () => {
    this.#timer = null
    const now = clock.now()
    // Timers may ring a little early.
    const isTime = Math.ceil(now - this.#last) >= this.#ms
    const [next] = this.#waiting
    if (isTime && next !== undefined) {
      this.#last = now
      this.#waiting.delete(next)
    }
    if (this.#waiting.size > 0) this.#timer = clock.setTimer(this.#advance, Math.ceil(this.#last + this.#ms - now))
    if (isTime) next?.()
  }
}

const places = new WeakMap<Waiter, Place>()

/** One waiter's place in a queue. */
class Place {
  readonly waiter: Waiter
  readonly result: Promise<WaitResult>
  readonly #queue: Queue
  readonly #limit: Timer<Place>
  #resolve!: (result: WaitResult) => void
  #reject!: (error: unknown) => void

  constructor(waiter: Waiter, queue: Queue) {
    this.waiter = waiter
    this.#queue = queue
    places.set(waiter, this)
    this.#limit = new Timer<Place>(waiter.waitTimeout, (place) => place.end('timeout'), this, true)
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
    places.delete(this.waiter)
    this.#limit.cancel()
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
  readonly #room: WaitingRoom
  readonly #places = new Set<Place>()
  #watching = false
  #subscription: AbortController | null = null
  #notified = false
  #wake: (() => void) | null = null

  constructor(room: WaitingRoom, key: string) {
    this.#room = room
    this.key = key
  }

  get length(): number {
    return this.#places.size
  }

  join(place: Place): void {
    this.#places.add(place)
    this.#room.grown(this, 1)
    if (!this.#watching) void this.#watch()
  }

  remove(place: Place): boolean {
    if (!this.#places.delete(place)) return false
    this.#room.grown(this, -1)
    if (this.#places.size === 0) this.#wake?.()
    return true
  }

  /** Makes room for somebody who waits for another key. The first may have been given this key already, so it stays. */
  shorten(): void {
    const [, second] = this.#places
    second?.end('timeout')
  }

  async #watch(): Promise<void> {
    this.#watching = true
    // Back off after a spurious wake-up: a store may notify on every write.
    let woken = false
    for (let first = this.#first(); first !== undefined; first = this.#first()) {
      this.#subscribe()
      let found: Acquisition
      try {
        found = await first.waiter.poll()
      } catch (error) {
        for (const place of this.#places) place.fail(error)
        continue
      }
      if (found.state === 'running') {
        if (woken) await this.#backOff()
        woken = await this.#pause(found.leaseMs)
        continue
      }
      woken = false
      if (found.state === 'completed') {
        for (const place of this.#places) place.end(found)
      } else if (found.state === 'abandoned') {
        for (const place of this.#places) if (!place.waiter.takesOver) place.end(found)
        // One goes to take it over; the others must not all try.
        if (this.#first()?.end(found)) await this.#rest(SHORT_PAUSE_MS, null, false)
      } else if (!first.end(found)) {
        first.waiter.drop()
      }
    }
    // The end of this queue: who comes now gets a new one.
    this.#subscription?.abort()
    this.#room.forget(this)
  }

  #first(): Place | undefined {
    for (const place of this.#places) return place
    return undefined
  }

  /** Subscribes before the look that follows, so that no change falls between the two. */
  #subscribe(): void {
    const { store } = this.#room
    if (store.changed === undefined || this.#subscription !== null) return
    const subscription = new AbortController()
    this.#subscription = subscription
    this.#notified = false
    const notify = () => {
      this.#notified = true
      this.#subscription = null
      this.#wake?.()
    }
    // A subscription that fails is tried again with the next look.
    promiseTry(() => (store as Required<IdempotencyStore>).changed(this.key, subscription.signal)).then(notify, () => {
      this.#subscription = null
      this.#wake?.()
    })
  }

  /** Until there is a reason to look again: a change (`true`), the end of the lease, or that it has been long. */
  async #pause(leaseMs: number): Promise<boolean> {
    const { safetyLine, pressingLine } = this.#room
    const from = clock.now()
    const lease = Math.max(SHORT_PAUSE_MS, Math.ceil(leaseMs) + 1)
    const until = (ms: number) => Math.min(Math.ceil(from + ms - clock.now()), LONGEST_DELAY)
    const isTold = () => this.#subscription !== null
    if (isTold()) await this.#rest(until(Math.min(SAFETY_POLL_MS, lease)), null)
    if (isTold() && (await this.#rest(until(lease), safetyLine))) return this.#notified
    if (!isTold()) await this.#rest(until(Math.min(POLL_MS, lease)), null)
    await this.#rest(null, pressingLine)
    return this.#notified
  }

  async #backOff(): Promise<void> {
    await this.#rest(SHORT_PAUSE_MS, null, false)
    await this.#rest(null, this.#room.pressingLine, false)
  }

  /**
   * A pause, until it has been long enough, or it is this queue's turn in a line (`true`). It ends early when nobody waits
   * any more, and, if it may, when there is news of the subscription.
   */
  #rest(ms: number | null, line: Line | null, wakeable = true): Promise<boolean> {
    if (this.#places.size === 0 || (wakeable && this.#notified)) return Promise.resolve(false)
    if (ms !== null && ms <= 0) return Promise.resolve(false)
    return new Promise((resolve) => {
      let timer: SetTimer | undefined
      let isDone = false
      const done = (isTurn: boolean) => {
        isDone = true
        clock.clearTimer(timer)
        line?.leave(go)
        this.#wake = null
        resolve(isTurn)
      }
      const go = () => done(true)
      this.#wake = () => {
        if (wakeable || this.#places.size === 0) done(false)
      }
      line?.enter(go)
      if (ms !== null && !isDone) timer = clock.setTimer(done, ms, false)
    })
  }
}
