/** Something with a teardown: a tap test. */
interface Owner {
  teardown(fn: () => unknown): void
}

interface Timer {
  readonly due: number
  readonly fire: () => void
}

const real = { setTimeout, clearTimeout, dateNow: Date.now, performanceNow: performance.now }

/** How many turns of the event loop whatever needs no timer gets, before the time moves on. */
const TURNS = 20

/** Puts a clock in the place of the system's until the test ends: time passes only while `run` waits. */
export function virtualTime(t: Owner, start = Date.UTC(2030, 0, 1)) {
  const timers = new Map<number, Timer>()
  let now = 0
  let lastId = 0

  Object.assign(globalThis, {
    setTimeout(fire: () => void, ms = 0) {
      // What is longer fires at once in all runtimes.
      timers.set(++lastId, { due: now + (ms > 2 ** 31 - 1 ? 1 : Math.max(0, ms)), fire })
      return lastId
    },
    clearTimeout(id?: number) {
      timers.delete(id ?? 0)
    }
  })
  Date.now = () => start + now
  performance.now = () => now
  t.teardown(() => {
    Object.assign(globalThis, { setTimeout: real.setTimeout, clearTimeout: real.clearTimeout })
    Date.now = real.dateNow
    performance.now = real.performanceNow
  })

  async function settle(): Promise<void> {
    for (let turn = 0; turn < TURNS; turn++) await new Promise((resolve) => setImmediate(resolve))
  }

  /** Lets the time pass until the work is done. */
  async function run<T>(work: Promise<T>): Promise<T> {
    let isOver = false
    const over = () => {
      isOver = true
    }
    work.then(over, over)
    for (;;) {
      await settle()
      if (isOver) return work
      const [next] = [...timers].sort(([, a], [, b]) => a.due - b.due)
      if (next === undefined) throw new Error('Nothing is left to wait for, and the work is not done')
      const [id, { due, fire }] = next
      timers.delete(id)
      now = Math.max(now, due)
      fire()
    }
  }

  return {
    run,
    settle,
    /** Milliseconds since the start. */
    now: () => now,
    /** How many timers are set. */
    pending: () => timers.size,
    /** Calls something at a time. */
    at: (ms: number, fire: () => void) => void setTimeout(fire, ms - now)
  }
}
