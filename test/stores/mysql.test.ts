import { randomUUID } from 'node:crypto'
import { type Pool as CallbackPool, createPool, type PoolConnection, type PoolOptions } from 'mysql2'
import type { RowDataPacket } from 'mysql2/promise'
import t from 'tap'
import { type IdempotencyStore, type Mysql2Pool, MysqlStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { Lost } from '../support/flaky-store.js'
import { startMariadb } from '../support/mariadb.js'
import { newSeed, Random } from '../support/random.js'
import { conforms } from '../support/store-fixtures.js'
import { exclusiveHistory, takeoverHistory } from '../support/store-histories.js'
import { TcpProxy } from '../support/tcp-proxy.js'

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

/** Whatever fails got lost, before it was done or behind it: nobody knows. */
function lossy(store: IdempotencyStore): IdempotencyStore {
  const lost = ({ message }: Error) => {
    throw new Lost(message)
  }
  return {
    acquire: (key, claim) => store.acquire(key, claim).catch(lost),
    renew: (key, token, leaseMs) => store.renew(key, token, leaseMs).catch(lost),
    complete: (key, token, record, ttlMs) => store.complete(key, token, record, ttlMs).catch(lost),
    release: (key, token, unused) => store.release(key, token, unused).catch(lost)
  }
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

t.test('a MysqlStore whose connections are cut, before a statement or behind it', async (t) => {
  const random = new Random(newSeed())
  t.comment(`SEED=${random.seed}`)
  const proxy = await TcpProxy.to({ path: server.socket }, random)
  t.teardown(() => proxy.close())
  const { host, port } = proxy
  const pools = callbackPools({ host, port, user: 'root', socketPath: '' })
  const make = await newStores(pools)
  const { store, second, dispose } = make()
  t.teardown(dispose)
  proxy.trouble = { delay: 2, loseCommands: 0.03, loseAnswers: 0.03 }
  const clients = [store, second].map(lossy)
  await exclusiveHistory(t, clients, random)
  await takeoverHistory(t, clients, random)
  proxy.heal()
  t.comment(JSON.stringify(proxy.struck))
  t.ok(proxy.struck.lostCommands > 10 && proxy.struck.lostAnswers > 10)
})
