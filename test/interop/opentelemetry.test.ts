import { context, type Span, SpanStatusCode, trace } from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import {
  AggregationTemporality,
  InMemoryMetricExporter,
  MeterProvider,
  PeriodicExportingMetricReader
} from '@opentelemetry/sdk-metrics'
import {
  BasicTracerProvider,
  InMemorySpanExporter,
  type ReadableSpan,
  SimpleSpanProcessor
} from '@opentelemetry/sdk-trace-base'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import { measureIdempotency, traceIdempotency } from '../../examples/opentelemetry.js'
import idempotency, { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { inject } from '../support/app.js'
import { latch } from '../support/latch.js'
import { post } from './kit.js'

/** An app with a span for each request, as an instrumentation makes it, and the notes of the example on it. */
async function traced(t: Test, options: IdempotencyOptions = {}) {
  const exporter = new InMemorySpanExporter()
  const tracer = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }).getTracer('test')
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  const spans = new WeakMap<FastifyRequest, Span>()
  app.addHook('onRequest', (request, _reply, done) => {
    spans.set(request, tracer.startSpan(String(request.headers['x-name'] ?? 'request')))
    done()
  })
  app.addHook('onResponse', async (request) => spans.get(request)?.end())
  traceIdempotency(app, (request) => spans.get(request))
  await app.register(idempotency, options)
  /** The spans that have ended since the last call. */
  const ended = () => {
    const spans = exporter.getFinishedSpans()
    exporter.reset()
    return spans
  }
  return { app, ended }
}

const eventsOf = ({ events }: ReadableSpan) => events.map(({ name }) => name)

t.test('the span of each request says what became of it, and leads from a replay to the first request', async (t) => {
  const { app, ended } = await traced(t)
  app.post('/', { config: { idempotency: true } }, async () => 'ran')
  await post(app, { key: 'secret key' })
  await post(app, { key: 'secret key' })
  await post(app, { key: 'secret key', payload: { other: true } })
  const [first, replay, reused] = ended() as [ReadableSpan, ReadableSpan, ReadableSpan]
  t.same([first, replay, reused].map(eventsOf), [
    ['idempotency.acquired', 'idempotency.stored'],
    ['idempotency.replayed'],
    ['idempotency.mismatch']
  ])
  const key = storageKey(null, 'secret key')
  t.same(first.attributes, { 'idempotency.key': key, 'idempotency.outcome': 'stored', 'idempotency.attempt': 1 })
  t.match(replay.attributes, {
    'idempotency.key': key,
    'idempotency.outcome': 'replayed',
    'idempotency.replayed': true
  })
  t.equal(reused.attributes['idempotency.key'], key)
  t.notOk(
    JSON.stringify([first, replay, reused].map(({ attributes, events }) => [attributes, events])).includes('secret')
  )
  for (const span of [first, replay, reused]) t.equal(span.status.code, SpanStatusCode.UNSET)
})

t.test('a conflict is noted with its reason, and a duplicate that was woken by another on its own span', async (t) => {
  const { app, ended } = await traced(t)
  const [hold, entered] = [latch(), latch()]
  const handler = async () => {
    entered.open()
    await hold.promise
    return 'ran'
  }
  app.post('/reject', { config: { idempotency: true } }, handler)
  app.post('/wait', { config: { idempotency: { onConflict: 'wait' } } }, async () => 'ran')
  const send = (url: string, name: string) =>
    inject(app, { method: 'POST', url, headers: { 'idempotency-key': url, 'x-name': name } })
  const first = send('/reject', 'first')
  await entered.promise
  await send('/reject', 'second')
  hold.open()
  await first
  const [conflict] = ended() as [ReadableSpan]
  t.same([conflict.name, eventsOf(conflict)], ['second', ['idempotency.conflict']])
  t.equal(conflict.events[0]?.attributes?.['error.type'], 'FST_IDEMPOTENCY_IN_PROGRESS')
  await Promise.all(['one', 'two', 'three'].map((name) => send('/wait', name)))
  const events = ended().map(eventsOf)
  t.same(events.sort(), [
    ['idempotency.acquired', 'idempotency.stored'],
    ['idempotency.replayed'],
    ['idempotency.replayed']
  ])
})

t.test('a failing store is an error of the span', async (t) => {
  const store = new MemoryStore()
  store.acquire = () => Promise.reject(Object.assign(new Error('no connection'), { code: 'ECONNREFUSED' }))
  const { app, ended } = await traced(t, { store })
  app.post('/', { config: { idempotency: true } }, async () => 'ran')
  t.equal((await post(app)).statusCode, 503)
  const [span] = ended() as [ReadableSpan]
  t.equal(span.status.code, SpanStatusCode.ERROR)
  t.same(eventsOf(span), ['idempotency.store-error', 'exception'])
  t.match(span.events[1]?.attributes, { 'exception.message': 'no connection' })
})

t.test('requests without a key, and routes that are not covered, are left as they are', async (t) => {
  const { app, ended } = await traced(t)
  app.post('/', { config: { idempotency: true } }, async () => 'ran')
  app.post('/other', async () => 'ran')
  await app.inject({ method: 'POST', url: '/' })
  await post(app, { url: '/other' })
  for (const span of ended()) t.same([span.attributes, span.events], [{}, []])
})

t.test('without another way to find it, the span is the active one', async (t) => {
  context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable())
  t.teardown(() => context.disable())
  const exporter = new InMemorySpanExporter()
  const tracer = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }).getTracer('test')
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  traceIdempotency(app)
  await app.register(idempotency)
  app.post('/', { config: { idempotency: true } }, async () => 'ran')
  await app.ready()
  await tracer.startActiveSpan('outer', async (span) => {
    t.equal(trace.getActiveSpan(), span)
    await post(app)
    span.end()
  })
  t.same(exporter.getFinishedSpans().map(eventsOf), [['idempotency.acquired', 'idempotency.stored']])
})

t.test('metrics by the OpenTelemetry API count what becomes of requests, and the keys that are held', async (t) => {
  const exporter = new InMemoryMetricExporter(AggregationTemporality.CUMULATIVE)
  const reader = new PeriodicExportingMetricReader({ exporter, exportIntervalMillis: 60_000 })
  const provider = new MeterProvider({ readers: [reader] })
  t.teardown(() => provider.shutdown())
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  measureIdempotency(app, provider.getMeter('test'))
  await app.register(idempotency, { required: true })
  const [hold, entered] = [latch(), latch()]
  app.post('/', { config: { idempotency: true } }, async () => {
    entered.open()
    await hold.promise
    return 'ran'
  })
  const values = async (name: string) => {
    exporter.reset()
    await reader.forceFlush()
    const all = exporter.getMetrics().flatMap(({ scopeMetrics }) => scopeMetrics.flatMap(({ metrics }) => metrics))
    const points = all.find(({ descriptor }) => descriptor.name === name)?.dataPoints ?? []
    return points.map(({ value, attributes }) => [Object.values(attributes).join(' '), value])
  }
  const first = post(app, { key: 'k' })
  await entered.promise
  t.same(await values('idempotency.claims'), [['/', 1]])
  hold.open()
  await first
  await post(app, { key: 'k' })
  await app.inject({ method: 'POST', url: '/' })
  t.same(await values('idempotency.claims'), [['/', 0]])
  t.same(await values('idempotency.events'), [
    ['acquired /', 1],
    ['stored /', 1],
    ['replayed /', 1],
    ['refused / FST_IDEMPOTENCY_KEY_MISSING', 1]
  ])
})
