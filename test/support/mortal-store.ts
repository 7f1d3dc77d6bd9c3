import type { IdempotencyStore } from '../../types/index.js'

/** What a process may still ask its stores before it dies. */
export class Life {
  readonly #calls: number
  readonly #isLost: boolean
  #asked = 0

  /**
   * @param calls The process dies before the call after these.
   * @param isLost That call was on its way with another, which arrives.
   */
  constructor(calls: number, isLost = false) {
    this.#calls = calls
    this.#isLost = isLost
  }

  /** Has it come to the end of its life? */
  get isOver(): boolean {
    return this.#asked > this.#calls
  }

  /** Does the next call arrive? */
  next(): boolean {
    this.#asked++
    return this.#asked <= this.#calls || (this.#isLost && this.#asked === this.#calls + 2)
  }
}

/** The store of a process that dies: its calls do not arrive any more, and its answers do not matter. */
export function mortal<S extends IdempotencyStore>(store: S, life: Life): S {
  return new Proxy(store, {
    get(target, name) {
      const value = Reflect.get(target, name)
      if (typeof value !== 'function') return value
      return (...args: unknown[]) => {
        if (!life.next()) return new Promise(() => {})
        const answer = Reflect.apply(value, target, args)
        return life.isOver ? new Promise(() => {}) : answer
      }
    }
  })
}
