import { randomUUID } from 'node:crypto'
import type { EventEmitter } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { inspect } from 'node:util'
import type { PoolConnection, PoolOptions } from 'mysql2'
import type { Pool, RowDataPacket } from 'mysql2/promise'
import t, { type Test } from 'tap'
import { MysqlStore, type MysqlStoreOptions } from '../../index.js'
import { until } from '../support/latch.js'
import { type MariadbServer, startMariadb } from '../support/mariadb.js'
import { claim, lapsed, newKey, reply, same, take, tombstone } from '../support/store-fixtures.js'

const LONG = 60_000

const shared = await startMariadb()
t.teardown(() => shared.close())
const admin = shared.pool({ connectionLimit: 3 })

const newTable = () => `keys_${randomUUID().replaceAll('-', '')}`

interface OpenOptions extends Omit<MysqlStoreOptions, 'pool'> {
  server?: MariadbServer
  /** Of both pools. */
  pool?: PoolOptions
  /** What the connections of both begin with. */
  session?: string[]
}

/** A store on a table of its own, a second one on the same table by another pool, and a look from outside. */
async function open(
  t: Test,
  { server = shared, pool: options = {}, session = [], table = newTable(), ...given }: OpenOptions = {}
) {
  const openPool = () => {
    const pool = server.pool(options)
    t.teardown(() => pool.end())
    pool.pool.on('connection', (connection: PoolConnection) => {
      for (const statement of session) connection.query(statement)
    })
    return pool
  }
  const [pool, other] = [openPool(), openPool()]
  const operator = server === shared ? admin : server.pool({ connectionLimit: 3 })
  const [store, second] = [pool, other].map(
    (pool) => new MysqlStore({ table, sweepInterval: null, ...given, pool })
  ) as [MysqlStore, MysqlStore]
  t.teardown(() => Promise.all([store.close(), second.close()]))
  await store.createTable()
  const rows = async (text: string, values: unknown[] = []) => (await operator.query<RowDataPacket[]>(text, values))[0]
  const row = async (key: string) => (await rows(`SELECT * FROM ${table} WHERE \`key\` = ?`, [key]))[0]
  const count = async () => (await rows(`SELECT COUNT(*) AS n FROM ${table}`))[0]?.n as number
  return { store, second, pool, other, operator, table, rows, row, count }
}

/** Puts rows there that have expired, or that have not. */
async function fill(table: string, count: number, { expired = true, prefix = 'old' } = {}): Promise<void> {
  const values = Array.from(
    { length: count },
    (_, n) => `('${prefix} ${n}', 'completed', 't', 'r', 0, ${expired ? 1 + n : 9e15}, 'x')`
  )
  await admin.query(`INSERT INTO ${table} VALUES ${values.join(', ')}`)
}

/** Keeps what is sent by the connections that the pool opens from now on. */
function listen(pool: Pool): { sql: string; values: unknown[] }[] {
  const sent: { sql: string; values: unknown[] }[] = []
  pool.pool.on('connection', (connection: PoolConnection) => {
    const execute = connection.execute as (...args: unknown[]) => unknown
    connection.execute = ((...args: unknown[]) => {
      sent.push(args[0] as never)
      return execute.apply(connection, args)
    }) as never
  })
  return sent
}

async function status(pool: Pool, name: string): Promise<number> {
  const [rows] = await pool.query<RowDataPacket[]>(`SHOW SESSION STATUS LIKE '${name}'`)
  return Number(rows[0]?.Value)
}

const never = () => new AbortController().signal

/* The table */

t.test('any number of processes may create the table at once', async (t) => {
  const table = newTable()
  const pools = [shared.pool({ connectionLimit: 10 }), shared.pool({ connectionLimit: 10 })] as const
  const create = (n: number) => new MysqlStore({ pool: pools[n % 2] as Pool, table }).createTable()
  await Promise.all(Array.from({ length: 20 }, (_, n) => create(n)))
  const store = new MysqlStore({ pool: pools[0], table, sweepInterval: null })
  t.match(await store.acquire(newKey(), claim()), { state: 'acquired' })
})

