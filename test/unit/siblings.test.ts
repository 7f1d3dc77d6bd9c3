import t from 'tap'
import { EncryptedStore } from '../../lib/stores/encrypted/encrypted-store.js'
import { innermost } from '../../lib/stores/innermost.js'
import { LocalCache } from '../../lib/stores/memory/local-cache.js'
import { MemoryStore } from '../../lib/stores/memory/memory-store.js'
import { hasSiblings, warnOfSiblings } from '../../lib/stores/memory/siblings.js'
import { MigratingStore } from '../../lib/stores/migrating/migrating-store.js'
import { PostgresStore } from '../../lib/stores/postgres/postgres-store.js'
import type { IdempotencyStore } from '../../types/index.js'
import { warningsOf } from '../support/warnings.js'

const shared = () => new PostgresStore({ pool: { query() {}, connect() {}, on() {} } as never })
const sealed = (store: IdempotencyStore) => new EncryptedStore(store, { keys: [Buffer.alloc(32, 1)] })
const told = (store: IdempotencyStore) => warningsOf('FST_IDEMPOTENCY_MEMORY_STORE', () => warnOfSiblings(store))

t.test('a MemoryStore is found on either side of a move', (t) => {
  const memory = new MemoryStore()
  const other = shared()
  t.same(innermost(new LocalCache(new MigratingStore(sealed(memory), other))), [memory, other])
  t.same(innermost(new MigratingStore(new LocalCache(other), memory)), [other, memory])
  t.end()
})

t.test(
  'a worker of node:cluster has siblings, what pm2 started as one of several, and a function on AWS Lambda',
  async (t) => {
    t.equal(hasSiblings(true, {}), true)
    t.equal(hasSiblings(false, { NODE_APP_INSTANCE: '0', exec_mode: 'cluster_mode' }), true)
    t.equal(hasSiblings(false, { NODE_APP_INSTANCE: '1', exec_mode: 'fork_mode' }), true)
    t.equal(hasSiblings(false, { NODE_APP_INSTANCE: '0', exec_mode: 'fork_mode' }), false)
    t.equal(hasSiblings(false, { AWS_LAMBDA_FUNCTION_NAME: 'charges' }), true)
    t.equal(hasSiblings(false, {}), false)
  }
)

t.test('a MemoryStore in a process with siblings is told once, whatever is in front of it', async (t) => {
  t.strictSame(await told(new MemoryStore()), [], 'nothing where there are none')
  process.env.NODE_APP_INSTANCE = '1'
  t.teardown(() => {
    delete process.env.NODE_APP_INSTANCE
  })
  const moving = new MigratingStore(shared(), sealed(shared()))
  for (const store of [shared(), sealed(shared()), new LocalCache(shared()), moving]) {
    t.strictSame(await told(store), [])
  }
  t.match(await told(new LocalCache(sealed(new MemoryStore()))), [/a retry that comes to another one/])
  t.strictSame(await told(new MemoryStore()), [])
})

t.test('what is in front of a store that shares its locks with transactions shares them too', async (t) => {
  const plain = () => new MemoryStore()
  const sharing = () => Object.assign(new MemoryStore(), { sharesLocks: true })
  const keys = [Buffer.alloc(32, 1)]
  for (const [store, shares] of [
    [new LocalCache(sharing()), true],
    [new EncryptedStore(sharing(), { keys }), true],
    [new MigratingStore(sharing(), plain()), true],
    [new MigratingStore(plain(), new LocalCache(sharing())), true],
    [new LocalCache(plain()), false],
    [new EncryptedStore(plain(), { keys }), false],
    [new MigratingStore(plain(), plain()), false]
  ] as const) {
    t.equal(store.sharesLocks, shares, store.constructor.name)
  }
})
