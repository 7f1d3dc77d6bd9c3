import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { read, start } from '../support/app.js'
import { Fleet, type Worker } from '../support/kill-fleet.js'
import {
  HOLD,
  KILL,
  KILLS,
  type Kill,
  type Mode,
  PLAIN_POINTS,
  PLAIN_STORES,
  type Point,
  type Sabotage,
  SCHEMA,
  TRANSACTION_POINTS,
  type Transfer
} from '../support/kill-plan.js'
import { until } from '../support/latch.js'
import { countBy, shuffled, some } from '../support/lists.js'
import { FACTOR } from '../support/load-scene.js'
import { startMariadb } from '../support/mariadb.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { newSeed, Random } from '../support/random.js'
import { startRedis } from '../support/redis.js'
import { soon } from '../support/store-fixtures.js'

// Server processes that kill themselves at every point of a request's life, and clients that ask again until they have
// an answer. With `transaction: true` each key has one effect and one reply. That the check would see it otherwise
// is shown by workers without one of the safeguards. Then, what is promised without a transaction, which is less.

const script = fileURLToPath(new URL('../support/kill-worker.js', import.meta.url))
const folder = makeFolder('kills')

t.setTimeout(480_000)

const random = new Random(newSeed())
t.comment(`SEED=${random.seed}`)

const postgres = await startPostgres()
t.teardown(() => postgres.close())
const redis = await startRedis()
t.teardown(() => redis.close())
const mariadb = await startMariadb()
t.teardown(() => mariadb.close())
/** Another connection than those of the workers. */
const pool = postgres.pool()
await pool.query(SCHEMA)

/** How long a client asks. Far less than the lease of a transaction, far more than it takes. */
const LIMIT_MS = 60_000
const LONG_LEASE_MS = 180_000

// ---- The workers

interface FleetOptions {
  options: IdempotencyOptions
  sabotage?: Sabotage
  /** With what is not PostgreSQL as well. */
  withAll?: boolean
}

type Workers = Fleet<Kill>

function startFleet(t: Test, count: number, { options, sabotage, withAll }: FleetOptions): Promise<Workers> {
  const env = {
    POSTGRES: postgres.host,
    ...(withAll && { REDIS_PATH: redis.path, MARIADB: mariadb.url, SQLITE: join(folder, 'sqlite') }),
    ...(sabotage && { SABOTAGE: sabotage })
  }
  return Fleet.start(t, count, { args: [script, JSON.stringify(options)], env, folder, random })
}

// ---- The clients

/** A key, and what becomes of those who work on it. */
interface Plan {
  key: string
  mode: Mode
  kill?: Point
  /** How often. */
  kills?: number
  /** How long the handler takes between its writes. */
  ms?: number
}

interface Answer {
  status: number
  code: string | undefined
  replayed: boolean
  /** The status, the headers and the body, byte for byte. */
  bytes: string
  transfer: Transfer
  /** How long it took, of the worker's time as well. */
  tookMs: number
}

let requests = 0

/** One request. Rejects when the connection fails. */
async function send(worker: Worker, { key, mode, kill, kills = 0, ms = 0 }: Plan, hold?: Point): Promise<Answer> {
  requests++
  const before = performance.now()
  const sent = start(Number(new URL(worker.url).port), {
    path: `/${mode}`,
    key,
    headers: { ...(kill && { [KILL]: kill, [KILLS]: String(kills) }), ...(hold && { [HOLD]: hold }) },
    body: JSON.stringify({ amount: 100, ms })
  })
  const limit = setTimeout(sent.hangUp, LIMIT_MS)
  const response = await sent.response.then(read).finally(() => clearTimeout(limit))
  const body = response.body.toString('latin1')
  const headers = Object.entries(response.headers).filter(([name]) => !OWN_HEADERS.has(name))
  const { code, ...transfer } = JSON.parse(body)
  return {
    status: response.status,
    code,
    replayed: response.headers['idempotent-replayed'] === 'true',
    bytes: JSON.stringify([response.status, headers, body]),
    transfer,
    tookMs: performance.now() - before
  }
}

/** What each reply has of its own, be it a replay or not. */
const OWN_HEADERS = new Set(['date', 'connection', 'keep-alive', 'idempotent-replayed'])

const isSuccess = ({ status }: Answer) => status === 201
const isNotYet = ({ status, code }: Answer) => status === 503 || code === 'FST_IDEMPOTENCY_IN_PROGRESS'

