import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyRequest } from 'fastify'
import { Redis } from 'ioredis'
import idempotency, { type IdempotencyOptions, RedisStore } from '../../index.js'

/** What a job asks of the worker. */
export interface Job {
  /** The name under which its runs are counted, in Redis: `runs:<name>`. */
  name: string
  /** The handler takes this long. */
  ms?: number
  /** The handler goes on when this Redis key exists, and fails when it does not after a minute. */
  until?: string
}

/** What a job's handler says. */
export interface Done {
  /** How many runs of this job there were, this one included. */
  run: number
  attempt: number
  pid: number
}

// A server as a process of its own, to be killed or paused: `node worker.js <options as JSON>`, REDIS_PATH says where
// Redis is. It prints its URL on a line. A handler whose signal aborts says so in the Redis list `aborted:<name>`.

const options: IdempotencyOptions = JSON.parse(process.argv[2] ?? '{}')
const redis = new Redis({ path: process.env.REDIS_PATH as string })
const counters = new Redis({ path: process.env.REDIS_PATH as string })

const app = Fastify({ forceCloseConnections: true })
await app.register(idempotency, { store: new RedisStore(redis), ...options })
app.post('/jobs', { config: { idempotency: true } }, async (request: FastifyRequest<{ Body: Job }>, reply) => {
  const { name, ms = 0, until } = request.body
  const { attempt = 0, signal } = request.idempotency ?? {}
  signal?.addEventListener('abort', () => void counters.rpush(`aborted:${name}`, process.pid))
  const run = await counters.incr(`runs:${name}`)
  await sleep(ms)
  for (const end = Date.now() + 60_000; until !== undefined && !(await counters.exists(until)); await sleep(10)) {
    if (Date.now() > end) throw new Error(`Nobody set ${until}`)
  }
  return reply.code(201).send({ run, attempt, pid: process.pid } satisfies Done)
})

console.log(await app.listen({ host: '127.0.0.1', port: 0 }))
