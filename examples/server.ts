import { randomUUID } from 'node:crypto'
import { subscribe } from 'node:diagnostics_channel'
import type { IdempotencyEvent } from '../index.js'
import { buildApp } from './app.js'

const { REDIS_URL, DATABASE_URL, PARTNERS_URL, PORT = '3000', HOST = '127.0.0.1' } = process.env
const app = await buildApp({ redisUrl: REDIS_URL, databaseUrl: DATABASE_URL, partnersUrl: PARTNERS_URL })
const url = await app.listen({ host: HOST, port: Number(PORT) })

const curl = (key: string, body: object) =>
  `curl -i ${url}/charges -H 'content-type: application/json' -H 'idempotency-key: ${key}' -d '${JSON.stringify(body)}'`
const once = curl(randomUUID(), { amount: 4200, currency: 'EUR' })
const slow = curl(randomUUID(), { amount: 100, currency: 'EUR', processingMs: 2000 })

const place = DATABASE_URL !== undefined ? 'in PostgreSQL' : REDIS_URL !== undefined ? 'in Redis' : 'in memory'

console.log(`A payments API, its keys ${place}. Paste these into another terminal:

# 1. The first request runs: 201
${once}

# 2. The same request again does not: the same 201, with idempotent-replayed: true
${once}

# 3. A duplicate while the first still runs: 409, with retry-after
${slow} -so /dev/null & sleep 0.5; ${slow}

# 4. Two charges were made, however often you paste: 4300 in all, and the sum of all entries is 0
curl -s ${url}/balance
${place === 'in PostgreSQL' ? '# Kill this server in the middle of 3, start it again, repeat 3: still one charge for its key\n' : ''}
And a form that survives a double click: ${url}/`)

// What an order does, and what it need not do again.
for (const event of ['step-stored', 'step-resumed']) {
  subscribe(`fastify-idempotency:${event}`, (message) => console.log(`${event} ${(message as IdempotencyEvent).step}`))
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void app.close())
}
