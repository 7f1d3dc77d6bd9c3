/** The longest delay that `setTimeout` takes; a longer one would fire at once. */
export const LONGEST_DELAY = 2 ** 31 - 1

/**
 * Any number of deadlines of one length, on one timer. What is added first is due first, so adding, removing
 * and expiring take constant time, and the timer is armed for the oldest only.
 */
export class Deadlines<T> {
  readonly #ms: number
  readonly #expire: (item: T) => void
  readonly #holdsProcess: boolean
  readonly #due = new Map<T, number>()
  #timer: NodeJS.Timeout | null = null

  /**
   * @param ms Milliseconds from adding an item to its expiry.
   * @param expire Called with each item that was not removed in time.
   * @param holdsProcess Whether a pending deadline keeps the process alive.
   */
  constructor(ms: number, expire: (item: T) => void, holdsProcess: boolean) {
    this.#ms = ms
    this.#expire = expire
    this.#holdsProcess = holdsProcess
  }

  /** Adds an item, or puts its deadline off. */
  add(item: T): void {
    // What is set again keeps its place in a Map: it must go to the end.
    this.#due.delete(item)
    this.#due.set(item, performance.now() + this.#ms)
    if (this.#timer === null) this.#arm(this.#ms)
    else if (this.#holdsProcess && this.#due.size === 1) this.#timer.ref()
  }

  /** `false` when it had expired, or was not there. */
  delete(item: T): boolean {
    const was = this.#due.delete(item)
    if (was && this.#due.size === 0) this.#timer?.unref()
    return was
  }

  #arm(ms: number): void {
    this.#timer = setTimeout(this.#ring, Math.min(Math.max(1, Math.ceil(ms)), LONGEST_DELAY))
    if (!this.#holdsProcess) this.#timer.unref()
  }

  // After a stall of the event loop timers run before the answers that have come in meanwhile:
  // let those be read first.
  readonly #ring = () => setImmediate(this.#sweep)

  readonly #sweep = () => {
    const now = performance.now()
    const expired: T[] = []
    let next = 0
    for (const [item, due] of this.#due) {
      if (due > now) {
        next = due - now
        break
      }
      expired.push(item)
      this.#due.delete(item)
    }
    // The timer is settled before anybody is told, because who is told may add again.
    this.#timer = null
    if (next > 0) this.#arm(next)
    for (const item of expired) this.#expire(item)
  }
}
