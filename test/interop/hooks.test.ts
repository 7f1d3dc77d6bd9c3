import { Readable } from 'node:stream'
import Fastify, { type FastifyInstance, type FastifyReply } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type StoredReply } from '../../index.js'
import { isReplay, orders, post, register } from './kit.js'

const config = { idempotency: true }

async function bodyOf(app: FastifyInstance, key: string): Promise<string> {
  return ((await app.idempotency.get(key)) as { record: StoredReply }).record.body.toString()
}

async function empty(t: Test): Promise<FastifyInstance> {
  const app = Fastify()
  t.teardown(() => app.close())
  return app
}

/** Puts the payload in an envelope, whatever it is. */
const envelope = (name: string, payload: unknown) => `<${name}>${payload ?? ''}</${name}>`

const handlers: Record<string, { handler: () => unknown; inner: string }> = {
  text: { handler: () => 'text', inner: 'text' },
  object: { handler: () => ({ a: 1 }), inner: '{"a":1}' },
  nothing: { handler: () => '', inner: '' }
}

for (const order of orders) {
  for (const style of ['async', 'callback'] as const) {
    t.test(`with an ${style} onSend hook of the instance, and the plugin registered ${order} it`, async (t) => {
      for (const [name, { handler, inner }] of Object.entries(handlers)) {
        t.test(`a reply of ${name} that the hook wraps is not wrapped twice on a replay`, async (t) => {
          const app = await empty(t)
          let called = 0
          await register(
            order,
            () => app.register(idempotency),
            async () => {
              if (style === 'async') {
                app.addHook('onSend', async (_request, reply, payload) => {
                  called++
                  reply.header('x-wrapped', String(called)).type('application/xml')
                  return envelope('reply', payload)
                })
              } else {
                app.addHook('onSend', (_request, reply, payload, done) => {
                  called++
                  reply.header('x-wrapped', String(called)).type('application/xml')
                  done(null, envelope('reply', payload))
                })
              }
            }
          )
          let runs = 0
          app.post('/', { config }, async () => {
            runs++
            return handler()
          })
          const first = await post(app, { key: 'key' })
          t.equal(first.body, `<reply>${inner}</reply>`)
          t.equal(await bodyOf(app, 'key'), first.body, 'the store has what the instance made of it')
          for (let i = 0; i < 2; i++) {
            const retry = await post(app, { key: 'key' })
            t.ok(isReplay(retry))
            t.equal(retry.body, first.body)
            t.equal(retry.headers['content-length'], String(Buffer.byteLength(first.body)))
            t.equal(retry.headers['content-type'], first.headers['content-type'])
          }
          t.equal(runs, 1)
        })
      }
    })
  }

  t.test(`with an onSend hook of the instance that replaces streams, registered ${order} it`, async (t) => {
    const app = await empty(t)
    await register(
      order,
      () => app.register(idempotency),
      async () => {
        app.addHook('onSend', async (_request, _reply, payload) => {
          const parts: string[] = ['<']
          if (payload instanceof Readable) for await (const chunk of payload) parts.push(String(chunk))
          else parts.push(String(payload))
          return Readable.from([...parts, '>'])
        })
      }
    )
    app.post('/', { config }, async (_request, reply) => {
      reply.type('text/plain')
      return Readable.from(['one', 'two'])
    })
    t.equal((await post(app, { key: 'key' })).body, '<onetwo>')
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.body, '<onetwo>')
  })
}

t.test('an onSend hook that a parent adds late is one of the instance all the same', async (t) => {
  const app = await empty(t)
  await app.register(idempotency)
  let runs = 0
  await app.register(async (child) => {
    child.post('/', { config }, async () => String(++runs))
  })
  app.after(() => {
    app.addHook('onSend', async (_request, _reply, payload) => envelope('late', payload))
  })
  t.equal((await post(app, { key: 'key' })).body, '<late>1</late>')
  const retry = await post(app, { key: 'key' })
  t.ok(isReplay(retry))
  t.equal(retry.body, '<late>1</late>')
})

t.test('onSend hooks of a parent and of a child are applied once, in their order', async (t) => {
  const app = await empty(t)
  app.addHook('onSend', async (_request, _reply, payload) => envelope('parent', payload))
  await app.register(async (child) => {
    child.addHook('onSend', async (_request, _reply, payload) => envelope('child', payload))
    await child.register(idempotency)
    child.post('/', { config }, async () => 'text')
  })
  const expected = '<child><parent>text</parent></child>'
  t.equal((await post(app, { key: 'key' })).body, expected)
  const retry = await post(app, { key: 'key' })
  t.ok(isReplay(retry))
  t.equal(retry.body, expected)
})

