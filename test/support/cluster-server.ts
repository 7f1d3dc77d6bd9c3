import cluster from 'node:cluster'
import Fastify from 'fastify'
import idempotency, { MemoryStore, SqliteStore } from '../../index.js'
import { openSqlite } from './sqlite.js'

// Two workers of node:cluster on one port: `node cluster-server.js [file of SQLite]`, without a file each with a memory of
// its own. Prints the port when both are there. A reply names the worker that sent it, and in its body the one that ran.

const [, , file] = process.argv

if (cluster.isPrimary) {
  let listening = 0
  cluster.on('listening', (_worker, { port }) => {
    if (++listening === 2) console.log(`port ${port}`)
  })
  for (let n = 0; n < 2; n++) cluster.fork()
} else {
  const app = Fastify()
  app.addHook('onRequest', async (_request, reply) => {
    reply.header('x-worker', process.pid)
  })
  const store = file === undefined ? new MemoryStore() : new SqliteStore({ database: openSqlite(file) })
  await app.register(idempotency, { store })
  app.post('/', { config: { idempotency: true } }, async () => `ran in ${process.pid}`)
  await app.listen({ host: '127.0.0.1', port: 0 })
}
