import { inTurn } from './in-turn.js'
import { type SqlTransactions, type StepsTableOptions, sqlTransactions } from './sql.js'

/** What `sqliteTransactions` needs of a database of `better-sqlite3` or `node:sqlite`. */
export interface SqliteDatabase {
  exec(text: string): unknown
  prepare(text: string): { all(...values: never[]): unknown; run(...values: never[]): unknown }
}

/**
 * Transactions of SQLite, by `better-sqlite3` or `node:sqlite`: `Tx` is the database itself. They take turns, as a connection has one at
 * a time: a step inside of a step would wait for itself.
 *
 * Give it a connection of its own. What other requests send on the same connection while a step runs is part of its transaction, and is undone with it.
 */
export function sqliteTransactions<Database extends SqliteDatabase>(
  database: Database,
  options: StepsTableOptions = {}
): SqlTransactions<Database> {
  return sqlTransactions<Database>({
    ...options,
    begin: (work) => inTurn(database, () => transact(database, work)),
    query(tx, text, values) {
      const statement = tx.prepare(text)
      // better-sqlite3 asks for the rows of those only that give some.
      return text.startsWith('SELECT') ? statement.all(...(values as never[])) : statement.run(...(values as never[]))
    },
    placeholders: '?'
  })
}

async function transact<Database extends SqliteDatabase, T>(
  database: Database,
  work: (database: Database) => Promise<T>
): Promise<T> {
  // The lock for writing at once: who reads first and then wants it may be refused.
  database.exec('BEGIN IMMEDIATE')
  try {
    const result = await work(database)
    database.exec('COMMIT')
    return result
  } catch (error) {
    try {
      database.exec('ROLLBACK')
    } catch {
      // After some errors, such as a full disk, SQLite has rolled back already.
    }
    throw error
  }
}
