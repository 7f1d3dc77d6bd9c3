import type { Duration, RequestIdempotency, Step, TransactionClient } from '../../types/index.js'
import type { Operation } from '../operation/operation.js'
import { deriveKey } from '../operation/storage-key.js'
import { durationOf } from '../option-rules.js'

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

  // Made when they are asked for, and not bound to `this`: they may be taken out of their object.

  get step(): Step {
    return ((name: string, ...rest: [never, never]) => this.#operation.step(name, ...rest)) as Step
  }

  get discard(): () => void {
    return () => {
      this.#operation.discarded = true
    }
  }

  get keepFor(): (duration: Duration | null) => void {
    return (duration) => {
      this.#operation.ttl = duration === null ? null : durationOf(duration, 'keepFor()')
    }
  }

  get deriveKey(): (label: string) => string {
    return (label) => deriveKey(this.#operation.id, label, this.#operation.credentials)
  }
}
