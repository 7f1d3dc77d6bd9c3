/* For steps in transactions of the user's. Knows no driver: each is described by what is needed of it. */

export type { CommittedStep, TransactionalStep, Transactions } from '../types/index.js'
export { type LibsqlClient, type LibsqlTransaction, libsqlTransactions } from './transactions/libsql.js'
export { type MongoClient, type MongoCollection, type MongoSession, mongoTransactions } from './transactions/mongo.js'
export { type MysqlConnection, type MysqlPool, mysqlTransactions } from './transactions/mysql.js'
export { type PgClient, type PgPool, pgTransactions } from './transactions/pg.js'
export {
  type SqlTransactions,
  type SqlTransactionsOptions,
  type StepsTableOptions,
  sqlTransactions
} from './transactions/sql.js'
export { type SqliteDatabase, sqliteTransactions } from './transactions/sqlite.js'
