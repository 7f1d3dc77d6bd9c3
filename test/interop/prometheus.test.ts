import { readFileSync } from 'node:fs'
import Fastify, { type FastifyInstance } from 'fastify'
import { Registry } from 'prom-client'
import t, { type Test } from 'tap'
import { idempotencyMetrics } from '../../examples/prometheus.js'
import idempotency, {
  EncryptedStore,
  type IdempotencyOptions,
  type IdempotencyStore,
  idempotencyEvents,
  MemoryStore
} from '../../index.js'
import { Abandoned } from '../../lib/errors.js'
import { inject } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import { isReplay, post } from './kit.js'

// The compiled file is in .build/test/interop.
const observability = new URL('../../../examples/observability/', import.meta.url)
const dashboard = readFileSync(new URL('grafana-dashboard.json', observability), 'utf8')
const alerts = readFileSync(new URL('alerts.yml', observability), 'utf8')

interface Setup {
  store?: IdempotencyStore
  options?: IdempotencyOptions
}

/** An app with the metrics of the example. */
async function measured(t: Test, { store = new MemoryStore(), options = {} }: Setup = {}) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  const register = new Registry()
  const { timed } = idempotencyMetrics(app, register)
  await app.register(idempotency, { ...options, store: timed(store) })
  const hold = latch()
  const entered = latch()
  let runs = 0
  app.post('/charges', { config: { idempotency: true } }, async (request, reply) => {
    runs++
    if (request.headers['x-hold'] !== undefined) {
      entered.open()
      await hold.promise
    }
    return reply.code(Number(request.headers['x-status'] ?? 201)).send({ run: runs })
  })
  const send = (key: string, headers: Record<string, string> = {}, payload = {}) =>
    inject(app, {
      method: 'POST',
      url: '/charges',
      headers: { 'idempotency-key': key, ...headers },
      payload
    })
  /** The value of one sample; 0 where there is none. */
  const value = async (name: string, labels: Record<string, string>) => {
    const lines = (await register.metrics()).split('\n')
    const line = lines.find(
      (line) =>
        line.startsWith(`${name}{`) &&
        Object.entries(labels).every(([label, value]) => line.includes(`${label}="${value}"`))
    )
    return line === undefined ? 0 : Number(line.split(' ').at(-1))
  }
  const events = (event: string, labels = {}) =>
    value('idempotency_events_total', { event, route: '/charges', ...labels })
  const running = () => value('idempotency_claims_running', { route: '/charges' })
  return { app, register, send, hold, entered, value, events, running }
}

t.test('each outcome is counted, by route, and each conflict with its reason', async (t) => {
  const { send, events, hold, entered } = await measured(t)
  await send('a')
  await send('a')
  await send('a')
  await send('a', {}, { other: true })
  await send('b', { 'x-status': '500' })
  const first = send('c', { 'x-hold': '1' })
  await entered.promise
  t.equal((await send('c', { 'x-hold': '1' })).statusCode, 409)
  hold.open()
  await first
  const counts = { acquired: 3, stored: 2, replayed: 2, mismatch: 1, released: 1, conflict: 1, bypassed: 0 }
  for (const [event, count] of Object.entries(counts)) t.equal(await events(event), count, event)
  t.equal(await events('conflict', { code: 'FST_IDEMPOTENCY_IN_PROGRESS' }), 1)
})

t.test('running claims are counted up and down, whatever they end with', async (t) => {
  const { send, running, hold, entered } = await measured(t, { options: { maxReplySize: 5 } })
  const first = send('a', { 'x-hold': '1' })
  await entered.promise
  t.equal(await running(), 1)
  await send('a')
  t.equal(await running(), 1, 'a duplicate holds nothing')
  await send('b', { 'x-status': '500' })
  await send('c')
  t.equal(await running(), 1)
  hold.open()
  await first
  t.equal(await running(), 0)
})

