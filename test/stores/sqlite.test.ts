import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { SqliteStore, type SqliteStoreOptions } from '../../index.js'
import type { ConformanceTopic } from '../../lib/testkit.js'
import { endures } from '../support/bad-network.js'
import { until } from '../support/latch.js'
import { launch, makeFolder } from '../support/process.js'
import { alsoWithNodeSqlite, type SqliteDriverUnderTest, sqliteDrivers } from '../support/sqlite.js'
import { claim, conforms, finish, newKey, reply, same, take } from '../support/store-fixtures.js'

const folder = makeFolder('sqlite')
const LONG = 60_000

/** Makes two stores at a time, each with a connection of its own to one file. */
function stores(open: SqliteDriverUnderTest['open']) {
  const path = join(folder, randomUUID())
  const databases = [open(path), open(path)] as const
  t.teardown(() => databases.map((database) => database.close()))
  return () => {
    const [store, second] = [new SqliteStore({ database: databases[0] }), new SqliteStore({ database: databases[1] })]
    const dispose = () => Promise.all([store.close(), second.close()])
    const spoil = async (key: string) =>
      databases[0].prepare(`UPDATE idempotency_keys SET value = x'00' WHERE key = ? RETURNING 1`).all(key)
    return { store, second, dispose, spoil }
  }
}

for (const [name, driver] of sqliteDrivers) {
  conforms(t, `a SqliteStore on ${name} keeps every promise of a store`, stores(driver.open))
  const bigints: ConformanceTopic[] = ['claims', 'lifetimes']
  conforms(t, `and so it does where integers are bigints (${name})`, stores(driver.openWithBigints), bigints)
  endures(t, `a SqliteStore on ${name}, whose answers get lost`, stores(driver.open))

  t.test(name, async (t) => {
    /** A connection to a file, and a store on it. */
    const open = (t: Test, path = join(folder, randomUUID()), options: Partial<SqliteStoreOptions> = {}) => {
      const database = driver.open(path)
      const store = new SqliteStore({ database, sweepInterval: null, ...options })
      t.teardown(async () => {
        await store.close()
        database.close()
      })
      const rows = () => database.prepare('SELECT key, state FROM idempotency_keys ORDER BY rowid').all()
      return { path, database, store, rows }
    }

    t.test('the table is there when the store is used first, and any number may create it at once', async (t) => {
      const { path, store } = open(t)
      await Promise.all(Array.from({ length: 10 }, () => open(t, path).store.createTable()))
      const key = newKey()
      await finish(store, key)
      await open(t, path).store.createTable()
      same(t, await store.get(key), reply())
    })

    t.test(
      'a file that cannot be written is an error of createTable, and no later call says that it worked',
      async (t) => {
        const { path, store, database } = open(t)
        await store.createTable()
        database.exec('PRAGMA query_only = ON')
        const { store: other, database: readonly } = open(t, path, { table: 'others' })
        readonly.exec('PRAGMA query_only = ON')
        for (let n = 0; n < 2; n++) await t.rejects(other.createTable(), { message: /readonly/ })
        await t.rejects(store.acquire(newKey(), claim()), { message: /readonly/ })
      }
    )

    t.test('what was answered is there after a restart, replies and claims', async (t) => {
      const { path, store } = open(t)
      const [running, completed] = [newKey(), newKey()]
      await take(store, running)
      await finish(store, completed, reply(), null)
      const { store: restarted } = open(t, path)
      t.match(await restarted.acquire(running, claim()), { state: 'running', leaseMs: Number })
      same(t, await restarted.acquire(completed, claim()), reply())
    })

    t.test('nothing of what was answered is lost when processes on one file are killed', async (t) => {
      const { path, store } = open(t)
      await store.createTable()
      const worker = fileURLToPath(new URL('../support/sqlite-worker.js', import.meta.url))
      const start = (n: number) =>
        launch(process.execPath, [worker, path], { env: { SQLITE_DRIVER: name }, log: `${path}.${n}.log` })
      const processes = await Promise.all([1, 2, 3].map(start))
      await until(() => processes.every((each) => each.output().split('\n').length > 50), { timeout: 60_000 })
      for (const each of processes) each.signal('SIGKILL')
      await Promise.all(processes.map((each) => each.exited))
      const lines = processes.flatMap((each) => each.output().split('\n').slice(0, -1))
      const completed = new Set(lines.flatMap((line) => line.match(/^completed (.+)/)?.[1] ?? []))
      for (const key of completed) same(t, await store.get(key), reply())
      for (const line of lines) {
        const key = line.match(/^claimed (.+)/)?.[1]
        if (key !== undefined && !completed.has(key)) t.ok(await store.get(key), 'a claim without a reply')
      }
    })

    t.test('while another process writes, the store waits, and the process does other things', async (t) => {
      const { path, store } = open(t)
      await store.createTable()
      const { database: other } = open(t, path)
      other.exec('BEGIN IMMEDIATE')
      let isDone = false
      const key = newKey()
      const acquired = store.acquire(key, claim()).finally(() => {
        isDone = true
      })
      for (let turns = 0; turns < 20; turns++) await sleep(1)
      t.equal(isDone, false)
      t.equal(await store.get(key), null, 'reading does not wait')
      other.exec('COMMIT')
      t.strictSame(await acquired, { state: 'acquired', attempt: 1 })
    })

    t.test('a file that stays locked is an error', async (t) => {
      const { path, store } = open(t)
      await store.createTable()
      const { database: other } = open(t, path)
      other.exec('BEGIN IMMEDIATE')
      t.teardown(() => other.exec('ROLLBACK'))
      const { now } = performance
      let late = 0
      performance.now = () => now.call(performance) + late
      t.teardown(() => {
        performance.now = now
      })
      const acquired = store.acquire(newKey(), claim())
      await turn()
      late = 10_000
      await t.rejects(acquired, { message: /locked|busy/ })
    })

    t.test('a connection in somebody else’s transaction takes nothing, as it would be undone with that', async (t) => {
      const { store, database } = open(t)
      const key = newKey()
      const token = await take(store, key)
      database.exec('BEGIN')
      const message = /a connection of its own/
      await t.rejects(store.acquire(newKey(), claim()), { message })
      await t.rejects(store.complete(key, token, reply(), LONG), { message })
      await t.rejects(store.get(key), { message })
      database.exec('ROLLBACK')
      t.equal(await store.complete(key, token, reply(), LONG), true)
    })

    t.test('a full disk refuses further claims, and loses nothing of what is there', async (t) => {
      const { store, database } = open(t)
      const key = newKey()
      const token = await take(store, key)
      const pages = Number(database.prepare('PRAGMA page_count').all()[0]?.page_count)
      database.exec(`PRAGMA max_page_count = ${pages}`)
      const body = Buffer.alloc(100_000)
      await t.rejects(store.complete(key, token, reply({ body }), LONG), { message: /full/ })
      const fill = async () => {
        for (;;) await store.acquire(newKey(), claim())
      }
      await t.rejects(fill(), { code: 'FST_IDEMPOTENCY_STORE_FULL' })
      t.match(await store.get(key), { state: 'running' })
      database.exec(`PRAGMA max_page_count = ${2 * pages + 100}`)
      t.equal(await store.complete(key, token, reply({ body }), LONG), true)
    })

    t.test('what has expired is deleted, in small batches between which the process does other things', async (t) => {
      const { store, database, rows } = open(t)
      const kept = newKey()
      await finish(store, kept, reply(), null)
      for (let n = 0; n < 250; n++) await finish(store, newKey(), reply(), 1)
      await sleep(5)
      // How many rows each transaction deletes, and whether the process came to something else in between.
      const batches: number[] = []
      let [deleted, isTurn] = [0, true]
      const watched = {
        exec(text: string) {
          if (text === 'BEGIN IMMEDIATE') {
            // Within a round: what begins one is a timer, and may come at any time.
            if (batches.at(-1) === 100) t.ok(isTurn)
            ;[deleted, isTurn] = [0, false]
            setImmediate(() => {
              isTurn = true
            })
          }
          if (text === 'COMMIT') batches.push(deleted)
          return database.exec(text)
        },
        prepare(text: string) {
          const statement = database.prepare(text)
          if (!text.startsWith('DELETE')) return statement
          return {
            all: (...values: never[]) => {
              deleted++
              return statement.all(...values)
            }
          }
        }
      }
      const swept = new SqliteStore({ database: watched, sweepInterval: 1 })
      await swept.acquire(newKey(), claim())
      await until(() => rows().length === 2, { message: 'all that has expired to be gone' })
      await swept.close()
      t.ok(batches.length > 2 && Math.max(...batches) <= 100, `batches of ${batches}`)
      same(t, await store.get(kept), reply())
    })
  })
}

