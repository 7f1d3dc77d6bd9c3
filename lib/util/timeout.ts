import { StoreTimeout } from '../errors.js'
import { clock, type SetTimer } from './clock.js'
import { isResolved } from './sync-promise.js'
import { Timer } from './timer.js'

/* Calls that are waited for no longer than so many milliseconds. */

/** Who wants to know whether a store call was answered in time. */
export interface Witness {
  answered(): void
  failed(error: unknown): void
}

/**
 * The answer of a store call, or a `StoreTimeout` when there is none after `ms` milliseconds. A call that
 * throws has rejected. One that is at hand needs no limit.
 */
export function withTimeout<T>(ms: number, ask: () => Promise<T>, witness?: Witness): Promise<T> {
  const answer = promiseTry(ask)
  if (isResolved(answer)) return answer
  return new Promise((resolve, reject) => {
    const fail = (error: unknown) => {
      witness?.failed(error)
      reject(error)
    }
    const limit = new Timer(ms, (ms) => fail(new StoreTimeout(ms)), ms, true)
    // What comes too late changes nothing.
    answer.then(
      (value) => {
        if (!limit.cancel()) return
        witness?.answered()
        resolve(value)
      },
      (error) => {
        if (limit.cancel()) fail(error)
      }
    )
  })
}

/** Resolves when the work is done, or when it has taken so long that nobody should wait for it any more. */
export async function waitAtMost(ms: number, work: Promise<unknown>): Promise<void> {
  let timer: SetTimer | undefined
  const limit = new Promise<void>((resolve) => {
    timer = clock.setTimer(resolve, ms)
  })
  await Promise.race([work, limit]).finally(() => clock.clearTimer(timer))
}

/** A promise, whatever the call does: a store of somebody else may throw, or give its answer as it is. */
export function promiseTry<T>(ask: () => Promise<T>): Promise<T> {
  try {
    return Promise.resolve(ask())
  } catch (error) {
    return Promise.reject(error)
  }
}
