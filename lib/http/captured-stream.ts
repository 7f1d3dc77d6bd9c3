import { finished, Readable } from 'node:stream'
import type { TombstoneReason } from '../../types/index.js'
import { Timer } from '../util/timer.js'
import type { Transient, TransientSet } from '../util/transient.js'
import { stopSource } from './payload.js'

/*
 * A stream that is passed on to its client and kept: its end waits for the record, and whoever does not read does not
 * hold it up.
 */

/** What becomes of a captured stream. */
export interface StreamFate {
  /** The stream came to its end; `body` is `null` when there is no copy. When it rejects, the end is not passed on. */
  ended(body: Buffer | null): Promise<void>
  /** The stream broke off or ended short, perhaps before it gave anything; or nobody waits for its end any more. */
  failed(beforeFirstByte: boolean): Promise<void>
}

/** Something that has a source open. */
export interface Unfinished extends Transient {
  /** Nobody waits for the rest. Resolves when that is stored. */
  giveUp(): Promise<void>
}

export interface CaptureOptions {
  /** The most bytes that are kept. */
  readonly limit: number
  /** What `content-length` promises, if it does. */
  readonly expected: number | undefined
  /** Is there to be a copy? Without one the rest is of no use when the client is gone. */
  readonly keeps: boolean
  /** Milliseconds after which a client that takes nothing does not read; and for which is read what nobody reads. */
  readonly lease: number
  /** Where the stream is to be found for as long as its source is open. */
  readonly open: TransientSet<Unfinished>
}

/**
 * Passes a stream on as it comes, and keeps a copy. Only the end is held back, or the chunk that completes
 * the content-length, until the copy is stored: who has seen the end of the reply can rely on its replay.
 *
 * A client that reads slowly slows the source down. One that has taken nothing for a lease, or is gone, does not any
 * more: the source is read to its end, for the copy, for another lease and up to the limit. What is longer is given up.
 */
export class CapturedStream extends Readable implements Unfinished {
  previous: Transient | null = null
  next: Transient | null = null
  readonly #source: Readable
  readonly #fate: StreamFate
  readonly #limit: number
  readonly #expected: number
  readonly #keeps: boolean
  readonly #lease: number
  #patience: Timer<CapturedStream> | null = null
  readonly #open: TransientSet<Unfinished>
  /** `null` without a copy: there is to be none, it would be too large, or is handed over. */
  #chunks: Buffer[] | null
  #length = 0
  /** What was passed on, and how much of it the client had taken when its patience was last looked at. */
  #passed = 0
  #taken = 0
  #settled: Promise<void> | null = null
  #holding = false
  /** The client does not keep up: it is told the time. */
  #isWaiting = false
  /** The source is read for the copy, whether or not the client keeps up. */
  #isDraining = false
  #isUnread = false
  #isStopped = false
  /** Who reads ahead of the client. */
  #ahead: { resolve: (read: Buffer | TombstoneReason) => void; reject: (error: Error) => void } | null = null

