import t from 'tap'
import { storageKey } from '../../lib/operation/storage-key.js'
import { holds, now } from '../support/http-history.js'
import { until } from '../support/latch.js'
import { Load } from '../support/load.js'
import { AFTER_LOSS, CALM, FACTOR, howMany, Scene, type Span, spansOf, TROUBLED } from '../support/load-scene.js'
import type { RedisServer } from '../support/redis.js'
import { slotOf, startCluster } from '../support/redis-cluster.js'

/* A master of a Redis Cluster is killed under load, and its replica takes over. */

// By default a Cluster without all its slots answers nobody.
const config = ['--cluster-node-timeout', '1500', '--cluster-require-full-coverage', 'no']
const cluster = await startCluster({ replicas: 1, config })
t.teardown(() => cluster.close())

/** Is it kept by the first master? */
const isConcerned = (key: string) => slotOf(`idempotency:${storageKey(null, key)}`) < 16_384 / 3 - 1

const isMaster = async (server: RedisServer) => {
  const client = await server.client()
  const info = await client.info('replication')
  client.disconnect()
  return /role:master/.test(info)
}

/** Resolves when the replicas have all that this master has now. */
async function replicated(server: RedisServer): Promise<void> {
  const client = await server.client()
  const offset = (info: string, name: RegExp) => Number(name.exec(info)?.[1] ?? Number.NaN)
  const all = offset(await client.info('replication'), /master_repl_offset:(\d+)/)
  const caughtUp = async () => offset(await client.info('replication'), /slave0:.*,offset=(\d+)/) >= all
  await until(caughtUp, { message: 'the replica to have everything' })
  client.disconnect()
}

// RedisStore takes no `replicas` with a Cluster, so what the replica has not yet got may be lost, claims as well as
// replies: such a key may run again. What it has is kept.
t.test(
  'a master is killed, its replica takes over: all guarantees hold of what the replica had, of what comes after, and of the other masters, who refuse nobody meanwhile',
  async (t) => {
    const redis = [...cluster.nodes, ...cluster.replicas.flat()].map(({ host, port }) => ({ host, port }))
    const scene = await Scene.open(t, {
      workers: [{ redis }, { redis, client: 'node-redis' }],
      options: { storeTimeout: 30_000, lease: 30_000 },
      load: { wants: isConcerned, patience: 60_000 }
    })
    const others = new Load({
      random: scene.random,
      targets: () => scene.fleet.workers,
      breadth: 8,
      wants: (key) => !isConcerned(key)
    })
    t.teardown(() => others.close())
    let [master, replica] = [cluster.nodes[0], cluster.replicas[0]?.[0]] as [RedisServer, RedisServer]
    const failovers: Span[] = []
    let meanwhile = 0
    await others.during(async () => {
      for (let n = 0; n < FACTOR; n++) {
        await scene.load.during(() => scene.load.more(60))
        await replicated(master)
        const from = now()
        await scene.load.during(async () => {
          await scene.load.more(10)
          const before = others.done
          await master.kill()
          await until(() => isMaster(replica), { message: 'the replica to take over' })
          meanwhile += others.done - before
          failovers.push({ from, to: now() })
          await scene.load.more(60)
        })
        if (n + 1 === FACTOR) break
        await master.start()
        await until(async () => !(await isMaster(master)), { message: 'the old master to follow' })
        ;[master, replica] = [replica, master]
        await replicated(master)
      }
    })
    t.ok(meanwhile > 10, `${meanwhile} keys were used at the other masters meanwhile`)

    const spans = spansOf(scene.history())
    const isTorn = (key: string) => {
      const span = spans.get(key) as Span
      return failovers.some(({ from, to }) => span.from <= to && span.to >= from)
    }
    const before = scene.load.keys.filter((key) => (spans.get(key)?.to ?? 0) < (failovers[0]?.from ?? 0))
    t.ok(before.length > 50, `${before.length} keys were finished before`)
    await scene.load.revisit()
    await others.revisit()
    holds(
      t,
      scene.history((key) => isConcerned(key) && !isTorn(key)),
      TROUBLED
    )
    holds(
      t,
      scene.history((key) => isConcerned(key) && isTorn(key)),
      { ...TROUBLED, guarantees: AFTER_LOSS }
    )
    const elsewhere = { ...scene.history((key) => !isConcerned(key)), exchanges: others.exchanges }
    holds(t, elsewhere, CALM)
    t.ok(howMany(elsewhere, '201') > 100)
    scene.isWell()
  }
)
