import { setTimeout as sleep } from 'node:timers/promises'
import type { Pool } from 'pg'
// In a project of your own: import type { RequestIdempotency } from 'fastify-idempotency'
import type { RequestIdempotency } from '../index.js'

export interface NewCharge {
  amount: number
  currency: string
  /** How long the pretended payment provider takes, so that a duplicate can be seen in flight. */
  processingMs?: number
}

export interface Balance {
  /** How many charges there are. */
  charges: number
  /** What was taken in. */
  total: number
  /** The sum of all entries: 0, or money was lost. */
  sum: number
}

/** Books in which every charge is two entries: one for the customer, one for the shop. */
export interface Ledger {
  /** @returns the number of the charge */
  charge(charge: NewCharge, idempotency: RequestIdempotency): Promise<number>
  balance(): Promise<Balance>
}

export function memoryLedger(): Ledger {
  const entries: { charge: number; amount: number }[] = []
  return {
    async charge({ amount, processingMs = 0 }) {
      await sleep(processingMs)
      const charge = entries.length / 2 + 1
      entries.push({ charge, amount: -amount }, { charge, amount })
      return charge
    },
    async balance() {
      const sum = entries.reduce((sum, { amount }) => sum + amount, 0)
      const total = entries.reduce((total, { amount }) => total + Math.max(0, amount), 0)
      return { charges: entries.length / 2, total, sum }
    }
  }
}

const TABLES = `
CREATE TABLE IF NOT EXISTS example_ledger (
  entry   bigserial PRIMARY KEY,
  charge  bigint NOT NULL,
  account text NOT NULL,
  amount  bigint NOT NULL
);
CREATE SEQUENCE IF NOT EXISTS example_charges`

/** The entries are written in the transaction of the request: they are there when its reply is, or never. */
export async function postgresLedger(pool: Pool): Promise<Ledger> {
  await pool.query(TABLES)
  const entry = 'INSERT INTO example_ledger (charge, account, amount) VALUES ($1, $2, $3)'
  return {
    async charge({ amount, processingMs = 0 }, { transaction }) {
      if (transaction === null) throw new Error('A charge needs a transaction')
      const { rows } = await transaction.query("SELECT nextval('example_charges')::int AS charge")
      const { charge } = rows[0] as { charge: number }
      await transaction.query(entry, [charge, 'customer', -amount])
      await sleep(processingMs)
      await transaction.query(entry, [charge, 'shop', amount])
      return charge
    },
    async balance() {
      const { rows } = await pool.query(`
        SELECT count(DISTINCT charge)::int AS charges,
          coalesce(sum(amount) FILTER (WHERE account = 'shop'), 0)::int AS total,
          coalesce(sum(amount), 0)::int AS sum
        FROM example_ledger`)
      return rows[0] as Balance
    }
  }
}
