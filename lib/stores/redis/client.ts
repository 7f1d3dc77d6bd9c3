/** A client of ioredis or iovalkey: `Redis`, by Sentinel or not, or `Cluster`. */
export interface IoredisClient {
  pipeline(): unknown
  evalsha(...args: never[]): Promise<unknown>
  eval(...args: never[]): Promise<unknown>
  duplicate(...args: never[]): unknown
}

/** A client of node-redis, of any kind. */
export interface NodeRedisClient {
  /** Since `connect()`. */
  readonly isOpen: boolean
  connect(): Promise<unknown>
  sendCommand(...args: never[]): Promise<unknown>
  withTypeMapping(...args: never[]): unknown
}

/**
 * What a `RedisStore` takes for a client: `Redis` or `Cluster` of `ioredis` or `iovalkey`, or what `createClient()`,
 * `createClientPool()`, `createSentinel()` or `createCluster()` of `redis` 5 and newer give.
 */
export type RedisClient = IoredisClient | NodeRedisClient
