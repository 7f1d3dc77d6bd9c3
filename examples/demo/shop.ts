import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
// In a project of your own: from 'fastify-idempotency'
import idempotency, { type IdempotencyStore, type RequestIdempotency } from '../../index.js'
import type { Side } from './feed.js'

/* The same shop twice: one handler, covered by the plugin at /with/orders, and not covered at /without/orders. */

/** What the shop calls. */
export interface Services {
  pay(side: Side, amount: number, key: string | undefined): Promise<{ payment: string }>
  send(side: Side, item: string, key: string | undefined): Promise<{ order: number }>
}

export interface ShopOptions {
  store: IdempotencyStore
  services: Services
  /** How long a key stays taken when its process has died, and how long the store may take to answer. */
  limits: { lease: string; storeTimeout: string }
  onRun(side: Side, attempt: number): void
}

interface Order {
  item: string
  amount: number
}

declare module 'fastify' {
  interface FastifyRequest {
    customer: string
  }
}

const CUSTOMERS = ['alice', 'bob']

const schema = {
  summary: 'Order a book',
  body: {
    type: 'object',
    required: ['item', 'amount'],
    properties: {
      item: { type: 'string', minLength: 1, maxLength: 100 },
      amount: { type: 'integer', minimum: 1, maximum: 1_000_000 }
    }
  },
  headers: { type: 'object', properties: { authorization: { type: 'string', examples: ['Bearer alice'] } } }
}

export async function shop(app: FastifyInstance, { store, services, limits, onRun }: ShopOptions): Promise<void> {
  app.decorateRequest('customer', '')
  // Pretended: who says to be Alice is Alice.
  app.addHook('onRequest', async (request, reply) => {
    const [, name = ''] = /^Bearer (\w+)$/.exec(request.headers.authorization ?? '') ?? []
    if (!CUSTOMERS.includes(name))
      return reply.code(401).send({ message: `Send "Bearer ${CUSTOMERS.join('" or "Bearer ')}"` })
    request.customer = name
  })

  await app.register(idempotency, {
    store,
    scope: (request) => request.customer,
    onConflict: 'wait',
    ttl: '10m',
    ...limits
  })

  const handler = (side: Side) => {
    // --8<-- what the page shows
    return async (request: FastifyRequest<{ Body: Order }>, reply: FastifyReply) => {
      const { item, amount } = request.body
      onRun(side, request.idempotency?.attempt ?? 1)
      const step = request.idempotency?.step ?? withoutKey

      const { payment } = await step('payment', ({ key }) => services.pay(side, amount, key))
      const { order } = await step('parcel', ({ key }) => services.send(side, item, key))

      return reply.code(201).send({ order, customer: request.customer, item, amount, payment })
    }
    // --8<--
  }

  app.post('/with/orders', { schema, config: { idempotency: { required: true } } }, handler('with'))
  app.post('/without/orders', { schema, config: { idempotency: false } }, handler('without'))

  /** What the store knows of a key. */
  app.get<{ Params: { key: string } }>('/with/keys/:key', { schema: { hide: true } }, async (request) => {
    const found = await app.idempotency.get(request.params.key, { scope: request.customer })
    if (found === null) return { state: 'free' }
    if (found.state === 'completed') {
      const { record, ttlMs, state, storageKey } = found
      return { state, storageKey, statusCode: record.kind === 'reply' ? record.statusCode : record.reason, ttlMs }
    }
    const { state, storageKey, attempt, steps = [] } = found
    const leaseMs = found.state === 'running' ? found.leaseMs : 0
    return { state, storageKey, attempt, leaseMs, steps: steps.map(([name]) => name) }
  })
}

/** Where nobody keeps what is finished, and there is no key to give on. */
const withoutKey = (async (_name: string, run: (context: { key: undefined }) => unknown) =>
  run({ key: undefined })) as unknown as RequestIdempotency['step']
