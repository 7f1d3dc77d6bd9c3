import type { FastifyInstance } from 'fastify'

export { until } from '../../lib/testkit/fixtures.js'

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
