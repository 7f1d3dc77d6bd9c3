import { connect, constants } from 'node:http2'
import { connect as connectTcp } from 'node:net'
import { Readable } from 'node:stream'
import { setTimeout as sleep, setImmediate as tick } from 'node:timers/promises'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import t from 'tap'
import { type IdempotencyOptions, type IdempotencyStore, MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, codeOf, elsewhere, inject, listen, post, REPLAYED, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* What happens to the request that holds the claim, and what becomes of the key. */

const config = (options: IdempotencyOptions = {}) => ({ config: { idempotency: { ...options } } })
const keyed = { method: 'POST' as const, url: '/', headers: { 'idempotency-key': 'k' } }

/** A store that counts what ends its claims. */
class CountingStore extends MemoryStore {
  completed = 0
  released = 0
  override complete(...args: Parameters<IdempotencyStore['complete']>) {
    this.completed++
    return super.complete(...args)
  }
  override release(...args: Parameters<IdempotencyStore['release']>) {
    this.released++
    return super.release(...args)
  }
}

t.test('a final reply is stored, and replayed to every duplicate until its ttl', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', config({ ttl: 1_500 }), async (_request, reply) => reply.code(201).send({ run: ++runs }))
  const first = await app.inject(keyed)
  t.same([first.statusCode, first.json(), first.headers[REPLAYED]], [201, { run: 1 }, undefined])
  for (let i = 0; i < 3; i++) {
    const again = await app.inject(keyed)
    t.same([again.statusCode, again.body, again.headers[REPLAYED]], [201, first.body, 'true'])
  }
  await until(async () => (await app.idempotency.get('k')) === null)
  t.same((await app.inject(keyed)).json(), { run: 2 })
})

t.test('a reply that is not final releases the key, and a retry runs as attempt 1', async (t) => {
  for (const status of [500, 502, 503, 401, 408, 423, 425, 429]) {
    const app = await build(t)
    const attempts: unknown[] = []
    app.post('/', config(), async (request, reply) => {
      attempts.push(request.idempotency?.attempt)
      return reply.code(attempts.length === 1 ? status : 200).send('x')
    })
    t.equal((await app.inject(keyed)).statusCode, status)
    t.equal((await app.inject(keyed)).statusCode, 200)
    t.same(attempts, [1, 1])
  }
})

t.test('a reply with Retry-After is not final, whatever its status', async (t) => {
  for (const status of [200, 202, 404, 409]) {
    const app = await build(t)
    let runs = 0
    app.post('/', config(), async (_request, reply) => reply.code(status).header('Retry-After', '1').send(`${++runs}`))
    t.equal((await app.inject(keyed)).body, '1')
    t.equal((await app.inject(keyed)).body, '2')
  }
})

t.test('shouldStore: () => true stores every reply of the handler, 500 too', async (t) => {
  const app = await build(t, { shouldStore: () => true })
  let runs = 0
  app.post('/', config(), async () => {
    runs++
    throw new Error('oops')
  })
  const first = await app.inject(keyed)
  const second = await app.inject(keyed)
  t.same([second.statusCode, second.body, second.headers[REPLAYED], runs], [500, first.body, 'true', 1])
})

t.test('a shouldStore that throws leaves the decision to the default, and the reply alone', async (t) => {
  const app = await build(t, {
    shouldStore: () => {
      throw new Error('broken')
    }
  })
  app.post('/', config(), async () => 'fine')
  t.same((await app.inject(keyed)).body, 'fine')
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
})

t.test('discard() releases the key, whatever the reply is', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', config(), async (request) => {
    request.idempotency?.discard()
    return { run: ++runs }
  })
  t.same((await app.inject(keyed)).json(), { run: 1 })
  t.same((await app.inject(keyed)).json(), { run: 2 })
})

