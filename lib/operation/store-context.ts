import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import type { Operation } from './operation.js'
import { StoreHealth } from './store-health.js'
import { WaitingRoom } from './waiting.js'

const FIRST_PAUSE_MS = 50
const LONGEST_PAUSE_MS = 1_000
/** A claim that was never given back lapses by itself: forgetting the oldest is safe. */
const MAX_DISOWNED = 10_000
/** How many claims are given back at a time, as long as the store answers. */
const MAX_LANES = 16

/** A claim that may have been written, and that nobody needs. */
interface Disowned {
  readonly key: string
  readonly token: string
  readonly timeout: number
  /** The handler has not run under it. */
  readonly unused: boolean
  /** Called when the claim was given back (`true`), or is no longer to be. */
  readonly done: (given: boolean) => void
  isUnderWay: boolean
}

const inUse = new WeakMap<IdempotencyStore, StoreInUse>()

/** What this process knows of one store: shared by all registrations and routes that use it. */
export class StoreInUse {
  /** The operations of this process that hold a claim, by storage key. */
  readonly live = new Map<string, Operation>()
  /** What is being asked about keys that are wanted in a transaction: the answer, `null` when it was the key itself. */
  readonly asking = new Map<string, Promise<Acquisition | null>>()
  readonly waiting: WaitingRoom
  /** How many of its keys this process has claimed for requests that have not been read yet. */
  reservations = 0
  readonly health = new StoreHealth()
  readonly #store: IdempotencyStore
  readonly #disowned = new Set<Disowned>()
  /** Loops that give claims back. */
  #lanes = 0
  #users = 0

  private constructor(store: IdempotencyStore) {
    this.#store = store
    this.waiting = new WaitingRoom(store)
  }

  static of(store: IdempotencyStore): StoreInUse {
    let known = inUse.get(store)
    if (known === undefined) {
      known = new StoreInUse(store)
      inUse.set(store, known)
    }
    return known
  }

  /** One more registration uses the store. */
  enter(): void {
    this.#users++
  }

  /** One registration less; the last one closes the store. */
  async leave(): Promise<void> {
    if (--this.#users > 0) return
    for (const claim of this.#disowned) this.#drop(claim, false)
    await this.#store.close?.()
  }

  /** Gives a claim back in the background, as soon as the store can be reached. `false` when that is not tried any more. */
  disown(key: string, token: string, timeout: number, unused: boolean): Promise<boolean> {
    const given = new Promise<boolean>((done) => {
      this.#disowned.add({ key, token, timeout, unused, done, isUnderWay: false })
    })
    for (const oldest of this.#disowned) {
      if (this.#disowned.size <= MAX_DISOWNED) break
      this.#drop(oldest, false)
    }
    if (this.#lanes === 0) void this.#giveBack()
    return given
  }

  #drop(claim: Disowned, given: boolean): void {
    this.#disowned.delete(claim)
    claim.done(given)
  }

  async #giveBack(): Promise<void> {
    this.#lanes++
    let pause = FIRST_PAUSE_MS
    for (const claim of this.#disowned) {
      if (claim.isUnderWay) continue
      claim.isUnderWay = true
      try {
        const release = () => this.#store.release(claim.key, claim.token, claim.unused)
        await this.health.ask(claim.key, claim.timeout, release)
        this.#drop(claim, true)
        pause = FIRST_PAUSE_MS
        // One after the other, what a slow store has gathered would take longer than the leases.
        if (this.#lanes < MAX_LANES) void this.#giveBack()
      } catch {
        claim.isUnderWay = false
        // To the end of the line, which this loop comes to as well: one key must not hold up the others.
        if (this.#disowned.delete(claim)) this.#disowned.add(claim)
        // One is enough to find out that the store is back.
        if (this.#lanes > 1) break
        await sleep(pause)
        pause = Math.min(pause * 2, LONGEST_PAUSE_MS)
      }
    }
    this.#lanes--
  }
}

/** A pause that does not keep the process alive. */
export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms).unref()
  })
}

/** Repeats a step until the store answers; `null` when there is no more point in it. */
export async function insist<T>(step: () => Promise<T>, pointless: () => boolean): Promise<T | null> {
  for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(pause * 2, LONGEST_PAUSE_MS)) {
    await sleep(pause)
    if (pointless()) return null
    try {
      return await step()
    } catch {
      // The first failure was reported; the store is still not back.
    }
  }
}
