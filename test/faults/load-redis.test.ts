import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { holds, now } from '../support/http-history.js'
import { until } from '../support/latch.js'
import {
  ABANDONED,
  AFTER_LOSS,
  CALM,
  FACTOR,
  howMany,
  IN_PROGRESS,
  Scene,
  type SceneOptions,
  type Span,
  spansOf,
  TROUBLED,
  UNAVAILABLE
} from '../support/load-scene.js'
import { freePort } from '../support/process.js'
import { type RedisServer, type StartOptions, startRedis } from '../support/redis.js'

/* The Redis itself is killed, frozen, emptied of scripts, made read-only and filled, under load. */

/** Two workers on a Redis of their own, one with ioredis and one with node-redis. */
async function open(
  t: Test,
  redis: StartOptions = {},
  options: Omit<SceneOptions, 'workers'> = {}
): Promise<{ server: RedisServer; scene: Scene }> {
  const server = await startRedis(redis)
  t.teardown(() => server.close())
  const redisOf = { redis: { path: server.path } }
  const workers = [redisOf, { ...redisOf, client: 'node-redis' as const }]
  return { server, scene: await Scene.open(t, { workers, ...options }) }
}

t.test('Redis is killed and comes back, each write on its disk: all guarantees hold', async (t) => {
  const { server, scene } = await open(t, { persist: true })
  await scene.load.during(async () => {
    for (let n = 0; n < 3 * FACTOR; n++) {
      await scene.load.more(scene.random.between(10, 40))
      await server.kill()
      await sleep(scene.random.between(0, 500))
      await server.start()
    }
    await scene.load.more(50)
  })
  const history = await scene.judge(TROUBLED)
  t.ok(howMany(history, UNAVAILABLE) > 0, 'some were refused')
})

// What was held or stored is gone. The claims of those who are still at work are made anew, unless another was faster.
t.test(
  'Redis is killed and comes back empty: all guarantees hold of keys that are used on one side of that only; a reply of before is lost',
  async (t) => {
    const { server, scene } = await open(t)
    const gaps: Span[] = []
    await scene.load.during(async () => {
      for (let n = 0; n < 2 * FACTOR; n++) {
        await scene.load.more(60)
        const from = now()
        await server.kill()
        await sleep(150)
        await server.start()
        gaps.push({ from, to: now() })
      }
      await scene.load.more(60)
    })
    const spans = spansOf(scene.history())
    const isTorn = (key: string) => {
      const span = spans.get(key) as Span
      return gaps.some(({ from, to }) => span.from <= to && span.to >= from)
    }
    const { to: last } = gaps.at(-1) as Span
    const isForgotten = (key: string) => !isTorn(key) && (spans.get(key)?.from ?? 0) < last
    await scene.load.revisit(scene.load.keys.filter((key) => !isForgotten(key)))
    const whole = scene.history((key) => !isTorn(key))
    holds(t, whole, TROUBLED)
    holds(t, scene.history(isTorn), { ...TROUBLED, guarantees: AFTER_LOSS })
    scene.isWell()

    const runs = scene.fleet.seen().runs.length
    const forgotten = scene.load.keys.filter(isForgotten)
    await scene.load.revisit(forgotten)
    t.ok(scene.fleet.seen().runs.length >= runs + forgotten.length, 'what was forgotten runs again')
  }
)

