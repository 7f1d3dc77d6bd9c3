import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { holds, now, violations } from '../support/http-history.js'
import { until } from '../support/latch.js'
import {
  ABANDONED,
  AFTER_LOSS,
  ALL,
  FACTOR,
  howMany,
  IN_PROGRESS,
  Scene,
  type SceneOptions,
  TROUBLED,
  UNAVAILABLE
} from '../support/load-scene.js'
import { newSeed, Random } from '../support/random.js'
import { startRedis } from '../support/redis.js'
import { TcpProxy } from '../support/tcp-proxy.js'

/* A network between the workers and their Redis that loses, delays and swallows, under load. */

const server = await startRedis()
t.teardown(() => server.close())
const redis = await server.client()

/**
 * A claim whose answer got lost is given back, which may take longer than its lease where every other message gets lost
 * as well: until then it is one whose owner is gone.
 */
const LOSSY = { ...TROUBLED, answers: [...(TROUBLED.answers ?? []), ABANDONED] }

/** Two workers, each with a proxy of its own before Redis. */
async function open(t: Test, options: Omit<SceneOptions, 'workers'> = {}, sabotage?: 'no owner check') {
  const seed = newSeed()
  await redis.flushall()
  const proxies = [
    await TcpProxy.to({ path: server.path }, new Random(seed + 1)),
    await TcpProxy.to({ path: server.path }, new Random(seed + 2))
  ] as const
  t.teardown(() => Promise.all(proxies.map((proxy) => proxy.close())))
  // One client that sends again what got no answer, and one that gives up at once.
  const patience = [{}, { maxRetriesPerRequest: 0, autoResendUnfulfilledCommands: false }]
  const workers = proxies.map(({ host, port }, n) => ({
    // Without a limit a client waits for ever on a connection that swallows everything.
    redis: { host, port, socketTimeout: 400, ...patience[n] },
    sabotage
  }))
  return { scene: await Scene.open(t, { workers, seed, ...options }), proxies }
}

t.test('connections are cut between command and answer: all guarantees hold', async (t) => {
  const { scene, proxies } = await open(t, { options: { storeTimeout: 1_000 } })
  await scene.load.during(async () => {
    for (const proxy of proxies) proxy.trouble = { loseCommands: 0.05, loseAnswers: 0.08 }
    const enough = (proxy: TcpProxy) =>
      proxy.struck.lostCommands >= 5 * FACTOR && proxy.struck.lostAnswers >= 8 * FACTOR
    await until(() => proxies.every(enough), { timeout: 60_000 * FACTOR, message: 'connections to be cut' })
    for (const proxy of proxies) proxy.trouble = {}
    await scene.load.more(50)
  })
  await scene.judge(LOSSY)
  for (const { struck } of proxies) t.comment(JSON.stringify(struck))
})

t.test(
  'delays up to the limit of a store call, and sockets that swallow everything: all guarantees hold',
  async (t) => {
    const { scene, proxies } = await open(t)
    await scene.load.during(async () => {
      for (let n = 0; n < 3 * FACTOR; n++) {
        for (const proxy of proxies) proxy.trouble = { delay: 120 }
        await scene.load.more(10)
        const silent = n % 3 === 2 ? proxies : [proxies[n % 2] as TcpProxy]
        for (const proxy of silent) proxy.swallow()
        await sleep(600)
        for (const proxy of proxies) proxy.heal()
        await scene.load.more(10)
      }
    })
    const history = await scene.judge(LOSSY)
    t.ok(howMany(history, UNAVAILABLE) > 0, 'some were refused')
    for (const { struck } of proxies) t.ok(struck.delayed > 10 && struck.dead > 1)
  }
)

/** One worker of two cannot reach Redis for longer than its lease. */
async function divided(t: Test, sabotage?: 'no owner check') {
  const { scene, proxies } = await open(
    t,
    { options: { lease: 2_500 }, load: { slow: 0.3, longest: 400, fails: 0 } },
    sabotage
  )
  const lost = new Set<string>()
  // Whose claims are caught, and who asks for them meanwhile, is a matter of chance.
  const someWereTakenOver = () => {
    const { runs } = scene.fleet.seen()
    const final = (key: string, worker: string) =>
      runs.some((run) => run.final && run.key === key && run.worker === worker)
    return runs.some(({ key, attempt }) => attempt > 1 && final(key, 'worker 1') && final(key, 'worker 2'))
  }
  await scene.load.during(async () => {
    for (let n = 0; n < FACTOR || (n < 10 && !someWereTakenOver()); n++) {
      await scene.load.more(20)
      const from = now()
      proxies[0].swallow()
      await sleep(3_200)
      proxies[0].heal()
      for (const key of scene.caught(from - 1_000, now(), 'worker 1')) lost.add(key)
      await scene.load.more(40)
    }
  })
  await scene.load.revisit()
  for (const key of scene.stalled()) lost.add(key)
  return { scene, lost }
}

// Whose owner cannot be told from a dead one is taken over with 'rerun', and so runs twice: no guarantee can be had of
// those. With 'reject' they can: nobody takes over, and the owner's reply is stored when it is back.
t.test(
  "a worker is cut off for longer than its lease: all guarantees hold of the keys that it did not hold; with 'reject' of all keys; and its late replies overwrite nothing",
  async (t) => {
    const { scene, lost } = await divided(t)
    holds(
      t,
      scene.history((key) => !lost.has(key) && !key.startsWith('strict')),
      TROUBLED
    )
    holds(
      t,
      scene.history((key) => key.startsWith('strict')),
      { ...LOSSY, excuses: [IN_PROGRESS, UNAVAILABLE, ABANDONED] }
    )
    const taken = scene.history((key) => lost.has(key) && !key.startsWith('strict'))
    holds(t, taken, { ...TROUBLED, guarantees: AFTER_LOSS })
    t.ok(
      taken.runs.some(({ attempt }) => attempt > 1),
      'some were taken over'
    )
    scene.isWell()
  }
)

t.test('sabotage: who runs unprotected while the store fails is found out', async (t) => {
  const { scene, proxies } = await open(t, { options: { onStoreError: 'bypass' } })
  await scene.load.during(async () => {
    for (const proxy of proxies) proxy.trouble = { loseAnswers: 0.05 }
    for (const proxy of proxies) proxy.swallow()
    await sleep(800)
    for (const proxy of proxies) proxy.heal()
  })
  const found = violations(scene.history(), TROUBLED)
  for (const guarantee of ['one owner', 'one final run', 'same reply'] as const) {
    t.ok(
      found.some((violation) => violation.guarantee === guarantee),
      guarantee
    )
  }
})

t.test('sabotage: a late reply that overwrites another is found out', async (t) => {
  const { scene } = await divided(t, 'no owner check')
  const found = violations(scene.history(), { guarantees: ALL })
  t.ok(found.some(({ guarantee }) => guarantee === 'last word'))
})
