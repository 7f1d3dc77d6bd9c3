import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import t from 'tap'
import { SqliteStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { makeFolder } from '../support/process.js'
import { type OpenFile, sqliteDrivers } from '../support/sqlite.js'
import { conforms } from '../support/store-fixtures.js'

const folder = makeFolder('sqlite')

/** Makes two stores at a time, each with a connection of its own to one file. */
function stores(open: OpenFile) {
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

for (const [name, open] of Object.entries(sqliteDrivers)) {
  conforms(t, `a SqliteStore on ${name} keeps every promise of a store`, stores(open))
  endures(t, `a SqliteStore on ${name}, whose answers get lost`, stores(open))
}
