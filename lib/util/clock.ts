/* What time it is, and timers: all that this package asks of time. */

/** A timer that has been set. */
export interface SetTimer {
  /** It does not keep the process alive any more. */
  unref(): unknown
}

/** A clock, and the timers that ring by it. */
export interface Clock {
  /** Monotonic milliseconds: how much has passed between two of them is all that they say. */
  now(): number
  /** Wall-clock milliseconds since the epoch: what is stored, and what people read. */
  date(): number
  /** As the global `setTimeout`. */
  setTimer<Args extends unknown[]>(ring: (...args: Args) => void, ms: number, ...args: Args): SetTimer
  /** As the global `clearTimeout`. */
  clearTimer(timer: SetTimer | undefined): void
}

/** The clock of this process. Tests of applications have another: see lib/testing/test-clock.ts. */
export let clock: Clock = {
  now: () => performance.now(),
  date: () => Date.now(),
  setTimer: (ring, ms, ...args) => setTimeout(ring, ms, ...args),
  clearTimer: (timer) => clearTimeout(timer as NodeJS.Timeout | undefined)
}

/** From now on another clock tells the time. */
export function setClock(other: Clock): void {
  clock = other
}
