import type { IdempotencyStore } from '../../types/index.js'

/* Stores in front of stores, and those behind them all. */

const inner = new WeakMap<IdempotencyStore, readonly IdempotencyStore[]>()

/** A store is in front of others. */
export function isInFrontOf(store: IdempotencyStore, ...behind: readonly IdempotencyStore[]): void {
  inner.set(store, behind)
}

/** The stores behind all that are in front of one another. */
export function innermost(store: IdempotencyStore): readonly IdempotencyStore[] {
  return inner.get(store)?.flatMap(innermost) ?? [store]
}