alsoWithNodeSqlite(t, fileURLToPath(import.meta.url))

/* Options */

const PARTS = { code: 'FST_IDEMPOTENCY_INVALID_OPTION' }
const database = { exec() {}, prepare: () => ({ all: () => [] }) }

for (const [what, options, message] of [
  ['a path', '/var/secret.db', /takes a database, not a path/],
  ['a path as database', { database: '/var/secret.db' }, /option "database" takes an open database, got a path/],
  ['a database itself', database, /takes its database as an option/],
  ['nothing', undefined, /option "database" takes an open database, got undefined/],
  ['a database that answers by promises', { database: { ...database, all() {} } }, /takes an open database/],
  [
    'an unknown option',
    { database, file: 'a' },
    /option "file" is not known; known are database, table, sweepInterval/
  ],
  ...['', 'a b', 'a.b', '"a"', '1a', 'sqlite_keys', 1].map(
    (table) =>
      [`the table ${table}`, { database, table }, /option "table" takes a name of letters, digits and/] as const
  ),
  ...[0, -1, 1.5, 'soon'].map(
    (sweepInterval) =>
      [`an interval of ${sweepInterval}`, { database, sweepInterval }, /"sweepInterval" takes/] as const
  )
] as const) {
  t.test(`a SqliteStore refuses ${what}, and shows nothing of it`, async (t) => {
    t.throws(() => new SqliteStore(options as never), { ...PARTS, message })
    t.throws(() => new SqliteStore(options as never), { message: /^(?!.*secret)/s })
  })
}

t.test('constructing a SqliteStore does nothing to the database', async () => {
  const untouched = () => {
    throw new Error('it was touched')
  }
  new SqliteStore({ database: { exec: untouched, prepare: untouched } })
})
