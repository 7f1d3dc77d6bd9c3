import t from 'tap'
import type { NodeRedisClient } from '../../lib/stores/redis/client.js'
import { NodeRedisConnection } from '../../lib/stores/redis/node-redis.js'
import { cluster, pool, type Route, type Single, sentinel, single } from '../../lib/stores/redis/node-redis-routes.js'

import { VirtualTime } from '../support/virtual-time.js'

/* What is said to clients of node-redis, and what is made of their answers. The clients are fakes: they may lie. */

interface Options {
  typeMapping: object
  asap: boolean
  timeout: undefined
  chainId?: symbol
}

/** A client whose commands are noted, and answered as told. */
function client(answer: (args: readonly unknown[]) => unknown = () => 'OK', told: { isReady?: boolean } = {}) {
  const sent: [args: readonly unknown[], options: Options][] = []
  const fake = {
    isOpen: true,
    isReady: told.isReady ?? true,
    socketEpoch: 1 as number | undefined,
    async sendCommand(args: readonly unknown[], options: Options) {
      sent.push([args, options])
      return answer(args)
    }
  }
  return { sent, fake, single: fake as unknown as Single }
}

const connectionBy = (route: Route, given: object = {}) =>
  new NodeRedisConnection({ isOpen: true, ...given } as unknown as NodeRedisClient, route)
const fails = (message: string) => () => {
  throw Object.assign(new Error(message), { command: 'secret' })
}
const READONLY = "READONLY You can't write against a read only replica."

t.test('two commands in a row are a chain of their own, and neither may overtake', async (t) => {
  const { sent, single: only } = client()
  const connection = connectionBy(single(only))
  await connection.getWithTtl('k')
  await connection.hold((link) => link.setAndWait('k', 2, 50))
  t.strictSame(
    sent.map(([args]) => args),
    [
      ['GET', 'k'],
      ['PTTL', 'k'],
      ['SET', 'k', '', 'PX', '50'],
      ['WAIT', '2', '50']
    ]
  )
  const chains = sent.map(([, { chainId }]) => chainId)
  t.ok(chains.every((chain) => typeof chain === 'symbol'))
  t.same(
    chains.map((chain) => chains.indexOf(chain)),
    [0, 0, 2, 2]
  )
  // With a timeout of the caller's each command would have a timer.
  for (const [, { chainId: _, ...options }] of sent) {
    t.strictSame(options, { typeMapping: { 36: Buffer }, asap: false, timeout: undefined })
  }
})

t.test('when the first fails both do, without what the error carries', async (t) => {
  const failing = (name: string, message: string) =>
    connectionBy(single(client(([command]) => (command === name ? fails(message)() : 1)).single))
  const error = await failing('GET', 'LOADING')
    .getWithTtl('k')
    .then(
      () => null,
      (error) => error
    )
  t.match(error, { message: 'LOADING' })
  t.notOk('command' in error)
  t.match(await failing('PTTL', 'OOM').getWithTtl('k'), [[null, 1], [{ message: 'OOM' }]])
})

t.test('scripts have their keys behind their number, and what is read of the server comes as text', async (t) => {
  const { sent, single: only } = client()
  const connection = connectionBy(single(only), { _keyPrefix: 'p:' })
  await connection.evaluate('EVALSHA', 'sha', ['a', 'b'], ['1', Buffer.from('2')])
  await connection.hold((link) => link.evaluate('EVAL', 'source', ['a'], []))
  await connection.config('maxmemory*')
  t.strictSame(
    sent.map(([args]) => args),
    [
      ['EVALSHA', 'sha', '2', 'p:a', 'p:b', '1', Buffer.from('2')],
      ['EVAL', 'source', '1', 'p:a'],
      ['CONFIG', 'GET', 'maxmemory*']
    ]
  )
  t.strictSame(sent[2]?.[1], { typeMapping: {}, asap: false, timeout: undefined })
  await connectionBy(single(only), { _keyPrefix: Buffer.from([255]) }).evaluate('EVAL', 'source', ['é'], [])
  t.strictSame(sent[3]?.[0], ['EVAL', 'source', '1', Buffer.from([255, 0xc3, 0xa9])], 'a prefix that is no text')
})

