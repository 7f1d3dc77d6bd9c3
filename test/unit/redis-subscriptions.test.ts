import { EventEmitter, getEventListeners } from 'node:events'
import t from 'tap'
import type { IoredisClient } from '../../lib/stores/redis/client.js'
import { IoredisConnection } from '../../lib/stores/redis/ioredis.js'
import { RedisSubscriptions } from '../../lib/stores/redis/subscriptions.js'
import { settle, waiter } from '../support/waiter.js'

/** The listening half of ioredis, which answers when it is told to. */
class Connection extends EventEmitter {
  readonly calls: string[] = []
  readonly pending: { done: () => void; fail: (error: Error) => void }[] = []
  answers = true
  disconnected = false

  subscribe(channel: string): Promise<void> {
    this.calls.push(`subscribe ${channel}`)
    if (this.answers) return Promise.resolve()
    return new Promise((done, fail) => this.pending.push({ done, fail }))
  }

  async unsubscribe(channel: string): Promise<void> {
    this.calls.push(`unsubscribe ${channel}`)
    throw new Error('lost')
  }

  disconnect(): void {
    this.disconnected = true
  }
}

function open(prepare: (connection: Connection) => void = () => {}) {
  const connections: Connection[] = []
  const client = {
    duplicate: () => {
      const connection = new Connection()
      prepare(connection)
      connections.push(connection)
      return connection
    }
  }
  const subscriptions = new RedisSubscriptions(new IoredisConnection(client as unknown as IoredisClient))
  const wait = (channel: string, { watch = async () => true, signal = new AbortController().signal } = {}) =>
    waiter(subscriptions.changed(channel, watch, signal), signal)
  return { connections, subscriptions, wait }
}

const first = (connections: Connection[]) => connections[0] as Connection

t.test('all who listen on a channel share one subscription, and all channels one connection', async (t) => {
  const { connections, wait } = open()
  const controller = new AbortController()
  wait('a', { signal: controller.signal })
  wait('a', { signal: controller.signal })
  wait('b')
  await settle()
  t.equal(connections.length, 1)
  t.strictSame(first(connections).calls, ['subscribe a', 'subscribe b'])
  controller.abort()
  await settle()
  t.strictSame(first(connections).calls.slice(2), ['unsubscribe a'], 'the last to leave')
})

t.test('one who leaves takes nobody along', async (t) => {
  const { connections, wait } = open()
  const controller = new AbortController()
  const leaver = wait('a', { signal: controller.signal })
  const other = wait('a')
  await settle()
  controller.abort()
  await settle()
  t.same([leaver.is, other.is], ['woken', 'waiting'])
  t.strictSame(first(connections).calls, ['subscribe a'])
  first(connections).emit('message', 'a')
  await settle()
  t.equal(other.is, 'woken')
})

t.test('a message wakes all on its channel, and nobody else', async (t) => {
  const { connections, wait } = open()
  const waiters = [wait('a'), wait('a'), wait('b')]
  await settle()
  first(connections).emit('message', 'c')
  await settle()
  t.same(
    waiters.map(({ is }) => is),
    ['waiting', 'waiting', 'waiting']
  )
  first(connections).emit('message', 'a')
  await settle()
  t.same(
    waiters.map(({ is }) => is),
    ['woken', 'woken', 'waiting']
  )
})

t.test('nobody looks before the subscription stands, and who finds that all is over does not wait', async (t) => {
  const { connections, wait } = open((connection) => {
    connection.answers = false
  })
  let looked = 0
  const watch = async () => {
    looked++
    return false
  }
  const waiter = wait('a', { watch })
  await settle()
  t.same([looked, waiter.is], [0, 'waiting'])
  first(connections).pending[0]?.done()
  await settle()
  t.same([looked, waiter.is], [1, 'woken'])
  t.strictSame(first(connections).calls, ['subscribe a', 'unsubscribe a'])
})

t.test('a message that comes while somebody looks is not missed, nor is a signal', async (t) => {
  const { connections, wait } = open()
  const controller = new AbortController()
  const watch = () => new Promise<boolean>(() => {})
  const waiters = [wait('a', { watch }), wait('b', { watch, signal: controller.signal })]
  await settle()
  first(connections).emit('message', 'a')
  controller.abort()
  await settle()
  t.same(
    waiters.map(({ is }) => is),
    ['woken', 'woken']
  )
})

t.test('who does not want to wait any more does not subscribe, nor look', async (t) => {
  const { connections, wait } = open((connection) => {
    connection.answers = false
  })
  const waiter = wait('a', { signal: AbortSignal.abort() })
  await settle()
  t.same([connections.length, waiter.is], [0, 'woken'])
  const controller = new AbortController()
  let looked = 0
  const watch = async () => ++looked > 0
  const leaver = wait('a', { watch, signal: controller.signal })
  controller.abort()
  await settle()
  t.same([looked, leaver.is], [0, 'woken'])
})

