import { inTurn } from './in-turn.js'
import { type SqlTransactions, type StepsTableOptions, sqlTransactions } from './sql.js'

/** What `libsqlTransactions` needs of a transaction of `@libsql/client`. */
export interface LibsqlTransaction {
  execute(statement: { sql: string; args: never[] }): Promise<unknown>
  commit(): Promise<unknown>
  close(): unknown
}

/** What `libsqlTransactions` needs of a client. */
export interface LibsqlClient<Transaction> {
  transaction(mode: 'write'): Promise<Transaction>
}

/**
 * Transactions of `@libsql/client`, in a file or on a server. They take turns, as libSQL lets one write at a time and may refuse the
 * others: a step inside of a step would wait for itself.
 */
export function libsqlTransactions<Transaction extends LibsqlTransaction>(
  client: LibsqlClient<Transaction>,
  options: StepsTableOptions = {}
): SqlTransactions<Transaction> {
  return sqlTransactions<Transaction>({
    ...options,
    begin: (work) => inTurn(client, () => transact(client, work)),
    query: (tx, text, values) => tx.execute({ sql: text, args: values as never[] }),
    placeholders: '?'
  })
}

async function transact<Transaction extends LibsqlTransaction, T>(
  client: LibsqlClient<Transaction>,
  work: (transaction: Transaction) => Promise<T>
): Promise<T> {
  const transaction = await client.transaction('write')
  try {
    const result = await work(transaction)
    await transaction.commit()
    return result
  } finally {
    // Rolls back what is not committed.
    transaction.close()
  }
}
