import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'

// Made before anything of the plugin is loaded, which is why all imports of it are dynamic here.
const tooOld = Fastify()
tooOld.post('/', () => 'old')

const { routesDeclaredOn } = await import('../../lib/early-routes.js')
const { default: idempotency } = await import('../../index.js')

const urls = (instance: FastifyInstance) => routesDeclaredOn(instance).map(({ route }) => route.url)
const handler = () => 'done'

t.test('the routes of an instance and of its children are known, in the order of their declaration', async (t) => {
  const app = Fastify()
  app.post('/first', handler)
  let child!: FastifyInstance
  let grandchild!: FastifyInstance
  await app.register(
    async (instance) => {
      child = instance
      child.put('/child', handler)
      await child.register(async (instance) => {
        grandchild = instance
        grandchild.post('/grandchild', handler)
      })
    },
    { prefix: '/v1' }
  )
  await app.register(async (sibling) => {
    sibling.post('/sibling', handler)
  })
  app.delete('/last', handler)
  t.strictSame(urls(app), ['/first', '/v1/child', '/v1/grandchild', '/sibling', '/last'])
  t.strictSame(urls(child), ['/v1/child', '/v1/grandchild'], 'neither those above nor those beside')
  t.strictSame(urls(grandchild), ['/v1/grandchild'])
  t.equal(routesDeclaredOn(child)[0]?.instance, child)
})

t.test('two servers do not know of each other', async (t) => {
  const one = Fastify()
  const other = Fastify()
  one.post('/one', handler)
  other.post('/other', handler)
  t.strictSame(urls(one), ['/one'])
  t.strictSame(urls(other), ['/other'])
})

t.test('a server that is older than the plugin has no known routes', async (t) => {
  t.strictSame(urls(tooOld), [])
  await tooOld.register(async (child) => {
    t.strictSame(urls(child), [])
  })
})

/** Boots a server that registers the plugin without waiting for it. */
async function boot(options: object, declare: (app: FastifyInstance) => void): Promise<unknown> {
  const app = Fastify()
  app.register(idempotency, options)
  declare(app)
  try {
    await app.ready()
    return null
  } catch (error) {
    return error
  } finally {
    await app.close()
  }
}

const tooEarly = (route: string) => ({
  code: 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY',
  message:
    `${route} was declared before fastify-idempotency had loaded, and would run unprotected: ` +
    'await app.register(idempotency, …) before the routes'
})

t.test('a route that opts in before the plugin has loaded stops the boot, and the error says what to do', async (t) => {
  for (const config of [true, {}, { required: true }]) {
    const error = await boot({}, (app) => app.post('/early', { config: { idempotency: config } }, handler))
    t.match(error, tooEarly('POST /early'))
  }
})

t.test('so does a route that global would cover', async (t) => {
  t.match(await boot({ global: true }, (app) => app.patch('/early', handler)), tooEarly('PATCH /early'))
  const several = { method: ['PUT', 'POST'], url: '/early', handler }
  t.match(await boot({ global: true }, (app) => app.route(several)), tooEarly('PUT|POST /early'))
})

t.test('an early route that the plugin does not cover is no reason to stop', async (t) => {
  t.equal(await boot({}, (app) => app.post('/early', handler)), null)
  t.equal(await boot({ global: true }, (app) => app.get('/early', handler)), null)
  t.equal(await boot({ global: true }, (app) => app.put('/early', handler)), null)
  t.equal(await boot({ global: true }, (app) => app.post('/early', { config: { idempotency: false } }, handler)), null)
})

t.test('routes that are declared after the plugin has loaded are not too early', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency, { global: true })
  app.post('/late', handler)
  app.route({ method: ['GET', 'POST'], url: '/both', config: { idempotency: true }, handler })
  app.register(async (child) => {
    child.post('/child', { config: { idempotency: true } }, handler)
  })
  await t.resolves(async () => app.ready())
})

t.test('a route of a child is too early for the plugin of that child', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.register(async (child) => {
    child.post('/early', { config: { idempotency: true } }, handler)
    await child.register(idempotency)
  })
  await t.rejects(async () => app.ready(), tooEarly('POST /early'))
})

t.test('a route that an outer registration covers is not too early for an inner one', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  app.register(async (child) => {
    child.post('/outer', { config: { idempotency: true } }, handler)
    await child.register(idempotency)
    child.post('/inner', { config: { idempotency: true } }, handler)
  })
  await t.resolves(async () => app.ready())
})
