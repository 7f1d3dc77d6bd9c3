// Does not know the package: what another file has loaded before in this process is not to be noticed here.
const fastify = require('fastify')

test('the routes of an application without the package', async () => {
  const app = fastify()
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  expect(await (await fetch(url, { method: 'POST' })).text()).toBe('done')
  await app.close()
})
