import { finished, PassThrough, Readable } from 'node:stream'
import { ReadableStream, type ReadableStream as WebReadableStream } from 'node:stream/web'
import type { FastifyReply } from 'fastify'
import type { StoredHeader, StoredReply, Tombstone, TombstoneReason } from '../types/index.js'

/**
 * Headers that belong to one connection, one client or one moment (RFC 9110 §7.6.1, RFC 9111 §3.1), beside
 * all of `proxy-*`.
 */
const NEVER_STORED: ReadonlySet<string> = new Set([
  'set-cookie',
  'connection',
  'keep-alive',
  'transfer-encoding',
  'content-length',
  'trailer',
  'upgrade',
  'date',
  'www-authenticate'
])

export type Headers = ReturnType<FastifyReply['getHeaders']>

/** The headers on a reply, as they are now. */
export function snapshot(reply: FastifyReply): Headers {
  const headers = reply.getHeaders()
  for (const name in headers) {
    const value = headers[name as keyof Headers]
    if (Array.isArray(value)) headers[name as keyof Headers] = [...value] as never
  }
  return headers
}

/** The headers that have come or changed since the snapshot. */
export function headersSince(
  before: Headers,
  reply: FastifyReply,
  { excludeHeaders, replayHeader }: { excludeHeaders: ReadonlySet<string>; replayHeader: string | null }
): StoredHeader[] {
  const stored: StoredHeader[] = []
  const now = reply.getHeaders()
  for (const name in now) {
    const value = now[name as keyof Headers]
    if (value === undefined || equal(value, before[name as keyof Headers])) continue
    if (NEVER_STORED.has(name) || name.startsWith('proxy-')) continue
    if (excludeHeaders.has(name) || name === replayHeader) continue
    stored.push([name, Array.isArray(value) ? value.map(String) : String(value)])
  }
  return stored
}

function equal(a: Headers[keyof Headers], b: Headers[keyof Headers]): boolean {
  if (!Array.isArray(a) || !Array.isArray(b)) return a === b
  return a.length === b.length && a.every((item, index) => item === b[index])
}

/** A payload as onSend sees it. */
export type Payload = string | Buffer | null | undefined | NodeJS.ReadableStream | WebReadableStream | Response

/** The record of a reply whose body is at hand. */
export function replyRecord(
  fingerprint: string,
  statusCode: number,
  headers: StoredHeader[],
  body: string | Buffer | null | undefined
): StoredReply {
  return {
    kind: 'reply',
    fingerprint,
    createdAt: Date.now(),
    statusCode,
    headers,
    body: typeof body === 'string' ? Buffer.from(body) : (body ?? Buffer.alloc(0)),
    text: typeof body === 'string'
  }
}

export function tombstone(fingerprint: string, reason: TombstoneReason): Tombstone {
  return { kind: 'tombstone', fingerprint, createdAt: Date.now(), reason }
}

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
    return payload instanceof ReadableStream ? Readable.fromWeb(payload) : Readable.from(chunksOf(payload))
  }
  if (!('pipe' in payload)) return null
  // What cannot be paused is known by its `pipe` only.
  if ('resume' in payload && 'pause' in payload) return payload as Readable
  const through = new PassThrough()
  ;(payload as NodeJS.ReadableStream).on('error', (error) => through.destroy(error))
  return (payload as NodeJS.ReadableStream).pipe(through)
}

/** A web stream that is not of this platform. */
async function* chunksOf(stream: WebReadableStream): AsyncGenerator<unknown> {
  const reader = stream.getReader()
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value
  } finally {
    await reader.cancel()
  }
}

/** What becomes of a captured stream. */
export interface StreamFate {
  /** The stream came to its end; `body` is `null` when it was too large to keep. When it rejects, the end is not passed on. */
  ended(body: Buffer | null): Promise<void>
  /** The stream broke off, perhaps before it gave anything. */
  failed(beforeFirstByte: boolean): Promise<void>
}

