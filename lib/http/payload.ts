import { PassThrough, Readable } from 'node:stream'
import { ReadableStream, type ReadableStream as WebReadableStream } from 'node:stream/web'

/* What a reply may be made of, and how it is read. */

/** A payload as onSend sees it. */
export type Payload = string | Buffer | null | undefined | NodeJS.ReadableStream | WebReadableStream | Response

/** Is the payload at hand as a whole? All else has to be read first. */
export function isBuffered(payload: Payload): payload is string | Buffer | null | undefined {
  return payload === undefined || payload === null || typeof payload === 'string' || Buffer.isBuffer(payload)
}

export function isResponse(payload: unknown): payload is Response {
  return Object.prototype.toString.call(payload) === '[object Response]'
}

/** As a Node stream; `null` for what is none, or is in use already, which Fastify reports better than we could. */
export function asStream(payload: Payload): Readable | null {
  if (typeof payload !== 'object' || payload === null) return null
  if ('getReader' in payload) {
    if (payload.locked) return null
    return payload instanceof ReadableStream ? Readable.fromWeb(payload) : fromForeignWeb(payload)
  }
  if (!('pipe' in payload)) return null
  // What cannot be paused is known by its `pipe` only.
  if ('resume' in payload && 'pause' in payload) return payload as Readable
  const through = new PassThrough({
    destroy(error, callback) {
      stopSource(payload)
      callback(error)
    }
  })
  ;(payload as NodeJS.ReadableStream).on('error', (error) => through.destroy(error))
  return (payload as NodeJS.ReadableStream).pipe(through)
}

/** A web stream that is not of this platform. Not by a generator: one that waits for a chunk cannot be told to stop. */
function fromForeignWeb(stream: WebReadableStream): Readable {
  const reader = stream.getReader()
  return new Readable({
    objectMode: true,
    read() {
      reader.read().then(
        ({ done, value }) => this.push(done ? null : value),
        (error) => this.destroy(error)
      )
    },
    destroy(error, callback) {
      reader.cancel(error).then(
        () => callback(error),
        () => callback(error)
      )
    }
  })
}

/** Of a reply that is not sent: its source is not left open. */
export function dropStream(payload: Payload): void {
  asStream(payload)
    ?.on('error', () => {})
    .destroy()
}

/** Nobody needs the rest. Streams that are not Node's know other words for it, the same ones as Fastify looks for. */
export function stopSource(source: object): void {
  const { destroy, close, abort } = source as Record<string, (() => void) | undefined>
  ;(destroy ?? close ?? abort)?.call(source)
}
