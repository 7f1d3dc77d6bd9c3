import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import { clock } from '../util/clock.js'
import { TransientMap } from '../util/transient.js'
import type { HeldClaim } from './held-claim.js'
import { StoreHealth } from './store-health.js'
import { WaitingRoom } from './waiting.js'

/*
 * What a process knows of one store, whichever registrations use it, and the claims that it gives back in the
 * background.
 */

const FIRST_PAUSE_MS = 50
const LONGEST_PAUSE_MS = 1_000
/** A claim that was never given back lapses by itself: forgetting the oldest is safe. */
const MAX_ORPHANS = 10_000
/** How many claims are given back at a time, as long as the store answers. */
const MAX_CONCURRENCY = 16

/** A claim that may have been written, and that nobody needs. */
interface OrphanedClaim {
  readonly key: string
  readonly token: string
  readonly timeout: number
  /** The handler has not run under it. */
  readonly unused: boolean
  /** Called when the claim was given back (`true`), or is no longer to be. */
  readonly done: (given: boolean) => void
  isUnderWay: boolean
}

const contexts = new WeakMap<IdempotencyStore, StoreContext>()
const inUse = new Set<StoreContext>()

/** What this process knows of one store: shared by all registrations and routes that use it. */
export class StoreContext {
  readonly store: IdempotencyStore
  /** The claims that this process holds, by storage key. */
  readonly live = new TransientMap<string, HeldClaim>()
  /** What is being asked about keys that are wanted in a transaction: the answer, `null` when it was the key itself. */
  readonly asking = new TransientMap<string, Promise<Acquisition | null>>()
  readonly waiting: WaitingRoom
  /** How many of its keys this process has claimed for requests that have not been read yet. */
  reservations = 0
  readonly health = new StoreHealth()
  readonly #orphans = new Set<OrphanedClaim>()
  /** How many loops give claims back. */
  #concurrency = 0
  #users = 0
  #isClosed = false

  private constructor(store: IdempotencyStore) {
    this.store = store
    this.waiting = new WaitingRoom(store)
  }

  static of(store: IdempotencyStore): StoreContext {
    let known = contexts.get(store)
    if (known === undefined) {
      known = new StoreContext(store)
      contexts.set(store, known)
    }
    return known
  }

  /** Those of the stores that registrations use. */
  static get inUse(): Iterable<StoreContext> {
    return inUse
  }

  /** One more registration uses the store. */
  enter(): void {
    this.#users++
    this.#isClosed = false
    inUse.add(this)
  }

  /** One registration less; the last one closes the store. */
  async leave(): Promise<void> {
    if (--this.#users > 0) return
    this.#isClosed = true
    inUse.delete(this)
    for (const claim of this.#orphans) this.#drop(claim, false)
    await this.store.close?.()
  }

  /**
   * The store has taken the key from this process: its claim is not claimed anew, finds out at once, and keeps nobody here
   * from the key.
   */
  disown(key: string): void {
    const claim = this.live.get(key)
    this.live.delete(key)
    claim?.forget()
    claim?.renew()
  }

  /** Gives a claim back in the background, as soon as the store can be reached. `false` when that is not tried any more. */
  async giveBack(key: string, token: string, timeout: number, unused: boolean): Promise<boolean> {
    // What was still on its way to the store when it was closed may find only now that nobody needs its claim.
    if (this.#isClosed) return false
    const given = new Promise<boolean>((done) => {
      this.#orphans.add({ key, token, timeout, unused, done, isUnderWay: false })
    })
    for (const oldest of this.#orphans) {
      if (this.#orphans.size <= MAX_ORPHANS) break
      this.#drop(oldest, false)
    }
    if (this.#concurrency === 0) void this.#releaseOrphans()
    return given
  }

  #drop(claim: OrphanedClaim, given: boolean): void {
    this.#orphans.delete(claim)
    claim.done(given)
  }

  async #releaseOrphans(): Promise<void> {
    this.#concurrency++
    let pause = FIRST_PAUSE_MS
    for (const claim of this.#orphans) {
      if (claim.isUnderWay) continue
      claim.isUnderWay = true
      try {
        const release = () => this.store.release(claim.key, claim.token, claim.unused)
        await this.health.ask(claim.key, claim.timeout, release)
        this.#drop(claim, true)
        pause = FIRST_PAUSE_MS
        // One after the other, what a slow store has gathered would take longer than the leases.
        if (this.#concurrency < MAX_CONCURRENCY) void this.#releaseOrphans()
      } catch {
        claim.isUnderWay = false
        // To the end of the line, which this loop comes to as well: one key must not hold up the others.
        if (this.#orphans.delete(claim)) this.#orphans.add(claim)
        // One is enough to find out that the store is back.
        if (this.#concurrency > 1) break
        await this.health.pause(pause)
        pause = Math.min(pause * 2, LONGEST_PAUSE_MS)
      }
    }
    this.#concurrency--
  }
}

/** A pause that does not keep the process alive. */
export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => {
    clock.setTimer(resolve, ms).unref()
  })
}

/** Repeats a step until the store answers; `null` when there is no more point in it. */
export async function retryUntil<T>(
  health: StoreHealth,
  step: () => Promise<T>,
  isPointless: () => boolean
): Promise<T | null> {
  for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(pause * 2, LONGEST_PAUSE_MS)) {
    await health.pause(pause)
    if (isPointless()) return null
    try {
      return await step()
    } catch {
      // The first failure was reported; the store is still not back.
    }
  }
}
