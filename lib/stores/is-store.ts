/* What an `IdempotencyStore` is, at run time. */

export const A_STORE = 'an IdempotencyStore (acquire, renew, complete and release)'

/** Does the value have the methods of an `IdempotencyStore`? */
export function isStore(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return false
  const store = value as Record<string, unknown>
  return (
    ['acquire', 'renew', 'complete', 'release'].every((method) => typeof store[method] === 'function') &&
    ['step', 'changed', 'get', 'delete', 'list', 'settle', 'begin', 'close'].every(
      (method) => store[method] === undefined || typeof store[method] === 'function'
    )
  )
}