t.test('what ends the request before its handler leaves the key free, and stores nothing', async (t) => {
  const fail = Object.assign(new Error('no'), { statusCode: 401 })
  const cases: [name: string, options: object, request: object, status: number][] = [
    ['a preHandler hook that throws', { preHandler: async () => Promise.reject(fail) }, {}, 401],
    [
      'a preHandler hook that replies',
      { preHandler: async (_: FastifyRequest, reply: FastifyReply) => reply.code(403).send('no') },
      {},
      403
    ],
    ['a preValidation hook that throws', { preValidation: async () => Promise.reject(fail) }, {}, 401],
    ['a validation error', { schema: { body: { type: 'object', required: ['a'] } } }, { payload: {} }, 400],
    [
      'a body that does not parse',
      {},
      { payload: '{', headers: { ...keyed.headers, 'content-type': 'application/json' } },
      400
    ],
    [
      'a body of an unknown type',
      {},
      { payload: 'x', headers: { ...keyed.headers, 'content-type': 'application/x' } },
      415
    ],
    ['a body that is too large', { bodyLimit: 10 }, { payload: { a: 'x'.repeat(20) } }, 413]
  ]
  const hooks = ['preHandler', 'onRequest'] as const
  for (const [name, options, request, status, hook] of cases.flatMap((it) =>
    hooks.map((hook) => [...it, hook] as const)
  )) {
    t.test(`${name}, with hook '${hook}'`, async (t) => {
      const store = new CountingStore()
      const app = await build(t, { store, hook })
      let runs = 0
      app.post('/', { ...options, ...config() } as never, async () => ++runs)
      t.equal((await app.inject({ ...keyed, ...request })).statusCode, status)
      t.same([store.completed, store.released, runs], [0, hook === 'onRequest' ? 1 : 0, 0])
      t.equal(await app.idempotency.get('k'), null)
    })
  }
})

t.test('a hijacked reply leaves a tombstone', async (t) => {
  const handlers: Record<string, (request: FastifyRequest, reply: FastifyReply) => unknown> = {
    hijack: async (_request, reply) => {
      reply.hijack()
      reply.raw.end('raw')
    },
    'hijack, ended later': (_request, reply) => {
      reply.hijack()
      setImmediate(() => reply.raw.end('raw'))
    },
    'raw end without hijack': async (_request, reply) => {
      reply.raw.end('raw')
      return reply
    }
  }
  for (const [name, handler] of Object.entries(handlers)) {
    t.test(name, async (t) => {
      const app = await build(t)
      let runs = 0
      app.post('/', config(), (request, reply) => {
        runs++
        return handler(request, reply) as never
      })
      const port = await listen(app)
      t.equal((await post(port, { key: 'k' })).text, 'raw')
      await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
      const second = await post(port, { key: 'k' })
      t.same([second.status, codeOf(second), runs], [409, 'FST_IDEMPOTENCY_NOT_REPLAYABLE', 1])
    })
  }
})

t.test('a client that leaves while the handler runs changes nothing: the reply is stored', async (t) => {
  const done = (reply: FastifyReply) => void reply.code(201).send('done')
  const leavers: [name: string, handler: (reply: FastifyReply, leave: Promise<void>) => unknown, status: number][] = [
    ['an async handler that returns a value', async (_reply, leave) => leave.then(() => 'done'), 200],
    ['one that sends and returns nothing', async (reply, leave) => leave.then(() => done(reply)), 201],
    ['one that returns reply.send()', async (reply, leave) => leave.then(() => reply.send('done')), 200],
    ['one that returns undefined, as for a 204', async (reply, leave) => leave.then(() => void reply.code(204)), 204],
    [
      'one that waits for the end of its reply, and then returns a value',
      async (reply, leave) => {
        await reply
        await leave
        return 'done'
      },
      200
    ],
    [
      'one that fails with a final error',
      async (_reply, leave) => {
        await leave
        throw Object.assign(new Error('done'), { statusCode: 404 })
      },
      404
    ],
    ['a handler that replies from a callback', (reply, leave) => void leave.then(() => done(reply)), 201],
    [
      'an async one that returns its reply, and answers from a callback',
      async (reply, leave) => {
        void leave.then(() => done(reply))
        return reply
      },
      201
    ]
  ]
  for (const [name, handler, status] of leavers) {
    for (const body of [{}, { body: '{"a":1}' }]) {
      t.test(`${name}, ${'body' in body ? 'with' : 'without'} a body`, async (t) => {
        const app = await build(t)
        const [entered, leave, closed] = [latch(), latch(), latch()]
        let runs = 0
        app.post('/', config(), (_request, reply) => {
          runs++
          reply.raw.on('close', () => closed.open())
          entered.open()
          return handler(reply, leave.promise) as never
        })
        const port = await listen(app)
        const client = start(port, { key: 'k', ...body })
        await entered.promise
        client.hangUp()
        await closed.promise
        await sleep(5)
        t.equal((await app.idempotency.get('k'))?.state, 'running')
        leave.open()
        await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
        const retry = await post(port, { key: 'k', ...body })
        t.match(retry.text, status === 204 ? /^$/ : /done/)
        t.same([retry.status, retry.headers[REPLAYED], runs], [status, 'true', 1])
      })
    }
  }
})

