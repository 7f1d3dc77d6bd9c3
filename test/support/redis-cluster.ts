import { once } from 'node:events'
import { Cluster } from 'ioredis'
import { createCluster } from 'redis'
import { until } from './latch.js'
import { type RedisServer, startRedis } from './redis.js'

type ClientOptions = NonNullable<ConstructorParameters<typeof Cluster<'legacy'>>[1]>

type NodeRedisOptions = Parameters<typeof createCluster>[0]
type NodeRedisCluster = ReturnType<typeof createCluster>

export interface RedisCluster {
  /** Three masters, each with a third of the slots, in the order of the slots. */
  readonly nodes: readonly RedisServer[]
  /** Those of each master. */
  readonly replicas: readonly (readonly RedisServer[])[]
  /** A client that is ready. It is disconnected by `close`. */
  client(options?: ClientOptions): Promise<Cluster>
  /** The same of node-redis. */
  nodeRedis(options?: Partial<NodeRedisOptions>): Promise<NodeRedisCluster>
  close(): Promise<void>
}

const slots = 16_384
const MASTERS = 3

export interface ClusterOptions {
  /** How many replicas each master has. */
  replicas?: number
  /** Further arguments of each server. */
  config?: string[]
}

/** A Redis Cluster of the test's own; takes two to three seconds, and some more with replicas. */
export async function startCluster({ replicas = 0, config = [] }: ClusterOptions = {}): Promise<RedisCluster> {
  const args = ['--cluster-enabled', 'yes', '--cluster-node-timeout', '5000', ...config]
  const count = MASTERS * (1 + replicas)
  const started = await Promise.allSettled(
    Array.from({ length: count }, () => startRedis({ port: true, config: args }))
  )
  const all = started.flatMap((node) => (node.status === 'fulfilled' ? [node.value] : []))
  const nodes = all.slice(0, MASTERS)
  const replicasOf = nodes.map((_, n) => all.filter((_, m) => m >= MASTERS && m % MASTERS === n))
  const clients = new Set<Cluster>()
  const nodeRedis = new Set<NodeRedisCluster>()
  const close = async () => {
    for (const client of clients) client.disconnect()
    for (const client of nodeRedis) client.destroy()
    await Promise.all(all.map((node) => node.close()))
  }
  try {
    for (const node of started) if (node.status === 'rejected') throw node.reason
    await join(nodes)
    await follow(nodes, replicasOf)
  } catch (error) {
    await close()
    throw error
  }
  return {
    nodes,
    replicas: replicasOf,
    close,
    async client(options = {}) {
      const addresses = all.map(({ host, port }) => ({ host, port }))
      const client = new Cluster(addresses, options)
      clients.add(client)
      client.on('error', () => {})
      if (!options.lazyConnect) await once(client, 'ready')
      return client
    },
    async nodeRedis(options = {}) {
      const rootNodes = all.map(({ host, port }) => ({ socket: { host, port } }))
      const defaults = { ...options.defaults, socket: { reconnectStrategy: 20 } }
      const client = createCluster({ rootNodes, ...options, defaults })
      nodeRedis.add(client)
      client.on('error', () => {})
      await client.connect()
      return client
    }
  }
}

/** What `redis-cli --cluster create` does, without its pauses. */
async function join(nodes: readonly RedisServer[]): Promise<void> {
  const clients = await Promise.all(nodes.map((node) => node.client()))
  const bound = (index: number) => Math.round((index * slots) / nodes.length)
  await Promise.all(
    clients.map(async (client, index) => {
      const own = Array.from({ length: bound(index + 1) - bound(index) }, (_, slot) => bound(index) + slot)
      await client.cluster('ADDSLOTS', ...own)
      // Different from the start, or the nodes have to settle a collision first.
      await client.cluster('SET-CONFIG-EPOCH', index + 1)
    })
  )
  for (const { host, port } of nodes.slice(1)) await clients[0]?.cluster('MEET', host, port)
  const complete = ['cluster_state:ok', `cluster_slots_ok:${slots}`, `cluster_known_nodes:${nodes.length}`]
  for (const client of clients) {
    const settled = async () => {
      const info = (await client.cluster('INFO')).split('\r\n')
      return complete.every((line) => info.includes(line))
    }
    await until(settled, { message: 'the cluster to form' })
    client.disconnect()
  }
}

/** Makes each replica follow its master. */
async function follow(masters: readonly RedisServer[], replicas: readonly (readonly RedisServer[])[]): Promise<void> {
  const joining = masters.flatMap((master, n) => (replicas[n] ?? []).map((replica) => ({ master, replica })))
  await Promise.all(
    joining.map(async ({ master, replica }) => {
      const [admin, client] = [await master.client(), await replica.client()]
      const id = String(await admin.cluster('MYID'))
      await client.cluster('MEET', master.host, master.port)
      // It has to have heard of its master, and of everybody else.
      const hasMet = async () => (await client.cluster('INFO')).includes(`cluster_known_nodes:${known}\r\n`)
      const known = masters.length + joining.length
      await until(hasMet, { message: 'a replica to join' })
      await client.cluster('REPLICATE', id)
      const isLinked = async () => /master_link_status:up/.test(await client.info('replication'))
      await until(isLinked, { message: 'a replica to follow' })
      for (const each of [admin, client]) each.disconnect()
    })
  )
}

/** Where a key without braces belongs. */
export function slotOf(key: string): number {
  let crc = 0
  for (const byte of Buffer.from(key)) {
    crc ^= byte << 8
    for (let bit = 0; bit < 8; bit++) crc = (crc & 0x8000 ? (crc << 1) ^ 0x1021 : crc << 1) & 0xffff
  }
  return crc % slots
}