/** Asks one worker or another until there is an answer; or says what was the last thing that it heard. */
async function ask(fleet: Workers, plan: Plan, limitMs: number): Promise<Answer | string> {
  const end = performance.now() + limitMs
  let heard = 'nothing'
  while (performance.now() < end) {
    const worker = fleet.any()
    if (worker !== undefined) {
      const answer = await send(worker, plan).catch((error: Error) => String(error.cause ?? error))
      if (typeof answer !== 'string' && !isNotYet(answer)) return answer
      heard = typeof answer === 'string' ? answer : `${answer.status} ${answer.code}`
    }
    await sleep(random.between(10, 40))
  }
  return heard
}

// ---- The check

interface Violation {
  /**
   * `late`: no answer within the limit; `refused`: an answer that is none; `unseen`: a success whose effect is not
   * there; `effects`: not exactly one; `reply`: a success that differs from another.
   */
  kind: 'late' | 'refused' | 'unseen' | 'effects' | 'reply'
  key: string
  what: string
}

interface Entry {
  id: number
  run: string
  amount: number
}

async function ledger(key: string): Promise<Entry[]> {
  return (await pool.query('SELECT id, run, amount FROM ledger WHERE key = $1 ORDER BY id', [key])).rows
}

/** What is wrong with the effects, if the reply is true and there is nothing else. */
function faultIn(entries: Entry[], { run, entries: [debit, credit] }: Transfer): string | null {
  const wanted = JSON.stringify([
    { id: debit, run, amount: -100 },
    { id: credit, run, amount: 100 }
  ])
  const found = JSON.stringify(entries)
  return found === wanted ? null : `${found}, wanted ${wanted}`
}

interface CheckOptions {
  limitMs?: number
  duplicates?: number
}

/** Runs many keys, some at a time, with duplicates of each at the same time, and checks that each happens once. */
async function check(fleet: Workers, plans: Plan[], { limitMs = LIMIT_MS, duplicates = 4 }: CheckOptions = {}) {
  const violations: Violation[] = []
  let slowest = 0
  await some(shuffled(plans, random), 12, async (plan) => {
    const { key } = plan
    const violated = (kind: Violation['kind'], what: string) => void violations.push({ kind, key, what })
    const successes = new Set<string>()
    const client = async (plan: Plan): Promise<Answer | null> => {
      const start = performance.now()
      const answer = await ask(fleet, plan, limitMs)
      slowest = Math.max(slowest, performance.now() - start)
      if (typeof answer === 'string') {
        violated('late', answer)
        return null
      }
      if (!isSuccess(answer)) {
        violated('refused', answer.bytes)
        return null
      }
      successes.add(answer.bytes)
      const fault = faultIn(await ledger(key), answer.transfer)
      if (fault !== null) violated('unseen', fault)
      return answer
    }
    const answers = await Promise.all(
      Array.from({ length: duplicates }, async (_, n) => {
        if (n > 1) await sleep(random.between(0, 30))
        return client(plan)
      })
    )
    if (answers.includes(null)) return
    const last = await client({ key, mode: plan.mode, ...(plan.ms && { ms: plan.ms }) })
    if (last === null) return
    if (!last.replayed) violated('reply', `The last retry was no replay: ${last.bytes}`)
    if (successes.size !== 1) violated('reply', [...successes].join('\n'))
    const fault = faultIn(await ledger(key), last.transfer)
    if (fault !== null) violated('effects', fault)
  })
  return { violations, slowest: Math.round(slowest) }
}

/** For each point so many keys, the first of which kill so many workers there. */
function plansFor(mode: Mode, points: readonly Point[], keys: number, killing: number[] = []): Plan[] {
  return points.flatMap((kill) =>
    Array.from({ length: keys }, (_, n): Plan => {
      const ms = n % 3 === 0 ? random.between(1, 20) : 0
      const kills = killing[n]
      return { key: randomUUID(), mode, ms, ...(kills && { kill, kills }) }
    })
  )
}

/** How often the workers were killed at each of the points, which must be several times. */
function checkKills(t: Test, kills: Kill[], points: readonly Point[], times: number): void {
  const counts = countBy(kills, ({ point }) => point)
  t.comment(`${kills.length} kills: ${JSON.stringify(counts)}`)
  for (const point of points) t.ok((counts[point] ?? 0) >= times, `${counts[point]} kills ${point}`)
}

// ---- Exactly once