t.test('a client that leaves before the handler gives the key back, and no handler runs', async (t) => {
  for (const body of [undefined, '{"a":1}']) {
    for (const [phase, hook] of [
      ['claim', 'preHandler'],
      ['claim', 'onRequest'],
      ['preHandler', 'preHandler'],
      ['preHandler', 'onRequest']
    ] as const) {
      t.test(`in its ${phase}, with hook '${hook}', ${body === undefined ? 'without' : 'with'} a body`, async (t) => {
        const store = new CountingStore()
        const [entered, leave, closed] = [latch(), latch(), latch()]
        const acquire = store.acquire.bind(store)
        if (phase === 'claim') {
          store.acquire = async (...args) => {
            entered.open()
            await leave.promise
            return acquire(...args)
          }
        }
        const app = await build(t, { store, hook })
        let runs = 0
        app.post(
          '/',
          {
            ...config(),
            onRequest: async (_request: FastifyRequest, reply: FastifyReply) => {
              reply.raw.on('close', () => closed.open())
            },
            preHandler: async () => {
              if (phase === 'claim') return
              entered.open()
              await leave.promise
            }
          },
          async () => ++runs
        )
        const port = await listen(app)
        const client = start(port, { key: 'k', ...(body === undefined ? {} : { body }) })
        await entered.promise
        client.hangUp()
        await closed.promise
        leave.open()
        // What has not been claimed need not be given back.
        if (phase === 'claim' || hook === 'onRequest') await until(() => store.released === 1)
        t.equal(await app.idempotency.get('k'), null)
        t.equal((await post(port, { key: 'k', ...(body === undefined ? {} : { body }) })).text, '1')
      })
    }
  }
})

t.test('a handler that only looks out for the end of its reply is no handler with a callback', async (t) => {
  const app = await build(t)
  app.post('/', config(), async (_request, reply) => {
    reply.then(
      () => {},
      () => {}
    )
    await Promise.race([reply, sleep(1)])
    reply.code(204)
  })
  const port = await listen(app)
  t.equal((await post(port, { key: 'k' })).status, 204)
  t.equal((await post(port, { key: 'k' })).headers[REPLAYED], 'true')
})

