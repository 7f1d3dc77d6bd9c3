import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { until } from '../support/latch.js'
import { ABANDONED, FACTOR, howMany, Scene, type SceneOptions, TROUBLED, UNAVAILABLE } from '../support/load-scene.js'
import { startMariadb } from '../support/mariadb.js'
import { newSeed, Random } from '../support/random.js'
import { TcpProxy } from '../support/tcp-proxy.js'

/* A MariaDB that is killed, and a network before it that loses statements and answers, under load. */

/** Two workers, each with a proxy of its own before the server. */
async function open(t: Test, options: Omit<SceneOptions, 'workers'> = {}) {
  const server = await startMariadb('--innodb-flush-log-at-trx-commit=1')
  t.teardown(() => server.close())
  const seed = newSeed()
  const proxies = [
    await TcpProxy.to({ path: server.socket }, new Random(seed + 1)),
    await TcpProxy.to({ path: server.socket }, new Random(seed + 2))
  ] as const
  t.teardown(() => Promise.all(proxies.map((proxy) => proxy.close())))
  const workers = proxies.map(({ host, port }) => ({ mysql: { host, port, user: 'root', database: 'test' } }))
  return { server, proxies, scene: await Scene.open(t, { workers, seed, ...options }) }
}

t.test('MariaDB is killed and comes back: all guarantees hold', async (t) => {
  // Longer than it takes to start on a busy machine.
  const { server, scene } = await open(t, { options: { lease: 60_000 }, load: { patience: 60_000 } })
  await scene.load.during(async () => {
    for (let n = 0; n < 2 * FACTOR; n++) {
      await scene.load.more(scene.random.between(10, 40))
      await server.kill()
      await sleep(scene.random.between(0, 300))
      await server.start()
    }
    await scene.load.more(50)
  })
  const history = await scene.judge(TROUBLED)
  t.ok(howMany(history, UNAVAILABLE) > 0, 'some were refused')
})

t.test('connections are cut between statement and answer: all guarantees hold', async (t) => {
  const { scene, proxies } = await open(t, { options: { storeTimeout: 1_000 } })
  await scene.load.during(async () => {
    for (const proxy of proxies) proxy.trouble = { loseCommands: 0.05, loseAnswers: 0.08 }
    const enough = ({ struck }: TcpProxy) => struck.lostCommands >= 5 * FACTOR && struck.lostAnswers >= 8 * FACTOR
    await until(() => proxies.every(enough), { timeout: 60_000 * FACTOR, message: 'connections to be cut' })
    for (const proxy of proxies) proxy.trouble = {}
    await scene.load.more(50)
  })
  // A claim whose answer got lost is given back, and is one whose owner has gone until then.
  await scene.judge({ ...TROUBLED, answers: [...(TROUBLED.answers ?? []), ABANDONED] })
  for (const { struck } of proxies) t.comment(JSON.stringify(struck))
})
