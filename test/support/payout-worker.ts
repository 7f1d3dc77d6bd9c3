import Fastify from 'fastify'
import idempotency, { SqliteStore } from '../../index.js'
import { openSqlite } from './sqlite.js'

/* A process that pays out. With `HANG` the payout goes through, and the process does not come back from it. */

const [, , path = ''] = process.argv
const app = Fastify()
const store = new SqliteStore({ database: openSqlite(path) })
await app.register(idempotency, {
  store,
  lease: 600,
  storeTimeout: 200,
  onAbandoned: 'reject',
  target: ({ url }) => url,
  scope: (request) => String(request.headers.customer)
})
app.post('/payouts', { config: { idempotency: { required: true } } }, async (request, reply) => {
  process.stdout.write('paid out\n')
  if (process.env.HANG) await new Promise(() => {})
  return reply.code(201).send(request.body)
})
process.stdout.write(`listening on ${await app.listen({ host: '127.0.0.1', port: 0 })}\n`)