  constructor(source: Readable, { limit, expected, keeps, lease, open }: CaptureOptions, fate: StreamFate) {
    super()
    this.#source = source
    this.#fate = fate
    this.#limit = limit
    this.#expected = expected ?? Number.POSITIVE_INFINITY
    this.#keeps = keeps
    this.#chunks = keeps ? [] : null
    this.#lease = lease
    this.#open = open
    open.add(this)
    // Whoever does not listen, as a hook that sends something else, must not end the process by that.
    this.on('error', () => {})
    source.on('data', this.#take)
    finished(source, { writable: false }, this.#finished)
  }

  /** There is room for more: whoever reads keeps up. */
  override _read(): void {
    if (this.#isUnread || this.#ahead !== null) return
    this.#isDraining = false
    this.#waitNoMore()
    if (!this.#holding) this.#source.resume()
  }

  /** Fastify destroys what it sends when the client is gone: the source is read to its end all the same. */
  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    this.leave()
    callback(error)
  }

  /** Nobody reads: the client is gone, or there never was one. */
  leave(): void {
    if (this.#isUnread) return
    this.#isUnread = true
    if (this.#settled === null && this.#chunks !== null) this.#drain()
    else void this.giveUp()
  }

  /**
   * Reads the source before anybody else does, for a lease and up to the limit. Resolves with all of it, or with why
   * not: then this stream is to be sent, which begins with what was read. Its fate is not asked for either.
   * @throws what the source fails with.
   */
  readAhead(): Promise<Buffer | TombstoneReason> {
    this.#drain()
    return new Promise((resolve, reject) => {
      this.#ahead = { resolve, reject }
    })
  }

  giveUp(): Promise<void> {
    if (this.#ahead !== null) {
      this.#settled = Promise.resolve()
      this.#tellAhead(new Error('Nobody waits for this reply any more'))
    }
    const isTold = this.#settled !== null || this.#isUnread
    if (this.#keeps && this.#chunks === null) void this.#end()
    this.#settled ??= this.#fate.failed(false)
    this.#stop()
    // Who gets all that was promised gets a proper end, and so does who is not there.
    if (isTold) this.#close()
    else this.destroy(new Error('The client does not read its reply'))
    return this.#settled.catch(() => {})
  }

  /** The time of a client that does not keep up is over, or that of a source which is read for nobody. */
  late(): void {
    this.#waitNoMore()
    if (this.#ahead !== null) {
      // Where there is room for more, nobody will ask for it again.
      if (this.readableLength >= this.readableHighWaterMark) this.#source.pause()
      this.#isDraining = false
      const reason = this.#chunks === null ? 'too-large' : 'stream-failed'
      this.#chunks = null
      this.#tellAhead(reason)
    } else if (this.#isUnread) {
      void this.giveUp()
    } else if (this.#passed - this.readableLength > this.#taken) {
      // It is slow, but it reads.
      this.#isDraining = false
      this.#wait()
    } else if (!this.#isDraining && this.#chunks !== null) {
      this.#drain()
    } else {
      void this.giveUp()
    }
  }

  readonly #take = (chunk: Uint8Array | string) => {
    if (this.#isStopped) return
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
    const isTooLarge = this.#isDraining && this.#chunks === null
    const isComplete = before < this.#expected && this.#length >= this.#expected
    if (this.#isUnread) {
      if (isComplete) void this.#end()
      if (isComplete || isTooLarge) void this.giveUp()
    } else if (isTooLarge) {
      this.#pass(bytes)
      this.late()
    } else if (isComplete) {
      this.#holding = true
      this.#source.pause()
      this.#end().then(
        () => {
          this.#holding = false
          this.#pass(bytes)
          if (!this.#isWaiting) this.#source.resume()
        },
        (error) => this.#breakOff(error)
      )
    } else {
      this.#pass(bytes)
    }
  }

  #pass(bytes: Buffer): void {
    if (this.#isUnread) return
    this.#passed += bytes.length
    if (!this.push(bytes) && !this.#isDraining) this.#wait()
  }

  /** The client has to take something before the source gives more. */
  #wait(): void {
    this.#source.pause()
    if (this.#isWaiting) return
    this.#isWaiting = true
    this.#taken = this.#passed - this.readableLength
    this.#startPatience()
  }

  #waitNoMore(): void {
    this.#isWaiting = false
    this.#patience?.cancel()
  }

  #startPatience(): void {
    this.#patience?.cancel()
    this.#patience = new Timer<CapturedStream>(this.#lease, (stream) => stream.late(), this, false)
  }

  /** Reads the source for the copy, as fast as it gives. */
  #drain(): void {
    this.#isDraining = true
    this.#startPatience()
    this.#source.resume()
  }

  readonly #finished = (error?: Error | null) => {
    if (this.#isStopped) return
    // Whoever passes on what another server sends may not be told that it broke off.
    if (!error && Number.isFinite(this.#expected) && this.#length < this.#expected) {
      error = new Error(`The reply stream gave ${this.#length} of the ${this.#expected} bytes of its content-length`)
    }
    this.#isStopped = true
    this.#waitNoMore()
    this.#open.delete(this)
    if (!error) {
      this.#end().then(
        () => this.#close(),
        (error) => this.#breakOff(error)
      )
      return
    }
    if (this.#ahead !== null) {
      this.#settled = Promise.resolve()
      this.#tellAhead(error)
    }
    this.#settled ??= this.#fate.failed(this.#length === 0)
    this.#settled.catch(() => {}).then(() => this.destroy(error))
  }

  /** What was passed on is not true: the reply must not come to a proper end. */
  #breakOff(error: Error): void {
    this.destroy(error)
    this.#stop()
  }

  #end(): Promise<void> {
    this.#waitNoMore()
    this.#isDraining = false
    if (this.#ahead !== null && this.#chunks !== null) {
      this.#settled = Promise.resolve()
      this.#tellAhead(Buffer.concat(this.#chunks))
    }
    this.#settled ??= this.#fate.ended(this.#chunks === null ? null : Buffer.concat(this.#chunks))
    this.#chunks = null
    return this.#settled
  }

  #tellAhead(outcome: Buffer | TombstoneReason | Error): void {
    if (outcome instanceof Error) this.#ahead?.reject(outcome)
    else this.#ahead?.resolve(outcome)
    this.#ahead = null
  }

  #close(): void {
    if (!this.destroyed && !this.readableEnded) this.push(null)
  }

  /** The source is not needed any more. */
  #stop(): void {
    this.#isStopped = true
    this.#isUnread = true
    this.#waitNoMore()
    this.#open.delete(this)
    stopSource(this.#source)
  }
}

/** As the response would write it: strings as UTF-8, whatever they were decoded from. */
function toBuffer(chunk: unknown): Buffer | null {
  if (typeof chunk === 'string') return Buffer.from(chunk)
  if (!(chunk instanceof Uint8Array)) return null
  return Buffer.isBuffer(chunk) ? chunk : Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength)
}
