import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import type { Worker } from '../support/kill-fleet.js'
import { type Kill, type Point, TRANSACTION_POINTS, type Transfer } from '../support/kill-plan.js'
import {
  type Answer,
  checkKills,
  type Entry,
  isNotYet,
  isSuccess,
  KillScene,
  LIMIT_MS,
  type Plan,
  type Workers
} from '../support/kill-scene.js'
import { soon, until } from '../support/latch.js'
import { countBy, shuffled, some } from '../support/lists.js'

// Server processes that kill themselves at every point of a request's life, and clients that ask again until they have
// an answer. With `transaction: true` each key has one effect and one reply. That the check would see it otherwise
// is shown by workers without one of the safeguards. What is promised without a transaction is in kill.test.ts.

t.setTimeout(900_000)

const scene = await KillScene.open(t)
const { random } = scene

/** Nobody waits for as long: what a dead process leaves is given up with its connection. */
const LONG_LEASE_MS = 3 * LIMIT_MS

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
      const answer = await scene.ask(fleet, plan, limitMs)
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
      const fault = faultIn(await scene.ledger(key), answer.transfer)
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
    const fault = faultIn(await scene.ledger(key), last.transfer)
    if (fault !== null) violated('effects', fault)
  })
  return { violations, slowest: Math.round(slowest) }
}

// ---- Exactly once

t.test(
  'in a transaction, each of hundreds of keys has one effect and one reply, wherever processes are killed',
  async (t) => {
    const fleet = await scene.startFleet(t, 3, { options: { lease: LONG_LEASE_MS } })
    const plans = [
      ...scene.plansFor('transaction', TRANSACTION_POINTS, 16, [1, 2]),
      ...scene.plansFor('transaction-wait', TRANSACTION_POINTS, 16, [1])
    ]
    scene.requests = 0
    const { violations, slowest } = await check(fleet, plans)
    const kills = fleet.kills()
    t.comment(`${plans.length} keys, ${scene.requests} requests, the slowest answer after ${slowest} ms`)
    t.strictSame(violations, [])
    checkKills(t, kills, TRANSACTION_POINTS, 2)

    const { rows } = await scene.pool.query('SELECT DISTINCT run FROM ledger WHERE key = ANY ($1)', [
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

    const { rows: states } = await scene.pool.query('SELECT state, count(*)::int FROM idempotency_keys GROUP BY state')
    t.strictSame(states, [{ state: 'completed', count: plans.length }], 'a claim is seen only when it has its reply')
    const open = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    await until(async () => !(await scene.pool.query(open)).rowCount, { message: 'the last transaction to be over' })
  }
)

t.test(
  'in a transaction, a process that is stopped for longer than its lease loses it all, and another does it',
  async (t) => {
    const lease = 2_000
    const fleet = await scene.startFleet(t, 2, { options: { lease, storeTimeout: 30_000 } })
    const [stopped, other] = fleet.all() as [Worker, Worker]
    const held: { hold: Point; plan: Plan; own: Promise<Answer> }[] = []
    const keys = () => held.map(({ plan }) => plan.key)
    const inState = async (state: string): Promise<string[]> => {
      const { rows } = await scene.pool.query('SELECT key FROM gates WHERE state = $1 AND key = ANY ($2)', [
        state,
        keys()
      ])
      return rows.map(({ key }) => key)
    }
    const hold = async (...points: Point[]) => {
      for (const hold of points) {
        const plan: Plan = { key: randomUUID(), mode: 'transaction' }
        held.push({ hold, plan, own: scene.send(stopped, plan, hold) })
      }
      await until(async () => (await inState('reached')).length === held.length, { message: 'requests to be held' })
    }
    await hold('between the writes', 'after the writes')
    const handlers = [...held]
    await sleep(1.5 * lease)
    for (const { hold, plan } of handlers) {
      const { code } = await scene.send(other, plan)
      t.equal(code, 'FST_IDEMPOTENCY_IN_PROGRESS', `${hold}, a process that lives keeps its transaction`)
    }
    await hold('after the claim', 'before COMMIT', 'after COMMIT')

    await stopped.process.pause()
    const replies = new Map<string, Answer>()
    await Promise.all(
      held.map(async ({ hold, plan }) => {
        const answer = (await until(
          async () => {
            const answer = await scene.send(other, plan)
            if (isNotYet(answer)) await sleep(20)
            return !isNotYet(answer) && answer
          },
          { timeout: LIMIT_MS, message: `the transaction to end that was held ${hold}` }
        )) as Answer
        t.equal(answer.status, 201)
        t.equal(answer.replayed, hold === 'after COMMIT')
        t.equal(faultIn(await scene.ledger(plan.key), answer.transfer), null, `one effect, of what was held ${hold}`)
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
    for (const key of keys()) await scene.pool.query("INSERT INTO gates VALUES ($1, 'open')", [key])

    for (const { hold, plan, own } of held) {
      const wanted = replies.get(plan.key) as Answer
      const answer = await soon(own, `the answer to what was held ${hold}`)
      t.comment(`held ${hold}: ${answer.status} ${answer.code}`)
      if (hold === 'after COMMIT') t.equal(answer.bytes, wanted.bytes, 'what was committed before is the reply')
      else t.ok(answer.status >= 400, `held ${hold}, the late reply is no success: ${answer.status}`)
      const replay = await scene.send(stopped, plan)
      t.strictSame([replay.replayed, replay.bytes], [true, wanted.bytes], 'and its client gets the reply of the other')
      t.equal(faultIn(await scene.ledger(plan.key), replay.transfer), null, 'and there is still one effect')
    }
    t.ok(stopped.process.running)
  }
)

// ---- The check sees what it is there for

t.test('the check fails where COMMIT is sent after the reply', async (t) => {
  const fleet = await scene.startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'commit-after-reply' })
  const { violations } = await check(fleet, scene.plansFor('transaction', ['after the reply'], 10, [1, 1]))
  t.comment(JSON.stringify(countBy(violations, ({ kind }) => kind)))
  const seen = (kind: Violation['kind']) => violations.some((violation) => violation.kind === kind)
  t.ok(seen('unseen'), 'a success is seen before its effect')
  t.ok(seen('reply'), 'a success is forgotten, and another takes its place')
})

t.test('the check fails where a claim takes what another holds', async (t) => {
  const fleet = await scene.startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'no-owner-check' })
  const plans = scene.plansFor('transaction', ['after the reply'], 10).map((plan) => ({ ...plan, ms: 50 }))
  const { violations } = await check(fleet, plans)
  t.comment(JSON.stringify(countBy(violations, ({ kind }) => kind)))
  t.ok(
    violations.some(({ kind }) => kind === 'effects'),
    'a key has several effects'
  )
})

t.test('the check fails where a claim is made outside of the transaction', async (t) => {
  const fleet = await scene.startFleet(t, 2, { options: { lease: LONG_LEASE_MS }, sabotage: 'lock-outside' })
  const plans = scene.plansFor('transaction', ['after the writes'], 8, [1])
  const { violations } = await check(fleet, plans, { limitMs: 5_000, duplicates: 2 })
  t.comment(JSON.stringify(countBy(violations, ({ kind, what }) => `${kind} ${what}`)))
  t.ok(
    violations.some(({ kind, what }) => kind === 'late' && what === '409 FST_IDEMPOTENCY_IN_PROGRESS'),
    'a dead process blocks a key'
  )
})
