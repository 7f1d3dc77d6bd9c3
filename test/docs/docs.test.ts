import { readdirSync, readFileSync } from 'node:fs'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency, { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { type IdempotentFetch, type IdempotentResponse, idempotentFetch } from '../../lib/client.js'
import * as errors from '../../lib/errors.js'
import { withOrigin } from '../../lib/operation/origin.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { OTHERS, RECIPES } from '../readme/snippet.js'
import { build, codeOf, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import type { Given } from './given.js'

/* The pages under docs/ say what is so: their snippets run, their tables are complete, their links lead somewhere. */

type Tap = { teardown(fn: () => unknown): void }

const docs = new URL('../../../docs/', import.meta.url)
const lib = new URL('../lib/', docs)
const page = (name: string) => readFileSync(new URL(name, docs), 'utf8')
const tried = new Set<string>()

async function snippet<T>(name: string, given: Partial<Given> = {}): Promise<T> {
  tried.add(name)
  const { run } = (await import(`./snippets/${name}.js`)) as { run(given: Partial<Given>): Promise<T> }
  return run({ idempotency, ...given })
}

/** A shop behind `fetch`, which loses the first reply; and a way to make it lose others. */
async function shop(t: Tap) {
  const app = await build(t)
  let runs = 0
  for (const path of ['/charges', '/orders', '/orders/1/pay']) {
    app.post(path, { config: { idempotency: { required: true } } }, async (_request, reply) =>
      reply.code(201).send({ run: ++runs })
    )
  }
  app.addContentTypeParser('text/plain', (_request, payload, done) => payload.resume().on('end', () => done(null)))
  const base = await app.listen({ host: '127.0.0.1', port: 0 })
  const { fetch } = globalThis
  const network = { losses: 1, runs: () => runs }
  globalThis.fetch = async (input, init) => {
    const request = new Request(input, init)
    const { pathname } = new URL(request.url)
    const response = await fetch(new Request(`${base}${pathname}`, request as RequestInit))
    if (network.losses-- <= 0) return response
    await response.text()
    throw new TypeError('fetch failed')
  }
  t.teardown(() => {
    globalThis.fetch = fetch
  })
  const send = idempotentFetch({ minDelay: 1, maxAttempts: 2 })
  return { network, send }
}

t.test('plain-fetch: a lost reply is asked for again, with the same key', async (t) => {
  const { network } = await shop(t)
  const { post } = await snippet<{ post(url: string, body: object): Promise<Response> }>('plain-fetch')
  const response = await post('https://api.example.com/charges', { amount: 1 })
  t.same([await response.json(), response.headers.get(REPLAYED), network.runs()], [{ run: 1 }, 'true', 1])
  t.equal((await post('https://api.example.com/charges', { amount: 1 })).headers.get(REPLAYED), null)
})

t.test('plain-fetch: while the first still runs, 409 is asked again; another 409 is the answer', async (t) => {
  const { fetch } = globalThis
  t.teardown(() => {
    globalThis.fetch = fetch
  })
  const { post } = await snippet<{ post(url: string, body: object): Promise<Response> }>('plain-fetch')
  const replies = [
    new Response('<h1>Conflict</h1>', { status: 409, headers: { 'retry-after': '0' } }),
    Response.json({ code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE' }, { status: 409 }),
    Response.json({})
  ]
  globalThis.fetch = async () => replies.shift() as Response
  t.match(await (await post('https://x.example', {})).json(), { code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE' })
  t.equal(replies.length, 1)
})

t.test('plain-fetch: a 500 that is a replay is the answer', async (t) => {
  const { fetch } = globalThis
  t.teardown(() => {
    globalThis.fetch = fetch
  })
  const { post } = await snippet<{ post(url: string, body: object): Promise<Response> }>('plain-fetch')
  const replies = [new Response('no', { status: 500, headers: { [REPLAYED]: 'true' } })]
  globalThis.fetch = async () => replies.shift() ?? Response.json({})
  t.equal((await post('https://x.example', {})).status, 500)
})

t.test('helper: it tells key, attempts and whether it is a replay', async (t) => {
  const { network } = await shop(t)
  const told = await snippet<{ response: IdempotentResponse; charge: object }>('helper')
  t.match(told.response.idempotency, { attempts: 2, replayed: true, key: String })
  t.same([told.charge, network.runs()], [{ run: 1 }, 1])
})

t.test('kept-key: a page that is loaded again goes on with its order, and then begins another', async (t) => {
  const { network, send } = await shop(t)
  const items = new Map<string, string>()
  const sessionStorage = {
    getItem: (name: string) => items.get(name) ?? null,
    setItem: (name: string, value: string) => void items.set(name, value),
    removeItem: (name: string) => void items.delete(name)
  }
  network.losses = 2
  const order = () => snippet<{ response: IdempotentResponse }>('kept-key', { send, sessionStorage })
  await t.rejects(order(), { name: 'IdempotentFetchError' })
  t.equal(items.size, 1)
  t.match((await order()).response.idempotency, { replayed: true })
  t.equal(items.size, 0)
  t.match((await order()).response.idempotency, { replayed: false })
  t.equal(network.runs(), 2)
})

t.test('unknown-outcome: what was not answered is asked for later', async (t) => {
  const { network, send } = await shop(t)
  type Pay = (order: { id: string; key: string }) => ReturnType<IdempotentFetch> | Promise<null>
  const { pay } = await snippet<{ pay: Pay }>('unknown-outcome', { send })
  network.losses = 2
  t.equal(await pay({ id: '1', key: 'k' }), null)
  t.equal((await pay({ id: '1', key: 'k' }))?.idempotency.replayed, true)
  t.equal(network.runs(), 1)
})

t.test('documentation-url: the errors say where they are documented', async (t) => {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await snippet('documentation-url', { app })
  app.post('/', { config: { idempotency: { required: true } } }, async () => 'x')
  const refused = await app.inject({ method: 'POST', url: '/' })
  t.equal(refused.headers.link, '<https://example.com/errors>; rel="describedby"')
  t.match(refused.json(), { type: 'https://example.com/errors', code: 'FST_IDEMPOTENCY_KEY_MISSING' })
})

t.test('run: a message is worked off once, behind the steps that are finished', async (t) => {
  const app = await build(t)
  const done: string[] = []
  const { onMessage } = await snippet<{ onMessage(message: { id: string; order: string }): Promise<void> }>('run', {
    app,
    printLabel: async (order, key) => {
      done.push(`label ${order} ${key}`)
      return 'l'
    },
    sendMail: async (order, label, key) => {
      done.push(`mail ${order} ${label} ${key}`)
      if (done.length === 2) throw new Error('no mail')
    }
  })
  const message = { id: 'm1', order: 'o1' }
  await t.rejects(onMessage(message), { message: 'no mail' })
  for (const _ of [1, 2]) await onMessage(message)
  t.match(done, [/^label o1 /, /^mail o1 l /, /^mail o1 l /])
  t.equal(done.length, 3)
  t.equal(done[1], done[2])
})

t.test('mcp: attempts at a tool call have ids of their own, and the result of the one call', async (t) => {
  const app = await build(t, { global: true })
  app.decorateRequest('account', '')
  app.addHook('onRequest', async (request) => {
    request.account = String(request.headers.authorization)
  })
  const gate = latch()
  const calls: unknown[] = []
  await snippet('mcp', {
    app,
    async callTool({ name, arguments: input }) {
      const call = calls.push(input)
      if (name === 'slow') await gate.promise
      if (name === 'fails' && call % 2 === 1) throw new Error('no network')
      return { content: [{ type: 'text', text: `call ${call}` }] }
    }
  })
  let lastId = 0
  const post = async (name: string, key: unknown, input: object, authorization = 'alice') => {
    const id = ++lastId
    const _meta = key === undefined ? { progressToken: id } : { 'com.example/idempotencyKey': key, progressToken: id }
    const payload = { jsonrpc: '2.0', id, method: 'tools/call', params: { name, arguments: input, _meta } }
    const headers = { authorization, 'idempotency-key': 'of the connection' }
    const reply = (await app.inject({ method: 'POST', url: '/mcp', headers, payload })).json()
    if (reply.statusCode === 500) return reply.message
    t.match(reply, { jsonrpc: '2.0', id }, 'the envelope is that of this attempt')
    return reply.result?.content[0].text ?? reply.error
  }
  t.same([await post('refund', 'k', { a: 1 }), await post('refund', 'k', { a: 1 })], ['call 1', 'call 1'])
  t.match(await post('refund', 'k', { a: 2 }), { code: 422, data: { code: 'FST_IDEMPOTENCY_KEY_REUSED' } })
  t.match(await post('transfer', 'k', { a: 1 }), { code: 422 }, 'another tool')
  t.match(await post('refund', { k: 1 }, { a: 1 }), { code: -32602 })
  t.equal(await post('refund', 'k', { a: 1 }, 'bob'), 'call 2', 'another caller')
  t.same([await post('refund', undefined, {}), await post('refund', undefined, {})], ['call 3', 'call 4'])

  t.same([await post('fails', 'f', {}), await post('fails', 'f', {})], ['no network', 'call 6'], 'what it throws')
  const early = [post('slow', 's', {}), post('slow', 's', {})]
  await until(() => calls.length === 7)
  gate.open()
  t.same(await Promise.all(early), ['call 7', 'call 7'])
  t.equal(calls.length, 7)
})

t.test('support: what became of a request, in words', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store, scope: () => 'alice', maxReplySize: 10 })
  const [entered, leave] = [latch(), latch()]
  app.post('/:what', { config: { idempotency: true } }, async (request, reply) => {
    const { what } = request.params as { what: string }
    if (what === 'runs') {
      entered.open()
      await leave.promise
    }
    return what === 'large' ? 'x'.repeat(11) : reply.code(201).send('x')
  })
  const post = async (what: string) =>
    await app.inject({ method: 'POST', url: `/${what}`, headers: { 'idempotency-key': what } })
  const { lookUp, letRunAgain } = await snippet<{
    lookUp(key: string, scope: string): Promise<string>
    letRunAgain(key: string, scope: string): Promise<boolean>
  }>('support', { app })
  await post('done')
  await post('large')
  const running = post('runs')
  await entered.promise
  const claim = { token: 'dead', fingerprint: '', leaseMs: 1, retainMs: 60_000, takeover: true }
  for (const key of ['dies', 'ends']) await store.acquire(storageKey('alice', key), claim)
  await new Promise((resolve) => setTimeout(resolve, 5))
  await store.acquire(storageKey('alice', 'ends'), { ...claim, token: 'heir' })
  await store.release(storageKey('alice', 'ends'), 'heir')
  t.match(await lookUp('done', 'alice'), /^answered with 201 at \d{4}-/)
  t.match(await lookUp('"done"', 'alice'), /^answered with 201/, 'quotes and all')
  t.match(await lookUp('large', 'alice'), /^carried out by \d{4}-.*: too-large$/)
  t.match(await lookUp('runs', 'alice'), /^attempt 1 runs on \//)
  t.match(await lookUp('dies', 'alice'), /^attempt 1 died/)
  t.match(await lookUp('ends', 'alice'), /^attempt 2 gave it back/)
  t.match(await lookUp('done', 'bob'), /^not known/)
  leave.open()
  await running
  t.equal(codeOf(await post('large')), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
  t.same([await letRunAgain('large', 'alice'), await letRunAgain('large', 'alice')], [true, false])
  t.equal((await post('large')).statusCode, 200)
})

t.test('healthy: a store that is away takes the process out of service', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  await snippet('healthy', { app })
  const ready = async () => (await app.inject({ url: '/ready' })).statusCode
  t.equal(await ready(), 200)
  store.get = () => Promise.reject(new Error('away'))
  t.equal(await ready(), 503)
})

t.test('secrets: the first one of the environment names what comes, and the others what there is', async (t) => {
  t.teardown(() => {
    delete process.env.IDEMPOTENCY_SECRETS
  })
  const [old, young] = ['o'.repeat(43), 'y'.repeat(43)]
  const name = async (secrets: string) => {
    process.env.IDEMPOTENCY_SECRETS = secrets
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => app.close())
    await snippet('secrets', { app })
    return app.idempotency.hash('k')
  }
  t.equal(await name(`${old},${young}`), await name(old))
  t.equal(await name(`${young},${old}`), await name(young))
  t.not(await name(young), await name(old))
  await t.rejects(name(''), { code: 'FST_IDEMPOTENCY_INVALID_OPTION' })
})

t.test('settle: what went through is replied, what did not runs again, what is not known stays', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store, onAbandoned: 'reject', lease: '1h' })
  app.post('/payouts', { config: { idempotency: true } }, async (request) => ({
    attempt: request.idempotency?.attempt
  }))
  const outcomes: Record<string, { done: boolean } | null> = {
    done: { done: true },
    failed: { done: false },
    open: null
  }
  for (const key of Object.keys(outcomes)) {
    const fingerprint = withOrigin('', { startedAt: 0, caller: '', route: '/payouts' })
    await store.acquire(storageKey(null, key), {
      token: key,
      fingerprint,
      leaseMs: 1,
      retainMs: 60_000,
      takeover: false
    })
  }
  await new Promise((resolve) => setTimeout(resolve, 5))
  const askBank = async (operation: string) => {
    const [, outcome = null] = Object.entries(outcomes).find(([key]) => storageKey(null, key) === operation) ?? []
    return outcome
  }
  const { settlePayouts } = await snippet<{ settlePayouts(): Promise<void> }>('settle', { app, askBank })
  await settlePayouts()
  const retry = (key: string) =>
    app.inject({ method: 'POST', url: '/payouts', headers: { 'idempotency-key': key }, payload: {} })
  t.same([(await retry('done')).statusCode, (await retry('done')).json()], [201, { done: true }])
  t.same((await retry('failed')).json(), { attempt: 2 })
  t.equal(codeOf(await retry('open')), 'FST_IDEMPOTENCY_ABANDONED')
})

