import type { RequestIdempotency, TransactionClient } from '../types/index.js'
import { credentialsOf } from './credentials.js'
import { deriveKey } from './key.js'
import type { Operation } from './operation.js'

/** `request.idempotency`: what a handler may see of its operation. */
export class RequestContext implements RequestIdempotency {
  readonly #operation: Operation

  constructor(operation: Operation) {
    this.#operation = operation
  }

  get key(): string {
    return this.#operation.key
  }

  get attempt(): number {
    return this.#operation.attempt
  }

  get replayed(): boolean {
    return this.#operation.replayed
  }

  get signal(): AbortSignal {
    return this.#operation.signal
  }

  get transaction(): TransactionClient | null {
    return this.#operation.transaction
  }

  discard(): void {
    this.#operation.discarded = true
  }

  deriveKey(label: string): string {
    const { policy, request, storageKey } = this.#operation
    return deriveKey(storageKey, label, policy.scope === null ? credentialsOf(request) : null)
  }
}
