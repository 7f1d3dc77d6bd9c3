import Fastify, { type FastifyInstance, type FastifyPluginAsync, type FastifyReply, type FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import t, { type Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { warningsOf } from '../support/warnings.js'

// Made before anything of the plugin is loaded, which is why its import is dynamic here.
const tooOld = Array.from({ length: 60 }, () => Fastify())
t.teardown(() => Promise.all(tooOld.map((server) => server.close())))

const { default: idempotency } = await import('../../index.js')

function old(): FastifyInstance {
  const server = tooOld.pop()
  if (server === undefined) throw new Error('There are not enough old servers')
  return server
}

const handler = async () => 'done'
const asking = { config: { idempotency: true } }
const TOO_EARLY = 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY'
const NOT_COVERED = 'FST_IDEMPOTENCY_NOT_COVERED'

type Declare = (app: FastifyInstance) => unknown

/** Boots, and returns the error, or `null`. */
async function bootOf(app: FastifyInstance, declare: Declare): Promise<(Error & { code?: string }) | null> {
  try {
    await declare(app)
    await app.ready()
    return null
  } catch (error) {
    return error as Error
  } finally {
    await app.close()
  }
}

// In both orders everything is the same: the package before the server, or the server before the package.
for (const [order, server] of Object.entries({ 'imported first': () => Fastify(), 'imported late': old })) {
  t.test(order, async (t) => {
    const boot = (declare: Declare) => bootOf(server(), declare)

    /** The boot fails with this code, names these routes, and no others. */
    async function fails(t: Test, declare: Declare, code: string, routes: string[], says?: RegExp): Promise<void> {
      const error = await boot(declare)
      t.equal(error?.code, code)
      const named = error?.message.match(/[A-Z|]+ \/[\w/]*/g) ?? []
      t.strictSame(named.sort(), routes.sort())
      if (says) t.match(error?.message, says)
    }

    const register =
      (options: IdempotencyOptions = {}): Declare =>
      (app) =>
        void app.register(idempotency, options)

    t.test('routes beside a register that nobody waits for are too early, and each is named', async (t) => {
      const says = /await app\.register\(idempotency, …\) before the routes/
      await fails(
        t,
        (app) => {
          app.register(idempotency)
          app.post('/true', asking, handler)
          app.post('/object', { config: { idempotency: { required: true } } }, handler)
          app.route({ method: ['GET', 'PUT'], url: '/several', ...asking, handler })
          app.post('/plain', handler)
          app.post('/out', { config: { idempotency: false } }, handler)
        },
        TOO_EARLY,
        ['POST /true', 'POST /object', 'GET|PUT /several'],
        says
      )
    })

    t.test('so are those that global would cover, and no others', async (t) => {
      await fails(
        t,
        (app) => {
          app.register(idempotency, { global: true })
          app.patch('/early', handler)
          app.route({ method: ['PUT', 'POST'], url: '/both', handler })
          app.get('/get', handler)
          app.put('/put', handler)
          app.post('/out', { config: { idempotency: false } }, handler)
        },
        TOO_EARLY,
        ['PATCH /early', 'PUT|POST /both']
      )
    })

    t.test('routes declared before the register are too early', async (t) => {
      for (const options of [{}, { global: true }]) {
        await fails(
          t,
          async (app) => {
            app.post('/early', asking, handler)
            await app.register(idempotency, options)
            app.post('/late', asking, handler)
          },
          TOO_EARLY,
          ['POST /early']
        )
      }
    })

    t.test('routes/ before plugins/: those of a plugin that loads before are too early', async (t) => {
      await fails(
        t,
        (app) => {
          app.register(async (routes) => {
            routes.post('/orders', asking, handler)
            routes.register(async (nested) => void nested.post('/', asking, handler), { prefix: '/nested' })
          })
          app.register(fp(async (plugins) => void (await plugins.register(idempotency))))
        },
        TOO_EARLY,
        ['POST /orders', 'POST /nested']
      )
    })

    t.test('an instance that is older than the registration declares a route after it', async (t) => {
      await fails(
        t,
        (app) => {
          let older!: FastifyInstance
          app.register(async (child) => {
            older = child
          })
          app.register(idempotency)
          app.after(() => void older.post('/late', asking, handler))
        },
        TOO_EARLY,
        ['POST /late']
      )
    })

    t.test('a route of a child is too early for the registration of that child', async (t) => {
      await fails(
        t,
        (app) => {
          app.register(async (child) => {
            child.post('/early', asking, handler)
            await child.register(idempotency)
          })
        },
        TOO_EARLY,
        ['POST /early']
      )
    })

    t.test('a plugin file without fastify-plugin covers nothing outside of it', async (t) => {
      const says = /no registration .* is in force there.*fastify-plugin/
      for (const options of [{}, { global: true }]) {
        await fails(
          t,
          (app) => {
            app.register(async (plugins) => void (await plugins.register(idempotency, options)))
            app.register(async (routes) => void routes.post('/orders', asking, handler))
            app.get('/get', handler)
          },
          NOT_COVERED,
          ['POST /orders'],
          says
        )
      }
      const global = async (app: FastifyInstance) => {
        app.register(async (plugins) => void (await plugins.register(idempotency, { global: true })))
        app.register(async (routes) => {
          routes.post('/orders', handler)
          routes.put('/put', handler)
          routes.post('/out', { config: { idempotency: false } }, handler)
        })
      }
      await fails(t, global, NOT_COVERED, ['POST /orders'], says)
    })

    t.test('a registration in a sibling context covers nothing here', async (t) => {
      await fails(
        t,
        (app) => {
          app.register(async (one) => {
            await one.register(idempotency)
            one.post('/one', asking, handler)
          })
          app.register(async (other) => {
            other.post('/other', asking, handler)
            other.register(async (nested) => void nested.post('/nested', asking, handler))
          })
          app.post('/root', asking, handler)
        },
        NOT_COVERED,
        ['POST /other', 'POST /nested', 'POST /root']
      )
    })

    t.test('a child does not run under the options of its parent because it registers its own too late', async (t) => {
      const says = /in their own context.*options of an outer one/
      for (const outer of [{}, { global: true }]) {
        await fails(
          t,
          async (app) => {
            await app.register(idempotency, outer)
            app.register(async (child) => {
              child.post('/early', asking, handler)
              child.register(async (nested) => void nested.post('/nested', asking, handler))
              await child.register(idempotency, { required: true })
              child.post('/inner', asking, handler)
            })
            app.post('/outer', asking, handler)
          },
          NOT_COVERED,
          ['POST /early', 'POST /nested'],
          says
        )
      }
    })

    t.test('all that is wrong is told at once', async (t) => {
      await fails(
        t,
        (app) => {
          app.register(async (child) => {
            child.post('/early', asking, handler)
            await child.register(idempotency)
          })
          app.register(async (other) => void other.post('/other', asking, handler))
        },
        TOO_EARLY,
        ['POST /early', 'POST /other']
      )
    })

    t.test('the HEAD twin of a route is not named beside it, and no reason to stop by itself', async (t) => {
      for (const prefix of ['', '/v1']) {
        const both = (app: FastifyInstance) =>
          app.route({ method: ['GET', 'POST'], url: '/', config: { idempotency: true }, handler })
        const early = async (app: FastifyInstance) => {
          app.register(async (child) => void both(child), { prefix })
          app.register(idempotency)
        }
        await fails(t, early, TOO_EARLY, [`GET|POST ${prefix || '/'}`])
        const inTime = async (app: FastifyInstance) => {
          await app.register(idempotency)
          app.register(async (child) => void both(child), { prefix })
        }
        t.equal(await boot(inTime), null)
      }
    })

    t.test('where all is in its place, nothing stops the boot', async (t) => {
      const layouts: Record<string, Declare> = {
        'no registration, and nobody asks': (app) => {
          app.post('/plain', handler)
          app.post('/out', { config: { idempotency: false } }, handler)
        },
        awaited: async (app) => {
          app.get('/health', handler)
          app.post('/out', { config: { idempotency: false } }, handler)
          await app.register(idempotency, { global: true })
          app.post('/root', handler)
          app.all('/all', asking, handler)
          app.post('/v', { constraints: { version: '1.0.0' }, ...asking }, handler)
          app.post('/v', { constraints: { version: '2.0.0' }, ...asking }, handler)
          app.post('/host', { constraints: { host: /^api\./ }, ...asking }, handler)
          app.register(
            async (child) => {
              child.post('/', handler)
              child.register(async (nested) => void nested.post('/nested', handler), { prefix: '/deep' })
            },
            { prefix: '/v1' }
          )
        },
        'routes in plugins that load later': (app) => {
          app.register(idempotency)
          app.register(async (child) => void child.post('/child', asking, handler))
        },
        'nested registrations, each before its routes': (app) => {
          app.register(idempotency)
          app.register(async (child) => {
            await child.register(idempotency)
            child.post('/inner', asking, handler)
            child.register(async (nested) => {
              await nested.register(idempotency)
              nested.post('/innermost', asking, handler)
            })
          })
          app.register(async (child) => void child.post('/outer', asking, handler))
        },
        'the outer one after the inner one': (app) => {
          app.register(async (child) => {
            await child.register(idempotency)
            child.post('/inner', asking, handler)
          })
          app.register(idempotency)
        },
        'global in a context of its own, beside others': (app) => {
          app.post('/outside', handler)
          app.register(async (child) => {
            await child.register(idempotency, { global: true })
            child.get('/inside', handler)
          })
        },
        'a registration without any route': register({ global: true }),
        "a route of another plugin's onRoute hook": async (app) => {
          await app.register(idempotency, { global: true })
          app.addHook('onRoute', (route) => {
            if (route.url === '/a') app.post('/added', { config: { idempotency: true } }, handler)
          })
          app.post('/a', handler)
        },
        'what another onRoute hook changes behind ours': async (app) => {
          await app.register(idempotency, { global: true })
          app.addHook('onRoute', (route) => {
            route.url = `/moved${route.url}`
            route.constraints = { version: '1.0.0' }
          })
          app.post('/a', handler)
        },
        'what another onRoute hook changes before ours': async (app) => {
          app.addHook('onRoute', (route) => {
            route.url = `/moved${route.url}`
          })
          await app.register(idempotency, { global: true })
          app.post('/a', handler)
        }
      }
      for (const [what, declare] of Object.entries(layouts)) t.equal(await boot(declare), null, what)
    })

    t.test('a route that another onRoute hook opts in is covered, or stops the boot', async (t) => {
      const optIn: FastifyPluginAsync = fp(async (app) => {
        app.addHook('onRoute', (route) => {
          if (route.method === 'POST') route.config = { ...route.config, idempotency: true }
        })
      })
      await fails(
        t,
        async (app) => {
          await app.register(optIn)
          app.post('/early', handler)
          await app.register(idempotency)
          app.post('/late', handler)
        },
        TOO_EARLY,
        ['POST /early']
      )
    })

    t.test('a config that is set when the registration has seen the route stops the boot', async (t) => {
      const says = /set after the registration .* had seen it.*add the onRoute hook that sets it before/s
      const replace = (route: { config?: object }, value: unknown) => {
        route.config = { ...route.config, idempotency: value }
      }
      const mutate = (route: { config?: { idempotency?: unknown } }, value: unknown) => {
        if (route.config !== undefined) route.config.idempotency = value
      }
      for (const set of [replace, mutate] as ((route: object, value: unknown) => void)[]) {
        for (const value of [true, { required: true }]) {
          const declare: Declare = async (app) => {
            await app.register(idempotency)
            app.addHook('onRoute', (route) => {
              if (/late/.test(route.url) && route.method !== 'HEAD') set(route, value)
            })
            app.post('/late', { config: {} }, handler)
            app.post('/out/late', { config: { idempotency: false } }, handler)
            app.route({ method: ['GET', 'PUT'], url: '/both/late', config: {}, handler })
            app.register(async (child) => void child.post('/', { config: {} }, handler), { prefix: '/nested/late' })
            app.post('/plain', { config: {} }, handler)
          }
          const named = ['POST /late', 'POST /out/late', 'GET|PUT /both/late', 'POST /nested/late']
          await fails(t, declare, NOT_COVERED, named, says)
        }
      }
      const afterwards = async (app: FastifyInstance) => {
        await app.register(idempotency)
        const config: { idempotency?: boolean } = {}
        app.post('/late', { config }, handler)
        config.idempotency = true
      }
      await fails(t, afterwards, NOT_COVERED, ['POST /late'], says)
    })

    t.test(
      'so does one that global covers then, or one that is invalid; of a covered route the first one counts',
      async (t) => {
        const hooked =
          (
            options: IdempotencyOptions,
            hook: (route: { config?: object; method: string | string[] }) => void
          ): Declare =>
          async (app) => {
            await app.register(idempotency, options)
            app.addHook('onRoute', hook)
            app.post('/a', asking, handler)
            app.put('/b', handler)
          }
        const stricter = hooked({}, (route) => {
          if (route.method === 'POST') route.config = { idempotency: { required: true } }
        })
        t.equal(await boot(stricter), null, 'the options of a covered route are those that it was declared with')
        const methods = hooked({ global: true }, (route) => {
          if (route.method === 'PUT') route.method = ['PUT', 'PATCH']
        })
        await fails(t, methods, NOT_COVERED, ['PUT|PATCH /b'])
        const invalid = hooked({}, (route) => {
          if (route.method === 'PUT') route.config = { idempotency: { requird: true } }
        })
        await fails(t, invalid, 'FST_IDEMPOTENCY_INVALID_OPTION', ['PUT /b'])
        const same = hooked({ keyFormat: /x/, excludeHeaders: ['a'] }, (route) => {
          if (route.method === 'POST') route.config = { idempotency: { onConflict: 'reject' } }
        })
        t.equal(await boot(same), null, 'what makes no difference stops nothing')
        const out = hooked({}, (route) => {
          route.config = { idempotency: false }
        })
        t.equal(await boot(out), null, 'who is covered all the same has what is asked for')
      }
    )

    t.test('a hook that sets a config before the registration is heard', async (t) => {
      const app = server()
      t.teardown(() => app.close())
      app.addHook('onRoute', (route) => {
        if (route.method === 'POST') route.config = { ...route.config, idempotency: { required: true } }
      })
      await app.register(idempotency)
      app.post('/', handler)
      t.equal((await app.inject({ method: 'POST', url: '/' })).json().code, 'FST_IDEMPOTENCY_KEY_MISSING')
    })

    t.test('methods that the server does not have stop the boot, and those of addHttpMethod do not', async (t) => {
      const error = await boot(register({ global: true, methods: ['POTS'] }))
      t.equal(error?.code, 'FST_IDEMPOTENCY_INVALID_OPTION')
      t.match(error?.message, /^option "methods" takes .*DELETE, PATCH, POST, PUT.*got \[ 'POTS' \]/)
      const custom = async (app: FastifyInstance) => {
        app.addHttpMethod('MKCOL')
        await app.register(idempotency, { global: true, methods: ['mkcol'] })
      }
      t.equal(await boot(custom), null)
    })

    t.test('an option beside config that should be in it is told, with the right name and the routes', async (t) => {
      for (const name of ['idempotency', 'idempotent', 'idempotencyKey']) {
        const path = `/${order.replace(' ', '/')}/beside/${name}`
        const beside = { [name]: true }
        const told = await warningsOf('FST_IDEMPOTENCY_CONFIG_NAME', async () => {
          const error = await boot(async (app) => {
            await app.register(idempotency)
            app.post(path, beside, handler)
            app.put(path, { ...beside, config: {} }, handler)
            app.get(path, beside, handler)
            app.post('/right', { ...beside, ...asking }, handler)
          })
          t.equal(error, null)
        })
        t.equal(told.length, 1, name)
        t.match(told[0], `"${name}" beside config of POST ${path}, PUT ${path}, GET ${path} is not known`)
        t.match(told[0], 'the name is config.idempotency')
      }
    })

    t.test('two registrations on one instance: the error says what to do instead', async (t) => {
      const error = await boot((app) => {
        app.register(idempotency)
        app.register(idempotency)
      })
      t.equal(error?.code, 'FST_IDEMPOTENCY_ALREADY_REGISTERED')
      t.match(error?.message, /config\.idempotency.*plugin of their own/)
    })

    t.test('a config name that comes close is told, with the right one and the routes', async (t) => {
      for (const name of ['idempotent', 'Idempotency', 'idempotencyKey', 'idempotency_key', 'idempotancy']) {
        const config = { [name]: true }
        const routes = [`/${order.replace(' ', '/')}/${name}/a`, `/${order.replace(' ', '/')}/${name}/b`] as const
        const told = await warningsOf('FST_IDEMPOTENCY_CONFIG_NAME', async () => {
          const error = await boot(async (app) => {
            await app.register(idempotency)
            for (const route of routes) app.post(route, { config }, handler)
            app.post('/right', { config: { idempotency: true, ...config } }, handler)
          })
          t.equal(error, null)
        })
        t.equal(told.length, 1, name)
        t.match(told[0], `config.${name} of POST ${routes[0]}, POST ${routes[1]} is not known`)
        t.match(told[0], 'the name is config.idempotency')
      }
      const told = await warningsOf('FST_IDEMPOTENCY_CONFIG_NAME', async () => {
        await boot(async (app) => {
          await app.register(idempotency)
          app.post('/', { config: { rateLimit: {}, independent: true, identity: 1, dependency: 2 } }, handler)
        })
      })
      t.strictSame(told, [])
    })
  })
}

t.test('a plugin that is imported and never registered stops the boot where routes ask for it', async (t) => {
  const error = await bootOf(Fastify(), (app) => {
    app.post('/root', asking, handler)
    app.register(async (child) => void child.post('/child', { config: { idempotency: { required: true } } }, handler))
    app.post('/plain', handler)
  })
  t.equal(error?.code, NOT_COVERED)
  t.match(error?.message, /^POST \/root, POST \/child are to be idempotent/)
})

t.test('another copy of the package looks after its own routes', async (t) => {
  const app = Fastify()
  const theirs = Symbol.for('fastify-idempotency.registration') as unknown as 'theirs'
  const error = await bootOf(app, (app) => {
    app.decorate(theirs, { version: 'another' })
    app.post('/', asking, handler)
  })
  t.equal(error, null)
  const both = await bootOf(Fastify(), async (app) => {
    app.decorate(theirs, { version: 'another' })
    await app.register(idempotency)
  })
  t.equal(both?.code, 'FST_IDEMPOTENCY_ALREADY_REGISTERED')
})

t.test('a server that cannot get ready does not listen, and answers no inject', async (t) => {
  const app = () => {
    const app = Fastify()
    t.teardown(() => app.close())
    app.post('/', asking, handler)
    return app
  }
  await t.rejects(app().listen({ port: 0 }), { code: NOT_COVERED })
  await t.rejects(async () => await app().inject({ method: 'POST', url: '/' }), { code: NOT_COVERED })
})

t.test('one server that forgot the plugin is no reason for another not to start', async (t) => {
  const [right, wrong, without] = [Fastify(), Fastify(), Fastify()]
  t.teardown(() => Promise.all([right.close(), wrong.close(), without.close()]))
  await right.register(idempotency)
  for (const app of [right, wrong]) app.post('/', asking, handler)
  without.post('/', handler)
  await t.resolves(async () => right.ready())
  await t.resolves(async () => without.ready())
  await t.rejects(async () => wrong.ready(), { code: NOT_COVERED })
})

t.test('where routes cannot be seen, a warning shows them all', async (t) => {
  const told = await warningsOf('FST_IDEMPOTENCY_UNSEEN_ROUTES', async () => {
    const error = await bootOf(old(), (app) => {
      const { printRoutes } = app
      app.printRoutes = ({ commonPrefix }: { commonPrefix?: boolean } = {}) =>
        printRoutes.call(app, commonPrefix === undefined ? {} : { commonPrefix })
      app.post('/unseen', asking, handler)
      app.register(idempotency)
    })
    t.equal(error, null)
  })
  t.equal(told.length, 1)
  t.match(told[0], /Import it before Fastify\(\).*\/unseen \(POST\)/s)
})

t.test('a handler that an onRoute hook behind the plugin puts in the place of another is warned of', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  app.addHook('onRoute', (route) => {
    if (route.url === '/replaced') route.handler = async () => 'another'
  })
  for (const url of ['/replaced', '/kept']) app.post(url, asking, handler)
  const preHandler = async (_request: FastifyRequest, reply: FastifyReply) => reply.code(401).send('no')
  app.post('/refused', { ...asking, preHandler }, handler)
  app.post('/given-back', { config: { idempotency: { hook: 'onRequest' } }, preHandler }, handler)
  for (const url of ['/replaced', '/kept', '/refused', '/given-back']) {
    const told = await warningsOf('FST_IDEMPOTENCY_HANDLER', async () => {
      for (let n = 0; n < 2; n++) await app.inject({ method: 'POST', url, headers: { 'idempotency-key': url } })
    })
    t.equal(told.length, url === '/replaced' ? 1 : 0, url)
  }
})
