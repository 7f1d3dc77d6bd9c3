import { listen } from '../../util/listen.js'
import { waitAtMost } from '../../util/timeout.js'
import type { PostgresPool } from './pool.js'
import { messageOf } from './rows.js'
import { CHANNEL } from './statements.js'

/* LISTEN: one connection that hears of changes to the keys somebody waits for. */

/** The part of a `pg` client that listens. */
interface Listener {
  on(event: string, listener: (message: { payload?: string }) => void): unknown
  connect(): Promise<unknown>
  query(text: string): Promise<unknown>
  end(): Promise<void>
  readonly connection?: { readonly stream?: { destroy(): void } }
}

/** How long the connection may take to end. */
const PATIENCE_MS = 1_000
/** After a connection that failed, how long none is tried. */
const RETRY_AFTER_MS = 1_000

/**
 * Wake-ups by NOTIFY, on one connection for all keys, which is opened by the first who waits. It is not one of the
 * pool's, so that who waits takes nothing from those who work.
 */
export class PostgresNotifications {
  readonly #pool: PostgresPool
  readonly #listeners = new Map<string, Set<() => void>>()
  #client: Listener | null = null
  #connection: Promise<void> | null = null
  #failedAt = Number.NEGATIVE_INFINITY

  constructor(pool: PostgresPool) {
    this.#pool = pool
  }

  /**
   * Resolves upon a message about the key, when the connection is lost, or when the signal aborts.
   * @param watch Asked once the connection listens; `false` when there is nothing to wait for.
   */
  async changed(key: string, watch: () => Promise<boolean>, signal: AbortSignal): Promise<void> {
    if (signal.aborted) return
    const message = messageOf(key)
    const { promise, listener } = listen(signal)
    const listeners = this.#listeners.get(message) ?? new Set()
    this.#listeners.set(message, listeners.add(listener))
    try {
      // Only what ends after this point is sure to be heard, so only now is it time to look.
      await Promise.race([this.#connected(), promise])
      if (!signal.aborted && (await Promise.race([watch(), promise])) !== false) await promise
    } finally {
      signal.removeEventListener('abort', listener)
      listeners.delete(listener)
      if (listeners.size === 0) this.#listeners.delete(message)
    }
  }

  /** Ends all listening, and the connection. */
  async close(): Promise<void> {
    const client = this.#client
    this.#forget()
    if (client === null) return
    await waitAtMost(
      PATIENCE_MS,
      client.end().catch(() => {})
    )
    // A connection that does not even end properly.
    client.connection?.stream?.destroy()
  }

  /** Resolves when the connection listens. */
  #connected(): Promise<void> {
    if (this.#connection === null) {
      if (performance.now() - this.#failedAt < RETRY_AFTER_MS) {
        throw new Error('The connection for wake-ups has just failed')
      }
      const { Client, options } = this.#pool as unknown as {
        Client: new (options: object) => Listener
        options: object
      }
      this.#client = new Client(options)
      this.#connection = this.#listen(this.#client)
    }
    return this.#connection
  }

  async #listen(client: Listener): Promise<void> {
    let listening = false
    const lost = () => {
      if (listening && this.#client === client) this.#forget()
    }
    client.on('notification', ({ payload = '' }) => this.#wake(payload))
    client.on('error', lost)
    client.on('end', lost)
    try {
      await client.connect()
      await client.query(`LISTEN "${CHANNEL}"`)
      listening = true
    } catch (error) {
      this.#failedAt = performance.now()
      if (this.#client === client) {
        this.#client = null
        this.#connection = null
      }
      client.end().catch(() => {})
      throw error
    }
  }

  /** The connection is no more, and nobody knows what they have missed: the next who waits opens another. */
  #forget(): void {
    this.#client = null
    this.#connection = null
    for (const message of [...this.#listeners.keys()]) this.#wake(message)
  }

  #wake(message: string): void {
    for (const listener of [...(this.#listeners.get(message) ?? [])]) listener()
  }
}
