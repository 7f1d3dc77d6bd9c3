import { randomUUID } from 'node:crypto'
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { Pool } from 'pg'
import t, { type Test } from 'tap'
import { type IdempotencyRouteOptions, PostgresStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, inject, REPLAYED } from '../support/app.js'
import {
  type Exchange,
  type Guarantee,
  type History,
  holds,
  now,
  type Rules,
  type Run
} from '../support/http-history.js'
import { latch, until } from '../support/latch.js'
import { startPostgres } from '../support/postgres.js'
import { LOSSES, type Loss, PostgresProxy } from '../support/postgres-proxy.js'
import { newSeed, Random } from '../support/random.js'

/*
 * Several apps under load on one PostgreSQL, which is killed, restarted and frozen, or whose connections are cut
 * between a statement and its answer. Clients repeat what was not answered for good. What has to hold:
 *
 *   without a transaction  one owner, one run, one reply to all; a reply that was seen may be hidden by 503 or 409 for
 *                          as long as it could not be stored, and by nothing else, and not for longer
 *   in a transaction       one effect, one reply to all; who asks after a reply was seen gets it, or 503; no success
 *                          without its effect; no key stays locked
 *
 * What cannot hold: that a handler in a transaction runs once. Its run is undone with its connection, and another may
 * begin while it is still at work. Nor, without a transaction, that a reply outlives a process that could not store it:
 * see the last test. All leases here are longer than the failures, but for those of transactions, which do not matter.
 */

const factor = Number(process.env.FAULTS_FACTOR ?? 1)
const random = new Random(newSeed())
t.comment(`SEED=${random.seed}`)
t.setTimeout(240_000 + 120_000 * factor)

const APPS = 3
const DUPLICATES = 3
/** How long a client asks. */
const PATIENCE_MS = 30_000

const KINDS = ['plain', 'plain-wait', 'transaction', 'transaction-wait'] as const
type Kind = (typeof KINDS)[number]
const isTransactional = (kind: Kind) => kind.startsWith('transaction')

const IN_PROGRESS = '409 FST_IDEMPOTENCY_IN_PROGRESS'
const UNAVAILABLE = '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE'

const PLAIN: Guarantee[] = [
  'one owner',
  'one run',
  'one final run',
  'same reply',
  'no invention',
  'marked replays',
  'known answers',
  'no lock-out',
  'rising attempts'
]
/** A run is final if its effect was committed. */
const TRANSACTIONAL: Guarantee[] = [
  'one final run',
  'same reply',
  'no invention',
  'kept once seen',
  'marked replays',
  'known answers',
  'no lock-out'
]

const server = await startPostgres()
t.teardown(() => server.close())
/** Not one of the apps' connections. */
const outside = server.pool({ max: 2 })
let scenes = 0

interface Scene {
  id: number
  apps: { app: FastifyInstance; name: string; pool: Pool }[]
  history: History
  jobs: Map<string, Job>
  /** Storage keys whose owner met an error of the store once its handler had begun. */
  unstored: Set<string>
}

async function open(t: Test, { lease = 20_000, proxied = 0, gated = false } = {}) {
  const id = ++scenes
  const proxy = await PostgresProxy.start(server, { silence: 600 })
  t.teardown(() => proxy.close())
  await outside.query(`CREATE TABLE ledger_${id} (key text NOT NULL, run text NOT NULL)`)
  /** Holds the runs of the first app. */
  const gate = latch()
  if (!gated) gate.open()
  const insert = `INSERT INTO ledger_${id} VALUES ($1, $2)`
  const history: History = { exchanges: [], runs: [] }
  const work = (worker: string) => async (request: FastifyRequest, reply: FastifyReply) => {
    const { key, ms } = request.body as Job
    const context = request.idempotency
    const id = randomUUID()
    const run: Run = {
      id,
      key,
      payload: key,
      worker,
      attempt: context?.attempt ?? 0,
      started: now(),
      ended: null,
      final: false
    }
    history.runs.push(run)
    try {
      await context?.transaction?.query(insert, [key, id])
      await sleep(ms)
      if (worker === 'app 0') await gate.promise
      run.text = JSON.stringify({ key, run: id })
      run.final = !context?.transaction
    } finally {
      run.ended = now()
    }
    return reply.code(201).type('application/json').send(run.text)
  }
  const unstored = new Set<string>()
  const onError = (message: unknown) => {
    const { key, attempt } = message as { key: string; attempt: number }
    if (attempt > 0) unstored.add(key)
  }
  subscribe('fastify-idempotency:store-error', onError)
  t.teardown(() => unsubscribe('fastify-idempotency:store-error', onError))
  const apps: Scene['apps'] = []
  for (let n = 0; n < APPS; n++) {
    const pool = server.pool({ max: 16, ...(n < proxied && { host: proxy.host }) })
    const store = new PostgresStore({ pool, table: `keys_${id}`, sweepInterval: 1_000 })
    if (n === 0) await store.createTable()
    const name = `app ${n}`
    const app = await build(t, { store, storeTimeout: 500, waitTimeout: 2_000 })
    for (const kind of KINDS) {
      // Longer than a connection is silent: a process that does not know yet that its transaction is lost says 409.
      const idempotency: IdempotencyRouteOptions = isTransactional(kind)
        ? { transaction: true, lease: 2_000 }
        : { lease }
      if (kind.endsWith('wait')) idempotency.onConflict = 'wait'
      app.post(`/${kind}`, { config: { idempotency } }, work(name))
    }
    await app.ready()
    apps.push({ app, name, pool })
  }
  return { id, proxy, gate, apps, history, jobs: new Map(), unstored }
}