t.test('running claims come to nothing although the store fails meanwhile', async (t) => {
  const memory = new MemoryStore()
  let down = false
  const failing = <A extends unknown[], R>(call: (...args: A) => Promise<R>) => {
    return async (...args: A) => {
      if (down) throw new Error('down')
      return call.apply(memory, args)
    }
  }
  const store: IdempotencyStore = {
    acquire: failing(memory.acquire),
    renew: failing(memory.renew),
    complete: failing(memory.complete),
    release: failing(memory.release)
  }
  const { send, running, hold, entered, value, events } = await measured(t, { store })
  const replies = [send('a', { 'x-hold': '1' })]
  await entered.promise
  replies.push(send('b', { 'x-hold': '1', 'x-status': '500' }))
  await until(async () => (await running()) === 2)
  down = true
  hold.open()
  await Promise.all(replies)
  t.equal(await running(), 2, 'they are still held')
  t.equal((await send('c')).statusCode, 503)
  down = false
  await until(async () => (await running()) === 0)
  t.same([await events('stored'), await events('released')], [1, 1])
  t.ok((await events('store-error')) >= 3)
  for (const operation of ['acquire', 'complete', 'release']) {
    t.ok((await value('idempotency_store_seconds_count', { operation, result: 'error' })) >= 1, operation)
  }
})

t.test('the time for which duplicates wait is measured', async (t) => {
  const { send, value, hold, entered } = await measured(t, { options: { onConflict: 'wait' } })
  const replies = [send('a', { 'x-hold': '1' })]
  await entered.promise
  replies.push(send('a', { 'x-hold': '1' }))
  setTimeout(() => hold.open(), 20)
  t.ok(isReplay((await Promise.all(replies))[1] as never))
  t.equal(await value('idempotency_duplicate_wait_seconds_count', { outcome: 'replayed' }), 1)
  t.ok((await value('idempotency_duplicate_wait_seconds_sum', { outcome: 'replayed' })) > 0)
})

t.test('calls to the store are timed, and the store stays the same', async (t) => {
  const { app, value } = await measured(t)
  await post(app, { url: '/charges', key: 'a' })
  t.ok(isReplay(await post(app, { url: '/charges', key: 'a' })))
  t.equal(await value('idempotency_store_seconds_count', { operation: 'acquire', result: 'answer' }), 2)
  t.equal(await value('idempotency_store_seconds_count', { operation: 'complete', result: 'answer' }), 1)
  t.match(await app.idempotency.get('a'), { state: 'completed' })
  t.equal(await app.idempotency.delete('a'), true)
  const bare = Fastify() as unknown as FastifyInstance
  t.teardown(() => bare.close())
  const { timed } = idempotencyMetrics(bare, new Registry())
  const memory = new MemoryStore()
  const { acquire, renew, complete, release } = memory
  t.same(Object.keys(timed({ acquire, renew, complete, release })).sort(), ['acquire', 'complete', 'release', 'renew'])
  t.equal(timed(memory).begin, undefined, 'no more than there is')
  t.ok(timed(new EncryptedStore(memory, { keys: [Buffer.alloc(32)] })).changed)
})

t.test('a server that has closed counts no more', async (t) => {
  const closed = await measured(t)
  await closed.app.close()
  const other = await measured(t)
  await other.send('a')
  t.equal(await other.events('stored'), 1)
  t.equal(await closed.events('stored'), 0)
})

/** The series that the example exports, each with its labels. */
async function exported(t: Test): Promise<{ series: Map<string, Set<string>>; metrics: string[] }> {
  const { register } = await measured(t)
  const series = new Map<string, Set<string>>()
  for (const metric of register.getMetricsAsArray()) {
    const { name, labelNames } = metric as unknown as { name: string; labelNames: string[] }
    const labels = new Set(labelNames)
    if (metric.constructor.name === 'Histogram') {
      series.set(`${name}_bucket`, new Set([...labels, 'le']))
      series.set(`${name}_count`, labels)
      series.set(`${name}_sum`, labels)
    } else {
      series.set(name, labels)
    }
  }
  return { series, metrics: register.getMetricsAsArray().map(({ name }) => name) }
}