t.test('SCAN and INFO are a chain, by one connection; what they match and find is with the prefix', async (t) => {
  const { sent, single: only } = client(([command]) => (command === 'INFO' ? fails('NOPERM')() : ['0', []]))
  const connection = connectionBy(single(only), { _keyPrefix: 'p:' })
  t.equal(connection.keyPrefix, 'p:')
  t.equal(connectionBy(single(only)).keyPrefix, '')
  t.match(await connection.scan('17', Buffer.from('p:k*'), 300), [[null, ['0', []]], [{ message: 'NOPERM' }]])
  await connection.slots()
  t.strictSame(
    sent.map(([args]) => args),
    [
      ['SCAN', '17', 'MATCH', Buffer.from('p:k*'), 'COUNT', '300'],
      ['INFO', 'server'],
      ['CLUSTER', 'SLOTS']
    ]
  )
  t.type(sent[0]?.[1].chainId, 'symbol')
  t.equal(sent[0]?.[1].chainId, sent[1]?.[1].chainId)
  t.strictSame(sent[2]?.[1], { typeMapping: {}, asap: false, timeout: undefined })
  const failing = connectionBy(single(client(fails('LOADING')).single))
  for (const call of [() => failing.scan('0', Buffer.from('*'), 300), () => failing.slots()]) {
    const error = await call().then(
      () => ({}),
      (error: Error) => error
    )
    t.match(error, { message: 'LOADING' })
    t.notOk('command' in error)
  }
})

t.test('a connection is known by its number; a client that has none is an error', async (t) => {
  const { fake, single: only } = client()
  const connection = connectionBy(single(only))
  const identities = connection.hold(async (link) => {
    const before = link.identity
    fake.socketEpoch = 2
    return [before, link.identity]
  })
  t.strictSame(await identities, [1, 2])
  fake.socketEpoch = undefined
  await t.rejects(
    connection.hold(async (link) => link.identity),
    { message: /does not tell of new connections/ }
  )
})

t.test('in a Cluster commands go to the master of their key', async (t) => {
  const sent: unknown[][] = []
  const fake = {
    masters: [],
    getRandomNode: () => 'a node',
    nodeClient: async (node: unknown) => node,
    sendCommand: async (...args: unknown[]) => void sent.push(args.slice(0, 3))
  }
  const connection = connectionBy(cluster(fake as never))
  t.equal(connection.isCluster, true)
  await connection.setOrGet('k', 'v', '5')
  await connection.evaluate('EVALSHA', 'sha', ['k'], [])
  await connection.config('a')
  t.strictSame(sent, [
    ['k', false, ['SET', 'k', 'v', 'PX', '5', 'NX', 'GET']],
    ['k', false, ['EVALSHA', 'sha', '1', 'k']],
    [undefined, false, ['CONFIG', 'GET', 'a']]
  ])
})

t.test('in a Cluster one listens to a node that answers, or to any', async (t) => {
  const node = (isReady?: boolean) => (isReady === undefined ? {} : { client: { isReady } })
  for (const [masters, expected] of [
    [[node(), node(false), node(true)], 2],
    [[node(), node(false)], 'random']
  ] as const) {
    const fake = { masters, getRandomNode: () => 'random', nodeClient: async (node: unknown) => node }
    const lent: unknown = await cluster(fake as never).lend(async (client) => client as never)
    t.equal(lent, typeof expected === 'number' ? masters[expected] : expected)
  }
})

t.test('of a pool one connection is lent for one turn of the event loop, and each gets its own answer', async (t) => {
  const { sent, single: only } = client((args) => (args[1] === 'bad' ? fails('WRONGTYPE')() : args[1]))
  let lent = 0
  const fake = {
    execute: async <T>(use: (client: Single) => Promise<T>) => {
      lent++
      return use(only)
    }
  }
  const connection = connectionBy(pool(fake))
  const asked = ['a', 'bad', 'b'].map((key) => connection.getWithTtl(key).catch((error) => error.message))
  t.match(await Promise.all(asked), [[[null, 'a']], 'WRONGTYPE', [[null, 'b']]])
  t.same([lent, sent.length], [1, 6])
  await connection.getWithTtl('c')
  t.equal(lent, 2)
})

