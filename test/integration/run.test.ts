import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import t from 'tap'
import { type IdempotencyEvent, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* What is no request runs once for a key as well: queue consumers, cron jobs, stored webhooks. */

const code = (name: string) => ({ code: `FST_IDEMPOTENCY_${name}` })

t.test('a function runs once for a key, and every later call gets its result as JSON', async (t) => {
  const { idempotency } = await build(t)
  let runs = 0
  const run = () => idempotency.run('k', {}, () => ({ run: ++runs, at: new Date(0), gone: undefined }))
  for (const _ of [1, 2, 3]) t.strictSame(await run(), { run: 1, at: '1970-01-01T00:00:00.000Z' })
  t.equal(await idempotency.run('nothing', {}, () => {}), undefined)
  t.equal(await idempotency.run('nothing', {}, () => t.fail()), undefined)
})

t.test('the same key in two scopes is two operations', async (t) => {
  const { idempotency } = await build(t)
  const run = (scope?: string) => idempotency.run('k', scope === undefined ? {} : { scope }, () => scope ?? 'none')
  t.same([await run(), await run('a'), await run('b'), await run()], ['none', 'a', 'b', 'none'])
  t.match(await idempotency.get('k', { scope: 'a' }), { state: 'completed' })
  t.equal(await idempotency.delete('k', { scope: 'a' }), true)
  t.equal(await idempotency.get('k', { scope: 'a' }), null)
})

t.test('another fingerprint under the key is refused; the same by value is not', async (t) => {
  const { idempotency } = await build(t)
  const run = (fingerprint?: unknown) => idempotency.run('k', { fingerprint }, () => 1)
  await run({ a: 1, b: 2 })
  t.equal(await run({ b: 2, a: 1 }), 1)
  await t.rejects(run({ a: 2 }), { ...code('KEY_REUSED'), differs: 'payload' })
  t.equal(await run(), 1)
  await t.rejects(run(Promise.resolve()), code('INVALID_OPTION'))
})

t.test('a key that a request has used is another operation', async (t) => {
  const app = await build(t)
  app.post('/', { config: { idempotency: true } }, async () => 'ok')
  await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
  await t.rejects(
    app.idempotency.run('k', {}, () => t.fail()),
    { ...code('KEY_REUSED'), differs: 'target' }
  )
})

t.test('while it runs, a duplicate is refused, or waits for the result', async (t) => {
  const { idempotency } = await build(t)
  const gate = latch<number>()
  let runs = 0
  const run = (onConflict: 'reject' | 'wait') =>
    idempotency.run('k', { onConflict }, () => {
      runs++
      return gate.promise
    })
  const first = run('reject')
  await until(() => runs === 1)
  const waiting = [run('wait'), run('wait')]
  await t.rejects(run('reject'), { ...code('IN_PROGRESS'), statusCode: 409 })
  gate.open(7)
  t.same(await Promise.all([first, ...waiting]), [7, 7, 7])
  t.equal(runs, 1)
})

t.test('an error is passed on, and the next call runs again, behind the steps that are finished', async (t) => {
  const { idempotency } = await build(t)
  const runs: Record<string, number[]> = { charge: [], mail: [] }
  const run = () =>
    idempotency.run('k', {}, async ({ step, attempt, deriveKey }) => {
      const key = await step('charge', ({ key }) => {
        runs.charge?.push(attempt)
        return key
      })
      t.equal(key, deriveKey('charge'))
      await step('mail', () => {
        runs.mail?.push(attempt)
        if (attempt < 3) throw new Error('no mail')
      })
      return attempt
    })
  for (const _ of [1, 2]) await t.rejects(run(), { message: 'no mail' })
  t.equal(await run(), 3)
  t.equal(await run(), 3)
  t.same(runs, { charge: [1], mail: [1, 2, 3] })
})

t.test('a function that fails without steps leaves nothing behind', async (t) => {
  const { idempotency } = await build(t)
  await t.rejects(
    idempotency.run('k', {}, () => {
      throw new Error('no')
    }),
    { message: 'no' }
  )
  t.equal(await idempotency.get('k'), null)
  t.equal(await idempotency.run('k', {}, ({ attempt }) => attempt), 1)
})

t.test('a result that JSON cannot keep, or is too large, fails every call, and nothing runs again', async (t) => {
  const { idempotency } = await build(t, { maxReplySize: 100 })
  for (const [key, result, message] of [
    ['bigint', { n: 1n }, /its result\.n is a bigint/],
    ['large', 'x'.repeat(99), /its result takes 101 bytes, of 100 allowed/]
  ] as const) {
    let runs = 0
    const run = () =>
      idempotency.run(key, {}, () => {
        runs++
        return result as string
      })
    for (const _ of [1, 2]) await t.rejects(run(), { ...code('STEP'), message })
    t.equal(runs, 1)
  }
})

t.test('the result is kept for a ttl of its own, else for that of the registration', async (t) => {
  const { idempotency } = await build(t, { ttl: 5_000 })
  const ttlOf = async (key: string) => ((await idempotency.get(key)) as { ttlMs: number | null }).ttlMs
  await idempotency.run('default', {}, () => 1)
  await idempotency.run('own', { ttl: 60_000 }, () => 1)
  await idempotency.run('ever', { ttl: null }, () => 1)
  t.ok(((await ttlOf('default')) as number) <= 5_000)
  t.ok(((await ttlOf('own')) as number) > 5_000)
  t.equal(await ttlOf('ever'), null)
})

t.test('what the registration says of a store that fails, and of what was abandoned, holds', async (t) => {
  const store = new MemoryStore()
  const acquire = store.acquire.bind(store)
  store.acquire = () => Promise.reject(new Error('away'))
  const { idempotency: strict } = await build(t, { store })
  await t.rejects(
    strict.run('k', {}, () => t.fail()),
    { ...code('STORE_UNAVAILABLE'), statusCode: 503 }
  )
  const { idempotency: lax } = await build(t, { store, onStoreError: 'bypass' })
  t.equal(await lax.run('k', {}, async ({ attempt, step }) => [attempt, await step('a', () => 1)].join()), '0,1')

  store.acquire = acquire
  const dead = { token: 'dead', fingerprint: '', leaseMs: 1, retainMs: 60_000, takeover: false }
  await store.acquire(storageKey(null, 'dead'), dead)
  await until(async () => (await store.get(storageKey(null, 'dead')))?.state === 'abandoned')
  const { idempotency: wary } = await build(t, { store, onAbandoned: 'reject' })
  await t.rejects(
    wary.run('dead', {}, () => t.fail()),
    code('ABANDONED')
  )
  t.equal(await lax.run('dead', {}, ({ attempt }) => attempt), 2)
})

t.test('what the registration says of headers, hooks and transactions is for requests', async (t) => {
  const { idempotency } = await build(t, { header: false, hook: 'onRequest' })
  t.equal(await idempotency.run('k', {}, () => 1), 1)
})

t.test('what a handler lets through of a run is answered, and not stored', async (t) => {
  const app = await build(t, { shouldStore: () => true, problemDetails: true })
  const gate = latch()
  const started = latch()
  const first = app.idempotency.run('job', { scope: 's' }, () => {
    started.open()
    return gate.promise
  })
  await started.promise
  app.post('/', { config: { idempotency: true } }, async ({ idempotency }) => {
    await app.idempotency.run('job', { scope: 's' }, () => t.fail())
    return idempotency?.attempt
  })
  const request = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }
  const reply = await app.inject(request)
  t.same([reply.statusCode, reply.headers['retry-after']], [409, '1'])
  t.match(reply.headers['content-type'], 'application/problem+json')
  t.equal(reply.json().code, 'FST_IDEMPOTENCY_IN_PROGRESS')
  gate.open()
  await first
  t.equal((await app.inject(request)).body, '1')
})