t.test(
  'in a transaction, each of hundreds of keys has one effect and one reply, wherever processes are killed',
  async (t) => {
    const fleet = await startFleet(t, 3, { options: { lease: LONG_LEASE_MS } })
    const plans = [
      ...plansFor('transaction', TRANSACTION_POINTS, 16, [1, 2]),
      ...plansFor('transaction-wait', TRANSACTION_POINTS, 16, [1])
    ]
    requests = 0
    const { violations, slowest } = await check(fleet, plans)
    const kills = fleet.kills()
    t.comment(`${plans.length} keys, ${requests} requests, the slowest answer after ${slowest} ms`)
    t.strictSame(violations, [])
    checkKills(t, kills, TRANSACTION_POINTS, 2)

    const { rows } = await pool.query('SELECT DISTINCT run FROM ledger WHERE key = ANY ($1)', [
      plans.map(({ key }) => key)
    ])
    t.equal(rows.length, plans.length)
    const committed = new Set(rows.map(({ run }) => run))
    const killed = (...points: Point[]) => kills.filter(({ run, point }) => run !== null && points.includes(point))
    const isCommitted = ({ run }: Kill) => committed.has(run)
    t.strictSame(
      killed('between the writes', 'after the writes', 'during the record', 'before COMMIT').filter(isCommitted),
      [],
      'what was killed before its COMMIT has left nothing'
    )
    t.strictSame(
      killed('after COMMIT', 'before the reply').filter((kill) => !isCommitted(kill)),
      [],
      'what was killed after its COMMIT stands'
    )
    const during = killed('during COMMIT')
    t.comment(`${during.filter(isCommitted).length} of ${during.length} killed during COMMIT have committed`)

    const { rows: states } = await pool.query('SELECT state, count(*)::int FROM idempotency_keys GROUP BY state')
    t.strictSame(states, [{ state: 'completed', count: plans.length }], 'a claim is seen only when it has its reply')
    const open = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    await until(async () => !(await pool.query(open)).rowCount, { message: 'the last transaction to be over' })
  }
)

t.test(
  'in a transaction, a process that is stopped for longer than its lease loses it all, and another does it',
  async (t) => {
    const lease = 2_000
    const fleet = await startFleet(t, 2, { options: { lease, storeTimeout: 30_000 } })
    const [stopped, other] = fleet.all() as [Worker, Worker]
    const held: { hold: Point; plan: Plan; own: Promise<Answer> }[] = []
    const keys = () => held.map(({ plan }) => plan.key)
    const inState = async (state: string): Promise<string[]> => {
      const { rows } = await pool.query('SELECT key FROM gates WHERE state = $1 AND key = ANY ($2)', [state, keys()])
      return rows.map(({ key }) => key)
    }
    const hold = async (...points: Point[]) => {
      for (const hold of points) {
        const plan: Plan = { key: randomUUID(), mode: 'transaction' }
        held.push({ hold, plan, own: send(stopped, plan, hold) })
      }
      await until(async () => (await inState('reached')).length === held.length, { message: 'requests to be held' })
    }
    await hold('between the writes', 'after the writes')
    const handlers = [...held]
    await sleep(1.5 * lease)
    for (const { hold, plan } of handlers) {
      const { code } = await send(other, plan)
      t.equal(code, 'FST_IDEMPOTENCY_IN_PROGRESS', `${hold}, a process that lives keeps its transaction`)
    }
    await hold('after the claim', 'before COMMIT', 'after COMMIT')

    await stopped.process.pause()
    const replies = new Map<string, Answer>()
    await Promise.all(
      held.map(async ({ hold, plan }) => {
        const answer = (await until(
          async () => {
            const answer = await send(other, plan)
            if (isNotYet(answer)) await sleep(20)
            return !isNotYet(answer) && answer
          },
          { timeout: LIMIT_MS, message: `the transaction to end that was held ${hold}` }
        )) as Answer
        t.equal(answer.status, 201)
        t.equal(answer.replayed, hold === 'after COMMIT')
        t.equal(faultIn(await ledger(plan.key), answer.transfer), null, `one effect, of what was held ${hold}`)
        replies.set(plan.key, answer)
      })
    )
    stopped.process.resume()
    await until(
      async () => {
        const aborted = await inState('aborted')
        return handlers.every(({ plan }) => aborted.includes(plan.key))
      },
      { message: 'the signals of the handlers to abort' }
    )
    for (const key of keys()) await pool.query("INSERT INTO gates VALUES ($1, 'open')", [key])

    for (const { hold, plan, own } of held) {
      const wanted = replies.get(plan.key) as Answer
      const answer = await soon(own, `the answer to what was held ${hold}`)
      t.comment(`held ${hold}: ${answer.status} ${answer.code}`)
      if (hold === 'after COMMIT') t.equal(answer.bytes, wanted.bytes, 'what was committed before is the reply')
      else t.ok(answer.status >= 400, `held ${hold}, the late reply is no success: ${answer.status}`)
      const replay = await send(stopped, plan)
      t.strictSame([replay.replayed, replay.bytes], [true, wanted.bytes], 'and its client gets the reply of the other')
      t.equal(faultIn(await ledger(plan.key), replay.transfer), null, 'and there is still one effect')
    }
    t.ok(stopped.process.running)
  }
)

