import { clock, type SetTimer } from './clock.js'

// Real, whatever tests of applications mock later: a turn of the event loop is no time.
const { setImmediate } = globalThis

/** The longest delay that `setTimeout` takes, some 24 days; a longer one would fire at once. */
export const LONGEST_DELAY = 2 ** 31 - 1

/**
 * One of Node's timers, for any delay. Measured against one timer that serves all deadlines of the same length, which
 * costs a place in a list for each of them: Node keeps such a list itself, and is as fast or faster (94 to 168 ns for
 * setting and clearing one with 0 to 10,000 others, where a list of our own took 106 ns and more).
 */
export class Timer<T = unknown> {
  readonly #ring: (item: T) => void
  readonly #item: T
  readonly #holdsProcess: boolean
  /** What is left of the delay when the timer of Node has rung. */
  #left: number
  #timeout: SetTimer | null = null

  /**
   * @param ms Milliseconds, at least 1.
   * @param ring Called with the item when they have passed.
   * @param holdsProcess Whether the timer keeps the process alive.
   */
  constructor(ms: number, ring: (item: T) => void, item: T, holdsProcess: boolean) {
    this.#ring = ring
    this.#item = item
    this.#holdsProcess = holdsProcess
    this.#left = Math.max(1, Math.ceil(ms))
    this.#start()
  }

  /** `false` when it has rung, or was cancelled before. */
  cancel(): boolean {
    if (this.#timeout === null) return false
    clock.clearTimer(this.#timeout)
    this.#timeout = null
    return true
  }

  #start(): void {
    const delay = Math.min(this.#left, LONGEST_DELAY)
    this.#left -= delay
    this.#timeout = clock.setTimer(onTimeout, delay, this)
    if (!this.#holdsProcess) this.#timeout.unref()
  }

  ring(): void {
    if (this.#timeout === null) return
    if (this.#left > 0) {
      this.#start()
      return
    }
    this.#timeout = null
    this.#ring(this.#item)
  }
}

// After a stall of the event loop timers run before the answers that have come in meanwhile: let those be read first.
function onTimeout(timer: { ring(): void }): void {
  setImmediate(ring, timer)
}

function ring(timer: { ring(): void }): void {
  timer.ring()
}
