import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import http from 'node:http'
import { join } from 'node:path'
import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import { Redis } from 'ioredis'
import Libsql from 'libsql'
import { createPool, type PoolConnection, type ResultSetHeader } from 'mysql2/promise'
import { Pool, type PoolClient } from 'pg'
import idempotency, {
  type IdempotencyOptions,
  type IdempotencyStore,
  PostgresStore,
  RedisStore,
  type Step
} from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { mysqlTransactions, pgTransactions, type SqliteDatabase, sqliteTransactions } from '../../lib/transactions.js'
import {
  CLAIMS,
  EPOCH,
  type Event,
  HOLD,
  type Moment,
  type Place,
  type Point,
  type Result,
  RUN,
  SABOTAGE,
  type Sabotage,
  SILENT,
  STEPS,
  type StepName
} from './kill-steps-plan.js'
import { late, weakened } from './kill-steps-sabotage.js'
import { type Latch, latch } from './latch.js'

// A server as a process of its own whose handler has five steps, and is held at the point that a request names, to be killed
// there: `node kill-steps-worker.js <options as JSON>`. It prints its URL on a line. POSTGRES, MARIADB, SQLITE, REDIS and
// FORGETFUL say where the databases are, BOOKS where the service is, HELD where to tell that all stands still, WORKER its name.

const options: IdempotencyOptions = JSON.parse(process.argv[2] ?? '{}')
const { POSTGRES, MARIADB, SQLITE, REDIS, FORGETFUL, BOOKS, HELD = '', WORKER = '' } = process.env
assert(POSTGRES && MARIADB && SQLITE && REDIS && FORGETFUL && BOOKS)

/** What is known of a request, wherever its asynchronous ways lead. */
interface Way {
  readonly key: string
  /** Its storage key. */
  readonly id: string
  readonly hold: Point
  readonly epoch: number
  readonly sabotage: Sabotage | undefined
  readonly run: string
  readonly attempt: number
  /** The step whose transaction has done its work, and is not committed. */
  committing: StepName | null
}

const ways = new AsyncLocalStorage<Way>()

function wayOf(request: FastifyRequest): Way {
  const header = (name: string) => String(request.headers[name] ?? '')
  const key = header('idempotency-key')
  return {
    key,
    id: storageKey(null, key),
    hold: header(HOLD) as Point,
    epoch: Number(header(EPOCH)),
    sabotage: (header(SABOTAGE) || undefined) as Sabotage | undefined,
    run: randomUUID(),
    attempt: request.idempotency?.attempt ?? 0,
    committing: null
  }
}

// ---- The service, and whom to tell

const agent = new http.Agent({ keepAlive: true })

function ask<T>(path: string, body: object): Promise<T> {
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath: BOOKS, path, method: 'POST', agent }, async (response) => {
      let text = ''
      for await (const chunk of response.setEncoding('utf8')) text += chunk
      resolve(JSON.parse(text))
    })
    request.on('error', reject).end(JSON.stringify(body))
  })
}

/** Says whether the handler is to fail. */
async function tell(
  { key, run, attempt, epoch }: Way,
  event: Pick<Event, 'what' | 'step' | 'result' | 'point'>
): Promise<boolean> {
  const told: Event = { ...event, key, run, attempt, epoch, worker: WORKER, at: Date.now() }
  return (await ask<{ fails: boolean }>('/events', told)).fails
}

// ---- Points

/** A point at which a request may be held. */
async function reach(step: StepName, moment: Moment): Promise<void> {
  const way = ways.getStore()
  const point: Point = `${step}: ${moment}`
  if (way?.hold === point) await tell(way, { what: 'held', step, point })
}

/** The same where nothing is waited for: it is told by a file, and the process stands still for ever. */
function reachAtOnce(step: StepName, moment: Moment): void {
  const way = ways.getStore()
  const point: Point = `${step}: ${moment}`
  if (way?.hold !== point) return
  writeFileSync(join(HELD, `${way.key} ${point}`), '')
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)
}

/** The step whose transaction is about to be committed: others than those of steps pass by. */
function committing(): StepName | null {
  const way = ways.getStore()
  const step = way?.committing ?? null
  if (way !== undefined) way.committing = null
  return step
}

async function commit(send: () => unknown): Promise<unknown> {
  const step = committing()
  if (step === null) return send()
  await reach(step, 'before COMMIT')
  const result = await send()
  await reach(step, 'after COMMIT')
  return result
}

function commitAtOnce(send: () => unknown): unknown {
  const step = committing()
  if (step === null) return send()
  reachAtOnce(step, 'before COMMIT')
  const result = send()
  reachAtOnce(step, 'after COMMIT')
  return result
}

/** By storage key, because renewals and releases know of no request. */
const sabotages = new Map<string, Sabotage>()
/** Whose renewals get no answer before their end. */
const silenced = new Map<string, Latch<boolean>>()

