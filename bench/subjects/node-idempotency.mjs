import { Idempotency } from '@node-idempotency/core'
import { MemoryStorageAdapter } from '@node-idempotency/storage-adapter-memory'
import { RedisStorageAdapter } from '@node-idempotency/storage-adapter-redis'
import Fastify from 'fastify'
import { COVERED, UNCOVERED } from './route.mjs'
import { served } from './served.mjs'

/** @node-idempotency/core behind the least pair of hooks that uses it as its documentation says. */
async function build(route, storage, close) {
  const idempotency = new Idempotency(storage)
  const app = Fastify()
  const view = ({ method, url, headers, body }) => ({ method, path: url, headers, body })
  const preHandler = async (request, reply) => {
    let stored
    try {
      stored = await idempotency.onRequest(view(request))
    } catch (error) {
      return reply.code(error.code === 'REQUEST_IN_PROGRESS' ? 409 : 422).send({ error: error.message })
    }
    if (stored === undefined) {
      request.claimed = true
      return
    }
    const { status, headers } = stored.additional
    return reply.code(status).headers(headers).header('idempotent-replayed', 'true').send(stored.body)
  }
  const onSend = async (request, reply, payload) => {
    if (request.claimed) {
      const additional = { status: reply.statusCode, headers: { 'content-type': reply.getHeader('content-type') } }
      await idempotency.onResponse(view(request), { body: payload, additional })
    }
    return payload
  }
  app.decorateRequest('claimed', false)
  app.post(COVERED, { preHandler, onSend }, route.handle)
  app.post(UNCOVERED, route.handle)
  await app.ready()
  return served(app, close)
}

export async function nodeIdempotencyInMemory({ route }) {
  return build(route, new MemoryStorageAdapter())
}

export async function nodeIdempotencyOnRedis({ route, redis }) {
  const storage = new RedisStorageAdapter({ socket: { path: redis.path }, database: redis.db })
  await storage.connect()
  return build(route, storage, () => storage.disconnect())
}