t.test('the table is one of InnoDB whatever the default is, and its bytes know no collation', async (t) => {
  const { table, rows } = await open(t, { session: ["SET default_storage_engine = 'MyISAM'"] })
  const [made] = await rows(`SHOW CREATE TABLE ${table}`)
  t.match(made?.['Create Table'], /ENGINE=InnoDB/)
  t.match(made?.['Create Table'], /`key` varbinary\(500\) NOT NULL/)
})

t.test('a table that is not there is told with what makes it, by whatever is asked first', async (t) => {
  const store = new MysqlStore({ pool: shared.pool(), table: newTable(), sweepInterval: null })
  const missing = {
    code: 'ER_NO_SUCH_TABLE',
    message: /: create it by a migration, or by "await store\.createTable\(\)"$/
  }
  await t.rejects(store.acquire('k', claim()), missing)
  await t.rejects(store.renew('k', 't', 1), missing)
  await t.rejects(store.complete('k', 't', reply(), 1), missing)
  await t.rejects(store.changed('k', never()), missing)
  await t.rejects(store.delete('k'), missing)
})

t.test('the table may be in another database', async (t) => {
  await admin.query('CREATE DATABASE IF NOT EXISTS elsewhere')
  const { store, rows } = await open(t, { table: 'elsewhere.idempotency_keys' })
  await take(store, newKey())
  t.match(await rows('SELECT COUNT(*) AS n FROM elsewhere.idempotency_keys'), [{ n: 1 }])
})

/* What goes over the wire */

t.test('a first claim is one statement, a completion one, and everything else two, each prepared once', async (t) => {
  const { store, pool } = await open(t, { pool: { connectionLimit: 1 } })
  const during = async (work: () => Promise<unknown>) => {
    const counts = async () => [await status(pool, 'Com_stmt_execute'), await status(pool, 'Com_stmt_prepare')] as const
    const [executed, prepared] = await counts()
    await work()
    const [executedThen, preparedThen] = await counts()
    return [executedThen - executed, preparedThen - prepared]
  }
  for (const times of ['first', 'second'] as const) {
    const isFirst = times === 'first'
    const [key, other] = [newKey(), newKey()]
    const [mine, another] = [claim(), claim()]
    const expect = async (what: string, work: () => Promise<unknown>, executed: number, prepared: number) =>
      t.strictSame(await during(work), [executed, isFirst ? prepared : 0], `${what}, for the ${times} time`)
    await expect('a claim', () => store.acquire(key, mine), 1, 1)
    await expect('a claim of what runs', () => store.acquire(key, claim()), 2, 1)
    await expect('a renewal', () => store.renew(key, mine.token, LONG), 2, 1)
    await expect('a step', () => store.step(key, mine.token, ['a', 'b']), 2, 0)
    await expect('a completion', () => store.complete(key, mine.token, reply(), LONG), 1, 1)
    await expect('a replay', () => store.acquire(key, claim()), 2, 0)
    await store.acquire(other, another)
    await expect('a release', () => store.release(other, another.token), 2, 0)
    await expect('a claim of what was released', () => store.acquire(other, claim()), 3, 0)
    await expect('a look', () => store.get(key), 1, 0)
    await expect('a deletion', () => store.delete(key), 2, 1)
  }
})

t.test('whatever the number of keys that are waited for, a connection prepares few statements', async (t) => {
  const { store, second, pool } = await open(t, { pool: { connectionLimit: 1 } })
  const before = await status(pool, 'Com_stmt_prepare')
  for (let n = 1; n <= 60; n++) {
    const key = newKey()
    await take(second, key)
    void store.changed(key, never())
    await sleep(25)
  }
  await sleep(200)
  const prepared = (await status(pool, 'Com_stmt_prepare')) - before
  t.ok(prepared >= 2 && prepared <= 7, `${prepared} statements`)
})

