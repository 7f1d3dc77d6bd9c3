import { InvalidOption } from '../errors.js'
import { type SqlTransactions, type StepsTableOptions, sqlTransactions } from './sql.js'

/** What `mysqlTransactions` needs of a connection of `mysql2/promise`. */
export interface MysqlConnection {
  beginTransaction(): Promise<unknown>
  commit(): Promise<unknown>
  rollback(): Promise<unknown>
  // biome-ignore lint/suspicious/noExplicitAny: what its parameters are, mysql2 says differently in every version
  execute(text: string, values?: any): Promise<unknown>
  release(): unknown
  destroy(): unknown
}

/** What `mysqlTransactions` needs of a pool. */
export interface MysqlPool<Connection> {
  getConnection(): Promise<Connection>
}

/** Transactions of a pool of `mysql2/promise`, on MySQL or MariaDB: `Tx` is a connection of it. Of a pool with callbacks: `pool.promise()`. */
export function mysqlTransactions<Connection extends MysqlConnection>(
  pool: MysqlPool<Connection>,
  options: StepsTableOptions = {}
): SqlTransactions<Connection> {
  if ('promise' in pool) throw new InvalidOption('mysqlTransactions takes a pool of mysql2/promise: pool.promise()')
  return sqlTransactions<Connection>({
    ...options,
    begin: (work) => transact(pool, work),
    query: (tx, text, values) => tx.execute(text, values),
    placeholders: '?'
  })
}

async function transact<Connection extends MysqlConnection, T>(
  pool: MysqlPool<Connection>,
  work: (connection: Connection) => Promise<T>
): Promise<T> {
  const connection = await pool.getConnection()
  let end = () => connection.release()
  try {
    await connection.beginTransaction()
    const result = await work(connection)
    await connection.commit()
    return result
  } catch (error) {
    await connection.rollback().catch(() => {
      end = () => connection.destroy()
    })
    throw error
  } finally {
    end()
  }
}
