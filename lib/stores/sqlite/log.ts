import { type FileHandle, open } from 'node:fs/promises'

/*
 * What SQLite has written survives a loss of power once the disk has it. SQLite itself waits for that in the middle of
 * everything (`PRAGMA synchronous = FULL`), for milliseconds in which the process stands still. Here the process goes on, and one
 * wait is enough for all that was written before it.
 *
 * In WAL mode a transaction is on the disk when the log is: https://www.sqlite.org/wal.html. The log is there for as long as a
 * connection is, and holds no locks that would be lost with another descriptor (https://www.sqlite.org/howtocorrupt.html, 2.2).
 */

/** The log of a database in WAL mode. */
export class Log {
  readonly #path: string
  #file: Promise<FileHandle> | null = null
  /** The writing to disk that is going on. */
  #current: Promise<void> | null = null
  /** The one that begins behind it. */
  #next: Promise<void> | null = null
  /** Is there something in the log for which none has begun, or the last has failed? */
  #isBehind = false

  constructor(path: string) {
    this.#path = path
  }

  /** Something was written to it. */
  grown(): void {
    this.#isBehind = true
  }

  /** Resolves when all that was written to it by now is on the disk: at once where it is. */
  written(): Promise<void> {
    if (!this.#isBehind) return this.#current ?? Promise.resolve()
    this.#next ??= this.#begin()
    return this.#next
  }

  /** Lets go of the file, until it is used again. */
  async close(): Promise<void> {
    await this.written().catch(() => {})
    const file = this.#file
    this.#file = null
    await file?.then(
      (file) => file.close(),
      () => {}
    )
  }

  async #begin(): Promise<void> {
    await this.#current?.catch(() => {})
    this.#current = this.#next
    this.#next = null
    this.#isBehind = false
    try {
      await this.#sync()
    } catch (error) {
      this.#isBehind = true
      throw error
    } finally {
      if (this.#next === null) this.#current = null
    }
  }

  async #sync(): Promise<void> {
    this.#file ??= open(this.#path, 'r+')
    const file = this.#file
    try {
      await (await file).datasync()
    } catch (error) {
      if (this.#file === file) this.#file = null
      file.then((file) => file.close()).catch(() => {})
      throw error
    }
  }
}
