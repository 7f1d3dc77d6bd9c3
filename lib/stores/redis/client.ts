/** A client of ioredis or iovalkey: `Redis`, by Sentinel or not, or `Cluster`. */
export interface IoredisClient {
  pipeline(): unknown
  evalsha(...args: never[]): Promise<unknown>
  eval(...args: never[]): Promise<unknown>
  duplicate(...args: never[]): unknown
}

/** What a `RedisStore` needs of a client. */
export type RedisClient = IoredisClient