/** What a query groups by; it may ask for nothing that is not there. */
function checkQuery(t: Test, series: Map<string, Set<string>>, expr: string): { names: string[]; grouped: string[] } {
  const names = expr.match(/idempotency_\w+/g) ?? []
  t.ok(names.length > 0, expr)
  for (const name of names) t.ok(series.has(name), name)
  const labels = names.flatMap((name) => [...(series.get(name) ?? [])])
  const selected = [...expr.matchAll(/(\w+)=~?"/g)].map(([, label]) => label as string)
  const grouped = [...expr.matchAll(/by \(([^)]+)\)/g)].flatMap(([, list]) => (list as string).split(', '))
  for (const label of [...selected, ...grouped]) t.ok(labels.includes(label), `${label} in ${expr}`)
  const events = [...expr.matchAll(/event=~?"([^"]+)"/g)].flatMap(([, list]) => (list as string).split('|'))
  for (const event of events) t.ok((idempotencyEvents as readonly string[]).includes(event), event)
  const codes = [...expr.matchAll(/code="([^"]+)"/g)].map(([, code]) => code as string)
  for (const code of codes) t.equal(code, new Abandoned().code)
  return { names, grouped }
}

t.test('the Grafana dashboard asks for these metrics and labels, for all of them, and for nothing else', async (t) => {
  const { series, metrics } = await exported(t)
  const { panels, templating } = JSON.parse(dashboard) as {
    panels: { id: number; title: string; targets: { expr: string; legendFormat: string }[] }[]
    templating: { list: { query: string | { query: string } }[] }
  }
  t.equal(new Set(panels.map(({ id }) => id)).size, panels.length)
  const asked = new Set<string>()
  for (const { title, targets } of panels) {
    t.ok(targets.length > 0, title)
    for (const { expr, legendFormat } of targets) {
      const { names, grouped } = checkQuery(t, series, expr)
      for (const name of names) asked.add(name.replace(/_(bucket|count|sum)$/, ''))
      const legend = [...legendFormat.matchAll(/\{\{(\w+)\}\}/g)].map(([, label]) => label as string)
      for (const label of legend) t.ok(grouped.includes(label), `${label} is left over in ${expr}`)
    }
  }
  t.same([...asked].sort(), metrics.sort())
  t.match(JSON.stringify(templating), /label_values\(idempotency_events_total, route\)/)
})

t.test('so do the alerts, each of which says what is wrong', async (t) => {
  const { series } = await exported(t)
  const rules = alerts.split(/^ {6}- alert: /m).slice(1)
  const names = rules.map((rule) => rule.slice(0, rule.indexOf('\n')))
  t.ok(names.length > 5)
  t.equal(new Set(names).size, names.length)
  for (const rule of rules) {
    const [, expr = ''] = /^ {8}expr: >-\n((?: {10}.*\n)+)/m.exec(rule) ?? []
    const { grouped } = checkQuery(t, series, expr)
    t.equal(expr.split('(').length, expr.split(')').length, expr)
    t.match(rule, /^ {10}severity: (page|ticket)$/m)
    const [, summary = ''] = /^ {10}summary: (.+)$/m.exec(rule) ?? []
    t.match(summary, /\.$/)
    // Otherwise it would be no text in YAML.
    t.notMatch(summary, /: | #/)
    const shown = [...summary.matchAll(/\$labels\.(\w+)/g)].map(([, label]) => label as string)
    for (const label of shown) t.ok(grouped.includes(label), `${label} is left over in ${expr}`)
  }
  // What may have run twice, and what nobody but a person can decide.
  for (const event of ['bypassed', 'lease-lost', 'takeover', 'store-error']) t.match(alerts, `event="${event}"`)
  t.match(alerts, 'FST_IDEMPOTENCY_ABANDONED')
})