t.test('every statement finds its row by its key, and the sweep what has expired by the index', async (t) => {
  const { store, table, rows, pool } = await open(t)
  const sent = listen(pool)
  // Held meanwhile, so that the pool opens others.
  const connections = [await pool.getConnection()]
  await fill(table, 300)
  await rows(`ANALYZE TABLE ${table}`)
  const [key, gone] = [newKey(), newKey()]
  const token = await take(store, key)
  await store.renew(key, token, LONG)
  await store.changed('old 200', never())
  await store.complete(key, token, reply(), LONG)
  await take(store, gone)
  await store.delete(gone)
  const sweeping = new MysqlStore({ pool, table, sweepInterval: 1 })
  await sweeping.acquire(newKey(), claim())
  await until(() => sent.some(({ sql }) => sql.startsWith('DELETE old')), { message: 'a sweep' })
  await sweeping.close()
  for (const connection of connections) connection.release()
  const seen = new Set<string>()
  await fill(table, 300, { prefix: 'more' })
  for (const { sql, values } of sent) {
    if (sql.startsWith('INSERT') || seen.has(sql)) continue
    seen.add(sql)
    const [[plan] = []] = await admin.execute<RowDataPacket[]>(`EXPLAIN ${sql}`, values as string[])
    const isSweep = /ORDER BY expires_at/.test(sql)
    // "Impossible WHERE noticed after reading const tables": it was read by its key, and is not what was asked for.
    const by = /after reading const tables/.test(plan?.Extra) ? 'PRIMARY' : plan?.key
    t.equal(by, isSweep ? 'expires_at' : 'PRIMARY', `${plan?.type} by ${by}: ${sql}`)
    t.not(plan?.type, 'index', 'it does not read all of it')
  }
  t.equal(seen.size, 7)
})

t.test('times are those of the server, in milliseconds since the epoch, in whatever time zone', async (t) => {
  for (const zone of ['+00:00', '-03:30', '+13:00']) {
    const { store, row } = await open(t, { session: [`SET time_zone = '${zone}'`] })
    const [key, before] = [newKey(), Date.now()]
    const { token } = claim()
    await store.acquire(key, claim({ token, leaseMs: 1_000, retainMs: 5_000 }))
    const claimed = await row(key)
    const drift = claimed?.lease_end - before - 1_000
    t.ok(drift >= -1 && drift < 5_000, `${zone}: ${drift}`)
    t.equal(claimed?.expires_at - claimed?.lease_end, 5_000)
    t.ok(Number.isInteger(claimed?.lease_end))
    await store.complete(key, token, reply(), null)
    t.equal((await row(key))?.expires_at, null)
  }
})

t.test('a token that is too long is refused, where the server would cut it off', async (t) => {
  const { store } = await open(t, { session: ["SET sql_mode = ''"] })
  const [longest, long] = ['\0'.repeat(255), 'x'.repeat(511)]
  const key = newKey()
  t.match(await store.acquire(key, claim({ token: longest, leaseMs: 1 })), { state: 'acquired' })
  t.equal(await store.renew(key, longest, 1), true)
  await sleep(5)
  await t.rejects(store.acquire(key, claim({ token: long, takeover: true })), {
    message: 'A token has at most 255 bytes'
  })
  await t.rejects(store.acquire(newKey(), claim({ token: long })), { message: 'A token has at most 255 bytes' })
  t.equal(await store.complete(key, longest, reply(), LONG), true)
})

/* Transactions of somebody else */

t.test(
  'a claim on a connection with an open transaction is refused, undone, and the connection replaced',
  async (t) => {
    const { store, second, pool, row } = await open(t, { pool: { connectionLimit: 1 } })
    const key = newKey()
    const leak = async () => {
      const connection = await pool.getConnection()
      await connection.beginTransaction()
      connection.release()
    }
    await leak()
    const refused = { message: /somebody has given back a connection with an open transaction/ }
    await t.rejects(store.acquire(key, claim()), refused)
    const token = await take(second, key)
    t.match(await store.acquire(key, claim()), { state: 'running' })
    await store.acquire(newKey(), claim())

    await leak()
    await t.rejects(store.complete(key, token, reply(), LONG), refused)
    await until(async () => (await second.get(key))?.state === 'running')
    t.equal((await row(key))?.state, 'running')
    t.equal(await store.complete(key, token, reply(), LONG), true)
    same(t, await second.get(key), reply())

    await leak()
    await t.rejects(store.delete(key), refused)
    t.match(await second.get(key), { state: 'completed' })
  }
)

