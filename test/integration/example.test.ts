import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { buildApp } from '../../examples/app.js'
import { codeOf, inject } from '../support/app.js'
import { until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'

/* What `npm start` runs, and what it prints, on the memory store and on Redis. */

const server = fileURLToPath(new URL('../../examples/server.js', import.meta.url))
const shell = promisify(execFile)

async function startExample(
  t: { teardown(fn: () => unknown): void },
  env: Record<string, string> = {}
): Promise<string> {
  const child = spawn(process.execPath, [server], { env: { ...process.env, PORT: '0', ...env } })
  t.teardown(async () => {
    child.kill()
    if (child.exitCode === null) await once(child, 'exit')
  })
  let printed = ''
  child.stdout.on('data', (chunk) => {
    printed += chunk
  })
  child.stderr.pipe(process.stderr)
  await until(() => /double click: \S+/.test(printed))
  return printed
}

for (const store of ['memory', 'Redis']) {
  t.test(`the printed lines show a first reply, its replay and a conflict, on ${store}`, async (t) => {
    let env = {}
    if (store === 'Redis') {
      const redis = await startRedis({ port: true })
      t.teardown(() => redis.close())
      env = { REDIS_URL: redis.url }
    }
    const printed = await startExample(t, env)
    const lines = printed.split('\n').filter((line) => line.startsWith('curl'))
    t.equal(lines.length, 3)
    const replies: string[] = []
    for (const line of lines) replies.push((await shell('bash', ['-c', line])).stdout)
    const [first, replay, conflict] = replies as [string, string, string]
    t.match(first, /^HTTP\/1.1 201 /)
    t.notMatch(first, /idempotent-replayed/i)
    t.match(replay, /^HTTP\/1.1 201 /)
    t.match(replay, /idempotent-replayed: true/i)
    t.equal(replay.split('\r\n\r\n')[1], first.split('\r\n\r\n')[1])
    t.match(conflict, /^HTTP\/1.1 409 /)
    t.match(conflict, /retry-after: \d/i)
  })
}

t.test('the form page, submitted twice at once and once more later, makes one order', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const page = (await app.inject('/')).body
  const key = /name="__idempotent_key" value="([^"]+)"/.exec(page)?.[1]
  t.ok(key)
  const submit = () =>
    inject(app, {
      method: 'POST',
      url: '/orders',
      headers: { 'content-type': 'application/x-www-form-urlencoded' },
      payload: `__idempotent_key=${key}&title=Dune`
    })
  const replies = [...(await Promise.all([submit(), submit()])), await submit()]
  t.same(
    replies.map((reply) => [reply.statusCode, reply.headers.location]),
    [
      [303, '/'],
      [303, '/'],
      [303, '/']
    ]
  )
  t.equal((await app.inject('/')).body.match(/<li>/g)?.length, 1)
})

t.test('the API wants a key, and one key for one charge', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const charge = (amount: number, headers = {}) =>
    app.inject({ method: 'POST', url: '/charges', headers, payload: { amount, currency: 'EUR' } })
  t.equal(codeOf(await charge(1)), 'FST_IDEMPOTENCY_KEY_MISSING')
  t.equal((await charge(1, { 'idempotency-key': 'a' })).statusCode, 201)
  t.equal(codeOf(await charge(2, { 'idempotency-key': 'a' })), 'FST_IDEMPOTENCY_KEY_REUSED')
  t.equal((await app.inject('/charges')).json().length, 1)
})
