/** A promise that is resolved by calling `listener`, or by the signal. */
export function listen(signal: AbortSignal): { promise: Promise<void>; listener: () => void } {
  let listener!: () => void
  const promise = new Promise<void>((resolve) => {
    listener = resolve
  })
  signal.addEventListener('abort', listener)
  return { promise, listener }
}
