import type { FastifyInstance } from 'fastify'

import { type UntilOptions, until as untilWithin } from '../../lib/testkit/fixtures.js'
import { within } from '../../lib/testkit/harness.js'

/** What comes at once where nothing is wrong may take as long as this on a machine that has other things to do. */
const PATIENCE_MS = 120_000

export function until<T>(predicate: () => T | Promise<T>, options?: UntilOptions): Promise<T> {
  return untilWithin(predicate, { timeout: PATIENCE_MS, ...options })
}

/** Rejects when the promise takes longer than anything may take here. */
export function soon<T>(promise: Promise<T>, message = 'the promise'): Promise<T> {
  return within(PATIENCE_MS, promise, () => message)
}

export interface Latch<T> {
  readonly promise: Promise<T>
  open(value: T): void
  fail(error: unknown): void
}

/** A promise that the test settles: holds a handler at a point until the test lets it go on. */
export function latch<T = void>(): Latch<T> {
  let open!: Latch<T>['open']
  let fail!: Latch<T>['fail']
  const promise = new Promise<T>((resolve, reject) => {
    open = resolve
    fail = reject
  })
  return { promise, open, fail }
}

/** Starts the app on a free loopback port. Returns its base URL, without a slash at its end. */
export function listening(app: Pick<FastifyInstance, 'listen'>): Promise<string> {
  return app.listen({ host: '127.0.0.1', port: 0 })
}
