import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import t, { type Test } from 'tap'
import { type IdempotencyEvent, type IdempotencyOptions, MemoryStore } from '../../index.js'
import { build } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* Every decision is an event: what refuses a request before it has a storage key, and how a claim was lost. */

function listen(t: Test, name: string): IdempotencyEvent[] {
  const seen: IdempotencyEvent[] = []
  const listener = (message: unknown) => seen.push(message as IdempotencyEvent)
  subscribe(`fastify-idempotency:${name}`, listener)
  t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  return seen
}

const refusals: [name: string, options: IdempotencyOptions, headers: Record<string, string>][] = [
  ['KEY_MISSING', { required: true }, {}],
  ['KEY_INVALID', { keyFormat: 'uuid' }, { 'idempotency-key': 'k' }],
  [
    'SCOPE',
    {
      scope: () => {
        throw new Error('nobody')
      }
    },
    { 'idempotency-key': 'k' }
  ],
  ['KEY_UNREADABLE', { field: 'id' }, {}]
]
const type = { 'content-type': 'application/octet-stream' }

for (const [name, options, headers] of refusals) {
  t.test(`a refusal with ${name} is an event, once`, async (t) => {
    const seen = listen(t, 'refused')
    const app = await build(t, options)
    app.addContentTypeParser('application/octet-stream', { parseAs: 'buffer' }, (_request, body, done) =>
      done(null, body)
    )
    app.post('/:id', { config: { idempotency: true } }, async () => 'x')
    const { statusCode } = await app.inject({
      method: 'POST',
      url: '/1',
      headers: { ...type, ...headers },
      payload: Buffer.from('{}')
    })
    t.ok(statusCode >= 400)
    t.match(seen, [{ key: '', route: '/:id', attempt: 0, error: { code: `FST_IDEMPOTENCY_${name}` } }])
    t.equal(seen.length, 1)
    t.equal(seen[0]?.request?.url, '/1')
  })
}

t.test('a claim that was deleted on purpose is lost for that reason', async (t) => {
  const seen = listen(t, 'lease-lost')
  const app = await build(t, { store: new MemoryStore() })
  const hold = latch()
  app.post('/', { config: { idempotency: true } }, () => hold.promise.then(() => 'x'))
  const reply = app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
  await until(() => app.idempotency.get('k'))
  await app.idempotency.delete('k')
  hold.open()
  t.equal((await reply).body, 'x')
  await until(() => seen.length === 1)
  t.equal(seen[0]?.loss, 'deleted')
})