function watchedStore<S extends IdempotencyStore>(store: S): S {
  const { step } = store as Required<IdempotencyStore>
  store.step = async (key, token, finished) => {
    // Steps of others are restored by timers, which come from anywhere.
    if (ways.getStore()?.id === key) await reach(finished[0] as StepName, 'before its result is kept')
    return step.call(store, key, token, finished)
  }
  const { renew } = store
  store.renew = (key, ...rest) => silenced.get(key)?.promise ?? renew.call(store, key, ...rest)
  return store
}

// ---- The databases

const pool = new Pool({ host: POSTGRES, user: 'postgres', database: 'postgres' })
pool.on('connect', (client) => {
  const query = client.query.bind(client) as (...args: unknown[]) => unknown
  const send = (...args: unknown[]) => (args[0] === 'COMMIT' ? commit(() => query(...args)) : query(...args))
  client.query = send as never
})

const mariadb = createPool(MARIADB)
const watchedPool = {
  async getConnection(): Promise<PoolConnection> {
    const connection = await mariadb.getConnection()
    const send = connection.commit.bind(connection)
    connection.commit = () => commit(send) as Promise<void>
    return connection
  }
}

const file = new Libsql(SQLITE) as unknown as SqliteDatabase
file.exec('PRAGMA busy_timeout = 30000')
const watchedFile: SqliteDatabase = {
  exec: (text) => (text === 'COMMIT' ? commitAtOnce(() => file.exec(text)) : file.exec(text)),
  prepare: (text) => file.prepare(text)
}

const postgres = pgTransactions<PoolClient>(pool)
const maria = mysqlTransactions(watchedPool)
const sqlite = sqliteTransactions(watchedFile)

// ---- The handler

const INSERT = 'INSERT INTO effects (`key`, run) VALUES (?, ?)'

function perform(way: Way, step: Step, { name, in: place }: (typeof STEPS)[number]): Promise<Result> {
  const { key, run, sabotage } = way
  const work = async (effect: () => Promise<number> | number): Promise<Result> => {
    await tell(way, { what: 'runs', step: name })
    try {
      const id = await effect()
      await reach(name, 'in')
      if (place !== 'service') way.committing = name
      return { id, run }
    } finally {
      await tell(way, { what: 'ran', step: name })
    }
  }
  switch (place) {
    case 'service':
      return step(name, ({ key: derived }) =>
        work(async () => (await ask<{ id: number }>('/effects', { key, step: name, run, derived })).id)
      )
    case 'postgres':
      return step(
        name,
        sabotage === 'memo last' || sabotage === 'memo outside' ? late(pool, sabotage) : postgres,
        (tx) =>
          work(async () => {
            const insert = 'INSERT INTO effects (key, run) VALUES ($1, $2) RETURNING id'
            return (await tx.query(insert, [key, run])).rows[0].id
          })
      )
    case 'mariadb':
      return step(name, maria, (tx) =>
        work(async () => (await tx.execute<ResultSetHeader>(INSERT, [key, run]))[0].insertId)
      )
    case 'sqlite':
      return step(name, sqlite, (tx) =>
        work(() => Number((tx.prepare(INSERT).run(...([key, run] as never[])) as LibsqlInfo).lastInsertRowid))
      )
  }
}

interface LibsqlInfo {
  lastInsertRowid: number | bigint
}

async function buy(request: FastifyRequest, reply: FastifyReply, way: Way): Promise<unknown> {
  const { step } = request.idempotency ?? {}
  assert(step)
  const ids: Partial<Record<StepName, number>> = {}
  for (const each of STEPS) {
    const { name } = each
    await tell(way, { what: 'asks', step: name })
    await reach(name, 'before')
    const result = await perform(way, step, each)
    const fails = await tell(way, { what: 'returned', step: name, result })
    await reach(name, 'after')
    if (fails) throw Object.assign(new Error(`after ${name}`), { code: 'PLANNED' })
    ids[name] = result.id
  }
  return reply.code(201).header(RUN, way.run).send(ids)
}

// ---- The server

const stores: Record<Place, IdempotencyStore> = {
  redis: watchedStore(new RedisStore(new Redis({ path: REDIS }))),
  postgres: watchedStore(weakened(new PostgresStore({ pool, table: CLAIMS }), pool, (key) => sabotages.get(key))),
  forgetful: watchedStore(new RedisStore(new Redis({ path: FORGETFUL })))
}

const app = Fastify({ forceCloseConnections: true })
await app.register(idempotency, options)
for (const [place, store] of Object.entries(stores)) {
  app.post(`/${place}`, { config: { idempotency: { store } } }, (request, reply) => {
    const way = wayOf(request)
    const { id } = way
    if (way.sabotage !== undefined) sabotages.set(id, way.sabotage)
    if (SILENT in request.headers) silenced.set(id, latch())
    return ways.run(way, () => buy(request, reply, way)).finally(() => silenced.get(id)?.open(false))
  })
}
console.log(await app.listen({ host: '127.0.0.1', port: 0 }))
