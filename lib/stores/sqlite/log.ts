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
  /** Settles with the writing to disk that is going on. */
  #current: Promise<unknown> = Promise.resolve()
  /** The one that begins behind it. */
  #next: Promise<void> | null = null

  constructor(path: string) {
    this.#path = path
  }

  /** Resolves when all that is in the log now is on the disk. */
  written(): Promise<void> {
    this.#next ??= this.#current.then(() => {
      const writing = this.#sync()
      this.#current = writing.catch(() => {})
      this.#next = null
      return writing
    })
    return this.#next
  }

  /** Lets go of the file, until it is used again. */
  async close(): Promise<void> {
    await this.#next?.catch(() => {})
    await this.#current
    const file = this.#file
    this.#file = null
    await file?.then(
      (file) => file.close(),
      () => {}
    )
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