t.test('no verdict is of the past, even in a transaction that somebody has left open', async (t) => {
  const { store, second, pool, table } = await open(t, { pool: { connectionLimit: 1 } })
  const [key, other] = [newKey(), newKey()]
  const token = await take(second, key)
  const connection = await pool.getConnection()
  await connection.query('START TRANSACTION WITH CONSISTENT SNAPSHOT')
  await connection.query(`SELECT * FROM ${table}`)
  connection.release()
  await second.complete(key, token, reply(), LONG)
  const owner = await take(second, other)
  same(t, await store.acquire(key, claim()), reply())
  t.match(await store.get(other), { state: 'running' })
  t.equal(
    await store.complete(key, token, reply(), LONG).catch(({ message }) => /open transaction/.test(message)),
    true
  )
  t.equal(await store.renew(other, owner, LONG), true)
})

t.test('connections without autocommit are refused, with the reason', async (t) => {
  const { store, second, pool, count } = await open(t)
  pool.pool.on('connection', (connection: PoolConnection) => void connection.query('SET autocommit = 0'))
  const held = await pool.getConnection()
  const refused = { message: /autocommit off.*give the store a pool of its own/ }
  const key = newKey()
  await t.rejects(store.acquire(key, claim()), refused)
  held.release()
  await until(async () => (await count()) === 0)
  const token = await take(second, key)
  const holding = await pool.getConnection()
  await t.rejects(store.complete(key, token, reply(), LONG), refused)
  holding.release()
  t.equal(await second.complete(key, token, reply(), LONG), true)
})

/* What goes wrong */

t.test('a server that does not write refuses, and is asked by another connection the next time', async (t) => {
  const { store, pool } = await open(t, { pool: { connectionLimit: 1 } })
  const connection = await pool.getConnection()
  await connection.query('SET SESSION TRANSACTION READ ONLY')
  connection.release()
  await t.rejects(store.acquire(newKey(), claim()), { code: 'ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION' })
  t.match(await store.acquire(newKey(), claim()), { state: 'acquired' })
})

t.test('who waits too long for a lock asks again', async (t) => {
  const { store, second, table } = await open(t, { session: ['SET innodb_lock_wait_timeout = 1'] })
  const key = newKey()
  const token = await take(second, key)
  const connection = await admin.getConnection()
  await connection.beginTransaction()
  await connection.query(`SELECT * FROM ${table} WHERE \`key\` = ? FOR UPDATE`, [key])
  const completed = store.complete(key, token, reply(), LONG)
  const found = second.acquire(key, claim())
  await sleep(2_300)
  await connection.rollback()
  connection.release()
  t.equal(await completed, true)
  t.match((await found).state, /^(running|completed)$/)
})

t.test('of many claims and takeovers of few keys, while rows expire and are deleted, each has one owner', async (t) => {
  const { table, rows } = await open(t)
  const deadlocks = async () => Number((await rows("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'"))[0]?.Value)
  const before = await deadlocks()
  const pools = [shared.pool({ connectionLimit: 20 }), shared.pool({ connectionLimit: 20 })]
  const stores = pools.map((pool) => new MysqlStore({ pool, table, sweepInterval: 5 }))
  const keys = Array.from({ length: 4 }, newKey)
  let owners = 0
  for (let round = 1; round <= 12; round++) {
    await Promise.all(
      keys.map(async (key) => {
        const claims = Array.from({ length: 30 }, (_, n) => {
          const wanted = claim({ leaseMs: LONG, retainMs: LONG, takeover: true })
          return (stores[n % 2] as MysqlStore).acquire(key, wanted).then((found) => ({ ...found, token: wanted.token }))
        })
        const won = (await Promise.all(claims)).filter(({ state }) => state === 'acquired')
        owners += won.length
        if (won.length !== 1) t.fail(`${won.length} owners of a key in round ${round}`)
        const [winner] = won as [(typeof won)[0]]
        // Lapsed, expired, or released: the next round takes over, inserts, or replaces.
        if (round % 3 === 0) await stores[0]?.renew(key, winner.token, 1)
        else if (round % 3 === 1) await stores[1]?.complete(key, winner.token, reply(), 1)
        else await stores[1]?.release(key, winner.token)
      })
    )
    await sleep(round % 2 === 0 ? 3 : 12)
  }
  await Promise.all(stores.map((store) => store.close()))
  t.equal(owners, 12 * keys.length)
  t.comment(`${(await deadlocks()) - before} deadlocks`)
})

