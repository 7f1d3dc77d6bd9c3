import websocket from '@fastify/websocket'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import idempotency from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

/** An app whose plugin covers all that it may cover, with an echo over a web socket. */
async function server(t: Test, order: Order) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency, { global: true, methods: ['POST', 'PUT', 'PATCH', 'DELETE'], required: true }),
    () => app.register(websocket)
  )
  let runs = 0
  app.get('/ws', { websocket: true }, (socket, request) => {
    runs++
    socket.on('message', (data: Buffer) => socket.send(`${request.idempotency} ${data}`))
  })
  app.route({
    method: 'GET',
    url: '/both',
    handler: async () => 'plain',
    wsHandler: (socket) => {
      socket.on('message', (data: Buffer) => socket.send(`both ${data}`))
    }
  })
  app.post('/', async () => ({ run: ++runs }))
  await app.ready()
  const echo = async (path: string, message: string) => {
    const socket = await app.injectWS(path, { headers: { 'idempotency-key': 'key' } })
    const answer = new Promise<string>((resolve) => socket.once('message', (data: Buffer) => resolve(String(data))))
    socket.send(message)
    try {
      return await answer
    } finally {
      socket.terminate()
    }
  }
  return { app, echo, runs: () => runs }
}

for (const order of orders) {
  t.test(`web sockets are left alone, registered ${order} @fastify/websocket`, async (t) => {
    const { app, echo, runs } = await server(t, order)
    t.equal(await echo('/ws', 'one'), 'null one')
    t.equal(await echo('/ws', 'two'), 'null two', 'with the same key')
    t.equal(runs(), 2)
    t.equal(await echo('/both', 'one'), 'both one')
    t.equal((await app.inject('/both')).body, 'plain')
    t.equal(await app.idempotency.get('key'), null)
    t.notOk(isReplay(await post(app, { key: 'post' })))
    t.ok(isReplay(await post(app, { key: 'post' })), 'and other routes are covered')
  })
}

t.test('a web socket that asks to be covered is an error at boot', async (t) => {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(websocket)
  await app.register(idempotency)
  t.throws(() => app.get('/ws', { websocket: true, config: { idempotency: true } }, () => {}), {
    code: 'FST_IDEMPOTENCY_INVALID_OPTION',
    message: /GET \/ws takes no route that has safe methods only/
  })
})
