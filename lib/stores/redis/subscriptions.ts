import { listen } from '../../util/listen.js'
import type { RedisConnection, Subscriber } from './connection.js'

/* Pub/sub: one connection that hears of changes to the keys somebody waits for. */

/** Those who listen on one channel. */
class Subscription {
  readonly listeners = new Set<() => void>()
  readonly active: Promise<unknown>

  constructor(active: Promise<unknown>) {
    this.active = active
  }
}

/**
 * Wake-ups by pub/sub, on one connection for all keys. It is opened by the first who waits, and a channel is
 * subscribed once, however many listen.
 */
export class RedisSubscriptions {
  readonly #connection: Pick<RedisConnection, 'listen'>
  readonly #channels = new Map<string, Subscription>()
  #subscriber: Subscriber | null = null

  constructor(connection: Pick<RedisConnection, 'listen'>) {
    this.#connection = connection
  }

  /**
   * Resolves upon a message on the channel, or when the signal aborts.
   * @param watch Asked once the subscription stands; `false` when there is nothing to wait for.
   */
  async changed(channel: string, watch: () => Promise<boolean>, signal: AbortSignal): Promise<void> {
    if (signal.aborted) return
    const subscription = this.#subscribe(channel)
    const { promise, listener } = listen(signal)
    subscription.listeners.add(listener)
    try {
      // Only what ends after this point is sure to be heard, so only now is it time to look.
      await Promise.race([subscription.active, promise])
      if (!signal.aborted && (await Promise.race([watch(), promise])) !== false) await promise
    } finally {
      signal.removeEventListener('abort', listener)
      subscription.listeners.delete(listener)
      this.#unsubscribe(channel, subscription)
    }
  }

  /** Ends all listening, and the connection. */
  async close(): Promise<void> {
    const subscriber = this.#subscriber
    this.#subscriber = null
    for (const { listeners } of this.#channels.values()) for (const listener of listeners) listener()
    this.#channels.clear()
    subscriber?.disconnect()
  }

  #subscribe(channel: string): Subscription {
    let subscription = this.#channels.get(channel)
    if (subscription === undefined) {
      this.#subscriber ??= this.#connect()
      const created = new Subscription(this.#subscriber.subscribe(channel))
      created.active.catch(() => {
        if (this.#channels.get(channel) === created) this.#channels.delete(channel)
      })
      this.#channels.set(channel, created)
      subscription = created
    }
    return subscription
  }

  #unsubscribe(channel: string, subscription: Subscription): void {
    if (subscription.listeners.size > 0 || this.#channels.get(channel) !== subscription) return
    this.#channels.delete(channel)
    // A lost UNSUBSCRIBE costs a message that nobody listens to.
    this.#subscriber?.unsubscribe(channel).catch(() => {})
  }

  #connect(): Subscriber {
    const subscriber = this.#connection.listen({
      message: (channel) => {
        for (const listener of [...(this.#channels.get(channel)?.listeners ?? [])]) listener()
      },
      // Until it is back nobody knows what they miss: all look again, and whoever still waits then listens anew.
      lost: () => {
        if (this.#subscriber !== subscriber) return
        const lost = [...this.#channels.values()]
        this.#channels.clear()
        for (const { listeners } of lost) for (const listener of [...listeners]) listener()
      },
      // It is replaced with the next subscription.
      ended: () => {
        if (this.#subscriber === subscriber) void this.close()
      }
    })
    return subscriber
  }
}
