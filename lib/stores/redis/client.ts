/** What a `RedisStore` needs of an ioredis client (`Redis` or `Cluster`). */
export interface RedisClient {
  pipeline(): unknown
  evalsha(...args: never[]): Promise<unknown>
  eval(...args: never[]): Promise<unknown>
  duplicate(...args: never[]): unknown
}
