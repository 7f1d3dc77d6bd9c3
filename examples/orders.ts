import { setTimeout as sleep } from 'node:timers/promises'
import type { Pool } from 'pg'
// In a project of your own: from 'fastify-idempotency' and 'fastify-idempotency/transactions'
import type { Step } from '../index.js'
import { pgTransactions } from '../lib/transactions.js'

/** The orders of the shop. */
export interface Orders {
  /** @returns the number of the order */
  place(step: Step, title: string): Promise<number>
  /** The titles, in order. */
  all(): Promise<string[]>
}

export function memoryOrders(): Orders {
  const titles: string[] = []
  return {
    place: (step, title) => step('order', () => titles.push(title)),
    all: async () => titles
  }
}

/** The row is there when its step is, or never. */
export async function postgresOrders(pool: Pool): Promise<Orders> {
  await pool.query('CREATE TABLE IF NOT EXISTS example_orders (number serial PRIMARY KEY, title text NOT NULL)')
  const db = pgTransactions(pool, { table: 'example_steps' })
  await db.createTable()
  return {
    place: (step, title) =>
      step('order', db, async (tx) => {
        const { rows } = await tx.query('INSERT INTO example_orders (title) VALUES ($1) RETURNING number', [title])
        return (rows[0] as { number: number }).number
      }),
    async all() {
      const { rows } = await pool.query('SELECT title FROM example_orders ORDER BY number')
      return rows.map(({ title }) => title as string)
    }
  }
}

/** What others do for an order: services that know keys, as those of payments do. */
export interface Partners {
  pay(order: number, key: string): Promise<unknown>
  mail(order: number, key: string): Promise<unknown>
}

export const pretendedPartners: Partners = { pay: () => sleep(400), mail: () => sleep(100) }

export function partnersAt(url: string): Partners {
  const send = async (what: string, order: number, key: string) => {
    const headers = { 'content-type': 'application/json', 'idempotency-key': key }
    const response = await fetch(`${url}/${what}`, { method: 'POST', headers, body: JSON.stringify({ order }) })
    if (!response.ok) throw new Error(`${what}: ${response.status}`)
  }
  return { pay: (order, key) => send('payments', order, key), mail: (order, key) => send('mails', order, key) }
}
