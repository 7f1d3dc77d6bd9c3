import { createSecretKey } from 'node:crypto'
import '@fastify/postgres'
import redis from '@fastify/redis'
import Fastify, { type FastifyInstance } from 'fastify'
import { Cluster, Redis } from 'ioredis'
import * as mysql from 'mysql2'
import * as mysqlPromise from 'mysql2/promise'
import { Pool, type PoolClient } from 'pg'
import { createClient, createClientPool, createCluster, createSentinel, RESP_TYPES } from 'redis'
import idempotency, {
  type Acquisition,
  type IdempotencyOptions,
  type IdempotencyStore,
  MemoryStore,
  MysqlStore,
  idempotency as named,
  PostgresStore,
  RedisStore,
  type RequestIdempotency,
  type StoredRecord
} from '../../index.js'
import { type TestClaim, type TestRecord, TestStore } from '../../lib/testing.js'
import {
  type ConformanceCase,
  type ConformanceOptions,
  type StoreFactory,
  storeConformance
} from '../../lib/testkit.js'

/* Compiled, never run: what the types promise. */

export async function usage(): Promise<void> {
  const app = Fastify()
  await app.register(redis, { url: 'redis://127.0.0.1' })
  await app.register(idempotency, { store: new RedisStore(app.redis), scope: (request) => request.ip })
  await app.register(named, { store: new RedisStore(new Redis(), { keyPrefix: 'x:' }), ttl: null })
  await app.register(idempotency.idempotency, { store: new RedisStore(new Cluster([])) })
  await app.register(idempotency.default, { store: new idempotency.MemoryStore({ maxEntries: 1 }) })

  app.post('/charges', { config: { idempotency: true } }, async (request) => {
    const context: RequestIdempotency | null = request.idempotency
    const signal: AbortSignal | undefined = request.idempotency?.signal
    request.idempotency?.discard()
    // @ts-expect-error: it can be null
    request.idempotency.attempt
    // @ts-expect-error: what an attempt is, the plugin says
    if (context) context.attempt = 2
    return { attempt: context?.attempt, child: context?.deriveKey('stripe'), signal }
  })
  app.post('/refunds', { config: { idempotency: { required: true, ttl: 3_600_000 } } }, async () => 'x')
  app.post('/own', { config: { idempotency: { getKey: async (request) => request.body as string } } }, async () => 'x')
  // @ts-expect-error: of the wrong type
  app.post('/wrong', { config: { idempotency: { ttl: true } } }, async () => 'x')
  // @ts-expect-error: not an option
  await app.register(idempotency, { tll: 1 })
  // @ts-expect-error: not a hook
  await app.register(idempotency, { hook: 'onSend' })
  // @ts-expect-error: it has to answer at once
  await app.register(idempotency, { shouldStore: async () => true })

  await app.register(idempotency, { secret: Buffer.alloc(32) })
  await app.register(idempotency, { secret: [createSecretKey(Buffer.alloc(32)), 'x'.repeat(43), null] as const })
  // @ts-expect-error: what is not set must not be taken for none
  await app.register(idempotency, { secret: process.env.SECRET })
  // @ts-expect-error: none is left out
  await app.register(idempotency, { secret: null })

  await app.register(idempotency, { scope: false, target: (request) => request.url, hook: 'preHandler' })
  // @ts-expect-error: callers are one, or a function tells them apart
  await app.register(idempotency, { scope: true })
  // @ts-expect-error: it has to answer at once
  await app.register(idempotency, { target: async () => '/' })

  const key: string = app.idempotency.generateKey()
  const input: string = app.idempotency.hiddenInput()
  const found: Acquisition | null = await app.idempotency.get(key, { scope: input })
  if (found?.state === 'completed' && found.record.kind === 'reply') {
    const body: Buffer = found.record.body
    found.record.statusCode.toFixed(body.length)
  }
  // @ts-expect-error: a running claim has no record
  if (found?.state === 'running') found.record
  const gone: boolean = await app.idempotency.delete(key)
  app.log.info({ gone })

  // @ts-expect-error: a pool is needed
  new PostgresStore({})
  const postgres = new PostgresStore({ pool: new Pool(), table: 'billing.keys', sweepInterval: null })
  await app.register(idempotency, { store: postgres, transaction: true })
  await app.register(idempotency, { store: new PostgresStore({ pool: app.pg.pool }) })
  await app.register(idempotency, { store: postgres, transaction: 'nested' })
  // @ts-expect-error: no such kind
  await app.register(idempotency, { store: postgres, transaction: 'yes' })
  app.post('/transfers', { config: { idempotency: { transaction: true } } }, async (request) => {
    const client: PoolClient | null | undefined = request.idempotency?.transaction
    const result = await request.idempotency?.transaction?.query<{ id: number }>('SELECT 1 AS id')
    const id: number | undefined = result?.rows[0]?.id
    // @ts-expect-error: null where there is no transaction
    request.idempotency?.transaction.query('SELECT')
    return { id, client }
  })

  new RedisStore(createClient())
  new RedisStore(createClient({ RESP: 2 }).withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer }), { replicas: 1 })
  new RedisStore(createClientPool())
  new RedisStore(createSentinel({ name: 'main', sentinelRootNodes: [] }))
  new RedisStore(createCluster({ rootNodes: [] }))
  // @ts-expect-error: its legacy interface is none
  new RedisStore(createClient().legacy())
  await app.register(idempotency, { store: new MysqlStore({ pool: mysql.createPool('mysql://localhost') }) })
  new MysqlStore({ pool: mysqlPromise.createPool({}), table: 'shop.keys', sweepInterval: null })
  // As @fastify/mysql declares what it decorates.
  type Decorated = Pick<mysql.Pool, 'query' | 'execute' | 'getConnection'> & { pool: mysql.Pool }
  type DecoratedPromise = Pick<mysqlPromise.Pool, 'query' | 'execute' | 'getConnection'> & { pool: mysqlPromise.Pool }
  const decorated = {} as { mysql: Decorated; promise: DecoratedPromise }
  new MysqlStore({ pool: decorated.mysql.pool })
  new MysqlStore({ pool: decorated.promise.pool })
  // @ts-expect-error: that is not the pool
  new MysqlStore({ pool: decorated.promise })
  // @ts-expect-error: a pool is needed
  new MysqlStore({})
  // @ts-expect-error: one connection is no pool
  new MysqlStore({ pool: mysql.createConnection('mysql://localhost') })
  // @ts-expect-error: one connection is no pool
  new MysqlStore({ pool: await mysqlPromise.createConnection('mysql://localhost') })

  // @ts-expect-error: a client is needed
  new RedisStore()
  // @ts-expect-error: not a Redis client
  new RedisStore({})
}

