import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { type Meter, metrics, type Span, SpanStatusCode, trace } from '@opentelemetry/api'
import type { FastifyInstance, FastifyRequest } from 'fastify'
// In a project of your own: from 'fastify-idempotency'
import { type IdempotencyEvent, type IdempotencyEventName, idempotencyEvents } from '../index.js'

/**
 * Notes on the span of each request with a key what the plugin does with it: as span events, and as attributes by which
 * traces are found. A trace of a replay leads to that of the first request: both have the same `idempotency.key`.
 *
 * @param spanOf The span of a request: with @fastify/otel `(request) => request.opentelemetry().span`.
 */
export function traceIdempotency(
  app: FastifyInstance,
  spanOf: (request: FastifyRequest) => Span | null | undefined = () => trace.getActiveSpan()
): void {
  // Looked up on arrival: what is told later may come from a timer, or from another request that wakes this one.
  const spans = new WeakMap<FastifyRequest, Span>()
  app.addHook('onRequest', (request, _reply, done) => {
    const span = spanOf(request)
    if (span) spans.set(request, span)
    done()
  })

  const note = (name: IdempotencyEventName, { request, key, attempt, error, step }: IdempotencyEvent) => {
    // What is no request runs in the span of its caller.
    const span = request === null ? trace.getActiveSpan() : spans.get(request)
    // A reply may be stored when its request, and the span, is long over.
    if (!span?.isRecording()) return
    const code = (error as { code?: string } | undefined)?.code
    span.addEvent(`idempotency.${name}`, {
      'idempotency.attempt': attempt,
      ...(step !== undefined && { 'idempotency.step': step }),
      ...(code && { 'error.type': code })
    })
    if (step !== undefined) return
    // A hash: the client's key is nowhere in the messages.
    if (key === '') return
    span.setAttributes({ 'idempotency.key': key, 'idempotency.outcome': name, 'idempotency.attempt': attempt })
    if (name === 'replayed') span.setAttribute('idempotency.replayed', true)
    if (name === 'lease-lost' || name === 'store-error') {
      if (error instanceof Error) span.recordException(error)
      span.setStatus({ code: SpanStatusCode.ERROR, message: `idempotency ${name}` })
    }
  }

  listen(app, note)
}

/** What a claim ends with. */
const ENDS: ReadonlySet<IdempotencyEventName> = new Set(['stored', 'released', 'tombstoned', 'lease-lost'])

/**
 * Metrics of the same, by the OpenTelemetry API: `idempotency.events` counts what becomes of requests with a key,
 * `idempotency.claims` is how many keys requests of this process hold. They have the attributes `idempotency.event`,
 * `http.route`, and `error.type` where there is an error.
 */
export function measureIdempotency(app: FastifyInstance, meter: Meter = metrics.getMeter('fastify-idempotency')): void {
  const events = meter.createCounter('idempotency.events', {
    description: 'What became of requests with a key',
    unit: '{event}'
  })
  const claims = meter.createUpDownCounter('idempotency.claims', {
    description: 'Keys that requests hold',
    unit: '{claim}'
  })
  const holders = new WeakSet<FastifyRequest>()
  listen(app, (name, { request, route, error }) => {
    const code = (error as { code?: string } | undefined)?.code
    events.add(1, { 'idempotency.event': name, 'http.route': route, ...(code && { 'error.type': code }) })
    if (request === null) return
    if (name === 'acquired' && !holders.has(request)) {
      holders.add(request)
      claims.add(1, { 'http.route': route })
    } else if (ENDS.has(name) && holders.delete(request)) {
      claims.add(-1, { 'http.route': route })
    }
  })
}

function listen(app: FastifyInstance, hear: (name: IdempotencyEventName, event: IdempotencyEvent) => void): void {
  const subscriptions = idempotencyEvents.map((name) => ({
    channel: `fastify-idempotency:${name}`,
    listener: (message: unknown) => hear(name, message as IdempotencyEvent)
  }))
  for (const { channel, listener } of subscriptions) subscribe(channel, listener)
  app.addHook('onClose', async () => {
    for (const { channel, listener } of subscriptions) unsubscribe(channel, listener)
  })
}