t.test('a handler that hijacks its reply after the client has left leaves a tombstone', async (t) => {
  const handlers: Record<string, (reply: FastifyReply, gone: Promise<void>) => unknown> = {
    async: async (reply, gone) => {
      await gone
      reply.hijack()
      reply.raw.end('raw')
    },
    callback: (reply, gone) => {
      void gone.then(() => reply.hijack().raw.end('raw'))
    },
    'async, which does not end it': async (reply, gone) => {
      await gone
      reply.hijack()
    },
    'async, which waits for its end, and does not end it': async (reply) => {
      await reply
      reply.hijack()
    }
  }
  for (const [style, handler] of Object.entries(handlers)) {
    const app = await build(t)
    const [entered, closed] = [latch(), latch()]
    app.post('/', config(), (_request, reply) => {
      reply.raw.on('close', () => setImmediate(() => closed.open()))
      entered.open()
      return handler(reply, closed.promise) as never
    })
    const port = await listen(app)
    const client = start(port, { key: 'k', body: '{}' })
    await entered.promise
    client.hangUp()
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed', { message: style })
    t.equal(codeOf(await post(port, { key: 'k', body: '{}' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE', style)
  }
})

t.test('a hijacked reply whose client leaves before it has ended leaves a tombstone', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', config(), (_request, reply) => {
    runs++
    reply.hijack()
    reply.raw.write('event')
  })
  const port = await listen(app)
  const client = start(port, { key: 'k' })
  await client.response
  t.equal((await app.idempotency.get('k'))?.state, 'running')
  client.hangUp()
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  t.equal(codeOf(await post(port, { key: 'k' })), 'FST_IDEMPOTENCY_NOT_REPLAYABLE')
  t.equal(runs, 1)
})

t.test('what is done to the reply after it was sent changes neither it nor its replay', async (t) => {
  const app = await build(t)
  app.post('/', config(), async (_request, reply) => {
    reply.code(201).header('x-a', '1').send('x')
    reply.code(500).header('x-a', '2').header('x-b', '1')
    return reply
  })
  const port = await listen(app)
  for (let i = 0; i < 2; i++) {
    const { status, headers } = await post(port, { key: 'k' })
    t.same([status, headers['x-a'], headers['x-b']], [201, '1', undefined])
  }
})

t.test('a deleted key stays deleted, even while its handler still runs', async (t) => {
  const app = await build(t)
  const [entered, leave] = [latch<AbortSignal>(), latch()]
  app.post('/', config({ lease: 60 }), async (request) => {
    entered.open(request.idempotency?.signal as AbortSignal)
    await leave.promise
    return 'late'
  })
  const late = inject(app, keyed)
  const signal = await entered.promise
  await app.idempotency.delete('k')
  await until(() => signal.aborted)
  leave.open()
  t.equal((await late).body, 'late')
  t.equal(await app.idempotency.get('k'), null)
})

t.test('a key that is deleted while a lost claim is about to be made anew stays deleted', async (t) => {
  for (const moment of ['before', 'after'] as const) {
    const store = new MemoryStore()
    const [asked, leave] = [latch(), latch()]
    const pausing = <Args extends unknown[], A>(call: (...args: Args) => Promise<A>) => {
      return async (...args: Args) => {
        asked.open()
        await leave.promise
        return call(...args)
      }
    }
    const app = await build(t, { store })
    app.post('/', config({}), async () => {
      await store.delete(storageKey(null, 'k'))
      if (moment === 'before') store.get = pausing(store.get.bind(store))
      else store.acquire = pausing(store.acquire.bind(store))
      return 'late'
    })
    const late = inject(app, keyed)
    await asked.promise
    await app.idempotency.delete('k')
    leave.open()
    t.equal((await late).body, 'late')
    await until(async () => (await app.idempotency.get('k')) === null)
  }
})

t.test(
  'a key that is deleted after its reply was stored stays deleted, whatever a late attempt to store it finds',
  async (t) => {
    const store = new MemoryStore()
    const app = await build(t, { store, storeTimeout: 20 })
    app.post('/', config({}), async () => 'reply')
    const complete = store.complete.bind(store)
    const leave = latch()
    store.complete = async (...args) => {
      store.complete = complete
      await leave.promise
      return complete(...args)
    }
    await app.inject(keyed)
    await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
    t.equal(await app.idempotency.delete('k'), true)
    leave.open()
    await tick()
    t.equal(await app.idempotency.get('k'), null)
  }
)

t.test('the reply of a deleted key is no replay while it cannot be stored', async (t) => {
  const store = new MemoryStore()
  const app = await build(t, { store })
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  app.post('/', config({}), async () => {
    if (++runs > 1) return 'anew'
    entered.open()
    await leave.promise
    return 'late'
  })
  const late = inject(app, keyed)
  await entered.promise
  await app.idempotency.delete('k')
  const { complete } = store
  store.complete = () => Promise.reject(new Error('The store is not there'))
  leave.open()
  t.equal((await late).body, 'late')
  store.complete = complete
  t.equal((await inject(app, keyed)).body, 'anew')
  t.equal((await inject(app, keyed)).body, 'anew')
  t.equal(runs, 2)
})

t.test('http2: a client that leaves before the claim gives it back', async (t) => {
  const store = new CountingStore()
  const app = await build(t, { store }, { http2: true } as never)
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  const onRequest = async () => {
    entered.open()
    await leave.promise
  }
  app.post('/', { ...config(), onRequest }, async () => ++runs)
  const port = await listen(app)
  const client = connect(`http://127.0.0.1:${port}`)
  t.teardown(() => client.destroy())
  const stream = client.request({ ':method': 'POST', ':path': '/', 'idempotency-key': 'k' })
  stream.on('error', () => {})
  stream.end()
  await entered.promise
  const gone = new Promise((resolve) => stream.on('close', resolve))
  stream.close(constants.NGHTTP2_CANCEL)
  await gone
  await sleep(10)
  leave.open()
  await sleep(20)
  t.equal(await app.idempotency.get('k'), null)
  t.equal(runs, 0)
})

t.test('a request that waits behind another on a connection that ends is stored all the same', async (t) => {
  const app = await build(t)
  const [entered, leave] = [latch(), latch()]
  app.post('/slow', async () => new Promise(() => {}))
  app.post('/', config(), async () => {
    entered.open()
    await leave.promise
  })
  const port = await listen(app)
  const socket = connectTcp(port, '127.0.0.1')
  const head = 'Host: localhost:80\r\nContent-Length: 0\r\n'
  socket.write(`POST /slow HTTP/1.1\r\n${head}\r\nPOST / HTTP/1.1\r\n${head}Idempotency-Key: k\r\n\r\n`)
  await entered.promise
  socket.destroy()
  await sleep(20)
  leave.open()
  await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
  t.equal((await post(port, { key: 'k' })).headers[REPLAYED], 'true')
})

t.test(
  'requests that wait behind another on a connection that ends before their claims give their keys back',
  async (t) => {
    const store = new CountingStore()
    const [asked, leave] = [latch(), latch()]
    let asking = 0
    const acquire = store.acquire.bind(store)
    store.acquire = async (...args) => {
      if (++asking === 2) asked.open()
      await leave.promise
      return acquire(...args)
    }
    const app = await build(t, { store })
    const entered = latch<FastifyRequest>()
    app.post('/slow', async (request) => {
      entered.open(request)
      return new Promise(() => {})
    })
    let runs = 0
    app.post('/', config(), async () => ++runs)
    const port = await listen(app)
    const socket = connectTcp(port, '127.0.0.1')
    const head = 'Host: localhost:80\r\nContent-Length: 0\r\n'
    const behind = ['a', 'b'].map((key) => `POST / HTTP/1.1\r\n${head}Idempotency-Key: ${key}\r\n\r\n`)
    socket.write(`POST /slow HTTP/1.1\r\n${head}\r\n${behind.join('')}`)
    const request = await entered.promise
    await asked.promise
    const closed = new Promise((resolve) => request.socket.once('close', resolve))
    socket.destroy()
    await closed
    leave.open()
    await until(() => store.released === 2)
    t.same([await app.idempotency.get('a'), await app.idempotency.get('b'), runs], [null, null, 0])
  }
)

t.test('a handler that runs for many leases runs once, whoever asks', async (t) => {
  const store = new MemoryStore()
  const renew = store.renew.bind(store)
  let renewals = 0
  store.renew = (...args) => {
    renewals++
    return renew(...args)
  }
  const apps = [await build(t, { store }), await build(t, { store: elsewhere(store) })]
  const leave = latch()
  let runs = 0
  for (const app of apps) {
    app.post('/', config({ lease: 300 }), async () => {
      runs++
      await leave.promise
      return 'done'
    })
  }
  const first = inject(apps[0] as FastifyInstance, keyed)
  await until(async () => {
    for (const app of apps) t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
    return renewals >= 9
  })
  leave.open()
  t.equal((await first).body, 'done')
  for (const app of apps) t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  t.equal(runs, 1)
})

t.test('limits of months are as good as any', async (t) => {
  const warnings: string[] = []
  const listener = ({ name }: Error) => name === 'TimeoutOverflowWarning' && warnings.push(name)
  process.on('warning', listener)
  t.teardown(() => process.off('warning', listener))
  const months = 2 ** 31 + 1
  const app = await build(t, { storeTimeout: months, onConflict: 'wait' })
  let runs = 0
  app.post('/', config({ ttl: months, lease: months, waitTimeout: months }), async () => {
    await sleep(20)
    return `run ${++runs}`
  })
  const replies = await Promise.all([inject(app, keyed), inject(app, keyed)])
  t.same(
    replies.map(({ body }) => body),
    ['run 1', 'run 1']
  )
  await sleep(20)
  t.equal((await app.inject(keyed)).headers[REPLAYED], 'true')
  const found = await app.idempotency.get('k')
  t.ok(found?.state === 'completed' && Number(found.ttlMs) > months - 60_000)
  t.same(warnings, [], 'no timer was set to more than it can take')
})

t.test('a claim whose owner died is run again after its lease, and the rerun sees attempt 2', async (t) => {
  const store = new MemoryStore()
  const dead = await build(t, { store })
  dead.post('/', config({ lease: 60 }), () => new Promise(() => {}))
  void inject(dead, keyed).catch(() => {})
  await until(async () => (await dead.idempotency.get('k'))?.state === 'running')

  // Another process, which shares nothing with the first one but the data; the first renews no more.
  const shared = withoutRenewal(store)
  const app = await build(t, { store: shared.store })
  app.post('/', config({ lease: 60 }), async (request) => request.idempotency?.attempt)
  shared.die()
  await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
  t.equal((await app.inject(keyed)).body, '2')
})

t.test(
  "with onAbandoned 'reject' the retry of a dead owner's request is told that the outcome is not known",
  async (t) => {
    const store = new MemoryStore()
    const app = await build(t, { store, onAbandoned: 'reject' })
    let runs = 0
    app.post('/', config({ lease: 60 }), async () => ++runs)
    const shared = withoutRenewal(store)
    const dead = await build(t, { store: shared.store })
    dead.post('/', config({ lease: 60 }), () => new Promise(() => {}))
    shared.die()
    void inject(dead, keyed).catch(() => {})
    await until(async () => (await app.idempotency.get('k'))?.state === 'abandoned')
    const retry = await app.inject(keyed)
    t.same([retry.statusCode, codeOf(retry), runs], [409, 'FST_IDEMPOTENCY_ABANDONED', 0])
  }
)

/** The same data, as another process sees it; after `die` nothing is renewed through it any more. */
function withoutRenewal(store: MemoryStore) {
  let dead = false
  return {
    die: () => {
      dead = true
      store.renew = async () => true
    },
    store: {
      acquire: (...args) => store.acquire(...args),
      renew: (...args) => (dead ? Promise.resolve(true) : store.renew(...args)),
      complete: (...args) => store.complete(...args),
      release: (...args) => store.release(...args),
      get: (key) => store.get(key)
    } satisfies IdempotencyStore
  }
}

t.test(
  'a lost claim aborts the signal; what comes late goes to its own client, and changes nothing else',
  async (t) => {
    for (const [fails, isOver] of [
      [false, true],
      [false, false],
      [true, true],
      [true, false]
    ]) {
      const app = await build(t)
      const [entered, leave, taken, goOn] = [latch<AbortSignal>(), latch(), latch(), latch()]
      let runs = 0
      app.post('/', config({ lease: 60 }), async (request) => {
        if (++runs > 1) {
          taken.open()
          await goOn.promise
          return 'new owner'
        }
        entered.open(request.idempotency?.signal as AbortSignal)
        await leave.promise
        if (fails) throw new Error('late')
        return 'late'
      })
      const late = inject(app, keyed)
      const signal = await entered.promise
      t.equal(signal.aborted, false)
      t.equal(await app.idempotency.delete('k'), true)
      const next = inject(app, keyed)
      await taken.promise
      if (isOver) goOn.open()
      if (isOver) await next
      await until(() => signal.aborted)
      leave.open()
      t.match((await late).body, 'late')
      t.equal((await app.idempotency.get('k'))?.state, isOver ? 'completed' : 'running')
      goOn.open()
      t.equal((await next).body, 'new owner')
      const retry = await app.inject(keyed)
      t.same([retry.body, retry.headers[REPLAYED], runs], ['new owner', 'true', 2])
    }
  }
)

t.test('callNotFound: the 404 is the reply of the handler, and is stored', async (t) => {
  const app = await build(t)
  let runs = 0
  app.post('/', config(), (_request, reply) => {
    runs++
    reply.callNotFound()
  })
  const first = await app.inject(keyed)
  const second = await app.inject(keyed)
  t.same([second.statusCode, second.body, second.headers[REPLAYED], runs], [404, first.body, 'true', 1])
})

t.test(
  'what fails behind a handler that has succeeded is stored with its status, and never makes it run again',
  async (t) => {
    const broken = Object.assign(new Error('broken'), { statusCode: 503 })
    const schema = { response: { 200: { type: 'object', required: ['id'], properties: { id: { type: 'integer' } } } } }
    const cases: Record<string, { route?: object; instance?: (app: FastifyInstance) => void; give?: () => unknown }> = {
      'a value that cannot be serialised': { give: () => ({ n: 1n }) },
      'a response schema': { route: { schema } },
      'a preSerialization hook': { route: { preSerialization: async () => Promise.reject(broken) } },
      'an onSend hook of the instance, once': {
        instance: (app) => {
          app.addHook('onSend', async (_request, reply) => {
            if (reply.statusCode === 200) throw broken
          })
        }
      },
      'a payload that nobody can send': {
        route: { onRequest: async (_: unknown, reply: FastifyReply) => void reply.type('text/plain') }
      }
    }
    const ways = {
      'is returned': (give: () => unknown) => async () => give(),
      'is sent': (give: () => unknown) => async (_: unknown, reply: FastifyReply) => reply.send(give()),
      'is sent from a callback': (give: () => unknown) => (_: unknown, reply: FastifyReply) => {
        setImmediate(() => reply.send(give()))
      }
    }
    for (const [name, { route = {}, instance, give = () => ({}) }] of Object.entries(cases)) {
      for (const [way, handler] of Object.entries(ways)) {
        t.test(`${name}, where it ${way}`, async (t) => {
          const app = await build(t)
          let runs = 0
          instance?.(app)
          const run = () => {
            runs++
            return give()
          }
          app.post('/', { ...route, ...config() }, handler(run) as never)
          const first = await app.inject(keyed)
          t.ok(first.statusCode >= 500)
          const retry = await app.inject(keyed)
          t.same([retry.statusCode, retry.body, retry.headers[REPLAYED]], [first.statusCode, first.body, 'true'])
          t.equal(runs, 1)
        })
      }
    }
    t.test(
      'an onSend hook of the instance that always fails leaves a tombstone: nobody has seen the reply',
      async (t) => {
        const app = await build(t)
        let runs = 0
        app.addHook('onSend', async () => Promise.reject(broken))
        app.post('/', config(), async () => ++runs)
        t.equal((await app.inject(keyed)).statusCode, 503)
        await until(async () => (await app.idempotency.get('k'))?.state === 'completed')
        await app.inject(keyed)
        t.equal(runs, 1)
      }
    )
    t.test('a warning says what has failed', async (t) => {
      const lines: string[] = []
      const stream = { write: (line: string) => void lines.push(line) }
      const app = await build(t, {}, { logger: { level: 'warn', stream } })
      app.post('/', { ...config(), preSerialization: async () => Promise.reject(broken) }, async () => ({}))
      await app.inject(keyed)
      const warned = lines.map((line) => JSON.parse(line)).filter(({ msg }) => /its reply failed/.test(msg))
      t.match(warned, [{ level: 40, err: { message: 'broken' } }])
      t.equal(warned.length, 1)
    })
    t.test(
      'an error whose every reply fails counts by its status: it gives the key back, or leaves a tombstone',
      async (t) => {
        for (const [statusCode, state] of [
          [500, undefined],
          [402, 'completed']
        ] as const) {
          const app = await build(t)
          let runs = 0
          app.addHook('onSend', async () => Promise.reject(new Error('broken')))
          app.post('/', config(), async () => {
            runs++
            throw Object.assign(new Error('own'), { statusCode })
          })
          t.equal((await app.inject(keyed)).statusCode, statusCode)
          await until(async () => (await app.idempotency.get('k'))?.state === state)
          await app.inject(keyed)
          t.equal(runs, state === undefined ? 2 : 1)
        }
      }
    )
    t.test('a reply that is not final stays so, whatever fails behind it', async (t) => {
      const app = await build(t)
      let runs = 0
      app.post('/', { ...config(), preSerialization: async () => Promise.reject(broken) }, async (_request, reply) =>
        reply.code(503).send({ run: ++runs })
      )
      await app.inject(keyed)
      await app.inject(keyed)
      t.equal(runs, 2)
    })
    t.test('what the handler has called discard() for is not stored', async (t) => {
      const app = await build(t)
      let runs = 0
      app.post('/', config(), async (request) => {
        runs++
        request.idempotency?.discard()
        return { n: 1n }
      })
      await app.inject(keyed)
      await app.inject(keyed)
      t.equal(runs, 2)
    })
    t.test('an error that the handler throws, sends or returns is its own', async (t) => {
      const app = await build(t)
      let runs = 0
      const handlers = {
        throws: async () => Promise.reject(new Error('own')),
        'throws-at-once': () => {
          throw new Error('own')
        },
        'throws-a-string': () => {
          throw 'own'
        },
        'throws-nothing': () => Promise.reject(undefined),
        sends: async (_: unknown, reply: FastifyReply) => reply.send(new Error('own')),
        returns: async () => new Error('own')
      }
      for (const [how, handler] of Object.entries(handlers)) {
        app.post(`/${how}`, config(), (request, reply) => {
          runs++
          return handler(request, reply) as never
        })
      }
      for (const how of Object.keys(handlers)) {
        runs = 0
        for (const run of [1, 2]) {
          await app.inject({ ...keyed, url: `/${how}`, headers: { 'idempotency-key': how } })
          t.equal(runs, run, how)
        }
      }
    })
  }
)

t.test('a handler that sends without returning, and then returns or throws, sends once', async (t) => {
  const handlers: Record<string, (request: FastifyRequest, reply: FastifyReply) => unknown> = {
    'async, returns nothing': async (_request, reply) => void reply.code(201).header('x-a', '1').send('sent'),
    'async, returns something else': async (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      return 'returned'
    },
    'async, throws': async (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      throw new Error('afterwards')
    },
    'sync, returns something else': (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      return 'returned'
    },
    'sync, throws': (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      throw new Error('afterwards')
    },
    'async, sends a stream and returns something else': async (_request, reply) => {
      reply
        .code(201)
        .header('x-a', '1')
        .send(Readable.from(['sent']))
      return 'returned'
    },
    'async, sends a stream and throws': async (_request, reply) => {
      reply
        .code(201)
        .header('x-a', '1')
        .send(Readable.from(['sent']))
      throw new Error('afterwards')
    },
    'sends twice': (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      reply.send('again')
    },
    'sends, and an error behind it': (_request, reply) => {
      reply.code(201).header('x-a', '1').send('sent')
      reply.send(new Error('again'))
    }
  }
  for (const [name, handler] of Object.entries(handlers)) {
    t.test(name, async (t) => {
      const store = new CountingStore()
      const complete = store.complete.bind(store)
      store.complete = async (...args) => {
        await sleep(10)
        return complete(...args)
      }
      const app = await build(t, { store })
      app.post('/', config(), handler as never)
      const port = await listen(app)
      const first = await post(port, { key: 'k' })
      t.same([first.status, first.text, first.headers['x-a'], first.headers[REPLAYED]], [201, 'sent', '1', undefined])
      const second = await post(port, { key: 'k' })
      t.same([second.status, second.text, second.headers['x-a'], second.headers[REPLAYED]], [201, 'sent', '1', 'true'])
      t.equal(store.completed, 1)
    })
  }
})

t.test('a handler that throws while hooks hold what it has sent has failed, and runs again', async (t) => {
  const app = await build(t)
  const held = latch()
  let runs = 0
  app.addHook('onSend', async (_request, _reply, payload) => {
    if (payload === 'sent') await held.promise
  })
  app.post('/', config(), async (_request, reply) => {
    if (++runs > 1) return 'again'
    reply.send('sent')
    throw new Error('afterwards')
  })
  t.equal((await app.inject(keyed)).statusCode, 500)
  held.open()
  t.equal((await app.inject(keyed)).body, 'again')
})

t.test('a thenable that is not a promise does its work once', async (t) => {
  const app = await build(t)
  let work = 0
  app.post('/', config(), () => ({
    // biome-ignore lint/suspicious/noThenProperty: this is the point of the test
    then(resolve: (value: unknown) => void) {
      work++
      resolve({ work })
    }
  }))
  t.same((await app.inject(keyed)).json(), { work: 1 })
  t.equal(work, 1)
})

t.test('a handler may wait until its reply is over', async (t) => {
  const app = await build(t)
  const over = latch<boolean>()
  app.post('/', { config: { idempotency: true } }, async (_request, reply) => {
    reply.send('sent')
    await reply
    over.open(reply.raw.writableEnded)
  })
  const { payload } = await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
  t.equal(payload, 'sent')
  t.equal(await over.promise, true)
})

t.test('a value that is returned after the reply was sent is not sent, and is warned of', async (t) => {
  const lines: string[] = []
  const stream = { write: (line: string) => void lines.push(line) }
  const app = await build(t, {}, { logger: { level: 'warn', stream } })
  const returned: Record<string, (reply: FastifyReply) => unknown> = {
    nothing: () => undefined,
    reply: (reply) => reply,
    value: () => 'another'
  }
  app.post('/:what', { config: { idempotency: true } }, async (request, reply) => {
    reply.send('sent')
    return returned[(request.params as { what: string }).what]?.(reply)
  })
  for (const what of Object.keys(returned)) {
    for (let n = 0; n < 2; n++) {
      const request = { method: 'POST' as const, url: `/${what}`, headers: { 'idempotency-key': what } }
      t.equal((await app.inject(request)).payload, 'sent', what)
    }
    t.equal(lines.length, what === 'value' ? 1 : 0, what)
  }
  t.match(lines[0], /handler returned a value after its reply was sent/)
})

t.test('a key is not given back while its handler is still at work, though it has replied', async (t) => {
  const ways: Record<string, (reply: FastifyReply, request: FastifyRequest) => void> = {
    'by what is not final': (reply) => void reply.code(503).send('later'),
    'by an error': (reply) => void reply.send(new Error('later')),
    'by what it has called discard() for': (reply, request) => {
      request.idempotency?.discard()
      reply.send('done')
    },
    'by a stream that is not final': (reply) => void reply.code(503).send(Readable.from(['later']))
  }
  for (const [how, answer] of Object.entries(ways)) {
    for (const end of ['returns', 'throws', 'waits for the end of its reply'] as const) {
      t.test(`${how}, and then ${end}`, async (t) => {
        const app = await build(t)
        const [leave, ended] = [latch(), latch()]
        let [running, most, runs] = [0, 0, 0]
        app.post('/', config(), async (request, reply) => {
          most = Math.max(most, ++running)
          if (++runs > 1) {
            running--
            return 'again'
          }
          answer(reply, request)
          await leave.promise
          if (end === 'waits for the end of its reply') await reply
          running--
          ended.open()
          if (end === 'throws') throw new Error('late')
        })
        t.ok((await app.inject(keyed)).statusCode >= 200, 'its client need not wait')
        t.equal(codeOf(await app.inject(keyed)), 'FST_IDEMPOTENCY_IN_PROGRESS')
        leave.open()
        await ended.promise
        await until(async () => (await app.inject(keyed)).body === 'again')
        t.equal(most, 1)
      })
    }
  }
})
