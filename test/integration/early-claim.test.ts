import { once } from 'node:events'
import { connect } from 'node:net'
import t from 'tap'
import { type Claim, type IdempotencyOptions, type IdempotencyStore, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, inject, listen, post, REPLAYED, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/*
 * An earlier `hook`: duplicates of large uploads are refused before their body is read. What is claimed so early is
 * anybody's, and must cost nobody anything.
 */

const EARLY = ['onRequest', 'preParsing', 'preValidation'] as const
const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }
const config = (options: IdempotencyOptions = {}) => ({ config: { idempotency: options } })

/** A store that tells what it was asked. */
class AskedStore extends MemoryStore {
  readonly claims: Claim[] = []
  override acquire(...[key, claim]: Parameters<IdempotencyStore['acquire']>) {
    this.claims.push({ ...claim })
    return super.acquire(key, claim)
  }
}

/** The head of a request that promises more of a body than ever comes. */
async function withholdBody(t: { teardown(fn: () => unknown): void }, port: number) {
  const socket = connect(port, '127.0.0.1')
  t.teardown(() => socket.destroy())
  socket.write('POST / HTTP/1.1\r\nHost: localhost:80\r\nIdempotency-Key: k\r\n')
  socket.write('Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{')
  return socket
}

t.test('a key is claimed once, in preHandler, unless an earlier hook is wanted', async (t) => {
  for (const hook of [undefined, 'preHandler', ...EARLY] as const) {
    const store = new AskedStore()
    const app = await build(t, { store, ...(hook && { hook }) })
    const seen: number[] = []
    app.post('/', { ...config(), preHandler: async () => void seen.push(store.claims.length) }, async () => 'done')
    t.equal((await app.inject({ ...keyed, payload: {} })).body, 'done')
    const isEarly = hook !== undefined && hook !== 'preHandler'
    t.same([seen, store.claims.length], [[isEarly ? 1 : 0], isEarly ? 2 : 1], `${hook}`)
    const [first, last] = [store.claims[0] as Claim, store.claims.at(-1) as Claim]
    t.equal(first.token, last.token)
    t.ok(last.retainMs > 0 && !last.fingerprint.endsWith('.'), 'the claim under which the handler runs knows all')
    if (isEarly) t.same([first.retainMs, first.takeover], [0, false], 'and what comes before leaves no memory')
    t.equal((await app.inject({ ...keyed, payload: {} })).headers[REPLAYED], 'true')
  }
})

t.test('a body that never comes holds its key for one lease, and leaves nothing behind', async (t) => {
  for (const onAbandoned of ['rerun', 'reject'] as const) {
    const app = await build(t, { hook: 'onRequest', lease: 500, onAbandoned })
    const attempts: unknown[] = []
    app.post('/', config(), async (request) => {
      attempts.push(request.idempotency?.attempt)
      return 'done'
    })
    const port = await listen(app)
    await withholdBody(t, port)
    await until(async () => (await app.idempotency.get('k'))?.state === 'running')
    t.equal(codeOf(await post(port, { key: 'k', body: '{}' })), 'FST_IDEMPOTENCY_IN_PROGRESS')
    await until(async () => (await app.idempotency.get('k')) === null)
    t.equal((await post(port, { key: 'k', body: '{}' })).text, 'done')
    t.same(attempts, [1])
  }
})

t.test('a client that leaves in the middle of its body gives the key back at once', async (t) => {
  const app = await build(t, { hook: 'onRequest' })
  app.post('/', config(), async () => 'done')
  const port = await listen(app)
  const socket = await withholdBody(t, port)
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  socket.destroy()
  await until(async () => (await app.idempotency.get('k')) === null)
  t.equal((await post(port, { key: 'k', body: '{}' })).text, 'done')
})

