import { type IncomingMessage, ServerResponse } from 'node:http'

function callBack(args: unknown[]): void {
  const callback = args.findLast((arg) => typeof arg === 'function')
  if (callback !== undefined) process.nextTick(callback as () => void)
}

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

  override write(...args: unknown[]): boolean {
    callBack(args)
    return true
  }

  override end(...args: unknown[]): this {
    callBack(args)
    if (this.finished) return this
    this.finished = true
    this.#onEnd()
    process.nextTick(() => {
      for (const event of ['prefinish', 'finish', 'close']) this.emit(event)
    })
    return this
  }
}
