import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { Counter, Gauge, Histogram, type Registry } from 'prom-client'
// In a project of your own: from 'fastify-idempotency'
import { type IdempotencyEvent, type IdempotencyEventName, type IdempotencyStore, idempotencyEvents } from '../index.js'

/** What a claim ends with. */
const ENDS: ReadonlySet<IdempotencyEventName> = new Set(['stored', 'released', 'tombstoned', 'lease-lost'])

/** The calls of a store that take as long as the store does. */
const CALLS = ['acquire', 'renew', 'step', 'complete', 'release', 'get', 'delete', 'list', 'settle', 'begin'] as const

/**
 * Metrics of what the plugin does in this process. To be called before the routes are declared:
 *
 *     const { timed } = idempotencyMetrics(app, register)
 *     await app.register(idempotency, { store: timed(new RedisStore(app.redis)) })
 */
export function idempotencyMetrics(app: FastifyInstance, register: Registry) {
  const registers = [register]
  const events = new Counter({
    name: 'idempotency_events_total',
    help: 'What became of requests with a key. For conflicts and refusals, code says why.',
    labelNames: ['event', 'route', 'code'] as const,
    registers
  })
  const running = new Gauge({
    name: 'idempotency_claims_running',
    help: 'Keys that requests of this process hold.',
    labelNames: ['route'] as const,
    registers
  })
  const waits = new Histogram({
    name: 'idempotency_duplicate_wait_seconds',
    help: 'From the arrival of a duplicate until it was clear what it gets.',
    labelNames: ['outcome', 'route'] as const,
    buckets: [0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60],
    registers
  })
  const calls = new Histogram({
    name: 'idempotency_store_seconds',
    help: 'How long the store takes to answer.',
    labelNames: ['operation', 'result'] as const,
    buckets: [0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2],
    registers
  })

  const arrivals = new WeakMap<FastifyRequest, number>()
  const holders = new WeakSet<FastifyRequest>()

  const count = (event: IdempotencyEventName, { request, route, error }: IdempotencyEvent) => {
    const code =
      event === 'conflict' || event === 'refused' ? String((error as { code?: string } | undefined)?.code) : ''
    events.inc({ event, route, code })
    if (request === null) return
    if (event === 'acquired' && !holders.has(request)) {
      holders.add(request)
      running.inc({ route })
    } else if (ENDS.has(event) && holders.delete(request)) {
      running.dec({ route })
    }
    const arrival = arrivals.get(request)
    if (arrival !== undefined && (event === 'replayed' || event === 'conflict')) {
      waits.observe({ outcome: event, route }, (performance.now() - arrival) / 1_000)
    }
  }

  const subscriptions = idempotencyEvents.map((event) => ({
    channel: `fastify-idempotency:${event}`,
    listener: (message: unknown) => count(event, message as IdempotencyEvent)
  }))
  for (const { channel, listener } of subscriptions) subscribe(channel, listener)
  app.addHook('onClose', async () => {
    for (const { channel, listener } of subscriptions) unsubscribe(channel, listener)
  })

  app.addHook('onRequest', (request, _reply, done) => {
    arrivals.set(request, performance.now())
    done()
  })

  /** The same store, whose answers are timed. */
  const timed = (store: IdempotencyStore): IdempotencyStore => {
    const timer = (operation: (typeof CALLS)[number]) => {
      const call = store[operation] as undefined | ((...args: unknown[]) => Promise<unknown>)
      if (call === undefined) return {}
      const measured = async (...args: unknown[]) => {
        const end = calls.startTimer({ operation })
        try {
          const answer = await call.apply(store, args)
          end({ result: 'answer' })
          return answer
        } catch (error) {
          end({ result: 'error' })
          throw error
        }
      }
      return { [operation]: measured }
    }
    // Waiting for a change takes as long as the first request does: that is not the store's time.
    const { changed, close, sharesLocks } = store
    return Object.assign({}, ...CALLS.map(timer), {
      ...(sharesLocks && { sharesLocks }),
      ...(changed && { changed: changed.bind(store) }),
      ...(close && { close: close.bind(store) })
    }) as IdempotencyStore
  }

  return { timed }
}