// Whoever was at work cannot be told from the dead by then: see the same with a worker that is cut off.
t.test(
  "Redis is frozen for longer than a lease: all guarantees hold of the keys that nobody held; with 'reject' of all keys; and late replies overwrite nothing",
  async (t) => {
    const { server, scene } = await open(
      t,
      {},
      { options: { lease: 2_500 }, load: { slow: 0.3, longest: 400, fails: 0 } }
    )
    const lost = new Set<string>()
    await scene.load.during(async () => {
      for (let n = 0; n < FACTOR; n++) {
        await scene.load.more(20)
        const from = now()
        await server.pause()
        await sleep(3_200)
        server.resume()
        for (const key of scene.caught(from - 1_000, now())) lost.add(key)
        await scene.load.more(40)
      }
    })
    await scene.load.revisit()
    for (const key of scene.stalled()) lost.add(key)
    const isStrict = (key: string) => key.startsWith('strict')
    const answers = [...(TROUBLED.answers ?? []), ABANDONED]
    holds(
      t,
      scene.history((key) => !lost.has(key) && !isStrict(key)),
      TROUBLED
    )
    holds(t, scene.history(isStrict), { ...TROUBLED, answers, excuses: [IN_PROGRESS, UNAVAILABLE, ABANDONED] })
    holds(
      t,
      scene.history((key) => lost.has(key) && !isStrict(key)),
      { ...TROUBLED, guarantees: AFTER_LOSS }
    )
    t.ok(howMany(scene.history(), UNAVAILABLE) > 0, 'some were refused')
    scene.isWell()
  }
)

t.test('scripts are forgotten all the time: all guarantees hold, and nobody notices', async (t) => {
  const { server, scene } = await open(t, {}, { options: { storeTimeout: 30_000, lease: 30_000 } })
  const admin = await server.client()
  await scene.load.during(async () => {
    for (let enough = scene.load.done + 150 * FACTOR; scene.load.done < enough; await sleep(10)) {
      await admin.script('FLUSH')
    }
  })
  await scene.judge(CALM)
  t.match(await admin.info('errorstats'), /errorstat_NOSCRIPT:count=[1-9]\d/)
})

t.test(
  'the master becomes a replica and a master again, of nobody and of its own replica: all guarantees hold',
  async (t) => {
    const { server, scene } = await open(t, { port: true })
    const other = await startRedis({ port: true, config: ['--replicaof', server.host, String(server.port)] })
    t.teardown(() => other.close())
    const admin = await server.client()
    const otherAdmin = await other.client()
    const nobody = await freePort()
    const isLinked = async (client: typeof admin) => /master_link_status:up/.test(await client.info('replication'))
    const isMaster = async (client: typeof admin) => /role:master/.test(await client.info('replication'))
    await until(() => isLinked(otherAdmin), { message: 'the replica to follow' })
    await scene.load.during(async () => {
      for (let n = 0; n < FACTOR; n++) {
        await sleep(400)
        await admin.replicaof('127.0.0.1', nobody)
        await sleep(400)
        await admin.replicaof('NO', 'ONE')
        await until(() => isLinked(otherAdmin), { message: 'the replica to follow again' })
        // One that loses nothing: writes wait until the replica has them all.
        await admin.call('FAILOVER')
        await until(() => isMaster(otherAdmin), { message: 'the replica to take over' })
        await until(() => isLinked(admin), { message: 'the master to follow' })
        await sleep(400)
        await otherAdmin.call('FAILOVER')
        await until(() => isMaster(admin), { message: 'the master to be back' })
      }
      await sleep(300)
    })
    const history = await scene.judge(TROUBLED)
    t.ok(howMany(history, UNAVAILABLE) > 10, 'writes were refused')
    t.match(await admin.info('errorstats'), /errorstat_READONLY:count=[1-9]\d/)
  }
)

t.test(
  'Redis is full for longer than a lease, and evicts nothing: all guarantees hold, and it goes on afterwards',
  async (t) => {
    const { server, scene } = await open(
      t,
      { config: ['--maxmemory-policy', 'noeviction'] },
      { options: { lease: 2_000 }, load: { slow: 0.2, longest: 900 } }
    )
    const admin = await server.client()
    await scene.load.during(async () => {
      for (let n = 0; n < FACTOR; n++) {
        await scene.load.more(30)
        await admin.config('SET', 'maxmemory', '1')
        await sleep(2_600)
        await admin.config('SET', 'maxmemory', '0')
        await scene.load.more(50)
      }
    })
    const history = await scene.judge(TROUBLED)
    t.ok(howMany(history, UNAVAILABLE) > 10, 'writes were refused')
    t.match(await admin.info('errorstats'), /errorstat_OOM:count=[1-9]\d/)
  }
)
