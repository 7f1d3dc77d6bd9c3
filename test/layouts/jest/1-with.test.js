const fastify = require('fastify')
const idempotency = require('fastify-idempotency')
const { storeConformance } = require('fastify-idempotency/testkit')
const { idempotentFetch } = require('fastify-idempotency/client')

const covered = { config: { idempotency: true } }

test('the package loads, and covers its routes', async () => {
  const app = fastify()
  await app.register(idempotency)
  let runs = 0
  app.post('/', covered, async () => ({ run: ++runs }))
  // Not by app.inject(): it needs an ES module (cookie), which Jest cannot require.
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  const post = () => fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key' } })
  expect(await (await post()).json()).toEqual({ run: 1 })
  expect((await post()).headers.get('idempotent-replayed')).toBe('true')
  expect(runs).toBe(1)
  await app.close()
  expect(idempotency.default).toBe(idempotency)
  expect(typeof idempotency.RedisStore).toBe('function')
  expect(storeConformance(() => new idempotency.MemoryStore()).length).toBeGreaterThan(100)
  expect(typeof idempotentFetch()).toBe('function')
})

test('routes without a registration stop the boot', async () => {
  const app = fastify()
  app.post('/', covered, async () => 'done')
  await expect(app.ready()).rejects.toMatchObject({ code: 'FST_IDEMPOTENCY_NOT_COVERED' })
  await app.close()
})
