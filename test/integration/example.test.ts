import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { buildApp } from '../../examples/app.js'
import { codeOf, inject } from '../support/app.js'
import { until } from '../support/latch.js'
import { startMariadb } from '../support/mariadb.js'
import { startPostgres } from '../support/postgres.js'
import { makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { nodeWithSqlite } from '../support/sqlite.js'

/* The API that `npm start` runs, and what it prints, on each store. The page before it: test/browser/demo.test.ts. */

const server = fileURLToPath(new URL('../../examples/server.js', import.meta.url))
const demo = fileURLToPath(new URL('../../examples/demo/start.js', import.meta.url))
const shell = promisify(execFile)

interface Owner {
  teardown(fn: () => unknown): void
}

async function launchExample(
  t: Owner,
  env: Record<string, string>,
  { node = process.execPath, cwd = makeFolder('example'), script = server } = {}
): Promise<{ child: ChildProcess; url: string; printed: string; warned: () => string }> {
  // What tap loads into its own processes has no business there.
  const { NODE_OPTIONS: _, ...inherited } = process.env
  const child = spawn(node, [script], { cwd, env: { ...inherited, PORT: '0', ...env } })
  t.teardown(async () => {
    child.kill()
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
  })
  let printed = ''
  child.stdout.on('data', (chunk) => {
    printed += chunk
  })
  let warned = ''
  child.stderr.on('data', (chunk) => {
    warned += chunk
  })
  const url = await until(() => /double click: (\S+)\/form/.exec(printed)?.[1], { timeout: 60_000 })
  return { child, url: url as string, printed, warned: () => warned }
}

for (const store of ['memory', 'Redis', 'PostgreSQL', 'MariaDB', 'SQLite', 'SQLite, behind the demo']) {
  t.test(`the printed lines show a first reply, its replay and a conflict, on ${store}`, async (t) => {
    let env: Record<string, string> = { DATABASE_URL: 'memory:' }
    if (store.startsWith('SQLite')) env = { DATABASE_URL: `sqlite:${join(makeFolder('example'), 'file')}` }
    if (store === 'Redis') {
      const redis = await startRedis({ port: true })
      t.teardown(() => redis.close())
      env = { REDIS_URL: redis.url }
    }
    if (store === 'PostgreSQL') {
      const postgres = await startPostgres()
      t.teardown(() => postgres.close())
      env = { DATABASE_URL: postgres.url }
    }
    if (store === 'MariaDB') {
      const mariadb = await startMariadb()
      t.teardown(() => mariadb.close())
      env = { DATABASE_URL: mariadb.url }
    }
    const script = store.endsWith('the demo') ? demo : server
    const { printed } = await launchExample(t, env, { script })
    const lines = printed.split('\n').filter((line) => line.startsWith('curl'))
    t.equal(lines.length, 4)
    const replies: string[] = []
    for (const line of lines) replies.push((await shell('bash', ['-c', line])).stdout)
    const [first, replay, conflict] = replies as [string, string, string, string]
    t.match(first, /^HTTP\/1.1 201 /)
    t.notMatch(first, /idempotent-replayed/i)
    t.match(replay, /^HTTP\/1.1 201 /)
    t.match(replay, /idempotent-replayed: true/i)
    t.equal(replay.split('\r\n\r\n')[1], first.split('\r\n\r\n')[1])
    t.match(conflict, /^HTTP\/1.1 409 /)
    t.match(conflict, /retry-after: \d/i)
    const balance = lines[3] as string
    await until(async () => JSON.parse((await shell('bash', ['-c', balance])).stdout).charges === 2)
    t.same(JSON.parse((await shell('bash', ['-c', balance])).stdout), { charges: 2, total: 4300, sum: 0 })
  })
}

t.test('the form page, submitted twice at once and once more later, makes one order', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const page = (await app.inject('/form')).body
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
      [303, '/orders/1'],
      [303, '/orders/1'],
      [303, '/orders/1']
    ]
  )
  t.equal((await app.inject('/form')).body.match(/<li>/g)?.length, 1)
})

for (const place of ['PostgreSQL', 'a file of SQLite']) {
  t.test(
    `a server that is killed after each step of an order: one order, one payment, one mail, in ${place}`,
    async (t) => {
      const kill = fileURLToPath(new URL('../../examples/kill.js', import.meta.url))
      const env = { ...process.env }
      if (place === 'PostgreSQL') {
        const postgres = await startPostgres()
        t.teardown(() => postgres.close())
        env.DATABASE_URL = postgres.url
      }
      const { stdout } = await shell(process.execPath, [kill], { env })
      t.match(stdout, /\n1 order, 1 payment, 1 mail\n$/)
      for (const step of ['order', 'payment']) t.match(stdout, `step-resumed ${step}\n`)
    }
  )
}

t.test(
  'without any database it keeps its keys in a file, in the SQLite of Node or in another, and says so',
  async (t) => {
    const cwd = makeFolder('example')
    for (const node of [process.execPath, nodeWithSqlite]) {
      const { printed, warned } = await launchExample(t, {}, { node, cwd })
      t.match(printed, /in the SQLite file example\.sqlite, where they survive a restart/)
      t.equal(warned(), '')
    }
  }
)

t.test('a database of another kind is refused by what there is', async (t) => {
  await t.rejects(buildApp({ databaseUrl: 'mssql://a' }), { message: /begins with sqlite:, mysql: or postgresql:/ })
})

t.test('the API wants a key, and one key for one charge', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const charge = (amount: number, headers = {}) =>
    app.inject({ method: 'POST', url: '/charges', headers, payload: { amount, currency: 'EUR' } })
  t.equal(codeOf(await charge(1)), 'FST_IDEMPOTENCY_KEY_MISSING')
  t.equal((await charge(1, { 'idempotency-key': 'a' })).statusCode, 201)
  t.equal(codeOf(await charge(2, { 'idempotency-key': 'a' })), 'FST_IDEMPOTENCY_KEY_REUSED')
  t.same((await app.inject('/balance')).json(), { charges: 1, total: 1, sum: 0 })
})

t.test('a server that is killed in the middle of a charge leaves nothing behind in PostgreSQL', async (t) => {
  const postgres = await startPostgres()
  t.teardown(() => postgres.close())
  const env = { DATABASE_URL: postgres.url }
  const charge = async (url: string, processingMs: number) => {
    const response = await fetch(`${url}/charges`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'idempotency-key': 'k' },
      body: JSON.stringify({ amount: 5, currency: 'EUR', processingMs })
    })
    return response.status
  }
  const pool = postgres.pool()
  const first = await launchExample(t, env)
  const lost = charge(first.url, 10_000)
  lost.catch(() => {})
  const transactions =
    "SELECT FROM pg_stat_activity WHERE state = 'idle in transaction' AND query LIKE 'INSERT INTO example%'"
  await until(async () => (await pool.query(transactions)).rowCount === 1, { timeout: 60_000 })
  first.child.kill('SIGKILL')
  await t.rejects(lost)
  const second = await launchExample(t, env)
  // Nothing is left of the first attempt, its payload included.
  await until(async () => (await charge(second.url, 0)) === 201, { timeout: 60_000 })
  t.equal(await charge(second.url, 0), 201, 'a replay')
  t.same(await (await fetch(`${second.url}/balance`)).json(), { charges: 1, total: 5, sum: 0 })
})
