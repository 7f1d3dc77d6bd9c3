import { randomUUID } from 'node:crypto'
import { readdirSync } from 'node:fs'
import http from 'node:http'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { LambdaResponse } from '@fastify/aws-lambda'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { MemoryStore, SqliteStore } from '../../index.js'
import { build, inject, post, REPLAYED, type Reply } from '../support/app.js'
import { until } from '../support/latch.js'
import { launch, makeFolder } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { openSqlite } from '../support/sqlite.js'
import { soon } from '../support/store-fixtures.js'
import type { Given } from './given.js'

/* What docs/deployment.md and docs/serverless.md say, and their snippets; those of NestJS are run by interop/nest-details.test.ts. */

const tried = new Set<string>()

async function snippet<T>(name: string, given: Partial<Given> = {}): Promise<T> {
  tried.add(name)
  const { run } = (await import(`./snippets/deployment-${name}.js`)) as { run(given: Partial<Given>): Promise<T> }
  return run(given)
}

t.test('lambda: callers are told apart by what the authorizer says, and any environment replays', async (t) => {
  const server = await startRedis()
  t.teardown(() => server.close())
  type Handler = (event: object, context: object) => Promise<LambdaResponse>
  const environment = async () => {
    const made = await snippet<{ app: FastifyInstance; handler: Handler }>('lambda', { redis: await server.client() })
    t.teardown(() => made.app.close())
    return async (sub: string) => {
      const event = {
        version: '2.0',
        rawPath: '/charges',
        headers: { host: 'api.example.com', 'idempotency-key': 'k' },
        requestContext: { http: { method: 'POST' }, authorizer: { jwt: { claims: { sub } } } }
      }
      const { statusCode, headers, body } = await made.handler(event, {})
      return { statusCode, replayed: headers[REPLAYED], id: JSON.parse(body).id }
    }
  }
  const [one, other] = [await environment(), await environment()]
  const first = await one('alice')
  t.match(first, { statusCode: 201, replayed: undefined })
  t.same(await other('alice'), { ...first, replayed: 'true' })
  t.match(await other('bob'), { statusCode: 201, replayed: undefined })
})

const folder = makeFolder('deployment')

/** Starts a script of test/support as a process of its own, and waits for it to print something. */
async function start(t: Test, name: string, args: string[]) {
  const script = fileURLToPath(new URL(`../support/${name}.js`, import.meta.url))
  const server = await launch(process.execPath, [script, ...args], { log: join(folder, `${randomUUID()}.log`) })
  t.teardown(() => server.signal('SIGKILL'))
  const prints = (text: RegExp) => until(() => text.exec(server.output()), { message: `${text}` })
  const [, port] = (await prints(/^port (\d+)$/m)) as RegExpExecArray
  return { server, prints, port: Number(port) }
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  t.test(`stop: told by ${signal}, a process ends what runs, stores it, and is gone, keep-alive or not`, async (t) => {
    const file = join(folder, randomUUID())
    const { server, prints, port } = await start(t, 'stopping-server', [file])
    const agent = new http.Agent({ keepAlive: true })
    t.teardown(() => agent.destroy())

    const running = post(port, { key: 'k', agent })
    await prints(/^running/m)
    await post(port, { method: 'GET', agent })
    server.signal(signal)
    const reply = await running
    t.match(reply, { status: 200, text: 'done', headers: { connection: 'close' } })
    await soon(server.exited, 'the process to end')

    const database = openSqlite(file)
    t.teardown(() => database.close())
    const app = await build(t, { store: new SqliteStore({ database }) })
    app.post('/', { config: { idempotency: true } }, async () => 'again')
    const replay = await inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
    t.same([replay.headers[REPLAYED], replay.body], ['true', 'done'])
  })
}

for (const [store, args, runs] of [
  ['one file of SQLite', [join(folder, randomUUID())], 1],
  ['a MemoryStore each', [], 2]
] as const) {
  t.test(`two workers of node:cluster with ${store} run one key ${runs === 1 ? 'once' : 'twice'}`, async (t) => {
    const { port } = await start(t, 'cluster-server', [...args])
    const replies: Reply[] = []
    const workers = () => new Set(replies.map(({ headers }) => headers['x-worker'])).size
    await until(async () => {
      replies.push(await post(port, { key: 'k' }))
      return workers() === 2
    })
    t.equal(replies.filter(({ headers }) => headers[REPLAYED] === undefined).length, runs)
    t.equal(new Set(replies.map(({ text }) => text)).size, runs)
  })
}

t.test('ready: a server whose store does not answer says so, and says when it does again', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  await snippet('ready', { app })
  const ask = async () => (await app.inject('/ready')).statusCode
  t.equal(await ask(), 200)
  const { get } = store
  store.get = () => Promise.reject(new Error('down'))
  t.equal(await ask(), 503)
  store.get = get
  t.equal(await ask(), 200)
})

t.test('no snippet was left out', async (t) => {
  // That one is run by the server that is stopped above.
  tried.add('stop')
  const all = readdirSync(new URL('snippets/', import.meta.url)).flatMap((file) => {
    const [, name] = /^deployment-(?!nest-)(.*)\.js$/.exec(file) ?? []
    return name === undefined ? [] : [name]
  })
  t.same([...tried].sort(), all.sort())
})
