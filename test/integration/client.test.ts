import t from 'tap'
import { type IdempotencyOptions, MemoryStore } from '../../index.js'
import { IdempotentFetchError, type IdempotentFetchOptions, idempotentFetch } from '../../lib/client.js'
import { build, listen } from '../support/app.js'
import { FAULTS, type Fault, faultProxy } from '../support/fault-proxy.js'
import { latch } from '../support/latch.js'
import { newSeed, Random } from '../support/random.js'

/* The helper for clients and the plugin, with a bad network between them: each operation has one effect. */

type Tap = { teardown(fn: () => unknown): void }
type Charge = { id: number; item: string }

/** So short that nothing has to be waited for, but what the server asks for. */
const quick: IdempotentFetchOptions = { minDelay: 1, maxDelay: 5, maxAttempts: 50 }

/** A server that charges, and a gateway before it that goes through a list of faults. */
async function shop(t: Tap, options: IdempotencyOptions = {}, nextFault: () => Fault | null = () => null) {
  const app = await build(t, options)
  const charges: Charge[] = []
  const received: unknown[] = []
  app.addHook('onRequest', async (request) => void received.push(request.headers['idempotency-key']))
  app.post<{ Body: { item: string } }>(
    '/charges',
    { config: { idempotency: { required: true } } },
    async (request, reply) => {
      const charge = { id: charges.length + 1, item: request.body.item }
      charges.push(charge)
      return reply.code(201).send(charge)
    }
  )
  return { app, charges, received, base: async () => faultProxy(t, await listen(app), nextFault) }
}

/** The faults of a list, one a request, and then none. */
function inTurn(...faults: (Fault | null)[]): () => Fault | null {
  return () => faults.shift() ?? null
}

function charge(item: string): { method: string; headers: Record<string, string>; body: string } {
  return { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ item }) }
}

for (const [fault, [seen, replayed]] of Object.entries({
  'cut-request': [1, false],
  'lose-reply': [2, true],
  'cut-reply': [2, true],
  'bad-gateway': [2, true],
  'gateway-timeout': [2, true],
  unavailable: [1, false]
} satisfies Record<Fault, [number, boolean]>)) {
  t.test(`${fault}: the next attempt has the reply, and there is one effect`, async (t) => {
    const { charges, received, base } = await shop(t, {}, inTurn(fault as Fault))
    const response = await idempotentFetch(quick)(`${await base()}/charges`, charge('a'))
    const { key } = response.idempotency
    t.same([response.status, await response.json()], [201, { id: 1, item: 'a' }])
    t.same(charges, [{ id: 1, item: 'a' }])
    t.same(response.idempotency, { key, attempts: 2, replayed })
    t.same(received, Array(seen).fill(key))
  })
}

t.test('a server that cannot be reached leaves an error with the key, with which the next call goes on', async (t) => {
  const { charges, base } = await shop(t, {}, inTurn('lose-reply', 'cut-request', 'cut-request'))
  const url = `${await base()}/charges`
  const send = idempotentFetch({ ...quick, maxAttempts: 3 })
  const error = await send(url, charge('a')).catch((error: unknown) => error)
  t.ok(error instanceof IdempotentFetchError)
  const { key: idempotencyKey, attempts } = error as IdempotentFetchError
  t.equal(attempts, 3)
  const response = await send(url, { ...charge('a'), idempotencyKey })
  t.same(response.idempotency, { key: idempotencyKey, attempts: 1, replayed: true })
  t.equal(charges.length, 1)
})

t.test('a reply that breaks off on its way to the caller is not lost: the same key gives it again', async (t) => {
  const { charges, base } = await shop(t, {}, inTurn('cut-reply'))
  const url = `${await base()}/charges`
  const send = idempotentFetch({ ...quick, streamReplies: true })
  const response = await send(url, charge('a'))
  await t.rejects(response.json())
  const again = await send(url, { ...charge('a'), idempotencyKey: response.idempotency.key })
  t.same([await again.json(), again.idempotency.replayed, charges.length], [{ id: 1, item: 'a' }, true, 1])
})

t.test('while the store is down there is 503 and no effect; when it is back, there is one', async (t) => {
  const store = new MemoryStore()
  const { acquire } = store
  let refused = 0
  store.acquire = async function (...args) {
    if (++refused <= 1) throw new Error('down')
    return acquire.apply(this, args)
  }
  const { charges, base, received } = await shop(t, { store, storeTimeout: 100 })
  const response = await idempotentFetch(quick)(`${await base()}/charges`, charge('a'))
  t.same([response.status, response.idempotency.attempts, received.length, charges.length], [201, 2, 2, 1])
})

