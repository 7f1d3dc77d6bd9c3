import type { IdempotencyStore } from '../../types/index.js'

/* Stores in front of stores, and the one behind them all. */

const inner = new WeakMap<IdempotencyStore, IdempotencyStore>()

/** A store is in front of another one. */
export function isInFrontOf(store: IdempotencyStore, behind: IdempotencyStore): void {
  inner.set(store, behind)
}

/** The store behind all that are in front of one another. */
export function innermost(store: IdempotencyStore): IdempotencyStore {
  const behind = inner.get(store)
  return behind === undefined ? store : innermost(behind)
}
