import { randomUUID } from 'node:crypto'
import { type Pool as CallbackPool, createPool, type PoolConnection, type PoolOptions } from 'mysql2'
import type { RowDataPacket } from 'mysql2/promise'
import t from 'tap'
import { type Mysql2Pool, MysqlStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { startMariadb } from '../support/mariadb.js'
import { conforms } from '../support/store-fixtures.js'

const server = await startMariadb()
t.teardown(() => server.close())

const admin = server.pool({ connectionLimit: 1 })

/** Makes two stores at a time, with a pool for each, on a table of their own. */
async function newStores(pools: readonly [Mysql2Pool, Mysql2Pool]) {
  const table = `keys_${randomUUID().replaceAll('-', '')}`
  await new MysqlStore({ pool: pools[0], table }).createTable()
  const interrupt = async () => {
    const others = "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID() AND command <> 'Daemon'"
    const [connections] = await admin.query<RowDataPacket[]>(others)
    // Some have ended meanwhile.
    for (const { id } of connections) await admin.query(`KILL CONNECTION ${id}`).catch(() => {})
  }
  const spoil = (key: string) => admin.query(`UPDATE ${table} SET value = 'x' WHERE \`key\` = ?`, [key])
  return () => {
    const [store, second] = [new MysqlStore({ pool: pools[0], table }), new MysqlStore({ pool: pools[1], table })]
    const dispose = () => Promise.all([store.close(), second.close()])
    return { store, second, dispose, interrupt, spoil }
  }
}

/** Two pools with callbacks. Each connection begins with the statements. */
function callbackPools(options: PoolOptions, ...statements: string[]): readonly [CallbackPool, CallbackPool] {
  const open = () => {
    const pool = createPool({ socketPath: server.socket, database: 'test', ...options })
    t.teardown(() => pool.promise().end())
    return pool.on('connection', (connection: PoolConnection) => {
      for (const statement of statements) connection.query(statement)
    })
  }
  return [open(), open()]
}

const stores = await newStores([server.pool(), server.pool()])
conforms(t, 'a MysqlStore keeps every promise of a store', stores)

for (const level of ['READ COMMITTED', 'SERIALIZABLE']) {
  const pools = callbackPools({}, `SET SESSION TRANSACTION ISOLATION LEVEL ${level}`)
  conforms(t, `a MysqlStore keeps every promise where transactions are ${level}`, await newStores(pools))
}

/** What would change what is read, sent or counted, but for what a statement says itself. */
const ODD: PoolOptions[] = [
  {
    typeCast: () => 'odd',
    nestTables: '_',
    supportBigNumbers: true,
    bigNumberStrings: true,
    decimalNumbers: true,
    dateStrings: true,
    namedPlaceholders: true,
    stringifyObjects: true,
    timezone: '+05:00',
    charset: 'sjis_japanese_ci',
    flags: ['-FOUND_ROWS'],
    maxPreparedStatements: 2
  },
  { typeCast: false, rowsAsArray: true, disableEval: true, nestTables: true, charset: 'latin1_bin' }
]
/** Not strict at all, and as strict as can be. */
const MODES = ['', 'TRADITIONAL,ANSI,IGNORE_SPACE,NO_UNSIGNED_SUBTRACTION,PIPES_AS_CONCAT,NO_BACKSLASH_ESCAPES']

for (const [n, options] of ODD.entries()) {
  const session = [`SET sql_mode = '${MODES[n]}'`, "SET time_zone = '-03:30'", 'SET sql_safe_updates = 1']
  const pools = callbackPools(options, ...session)
  conforms(t, `a MysqlStore keeps every promise on a pool of odd settings, ${n + 1}`, await newStores(pools))
}

endures(t, 'a MysqlStore whose answers get lost', stores)
