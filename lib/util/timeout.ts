import { StoreTimeout } from '../errors.js'
import { Deadlines } from './deadlines.js'
import { isAtHand } from './sync-promise.js'

/** Rejects a store call that has not answered yet. */
type Reject = (error: unknown) => void

// One timer for all calls with the same limit; there are as many limits as `storeTimeout` options.
const limits = new Map<number, Deadlines<Reject>>()

function limit(ms: number): Deadlines<Reject> {
  let deadlines = limits.get(ms)
  if (deadlines === undefined) {
    deadlines = new Deadlines(ms, (reject) => reject(new StoreTimeout(ms)), true)
    limits.set(ms, deadlines)
  }
  return deadlines
}

/** Who wants to know whether a store call was answered in time. */
export interface Witness {
  answered(): void
  failed(error: unknown): void
}

/**
 * The answer of a store call, or a `StoreTimeout` when there is none after `ms` milliseconds. A call that
 * throws has rejected. One that is at hand needs no limit.
 */
export function within<T>(ms: number, ask: () => Promise<T>, witness?: Witness): Promise<T> {
  const answer = attempt(ask)
  if (isAtHand(answer)) return answer
  const deadlines = limit(ms)
  return new Promise((resolve, reject) => {
    const fail = (error: unknown) => {
      witness?.failed(error)
      reject(error)
    }
    deadlines.add(fail)
    // What comes too late changes nothing.
    answer.then(
      (value) => {
        if (!deadlines.delete(fail)) return
        witness?.answered()
        resolve(value)
      },
      (error) => {
        if (deadlines.delete(fail)) fail(error)
      }
    )
  })
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