interface Job {
  kind: Kind
  key: string
  /** How long the handler takes. */
  ms: number
}

/** One request, as its client sees it. */
async function send(scene: Scene, job: Job, asked = random.between(0, APPS - 1)): Promise<Exchange> {
  const { app, name } = scene.apps[asked] as Scene['apps'][number]
  const exchange: Exchange = { key: job.key, payload: job.key, sent: now(), got: null, worker: name }
  scene.history.exchanges.push(exchange)
  const reply = await inject(app, {
    method: 'POST',
    url: `/${job.kind}`,
    headers: { 'idempotency-key': job.key },
    payload: { ...job }
  })
  const { code } = reply.json() as { code?: string }
  return Object.assign(exchange, {
    got: now(),
    status: reply.statusCode,
    // The codes of the database are many, and all of them are a 500.
    code: code?.startsWith('FST_') ? code : undefined,
    text: reply.payload,
    replayed: reply.headers[REPLAYED] === 'true'
  })
}

/** Asks until there is a final reply. */
async function ask(scene: Scene, job: Job, asked?: number): Promise<Exchange> {
  const end = performance.now() + PATIENCE_MS
  for (;;) {
    const exchange = await send(scene, job, asked)
    const { status = 0 } = exchange
    if ((status < 500 && status !== 409) || performance.now() > end) return exchange
    await sleep(random.between(5, 60))
  }
}

/** Loads the apps for as long as the faults go on, and with some keys at least. Then everybody asks once more. */
async function load(scene: Scene, least: number, faults: () => Promise<void>): Promise<void> {
  const { jobs } = scene
  let over = false
  const lane = async () => {
    while (!over || jobs.size < least) {
      const kind = KINDS[jobs.size % KINDS.length] as Kind
      const job = { kind, key: randomUUID(), ms: random.between(0, 15) }
      jobs.set(job.key, job)
      const client = async (_: unknown, n: number) => {
        if (n > 1) await sleep(random.between(0, 20))
        await ask(scene, job)
      }
      await Promise.all(Array.from({ length: DUPLICATES }, client))
    }
  }
  const injecting = faults().finally(() => {
    over = true
  })
  await Promise.all([injecting, ...Array.from({ length: 16 }, lane)])
  const all = jobs.values()
  const last = async () => {
    for (const job of all) await ask(scene, job)
  }
  await Promise.all(Array.from({ length: 16 }, last))
}

