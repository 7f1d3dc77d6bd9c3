import { type IncomingMessage, ServerResponse } from 'node:http'

/** A response that takes whatever it is given, and sends it nowhere. */
export class NowhereResponse extends ServerResponse {
  readonly #onEnd: () => void

  /** @param onEnd Called when the response has been ended, by whomever. */
  constructor(request: IncomingMessage, onEnd: () => void) {
    super(request)
    this.#onEnd = onEnd
  }

  override writeHead(statusCode: number): this {
    this.statusCode = statusCode
    return this
  }

  override write(): boolean {
    return true
  }

  override end(): this {
    if (this.finished) return this
    this.finished = true
    this.#onEnd()
    process.nextTick(() => this.emit('close'))
    return this
  }
}