/** A store for tests of one's own routes. */
export async function testing(): Promise<void> {
  const store = new TestStore()
  await Fastify().register(idempotency, { store })
  await store.advance(30_000)
  await store.abandon('key', { scope: 'alice' })
  // @ts-expect-error: a client's key is text
  await store.abandon(1)
  store.fail(1)
  store.fail()
  store.hang()
  const release: () => void = store.hold()
  release()
  store.recover()
  store.clear()
  const [claim]: TestClaim[] = store.claims()
  const states: ('running' | 'abandoned' | 'ended' | undefined)[] = [claim?.state]
  const [record]: TestRecord[] = store.records()
  // @ts-expect-error: a tombstone has no status
  record?.statusCode
  if (record?.kind === 'reply') record.statusCode.toFixed(states.length)
  else record?.reason.toUpperCase()
  // @ts-expect-error: it has no options
  new TestStore({ maxEntries: 1 })
}

/** The conformance kit goes with any test runner. */
export function conformance(test: (name: string, run: () => Promise<void>) => void): void {
  for (const { name, run } of storeConformance(() => new OwnStore())) test(name, run)
  const options: ConformanceOptions = { timeout: 5_000 }
  const factory: StoreFactory = async () => ({
    store: new MemoryStore(),
    second: new MemoryStore(),
    dispose: async () => {},
    interrupt() {},
    spoil: (key) => key.length
  })
  const cases: ConformanceCase[] = storeConformance(factory, options).filter(({ about }) => about !== 'interruptions')
  // @ts-expect-error: nothing is about that
  cases.filter(({ about }) => about === 'interrupts')
  // @ts-expect-error: a store is needed
  storeConformance(() => ({ second: new MemoryStore() }))
  // @ts-expect-error: not an option
  storeConformance(factory, { limit: 1 })
}

/** A store of one's own needs four methods. */
export class OwnStore implements IdempotencyStore {
  readonly records = new Map<string, StoredRecord>()
  async acquire(): Promise<Acquisition> {
    return { state: 'acquired', attempt: 1 }
  }
  async renew(): Promise<boolean> {
    return true
  }
  async complete(key: string, _token: string, record: StoredRecord): Promise<boolean> {
    this.records.set(key, record)
    return true
  }
  async release(): Promise<boolean> {
    return true
  }
}

export const options: IdempotencyOptions = {
  store: new OwnStore(),
  global: true,
  methods: ['POST'],
  header: false,
  field: 'key',
  keyFormat: /^x/,
  fingerprint: (request) => Buffer.from(request.url),
  excludeHeaders: ['x-a'] as const
}

export function plugins(app: FastifyInstance): void {
  app.register(idempotency, () => ({ store: new MemoryStore() }))
}
