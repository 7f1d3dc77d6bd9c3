import { type Clock, type SetTimer, setClock } from '../util/clock.js'

/* A clock that can be moved, and goes with mock timers. */

// Before anybody puts another in its place: turns of the event loop stay real.
const { setImmediate } = globalThis

/** So many turns of the event loop are waited for at most: who has one follow the other for ever is not waited for. */
const MOST_TURNS = 1_000

/** A timer that rings by Node's, or by what mocks those; or earlier, when the clock is moved. */
class TestTimer implements SetTimer {
  readonly due: number
  readonly #ring: () => void
  readonly #pending: Set<TestTimer>
  #timeout: NodeJS.Timeout | null = null
  #holdsProcess = true

  constructor(pending: Set<TestTimer>, due: number, ring: () => void) {
    this.#pending = pending
    this.due = due
    this.#ring = ring
    pending.add(this)
  }

  start(ms: number): this {
    clearTimeout(this.#timeout ?? undefined)
    this.#timeout = setTimeout(() => this.ring(), Math.max(1, Math.ceil(ms)))
    if (!this.#holdsProcess) this.#timeout.unref()
    return this
  }

  ring(): void {
    if (!this.#pending.has(this)) return
    this.stop()
    this.#ring()
  }

  stop(): void {
    this.#pending.delete(this)
    clearTimeout(this.#timeout ?? undefined)
  }

  unref(): void {
    this.#holdsProcess = false
    this.#timeout?.unref()
  }
}

/** The time is that of `Date`, mocked or not, and what was added to it. */
class TestClock implements Clock {
  readonly #pending = new Set<TestTimer>()
  /** What it says, which goes on from what the clock before it has said. */
  #time = performance.now()
  /** What `Date` has said last, and which one that was. */
  #read = Date.now()
  #source = Date.now
  /** What was added to `Date`. */
  #added = 0

  now(): number {
    const read = Date.now()
    // Where a mock has come or gone, the two times have nothing to do with one another.
    if (Date.now === this.#source) this.#time += Math.max(0, read - this.#read)
    this.#source = Date.now
    this.#read = read
    return this.#time
  }

  date(): number {
    return Date.now() + this.#added
  }

  setTimer<Args extends unknown[]>(ring: (...args: Args) => void, ms: number, ...args: Args): SetTimer {
    return new TestTimer(this.#pending, this.now() + ms, () => ring(...args)).start(ms)
  }

  clearTimer(timer: SetTimer | undefined): void {
    if (timer instanceof TestTimer) timer.stop()
    else clearTimeout(timer as NodeJS.Timeout | undefined)
  }

  /** Lets time pass, and all happen that is due until then, one after the other. */
  async advance(ms: number): Promise<void> {
    // What has been begun begins before.
    await settled()
    const end = this.now() + ms
    for (let next = this.#next(end); next !== null; next = this.#next(end)) {
      this.#moveTo(next.due)
      next.ring()
      await settled()
    }
    this.#moveTo(end)
    for (const timer of this.#pending) timer.start(timer.due - this.#time)
  }

  /** Never back. */
  #moveTo(time: number): void {
    const step = Math.max(0, time - this.now())
    this.#time += step
    this.#added += step
  }

  #next(end: number): TestTimer | null {
    let next: TestTimer | null = null
    for (const timer of this.#pending) {
      if (timer.due <= end && timer.due < (next?.due ?? Number.POSITIVE_INFINITY)) next = timer
    }
    return next
  }
}

let testClock: TestClock | null = null

/** The one clock that can be moved, from now on that of all that this package does in the process. */
export function useTestClock(): TestClock {
  if (testClock === null) {
    testClock = new TestClock()
    setClock(testClock)
  }
  return testClock
}

/** Resolves when nothing more seems to happen without the passing of time, or an answer from outside. */
export async function settled(): Promise<void> {
  for (let turn = 0, quiet = 0; turn < MOST_TURNS && quiet < 2; turn++) {
    await new Promise<void>((resolve) => setImmediate(resolve))
    quiet = process.getActiveResourcesInfo().includes('Immediate') ? 0 : quiet + 1
  }
}