t.test('its events have no request, and the route "run"', async (t) => {
  const { idempotency } = await build(t)
  const heard: IdempotencyEvent[] = []
  const hear = (message: unknown) => void heard.push(message as IdempotencyEvent)
  for (const name of ['acquired', 'stored', 'replayed']) {
    subscribe(`fastify-idempotency:${name}`, hear)
    t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, hear))
  }
  for (const _ of [1, 2]) await idempotency.run('k', { scope: 's' }, () => 1)
  const key = storageKey('s', 'k')
  t.strictSame(heard, [
    { request: null, key, route: 'run', attempt: 1 },
    { request: null, key, route: 'run', attempt: 1 },
    { request: null, key, route: 'run', attempt: 0 }
  ])
})

t.test('a server that closes waits for it', async (t) => {
  const app = await build(t)
  const gate = latch()
  const started = latch()
  const result = app.idempotency.run('k', {}, async () => {
    started.open()
    await gate.promise
    return 1
  })
  await started.promise
  let isClosed = false
  const closing = app.close().then(() => {
    isClosed = true
  })
  await new Promise(setImmediate)
  t.equal(isClosed, false)
  gate.open()
  await closing
  t.equal(await result, 1)
})

t.test('after the server has closed nothing runs', async (t) => {
  const app = await build(t)
  await app.ready()
  await app.close()
  await t.rejects(
    app.idempotency.run('k', {}, () => t.fail()),
    { ...code('STORE_UNAVAILABLE'), cause: { message: 'The server has closed' } }
  )
})

t.test('bad arguments are named', async (t) => {
  const { idempotency } = await build(t)
  const run = (...args: unknown[]) => idempotency.run(...(args as [string, object, () => void]))
  for (const [args, message] of [
    [['', {}, () => 1], /run\(\) takes a key/],
    [[7, {}, () => 1], /run\(\) takes a key/],
    [['k', {}], /run\(\) takes a key, options and a function/],
    [['k', { ttl: 0 }, () => 1], /option "ttl" of run\(\) takes/],
    [['k', { lease: 1 }, () => 1], /option "lease" of run\(\) is not known; known are ttl, onConflict/]
  ] as const) {
    await t.rejects(run(...args), { ...code('INVALID_OPTION'), message })
  }
})
