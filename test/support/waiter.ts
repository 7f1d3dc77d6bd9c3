/** Somebody who waits for a change, and what has become of it. */
export interface Waiter {
  is: 'waiting' | 'woken' | 'failed'
  readonly signal: AbortSignal
}

/** Watches a promise that may stay open, or fail, without anybody having to wait for it. */
export function waiter(changed: Promise<void>, signal: AbortSignal): Waiter {
  const waiter: Waiter = { is: 'waiting', signal }
  changed.then(
    () => {
      waiter.is = 'woken'
    },
    () => {
      waiter.is = 'failed'
    }
  )
  return waiter
}

/** Lets everything happen that can happen without the test. */
export const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
