import type { Acquisition, IdempotencyStore, InstanceIdempotency, OperationSelector } from '../types/index.js'
import { InvalidOption } from './errors.js'
import { generateKey, storageKey } from './key.js'

/** `app.idempotency`. */
export class InstanceApi implements InstanceIdempotency {
  readonly store: IdempotencyStore
  readonly #field: string | undefined

  constructor({ store, field }: { store: IdempotencyStore; field?: string }) {
    this.store = store
    this.#field = field
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
    return this.store.get(storageKey(scope ?? null, key))
  }

  async delete(key: string, { scope }: OperationSelector = {}): Promise<boolean> {
    if (this.store.delete === undefined) throw new Error('This idempotency store has no delete()')
    return this.store.delete(storageKey(scope ?? null, key))
  }
}

function escapeAttribute(value: string): string {
  return value.replaceAll('&', '&amp;').replaceAll('"', '&quot;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}
