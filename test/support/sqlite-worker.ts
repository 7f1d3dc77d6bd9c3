import { randomUUID } from 'node:crypto'
import { SqliteStore } from '../../index.js'
import { openSqlite } from './sqlite.js'
import { claim, reply } from './store-fixtures.js'

/* A process that claims and completes keys in a file until it is killed, and prints each of them once that is answered. */

const [, , path = ''] = process.argv
const store = new SqliteStore({ database: openSqlite(path) })
for (;;) {
  const [key, mine] = [randomUUID(), claim()]
  await store.acquire(key, mine)
  process.stdout.write(`claimed ${key}\n`)
  await store.complete(key, mine.token, reply(), null)
  process.stdout.write(`completed ${key}\n`)
}
