import { waitAtMost } from '../util/timeout.js'
import { LONGEST_DELAY } from '../util/timer.js'

/* Deletes what has expired: in small batches, by one process at a time. */

/** How long a stop waits for a batch: one that a broken connection holds up would never end. */
const PATIENCE_MS = 1_000

/** The rounds from a start to the next stop. */
interface Rounds {
  stopped: boolean
  timer: NodeJS.Timeout | null
}

/** Deletes what has expired, from time to time, and never twice at once. */
export class Sweeper {
  readonly #interval: number
  readonly #sweep: () => Promise<boolean>
  #rounds: Rounds | null = null
  /** Settles with the last round that has begun. */
  #work: Promise<void> = Promise.resolve()

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
    if (this.#rounds !== null) return
    this.#rounds = { stopped: false, timer: null }
    this.#schedule(this.#rounds)
  }

  /** Resolves when nothing is being deleted any more, or after a second. */
  async stop(): Promise<void> {
    const rounds = this.#rounds
    this.#rounds = null
    if (rounds !== null) {
      rounds.stopped = true
      if (rounds.timer !== null) clearTimeout(rounds.timer)
    }
    await waitAtMost(PATIENCE_MS, this.#work)
  }

  #schedule(rounds: Rounds): void {
    // Not all processes at the same moment.
    const pause = Math.min(this.#interval * (0.5 + Math.random()), LONGEST_DELAY)
    rounds.timer = setTimeout(() => {
      this.#work = this.#work.then(() => this.#round(rounds))
    }, pause).unref()
  }

  async #round(rounds: Rounds): Promise<void> {
    try {
      while (!rounds.stopped && (await this.#sweep())) {}
    } catch {
      // What could not be deleted now, because the server is away, will be later.
    }
    if (!rounds.stopped) this.#schedule(rounds)
  }
}
