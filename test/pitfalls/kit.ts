import { randomUUID } from 'node:crypto'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import type { Redis } from 'ioredis'
import type { Test } from 'tap'
import idempotency, {
  type Claim,
  type IdempotencyOptions,
  type IdempotencyStore,
  MemoryStore,
  RedisStore,
  type StoredRecord
} from '../../index.js'
import { post } from '../interop/kit.js'
import { until } from '../support/latch.js'
import type { RedisServer } from '../support/redis.js'

export function redisStore(client: Redis, keyPrefix = `${randomUUID()}:`): RedisStore {
  return new RedisStore(client, { keyPrefix })
}

/** Opens one more access to the same data, as another process would. */
export type Open = () => Promise<IdempotencyStore>

export interface Kind {
  name: string
  /** An empty store. */
  fresh(): Open
}

/** The stores that the plugin comes with. */
export function kinds(redis: RedisServer): Kind[] {
  return [
    {
      name: 'in memory',
      fresh() {
        const store = new MemoryStore()
        // Several objects, because the plugin knows by the object which claims are its own.
        return async () => new Delegate(store)
      }
    },
    {
      name: 'in Redis',
      fresh() {
        const keyPrefix = `${randomUUID()}:`
        return async () => redisStore(await redis.client(), keyPrefix)
      }
    }
  ]
}

/** A store that hands everything on, and is the place to disturb it. */
export class Delegate implements IdempotencyStore {
  readonly inner: IdempotencyStore

  constructor(inner: IdempotencyStore = new MemoryStore()) {
    this.inner = inner
  }

  acquire(key: string, claim: Claim) {
    return this.inner.acquire(key, claim)
  }

  renew(key: string, token: string, leaseMs: number) {
    return this.inner.renew(key, token, leaseMs)
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
    return this.inner.complete(key, token, record, ttlMs)
  }

  release(key: string, token: string) {
    return this.inner.release(key, token)
  }

  changed(key: string, signal: AbortSignal) {
    return this.inner.changed?.(key, signal) ?? Promise.resolve()
  }

  async get(key: string) {
    return (await this.inner.get?.(key)) ?? null
  }

  async delete(key: string) {
    return (await this.inner.delete?.(key)) ?? false
  }

  async close() {
    await this.inner.close?.()
  }
}

/** A process that cannot reach the store any more, while its handlers go on. */
export class CutOff extends Delegate {
  cut = false
  #check() {
    if (this.cut) throw new Error('connection lost')
  }

  override async renew(...args: Parameters<Delegate['renew']>) {
    this.#check()
    return super.renew(...args)
  }

  override async complete(...args: Parameters<Delegate['complete']>) {
    this.#check()
    return super.complete(...args)
  }

  override async release(...args: Parameters<Delegate['release']>) {
    this.#check()
    return super.release(...args)
  }
}

export type Handler = (request: FastifyRequest, reply: FastifyReply) => unknown

/** A server whose `POST /` is covered. */
export async function serve(t: Test, options: IdempotencyOptions, handler: Handler): Promise<FastifyInstance> {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, options)
  app.post('/', { config: { idempotency: true } }, handler as (request: FastifyRequest) => Promise<unknown>)
  await app.ready()
  return app
}

type InjectResponse = Awaited<ReturnType<typeof post>>

/** Repeats the request with the key `key` until its reply is accepted. */
export async function postUntil(app: FastifyInstance, accepts: (reply: InjectResponse) => boolean) {
  let reply: InjectResponse | undefined
  await until(async () => {
    reply = await post(app, { key: 'key' })
    return accepts(reply)
  })
  return reply as InjectResponse
}

/** How many replies have which status. */
export function tally(replies: readonly { statusCode: number }[]): Record<number, number> {
  const counts: Record<number, number> = {}
  for (const { statusCode } of replies) counts[statusCode] = (counts[statusCode] ?? 0) + 1
  return counts
}

export function times<T>(n: number, make: (i: number) => T): T[] {
  return Array.from({ length: n }, (_, i) => make(i))
}
