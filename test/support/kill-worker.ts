import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyReply, type FastifyRequest, type onRequestHookHandler } from 'fastify'
import { Pool, type PoolClient } from 'pg'
import idempotency, {
  type IdempotencyOptions,
  type IdempotencyRouteOptions,
  type IdempotencyStore,
  MysqlStore,
  PostgresStore,
  RedisStore,
  SqliteStore
} from '../../index.js'
import { killOnce } from './kill-note.js'
import {
  HOLD,
  KILL,
  KILLS,
  type Kill,
  type Mode,
  type PLAIN_STORES,
  type Point,
  type Sabotage,
  type Transfer
} from './kill-plan.js'

// A server as a process of its own that kills itself at a point that the request names: `node kill-worker.js <options
// as JSON>`. It prints its URL on a line. POSTGRES, REDIS_PATH, MARIADB and SQLITE say where the servers and the file are (without
// one of the last three, its routes are missing), KILLS_FOLDER where to note a kill, WORKER under which name. SABOTAGE removes one of the safeguards.

const options: IdempotencyOptions = JSON.parse(process.argv[2] ?? '{}')
const { POSTGRES, REDIS_PATH, MARIADB, SQLITE, KILLS_FOLDER = '', WORKER = '' } = process.env
const sabotage = process.env.SABOTAGE as Sabotage | undefined

/** What is known of a request, wherever its asynchronous ways lead. */
interface Way {
  readonly key: string
  readonly kill: Point
  readonly kills: number
  readonly hold: Point
  readonly asked: number
  run: string | null
}

const ways = new AsyncLocalStorage<Way>()
const known = new WeakMap<FastifyRequest, Way>()

function wayOf(request: FastifyRequest): Way {
  let way = known.get(request)
  if (way === undefined) {
    const header = (name: string) => String(request.headers[name] ?? '')
    way = {
      key: header('idempotency-key'),
      kill: header(KILL) as Point,
      kills: Number(header(KILLS)),
      hold: header(HOLD) as Point,
      asked: Date.now(),
      run: null
    }
    known.set(request, way)
  }
  return way
}

/** Kills this process if the request wants that here, and has not had all its kills yet. All in one go. */
function die(point: Point): void {
  const way = ways.getStore()
  if (way?.kill !== point) return
  const kill: Kill = { key: way.key, point, worker: WORKER, run: way.run, at: Date.now() }
  killOnce(KILLS_FOLDER, kill, way.kills)
}

/** A point at which the process may die, and a request may be held. */
async function reach(point: Point): Promise<void> {
  die(point)
  const way = ways.getStore()
  if (way?.hold !== point) return
  await plain.query("INSERT INTO gates VALUES ($1, 'reached')", [way.key])
  const open = "SELECT FROM gates WHERE key = $1 AND state = 'open'"
  while (!(await plain.query(open, [way.key])).rowCount) await sleep(10)
}

/** What must not go wrong even in a sabotaged worker. Nobody takes this end for a kill. */
function insist(condition: boolean, message: string): void {
  if (condition) return
  console.error(message)
  process.exit(1)
}

// ---- The wire: what the transactions send

type Send = (...args: unknown[]) => Promise<unknown>
type Result = { command: string; rows: { found?: string }[] }

/** Watches what a client sends, and what it is answered. */
function watch(client: PoolClient): void {
  const original: Send = client.query.bind(client)
  let committing: Promise<unknown> | null = null
  const send: Send = async (...args) => {
    // Of what goes through `pool.query`, nothing belongs to a transaction.
    if (typeof args.at(-1) === 'function') return original(...args)
    if (committing !== null) await committing
    const text = typeof args[0] === 'string' ? args[0] : (args[0] as { text: string }).text
    if (/\bBEGIN;/.test(text)) {
      await reach('before the claim')
      const answer = sendClaim(original, args[0] as { text: string })
      die('during the claim')
      const results = (await answer) as Result[]
      if (results.some(({ rows }) => rows[0]?.found === 'acquired')) await reach('after the claim')
      return results
    }
    if (/SET state = 'completed'/.test(text)) {
      const answer = original(...args)
      die('during the record')
      return answer
    }
    if (text !== 'COMMIT') return original(...args)
    await reach('before COMMIT')
    if (sabotage === 'commit-after-reply') {
      committing = sleep(50).then(() => original(...args))
      return { command: 'COMMIT', rows: [], rowCount: null }
    }
    // The connection is idle: the bytes are written before the call returns.
    const answer = original(...args)
    die('during COMMIT')
    const result = await answer
    await reach('after COMMIT')
    return result
  }
  client.query = send as never
}

const TRANSACTION = /^(?<before>[\s\S]*BEGIN;\s*SET LOCAL [^;]*;)(?<claim>[\s\S]*);\s*(?<after>SAVEPOINT \w+;[\s\S]*)$/