t.test('connections that are killed, idle or at work, do not end the process, and are replaced', async (t) => {
  const { store, pool, rows } = await open(t)
  await Promise.all(Array.from({ length: 8 }, () => store.acquire(newKey(), claim())))
  const killAll = async () => {
    for (const { id } of await rows('SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID()')) {
      await admin.query(`KILL CONNECTION ${id}`).catch(() => {})
    }
  }
  const working = Promise.allSettled(Array.from({ length: 50 }, () => store.acquire(newKey(), claim())))
  await killAll()
  for (const result of await working) {
    if (result.status === 'rejected') t.notMatch(inspect(result.reason), /INSERT|fingerprint/)
  }
  await sleep(50)
  t.match(await until(() => store.acquire(newKey(), claim()).catch(() => false)), { state: 'acquired' })
  const connection = await pool.getConnection()
  connection.release()
  const core = (connection as unknown as { connection: EventEmitter }).connection
  for (let n = 1; n <= 3; n++) t.doesNotThrow(() => core.emit('error', new Error(`broken ${n}`)))
})

t.test('one pool may serve any number of stores, and gets no more than one listener from them', async (t) => {
  const pool = shared.pool()
  const before = pool.pool.listenerCount('connection')
  for (let n = 0; n < 20; n++) new MysqlStore({ pool, table: newTable() })
  t.equal(pool.pool.listenerCount('connection'), before + 1)
})

t.test('no error tells what is stored', async (t) => {
  const { store, table, rows } = await open(t)
  const SECRET = 's3cret'
  const [key, other] = [newKey(), newKey()]
  await store.acquire(key, claim({ token: SECRET }))
  await rows(`ALTER TABLE ${table} ADD UNIQUE (token)`)
  await lapsed(store, other)
  const twice = await store.acquire(other, claim({ token: SECRET, takeover: true })).catch((error) => error)
  t.match(twice, { code: 'ER_DUP_ENTRY', message: 'Duplicate entry' })
  await rows(`ALTER TABLE ${table} DROP COLUMN lease_end`)
  const failed = await store.complete(key, SECRET, reply({ body: Buffer.from(SECRET) }), LONG).catch((error) => error)
  t.match(failed, { code: 'ER_BAD_FIELD_ERROR' })
  for (const error of [twice, failed]) t.notMatch(inspect(error, { showHidden: true }), /s3cret|UPDATE/)
})

t.test(
  'a reply that is larger than the server takes becomes a tombstone, and the connection is not used again',
  async (t) => {
    await admin.query('SET GLOBAL max_allowed_packet = 2097152')
    t.teardown(() => admin.query('SET GLOBAL max_allowed_packet = DEFAULT'))
    const { store, second } = await open(t, { pool: { connectionLimit: 2 } })
    for (const [size, kept] of [
      [2_000_000, 'reply'],
      [3_000_000, 'tombstone'],
      [30_000_000, 'tombstone']
    ] as const) {
      const key = newKey()
      const token = await take(store, key)
      const large = reply({ body: Buffer.alloc(size, 'x') })
      t.equal(await store.complete(key, token, large, LONG), true)
      const { fingerprint, createdAt } = large
      same(t, await second.get(key), kept === 'reply' ? large : { ...tombstone('too-large'), fingerprint, createdAt })
    }
    const key = newKey()
    const token = await take(store, key)
    const steps = await store.step(key, token, ['s', 'x'.repeat(3_000_000)]).catch(() => 'rejected')
    t.equal(steps, 'rejected', 'a step is not what can be left out')
    t.match(await second.get(key), { state: 'running' })
  }
)

