/** Deletes what has expired, from time to time, while there is something to delete and never twice at once. */
export class Sweeper {
  readonly #interval: number
  readonly #sweep: () => Promise<boolean>
  #timer: NodeJS.Timeout | null = null
  #running: Promise<void> | null = null
  #stopped = true

  /**
   * @param interval Milliseconds between two rounds, on average.
   * @param sweep Deletes a batch; `true` when there may be more.
   */
  constructor(interval: number, sweep: () => Promise<boolean>) {
    this.#interval = interval
    this.#sweep = sweep
  }

  /** Starts the rounds, if they are not going on. They do not keep the process alive. */
  start(): void {
    if (!this.#stopped) return
    this.#stopped = false
    this.#schedule()
  }

  /** Resolves when nothing is being deleted any more. */
  async stop(): Promise<void> {
    this.#stopped = true
    if (this.#timer !== null) clearTimeout(this.#timer)
    this.#timer = null
    await this.#running
  }

  #schedule(): void {
    // Not all processes at the same moment.
    const pause = Math.min(this.#interval * (0.5 + Math.random()), 2 ** 31 - 1)
    this.#timer = setTimeout(() => {
      this.#running = this.#round()
    }, pause).unref()
  }

  async #round(): Promise<void> {
    try {
      while (!this.#stopped && (await this.#sweep())) {}
    } catch {
      // What could not be deleted now, because the server is away, will be later.
    }
    if (!this.#stopped) this.#schedule()
  }
}
