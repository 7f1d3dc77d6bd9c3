import { setTimeout as sleep } from 'node:timers/promises'
import type { SqlTransactions } from '../lib/transactions.js'
import type { Balance, Ledger } from './ledger.js'
import type { Orders } from './orders.js'

/* The same books in SQLite and in MySQL: what is written is committed with its step, exactly once. */

type Row = Record<string, unknown>

/** A database that keeps books. `Tx` is what its statements go to. */
export interface BooksDatabase<Tx> {
  transactions: SqlTransactions<Tx>
  /** Of a transaction, or outside of any. */
  query(tx: Tx | null, text: string, values?: (string | number)[]): Promise<Row[]>
  /** A column that counts by itself, and how to ask for what it has counted last. */
  serial: string
  lastSerial: string
}

export async function books<Tx>(database: BooksDatabase<Tx>): Promise<{ ledger: Ledger; orders: Orders }> {
  const { transactions, query, serial, lastSerial } = database
  for (const table of [
    `example_charges (id ${serial}, amount bigint NOT NULL)`,
    'example_entries (charge bigint NOT NULL, account varchar(20) NOT NULL, amount bigint NOT NULL)',
    `example_orders (number ${serial}, title varchar(200) NOT NULL)`
  ]) {
    await query(null, `CREATE TABLE IF NOT EXISTS ${table}`)
  }
  await transactions.createTable()

  /** Inserts a row, and gives what it was counted. */
  async function insert(tx: Tx, text: string, value: string | number): Promise<number> {
    await query(tx, text, [value])
    const [row] = await query(tx, `SELECT ${lastSerial} AS number`)
    return Number(row?.number)
  }

  const ledger: Ledger = {
    async charge({ amount, processingMs = 0 }, { step }) {
      // Not inside of the step: others wait for the end of a transaction.
      await sleep(processingMs)
      return step('charge', transactions, async (tx) => {
        const charge = await insert(tx, 'INSERT INTO example_charges (amount) VALUES (?)', amount)
        const entry = 'INSERT INTO example_entries (charge, account, amount) VALUES (?, ?, ?)'
        await query(tx, entry, [charge, 'customer', -amount])
        await query(tx, entry, [charge, 'shop', amount])
        return charge
      })
    },
    async balance() {
      const [row] = await query(
        null,
        `SELECT count(DISTINCT charge) AS charges, coalesce(sum(CASE account WHEN 'shop' THEN amount END), 0) AS total,
  coalesce(sum(amount), 0) AS sum FROM example_entries`
      )
      const { charges, total, sum } = row as Record<keyof Balance, unknown>
      return { charges: Number(charges), total: Number(total), sum: Number(sum) }
    }
  }
  const orders: Orders = {
    place: (step, title) =>
      step('order', transactions, (tx) => insert(tx, 'INSERT INTO example_orders (title) VALUES (?)', title)),
    async all() {
      const rows = await query(null, 'SELECT title FROM example_orders ORDER BY number')
      return rows.map(({ title }) => String(title))
    }
  }
  return { ledger, orders }
}