t.test('a server without room takes no further claim, says so, and keeps what it has', async (t) => {
  const server = await startMariadb('--innodb-file-per-table=0', '--innodb-data-file-path=ibdata1:12M')
  t.teardown(() => server.close())
  const { store } = await open(t, { server })
  const key = newKey()
  await take(store, key)
  const fingerprint = 'f'.repeat(500_000)
  const refused = await until(
    () =>
      store.acquire(newKey(), claim({ fingerprint })).then(
        () => false,
        (error) => error
      ),
    { message: 'the server to be full' }
  )
  t.match(refused, {
    code: 'FST_IDEMPOTENCY_STORE_FULL',
    message: /^The database is full/,
    cause: { code: 'ER_RECORD_FILE_FULL' }
  })
  t.match(await store.get(key), { state: 'running' })
})

/* What has expired */

t.test('what has expired is deleted in batches, by many processes at once, and nothing else is', async (t) => {
  const { table, pool, other, count } = await open(t)
  await fill(table, 1_050)
  await fill(table, 50, { expired: false, prefix: 'new' })
  const sent = listen(pool)
  const stores = [pool, other, pool, other].map((pool) => new MysqlStore({ pool, table, sweepInterval: 1 }))
  const claims = await Promise.all(stores.map((store) => store.acquire(newKey(), claim())))
  await until(async () => (await count()) === 50 + claims.length, { message: 'a clean table' })
  await Promise.all(stores.map((store) => store.close()))
  t.equal(await count(), 54)
  for (const { sql, values } of sent) {
    if (sql.startsWith('DELETE old')) t.equal(values.length, 100)
  }
})

t.test('a round of deleting goes on until nothing is left', async (t) => {
  const { table, pool, count } = await open(t)
  await fill(table, 850)
  const store = new MysqlStore({ pool, table, sweepInterval: 1_000 })
  const start = performance.now()
  await store.acquire(newKey(), claim())
  await until(async () => (await count()) === 1, { message: 'a clean table' })
  t.ok(performance.now() - start < 4_000, 'in the first round, or two')
  await store.close()
})

t.test('a sweep locks nothing but what it deletes: claims go on beside it', async (t) => {
  const { store, second, table, pool, other, rows } = await open(t)
  await fill(table, 20, { prefix: 'm' })
  await rows(`ANALYZE TABLE ${table}`)
  const holder = await other.getConnection()
  await holder.beginTransaction()
  // The last one that a sweep comes to.
  await holder.query(`SELECT * FROM ${table} WHERE \`key\` = 'm 9' FOR UPDATE`)
  const sweeping = new MysqlStore({ pool, table, sweepInterval: 1 })
  await sweeping.acquire('z', claim())
  const waits = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'DELETE old%'"
  await until(async () => (await rows(waits)).length > 0, { message: 'a sweep to wait' })
  await sleep(50)
  const start = performance.now()
  const keys = ['a', 'm', 'm 1 and more', 'm 8 and more', 'n', 'y']
  for (const key of keys) {
    t.match(await second.acquire(key, claim({ leaseMs: 1, retainMs: 1 })), { state: 'acquired' }, key)
    await store.complete(key, await take(store, `${key} too`), reply(), 1)
  }
  t.ok(performance.now() - start < 5_000, 'without waiting for it')
  t.equal((await rows(waits)).length, 1, 'it waits still')
  await holder.query(`UPDATE ${table} SET expires_at = 9e15 WHERE \`key\` = 'm 9'`)
  await holder.commit()
  holder.release()
  await until(async () => (await rows(waits)).length === 0, { message: 'the sweep to go on' })
  await sweeping.close()
  const old = await rows(`SELECT \`key\` FROM ${table} WHERE revision = 'r'`)
  t.strictSame(
    old.map(({ key }) => String(key)),
    ['m 9'],
    'what was renewed meanwhile stays'
  )
})
