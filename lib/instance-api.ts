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
import { generateKey } from './http/key.js'
import { StoreContext } from './operation/store-context.js'
import type { Runner } from './run.js'
import { pastedKey, selectedKey } from './selected-key.js'

/** `app.idempotency`. */
export class InstanceApi implements InstanceIdempotency {
  readonly store: IdempotencyStore
  readonly #field: string | undefined
  readonly #keyFormat: KeyFormat | undefined
  readonly #runner: Runner

  constructor(
    { store, field, keyFormat }: { store: IdempotencyStore; field?: string; keyFormat?: KeyFormat },
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
    return this.store.get(selectedKey(key, scope, this.#keyFormat))
  }

  async delete(key: string, { scope }: OperationSelector = {}): Promise<boolean> {
    if (this.store.delete === undefined) throw new Error('This idempotency store has no delete()')
    const stored = selectedKey(key, scope, this.#keyFormat)
    StoreContext.of(this.store).live.get(stored)?.forget()
    return this.store.delete(stored)
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
