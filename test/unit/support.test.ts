import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import Fastify from 'fastify'
import { Redis } from 'ioredis'
import t from 'tap'
import { latch, listening, until } from '../support/latch.js'
import { state } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { startCluster } from '../support/redis-cluster.js'

t.test('a latch settles its promise from outside', async (t) => {
  const opened = latch<number>()
  opened.open(1)
  t.equal(await opened.promise, 1)
  const failed = latch()
  failed.fail(new Error('no'))
  await t.rejects(failed.promise, { message: 'no' })
})

t.test('until waits for something truthy, and says what it waited for in vain', async (t) => {
  let polls = 0
  t.equal(await until(() => ++polls === 3 && 'there'), 'there')
  await t.rejects(
    until(async () => false, { timeout: 20, message: 'rain' }),
    {
      message: 'Waited 20 ms in vain for rain'
    }
  )
  await t.rejects(
    until(() => {
      throw new Error('at once')
    }),
    { message: 'at once' }
  )
})

t.test('listening gives the base URL of a started app', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.get('/', () => 'here')
  t.equal(await (await fetch(`${await listening(app)}/`)).text(), 'here')
})

t.test('a started Redis answers', async (t) => {
  const server = await startRedis()
  const client = await server.client()
  t.equal(await client.ping(), 'PONG')
  t.throws(() => server.url, { message: 'There is no URL without startRedis({ port: true })' })
  await server.close()
  t.notOk(existsSync(server.path), 'nothing is left of it')
})

t.test('a started Redis answers on a port as well', async (t) => {
  const server = await startRedis({ port: true, config: ['--maxmemory', '8mb'] })
  t.teardown(() => server.close())
  const client = new Redis(server.url)
  t.teardown(() => client.disconnect())
  t.match(await client.config('GET', 'maxmemory'), ['maxmemory', '8388608'])
})

t.test('a Redis that cannot start says why', async (t) => {
  await t.rejects(startRedis({ config: ['--maxmemory', 'much'] }), { message: /argument must be a memory value/ })
})

t.test('stop, kill and start keep persisted data', async (t) => {
  const server = await startRedis({ persist: true, port: true })
  t.teardown(() => server.close())
  const client = await server.client()
  await client.set('first', '1')
  await server.stop()
  await server.start()
  await client.set('second', '2')
  await server.kill()
  await server.start()
  t.same(await client.mget('first', 'second'), ['1', '2'])
})

t.test('data that is not persisted is lost', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  const client = await server.client()
  await client.set('key', 'value')
  await server.stop()
  await server.start()
  t.equal(await client.get('key'), null)
})

t.test('a paused Redis answers after it was resumed', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  const client = await server.client()
  await server.pause()
  let answered = false
  const pong = client.ping().then((reply) => {
    answered = true
    return reply
  })
  await new Promise((resolve) => setTimeout(resolve, 50))
  t.notOk(answered)
  server.resume()
  t.equal(await pong, 'PONG')
  await server.pause()
  await server.stop()
  t.throws(() => server.resume(), { message: 'redis-server is not running' })
})

t.test('commands() lists exactly what a client sent', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  const client = await server.client()
  await client.set('before', '1')
  const awkward = 'a "b" "c" \\ \\x00 \r\n\t\x07\b\x00 é 🚲 ] "'
  const lua = 'redis.call("SET", KEYS[1], ARGV[1]) return redis.call("GET", KEYS[1])'
  const { result, sent, scripted } = await server.commands(async () => {
    await client.set('key', awkward, 'PX', 1000)
    await client.multi().incr('n').get('key').exec()
    return await client.eval(lua, 1, 'key', awkward)
  })
  await client.set('after', '1')
  t.equal(result, awkward)
  t.same(sent, [
    ['set', 'key', awkward, 'PX', '1000'],
    ['multi'],
    ['incr', 'n'],
    ['get', 'key'],
    ['exec'],
    ['eval', lua, '1', 'key', awkward]
  ])
  t.same(scripted, [
    ['SET', 'key', awkward],
    ['GET', 'key']
  ])
  t.same(await server.commands(() => {}), { result: undefined, sent: [], scripted: [] })
})

t.test('commands() reads long arguments', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  const client = await server.client()
  const big = randomBytes(1 << 20)
  const { sent } = await server.commands(() => client.set('key', big))
  t.equal(sent[0]?.[2], big.toString())
})

t.test('commands() passes an error on, and fails when the server ends', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  await t.rejects(
    server.commands(() => {
      throw new Error('mine')
    }),
    { message: 'mine' }
  )
  await t.rejects(server.commands(() => server.kill()))
})

t.test('a cluster serves keys in every slot range', async (t) => {
  const cluster = await startCluster()
  t.teardown(() => cluster.close())
  const client = await cluster.client()
  const keys = Array.from({ length: 60 }, (_, n) => `key-${n}`)
  await Promise.all(keys.map((key) => client.set(key, key)))
  t.same(await Promise.all(keys.map((key) => client.get(key))), keys)
  const sizes = await Promise.all(cluster.nodes.map(async (node) => (await node.client()).dbsize()))
  t.ok(
    sizes.every((size) => size > 0),
    `each node has its share: ${sizes}`
  )
  t.equal(
    sizes.reduce((sum, size) => sum + size),
    keys.length
  )
})

const starter = `
  const { startRedis } = await import(${JSON.stringify(new URL('../support/redis.js', import.meta.url).href)})
  const [running, paused] = [await startRedis(), await startRedis()]
  const pid = async (server) => /process_id:(\\d+)/.exec(await (await server.client()).info('server'))[1]
  const pids = [await pid(running), await pid(paused)]
  await paused.pause()
  console.log(pids.join(' '))
`
for (const [name, ending] of [
  ['SIGTERM', 'setInterval(() => {}, 1000)'],
  ['SIGINT', 'setInterval(() => {}, 1000)'],
  ['SIGKILL', 'setInterval(() => {}, 1000)'],
  ['process.exit', 'process.exit(0)'],
  ['an exception', 'throw new Error("fatal")']
] as const) {
  t.test(`servers, paused ones as well, end when their test process ends by ${name}`, async (t) => {
    const child = spawn(process.execPath, ['--input-type=module', '-e', starter + ending], {
      stdio: ['ignore', 'pipe', 'ignore']
    })
    t.teardown(() => child.kill('SIGKILL'))
    const pids = await new Promise<number[]>((resolve) => {
      child.stdout.once('data', (data) => resolve(String(data).trim().split(' ').map(Number)))
    })
    t.equal(pids.length, 2)
    if (name.startsWith('SIG')) child.kill(name as NodeJS.Signals)
    await until(() => pids.every((pid) => state(pid) === 'gone'), { message: `${pids} to end` })
  })
}

t.test('closed servers do not keep the test process alive', async (t) => {
  const child = spawn(
    process.execPath,
    ['--input-type=module', '-e', `${starter} await Promise.all([running.close(), paused.close()])`],
    {
      stdio: 'ignore'
    }
  )
  t.teardown(() => child.kill('SIGKILL'))
  const [code] = await new Promise<unknown[]>((resolve) => child.once('exit', (...exit) => resolve(exit)))
  t.equal(code, 0)
})
