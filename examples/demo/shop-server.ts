import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import Fastify, { type FastifyInstance } from 'fastify'
import { Registry } from 'prom-client'
// In a project of your own: import { openapiTransform } from 'fastify-idempotency'
import { openapiTransform } from '../../index.js'
import { addPayments } from '../app.js'
import { idempotencyMetrics } from '../prometheus.js'
import { readSettings } from '../settings.js'
import type { Happening, Side } from './feed.js'
import { Outage } from './outage.js'
import { type Services, shop } from './shop.js'
import { watch } from './watch.js'

/* The process that the demo kills: both shops, and the payments API. It talks to its parent, and ends with it. */

/** What the parent is told. */
export type FromShop = { port: number } | { happening: Happening } | { run: Side } | { storeStopped: boolean }
/** What the parent says. */
export type ToShop = { stopStore: boolean }

const { WORLD_URL = '', SLOW_MACHINE } = process.env
// Short, so that nobody has to wait long when the shop was killed, or its store stopped.
const limits = SLOW_MACHINE === undefined ? { lease: '5s', storeTimeout: '1s' } : { lease: '30s', storeTimeout: '10s' }
const tell = (message: FromShop) => process.connected && process.send?.(message)

async function call<T>(who: string, path: string, body: object, key: string | undefined): Promise<T> {
  const headers = { 'content-type': 'application/json', ...(key !== undefined && { 'idempotency-key': key }) }
  const response = await fetch(`${WORLD_URL}/${path}`, { method: 'POST', headers, body: JSON.stringify(body) })
  if (response.ok) return (await response.json()) as T
  throw Object.assign(new Error(`the ${who} answers ${response.status}`), { statusCode: 503 })
}

const services: Services = {
  pay: (side, amount, key) => call('payment provider', `${side}/payment`, { amount }, key),
  send: (side, item, key) => call('warehouse', `${side}/parcel`, { item }, key)
}

const app = Fastify({ forceCloseConnections: true }) as unknown as FastifyInstance
const register = new Registry()
const outage = new Outage()
watch(app, (happening) => tell({ happening }))
const { timed } = idempotencyMetrics(app, register)
await app.register(swagger, {
  openapi: { openapi: '3.1.0', info: { title: 'Shop', version: '1.0.0' } },
  transform: openapiTransform
})
await app.register(swaggerUi, { routePrefix: '/docs' })
await addPayments(app, readSettings(), (store) => outage.over(timed(store)))
await app.register(shop, {
  store: app.idempotency.store,
  services,
  limits,
  onRun(side, attempt) {
    tell({ run: side })
    tell({ happening: { what: 'ran', at: Date.now(), side, attempt } })
  }
})
app.get('/metrics', { schema: { hide: true } }, async (_request, reply) =>
  reply.type(register.contentType).send(await register.metrics())
)

process.on('message', ({ stopStore }: ToShop) => {
  outage.isOn = stopStore
  tell({ storeStopped: stopStore })
})
// Whatever it still waits for: there is nobody left to answer to.
process.on('disconnect', () => void app.close().finally(() => process.exit()))
// Ctrl-C reaches both: the parent decides.
process.on('SIGINT', () => {})

await app.listen({ host: '127.0.0.1', port: 0 })
tell({ port: (app.server.address() as { port: number }).port })