/** upgrading.md: what a retry meets whose first attempt another version has answered. */
const DEPLOYS: Record<string, [before: IdempotencyOptions, after: IdempotencyOptions, outcome: string]> = {
  'scope is added': [{}, { scope: () => 'alice' }, 'runs again'],
  'scope gives another string': [{ scope: () => 'alice' }, { scope: () => '1' }, 'runs again'],
  'another store': [{}, { store: new MemoryStore() }, 'runs again'],
  'the key is elsewhere': [{}, { header: 'X-Key' }, 'runs again'],
  'the key is elsewhere, and required': [{}, { header: 'X-Key', required: true }, 'FST_IDEMPOTENCY_KEY_MISSING'],
  'another fingerprint function': [{}, { fingerprint: () => 'x' }, 'FST_IDEMPOTENCY_KEY_REUSED'],
  'another path': [{}, {}, 'FST_IDEMPOTENCY_KEY_REUSED'],
  'a stricter keyFormat': [{}, { keyFormat: 'uuid' }, 'FST_IDEMPOTENCY_KEY_INVALID'],
  'a shorter maxKeyLength': [{}, { maxKeyLength: 1 }, 'FST_IDEMPOTENCY_KEY_INVALID'],
  'another ttl and lease': [{}, { ttl: 1, lease: 1 }, 'replayed'],
  'other decisions': [{}, { onConflict: 'wait', onAbandoned: 'reject', shouldStore: () => false }, 'replayed'],
  'a smaller maxReplySize': [{}, { maxReplySize: 1 }, 'replayed']
}