async function sendClaim(original: Send, query: { text: string }): Promise<unknown> {
  if (sabotage === 'no-owner-check') {
    let { text } = query
    for (const check of ['pg_try_advisory_xact_lock(', "(old.version = 1 AND old.state = 'released') OR"]) {
      insist(text.split(check).length === 2, `There is no "${check}" in: ${text}`)
      text = text.replace(check, `true OR ${check}`)
    }
    return original({ ...query, text })
  }
  if (sabotage === 'lock-outside') {
    const { before = '', claim = '', after = '' } = TRANSACTION.exec(query.text)?.groups ?? {}
    insist(/INSERT INTO/.test(claim), `There is no claim in: ${query.text}`)
    const result = await plain.query({ ...query, text: claim })
    const rest = await original({ ...query, text: `${before}${after}` })
    return [result, ...(rest as unknown[])]
  }
  return original(query)
}

// ---- The stores

/** Watches a store that claims without a transaction. */
function watched<S extends IdempotencyStore>(store: S): S {
  const acquire = store.acquire.bind(store)
  const complete = store.complete.bind(store)
  return Object.assign(store, {
    async acquire(...args: Parameters<typeof acquire>) {
      await reach('before the claim')
      const found = await acquire(...args)
      if (found.state === 'acquired') await reach('after the claim')
      return found
    },
    async complete(...args: Parameters<typeof complete>) {
      const done = await complete(...args)
      if (done) await reach('after the completion')
      return done
    }
  })
}

assert(POSTGRES)
const database = { host: POSTGRES, user: 'postgres', database: 'postgres' }
/** For everything but the transactions. */
const plain = new Pool(database)
const pool = new Pool({ ...database, max: 20 })
pool.on('connect', watch)
// The server ends the connection of a stopped process.
for (const each of [plain, pool]) each.on('error', () => {})

const transactional = new PostgresStore({ pool })
const postgres = new PostgresStore({ pool: plain, table: 'plain_keys' })
await transactional.createTable()
await postgres.createTable()

const routes: Partial<Record<Mode, IdempotencyRouteOptions>> = {
  transaction: { store: transactional, transaction: true },
  'transaction-wait': { store: transactional, transaction: true, onConflict: 'wait' }
}
addRoutes('postgres', postgres)
if (REDIS_PATH !== undefined) {
  const { Redis } = await import('ioredis')
  addRoutes('redis', new RedisStore(new Redis({ path: REDIS_PATH })))
}
if (MARIADB !== undefined) {
  const { createPool } = await import('mysql2')
  const store = new MysqlStore({ pool: createPool(MARIADB) })
  await store.createTable()
  addRoutes('mysql', store)
}
if (SQLITE !== undefined) {
  const { openSqlite } = await import('./sqlite.js')
  addRoutes('sqlite', new SqliteStore({ database: openSqlite(SQLITE) }))
}

function addRoutes(name: (typeof PLAIN_STORES)[number], plain: IdempotencyStore): void {
  const store = watched(plain)
  Object.assign(routes, { [`${name}-rerun`]: { store }, [`${name}-reject`]: { store, onAbandoned: 'reject' } })
}

// ---- The server

const app = Fastify({ forceCloseConnections: true })
await app.register(idempotency, options)

// Twice, because what happens while a body is read belongs to its connection.
const enter: onRequestHookHandler = (request, _reply, done) => ways.run(wayOf(request), done)
app.addHook('onRequest', enter)
app.addHook('preHandler', enter)

for (const [mode, config] of Object.entries(routes)) {
  app.post(`/${mode}`, {
    config: { idempotency: config },
    // Behind the plugin's own, which has stored the reply.
    onSend: async (_request, reply, payload) => {
      if (reply.statusCode === 201) await reach('before the reply')
      return payload
    },
    onResponse: async (_request, reply) => {
      if (reply.statusCode === 201) await reach('after the reply')
    },
    handler: transfer
  })
}

async function transfer(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
  const way = wayOf(request)
  const { key } = way
  const { transaction, attempt = 0, signal } = request.idempotency ?? {}
  const { ms = 0, amount } = request.body as { ms?: number; amount: number }
  signal?.addEventListener('abort', () => void plain.query("INSERT INTO gates VALUES ($1, 'aborted')", [key]))
  const run = randomUUID()
  way.run = run
  if (!transaction) {
    const values = [run, key, WORKER, attempt, way.asked / 1000]
    await plain.query(
      'INSERT INTO runs (run, key, worker, attempt, asked) VALUES ($1, $2, $3, $4, to_timestamp($5))',
      values
    )
  }
  const write = async (amount: number): Promise<number> => {
    const insert = 'INSERT INTO ledger (key, run, amount) VALUES ($1, $2, $3) RETURNING id'
    return (await (transaction ?? plain).query(insert, [key, run, amount])).rows[0].id
  }
  const debit = await write(-amount)
  await reach('between the writes')
  await sleep(ms)
  const credit = await write(amount)
  await reach('after the writes')
  if (!transaction) await plain.query('UPDATE runs SET ended = clock_timestamp() WHERE run = $1', [run])
  const body: Transfer = { run, entries: [debit, credit], attempt }
  return reply.code(201).header('location', `/transfers/${run}`).send(body)
}

console.log(await app.listen({ host: '127.0.0.1', port: 0 }))