/** What has to hold after all of it. */
async function judge(t: Test, scene: Scene): Promise<void> {
  const { id, jobs, history, apps, unstored } = scene
  const { rows } = await outside.query<{ key: string; run: string }>(`SELECT key, run FROM ledger_${id}`)
  const committed = new Set(rows.map(({ run }) => run))
  const of = (which: (kind: Kind, key: string) => boolean): History => {
    const mine = ({ key }: { key: string }) => which((jobs.get(key) as Job).kind, key)
    return { exchanges: history.exchanges.filter(mine), runs: history.runs.filter(mine) }
  }

  await t.test('without a transaction', async (t) => {
    const plain = of((kind) => !isTransactional(kind))
    holds(t, plain, { guarantees: PLAIN, answers: [IN_PROGRESS, UNAVAILABLE] })
    holds(t, plain, { guarantees: ['kept once seen'], excuses: [IN_PROGRESS, UNAVAILABLE] })
    const kept = of((kind, key) => !isTransactional(kind) && !unstored.has(storageKey(null, key)))
    const excuses = [UNAVAILABLE]
    t.comment(`${unstored.size} replies could not be stored at once, or were not known to be: without those`)
    holds(t, kept, { guarantees: ['kept once seen'], excuses })
  })

  await t.test('in a transaction', async (t) => {
    const transactional = of(isTransactional)
    for (const run of transactional.runs) run.final = committed.has(run.id)
    // What becomes of a statement whose connection is lost is the handler's error.
    const rules: Rules = {
      guarantees: TRANSACTIONAL,
      answers: [IN_PROGRESS, UNAVAILABLE, '500'],
      excuses: [UNAVAILABLE]
    }
    holds(t, transactional, rules)
    const keys = [...jobs.values()].filter(({ kind }) => isTransactional(kind)).map(({ key }) => key)
    t.strictSame(rows.map(({ key }) => key).sort(), keys.sort(), 'each key has one effect')
    const successes = transactional.exchanges.filter(({ status }) => status === 201)
    const isFalse = ({ text = '' }: Exchange) => !committed.has(JSON.parse(text).run)
    t.strictSame(successes.filter(isFalse), [], 'no success without its effect')
    const undone = transactional.runs.filter(({ final }) => !final).length
    t.comment(`${undone} runs were undone`)
  })

  const { rows: states } = await outside.query(`SELECT state, count(*)::int FROM keys_${id} GROUP BY state`)
  t.strictSame(
    states,
    [{ state: 'completed', count: jobs.size }],
    'all keys have their records, and there are no others'
  )
  const areBack = () => apps.every(({ pool }) => pool.totalCount === pool.idleCount && pool.waitingCount === 0)
  await until(areBack, { message: 'all clients to be back in their pools' })
  const open = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
  await until(async () => !(await outside.query(open)).rowCount, { message: 'no open transactions' })
  const answers: Record<string, number> = {}
  for (const { status, code, replayed } of history.exchanges) {
    const answer = replayed ? 'replay' : [status, code].join(' ').trim()
    answers[answer] = (answers[answer] ?? 0) + 1
  }
  t.comment(`${jobs.size} keys, ${history.exchanges.length} requests: ${JSON.stringify(answers)}`)
}

/** Starts the server again, once what is left of the one before is gone. */
async function revive(): Promise<void> {
  const end = performance.now() + 60_000
  for (;;) {
    try {
      return await server.start()
    } catch (error) {
      if (!/ended at its start/.test(String(error)) || performance.now() > end) throw error
      await sleep(50)
    }
  }
}

/** Until so many more requests were made: faults fall into the midst of work. */
async function atWork({ history }: Scene, requests: number): Promise<void> {
  const goal = history.exchanges.length + requests
  await until(() => history.exchanges.length >= goal, { message: 'requests' })
}

t.test('a server that is killed and started again, in three ways', async (t) => {
  const scene = await open(t)
  await load(scene, 60, async () => {
    for (let round = 0; round < 2 * factor; round++) {
      for (const end of ['kill', 'murder', 'stop'] as const) {
        await atWork(scene, random.between(20, 150))
        await server[end]()
        await sleep(random.between(0, 150))
        await revive()
      }
    }
    await atWork(scene, 50)
  })
  await judge(t, scene)
})

t.test('a server that is frozen for longer than storeTimeout: all of it, or some of its processes', async (t) => {
  const scene = await open(t)
  await load(scene, 60, async () => {
    for (let round = 0; round < 5 * factor; round++) {
      await atWork(scene, random.between(20, 150))
      const { rows } = await outside.query<{ pid: number; own: boolean }>(
        'SELECT pid, pid = pg_backend_pid() AS own FROM pg_stat_activity'
      )
      const whole = round % 2 === 0
      const pids = rows.filter(({ own }) => whole || (!own && random.chance(0.4))).map(({ pid }) => pid)
      await server.freeze([...pids, ...(whole ? [server.pid] : [])], random.between(600, 800))
    }
    await atWork(scene, 50)
  })
  await judge(t, scene)
})

/** What a statement is for, how it is known, and how often it gets lost: there are many more claims than others. */
const POINTS: [point: string, sign: RegExp, oneOf: number][] = [
  ['COMMIT', /COMMIT\0/, 3],
  ['the claim of a transaction', /BEGIN;/, 12],
  ['the record of a transaction', /xmin::text/, 4],
  ["the handler's write", /INSERT INTO ledger/, 5],
  ['the claim', /ON CONFLICT/, 12],
  ['the completion', /SET state = 'completed'/, 3]
]