t.test('a deploy changes what the table of upgrading.md says', async (t) => {
  for (const [change, [before, after, outcome]] of Object.entries(DEPLOYS)) {
    const store = new MemoryStore()
    const send = async (options: IdempotencyOptions, url: string) => {
      const app = await build(t, { store, ...options })
      app.post('/*', { config: { idempotency: true } }, async () => 'done')
      return app.inject({ method: 'POST', url, headers: { 'idempotency-key': 'key' }, payload: { a: 1 } })
    }
    await send(before, '/v1')
    const reply = await send(after, change === 'another path' ? '/v2' : '/v1')
    const met = reply.statusCode >= 400 ? codeOf(reply) : reply.headers[REPLAYED] === 'true' ? 'replayed' : 'runs again'
    t.equal(met, outcome, change)
  }
})

t.test('no snippet was left out', async (t) => {
  // Those of other files: transactions.test.ts, orms/whole-request.test.ts, stores/migrating.test.ts, clients.test.ts,
  // conformance.test.ts, deployment.test.ts, testing.test.ts, interop/nest.test.ts, readme/readme.test.ts, readme/recipes.test.ts.
  const elsewhere = /^(?:transactions-|whole-request-|moving$|client-|conform$|stripe-|deployment-|testing-|nest$)/
  const all = readdirSync(new URL('snippets/', import.meta.url))
    .filter((file) => /\.c?js$/.test(file))
    .map((file) => file.replace(/\.c?js$/, ''))
    .filter((name) => !elsewhere.test(name) && !RECIPES.includes(name) && !OTHERS.includes(name))
  t.same([...tried].sort(), all.sort())
})

