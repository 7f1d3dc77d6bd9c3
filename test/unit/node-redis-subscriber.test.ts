import { EventEmitter } from 'node:events'
import t from 'tap'
import type { Single } from '../../lib/stores/redis/node-redis-routes.js'
import { NodeRedisSubscriber } from '../../lib/stores/redis/node-redis-subscriber.js'
import { latch } from '../support/latch.js'
import { settle } from '../support/waiter.js'

/* The listening half of node-redis, which answers when it is told to. */

class Client extends EventEmitter {
  isOpen = false
  readonly calls: string[] = []
  readonly connected = latch()
  readonly pending: (() => void)[] = []
  listener: ((message: string, channel: string) => void) | undefined

  async connect(): Promise<void> {
    this.isOpen = true
    await this.connected.promise
  }

  destroy(): void {
    if (!this.isOpen) throw new Error('The client is closed')
    this.isOpen = false
    this.calls.push('destroy')
  }

  subscribe(channel: string, listener: (message: string, channel: string) => void): Promise<void> {
    this.listener = listener
    return this.#command(`subscribe ${channel}`)
  }

  unsubscribe(channel: string, listener: unknown): Promise<void> {
    return this.#command(`unsubscribe ${channel}${listener === this.listener ? '' : ' of somebody else'}`)
  }

  #command(command: string): Promise<void> {
    this.calls.push(command)
    return new Promise((done) => this.pending.push(done))
  }
}

function open() {
  const told: string[] = []
  const overrides: object[] = []
  const client = new Client()
  const socket = { host: 'here', socketTimeout: 1, reconnectStrategy: () => 1 }
  const like = {
    options: { socket },
    duplicate: (given: object) => {
      overrides.push(given)
      return client
    }
  }
  const events = {
    message: (channel: string) => void told.push(`message ${channel}`),
    lost: () => void told.push('lost'),
    ended: () => void told.push('ended')
  }
  const create = async (duplicate: (client: Single) => Single) => duplicate(like as unknown as Single)
  return { client, told, overrides, subscriber: new NodeRedisSubscriber(create, events) }
}

t.test('it is like the client of the caller, but for what would end it', async (t) => {
  const { overrides } = open()
  await settle()
  t.strictSame(overrides, [
    {
      socket: { host: 'here', reconnectStrategy: false, socketTimeout: undefined },
      clientSideCache: undefined,
      emitInvalidate: undefined,
      commandsQueueMaxLength: undefined
    }
  ])
})

t.test('commands about a channel go one after the other, and do not wait for other channels', async (t) => {
  const { client, subscriber, told } = open()
  client.connected.open()
  const first = subscriber.subscribe('a')
  void subscriber.unsubscribe('a')
  const again = subscriber.subscribe('a')
  void subscriber.subscribe('b')
  await settle()
  t.strictSame(client.calls, ['subscribe a', 'subscribe b'])
  client.pending[0]?.()
  await first
  await settle()
  t.strictSame(client.calls.slice(2), ['unsubscribe a'])
  client.pending[2]?.()
  await settle()
  t.strictSame(client.calls.slice(3), ['subscribe a'])
  client.pending[3]?.()
  await again
  client.listener?.('', 'a')
  t.strictSame(told, ['message a'])
})

t.test('a loss is its end, of which it tells once', async (t) => {
  const { client, subscriber, told } = open()
  client.connected.open()
  void subscriber.subscribe('a')
  await settle()
  for (let n = 0; n < 2; n++) client.emit('error', new Error('reset'))
  await settle()
  t.strictSame(told, ['ended'])
  t.strictSame(client.calls, ['subscribe a', 'destroy'])
})

t.test('who subscribes hears that it cannot connect before anybody is told of the end', async (t) => {
  const { client, subscriber, told } = open()
  const heard = subscriber.subscribe('a').catch((error) => told.push(error.message))
  await settle()
  client.emit('error', new Error('refused'))
  t.strictSame(told, [])
  client.connected.fail(new Error('refused'))
  await heard
  await new Promise(setImmediate)
  await settle()
  t.strictSame(told, ['refused', 'ended'])
})

t.test('closed while it connects, it is closed when it has connected, and says nothing', async (t) => {
  const { client, subscriber, told } = open()
  await settle()
  subscriber.disconnect()
  await settle()
  t.strictSame(client.calls, [])
  client.connected.open()
  await settle()
  t.strictSame(client.calls, ['destroy'])
  client.emit('error', new Error('late'))
  subscriber.disconnect()
  await settle()
  t.strictSame(told, [])
  t.strictSame(client.calls, ['destroy'])
})