t.test('whose body comes after others have had the key is a duplicate of theirs', async (t) => {
  const app = await build(t, { hook: 'onRequest', lease: 80 })
  let runs = 0
  app.post('/', config(), async () => ({ run: ++runs }))
  const port = await listen(app)
  const slow = connect(port, '127.0.0.1')
  t.teardown(() => slow.destroy())
  slow.write('POST / HTTP/1.1\r\nHost: localhost:80\r\nIdempotency-Key: k\r\nConnection: close\r\n')
  slow.write('Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{')
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  await until(async () => (await app.idempotency.get('k')) === null)
  t.equal((await post(port, { key: 'k', body: '{}' })).text, '{"run":1}')
  slow.write('}')
  const [data] = await once(slow, 'data')
  t.match(String(data), /idempotent-replayed: true/)
  t.equal(runs, 1)
})

t.test('who has no body to show does not keep a caller from the key of another', async (t) => {
  const app = await build(t, { hook: 'onRequest', lease: 80 })
  app.post('/', config(), async () => 'done')
  const port = await listen(app)
  await withholdBody(t, port)
  await until(async () => (await app.idempotency.get('k'))?.state === 'running')
  const victim = () => post(port, { key: 'k', body: '{}', headers: { authorization: 'Bearer victim' } })
  t.equal((await victim()).status, 422)
  await until(async () => (await victim()).status === 200)
})

t.test('a request that is refused before its handler never lowers attempt', async (t) => {
  for (const hook of ['preHandler', ...EARLY] as const) {
    for (const refusal of ['401', '400', 'left'] as const) {
      const store = new MemoryStore()
      const app = await build(t, { store, hook, lease: 60 })
      const attempts: unknown[] = []
      const entered = latch()
      const goOn = latch()
      app.addHook('preHandler', async (request, reply) => {
        if (request.headers.refuse === '401') return reply.code(401).send('no')
        if (request.headers.refuse !== 'left') return
        entered.open()
        await goOn.promise
      })
      app.post('/', config(), async (request) => {
        attempts.push(request.idempotency?.attempt)
        return 'done'
      })
      const port = await listen(app)
      const fingerprint = await fingerprintOf(port, store)
      const claim = { token: 'dead', fingerprint, leaseMs: 1, retainMs: 60_000, takeover: false }
      await store.acquire(storageKey(null, 'k'), claim)
      await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
      attempts.length = 0
      if (refusal === 'left') {
        const client = start(port, { key: 'k', body: '{}', headers: { refuse: 'left' } })
        await entered.promise
        client.hangUp()
        goOn.open()
      } else {
        const body = refusal === '400' ? '{' : '{}'
        t.equal(String((await post(port, { key: 'k', body, headers: { refuse: refusal } })).status), refusal)
      }
      const found = await app.idempotency.get('k')
      t.match(found, { state: 'abandoned', fingerprint, attempt: 1, ended: undefined }, `${hook}, ${refusal}`)
      t.equal((await post(port, { key: 'k', body: '{}' })).text, 'done')
      t.same(attempts, [2])
    }
  }
})

/** Runs the request once, to learn what is stored of it. */
async function fingerprintOf(port: number, store: MemoryStore): Promise<string> {
  await post(port, { key: 'k', body: '{}' })
  const found = await store.get(storageKey(null, 'k'))
  await store.delete(storageKey(null, 'k'))
  return found?.state === 'completed' ? found.record.fingerprint : ''
}

t.test('a client that leaves while an abandoned key is taken over leaves it as it was', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  const attempts: unknown[] = []
  const [asking, goOn] = [latch(), latch()]
  app.post('/', config(), async (request) => {
    attempts.push(request.idempotency?.attempt)
    return 'done'
  })
  const port = await listen(app)
  const fingerprint = await fingerprintOf(port, store)
  attempts.length = 0
  await store.acquire(storageKey(null, 'k'), {
    token: 'dead',
    fingerprint,
    leaseMs: 1,
    retainMs: 60_000,
    takeover: false
  })
  await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
  const acquire = store.acquire.bind(store)
  store.acquire = async (key, claim) => {
    const found = await acquire(key, claim)
    if (claim.takeover) {
      asking.open()
      await goOn.promise
    }
    return found
  }
  const client = start(port, { key: 'k', body: '{}' })
  await asking.promise
  client.hangUp()
  await until(async () => (await connections(app)) === 0)
  goOn.open()
  await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
  t.match(await app.idempotency.get('k'), { attempt: 1 })
  t.equal((await post(port, { key: 'k', body: '{}' })).text, 'done')
  t.same(attempts, [2])
})

