/* What a store needs of a client of Redis, whichever library it is from: ioredis.ts and node-redis.ts give it. */

export type Argument = string | Buffer

/** What one of several commands gave. */
export type Result = [error: Error | null, result: unknown]

/** One connection to one server, unless it is lost meanwhile. */
export interface Link {
  /**
   * Changes whenever the client connects, perhaps to another server.
   * @throws where that cannot be told.
   */
  readonly identity: unknown
  /** A script by its hash, or itself. Text comes as bytes, and numbers may come as text. */
  evaluate(
    command: 'EVALSHA' | 'EVAL',
    script: string,
    keys: readonly string[],
    args: readonly Argument[]
  ): Promise<unknown>
  /** SET of a key that lasts as long as the waiting, and WAIT, by the same connection. */
  setAndWait(key: string, replicas: number, timeout: number): Promise<readonly Result[]>
}

/**
 * The commands of a store. Errors are without what was sent, but for those within results. The client's own prefix comes
 * before keys, and not before channels.
 */
export interface RedisConnection extends Omit<Link, 'identity' | 'setAndWait'> {
  readonly isCluster: boolean
  /** The client's own prefix. */
  readonly keyPrefix: Argument
  /** SET NX GET: `null` where the key was free, else what it has, as bytes. */
  setOrGet(key: string, value: Argument, expiry: string): Promise<unknown>
  /** GET and PTTL of one key. */
  getWithTtl(key: string): Promise<readonly (Result | undefined)[]>
  /**
   * SCAN, and INFO of the server that has answered it. Names are whole: the client's own prefix is in them, and in what they
   * have to match. Not of a Cluster.
   */
  scan(cursor: string, match: Buffer, count: number): Promise<readonly (Result | undefined)[]>
  /** CLUSTER SLOTS. */
  slots(): Promise<unknown>
  /** What goes by one connection, or by one whose `identity` shows that it is another. */
  hold<T>(use: (link: Link) => Promise<T>): Promise<T>
  /** CONFIG GET: a list of names and values in turn, or what has them as a map. */
  config(pattern: string): Promise<unknown>
  /** A connection of its own to listen on. None of its errors ends the process, nor do limits of the caller's end it. */
  listen(events: SubscriberEvents): Subscriber
}

/** What somebody who listens is told. */
export interface SubscriberEvents {
  message(channel: string): void
  /** What was said meanwhile is not heard. Channels have to be subscribed again. */
  lost(): void
  /** It does not come back: another one is needed. */
  ended(): void
}

export interface Subscriber {
  subscribe(channel: string): Promise<unknown>
  unsubscribe(channel: string): Promise<unknown>
  disconnect(): void
}
