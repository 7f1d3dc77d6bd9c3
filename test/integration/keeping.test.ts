import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { type IdempotencyOptions, MemoryStore, type StoredReply } from '../../index.js'
import { build } from '../support/app.js'

/* For how long a reply is kept, and what of it. */

const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }
const refusal = { code: 'FST_IDEMPOTENCY_INVALID_OPTION' }

async function ttlOf(t: Test, options: IdempotencyOptions, keep?: (keepFor: (duration: never) => void) => void) {
  const app = await build(t, options)
  app.post('/', { config: { idempotency: true } }, async (request) => {
    const { keepFor } = request.idempotency ?? {}
    keep?.(keepFor as never)
    return 'x'
  })
  const { statusCode } = await app.inject(keyed)
  t.equal(statusCode, 200)
  return ((await app.idempotency.get('k')) as { ttlMs: number | null } | null)?.ttlMs
}

/** What is left of a time that has just begun. */
function isAbout(t: Test, left: number | null | undefined, whole: number): void {
  t.ok(typeof left === 'number' && left <= whole && left > whole - 60_000, `${left} of ${whole}`)
}

t.test('durations are milliseconds, or texts', async (t) => {
  isAbout(t, await ttlOf(t, { ttl: '48h' }), 172_800_000)
  isAbout(t, await ttlOf(t, { ttl: '2 days' }), 172_800_000)
  isAbout(t, await ttlOf(t, { ttl: 7_200_000 }), 7_200_000)
})

t.test('a reply can be kept for a time of its own', async (t) => {
  isAbout(t, await ttlOf(t, { ttl: '1h' }, (keepFor) => keepFor('30 days' as never)), 2_592_000_000)
  isAbout(t, await ttlOf(t, {}, (keepFor) => keepFor(7_200_000 as never)), 7_200_000)
  t.equal(await ttlOf(t, {}, (keepFor) => keepFor(null as never)), null)
})

t.test('what is no duration is refused to the handler', async (t) => {
  for (const duration of [0, -1, 1.5, 'soon', '', undefined, true]) {
    await ttlOf(t, {}, (keepFor) => t.throws(() => keepFor(duration as never), refusal))
  }
})

t.test('a result of run can be kept for a time of its own', async (t) => {
  const { idempotency } = await build(t)
  await idempotency.run('k', {}, ({ keepFor }) => keepFor('2h'))
  isAbout(t, ((await idempotency.get('k')) as { ttlMs: number }).ttlMs, 7_200_000)
})

/** The replies to two requests with the same key. */
async function twice(t: Test, redact: IdempotencyOptions['redact'], handler?: () => unknown) {
  const store = new MemoryStore()
  const app = await build(t, { store, ...(redact && { redact }) })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    runs++
    return handler?.() ?? reply.header('x-secret', 'pan').send({ card: '4242', id: 7 })
  })
  const replies = [await app.inject(keyed), await app.inject(keyed)] as const
  t.equal(runs, 1)
  return replies
}

t.test('what is redacted is not stored: the first client gets it, and no retry', async (t) => {
  const [first, replay] = await twice(t, (reply) => ({
    ...reply,
    headers: reply.headers.filter(([name]) => name !== 'x-secret'),
    body: Buffer.from(JSON.stringify({ ...JSON.parse(reply.body.toString()), card: '****' }))
  }))
  t.same([first.json(), first.headers['x-secret']], [{ card: '4242', id: 7 }, 'pan'])
  t.same([replay.json(), replay.headers['x-secret']], [{ card: '****', id: 7 }, undefined])
  t.equal(replay.headers['idempotent-replayed'], 'true')
})

t.test('redact may change its copy, and not the reply that is being sent', async (t) => {
  const bytes = Buffer.from('4242')
  const [first, replay] = await twice(
    t,
    (reply) => {
      reply.body.fill('*')
      return reply
    },
    () => bytes
  )
  t.same([first.body, replay.body], ['4242', '****'])
})

t.test('a text is a body, too', async (t) => {
  const [, replay] = await twice(t, (reply) => ({ ...reply, body: 'gone' as never }))
  t.equal(replay.body, 'gone')
})

t.test('where redact fails, or gives no reply, nothing is kept but that the handler has run', async (t) => {
  const failing: ((reply: StoredReply) => unknown)[] = [
    () => {
      throw new Error('broken')
    },
    () => undefined,
    () => Promise.resolve(),
    (reply) => ({ ...reply, statusCode: 0 }),
    (reply) => ({ ...reply, body: undefined }),
    (reply) => ({ ...reply, headers: [['a b', 'x']] })
  ]
  for (const redact of failing) {
    const [first, retry] = await twice(t, redact as never)
    t.equal(first.statusCode, 200)
    t.match(retry.json(), { statusCode: 409, code: 'FST_IDEMPOTENCY_NOT_REPLAYABLE' })
  }
})

t.test('a short life ends', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async (request) => {
    request.idempotency?.keepFor(1)
    return String(++runs)
  })
  await app.inject(keyed)
  await sleep(5)
  t.equal((await app.inject(keyed)).body, '2')
})