t.test('no listener is left on a signal', async (t) => {
  const { connections, wait } = open()
  const { signal } = wait('a')
  t.equal(getEventListeners(signal, 'abort').length, 1)
  await settle()
  first(connections).emit('message', 'a')
  await settle()
  t.equal(getEventListeners(signal, 'abort').length, 0)
})

// A Cluster says no more of it than that it has given up a node.
for (const lost of ['close', '-node']) {
  t.test(`when the connection is lost (${lost}) all look again, and who still waits subscribes anew`, async (t) => {
    const { connections, wait } = open()
    const waiters = [wait('a'), wait('a'), wait('b')]
    await settle()
    first(connections).emit(lost)
    const anew = wait('a')
    await settle()
    t.same(
      waiters.map(({ is }) => is),
      ['woken', 'woken', 'woken']
    )
    t.equal(anew.is, 'waiting')
    t.equal(connections.length, 1, 'ioredis connects again by itself')
    t.strictSame(
      first(connections).calls,
      ['subscribe a', 'subscribe b', 'subscribe a'],
      'and is not given up by the old'
    )
    first(connections).emit('message', 'a')
    await settle()
    t.equal(anew.is, 'woken')
  })
}

t.test('a connection that is given up is replaced, and its late events harm nobody', async (t) => {
  const { connections, wait } = open()
  const before = wait('a')
  await settle()
  first(connections).emit('end')
  await settle()
  t.equal(before.is, 'woken')
  t.equal(first(connections).disconnected, true)
  const after = wait('a')
  await settle()
  t.equal(connections.length, 2)
  first(connections).emit('close')
  first(connections).emit('end')
  await settle()
  t.equal(after.is, 'waiting')
  t.equal(connections[1]?.disconnected, false)
})

t.test('closing wakes all and ends the connection, and may be done with none', async (t) => {
  const { connections, subscriptions, wait } = open()
  await subscriptions.close()
  const waiters = [wait('a'), wait('b')]
  await settle()
  await subscriptions.close()
  await settle()
  t.same(
    waiters.map(({ is }) => is),
    ['woken', 'woken']
  )
  t.equal(first(connections).disconnected, true)
  t.strictSame(first(connections).calls, ['subscribe a', 'subscribe b'])
})

t.test('a subscription that fails is an error for those who wait for it, and is tried anew by the next', async (t) => {
  const { connections, wait } = open((connection) => {
    connection.answers = false
  })
  const waiters = [wait('a'), wait('a')]
  await settle()
  first(connections).pending[0]?.fail(new Error('no permission'))
  await settle()
  t.same(
    waiters.map(({ is }) => is),
    ['failed', 'failed']
  )
  wait('a')
  t.strictSame(first(connections).calls.slice(-1), ['subscribe a'])
})

t.test('a subscription that fails when another is in its place leaves that alone', async (t) => {
  const { connections, wait } = open((connection) => {
    connection.answers = false
  })
  wait('a')
  await settle()
  const [old] = first(connections).pending
  first(connections).emit('close')
  const anew = wait('a')
  old?.fail(new Error('late'))
  first(connections).pending[1]?.done()
  await settle()
  first(connections).emit('message', 'a')
  await settle()
  t.equal(anew.is, 'woken')
})

t.test('a subscription that fails is forgotten at once, before those who waited for it are told', async (t) => {
  const { connections, wait } = open((connection) => {
    connection.answers = false
  })
  const controller = new AbortController()
  wait('a', { signal: controller.signal })
  wait('a')
  await settle()
  first(connections).pending[0]?.fail(new Error('no permission'))
  await Promise.resolve()
  await Promise.resolve()
  wait('a')
  t.strictSame(first(connections).calls, ['subscribe a', 'subscribe a'])
})

t.test('an error of the connection does not end the process', async (t) => {
  const { connections, wait } = open()
  wait('a')
  await settle()
  t.doesNotThrow(() => first(connections).emit('error', new Error('reset')))
})

t.test("the caller's limits on retries and its key prefix are not those of the listening", async (t) => {
  const calls: unknown[][] = []
  const duplicate = (...args: unknown[]) => {
    calls.push(args)
    return new Connection()
  }
  const listen = (client: object) =>
    new RedisSubscriptions(new IoredisConnection(client as IoredisClient)).changed(
      'a',
      async () => false,
      new AbortController().signal
    )
  const own = { enableOfflineQueue: true, maxRetriesPerRequest: null, autoResubscribe: false, keyPrefix: '' }
  await listen({ duplicate })
  t.strictSame(calls.pop(), [{ ...own, lazyConnect: false }])
  const redisOptions = { password: 'secret', keyPrefix: 'p:' }
  await listen({ isCluster: true, options: { redisOptions }, duplicate })
  const ofCluster = { enableOfflineQueue: true, keyPrefix: '' }
  t.strictSame(calls.pop(), [[], { ...ofCluster, redisOptions: { password: 'secret', keyPrefix: '' } }])
  await listen({ isCluster: true, duplicate })
  t.strictSame(calls.pop(), [[], { ...ofCluster, redisOptions: { keyPrefix: '' } }])
})
