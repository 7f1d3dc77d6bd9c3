import { setImmediate as immediate } from 'node:timers/promises'
import type { TransactionClient } from '../../../types/index.js'
import { TransactionBroken } from '../../errors.js'
import type { NestedTransactions } from './nested-transactions.js'
import { transactionControl } from './transaction-control.js'

/* The client of a transaction, for its handler: it does all but begin and end transactions. */

type Callback = (error: Error | null, result?: unknown) => void

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
  readonly #nested: NestedTransactions | null

  /** @param nested What the handler's transactions become; `null`: it has none. */
  constructor(client: TransactionClient, nested: NestedTransactions | null) {
    this.#nested = nested
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

  /** Has the handler begun a transaction that it has not ended? */
  get hasBegun(): boolean {
    return this.#nested?.isOpen === true
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
    if (this.over !== null) {
      this.wasLate = true
      return refuse(new TransactionBroken(this.over), args)
    }
    const query = args[0]
    const text = typeof query === 'string' ? query : (query as { text?: unknown } | null)?.text
    const verb = typeof text === 'string' ? transactionControl(text) : null
    if (verb === null) return this.#watched(client.query(...(args as [string])))
    if (this.#nested === null) return refuse(notForHandlers(verb), args)
    if (isSubmittable(query)) return refuse(notForObjects(verb), args)
    return answer(this.#watched(this.#nested.control(text as string, verb)), args)
  }

  #watched<T>(result: T): T {
    if (result instanceof Promise) {
      this.#pending++
      const done = () => {
        this.#pending--
      }
      this.#last = result.then(done, done)
    }
    return result
  }
}

function notForHandlers(verb: string): Error {
  return new TransactionBroken(
    `The transaction ends with the reply, and by itself: ${verb} is not for its handler, which may use SAVEPOINT, ` +
      "or have transaction: 'nested'"
  )
}

/** What takes its answer itself would take that of another text. */
function notForObjects(verb: string): Error {
  return new TransactionBroken(`${verb} has to be asked for by its text, not by an object that takes the answer`)
}

function isSubmittable(query: unknown): boolean {
  return typeof (query as { submit?: unknown } | null)?.submit === 'function'
}

function callbackOf(args: unknown[]): Callback | undefined {
  const query = args[0] as { callback?: unknown } | null
  return [args.at(-1), query?.callback].find((last) => typeof last === 'function') as Callback | undefined
}

/** Gives what a promise will be in the way in which the caller of a query listens. */
function answer(result: Promise<unknown>, args: unknown[]): Promise<unknown> | undefined {
  const callback = callbackOf(args)
  if (callback === undefined) return result
  // Not in the promise, which would take what the callback throws.
  const call = process.nextTick.bind(process, callback)
  result.then((value) => call(null, value), call)
}

/** Fails a query in the way in which its caller listens. */
function refuse(error: Error, args: unknown[]): unknown {
  const query = args[0] as { handleError?: unknown } | null
  if (callbackOf(args) === undefined && isSubmittable(query) && typeof query?.handleError === 'function') {
    process.nextTick(() => (query as unknown as { handleError: Callback }).handleError(error))
    return query
  }
  const refused = Promise.reject(error)
  // Who has forgotten to wait must not lose the process by that. Who listens hears of it all the same.
  refused.catch(() => {})
  return answer(refused, args)
}

function refuseToLetGo(): never {
  throw new TransactionBroken('The client of a transaction goes back to its pool with the reply, and by itself')
}