t.test('an onSend hook of the route is applied to each replay anew, with the length that it makes of it', async (t) => {
  for (const list of [false, true]) {
    const app = await empty(t)
    await app.register(idempotency)
    let sent = 0
    const onSend = async (_request: unknown, reply: FastifyReply, payload: unknown) => {
      const counted = `${payload}${'!'.repeat(++sent)}`
      reply.header('content-length', counted.length)
      return counted
    }
    app.post('/', { config, onSend: list ? [onSend] : onSend }, async (_request, reply) =>
      reply.header('content-length', 4).send('text')
    )
    for (const body of ['text!', 'text!!', 'text!!!']) {
      const reply = await post(app, { key: 'key' })
      t.same([reply.body, reply.headers['content-length']], [body, String(body.length)])
      t.equal(isReplay(reply), body !== 'text!')
      t.equal(await bodyOf(app, 'key'), 'text', 'the store has the reply as it was before the hook')
    }
  }
})

t.test('an onSend hook that another plugin gives to the route works on each replay anew', async (t) => {
  for (const order of orders) {
    const app = await empty(t)
    let sent = 0
    await register(
      order,
      () => app.register(idempotency),
      async () => {
        app.addHook('onRoute', (route) => {
          const own = [route.onSend ?? []].flat()
          const wrap = async (_request: unknown, _reply: unknown, payload: unknown) =>
            envelope(`copy-${++sent}`, payload)
          // In front of whatever is there.
          route.onSend = [wrap, ...own] as never
        })
      }
    )
    app.post('/', { config }, async () => 'text')
    t.equal((await post(app, { key: 'key' })).body, '<copy-1>text</copy-1>')
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.body, '<copy-2>text</copy-2>', `registered ${order} it`)
  }
})

t.test('preSerialization hooks, of the instance and of the route, work on the first reply only', async (t) => {
  for (const order of orders) {
    const app = await empty(t)
    const calls: string[] = []
    await register(
      order,
      () => app.register(idempotency),
      async () => {
        app.addHook('preSerialization', async (_request, _reply, payload) => {
          calls.push('instance')
          return { data: payload }
        })
      }
    )
    const preSerialization = async (_request: unknown, _reply: unknown, payload: unknown) => {
      calls.push('route')
      return { ...(payload as object), at: calls.length }
    }
    app.post('/', { config, preSerialization }, async () => ({ a: 1 }))
    const first = await post(app, { key: 'key' })
    t.same(first.json(), { data: { a: 1 }, at: 2 })
    const retry = await post(app, { key: 'key' })
    t.ok(isReplay(retry))
    t.equal(retry.body, first.body)
    t.same(calls, ['instance', 'route'])
  }
})

t.test('hooks before the handler see every duplicate, and what they put on the reply is fresh', async (t) => {
  const app = await empty(t)
  await app.register(idempotency)
  const phases = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const
  const seen: Record<string, number> = {}
  const count = (name: string) => {
    seen[name] = (seen[name] ?? 0) + 1
    return String(seen[name])
  }
  for (const phase of phases) {
    app.addHook(phase as 'onRequest', async (_request, reply) => {
      reply.header(`x-instance-${phase.toLowerCase()}`, count(`instance ${phase}`))
    })
  }
  const own = Object.fromEntries(
    phases.map((phase) => [
      phase,
      async (_request: unknown, reply: { header(name: string, value: string): unknown }) =>
        void reply.header(`x-route-${phase.toLowerCase()}`, count(`route ${phase}`))
    ])
  )
  let runs = 0
  app.post('/', { config, ...own }, async () => ({ run: ++runs }))
  for (const n of ['1', '2', '3']) {
    const reply = await post(app, { key: 'key' })
    t.equal(isReplay(reply), n !== '1')
    for (const phase of phases) {
      t.equal(reply.headers[`x-instance-${phase.toLowerCase()}`], n)
      t.equal(reply.headers[`x-route-${phase.toLowerCase()}`], n)
    }
  }
  t.equal(runs, 1)
})

t.test('hook arrays that several routes share are left as they were', async (t) => {
  const app = await empty(t)
  await app.register(idempotency)
  const shared = {
    onRequest: Object.freeze([async () => {}]) as never,
    preHandler: Object.freeze([async () => {}]) as never,
    onSend: Object.freeze([async (_request: unknown, _reply: unknown, payload: unknown) => payload]) as never
  }
  for (const url of ['/a', '/b']) app.post(url, { config, ...shared }, async () => url)
  for (const url of ['/a', '/b']) {
    t.equal((await post(app, { url, key: url })).body, url)
    t.ok(isReplay(await post(app, { url, key: url })))
  }
  for (const hooks of Object.values(shared)) t.equal((hooks as unknown[]).length, 1)
})
