// hono-idempotency 0.9.1, on Hono and @hono/node-server.
// Set up as in its README: `memoryStore` ("Memory Store"), or `redisStore` with a client of node-redis ("Redis Store"),
// `required` for a payments API ("Options"), and `cacheKeyPrefix` from the user who was authenticated ("cacheKeyPrefix",
// and the warning that it prints without one).

import { Readable } from 'node:stream'
import { serve } from '@hono/node-server'
import { createClient } from '@redis/client'
import { Hono } from 'hono'
import { idempotency } from 'hono-idempotency'
import { memoryStore } from 'hono-idempotency/stores/memory'
import { redisStore } from 'hono-idempotency/stores/redis'
import { host, listening, port, redisUrl, store } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS, run } from '../payments.mjs'

const app = new Hono()
app.use(async (c, next) => {
  const user = callerOf(c.req.header('authorization'))
  if (user === undefined) return c.json({ error: 'Unauthorized' }, 401)
  c.set('user', user)
  await next()
})
const cacheKeyPrefix = (c) => `${c.get('user')}:`
const client = store === 'redis' ? await createClient({ url: redisUrl }).connect() : null
const storeFor = (ttl) => (client ? redisStore({ client, ttl: ttl / 1_000 }) : memoryStore({ ttl }))
const protect = idempotency({ store: storeFor(86_400_000), required: true, cacheKeyPrefix })
const protectBriefly = idempotency({ store: storeFor(LIFETIME_MS), required: true, cacheKeyPrefix })

for (const path of PATHS) app.post(path, protect, handler)
app.post(EXPIRING, protectBriefly, handler)
app.get('/executions', (c) => c.json(count()))

async function handler(c) {
  const { status, headers, body } = await run(c.req.path, await c.req.json())
  if (Buffer.isBuffer(body)) return c.body(body, status, headers)
  if (Symbol.asyncIterator in body)
    return c.body(Readable.toWeb(Readable.from(body, { objectMode: false })), status, headers)
  return c.json(body, status, headers)
}

const server = serve({ fetch: app.fetch, port, hostname: host }, () => listening(server.address()))
