import { setTimeout as sleep } from 'node:timers/promises'
import formbody from '@fastify/formbody'
import redis from '@fastify/redis'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
// In a project of your own: import idempotency, { … } from 'fastify-idempotency'
import idempotency, { MemoryStore, RedisStore } from '../index.js'

interface Charge {
  amount: number
  currency: string
  /** How long the pretended payment provider takes, so that a duplicate can be seen in flight. */
  processingMs?: number
}

const chargeSchema = {
  body: {
    type: 'object',
    required: ['amount', 'currency'],
    properties: {
      amount: { type: 'integer', minimum: 1 },
      currency: { type: 'string', minLength: 3, maxLength: 3 },
      processingMs: { type: 'integer', minimum: 0, maximum: 10_000 }
    }
  }
}

/** A small payments API, and a shop page with a form. In memory, or on Redis when there is a `redisUrl`. */
export async function buildApp(redisUrl?: string, options: FastifyServerOptions = {}): Promise<FastifyInstance> {
  const app = Fastify(options) as unknown as FastifyInstance
  await app.register(formbody)
  if (redisUrl !== undefined) await app.register(redis, { url: redisUrl })
  await app.register(idempotency, {
    store: redisUrl === undefined ? new MemoryStore() : new RedisStore(app.redis)
  })

  const charges: object[] = []
  app.post<{ Body: Charge }>(
    '/charges',
    { schema: chargeSchema, config: { idempotency: { required: true } } },
    async (request, reply) => {
      const { amount, currency, processingMs = 0 } = request.body
      await sleep(processingMs)
      const charge = { id: `ch_${charges.length + 1}`, amount, currency, attempt: request.idempotency?.attempt }
      charges.push(charge)
      return reply.code(201).header('location', `/charges/${charge.id}`).send(charge)
    }
  )
  app.get('/charges', async () => charges)

  await app.register(shop)
  return app
}

/** A page for people: the form carries its own key, so a double click, a reload or the back button orders once. */
async function shop(app: FastifyInstance): Promise<void> {
  await app.register(idempotency, {
    store: app.idempotency.store,
    header: 'X-Idempotent-Key',
    field: '__idempotent_key',
    onConflict: 'wait'
  })

  const orders: string[] = []
  app.get('/', async (_request, reply) =>
    reply.type('text/html').send(`<!doctype html>
<title>Shop</title>
<h1>Order a book</h1>
<form method="post" action="/orders">
  ${app.idempotency.hiddenInput()}
  <label>Title <input name="title" value="The Mythical Man-Month"></label>
  <button>Order</button>
</form>
<p>Click twice, as fast as you can: there will be one order.</p>
<ol>${orders.map((title) => `<li>${escapeHtml(title)}</li>`).join('')}</ol>
`)
  )
  app.post<{ Body: { title?: string } }>(
    '/orders',
    { config: { idempotency: { required: true } } },
    async (request, reply) => {
      await sleep(500)
      orders.push(request.body.title ?? '')
      return reply.redirect('/', 303)
    }
  )
}

function escapeHtml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
