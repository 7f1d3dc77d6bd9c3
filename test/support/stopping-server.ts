import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
import idempotency, { SqliteStore } from '../../index.js'
import type { Given } from '../docs/given.js'
import { openSqlite } from './sqlite.js'

// A server as a process of its own, that ends as docs/deployment.md says: `node stopping-server.js <file of SQLite>`. It
// prints its port, and what its one handler is at; that ends when the server has begun to close.

const snippet = new URL('../docs/snippets/deployment-stop.js', import.meta.url).href
const { run } = (await import(snippet)) as { run(given: Partial<Given>): Promise<unknown> }

const database = openSqlite(process.argv[2] as string)
const app = Fastify() as unknown as FastifyInstance
app.addHook('onClose', async () => database.close())
await app.register(idempotency, { store: new SqliteStore({ database }) })
await run({ app })
app.post('/', { config: { idempotency: true } }, async () => {
  console.log('running')
  // The connections that are idle have been closed by then. This one is not.
  while (app.server.listening) await sleep(1)
  return 'done'
})
app.get('/', async () => 'idle')

await app.listen({ host: '127.0.0.1', port: 0 })
console.log(`port ${(app.server.address() as AddressInfo).port}`)
