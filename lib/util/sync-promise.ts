import type { Acquisition } from '../../types/index.js'

/* Promises whose value is known already, for those who have nothing to wait for. */

const kValue = Symbol('fastify-idempotency.value')

/** A value, or the promise of one. */
export type MaybePromise<T> = T | Promise<T>

/**
 * A resolved promise whose value can be read synchronously (`peek`), which saves this package a turn of the microtask
 * queue for every answer of a store in memory. To all others it is a promise like any other.
 */
export function resolved<T>(value: T): Promise<T> {
  const promise = Promise.resolve(value) as Promise<T> & { [kValue]?: T }
  promise[kValue] = value
  return promise
}

export function isResolved(promise: Promise<unknown>): boolean {
  return kValue in promise
}

/** The value of a promise that shows it; any other promise as it is. */
export function peek<T>(promise: Promise<T>): MaybePromise<T> {
  return kValue in promise ? (promise[kValue] as T) : promise
}

/** What a store has in this process itself, in front of one that may be down. */
export const kPeek = Symbol('fastify-idempotency.peek')

export interface Peekable {
  [kPeek](key: string): Acquisition | null
}

export function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof value === 'object' && value !== null && 'then' in value && typeof value.then === 'function'
}
