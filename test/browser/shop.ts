import formbody from '@fastify/formbody'
import Fastify, { type FastifyInstance } from 'fastify'
import idempotency from '../../index.js'
import type { Page } from '../support/browser.js'
import { type Latch, latch, listening, until } from '../support/latch.js'

interface Owner {
  teardown(fn: () => unknown): void
}

export interface ShopOptions {
  /** Without it the shop is one that nothing protects. */
  covered: boolean
  /** Whether a script sends the form, every time that it is asked to, and goes where the answer says. */
  fetch: boolean
}

const TIMEOUT = 60_000

const SEND_BY_FETCH = `
<script>
  const form = document.forms[0]
  form.addEventListener('submit', async (event) => {
    event.preventDefault()
    const body = new URLSearchParams(new FormData(form))
    const response = await fetch(form.action, { method: 'POST', body }).catch(() => undefined)
    if (response) location = '/receipts/' + await response.text()
    else document.body.dataset.failed = 'yes'
  })
</script>`

/** A shop that sees what arrives, and whose handler can be held. */
export class Shop {
  readonly orders: string[] = []
  /** Orders that have reached the server. */
  arrived = 0
  url = ''
  /** How many answers are lost on their way: the connection is cut instead. */
  cuts = 0
  #gate: Latch<void> | undefined
  #closed = 0
  #running = 0

  /** No order is made until they are let go on. */
  hold(): void {
    this.#gate = latch()
  }

  goOn(): void {
    this.#gate?.open()
  }

  async open(t: Owner, { covered, fetch }: ShopOptions): Promise<void> {
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => {
      this.goOn()
      app.server.closeAllConnections()
      return app.close()
    })
    await app.register(formbody)
    await app.register(idempotency, { field: '__idempotent_key', onConflict: 'wait' })

    const html = (text: string) => `<!doctype html><meta charset="utf-8"><title>Shop</title>${text}`
    const receipt = (number: number | string) => html(`<h1 id="receipt">Thank you for order ${number}</h1>`)
    app.get('/favicon.ico', async (_request, reply) => reply.code(204).send())
    app.get('/', async (_request, reply) =>
      reply.type('text/html').send(
        html(`<form method="post" action="/orders">${app.idempotency.hiddenInput()}
          <input name="title" value="Dune"><button>Order</button></form>${fetch ? SEND_BY_FETCH : ''}`)
      )
    )
    app.get<{ Params: { number: string } }>('/receipts/:number', async (request, reply) =>
      reply.type('text/html').send(receipt(request.params.number))
    )
    app.post<{ Body: { title: string } }>(
      '/orders',
      {
        config: { idempotency: covered },
        onRequest: async (_request, reply) => {
          this.arrived++
          // Also where nobody is left to be told.
          reply.raw.once('close', () => this.#closed++)
        },
        onSend: async (request) => {
          if (this.cuts-- > 0) request.raw.socket.destroy()
        }
      },
      async (request, reply) => {
        this.#running++
        await this.#gate?.promise
        const number = this.orders.push(request.body.title)
        this.#running--
        return fetch ? String(number) : reply.type('text/html').send(receipt(number))
      }
    )
    this.url = await listening(app)
  }

  /** The orders that there are when nothing is on its way any more. */
  async settled(): Promise<string[]> {
    await until(() => this.#closed === this.arrived && this.#running === 0, { timeout: TIMEOUT, message: 'an end' })
    return this.orders
  }

  async arrivals(count: number): Promise<void> {
    await until(() => this.arrived >= count, { timeout: TIMEOUT, message: `${count} orders to arrive` })
  }
}

/** Waits for the page that says thank you. */
export function thanked(page: Page): Promise<unknown> {
  return page.waitFor("document.querySelector('#receipt') && document.readyState === 'complete'")
}
