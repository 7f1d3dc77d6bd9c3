import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import { createSentinel } from 'redis'
import type { Test } from 'tap'
import { until } from './latch.js'
import { freePort, launch, makeFolder } from './process.js'
import { redisProgram, startRedis } from './redis.js'

type NodeRedisOptions = Parameters<typeof createSentinel>[0]

/**
 * A master, its replica, and a Sentinel that knows of both.
 * @param downAfter A master that is silent for so many milliseconds is replaced. On a busy machine any may be for a while.
 */
export async function startSentinel(t: Test, downAfter = 60_000) {
  const master = await startRedis({ port: true })
  const replica = await startRedis({ port: true, config: ['--replicaof', master.host, String(master.port)] })
  t.teardown(() => Promise.all([master.close(), replica.close()]))
  const onReplica = await replica.client()
  const isLinked = async () => /master_link_status:up/.test(await onReplica.info('replication'))
  await until(isLinked, { message: 'the replica to follow' })

  const port = await freePort()
  const folder = makeFolder('sentinel')
  const config = join(folder, 'sentinel.conf')
  writeFileSync(
    config,
    `port ${port}
bind 127.0.0.1
dir ${folder}
sentinel monitor main ${master.host} ${master.port} 1
sentinel down-after-milliseconds main ${downAfter}
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
  await until(() => knowsReplica().catch(() => false), { message: 'Sentinel to see the replica' })
  return { master, onReplica, observer, port }
}

/** A client of ioredis. */
export function ioredis(t: Test, port: number): Redis {
  const client = new Redis({
    sentinels: [{ host: '127.0.0.1', port }],
    name: 'main',
    sentinelRetryStrategy: () => 50
  })
  client.on('error', () => {})
  t.teardown(() => client.disconnect())
  return client
}

/** The same of node-redis, connected. */
export async function nodeRedis(t: Test, port: number, options: Partial<NodeRedisOptions> = {}) {
  const client = createSentinel({
    name: 'main',
    sentinelRootNodes: [{ host: '127.0.0.1', port }],
    nodeClientOptions: { socket: { reconnectStrategy: 50 } },
    ...options
  })
  client.on('error', () => {})
  await client.connect()
  t.teardown(() => client.destroy())
  return client
}
