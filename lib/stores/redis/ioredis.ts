import type { Writable } from 'node:stream'
import type { IoredisClient } from './client.js'
import type { Argument, Link, RedisConnection, Result, Subscriber, SubscriberEvents } from './connection.js'
import { discreet } from './errors.js'

/* Clients of ioredis, and of iovalkey, which was made from it. */

type Evaluate = (script: string, keys: number, ...keysAndArgs: Argument[]) => Promise<unknown>

/** The part of an ioredis pipeline that is used here. */
interface Pipeline {
  getBuffer(key: string): Pipeline
  pttl(key: string): Pipeline
  scanBuffer(cursor: string, match: 'MATCH', pattern: Buffer, limit: 'COUNT', count: number): Pipeline
  info(section: string): Pipeline
  set(key: string, value: string, ...options: (string | number)[]): Pipeline
  wait(replicas: number, timeout: number): Pipeline
  exec(): Promise<Result[] | null>
}

/** What is used of a client beyond what can be written as a type that all versions fit. */
interface Commands {
  readonly isCluster?: boolean
  /** Another one with each connection. A Cluster has none. */
  readonly stream?: Partial<Pick<Writable, 'cork' | 'uncork'>> | null
  readonly options?: { readonly keyPrefix?: Argument }
  setBuffer(key: string, value: Argument, ...options: string[]): Promise<unknown>
  evalshaBuffer: Evaluate
  evalBuffer: Evaluate
  config(command: 'GET', pattern: string): Promise<unknown>
  cluster(command: 'SLOTS'): Promise<unknown>
}

/** An ioredis connection that listens. */
interface Listening extends Subscriber {
  on(event: string, listener: (...args: never[]) => void): unknown
}

/** A client of ioredis: `Redis`, by Sentinel or not, or `Cluster`. */
export class IoredisConnection implements RedisConnection, Link {
  readonly isCluster: boolean
  readonly #client: IoredisClient & Commands
  /** What is written to it goes when the turn of the event loop is over. */
  #corked: Commands['stream'] = null

  constructor(client: IoredisClient) {
    this.#client = client as IoredisClient & Commands
    this.isCluster = this.#client.isCluster === true
  }

  get keyPrefix(): Argument {
    return this.#client.options?.keyPrefix ?? ''
  }

  get identity(): unknown {
    return this.#client.stream
  }

  evaluate(
    command: 'EVALSHA' | 'EVAL',
    script: string,
    keys: readonly string[],
    args: readonly Argument[]
  ): Promise<unknown> {
    if (command === 'EVAL') return this.#client.evalBuffer(script, keys.length, ...keys, ...args)
    return this.#client.evalshaBuffer(script, keys.length, ...keys, ...args)
  }

  async setOrGet(key: string, value: Argument, expiry: string): Promise<unknown> {
    this.#cork()
    try {
      return await this.#client.setBuffer(key, value, 'PX', expiry, 'NX', 'GET')
    } catch (error) {
      throw discreet(error)
    }
  }

  getWithTtl(key: string): Promise<readonly (Result | undefined)[]> {
    return this.#pipeline((pipeline) => pipeline.getBuffer(key).pttl(key))
  }

  scan(cursor: string, match: Buffer, count: number): Promise<readonly Result[]> {
    return this.#pipeline((pipeline) => pipeline.scanBuffer(cursor, 'MATCH', match, 'COUNT', count).info('server'))
  }

  async slots(): Promise<unknown> {
    try {
      return await this.#client.cluster('SLOTS')
    } catch (error) {
      throw discreet(error)
    }
  }

  hold<T>(use: (link: Link) => Promise<T>): Promise<T> {
    return use(this)
  }

  setAndWait(key: string, replicas: number, timeout: number): Promise<readonly Result[]> {
    return this.#pipeline((pipeline) => pipeline.set(key, '', 'PX', timeout).wait(replicas, timeout))
  }

  config(pattern: string): Promise<unknown> {
    return this.#client.config('GET', pattern)
  }

  listen(events: SubscriberEvents): Subscriber {
    const subscriber = duplicate(this.#client)
    subscriber.on('message', (channel: string) => events.message(channel))
    subscriber.on('close', () => events.lost())
    // A Cluster replaces the connection that it listens by when it gives up the node, and tells of nothing but that
    // (`selectSubscriber` of cluster/ClusterSubscriber.ts).
    subscriber.on('-node', () => events.lost())
    // It is given up by the caller's own rules.
    subscriber.on('end', () => events.ended())
    // Without a listener an error would end the process. Who waits polls meanwhile, and ioredis reconnects.
    subscriber.on('error', () => {})
    return subscriber
  }

  /** Claims that are asked for in one turn of the event loop are written together: a pipeline would cost more than they do. */
  #cork(): void {
    const { stream } = this.#client
    if (!stream?.cork || stream === this.#corked) return
    this.#corked = stream
    stream.cork()
    setImmediate(() => {
      if (this.#corked === stream) this.#corked = null
      stream.uncork?.()
    })
  }

  async #pipeline(build: (pipeline: Pipeline) => Pipeline): Promise<Result[]> {
    try {
      return (await build(this.#client.pipeline() as Pipeline).exec()) ?? []
    } catch (error) {
      throw discreet(error)
    }
  }
}

/** The caller's own limits on retries must not end the listening; a key prefix must not change the channels. */
function duplicate(client: IoredisClient & Commands): Listening {
  const overrides = { enableOfflineQueue: true, maxRetriesPerRequest: null, autoResubscribe: false, keyPrefix: '' }
  if (client.isCluster === true) {
    const cluster = client as unknown as {
      options?: { redisOptions?: object }
      duplicate(nodes: unknown[], options: object): Listening
    }
    const redisOptions = { ...cluster.options?.redisOptions, keyPrefix: '' }
    return cluster.duplicate([], { enableOfflineQueue: true, keyPrefix: '', redisOptions })
  }
  const single = client as unknown as { duplicate(options: object): Listening }
  return single.duplicate({ ...overrides, lazyConnect: false })
}