t.test('connections that are cut or fall silent, between statements and their answers', async (t) => {
  const scene = await open(t, { proxied: APPS, lease: 5_000 })
  const { proxy } = scene
  const seen = new Map(POINTS.map(([point]) => [point, 0]))
  const injected = new Map<string, number>()
  proxy.loss = (statement) => {
    const [point, , oneOf = 1] = POINTS.find(([, sign]) => sign.test(statement)) ?? []
    // What nobody asks for, such as giving claims back, gets lost as well.
    if (point === undefined) return random.chance(0.05) ? anyLoss() : null
    const n = (seen.get(point) ?? 0) + 1
    seen.set(point, n)
    if (n % oneOf !== 0) return null
    const loss = LOSSES[(n / oneOf) % LOSSES.length] as Loss
    const name = `${point}: ${loss}`
    injected.set(name, (injected.get(name) ?? 0) + 1)
    return loss
  }
  const isDone = () => injected.size === POINTS.length * LOSSES.length
  await load(scene, 120 * factor, () =>
    until(isDone, { timeout: 120_000, message: 'all kinds of losses' }).then(() => {})
  )
  proxy.loss = () => null
  await judge(t, scene)
  t.comment(`${[...injected.values()].reduce((a, b) => a + b)} losses: ${JSON.stringify(Object.fromEntries(injected))}`)
})

const anyLoss = () => LOSSES[random.between(0, LOSSES.length - 1)] as Loss

t.test('connections that are all cut at once, again and again', async (t) => {
  const scene = await open(t, { proxied: APPS, lease: 5_000 })
  await load(scene, 60, async () => {
    for (let round = 0; round < 10 * factor; round++) {
      await atWork(scene, random.between(5, 60))
      scene.proxy.cut()
    }
    await atWork(scene, 50)
  })
  await judge(t, scene)
})

t.test(
  'an app that is cut off for longer than its lease: others take over, and its late replies change nothing',
  async (t) => {
    const scene = await open(t, { lease: 1_000, proxied: 1, gated: true })
    const { history, proxy, gate } = scene
    const jobs = Array.from({ length: 20 * factor }, (): Job => ({ kind: 'plain', key: randomUUID(), ms: 0 }))
    // Not all at the first attempt: the pool has no connections yet, and to open them can take longer than storeTimeout.
    const late = jobs.map((job) => ask(scene, job, 0))
    await until(() => history.runs.length === jobs.length, { message: 'all to be at work' })
    proxy.loss = () => 'unsent'
    proxy.cut()
    await Promise.all(jobs.map((job) => ask(scene, job, 1)))
    proxy.loss = () => null
    gate.open()
    // What is late goes to those who have waited for it, and to nobody else.
    const lateReplies = await Promise.all(late)
    for (const asked of [0, 1, 2]) await Promise.all(jobs.map((job) => ask(scene, job, asked)))
    const others = { ...history, exchanges: history.exchanges.filter((exchange) => !lateReplies.includes(exchange)) }
    const guarantees: Guarantee[] = ['same reply', 'no invention', 'kept once seen', 'marked replays', 'known answers']
    const answers = [IN_PROGRESS, UNAVAILABLE]
    holds(t, others, { guarantees: [...guarantees, 'no lock-out', 'rising attempts'], answers, excuses: [UNAVAILABLE] })
    const taken = lateReplies.filter(({ key, text }) =>
      history.runs.some((run) => run.key === key && run.text === text)
    )
    t.equal(taken.length, jobs.length, 'each late reply is that of a run of its key')
    t.equal(history.runs.length, 2 * jobs.length)
  }
)

t.test('what cannot be: a reply, sent while it could not be stored, does not outlive its process', async (t) => {
  const scene = await open(t, { lease: 3_000 })
  const { history, apps } = scene
  const [dying, other] = apps as [Scene['apps'][number], Scene['apps'][number]]
  const request = (app: FastifyInstance) =>
    inject(app, { method: 'POST', url: '/plain', headers: { 'idempotency-key': 'k' }, payload: { key: 'k', ms: 300 } })
  await dying.pool.query('SELECT') // so that the claim need not open a connection within storeTimeout
  const sending = request(dying.app)
  await until(() => history.runs.length === 1)
  await server.kill()
  const sent = await sending
  t.equal(sent.statusCode, 201, 'the client has its reply')
  t.equal((await request(dying.app)).payload, sent.payload, 'and gets it again, from the process that made it')
  await dying.app.close()
  await server.start()
  let reply = sent
  const again = async () => {
    reply = await request(other.app)
    return reply.statusCode === 201
  }
  await until(again, { message: 'the claim to lapse' })
  t.not(reply.payload, sent.payload)
  t.strictSame(
    history.runs.map(({ attempt }) => attempt),
    [1, 2],
    'the second run knows that it is one'
  )
})
