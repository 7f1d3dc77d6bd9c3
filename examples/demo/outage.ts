// In a project of your own: import type { IdempotencyStore } from 'fastify-idempotency'
import type { IdempotencyStore } from '../../index.js'

/** A switch in front of a real store: while it is off, every call fails, as it does without a connection. */
export class Outage {
  isOn = false

  over(store: IdempotencyStore): IdempotencyStore {
    return new Proxy(store, {
      get: (target, name) => {
        const value = Reflect.get(target, name)
        if (typeof value !== 'function') return value
        return (...args: unknown[]) => {
          if (!this.isOn || name === 'close') return value.apply(target, args)
          // As Node says it where there is nobody to talk to.
          return Promise.reject(Object.assign(new Error('The store is stopped'), { code: 'ECONNREFUSED' }))
        }
      }
    })
  }
}
