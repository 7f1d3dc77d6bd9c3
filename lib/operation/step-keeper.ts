import type { StoredStep } from '../../types/index.js'
import { retryUntil } from './store-context.js'
import type { StoreHealth } from './store-health.js'

/* The steps of a claim, as its store is to have them, through outages and the loss of its data. */

/** Sees to it that a store has the steps of a claim: what it does not take at once, or has lost, it is told again. */
export class StepKeeper {
  readonly #health: StoreHealth
  readonly #steps: StoredStep[]
  /** Those that the store does not have. */
  readonly #missing = new Set<StoredStep>()
  /** Asks the store once. `false`: the claim is another's. */
  readonly #store: (step: StoredStep) => Promise<boolean>
  readonly #isPointless: () => boolean
  #isTrying = false

  /** @param steps Those that the store has. */
  constructor(
    health: StoreHealth,
    steps: readonly StoredStep[],
    store: (step: StoredStep) => Promise<boolean>,
    isPointless: () => boolean
  ) {
    this.#health = health
    this.#steps = [...steps]
    this.#store = store
    this.#isPointless = isPointless
  }

  add(step: StoredStep): void {
    this.#steps.push(step)
  }

  /** The store has failed to take it. */
  retry(step: StoredStep): void {
    this.#missing.add(step)
    this.#keepTrying()
  }

  /** The store may have lost all of them. */
  retryAll(): void {
    for (const step of this.#steps) this.retry(step)
  }

  /** The claim is there again, in a store that had lost its data. */
  async restore(): Promise<void> {
    for (const step of this.#steps) this.#missing.add(step)
    try {
      await this.flush()
    } catch {
      // The store has failed again, which whoever is told of failures hears from the next call to it.
      this.#keepTrying()
    }
  }

  /** Tells the store what it does not have yet. `false`: the claim is another's. */
  async flush(): Promise<boolean> {
    for (const step of this.#missing) {
      if (!(await this.#store(step))) return false
      this.#missing.delete(step)
    }
    return true
  }

  #keepTrying(): void {
    if (this.#isTrying) return
    this.#isTrying = true
    void retryUntil(this.#health, () => this.flush(), this.#isPointless).then(() => {
      this.#isTrying = false
    })
  }
}
