import { setImmediate as immediate } from 'node:timers/promises'
import type { TransactionClient } from '../../../types/index.js'
import { TransactionBroken } from '../../errors.js'
import { transactionControl } from './transaction-control.js'

/* The client of a transaction, for its handler: it does all but begin and end transactions. */

type Callback = (error: Error) => void

/** A client that a handler can do everything with but end its transaction. */
export class Guard {
  readonly client: TransactionClient
  /** Is the transaction over, and why? Then the client belongs to somebody else. */
  over: string | null = null
  /** Was something asked that came too late? What is done then is not all that its handler wanted. */
  wasLate = false
  /** How many queries the handler has asked for. */
  asked = 0
  #pending = 0
  /** Settles with the handler's last query; those before it have settled then. */
  #last: Promise<unknown> = Promise.resolve()

  constructor(client: TransactionClient) {
    const query = (...args: unknown[]) => this.#query(client, args)
    this.client = new Proxy(client, {
      get: (target, name, proxy) => {
        if (name === 'query') return query
        if (name === 'release' || name === 'end' || name === 'connect') return refuseToLetGo
        const value: unknown = Reflect.get(target, name, target)
        if (typeof value !== 'function' || name === 'constructor') return value
        return (...args: unknown[]) => {
          const result: unknown = value.apply(target, args)
          return result === target ? proxy : result
        }
      }
    })
  }

  /** Is a query of the handler's under way? */
  get busy(): boolean {
    return this.#pending > 0
  }

  /** Resolves when no query of the handler's is under way any more. */
  get idle(): Promise<unknown> {
    return this.#last
  }

  /** Resolves when no query is under way, nor has another followed from what was answered. */
  async dry(): Promise<void> {
    do {
      await this.#last
      await immediate()
    } while (this.busy)
  }

  #query(client: TransactionClient, args: unknown[]): unknown {
    this.asked++
    const refusal = this.#refusal(args[0])
    if (refusal !== null) return refuse(refusal, args)
    const result: unknown = client.query(...(args as [string]))
    if (result instanceof Promise) {
      this.#pending++
      const done = () => {
        this.#pending--
      }
      this.#last = result.then(done, done)
    }
    return result
  }

  #refusal(query: unknown): Error | null {
    if (this.over !== null) {
      this.wasLate = true
      return new TransactionBroken(this.over)
    }
    const text = typeof query === 'string' ? query : (query as { text?: unknown } | null)?.text
    const control = typeof text === 'string' ? transactionControl(text) : null
    if (control === null) return null
    return new TransactionBroken(
      `The transaction ends with the reply, and by itself: ${control} is not for its handler, which may use SAVEPOINT`
    )
  }
}

/** Fails a query in the way in which its caller listens. */
function refuse(error: Error, args: unknown[]): unknown {
  const query = args[0] as { callback?: unknown; submit?: unknown; handleError?: unknown } | null
  const callback = [args.at(-1), query?.callback].find((last) => typeof last === 'function') as Callback | undefined
  if (callback !== undefined) process.nextTick(callback, error)
  else if (typeof query?.submit === 'function' && typeof query.handleError === 'function') {
    process.nextTick(() => (query as unknown as { handleError: Callback }).handleError(error))
    return query
  } else {
    const refused = Promise.reject(error)
    // Who has forgotten to wait must not lose the process by that. Who listens hears of it all the same.
    refused.catch(() => {})
    return refused
  }
}

function refuseToLetGo(): never {
  throw new TransactionBroken('The client of a transaction goes back to its pool with the reply, and by itself')
}
