import { createServer, type IncomingMessage } from 'node:http'
import { join } from 'node:path'
import type { Call, Event, Point, StepName } from './kill-steps-plan.js'
import { type Latch, latch } from './latch.js'

/** An event, and how often the claims had been forgotten when it was told. */
export type Told = Event & { readonly now: number }

export interface Effect {
  readonly id: number
  readonly calls: Call[]
}

/** A service that honours keys; and what the workers tell of their runs, in one order. */
export class Books {
  readonly path: string
  /** How often the claims have been forgotten. */
  epoch = 0
  readonly #server = createServer((request, response) => {
    void this.#answer(request).then((answer) => response.end(JSON.stringify(answer)))
  })
  /** By the key of the step. */
  readonly #effects = new Map<string, Effect>()
  readonly #told = new Map<string, Told[]>()
  /** After which steps the handler is to fail, once each. */
  readonly #failures = new Map<string, Set<StepName>>()
  readonly #gates = new Map<string, Latch<void>>()

  constructor(folder: string) {
    this.path = join(folder, 'books')
  }

  open(): Promise<void> {
    return new Promise((resolve) => this.#server.listen(this.path, resolve))
  }

  close(): void {
    this.#server.close()
    this.#server.closeAllConnections()
  }

  toFail(key: string, steps: readonly StepName[]): void {
    this.#failures.set(key, new Set(steps))
  }

  /** What was told of a key, in the order in which it was. */
  told(key: string): readonly Told[] {
    return this.#told.get(key) ?? []
  }

  /** What the service has done for a step. */
  effects(key: string, step: StepName): Effect[] {
    return [...this.#effects.values()].filter(({ calls: [first] }) => first?.key === key && first.step === step)
  }

  /** How often the service was called again for what it had done. */
  get repeats(): number {
    let repeats = 0
    for (const { calls } of this.#effects.values()) repeats += calls.length - 1
    return repeats
  }

  /** Does a request wait there at its gate? */
  isHeld(key: string, point: Point, worker: string): boolean {
    return this.#gates.has(`${key} ${point} ${worker}`)
  }

  release(key: string, point: Point, worker: string): void {
    this.#gates.get(`${key} ${point} ${worker}`)?.open()
  }

  async #answer(request: IncomingMessage): Promise<object> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk)
    const body = JSON.parse(Buffer.concat(chunks).toString())
    return request.url === '/effects' ? this.#call(body) : this.#tell(body)
  }

  #call(call: Call): object {
    const effect = this.#effects.get(call.derived) ?? { id: this.#effects.size + 1, calls: [] }
    this.#effects.set(call.derived, effect)
    effect.calls.push(call)
    return { id: effect.id }
  }

  async #tell(event: Event): Promise<object> {
    const { key, what, step } = event
    this.#told.set(key, [...this.told(key), { ...event, now: this.epoch }])
    if (what === 'held') {
      const gate = latch()
      this.#gates.set(`${key} ${event.point} ${event.worker}`, gate)
      await gate.promise
    }
    return { fails: what === 'returned' && (this.#failures.get(key)?.delete(step) ?? false) }
  }
}
