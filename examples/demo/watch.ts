import { subscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, FastifyRequest } from 'fastify'
// In a project of your own: from 'fastify-idempotency'
import { type IdempotencyEvent, idempotencyEvents } from '../../index.js'
import type { Happening, Side } from './feed.js'

/** Tells what becomes of the orders of both shops: as requests, and by the diagnostics channels of the plugin. */
export function watch(app: FastifyInstance, tell: (happening: Happening) => void): void {
  const sideOf = (request: FastifyRequest | null): Side | undefined => {
    const [, side] = /^\/(with|without)\/orders$/.exec(request?.routeOptions.url ?? '') ?? []
    return side as Side | undefined
  }
  const note = (what: string, request: FastifyRequest | null, details: object = {}) => {
    const side = sideOf(request)
    if (side !== undefined) tell({ what, at: Date.now(), side, ...details })
  }

  const replied = new WeakSet<FastifyRequest>()
  app.addHook('onRequest', async (request, reply) => {
    note('arrived', request, {
      key: request.headers['idempotency-key'],
      customer: request.headers.authorization?.replace('Bearer ', '')
    })
    reply.raw.once('close', () => {
      if (!reply.raw.writableFinished) note('hung-up', request)
    })
  })
  app.addHook('onResponse', async (request, reply) => {
    if (!reply.raw.writableFinished) return
    replied.add(request)
    const replayed = reply.getHeader('idempotent-replayed') === 'true'
    note('replied', request, { status: reply.statusCode, replayed })
  })
  for (const name of idempotencyEvents) {
    // No unsubscribing: the process has no other app.
    subscribe(`fastify-idempotency:${name}`, (message) => {
      const { request, attempt, step, differs, loss, error } = message as IdempotencyEvent
      const { code } = (error ?? {}) as { code?: string }
      // A reply that is sent while the store is away is stored later.
      const late = request !== null && replied.has(request)
      note(name, request, { attempt, step, differs, loss, code, late })
    })
  }
}
