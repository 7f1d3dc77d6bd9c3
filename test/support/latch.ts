import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'

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

export interface UntilOptions {
  /** In milliseconds. @default 10_000 */
  timeout?: number
  /** What was waited for; the error says it. */
  message?: string
}

/** Polls every 5 ms until `predicate` gives something truthy, and returns that. What it throws is thrown at once. */
export async function until<T>(
  predicate: () => T | Promise<T>,
  { timeout = 10_000, message = 'the condition' }: UntilOptions = {}
): Promise<T> {
  const deadline = performance.now() + timeout
  for (;;) {
    const value = await predicate()
    if (value) return value
    if (performance.now() >= deadline) throw new Error(`Waited ${timeout} ms in vain for ${message}`)
    await sleep(5)
  }
}

/** Starts the app on a free loopback port. Returns its base URL, without a slash at its end. */
export function listening(app: Pick<FastifyInstance, 'listen'>): Promise<string> {
  return app.listen({ host: '127.0.0.1', port: 0 })
}
