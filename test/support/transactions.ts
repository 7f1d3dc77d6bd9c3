import type { FastifyReply, FastifyRequest, RouteShorthandOptions } from 'fastify'
import type { Pool, PoolConfig } from 'pg'
import type { Test } from 'tap'
import { type IdempotencyRouteOptions, PostgresStore, type TransactionClient } from '../../index.js'
import { build, inject, REPLAYED, type Reply } from './app.js'
import { latch, until } from './latch.js'
import { type PostgresServer, type StartOptions, startPostgres } from './postgres.js'

/* Apps with a route of `transaction: true`, on a PostgreSQL of their own. */

/** What a handler does once its first row is written; `run` counts the runs of the scene. */
export type Work = (request: FastifyRequest, reply: FastifyReply, run: number) => unknown

export interface Settings {
  /** The first run; all later ones reply as `created` does. */
  first?: Work
  options?: IdempotencyRouteOptions
  route?: RouteShorthandOptions
  pool?: PoolConfig
}

export const created: Work = (_request, reply, run) => reply.code(201).header('location', `/${run}`).send({ run })

/** A server for the tests of a file, and what they do with it. */
export async function stage(t: Test, options: StartOptions = {}) {
  const server: PostgresServer = await startPostgres(options)
  t.teardown(() => server.close())
  /** Sees what is committed, and nothing else. */
  const outside = server.pool()
  let scenes = 0
  const pools = new WeakMap<Test, { pool: Pool; name: string }[]>()

  /** A test at whose end every client is back in its pool, and no transaction is open. */
  function test(name: string, body: (t: Test) => Promise<void>): void {
    t.test(name, async (t) => {
      await body(t)
      for (const { pool, name } of pools.get(t) ?? []) {
        const isBack = () => pool.totalCount === pool.idleCount && pool.waitingCount === 0
        await until(isBack, { message: 'all clients to be back in their pool' })
        const open = "SELECT FROM pg_stat_activity WHERE application_name = $1 AND state <> 'idle'"
        const isQuiet = async () => (await outside.query(open, [name])).rowCount === 0
        await until(isQuiet, { message: 'all transactions to be over' })
      }
    })
  }

  /** A pool that the end of the test looks after. */
  function poolOf(t: Test, config: PoolConfig = {}): Pool {
    const name = `pool_${++scenes}`
    const pool = server.pool({ ...config, application_name: name })
    pools.set(t, [...(pools.get(t) ?? []), { pool, name }])
    return pool
  }

  /** Keys and effects in tables of their own, and an app whose handler writes `run 1`, `run 2`, … in its transaction. */
  async function open(t: Test, settings: Settings = {}) {
    const id = ++scenes
    await outside.query(`CREATE TABLE ledger_${id} (note text)`)
    let runs = 0
    /** Another app on the same data, with a pool and a store of its own, as in another process. */
    const again = async ({ first = created, options = {}, route = {}, pool: config = {} }: Settings = {}) => {
      const pool = poolOf(t, config)
      const store = new PostgresStore({ pool, table: `keys_${id}`, sweepInterval: null })
      await store.createTable()
      const app = await build(t, { store })
      const handler = async (request: FastifyRequest, reply: FastifyReply) => {
        const run = ++runs
        await write(request, `run ${run}`)
        return run === 1 ? first(request, reply, run) : created(request, reply, run)
      }
      app.post('/', { ...route, config: { idempotency: { transaction: true, ...options } } }, handler)
      const send = (key = 'k', more: object = {}) =>
        inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': key }, ...more })
      return { app, pool, store, send }
    }
    const write = (request: FastifyRequest, note: string) =>
      transactionOf(request).query(`INSERT INTO ledger_${id} VALUES ($1)`, [note])
    const ledger = async () =>
      (await outside.query<{ note: string }>(`SELECT note FROM ledger_${id} ORDER BY note`)).rows.map(
        ({ note }) => note
      )
    return { id, runs: () => runs, write, ledger, again, ...(await again(settings)) }
  }

  /** Every commit of an effect waits until the gate is opened. */
  async function gate({ id }: { id: number }) {
    const keeper = await outside.connect()
    await keeper.query('SELECT pg_advisory_lock($1)', [id])
    await outside.query(`
    CREATE FUNCTION gate_${id}() RETURNS trigger LANGUAGE plpgsql AS
      'BEGIN PERFORM pg_advisory_xact_lock(${id}); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON ledger_${id} DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION gate_${id}()`)
    const waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = $1 AND NOT granted"
    return {
      reached: () =>
        until(async (): Promise<number> => (await outside.query(waiting, [id])).rows[0]?.pid, { message: 'a commit' }),
      async open() {
        await keeper.query('SELECT pg_advisory_unlock($1)', [id])
        keeper.release()
      }
    }
  }

  return { server, outside, test, open, gate }
}

export function transactionOf({ idempotency }: FastifyRequest): TransactionClient {
  const transaction = idempotency?.transaction
  if (!transaction) throw new Error('There is no transaction')
  return transaction
}

/** What a client makes of a reply: its status, its error's code or the run that made it, and whether it is a replay. */
export function told(reply: Reply | Awaited<ReturnType<typeof inject>>) {
  const [status, text] = 'status' in reply ? [reply.status, reply.text] : [reply.statusCode, reply.payload]
  const { code, run } = JSON.parse(text)
  return [status, code ?? run, reply.headers[REPLAYED] === 'true' ? 'replay' : 'fresh']
}

export const RAN_1 = [201, 1, 'fresh']
export const RAN_2 = [201, 2, 'fresh']
export const REPLAYED_1 = [201, 1, 'replay']
export const IN_PROGRESS = [409, 'FST_IDEMPOTENCY_IN_PROGRESS', 'fresh']
export const UNAVAILABLE = [503, 'FST_IDEMPOTENCY_STORE_UNAVAILABLE', 'fresh']
export const BROKEN = [500, 'FST_IDEMPOTENCY_TRANSACTION', 'fresh']
export const NOT_REPLAYABLE = [409, 'FST_IDEMPOTENCY_NOT_REPLAYABLE', 'fresh']
export const KEY_REUSED = [422, 'FST_IDEMPOTENCY_KEY_REUSED', 'fresh']

/** A first run that waits inside its transaction until it is told how to end. */
export function held(ending: Work = created) {
  const [entered, leave] = [latch<FastifyRequest>(), latch()]
  const first: Work = async (request, reply, run) => {
    entered.open(request)
    await leave.promise
    return ending(request, reply, run)
  }
  return { first, entered: entered.promise, leave: () => leave.open() }
}
