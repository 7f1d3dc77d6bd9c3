import { type SqlTransactions, type StepsTableOptions, sqlTransactions } from './sql.js'

/** What `pgTransactions` needs of a client of `pg`. */
export interface PgClient {
  query(text: string, values?: unknown[]): Promise<unknown>
  release(destroy?: boolean): void
  on(event: 'error', listener: () => void): unknown
  removeListener(event: 'error', listener: () => void): unknown
}

/** What `pgTransactions` needs of a pool. (The second way to call `connect` is there for the compiler, which finds the type of the client by it.) */
export interface PgPool<Client> {
  connect: {
    (): Promise<Client>
    (callback: (...args: never[]) => void): void
  }
}

/** Transactions of a pool of `pg`: `Tx` is a client of it, such as Drizzle and Kysely work on. It begins and ends them; savepoints are yours. */
export function pgTransactions<Client extends PgClient>(
  pool: PgPool<Client>,
  options: StepsTableOptions = {}
): SqlTransactions<Client> {
  return sqlTransactions<Client>({
    ...options,
    begin: (work) => transact(pool, work),
    query: (tx, text, values) => tx.query(text, values)
  })
}

async function transact<Client extends PgClient, T>(
  pool: PgPool<Client>,
  work: (client: Client) => Promise<T>
): Promise<T> {
  const client = await pool.connect()
  // A connection that is lost between two queries says so by an event, which nobody else listens to, and which would end the process.
  client.on('error', ignore)
  let broken = false
  try {
    await client.query('BEGIN')
    const result = await work(client)
    await client.query('COMMIT')
    return result
  } catch (error) {
    await client.query('ROLLBACK').catch(() => {
      broken = true
    })
    throw error
  } finally {
    client.removeListener('error', ignore)
    client.release(broken)
  }
}

function ignore(): void {}
