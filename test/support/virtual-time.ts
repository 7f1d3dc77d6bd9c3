import { AsyncLocalStorage } from 'node:async_hooks'

/** Whoever starts timers. Those of one that is stopped wait until it is not. */
export interface TimerOwner {
  stopped: boolean
}

const owners = new AsyncLocalStorage<TimerOwner | null>()

/** Runs a piece of code in somebody's name: all timers that come of it are the owner's. */
export function inNameOf<T>(owner: TimerOwner | null, run: () => T): T {
  return owners.run(owner, run)
}

/** What `setTimeout` and `setInterval` give while time is virtual. */
class VirtualTimer {
  readonly owner = owners.getStore() ?? null
  referenced = true

  constructor(
    readonly time: VirtualTime,
    readonly ring: () => void,
    readonly every: number | null,
    public due: number
  ) {}

  ref(): this {
    this.referenced = true
    return this
  }

  unref(): this {
    this.referenced = false
    return this
  }

  hasRef(): boolean {
    return this.referenced
  }

  close(): this {
    this.time.delete(this)
    return this
  }
}

/**
 * A clock that moves only when it is told to, in the place of the global timers, `performance.now` and `Date.now`.
 * Immediates, ticks and promises stay real, so that Fastify goes on as ever.
 */
export class VirtualTime {
  readonly #timers = new Set<VirtualTimer>()
  #now = 0
  #uninstall: (() => void) | null = null

  get now(): number {
    return this.#now
  }

  /** How many timers are there, of whomever. */
  get pending(): number {
    return this.#timers.size
  }

  install(): void {
    const { setTimeout, setInterval, clearTimeout, clearInterval } = globalThis
    const { now } = Date
    const start = (every: boolean) => {
      return (callback: (...args: unknown[]) => void, ms = 1, ...args: unknown[]) => {
        const delay = ms >= 1 && ms < 2 ** 31 ? Math.trunc(ms) : 1
        const timer = new VirtualTimer(this, () => callback(...args), every ? delay : null, this.#now + delay)
        this.#timers.add(timer)
        return timer
      }
    }
    const stop = (real: (timer?: NodeJS.Timeout) => void) => (timer?: unknown) => {
      if (timer instanceof VirtualTimer) timer.close()
      else real(timer as NodeJS.Timeout)
    }
    Object.assign(globalThis, {
      setTimeout: start(false),
      setInterval: start(true),
      clearTimeout: stop(clearTimeout),
      clearInterval: stop(clearInterval)
    })
    Date.now = () => Date.UTC(2026, 0) + this.#now
    Object.defineProperty(performance, 'now', { configurable: true, value: () => this.#now })
    this.#uninstall = () => {
      Object.assign(globalThis, { setTimeout, setInterval, clearTimeout, clearInterval })
      Date.now = now
      Reflect.deleteProperty(performance, 'now')
    }
  }

  uninstall(): void {
    this.#uninstall?.()
  }

  delete(timer: VirtualTimer): void {
    this.#timers.delete(timer)
  }

  /** Lets time pass, and all happen that is due until then, one after the other. */
  async pass(ms: number): Promise<void> {
    const end = this.#now + ms
    await settled()
    for (let timer = this.#next(end); timer !== null; timer = this.#next(end)) {
      // The timers of an owner that was stopped are overdue.
      this.#now = Math.max(this.#now, timer.due)
      if (timer.every === null) this.#timers.delete(timer)
      else timer.due = this.#now + timer.every
      inNameOf(timer.owner, timer.ring)
      await settled()
    }
    this.#now = end
  }

  #next(end: number): VirtualTimer | null {
    let next: VirtualTimer | null = null
    for (const timer of this.#timers) {
      if (timer.due <= end && timer.due < (next?.due ?? Infinity) && !timer.owner?.stopped) next = timer
    }
    return next
  }
}

const immediate = () => new Promise<void>((resolve) => setImmediate(resolve))

/** Resolves when nothing more happens without the passing of time. */
export async function settled(): Promise<void> {
  for (let quiet = 0; quiet < 2; ) {
    await immediate()
    quiet = process.getActiveResourcesInfo().includes('Immediate') ? 0 : quiet + 1
  }
}
