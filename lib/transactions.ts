// For steps in transactions of the user's. Knows no driver: what each needs to be able to do is described.

export type { LibsqlClient, LibsqlTransaction } from './transactions/libsql.js'
export { libsqlTransactions } from './transactions/libsql.js'
export type { MongoCollection, MongoConnection, MongoSession } from './transactions/mongo.js'
export { mongoTransactions } from './transactions/mongo.js'
export type { MysqlConnection, MysqlPool } from './transactions/mysql.js'
export { mysqlTransactions } from './transactions/mysql.js'
export type { PgClient, PgPool } from './transactions/pg.js'
export { pgTransactions } from './transactions/pg.js'
export type { SqlTransactions, SqlTransactionsOptions, StepsTableOptions } from './transactions/sql.js'
export { sqlTransactions } from './transactions/sql.js'
export type { SqliteDatabase } from './transactions/sqlite.js'
export { sqliteTransactions } from './transactions/sqlite.js'
