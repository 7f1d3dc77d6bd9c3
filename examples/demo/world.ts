import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
// In a project of your own: import idempotency from 'fastify-idempotency'
import idempotency from '../../index.js'
import { type Books, type Feed, SIDES, type Side } from './feed.js'

/*
 * What the shop calls, and what does not die with it: a provider of payments, and a warehouse. Both know idempotency keys, as
 * such services do: with a key that they have seen they do nothing again. Without a key, each call counts.
 */

/** What is to go wrong with the next order. */
export interface Plan {
  /** The money is taken, and the provider does not answer before `go()`. */
  holdPayments?: boolean
  /** The warehouse fails once for each shop. */
  failParcels?: boolean
}

/** So long the provider takes, so that there is something to see. */
const PAYMENT_MS = 600
const PARCEL_MS = 250
/** Nobody is left who lets them go on. */
const LONGEST_HOLD_MS = 120_000

const noBooks = (): Books => ({ runs: 0, orders: 0, charges: 0, charged: 0 })

export class World {
  wanted = { orders: 0, amount: 0 }
  books: Record<Side, Books> = { with: noBooks(), without: noBooks() }
  /** Called when both shops wait for the provider. */
  onBothPaid: () => void = () => {}
  #feed: Feed
  #hold: AbortController | null = null
  #held = new Set<Side>()
  #failing = new Set<Side>()

  constructor(feed: Feed) {
    this.#feed = feed
  }

  reset(): void {
    this.go()
    this.#failing.clear()
    this.wanted = { orders: 0, amount: 0 }
    this.books = { with: noBooks(), without: noBooks() }
  }

  plan({ holdPayments = false, failParcels = false }: Plan): void {
    this.go()
    if (holdPayments) {
      this.#hold = new AbortController()
      setTimeout((hold) => hold.abort(), LONGEST_HOLD_MS, this.#hold).unref()
    }
    this.#failing = new Set(failParcels ? SIDES : [])
  }

  /** The provider answers what it has held back. */
  go(): void {
    this.#hold?.abort()
    this.#hold = null
    this.#held.clear()
  }

  async charge(side: Side, amount: number): Promise<{ payment: string }> {
    const books = this.books[side]
    books.charges++
    books.charged += amount
    const payment = `pay_${side}_${books.charges}`
    const hold = this.#hold
    this.#feed.tell('charged', { side, amount, payment })
    if (hold === null) await sleep(PAYMENT_MS)
    else {
      const end = new Promise((resolve) => hold.signal.addEventListener('abort', resolve))
      this.#held.add(side)
      if (this.#held.size === SIDES.length) this.onBothPaid()
      await end
    }
    return { payment }
  }

  async send(side: Side, item: string): Promise<{ order: number } | null> {
    await sleep(PARCEL_MS)
    if (this.#failing.delete(side)) {
      this.#feed.tell('parcel-failed', { side })
      return null
    }
    const order = ++this.books[side].orders
    this.#feed.tell('parcel', { side, order, item })
    return { order }
  }
}

/** Both services, over HTTP. */
export async function buildWorld(world: World, feed: Feed): Promise<FastifyInstance> {
  const app = Fastify({ forceCloseConnections: true }) as unknown as FastifyInstance
  await app.register(idempotency, { scope: false, onConflict: 'wait' })
  const config = { idempotency: true }
  const onSend = async (request: { idempotency: { replayed: boolean } | null; params: unknown; url: string }) => {
    const { side } = request.params as { side: Side }
    if (request.idempotency?.replayed) feed.tell(`${request.url.split('/').at(-1)}-known`, { side })
  }

  app.post<{ Params: { side: Side }; Body: { amount: number } }>('/:side/payment', { config, onSend }, (request) =>
    world.charge(request.params.side, request.body.amount)
  )
  app.post<{ Params: { side: Side }; Body: { item: string } }>('/:side/parcel', { config, onSend }, (request, reply) =>
    world.send(request.params.side, request.body.item).then((sent) => sent ?? reply.code(503).send())
  )
  return app
}