// ---- The check sees what it is there for

t.test('the check fails where COMMIT is sent after the reply', async (t) => {
  const fleet = await startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'commit-after-reply' })
  const { violations } = await check(fleet, plansFor('transaction', ['after the reply'], 10, [1, 1]))
  t.comment(JSON.stringify(countBy(violations, ({ kind }) => kind)))
  const seen = (kind: Violation['kind']) => violations.some((violation) => violation.kind === kind)
  t.ok(seen('unseen'), 'a success is seen before its effect')
  t.ok(seen('reply'), 'a success is forgotten, and another takes its place')
})

t.test('the check fails where a claim takes what another holds', async (t) => {
  const fleet = await startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'no-owner-check' })
  const plans = plansFor('transaction', ['after the reply'], 10).map((plan) => ({ ...plan, ms: 50 }))
  const { violations } = await check(fleet, plans)
  t.comment(JSON.stringify(countBy(violations, ({ kind }) => kind)))
  t.ok(
    violations.some(({ kind }) => kind === 'effects'),
    'a key has several effects'
  )
})

t.test('the check fails where a claim is made outside of the transaction', async (t) => {
  const fleet = await startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'lock-outside' })
  const plans = plansFor('transaction', ['after the writes'], 8, [1])
  const { violations } = await check(fleet, plans, { limitMs: 5_000, duplicates: 2 })
  t.comment(JSON.stringify(countBy(violations, ({ kind, what }) => `${kind} ${what}`)))
  t.ok(
    violations.some(({ kind, what }) => kind === 'late' && what === '409 FST_IDEMPOTENCY_IN_PROGRESS'),
    'a dead process blocks a key'
  )
})

// ---- Without a transaction

/** Handlers take some 50 ms. */
const LEASE_MS = 1_000
/** Where a kill leaves a claim without a reply. */
const CUTTING: Point[] = ['after the claim', 'between the writes', 'after the writes']

interface Run {
  run: string
  worker: string
  attempt: number
  asked: number
  started: number
  ended: number | null
}

async function runsOf(key: string): Promise<Run[]> {
  const ms = (column: string) => `(extract(epoch FROM ${column}) * 1000)::float8 AS ${column}`
  const columns = `run, worker, attempt, ${['asked', 'started', 'ended'].map(ms).join(', ')}`
  return (await pool.query(`SELECT ${columns} FROM runs WHERE key = $1 ORDER BY runs.started`, [key])).rows
}

/** Runs that have begun while another of the same key was going on, although its process did not stall. */
function overlaps(runs: Run[], deaths: Map<string, number>): Run[][] {
  return runs.flatMap((first, n) => {
    const end = first.ended ?? deaths.get(first.worker) ?? Number.POSITIVE_INFINITY
    // Its lease may have lapsed.
    if (end !== Number.POSITIVE_INFINITY && end - first.asked > LEASE_MS) return []
    return runs
      .slice(n + 1)
      .filter(({ started }) => started < end)
      .map((second) => [first, second])
  })
}

/** All that is known of a key when everybody has been answered. */
interface History {
  plan: Plan
  /** The last one was asked for when all others were there. */
  answers: [...Answer[], Answer]
  runs: Run[]
  entries: Entry[]
}

