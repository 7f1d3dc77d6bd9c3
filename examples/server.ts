import { randomUUID } from 'node:crypto'
import { subscribe } from 'node:diagnostics_channel'
import type { IdempotencyEvent } from '../index.js'
import { buildApp } from './app.js'
import { hasSqlite, NODE_WITH_SQLITE } from './databases.js'

const { REDIS_URL, PARTNERS_URL, PORT = '3000', HOST = '127.0.0.1' } = process.env
// Without any database: a file, where Node has SQLite.
const file = REDIS_URL === undefined && hasSqlite ? 'sqlite:example.sqlite' : undefined
const { DATABASE_URL = file } = process.env
const app = await buildApp({ redisUrl: REDIS_URL, databaseUrl: DATABASE_URL, partnersUrl: PARTNERS_URL })
const url = await app.listen({ host: HOST, port: Number(PORT) })

const curl = (key: string, body: object) =>
  `curl -i ${url}/charges -H 'content-type: application/json' -H 'idempotency-key: ${key}' -d '${JSON.stringify(body)}'`
const once = curl(randomUUID(), { amount: 4200, currency: 'EUR' })
const slow = curl(randomUUID(), { amount: 100, currency: 'EUR', processingMs: 2000 })

function place(): string {
  if (DATABASE_URL?.startsWith('sqlite:'))
    return `in the SQLite file ${DATABASE_URL.slice('sqlite:'.length)}, where they survive a restart`
  if (DATABASE_URL !== undefined) return DATABASE_URL.startsWith('mysql:') ? 'in MySQL' : 'in PostgreSQL'
  if (REDIS_URL !== undefined) return 'in Redis'
  return `in memory, because Node ${process.versions.node} has no SQLite (Node ${NODE_WITH_SQLITE} does): a restart forgets them`
}

console.log(`A payments API, its keys ${place()}. Paste these into another terminal:

# 1. The first request runs: 201
${once}

# 2. The same request again does not: the same 201, with idempotent-replayed: true
${once}

# 3. A duplicate while the first still runs: 409, with retry-after
${slow} -so /dev/null & sleep 0.5; ${slow}

# 4. Two charges were made, however often you paste: 4300 in all${DATABASE_URL === undefined ? '' : ', for each time that this server was started'}, and the sum of all entries is 0
curl -s ${url}/balance
${DATABASE_URL !== undefined ? '# Kill this server in the middle of 3, start it again, repeat 3: still one charge for its key\n' : ''}
And a form that survives a double click: ${url}/`)

// What an order does, and what it need not do again.
for (const event of ['step-stored', 'step-resumed']) {
  subscribe(`fastify-idempotency:${event}`, (message) => console.log(`${event} ${(message as IdempotencyEvent).step}`))
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void app.close())
}
