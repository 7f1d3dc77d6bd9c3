import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import type { Worker } from '../support/fleet.js'
import { holds } from '../support/http-history.js'
import { ALL, CALM, FACTOR, howMany, Scene } from '../support/load-scene.js'
import { startRedis } from '../support/redis.js'

/* What happens to the workers themselves in everyday life, under load. */

const server = await startRedis()
t.teardown(() => server.close())
const redis = { path: server.path }
/** Nothing fails, so nothing has a reason to run twice. */
const ONCE = { ...CALM, guarantees: [...ALL, 'one run'] as const }

t.test('one worker after the other is replaced: every key runs once, and every client gets its reply', async (t) => {
  const options = { storeTimeout: 30_000, lease: 30_000 }
  const scene = await Scene.open(t, {
    workers: [{ redis }, { redis }, { redis }],
    options,
    // Who hangs up leaves a run behind that no open connection keeps alive.
    load: { fails: 0, breadth: 8, slow: 0.2, hangsUp: 0.15 }
  })
  const { fleet, load } = scene
  const replaced: Worker[] = []
  await load.during(async () => {
    for (let n = 0; n < 3 * FACTOR; n++) {
      await load.more(20)
      const [oldest] = fleet.workers as [Worker]
      await fleet.start({ redis, options })
      await fleet.retire(oldest)
      replaced.push(oldest)
    }
    await load.more(20)
  })
  // Fastify's own answer on connections that are still open while the server closes.
  const history = await scene.judge({ ...ONCE, answers: [...(ONCE.answers ?? []), '503'], excuses: ['503'] })
  t.ok(
    howMany(history, '503') > 0 || history.exchanges.some(({ got }) => got === null),
    'somebody met a closing server'
  )
  for (const { name } of replaced)
    t.ok(
      history.runs.some(({ worker }) => worker === name),
      `${name} has worked`
    )
})

t.test(
  'the time of day jumps by hours and days at the workers: every key runs once, for no clock of theirs matters',
  async (t) => {
    await server.client().then((client) => client.flushall())
    const scene = await Scene.open(t, {
      workers: [{ redis }, { redis }],
      options: { storeTimeout: 30_000, lease: 3_000, ttl: 3_600_000 },
      load: { fails: 0, longest: 4_500 }
    })
    const HOUR = 3_600_000
    const jumps = [HOUR, -HOUR, 72 * HOUR, -72 * HOUR, 20 * 365 * 24 * HOUR, -1, 2 * HOUR, 0]
    const jump = async ({ url }: Worker, ms: number) => {
      const headers = { 'content-type': 'application/json' }
      const answer = await fetch(`${url}/clock`, { method: 'POST', headers, body: JSON.stringify({ ms }) })
      const { now } = (await answer.json()) as { now: string }
      t.ok(Math.abs(Date.parse(now) - Date.now() - ms) < 60_000, `it is ${now}`)
    }
    await scene.load.during(async () => {
      for (let n = 0; n < FACTOR; n++) {
        for (const [n, ms] of jumps.entries()) {
          await Promise.all(
            scene.fleet.workers.map((worker, m) => jump(worker, m === 0 ? ms : (jumps.at(n - 3) as number)))
          )
          await Promise.all([scene.load.more(15), sleep(100)])
        }
      }
    })
    for (const worker of scene.fleet.workers) await jump(worker, 72 * HOUR)
    await scene.load.revisit()
    const stalled = scene.stalled()
    holds(
      t,
      scene.history((key) => !stalled.has(key)),
      ONCE
    )
    scene.isWell()
  }
)