t.test('without a transaction', async (t) => {
  const options = { lease: LEASE_MS, storeTimeout: 10_000 }
  const fleet = await startFleet(t, 3, { options, withAll: true })
  const histories: History[] = []
  const modes = PLAIN_STORES.flatMap((store) => [`${store}-rerun`, `${store}-reject`] as const)
  // The long form kills at each point in each mode; else where nothing is cut off, in every second one: for each point on two
  // stores with 'rerun', where it is reached whatever befalls a run before, and on the two others with 'reject'.
  const others = PLAIN_POINTS.filter((point) => !CUTTING.includes(point))
  const isChosen = (at: number, n: number) => FACTOR > 1 || (Math.floor(at / 2) + at + n) % 2 === 0
  const pointsOf = (at: number) => [...CUTTING, ...others.filter((_, n) => isChosen(at, n))]
  const plans = modes.flatMap((mode, at) => plansFor(mode, pointsOf(at), 3, [1]))
  requests = 0
  await some(shuffled(plans, random), 16, async (plan) => {
    const client = async (plan: Plan): Promise<Answer> => {
      const answer = await ask(fleet, plan, LIMIT_MS)
      if (typeof answer === 'string') throw new Error(`No answer for ${LIMIT_MS} ms: ${answer}`)
      return answer
    }
    const answers = await Promise.all([client(plan), client(plan), client(plan)])
    const { key, mode, ms } = plan
    const last = await client({ key, mode, ...(ms && { ms }) })
    histories.push({ plan, answers: [...answers, last], runs: await runsOf(key), entries: await ledger(key) })
  })
  const kills = fleet.kills()
  const deaths = fleet.deaths()
  t.comment(`${plans.length} keys, ${requests} requests`)
  checkKills(t, kills, PLAIN_POINTS, 1)

  for (const store of PLAIN_STORES) {
    await t.test(`${store}, 'rerun': each key has at least one effect, and never two owners at a time`, async (t) => {
      let reruns = 0
      for (const { plan, answers, runs, entries } of histories) {
        if (plan.mode !== `${store}-rerun`) continue
        const last = answers.at(-1) as Answer
        for (const answer of answers) {
          t.equal(answer.status, 201, answer.bytes)
          const { run, entries: ids, attempt } = answer.transfer
          const own = entries.filter((entry) => entry.run === run).map(({ id }) => id)
          t.strictSame(own, ids, 'a success has its effect')
          t.equal(runs.find((each) => each.run === run)?.attempt, attempt)
          // Whose lease has lapsed may have been replaced.
          if (answer.tookMs < LEASE_MS) t.equal(answer.bytes, last.bytes, 'all successes are the same')
        }
        t.equal(last.replayed, true)
        t.strictSame(overlaps(runs, deaths), [])
        reruns += runs.length - 1
      }
      t.comment(`${reruns} runs were repeated`)
      t.ok(reruns >= CUTTING.length)
    })

    await t.test(`${store}, 'reject': no key is run twice, and the keys of killed processes give 409`, async (t) => {
      let abandoned = 0
      for (const { plan, answers, runs } of histories) {
        if (plan.mode !== `${store}-reject`) continue
        const last = answers.at(-1) as Answer
        t.ok(runs.length <= 1, `${runs.length} runs`)
        for (const answer of answers) {
          if (isSuccess(answer)) t.equal(answer.transfer.run, runs[0]?.run)
          else t.strictSame([answer.status, answer.code], [409, 'FST_IDEMPOTENCY_ABANDONED'])
        }
        t.ok(last.replayed || !isSuccess(last))
        const cut = kills.some(({ key, point }) => key === plan.key && CUTTING.includes(point))
        if (cut) t.equal(last.code, 'FST_IDEMPOTENCY_ABANDONED', 'it was killed between its claim and its completion')
        if (!isSuccess(last)) abandoned++
      }
      t.comment(`${abandoned} keys were abandoned`)
      t.ok(abandoned >= CUTTING.length)
    })
  }

  for (const store of PLAIN_STORES) {
    await t.test(`${store}, 'rerun': a kill between effect and completion gives two effects`, async (t) => {
      const plan: Plan = { key: randomUUID(), mode: `${store}-rerun`, kill: 'after the writes', kills: 1 }
      await t.rejects(send(fleet.any() as Worker, plan))
      const answer = (await ask(fleet, plan, LIMIT_MS)) as Answer
      t.equal(answer.status, 201)
      t.equal(answer.transfer.attempt, 2)
      const entries = await ledger(plan.key)
      t.strictSame(
        entries.map(({ amount }) => amount),
        [-100, 100, -100, 100]
      )
      t.equal(new Set(entries.map(({ run }) => run)).size, 2)
    })

    await t.test(`${store}, 'reject': a kill between effect and completion gives one effect, and 409`, async (t) => {
      const plan: Plan = { key: randomUUID(), mode: `${store}-reject`, kill: 'after the writes', kills: 1 }
      await t.rejects(send(fleet.any() as Worker, plan))
      for (let n = 1; n <= 3; n++) {
        const { status, code } = (await ask(fleet, plan, LIMIT_MS)) as Answer
        t.strictSame([status, code], [409, 'FST_IDEMPOTENCY_ABANDONED'])
      }
      t.strictSame(
        (await ledger(plan.key)).map(({ amount }) => amount),
        [-100, 100]
      )
      t.equal((await runsOf(plan.key)).length, 1)
    })
  }
})
