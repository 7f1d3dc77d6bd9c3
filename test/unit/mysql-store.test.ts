import { EventEmitter } from 'node:events'
import { readFileSync } from 'node:fs'
import { inspect } from 'node:util'
import { createConnection, createPool, createPoolCluster } from 'mysql2'
import { createPool as createPromisePool } from 'mysql2/promise'
import t from 'tap'
import { type Mysql2Pool, MysqlStore } from '../../index.js'
import { claimFailure, explain, isContention } from '../../lib/stores/mysql/errors.js'
import { MysqlDriver } from '../../lib/stores/mysql/mysql-driver.js'
import { latch } from '../support/latch.js'
import { claim, reply } from '../support/store-fixtures.js'
import { VirtualTime } from '../support/virtual-time.js'

const ADDRESS = 'mysql://user:secret@localhost/db'

const failure = (errno: number, code = `ER_${errno}`, message = 'x') =>
  Object.assign(new Error(message), { errno, code })

/** A pool with one connection, which gives the next of some answers, or is lost for the next of some errors. */
class FakePool extends EventEmitter {
  readonly answers: (object | Error | Promise<object>)[] = []
  readonly sent: { sql: string; values: unknown[] }[] = []
  readonly ends: string[] = []

  promise() {
    return this
  }

  execute() {}

  async getConnection(): Promise<unknown> {
    return {
      execute: async (statement: { sql: string; values: unknown[] }) => {
        this.sent.push(statement)
        const answer = this.answers.shift() ?? { affectedRows: 1, serverStatus: 2 }
        if (answer instanceof Error) throw answer
        return [await answer]
      },
      release: () => this.ends.push('released'),
      destroy: () => this.ends.push('destroyed')
    }
  }
}

function open() {
  const pool = new FakePool()
  return { pool, store: new MysqlStore({ pool: pool as unknown as Mysql2Pool, sweepInterval: null }) }
}

t.test('the pools of mysql2 and mysql2/promise are taken, and nothing is sent or opened', async (t) => {
  const pools = [createPool(ADDRESS), createPromisePool(ADDRESS)]
  for (const pool of pools) {
    new MysqlStore({ pool })
    new MysqlStore({ pool, table: `shop.${'k'.repeat(64)}`, sweepInterval: null })
  }
  for (const pool of [pools[0], createPool(ADDRESS).promise()] as Mysql2Pool[]) {
    // What @fastify/mysql decorates: app.mysql.pool is the pool.
    const decorated = { mysql: { pool } }
    t.doesNotThrow(() => new MysqlStore({ pool: decorated.mysql.pool }))
  }
})