const connections = (app: Awaited<ReturnType<typeof build>>) =>
  new Promise<number>((resolve) => app.server.getConnections((_error, count) => resolve(count)))

t.test('those who come before their bodies never fill a store', async (t) => {
  const store = new MemoryStore({ maxEntries: 10 })
  const app = await build(t, { store, hook: 'onRequest' })
  const [entered, goOn] = [latch(), latch()]
  let waiting = 0
  app.addHook('preHandler', async (request, reply) => {
    if (request.headers.refuse === undefined) return
    if (++waiting === 50) entered.open()
    await goOn.promise
    return reply.code(401).send('no')
  })
  let runs = 0
  app.post('/', config(), async () => ({ run: ++runs }))
  const send = (key: string, headers = {}) =>
    inject(app, { ...keyed, headers: { 'idempotency-key': key, ...headers }, payload: {} })
  const before = await send('before')
  const refused = Array.from({ length: 50 }, (_, n) => send(`refused ${n}`, { refuse: '401' }))
  await entered.promise
  t.equal((await send('before')).body, before.body, 'no stored reply has had to go')
  for (const key of ['a', 'b', 'c']) t.equal((await send(key)).statusCode, 200)
  goOn.open()
  for (const reply of await Promise.all(refused)) t.equal(reply.statusCode, 401)
})

t.test('a store that fails for an early claim is asked again, where a route may run unprotected', async (t) => {
  const store = new MemoryStore()
  const acquire = store.acquire.bind(store)
  let calls = 0
  store.acquire = async (...args) => {
    if (++calls === 1) throw new Error('down')
    return acquire(...args)
  }
  const app = await build(t, { store, hook: 'onRequest', onStoreError: 'bypass' })
  app.post('/', config(), async (request) => ({ attempt: request.idempotency?.attempt }))
  t.same((await app.inject({ ...keyed, payload: {} })).json(), { attempt: 1 })
  t.equal((await app.inject({ ...keyed, payload: {} })).headers[REPLAYED], 'true')
})

t.test('a field in a body that is not parsed is never no key', async (t) => {
  for (const hook of ['preHandler', ...EARLY] as const) {
    const app = await build(t, { field: 'id', hook })
    let runs = 0
    app.addContentTypeParser('application/x-raw', { parseAs: 'buffer' }, (_request, body, done) => done(null, body))
    app.addContentTypeParser('application/x-text', { parseAs: 'string' }, (_request, body, done) => done(null, body))
    app.addContentTypeParser('application/x-stream', (_request, body, done) => done(null, body))
    app.addContentTypeParser('multipart/form-data', (_request, _body, done) => done(null))
    app.post('/', config(), async () => ({ run: ++runs }))
    const send = (type: string, key?: string) =>
      app.inject({
        method: 'POST',
        url: '/',
        headers: { 'content-type': type, ...(key && { 'idempotency-key': key }) },
        payload: '{"id":"evt_1"}'
      })
    for (const type of [
      'application/x-raw',
      'application/x-text',
      'application/x-stream',
      'multipart/form-data; boundary=x'
    ]) {
      const reply = await send(type)
      t.same([reply.statusCode, codeOf(reply)], [500, 'FST_IDEMPOTENCY_KEY_UNREADABLE'], `${type}, ${hook}`)
      t.equal(runs, 0)
      t.equal((await send(type, type)).statusCode, 200, 'with a key in the header nobody has to look')
      runs = 0
    }
    t.same((await send('text/plain')).json(), { run: 1 }, 'text has no fields')
  }
})
