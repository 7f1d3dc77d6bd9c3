import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, Claim, IdempotencyStore, StoredRecord, StoredStep } from '../../types/index.js'
import type { Random } from './random.js'

/** The call did not reach the store, or did and the answer got lost: the caller cannot tell which. */
export class Lost extends Error {}

export interface FlakyOptions {
  random: Random
  /** How many of the calls get lost, half of them before and half of them after the store has seen them. */
  loss?: number
  /** The longest time that a call takes to the store, and its answer from there, in milliseconds. */
  delay?: number
}

/** A store behind a bad network: calls and answers take their time, overtake each other, and get lost. */
export class FlakyStore implements IdempotencyStore {
  readonly #store: IdempotencyStore
  readonly #random: Random
  readonly #loss: number
  readonly #delay: number
  /** How many calls were lost. */
  lost = 0

  constructor(store: IdempotencyStore, { random, loss = 0.3, delay = 3 }: FlakyOptions) {
    this.#store = store
    this.#random = random
    this.#loss = loss
    this.#delay = delay
  }

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    return this.#travel(() => this.#store.acquire(key, claim))
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#travel(() => this.#store.renew(key, token, leaseMs))
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    return this.#travel(() => this.#store.complete(key, token, record, ttlMs))
  }

  step(key: string, token: string, step: StoredStep): Promise<boolean> {
    return this.#travel(async () => (await this.#store.step?.(key, token, step)) ?? false)
  }

  release(key: string, token: string, unused?: boolean): Promise<boolean> {
    return this.#travel(() => this.#store.release(key, token, unused))
  }

  async #travel<T>(call: () => Promise<T>): Promise<T> {
    await this.#pause()
    const lost = this.#random.chance(this.#loss)
    if (lost) this.lost++
    if (lost && this.#random.chance(0.5)) throw new Lost('The call got lost')
    const answer = await call()
    await this.#pause()
    if (lost) throw new Lost('The answer got lost')
    return answer
  }

  async #pause(): Promise<void> {
    const ms = this.#random.between(0, this.#delay)
    if (ms > 0) await sleep(ms)
  }
}

/** Repeats a call for as long as it gets lost. */
export async function insist<T>(call: () => Promise<T>): Promise<{ answer: T; repeated: boolean }> {
  for (let repeated = false; ; repeated = true) {
    try {
      return { answer: await call(), repeated }
    } catch (error) {
      if (!(error instanceof Lost)) throw error
    }
  }
}

/** A store whose caller repeats what got lost, with the same token: to the outside as good as the store itself. */
export function persistent(store: FlakyStore): IdempotencyStore {
  const again = async <T>(call: () => Promise<T>) => (await insist(call)).answer
  return {
    acquire: (key, claim) => again(() => store.acquire(key, claim)),
    renew: (key, token, leaseMs) => again(() => store.renew(key, token, leaseMs)),
    complete: (key, token, record, ttlMs) => again(() => store.complete(key, token, record, ttlMs)),
    step: (key, token, step) => again(() => store.step(key, token, step)),
    release: (key, token, unused) => again(() => store.release(key, token, unused))
  }
}
