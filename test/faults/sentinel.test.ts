import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import t from 'tap'
import { RedisStore } from '../../index.js'
import { build, inject, REPLAYED } from '../support/app.js'
import { until } from '../support/latch.js'
import { freePort, launch, makeFolder } from '../support/process.js'
import { redisProgram, startRedis } from '../support/redis.js'

/* A failover by Sentinel: the master dies, its replica takes over. With `replicas: 1` no stored reply is lost. */

const master = await startRedis({ port: true })
const replica = await startRedis({ port: true, config: ['--replicaof', master.host, String(master.port)] })
t.teardown(() => Promise.all([master.close(), replica.close()]))
const onReplica = await replica.client()
const isLinked = async () => /master_link_status:up/.test(await onReplica.info('replication'))
await until(isLinked, { timeout: 60_000, message: 'the replica to follow' })

const port = await freePort()
const folder = makeFolder('sentinel')
const config = join(folder, 'sentinel.conf')
writeFileSync(
  config,
  `port ${port}
bind 127.0.0.1
dir ${folder}
sentinel monitor main ${master.host} ${master.port} 1
sentinel down-after-milliseconds main 500
sentinel failover-timeout main 3000
`
)
const { server, env } = redisProgram()
const sentinel = await launch(server, [config, '--sentinel'], { env, log: join(folder, 'log') })
t.teardown(async () => {
  sentinel.signal('SIGKILL')
  await sentinel.exited
})
const observer = new Redis({ host: '127.0.0.1', port })
observer.on('error', () => {})
t.teardown(() => observer.disconnect())
const knowsReplica = async () => ((await observer.call('SENTINEL', 'replicas', 'main')) as unknown[]).length === 1
await until(() => knowsReplica().catch(() => false), { timeout: 60_000, message: 'Sentinel to see the replica' })

t.test(
  'what counts as stored on a replica is replayed after a failover, and no handler of it runs again',
  async (t) => {
    const client = new Redis({
      sentinels: [{ host: '127.0.0.1', port }],
      name: 'main',
      sentinelRetryStrategy: () => 50
    })
    client.on('error', () => {})
    t.teardown(() => client.disconnect())
    const app = await build(t, {
      store: new RedisStore(client, { replicas: 1, replicaTimeout: 500 }),
      storeTimeout: 1_000,
      lease: 1_000
    })
    const runs = new Map<string, number>()
    app.post('/', { config: { idempotency: true } }, async (request) => {
      const key = request.idempotency?.key ?? ''
      runs.set(key, (runs.get(key) ?? 0) + 1)
      return { key, run: runs.get(key) }
    })
    const send = (key: string) => inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': key } })
    const before = Array.from({ length: 50 }, (_, n) => `before ${n}`)
    for (const key of before) t.same((await send(key)).json(), { key, run: 1 })

    await master.kill()
    const during = await send('during')
    t.ok([200, 503].includes(during.statusCode), 'an answer in any case')
    const isBack = async () => (await send(`probe ${Math.random()}`)).statusCode === 200
    await until(isBack, { timeout: 120_000, message: 'the failover' })
    t.match(await onReplica.role(), ['master'])

    for (const key of before) {
      const again = await send(key)
      t.same([again.json(), again.headers[REPLAYED]], [{ key, run: 1 }, 'true'])
    }
  }
)
