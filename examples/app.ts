import formbody from '@fastify/formbody'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
// In a project of your own: import idempotency, { … } from 'fastify-idempotency'
import idempotency, { type IdempotencyStore, type RequestIdempotency } from '../index.js'
import { inMemory, openDatabase, openRedis } from './databases.js'
import type { NewCharge } from './ledger.js'
import { type Orders, type Partners, partnersAt, pretendedPartners } from './orders.js'

/** Where the keys are: in memory, unless there is a URL. */
export interface Services {
  redisUrl?: string | undefined
  /** Charges and orders are in this database as well, and are written exactly once. */
  databaseUrl?: string | undefined
  /** Where orders are paid and mails sent; otherwise that is only pretended. */
  partnersUrl?: string | undefined
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

/** A small payments API, and a shop page with a form. */
export async function buildApp(services: Services = {}, options: FastifyServerOptions = {}): Promise<FastifyInstance> {
  const app = Fastify(options) as unknown as FastifyInstance
  await addPayments(app, services)
  return app
}

/** The same in an app that there is. What is put in front of the store is `through`. */
export async function addPayments(
  app: FastifyInstance,
  services: Services,
  through = (store: IdempotencyStore): IdempotencyStore => store
): Promise<void> {
  await app.register(formbody)
  const { store, ledger, orders, transaction } = await databases(app, services)
  await app.register(idempotency, { store: through(store), documentationUrl: 'https://example.com/errors#{code}' })

  app.post<{ Body: NewCharge }>(
    '/charges',
    { schema: chargeSchema, config: { idempotency: { required: true, transaction } } },
    async (request, reply) => {
      const { amount, currency } = request.body
      const idempotency = request.idempotency as RequestIdempotency
      const id = `ch_${await ledger.charge(request.body, idempotency)}`
      const { attempt } = idempotency
      return reply.code(201).header('location', `/charges/${id}`).send({ id, amount, currency, attempt })
    }
  )
  app.get('/balance', () => ledger.balance())

  const { partnersUrl } = services
  await app.register(shop, {
    orders,
    partners: partnersUrl === undefined ? pretendedPartners : partnersAt(partnersUrl)
  })
}

/** The safest first. */
async function databases(app: FastifyInstance, { redisUrl, databaseUrl }: Services) {
  if (databaseUrl !== undefined) return openDatabase(app, databaseUrl)
  return redisUrl === undefined ? inMemory() : openRedis(app, redisUrl)
}

const HEAD = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Shop</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">`

/** A page for people: the form carries its own key, so a double click, a reload or the back button orders once. */
async function shop(app: FastifyInstance, { orders, partners }: { orders: Orders; partners: Partners }): Promise<void> {
  await app.register(idempotency, {
    store: app.idempotency.store,
    header: 'X-Idempotent-Key',
    field: '__idempotent_key',
    onConflict: 'wait',
    // Short, so that nobody has to wait long when a server was killed.
    lease: 2_000,
    storeTimeout: 600
  })

  app.get('/form', async (_request, reply) =>
    reply.type('text/html').send(`${HEAD}
<h1>Order a book</h1>
<form method="post" action="/orders">
  ${app.idempotency.hiddenInput()}
  <label>Title <input name="title" value="The Mythical Man-Month"></label>
  <button>Order</button>
</form>
<p>Click as often as you like, go back, send it again: there will be one order.</p>
<ol>${(await orders.all()).map((title) => `<li>${escapeHtml(title)}</li>`).join('')}</ol>
<script>
  // For the eye only. Back may show the page as it was left: the button has to work again.
  const button = document.querySelector('button')
  document.forms[0].addEventListener('submit', () => { button.disabled = true })
  addEventListener('pageshow', () => { button.disabled = false })
</script>
`)
  )
  app.post<{ Body: { title?: string } }>(
    '/orders',
    { config: { idempotency: { required: true } } },
    async (request, reply) => {
      const { step } = request.idempotency as RequestIdempotency
      const number = await orders.place(step, request.body.title ?? '')
      await step('payment', ({ key }) => partners.pay(number, key))
      await step('mail', ({ key }) => partners.mail(number, key))
      // Not to '/form': the browser would remember it with its next key, and go back to that.
      return reply.redirect(`/orders/${number}`, 303)
    }
  )
  app.get<{ Params: { number: number } }>('/orders/:number', async (request, reply) => {
    const title = (await orders.all())[request.params.number - 1]
    if (title === undefined) return reply.callNotFound()
    return reply.type('text/html').send(`${HEAD}
<h1>Thank you</h1>
<p>Order ${request.params.number}: ${escapeHtml(title)}</p>
<a href="/form">Another one</a>
`)
  })
}

function escapeHtml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