/** A Sentinel whose masters come one after the other, with each look that has to find another one. */
function masters(...clients: Single[]) {
  let looks = 0
  const fake = {
    async _execute<T>(isReadonly: boolean, use: (client: Single) => Promise<T>): Promise<T> {
      t.equal(isReadonly, false)
      looks++
      for (;;) {
        try {
          return await use(clients[0] as Single)
        } catch (error) {
          if (clients.length === 1 || !(error as Error).message.startsWith('READONLY')) throw error
          clients.shift()
        }
      }
    }
  }
  return { connection: connectionBy(sentinel(fake)), looks: () => looks }
}

t.test('by Sentinel all share one connection to the master, which is looked for once', async (t) => {
  const master = client()
  const { connection, looks } = masters(master.single)
  await Promise.all(['a', 'b', 'c'].map((key) => connection.getWithTtl(key)))
  await connection.getWithTtl('d')
  t.same([looks(), master.sent.length], [1, 8])
})

t.test('a master that has become a replica is left for the next one, and what it refused goes there', async (t) => {
  const [old, next] = [client(fails(READONLY)), client()]
  const { connection, looks } = masters(old.single, next.single)
  t.equal(await connection.setOrGet('k', 'v', '5'), 'OK')
  t.equal(await connection.evaluate('EVALSHA', 'sha', ['k'], []), 'OK')
  t.same([looks(), old.sent.length, next.sent.length], [2, 1, 2])
  const only = masters(client(fails(READONLY)).single)
  await t.rejects(only.connection.setOrGet('k', 'v', '5'), { message: READONLY }, 'where there is no other')
})

t.test('what is lost with its connection goes once more, and any other error is the answer', async (t) => {
  const master = client()
  let losses = 1
  master.fake.sendCommand = async (args) => {
    master.sent.push([args, {} as Options])
    if (losses-- <= 0) return 'OK'
    master.fake.isReady = false
    throw new Error('Socket closed unexpectedly')
  }
  const { connection } = masters(master.single)
  t.equal(await connection.evaluate('EVALSHA', 'sha', ['k'], []), 'OK')
  losses = 2
  await t.rejects(connection.evaluate('EVALSHA', 'sha', ['k'], []), { message: 'Socket closed unexpectedly' })
  t.equal(master.sent.length, 4)
  const failing = client(fails('OOM'))
  await t.rejects(masters(failing.single).connection.evaluate('EVALSHA', 'sha', ['k'], []), { message: 'OOM' })
  t.equal(failing.sent.length, 1)
})

t.test('who comes later does not wait for a look that nobody answers', async (t) => {
  const time = new VirtualTime()
  time.install()
  t.teardown(() => time.uninstall())
  const master = client()
  let looks = 0
  const fake = {
    _execute: <T>(_: boolean, use: (client: Single) => Promise<T>): Promise<T> =>
      ++looks === 1 ? new Promise<never>(() => {}) : use(master.single)
  }
  const connection = connectionBy(sentinel(fake))
  let answers = 0
  const ask = () => void connection.getWithTtl('k').then(() => answers++)
  ask()
  await time.pass(900)
  ask()
  await time.pass(200)
  t.same([looks, answers], [1, 0])
  ask()
  await time.pass(0)
  t.same([looks, answers], [2, 1])
})

t.test('all stores on one client of Sentinel have the same way, be it by another view of it', async (t) => {
  const fake = { _execute: () => new Promise<never>(() => {}) }
  t.equal(sentinel(fake), sentinel(fake))
  t.equal(sentinel(Object.assign(Object.create(fake), { _self: fake })), sentinel(fake))
  t.not(sentinel({ ...fake }), sentinel(fake))
})
