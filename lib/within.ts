import { Deadlines } from './deadlines.js'
import { StoreTimeout } from './errors.js'

/** A store call that has not answered yet. */
class PendingCall<T> {
  readonly promise: Promise<T>
  resolve!: (value: T) => void
  reject!: (error: unknown) => void

  constructor() {
    this.promise = new Promise((resolve, reject) => {
      this.resolve = resolve
      this.reject = reject
    })
  }
}

// One timer for all calls with the same limit; there are as many limits as `storeTimeout` options.
const limits = new Map<number, Deadlines<PendingCall<never>>>()

function limit(ms: number): Deadlines<PendingCall<never>> {
  let deadlines = limits.get(ms)
  if (deadlines === undefined) {
    deadlines = new Deadlines(ms, (call) => call.reject(new StoreTimeout(ms)), true)
    limits.set(ms, deadlines)
  }
  return deadlines
}

/**
 * The answer of a store call, or a `StoreTimeout` when there is none after `ms` milliseconds. A call that
 * throws has rejected.
 */
export function within<T>(ms: number, ask: () => Promise<T>): Promise<T> {
  const deadlines = limit(ms)
  const call = new PendingCall<T>()
  const pending = call as unknown as PendingCall<never>
  deadlines.add(pending)
  attempt(ask).then(
    (value) => {
      deadlines.delete(pending)
      call.resolve(value)
    },
    (error) => {
      deadlines.delete(pending)
      call.reject(error)
    }
  )
  return call.promise
}

/** Resolves when the work is done, or when it has taken so long that nobody should wait for it any more. */
export async function noLongerThan(ms: number, work: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  const limit = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms)
  })
  await Promise.race([work, limit]).finally(() => clearTimeout(timer))
}

/** A promise, whatever the call does: a store of somebody else may throw, or give its answer as it is. */
export function attempt<T>(ask: () => Promise<T>): Promise<T> {
  try {
    return Promise.resolve(ask())
  } catch (error) {
    return Promise.reject(error)
  }
}
