import type {
  Acquisition,
  IdempotencyStore,
  InstanceIdempotency,
  KeyFormat,
  OperationSelector,
  RunContext,
  RunOptions,
  Stored
} from '../types/index.js'
import { InvalidOption } from './errors.js'
import { generateKey, parseKey } from './http/key.js'
import { storageKey } from './operation/storage-key.js'
import { StoreContext } from './operation/store-context.js'
import type { Runner } from './run.js'

/** `app.idempotency`. */
export class InstanceApi implements InstanceIdempotency {
  readonly store: IdempotencyStore
  readonly #field: string | undefined
  readonly #keyFormat: KeyFormat
  readonly #runner: Runner

  constructor(
    { store, field, keyFormat = 'any' }: { store: IdempotencyStore; field?: string; keyFormat?: KeyFormat },
    runner: Runner
  ) {
    this.#runner = runner
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

  async get(key: string, { scope }: OperationSelector = {}): Promise<Acquisition | null> {
    if (this.store.get === undefined) throw new Error('This idempotency store has no get()')
    return this.store.get(this.#storageKey(key, scope))
  }

  async delete(key: string, { scope }: OperationSelector = {}): Promise<boolean> {
    if (this.store.delete === undefined) throw new Error('This idempotency store has no delete()')
    const stored = this.#storageKey(key, scope)
    StoreContext.of(this.store).live.get(stored)?.forget()
    return this.store.delete(stored)
  }

  async run<T>(key: string, options: RunOptions, fn: (run: RunContext) => T | Promise<T>): Promise<Stored<T>> {
    if (typeof key !== 'string' || key === '') throw new InvalidOption('run() takes a key of one character or more')
    if (typeof fn !== 'function') throw new InvalidOption('run() takes a key, options and a function')
    return this.#runner.run(this.#parsed(key), options, fn)
  }

  /** `key` may be pasted from a header, quotes and all; a `scope` option may have given a number. */
  #storageKey(key: string, scope: unknown): string {
    return storageKey(scope === undefined ? null : String(scope), this.#parsed(key))
  }

  #parsed(key: string): string {
    const keyFormat = this.#keyFormat === 'uuid' ? 'uuid' : 'any'
    try {
      return parseKey(key, { keyFormat, maxKeyLength: Number.POSITIVE_INFINITY })
    } catch {
      return key
    }
  }
}

function escapeAttribute(value: string): string {
  return value.replaceAll('&', '&amp;').replaceAll('"', '&quot;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}