for (const problemDetails of [false, true]) {
  const form = problemDetails ? 'problem details' : "Fastify's own form"
  t.test(`a first request that is still running: 409, in ${form}, and then its reply`, async (t) => {
    const app = await build(t, { problemDetails })
    const [entered, leave] = [latch(), latch()]
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => {
      runs++
      entered.open()
      await leave.promise
      return { done: true }
    })
    const conflicts: Response[] = []
    const shouldRetry = (reply: Response) => {
      if (reply.status === 409) {
        conflicts.push(reply)
        leave.open()
      }
      return undefined
    }
    const url = await app.listen({ host: '127.0.0.1', port: 0 })
    // The first attempt is given up, while the handler goes on.
    const first = new AbortController()
    const send = idempotentFetch({ ...quick, shouldRetry })
    const init = { method: 'POST', idempotencyKey: 'k' }
    const lost = send(url, { ...init, signal: first.signal }).catch((error: Error) => error.name)
    await entered.promise
    first.abort()
    t.equal(await lost, 'AbortError')
    const response = await send(url, init)
    t.same([await response.json(), response.idempotency], [{ done: true }, { key: 'k', attempts: 2, replayed: true }])
    t.equal(runs, 1)
    t.match(conflicts[0]?.headers.get('content-type'), problemDetails ? /problem\+json/ : /^application\/json/)
  })
}

t.test('the connection of a reply that is to be repeated serves the next attempt', async (t) => {
  const app = await build(t)
  let attempts = 0
  app.post('/', async (_request, reply) => {
    if (++attempts === 4) return 'done'
    // A body that comes behind its headers.
    reply.hijack()
    reply.raw.writeHead(503).flushHeaders()
    setTimeout(() => reply.raw.end('later'), 20)
  })
  const connections = new Set()
  app.server.on('connection', (socket) => connections.add(socket))
  const response = await idempotentFetch(quick)(await app.listen({ host: '127.0.0.1', port: 0 }), { method: 'POST' })
  t.same([await response.text(), response.idempotency.attempts, connections.size], ['done', 4, 1])
})

t.test('what is final stays final: a reused key, a reply that could not be kept, a stored 500', async (t) => {
  const app = await build(t, { maxReplySize: 10 })
  let runs = 0
  app.post('/large', { config: { idempotency: true } }, async () => {
    runs++
    return 'x'.repeat(11)
  })
  app.post('/fails', { config: { idempotency: { shouldStore: () => true } } }, async (_request, reply) => {
    runs++
    return reply.code(500).send('no')
  })
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  const send = idempotentFetch(quick)
  const outcome = async (path: string, idempotencyKey: string, body = 'x') => {
    const { status, idempotency } = await send(`${url}${path}`, { method: 'POST', body, idempotencyKey })
    return [status, idempotency.attempts]
  }
  t.same(await outcome('/large', 'a'), [200, 1])
  t.same(await outcome('/large', 'a'), [409, 1])
  t.same(await outcome('/large', 'a', 'y'), [422, 1])
  t.same(await outcome('/large', ' ,'), [422, 1])
  t.same(await outcome('/fails', 'b'), [500, 2], 'the 500 may be worth another attempt, its replay is not')
  t.equal(runs, 2)
})

t.test('the quoted form of a key is the same key', async (t) => {
  const { charges, base } = await shop(t)
  const url = `${await base()}/charges`
  const init = { ...charge('a'), idempotencyKey: 'a"b' }
  await idempotentFetch({ ...quick, quoted: true })(url, init)
  const app = await build(t, { keyFormat: 'structured' })
  app.post('/', { config: { idempotency: true } }, async (request) => request.idempotency?.key)
  const structured = await app.listen({ host: '127.0.0.1', port: 0 })
  const response = await idempotentFetch({ ...quick, quoted: true })(structured, init)
  t.same([response.status, await response.text()], [200, 'a"b'])
  const again = await idempotentFetch(quick)(url, init)
  t.same([again.status, again.idempotency.replayed, charges.length], [201, true, 1])
})

t.test('under random faults, and with a key that several callers share, each operation has one effect', async (t) => {
  const random = new Random(newSeed())
  t.comment(`SEED=${random.seed}`)
  let faults = 0
  const nextFault = () => {
    if (!random.chance(0.5)) return null
    faults++
    return FAULTS[random.between(0, FAULTS.length - 1)] as Fault
  }
  const { charges, base } = await shop(t, { onConflict: 'wait' }, nextFault)
  const url = `${await base()}/charges`
  const send = idempotentFetch(quick)
  const operation = async (n: number) => {
    const init = { ...charge(`item ${n}`), idempotencyKey: `key ${n}` }
    const callers = Array.from({ length: random.between(1, 3) }, () => send(url, init))
    const replies = await Promise.all(callers)
    const bodies = await Promise.all(replies.map((reply) => reply.json()))
    for (const body of bodies) t.match(body, { item: `item ${n}` })
    t.equal(new Set(bodies.map((body) => (body as Charge).id)).size, 1, 'all callers have the same reply')
  }
  await Promise.all(Array.from({ length: 40 }, (_, n) => operation(n)))
  t.same(
    charges.map(({ item }) => item).sort(),
    Array.from({ length: 40 }, (_, n) => `item ${n}`).sort(),
    'one effect each'
  )
  t.ok(faults > 20, `${faults} faults`)
})
