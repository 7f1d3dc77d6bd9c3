import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'

// Made before anything of the plugin is loaded, which is why all imports of it are dynamic here.
const tooOld = Array.from({ length: 30 }, () => Fastify())
/** A server that is older than the plugin, as in an application that requires it where it registers it. */
const old = () => {
  const server = tooOld.pop()
  if (server === undefined) throw new Error('There are not enough old servers')
  return server
}
t.teardown(() => Promise.all(tooOld.map((server) => server.close())))

const { declaredRoutes, isAnnounced, serverOf } = await import('../../lib/routes/early-routes.js')
await import('../../index.js')

/** Both kinds of servers: what can be seen of them is the same. */
const servers = { 'a server that is younger than the plugin': () => Fastify(), 'one that is older': old }

const handler = () => 'done'
const covered = { config: { idempotency: true } }

for (const [what, server] of Object.entries(servers)) {
  t.test(`all routes of ${what} are known, with their instances`, async (t) => {
    const app = server()
    t.teardown(() => app.close())
    t.strictSame(declaredRoutes(app), [])
    app.post('/first', covered, handler)
    let child!: FastifyInstance
    let grandchild!: FastifyInstance
    await app.register(
      async (instance) => {
        child = instance
        child.put('/', handler)
        await child.register(async (instance) => {
          grandchild = instance
          grandchild.route({ method: ['DELETE', 'POST'], url: '/grandchild', handler })
        })
      },
      { prefix: '/v1' }
    )
    app.post('/first', { constraints: { version: '2.0.0' } }, handler)
    const routes = declaredRoutes(app) ?? []
    t.strictSame(
      new Set(routes.map(({ method, url }) => `${method} ${url}`)),
      new Set(['POST /first', 'PUT /v1', 'DELETE,POST /v1/grandchild'])
    )
    const on = (instance: FastifyInstance) => [
      ...new Set(routes.filter((route) => route.instance === instance).map(({ url }) => url))
    ]
    t.strictSame([on(app), on(child), on(grandchild)], [['/first'], ['/v1'], ['/v1/grandchild']])
    t.equal(isAnnounced(app), server !== old)
    t.match(routes[0], { url: '/first', config: { idempotency: true } })
    t.strictSame([serverOf(app), serverOf(child), serverOf(grandchild)], [app, app, app])
  })

  t.test(`two servers do not know of each other: ${what}`, async (t) => {
    const [one, other] = [server(), server()]
    t.teardown(() => Promise.all([one.close(), other.close()]))
    one.post('/one', handler)
    other.post('/other', handler)
    t.match(declaredRoutes(one), [{ url: '/one' }])
    t.match(declaredRoutes(other), [{ url: '/other' }])
  })
}

t.test('where Fastify does not let routes be seen, that is told', async (t) => {
  const app = old()
  t.teardown(() => app.close())
  app.post('/', handler)
  const { printRoutes } = app
  app.printRoutes = ({ commonPrefix }: object & { commonPrefix?: boolean } = {}) =>
    printRoutes.call(app, { commonPrefix: commonPrefix ?? true })
  t.equal(declaredRoutes(app), null)
  app.printRoutes = () => {
    throw new Error('not printable')
  }
  t.equal(declaredRoutes(app), null)
})
