import { randomUUID } from 'node:crypto'
import { SqliteStore } from '../../index.js'
import { sqliteDrivers } from './sqlite.js'
import { claim, reply } from './store-fixtures.js'

/* A process that claims and completes keys in a file until it is killed, and prints each of them once that is answered. */

const [, , path = ''] = process.argv
const [driver] = sqliteDrivers
const store = new SqliteStore({ database: (driver as NonNullable<typeof driver>)[1].open(path) })
for (;;) {
  const [key, mine] = [randomUUID(), claim()]
  await store.acquire(key, mine)
  process.stdout.write(`claimed ${key}\n`)
  await store.complete(key, mine.token, reply(), null)
  process.stdout.write(`completed ${key}\n`)
}