export interface CaptureOptions {
  /** The most bytes that are kept. */
  readonly limit: number
  /** What `content-length` promises, if it does. */
  readonly expected: number | undefined
  /** Is the rest still of use when the client is gone? */
  readonly drain: boolean
}

/**
 * Passes a stream on as it comes, and keeps a copy. Only the end is held back, or the chunk that completes
 * the content-length, until the copy is stored: who has seen the end of the reply can rely on its replay.
 */
export class CapturedStream extends Readable {
  readonly #source: Readable
  readonly #fate: StreamFate
  readonly #limit: number
  readonly #expected: number
  readonly #drain: boolean
  /** `null` once they are more than can be kept, or are handed over. */
  #chunks: Buffer[] | null = []
  #length = 0
  #settled: Promise<void> | null = null
  #holding = false
  #clientGone = false

  constructor(source: Readable, { limit, expected, drain }: CaptureOptions, fate: StreamFate) {
    super()
    this.#source = source
    this.#fate = fate
    this.#limit = limit
    this.#expected = expected ?? Number.POSITIVE_INFINITY
    this.#drain = drain
    source.on('data', this.#take)
    finished(source, { writable: false }, this.#finished)
  }

  override _read(): void {
    if (!this.#holding) this.#source.resume()
  }

  /** Fastify destroys what it sends when the client is gone: the source is read to its end all the same. */
  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    this.#clientGone = true
    if (this.#settled === null && !this.#drain) {
      this.#settled = this.#fate.failed(false)
      this.#settled.catch(() => {})
    }
    if (this.#settled !== null || this.#chunks === null) this.#stop()
    else this.#source.resume()
    callback(error)
  }

  readonly #take = (chunk: Uint8Array | string) => {
    const bytes = toBuffer(chunk)
    if (bytes === null) {
      this.#source.off('data', this.#take)
      this.#source.destroy(new TypeError('A reply stream must give strings or bytes'))
      return
    }
    const before = this.#length
    this.#length += bytes.length
    if (this.#length > this.#limit) this.#chunks = null
    this.#chunks?.push(bytes)
    if (this.#clientGone) {
      if (this.#chunks === null) this.#stop()
    } else if (before < this.#expected && this.#length >= this.#expected) {
      this.#holding = true
      this.#source.pause()
      this.#end().then(
        () => {
          this.#holding = false
          this.#pass(bytes)
          this.#source.resume()
        },
        (error) => this.#breakOff(error)
      )
    } else {
      this.#pass(bytes)
    }
  }

  #pass(bytes: Buffer): void {
    if (!this.#clientGone && !this.push(bytes)) this.#source.pause()
  }

  readonly #finished = (error?: Error | null) => {
    if (!error) {
      this.#end().then(
        () => {
          if (!this.#clientGone) this.push(null)
        },
        (error) => this.#breakOff(error)
      )
      return
    }
    this.#settled ??= this.#fate.failed(this.#length === 0)
    this.#settled.catch(() => {}).then(() => this.destroy(error))
  }

  /** What was passed on is not true: the reply must not come to a proper end. */
  #breakOff(error: Error): void {
    this.destroy(error)
    this.#source.destroy?.()
  }

  #end(): Promise<void> {
    this.#settled ??= this.#fate.ended(this.#chunks === null ? null : Buffer.concat(this.#chunks))
    this.#chunks = null
    return this.#settled
  }

  /** Nobody receives the rest, and it cannot be kept. */
  #stop(): void {
    this.#end().catch(() => {})
    this.#source.destroy?.()
  }
}

/** As the response would write it: strings as UTF-8, whatever they were decoded from. */
function toBuffer(chunk: unknown): Buffer | null {
  if (typeof chunk === 'string') return Buffer.from(chunk)
  if (!(chunk instanceof Uint8Array)) return null
  return Buffer.isBuffer(chunk) ? chunk : Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength)
}
