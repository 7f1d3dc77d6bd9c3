import type { FastifyBaseLogger } from 'fastify'
import type {
  IdempotencyStore,
  InstanceIdempotency,
  KeyFormat,
  KnownOperation,
  ListedOperation,
  ListOptions,
  OperationKey,
  OperationSelector,
  Outcome,
  PurgeOptions,
  RunContext,
  RunOptions,
  Stored
} from '../types/index.js'
import { InvalidOption } from './errors.js'
import { generateKey } from './http/key.js'
import { isHealthy } from './instance/healthy.js'
import { KnownOperations } from './instance/known-operations.js'
import { list, purge } from './instance/list.js'
import { settle } from './instance/settle.js'
import { StoreContext } from './operation/store-context.js'
import type { Registration } from './registration.js'
import type { Runner } from './run.js'
import { pastedKey } from './selected-key.js'

/** `app.idempotency`. */
export class InstanceApi implements InstanceIdempotency {
  readonly store: IdempotencyStore
  readonly #field: string | undefined
  readonly #keyFormat: KeyFormat | undefined
  readonly #runner: Runner
  readonly #log: FastifyBaseLogger
  readonly #known: KnownOperations

  constructor(registration: Registration, runner: Runner, log: FastifyBaseLogger) {
    const { store, field, keyFormat } = registration.options.routeDefaults
    this.#runner = runner
    this.#log = log
    this.#known = new KnownOperations(registration)
    this.store = store
    this.#field = field
    this.#keyFormat = keyFormat
  }

  generateKey(): string {
    return generateKey()
  }

  hiddenInput(): string {
    if (this.#field === undefined) {
      throw new InvalidOption('hiddenInput() takes its name from the option "field", which is not set')
    }
    return `<input type="hidden" name="${escapeAttribute(this.#field)}" value="${generateKey()}">`
  }

  hash(key: string, selector?: OperationSelector): string {
    return this.#known.storageKeys(key, selector)[0]
  }

  async get(key: OperationKey, selector?: OperationSelector): Promise<KnownOperation | null> {
    return this.#known.get(this.#known.storageKeys(key, selector))
  }

  list(options: ListOptions = {}): AsyncIterable<ListedOperation> {
    return list(this.#known, options)
  }

  async settle(key: OperationKey, ...rest: [OperationSelector, Outcome] | [Outcome]): Promise<void> {
    const [selector, outcome] = rest.length === 1 ? [undefined, rest[0]] : rest
    return settle(this.#known, this.#known.storageKeys(key, selector), outcome, this.#log)
  }

  purge(options: PurgeOptions): Promise<number> {
    return purge(this.#known, options)
  }

  healthy(): Promise<boolean> {
    return isHealthy(this.#known.registration)
  }

  async delete(key: OperationKey, selector?: OperationSelector): Promise<boolean> {
    const storageKeys = this.#known.storageKeys(key, selector)
    const stores = this.#known.registration.stores.filter((store) => store.delete !== undefined)
    if (stores.length === 0) throw new Error('This idempotency store has no delete()')
    let existed = false
    for (const store of stores) {
      for (const storageKey of storageKeys) {
        StoreContext.of(store).live.get(storageKey)?.forget()
        existed = (await store.delete?.(storageKey)) || existed
      }
    }
    return existed
  }

  async run<T>(key: string, options: RunOptions, fn: (run: RunContext) => T | Promise<T>): Promise<Stored<T>> {
    if (typeof key !== 'string' || key === '') throw new InvalidOption('run() takes a key of one character or more')
    if (typeof fn !== 'function') throw new InvalidOption('run() takes a key, options and a function')
    return this.#runner.run(pastedKey(key, this.#keyFormat), options, fn)
  }
}

function escapeAttribute(value: string): string {
  return value.replaceAll('&', '&amp;').replaceAll('"', '&quot;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}
