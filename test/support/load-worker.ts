import { randomUUID } from 'node:crypto'
import { appendFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import { Cluster, Redis } from 'ioredis'
import { createPool } from 'mysql2'
import { createClient, createCluster } from 'redis'
import idempotency, { type IdempotencyStore, MysqlStore, RedisStore } from '../../index.js'
import { encodeRecord } from '../../lib/stores/record-codec.js'
import { now } from './http-history.js'
import { type Job, ROUTES, type RunLine, type WorkerSetup } from './load-plan.js'

// A server as a process of its own: `node load-worker.js <setup as JSON>`. It prints its URL on a line, closes on
// SIGTERM, and changes its time of day by what `POST /clock` says.

const setup: WorkerSetup = JSON.parse(process.argv[2] as string)

let jump = 0
const RealDate = Date
const realNow = Date.now
// Libraries look it up when they need it, so they have this one.
globalThis.Date = new Proxy(RealDate, {
  construct: (target, args, newTarget) =>
    Reflect.construct(target, args.length === 0 ? [realNow() + jump] : args, newTarget),
  get: (target, name) => (name === 'now' ? () => realNow() + jump : Reflect.get(target, name))
})

const STALL = 700

const note = (line: RunLine) => appendFileSync(setup.runs, `${JSON.stringify(line)}\n`)

async function connect(redis: NonNullable<WorkerSetup['redis']>) {
  if (setup.client === 'node-redis') {
    const socket = { reconnectStrategy: 30 }
    const client = Array.isArray(redis)
      ? createCluster({ rootNodes: redis.map((socket) => ({ socket })), defaults: { socket } })
      : createClient({ socket: { ...socket, ...(redis as { path: string }) } })
    client.on('error', () => {})
    await client.connect()
    return client
  }
  const retryStrategy = () => 30
  if (!Array.isArray(redis)) return new Redis({ retryStrategy, ...redis })
  return new Cluster(redis, { clusterRetryStrategy: retryStrategy, slotsRefreshInterval: 1_000 })
}

/** A store, and what ends its connections. */
async function open(): Promise<{ store: IdempotencyStore; end: () => unknown }> {
  if (setup.mysql === undefined) {
    const redis = await connect(setup.redis ?? [])
    // Without a listener ioredis prints each failure to connect.
    redis.on('error', () => {})
    return { store: storeOn(redis), end: () => redis.disconnect() }
  }
  const pool = createPool(setup.mysql)
  const store = new MysqlStore({ pool })
  await store.createTable()
  return { store, end: () => pool.end() }
}

function storeOn(redis: Awaited<ReturnType<typeof connect>>): IdempotencyStore {
  const store = new RedisStore(redis)
  if (setup.sabotage === 'no owner check') {
    store.complete = async (key, token, record, ttl) => {
      const owner = Buffer.concat([Buffer.from('C1'), Buffer.from([token.length]), Buffer.from(token)])
      await (redis as Redis).set(`idempotency:${key}`, encodeRecord(record, owner), 'PX', ttl as number)
      return true
    }
  }
  return store
}

const app = Fastify()
const { store, end } = await open()
await app.register(idempotency, { store, ...setup.options })

for (const [name, idempotency] of Object.entries(ROUTES)) app.post(`/${name}`, { config: { idempotency } }, work)

async function work(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
  const { key, ms, fails } = request.body as Job
  const { attempt = 0 } = request.idempotency ?? {}
  const id = randomUUID()
  note({ id, key, payload: JSON.stringify(request.body), worker: setup.name, attempt, started: now() })
  if (ms > 0) await sleep(ms)
  const final = Math.random() >= fails
  const text = JSON.stringify(final ? { run: id } : { code: 'FAILED', run: id })
  note({ id, ended: now(), final, text })
  return reply
    .code(final ? 201 : 500)
    .type('application/json')
    .send(text)
}

app.post('/clock', async (request) => {
  jump = (request.body as { ms: number }).ms
  return { now: new Date().toISOString() }
})

let last = now()
setInterval(() => {
  const at = now()
  if (at - last > STALL) note({ worker: setup.name, from: last, to: at })
  last = at
}, 100)

process.on('SIGTERM', async () => {
  await app.close()
  await end()
  process.exit(0)
})

console.log(await app.listen({ host: '127.0.0.1', port: 0 }))