t.test('errors.md has every code, each with its status, and no other', async (t) => {
  type ErrorClass = new (...args: string[]) => { code?: string; statusCode?: number }
  const documented = [...page('errors.md').matchAll(/^### (FST_\w+)\n\nStatus (\d{3})\b/gm)]
  const classes = Object.values(errors).filter((value) => /^[A-Z]|FastifyError/.test(value.name))
  const made = classes.map((value) => new (value as unknown as ErrorClass)())
  const known = [...made, errors.keyReused('payload')]
    // What says that a store is full is the cause of another one, and has no status.
    .filter(({ code, statusCode }) => code?.startsWith('FST_') && statusCode !== undefined)
    .map(({ code, statusCode }) => `${code} ${statusCode}`)
  t.ok(known.length > 10)
  t.same(documented.map(([, code, status]) => `${code} ${status}`).sort(), known.sort())
  const [about = '', warnings = ''] = page('errors.md').split('\n## Warnings\n')
  t.equal(new Set(about.match(/FST_IDEMPOTENCY_\w+/g)).size, known.length + 1)
  const sources = readdirSync(lib, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))
  const texts = sources.map((file) => readFileSync(new URL(file, lib), 'utf8'))
  const warned = texts.flatMap((text) =>
    [...text.matchAll(/(?:\bwarn\(|\bcode:)\s*'(FST_\w+)'/g)].map(([, code]) => code)
  )
  const listed = [...warnings.matchAll(/^\| `(FST_\w+)` \|/gm)].map(([, code]) => code)
  t.same(listed.sort(), [...new Set(warned)].sort())
})

t.test('each error says what the client is to do, and what the operator', async (t) => {
  for (const section of page('errors.md').split('\n### ').slice(1)) {
    const [code = ''] = section.split('\n')
    t.match(section, /\n- \*\*Client:\*\* /, code)
    t.match(section, /\n- \*\*Operator:\*\* /, code)
  }
})

t.test("clients.md has every code that a client can do something about, with errors.md's status", async (t) => {
  const statuses = new Map(
    [...page('errors.md').matchAll(/^### (FST_\w+)\n\nStatus (\d{3})/gm)].map(([, c, s]) => [c, s])
  )
  const rows = [...page('clients.md').matchAll(/^\| (\d{3}) \| \[`(FST_\w+)`\]/gm)]
  for (const [, status, code = ''] of rows) t.equal(status, statuses.get(code), code)
  // Who settles is no client.
  const isClients = ([code, status]: [unknown, unknown]) => status !== '500' && code !== 'FST_IDEMPOTENCY_SETTLE'
  const below500 = [...statuses].filter(isClients as never).map(([code]) => code)
  t.same(rows.map(([, , code]) => code).sort(), below500.sort())
})

t.test('clients.md has the options of the helper, each with its default', async (t) => {
  const source = readFileSync(new URL('../lib/client/options.ts', docs), 'utf8')
  const [declared = ''] = /interface IdempotentFetchOptions \{[\s\S]*?\n\}/.exec(source) ?? []
  const options = [...declared.matchAll(/\/\*\*([\s\S]*?)\*\/\n {2}(\w+)\?:/g)].map(([, comment = '', name = '']) => {
    return [name, /@default (.*)/.exec(comment)?.[1]?.trim()] as const
  })
  t.ok(options.length > 10)
  const table = page('clients.md')
  const names: string[] = []
  for (const [, first = '', defaults = ''] of table.matchAll(/^\| ((?:`\w+`(?:, )?)+) \|([^|]*)\|/gm)) {
    const values = defaults.split(', ').map((value) => value.trim().replaceAll('`', ''))
    for (const [n, name] of [...first.matchAll(/`(\w+)`/g)].map(([, name = '']) => name).entries()) {
      names.push(name)
      t.equal(values[n] || undefined, options.find(([option]) => option === name)?.[1], name)
    }
  }
  t.same(names.sort(), options.map(([name]) => name).sort())
})
