import { createHook } from 'node:async_hooks'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { type IdempotencyStore, LocalCache, MemoryStore, RedisStore } from '../../index.js'
import { build, inject } from '../support/app.js'
import { startRedis } from '../support/redis.js'

/* What a request costs, in things that can be counted. Times are the benchmark's business: they differ, these do not. */

const REQUESTS = 20

const TYPES = ['PROMISE', 'Timeout', 'Immediate']

/**
 * How many of what Node's async hooks know came into being for each request. The least of three rounds: a timer that
 * many requests share may ring in one of them, and takes a turn of the event loop then.
 */
async function costs(send: (n: number) => Promise<unknown>): Promise<Record<string, number>> {
  for (let n = 0; n < 5; n++) await send(-1 - n)
  const rounds = [await round(send, 0), await round(send, REQUESTS), await round(send, 2 * REQUESTS)]
  return Object.fromEntries(
    TYPES.map((type) => [type, Math.min(...rounds.map((counts) => counts[type] as number)) / REQUESTS])
  )
}

async function round(send: (n: number) => Promise<unknown>, from: number): Promise<Record<string, number>> {
  const counts: Record<string, number> = Object.fromEntries(TYPES.map((type) => [type, 0]))
  const hook = createHook({
    init(_, type) {
      if (type in counts) counts[type] = (counts[type] as number) + 1
    }
  }).enable()
  for (let n = from; n < from + REQUESTS; n++) await send(n)
  hook.disable()
  return counts
}

/** A few timers more than one can say: some serve many requests, and Node has its own. */
function within(t: Test, found: Record<string, number>, { promises = 0, turns = 0, timers = 0 }): void {
  const { PROMISE = 0, Timeout = 0, Immediate = 0 } = found
  t.ok(PROMISE <= promises, `${PROMISE} promises, of ${promises}`)
  t.ok(Immediate <= turns, `${Immediate} turns of the event loop, of ${turns}`)
  t.ok(Timeout <= timers + 3 / REQUESTS, `${Timeout} timers, of ${timers}`)
}

const post = (app: FastifyInstance, url: string, key?: string) =>
  inject(app, { method: 'POST', url, headers: key === undefined ? {} : { 'idempotency-key': key }, payload: { a: 1 } })

async function appOn(t: Test, store: IdempotencyStore) {
  const app = await build(t, { store })
  app.post('/', { config: { idempotency: true } }, async () => ({ done: true }))
  app.post('/bare', async () => ({ done: true }))
  await app.ready()
  const bare = await costs(() => post(app, '/bare'))
  const more = async (send: (n: number) => Promise<unknown>) => {
    const found = await costs(send)
    return Object.fromEntries(Object.entries(found).map(([type, count]) => [type, count - (bare[type] as number)]))
  }
  return { app, more, first: (n: number) => post(app, '/', `key ${n}`), replay: () => post(app, '/', 'replayed') }
}

t.test('a covered request without a key costs no promise and no timer', async (t) => {
  const { app, more } = await appOn(t, new MemoryStore())
  within(t, await more(() => post(app, '/')), { promises: 0 })
})

t.test('a first request in memory costs three promises, for a handler that returns one, and a timer', async (t) => {
  const { more, first } = await appOn(t, new MemoryStore())
  // For the renewal of its lease.
  within(t, await more(first), { promises: 3, timers: 1 })
})

t.test('a replay from memory costs no promise and no timer', async (t) => {
  const { more, replay } = await appOn(t, new MemoryStore())
  within(t, await more(replay), { promises: 0 })
})

const server = await startRedis()
t.teardown(() => server.close())

t.test('on Redis a request costs a timer for each call, and no more promises than it used to', async (t) => {
  const { more, first, replay } = await appOn(t, new RedisStore(await server.client(), { keyPrefix: 'counted:' }))
  // One turn of the event loop for all that is asked in it.
  within(t, await more(first), { promises: 34, turns: 1, timers: 3 })
  within(t, await more(replay), { promises: 17, turns: 1, timers: 1 })
})

t.test('a replay from a LocalCache costs no promise and no timer', async (t) => {
  const cache = new LocalCache(new RedisStore(await server.client(), { keyPrefix: 'cached:' }))
  const { more, replay } = await appOn(t, cache)
  within(t, await more(replay), { promises: 0 })
})

t.test('claims that are asked for at the same time go to Redis in one write', async (t) => {
  const client = await server.client()
  const { first, replay } = await appOn(t, new RedisStore(client, { keyPrefix: 'together:' }))
  await replay()
  // What comes to the system, one piece or many at a time.
  const { stream } = client as unknown as { stream: Record<'_write' | '_writev', (...args: unknown[]) => void> }
  let writes = 0
  for (const name of ['_write', '_writev'] as const) {
    const write = stream[name]
    t.intercept(stream, name, {
      value(this: typeof stream, ...args: unknown[]) {
        writes++
        return write.apply(this, args)
      }
    })
  }
  await Promise.all(Array.from({ length: 50 }, replay))
  t.ok(writes <= 3, `${writes} writes for 50 replays`)
  t.match((await first(1)).statusCode, 200)
})
