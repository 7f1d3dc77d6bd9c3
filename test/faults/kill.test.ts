import { randomUUID } from 'node:crypto'
import t from 'tap'
import type { Worker } from '../support/kill-fleet.js'
import { PLAIN_POINTS, PLAIN_STORES, type Point } from '../support/kill-plan.js'
import {
  type Answer,
  checkKills,
  type Entry,
  isSuccess,
  KillScene,
  LIMIT_MS,
  otherServers,
  type Plan
} from '../support/kill-scene.js'
import { shuffled, some } from '../support/lists.js'
import { FACTOR } from '../support/load-scene.js'
import { startMariadb } from '../support/mariadb.js'
import { startRedis } from '../support/redis.js'

// Server processes that kill themselves at every point of a request's life, and clients that ask again until they have
// an answer: what is promised without a transaction. With one it is more: kill-transaction.test.ts.

t.setTimeout(900_000)

const scene = await KillScene.open(t)
const { random } = scene
const redis = await startRedis()
t.teardown(() => redis.close())
const mariadb = await startMariadb()
t.teardown(() => mariadb.close())

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
  return (await scene.pool.query(`SELECT ${columns} FROM runs WHERE key = $1 ORDER BY runs.started`, [key])).rows
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
  const fleet = await scene.startFleet(t, 3, {
    options,
    env: otherServers(redis.path, mariadb.url, scene.folder)
  })
  const histories: History[] = []
  const modes = PLAIN_STORES.flatMap((store) => [`${store}-rerun`, `${store}-reject`] as const)
  // The long form kills at each point in each mode; else where nothing is cut off, in every second one: for each point on two
  // stores with 'rerun', where it is reached whatever befalls a run before, and on the two others with 'reject'.
  const others = PLAIN_POINTS.filter((point) => !CUTTING.includes(point))
  const isChosen = (at: number, n: number) => FACTOR > 1 || (Math.floor(at / 2) + at + n) % 2 === 0
  const pointsOf = (at: number) => [...CUTTING, ...others.filter((_, n) => isChosen(at, n))]
  const plans = modes.flatMap((mode, at) => scene.plansFor(mode, pointsOf(at), 3, [1]))
  scene.requests = 0
  await some(shuffled(plans, random), 8, async (plan) => {
    const client = async (plan: Plan): Promise<Answer> => {
      const answer = await scene.ask(fleet, plan)
      if (typeof answer === 'string') throw new Error(`No answer for ${LIMIT_MS} ms: ${answer}`)
      return answer
    }
    const answers = await Promise.all([client(plan), client(plan), client(plan)])
    const { key, mode, ms } = plan
    const last = await client({ key, mode, ...(ms && { ms }) })
    histories.push({ plan, answers: [...answers, last], runs: await runsOf(key), entries: await scene.ledger(key) })
  })
  const kills = fleet.kills()
  const deaths = fleet.deaths()
  t.comment(`${plans.length} keys, ${scene.requests} requests`)
  checkKills(t, kills, PLAIN_POINTS, 1)

  for (const store of PLAIN_STORES) {
    await t.test(`${store}, 'rerun': each key has at least one effect, and never two owners at a time`, async (t) => {
      let cuts = 0
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
        const cut = kills.find(({ key, point }) => key === plan.key && CUTTING.includes(point))
        if (cut === undefined) continue
        cuts++
        t.ok(last.transfer.attempt >= 2, `it was killed ${cut.point}, and run again`)
        // What the first attempt has written says that it had begun.
        if (cut.run !== null) t.ok(runs.length >= 2, `${runs.length} runs`)
      }
      t.equal(cuts, CUTTING.length, 'what is killed there is run again until it is')
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
      await t.rejects(scene.send(fleet.any() as Worker, plan))
      const answer = (await scene.ask(fleet, plan)) as Answer
      t.equal(answer.status, 201)
      t.equal(answer.transfer.attempt, 2)
      const entries = await scene.ledger(plan.key)
      t.strictSame(
        entries.map(({ amount }) => amount),
        [-100, 100, -100, 100]
      )
      t.equal(new Set(entries.map(({ run }) => run)).size, 2)
    })

    await t.test(`${store}, 'reject': a kill between effect and completion gives one effect, and 409`, async (t) => {
      const plan: Plan = { key: randomUUID(), mode: `${store}-reject`, kill: 'after the writes', kills: 1 }
      await t.rejects(scene.send(fleet.any() as Worker, plan))
      for (let n = 1; n <= 3; n++) {
        const { status, code } = (await scene.ask(fleet, plan)) as Answer
        t.strictSame([status, code], [409, 'FST_IDEMPOTENCY_ABANDONED'])
      }
      t.strictSame(
        (await scene.ledger(plan.key)).map(({ amount }) => amount),
        [-100, 100]
      )
      t.equal((await runsOf(plan.key)).length, 1)
    })
  }
})
