import { listen } from '../../util/listen.js'
import type { CasDriver } from './driver.js'

/*
 * Waiting on a database that tells nobody of changes: at once for what this process has changed itself, by asking now and then
 * for the rest.
 */

/** How often it is asked, in milliseconds: one question for all keys that somebody waits for. */
const POLL_MS = 100
/** Not more keys than these in one question. */
const AT_ONCE = 200

/** The keys of one store that somebody in this process waits for. */
export class Watch {
  readonly #driver: CasDriver
  readonly #listeners = new Map<string, Set<() => void>>()
  #timer: NodeJS.Timeout | null = null

  constructor(driver: CasDriver) {
    this.#driver = driver
  }

  /** Resolves when no claim is running on the key, when `wake` is called, and when the signal aborts. */
  async changed(key: string, signal: AbortSignal): Promise<void> {
    if (signal.aborted) return
    const { promise, listener } = listen(signal)
    const listeners = this.#listeners.get(key) ?? new Set()
    // Before the look that follows: what ends after it is heard of.
    this.#listeners.set(key, listeners.add(listener))
    try {
      const running = await Promise.race([this.#driver.running([key]), promise])
      if (signal.aborted || running?.length === 0) return
      this.#timer ??= setTimeout(this.#poll, POLL_MS).unref()
      await promise
    } finally {
      signal.removeEventListener('abort', listener)
      listeners.delete(listener)
      if (listeners.size === 0 && this.#listeners.get(key) === listeners) this.#listeners.delete(key)
    }
  }

  /** This process has changed the key. */
  wake(key: string): void {
    for (const listener of [...(this.#listeners.get(key) ?? [])]) listener()
  }

  /** Ends all waiting. */
  close(): void {
    if (this.#timer !== null) clearTimeout(this.#timer)
    this.#timer = null
    for (const key of [...this.#listeners.keys()]) this.wake(key)
  }

  readonly #poll = async (): Promise<void> => {
    const timer = this.#timer
    const keys = [...this.#listeners.keys()]
    for (let at = 0; at < keys.length; at += AT_ONCE) {
      const asked = keys.slice(at, at + AT_ONCE)
      try {
        const running = new Set(await this.#driver.running(asked))
        for (const key of asked) if (!running.has(key)) this.wake(key)
      } catch {
        // Who waits looks for itself from time to time, and sees what is wrong.
      }
    }
    // Closed meanwhile: who waits now has started another.
    if (this.#timer !== timer) return
    this.#timer = this.#listeners.size === 0 ? null : setTimeout(this.#poll, POLL_MS).unref()
  }
}