t.test('what is no pool is refused with what to do, and no password is told', async (t) => {
  const connection = createConnection({ host: '127.0.0.1', port: 1, password: 'secret' })
  connection.on('error', () => {})
  t.teardown(() => connection.destroy())
  // As the package mysql has it.
  const old = Object.assign(new EventEmitter(), { query() {}, getConnection() {}, config: { password: 'secret' } })
  const cluster = createPoolCluster()
  const WANTED = 'new MysqlStore\\(\\{ pool: createPool\\(uri\\) \\}\\), with createPool of "mysql2"$'
  for (const [given, message] of [
    [ADDRESS, `^MysqlStore takes a pool, not a URL: ${WANTED}`],
    [{ pool: ADDRESS }, `^MysqlStore option "pool" takes a pool of mysql2, not a URL: ${WANTED}`],
    [createPool(ADDRESS), `^MysqlStore takes its pool as an option: ${WANTED}`],
    [createPromisePool(ADDRESS), `^MysqlStore takes its pool as an option: ${WANTED}`],
    [{ uri: ADDRESS }, `^MysqlStore has no options of a connection, it takes a pool: ${WANTED}`],
    [{ host: 'secret' }, `^MysqlStore has no options of a connection, it takes a pool: ${WANTED}`],
    [{ pool: connection }, `"pool" takes a pool of mysql2, not a single connection: ${WANTED}`],
    [{ pool: connection.promise() }, `"pool" takes a pool of mysql2, not a single connection: ${WANTED}`],
    [{ pool: old }, `"pool" takes a pool of mysql2, not of mysql: ${WANTED}`],
    [undefined, '"pool" takes a pool of mysql2, such as app\\.mysql\\.pool of @fastify/mysql, got undefined'],
    [{ pool: null }, '"pool" takes a pool of mysql2, such as app\\.mysql\\.pool of @fastify/mysql, got null'],
    [{ pool: { password: 'secret' } }, 'got \\[Object\\] \\(object\\)$'],
    [{ pool: cluster }, '"pool" takes a pool of mysql2, such as .* got \\[PoolCluster\\] \\(object\\)$'],
    [{ pool: cluster.of('*') }, 'got \\[PoolNamespace\\] \\(object\\)$']
  ] as const) {
    const error = t.throws(() => new MysqlStore(given as never), { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
    t.match((error as Error).message, new RegExp(message))
    t.notMatch((error as Error).message, /secret/)
  }
})

t.test('options are checked by name', async (t) => {
  const pool = createPool(ADDRESS)
  const refuses = (options: object, message: RegExp) =>
    t.throws(() => new MysqlStore({ pool, ...options }), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message })
  refuses({ tabel: 'x' }, /^MysqlStore option "tabel" is not known; known are pool, table, sweepInterval$/)
  for (const table of ['', 'a b', 'a`b', '1a', 'a.b.c', '.a', 'a.', 'ä', 'k'.repeat(65), 5, null]) {
    refuses({ table }, /^MysqlStore option "table" takes a name of letters, digits and underscores, at most 64, /)
  }
  for (const sweepInterval of [0, -1, 1.5, 'soon', Number.NaN]) {
    refuses(
      { sweepInterval },
      /^MysqlStore option "sweepInterval" takes a positive integer of milliseconds or a text such as '24h', or null/
    )
  }
})

t.test('a statement that has lost against others is repeated, 20 times at most', async (t) => {
  for (const errno of [1213, 1205, 1020]) {
    const { pool, store } = open()
    pool.answers.push(...Array.from({ length: 19 }, () => failure(errno)))
    t.match(await store.acquire('k', claim()), { state: 'acquired' })
    t.equal(pool.sent.length, 20)
    pool.answers.push(...Array.from({ length: 20 }, () => failure(errno)))
    await t.rejects(store.acquire('k', claim()), { code: `ER_${errno}` })
    t.equal(pool.sent.length, 40)
    t.strictSame([...new Set(pool.ends)], ['released'])
  }
  for (const errno of [1062, 1146, 1114, 1317, -104]) t.equal(isContention(failure(errno)), false, `${errno}`)
})

t.test('what is not known to be undone is not repeated', async (t) => {
  const { pool, store } = open()
  pool.answers.push(Object.assign(new Error('Connection lost'), { code: 'PROTOCOL_CONNECTION_LOST', fatal: true }))
  await t.rejects(store.acquire('k', claim()), { code: 'PROTOCOL_CONNECTION_LOST', message: 'Connection lost' })
  t.equal(pool.sent.length, 1)
})

t.test('a connection to a server that does not write, or that takes no more, is not given back', async (t) => {
  for (const errno of [1290, 1792, 1836, 1153]) {
    const { pool, store } = open()
    pool.answers.push(failure(errno))
    await t.rejects(store.acquire('k', claim()), { code: `ER_${errno}` })
    t.strictSame(pool.ends, ['destroyed'])
  }
})

t.test('a connection that is silent for a minute is not given back, and its late answer changes nothing', async (t) => {
  const { pool, store } = open()
  const answer = latch<object>()
  pool.answers.push(answer.promise)
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  const claimed = store.acquire('k', claim())
  const outcome = claimed.then(
    () => 'acquired',
    ({ message }) => message
  )
  await time.pass(59_999)
  t.strictSame(pool.ends, [])
  await time.pass(1)
  t.equal(await outcome, 'The idempotency store did not answer within 60000 ms')
  t.strictSame(pool.ends, ['destroyed'])
  answer.open({ affectedRows: 1, serverStatus: 2 })
})

t.test('a server that says itself that a reply is too large is not asked how much it takes', async (t) => {
  const { pool, store } = open()
  pool.answers.push(failure(1153))
  t.equal(await store.complete('k', 't', reply(), 1), true)
  t.equal(pool.sent.length, 2)
  t.match(String(pool.sent[1]?.values[3]), /too-large/)
})

t.test('a reply is not given up where the server would take it, or cannot be asked', async (t) => {
  const lost = () => Object.assign(new Error('lost'), { code: 'ECONNRESET' })
  for (const answer of [[{ most: 1_000_000 }], lost()]) {
    const { pool, store } = open()
    pool.answers.push(lost(), answer)
    await t.rejects(store.complete('k', 't', reply({ body: Buffer.alloc(990_000) }), 1), { message: 'lost' })
    t.equal(pool.sent.length, 2)
  }
  const { pool, store } = open()
  pool.answers.push(lost(), [{ most: 1_000_000 }])
  t.equal(await store.complete('k', 't', reply({ body: Buffer.alloc(1_000_000) }), 1), true)
})

t.test('numbers may come as strings', async (t) => {
  const { pool, store } = open()
  pool.answers.push({ affectedRows: '1', serverStatus: 2 })
  t.match(await store.acquire('k', claim()), { state: 'acquired' })
})

t.test('an error is told without statement and values', async (t) => {
  const error = Object.assign(failure(1064, 'ER_PARSE_ERROR', 'You have an error'), {
    sql: 'secret',
    parameters: ['secret']
  })
  t.strictSame({ ...explain(error) }, { name: 'Error', code: 'ER_PARSE_ERROR', errno: 1064 })
  t.equal(explain(error).message, 'You have an error')
  t.notMatch(inspect(explain(error), { showHidden: true }), /secret/)
  t.strictSame({ ...explain(new TypeError('x')) }, { name: 'TypeError' })
  t.match(explain('x'), { message: 'x' })
  t.equal(explain(failure(1062, 'ER_DUP_ENTRY', "Duplicate entry 'secret' for key 'x'")).message, 'Duplicate entry')
  t.equal(explain(Object.assign(new AggregateError([]), { code: 'ECONNREFUSED' })).message, 'ECONNREFUSED')
})

t.test('a server that has no room is full for a claim, and any other error is what it is', async (t) => {
  for (const errno of [1021, 1114]) {
    const error = failure(errno)
    t.match(claimFailure(error), { name: 'StoreFull', code: 'FST_IDEMPOTENCY_STORE_FULL', cause: error })
  }
  for (const errno of [1213, 1040, -104]) {
    const error = failure(errno)
    t.equal(claimFailure(error), error)
  }
})

t.test('the table of the documentation is that of createTable', async (t) => {
  const page = readFileSync(new URL('../../../docs/stores.md', import.meta.url), 'utf8')
  const [, ddl] = /<!-- ddl: mysql -->\n```sql\n([\s\S]*?);\n```/.exec(page) ?? []
  t.equal(ddl, new MysqlDriver(createPool(ADDRESS), 'idempotency_keys').ddl)
})
