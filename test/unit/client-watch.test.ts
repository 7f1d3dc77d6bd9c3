import { EventEmitter } from 'node:events'
import t from 'tap'
import { stop, watchClient } from '../../lib/http/client-close.js'
import { Exchange } from '../../lib/http/exchange.js'
import type { Operation } from '../../lib/operation/operation.js'

/** A request whose claim notes what is done to it, on a connection of its own or one that is shared. */
function arrival({ socket = new EventEmitter(), queued = false } = {}) {
  const calls: string[] = []
  const operation = {
    fingerprint: 'f',
    cancel: async () => void calls.push('cancel'),
    release: async () => void calls.push('release'),
    complete: async ({ kind, reason }: { kind: string; reason: string }) => void calls.push(`${kind}: ${reason}`)
  }
  const raw = Object.assign(new EventEmitter(), {
    req: { socket },
    socket: queued ? null : socket,
    statusCode: 200,
    writableEnded: false
  })
  const request = { socket, raw: {} }
  const reply = {
    raw,
    request,
    sent: false,
    statusCode: 200,
    getHeaders: () => ({}),
    hijack: () => calls.push('hijack')
  }
  const exchange = new Exchange(operation as unknown as Operation, reply as never)
  watchClient(exchange)
  return { calls, exchange, raw, reply, socket }
}

t.test('a client that leaves before its handler starts gives the key back', async (t) => {
  const { calls, exchange, raw } = arrival()
  t.strictSame(calls, [])
  raw.emit('close')
  t.strictSame(calls, ['cancel'])
  t.equal(exchange.clientGone, false)
})

t.test('a client that leaves while its handler is at work changes nothing', async (t) => {
  for (const handler of ['started', 'detached', 'settled'] as const) {
    const { calls, exchange, raw } = arrival()
    exchange.handler = handler
    raw.emit('close')
    t.equal(exchange.clientGone, true)
    t.strictSame(calls, [])
  }
})

t.test('a handler that writes past Fastify to a client that has left leaves a tombstone at its end', async (t) => {
  const { calls, exchange, raw } = arrival()
  exchange.handler = 'started'
  raw.emit('close')
  raw.writableEnded = true
  raw.emit('prefinish')
  t.strictSame(calls, ['tombstone: hijacked'])
})

t.test('a response that was ended past Fastify is a tombstone, or no reply if it was that of a failure', async (t) => {
  for (const failed of [false, true]) {
    const { calls, exchange, raw } = arrival()
    Object.assign(exchange, { handler: 'started', failed })
    raw.writableEnded = true
    raw.emit('close')
    t.strictSame(calls, [failed ? 'release' : 'tombstone: hijacked'])
  }
})

t.test('a failure whose response was not ended is not given back: its handler may be at work', async (t) => {
  const { calls, exchange, raw } = arrival()
  Object.assign(exchange, { handler: 'started', failed: true })
  raw.emit('close')
  t.strictSame(calls, [])
})

t.test('a hijacked reply whose client has left is a tombstone', async (t) => {
  const { calls, exchange, raw, reply } = arrival()
  exchange.handler = 'started'
  reply.sent = true
  raw.emit('close')
  t.strictSame(calls, ['tombstone: hijacked'])
})

t.test('a response that the reply has left behind is of no account', async (t) => {
  const { calls, exchange, raw, reply } = arrival()
  reply.raw = Object.assign(new EventEmitter(), { ...raw }) as never
  raw.emit('close')
  exchange.handler = 'started'
  raw.emit('close')
  t.strictSame([calls, exchange.clientGone], [[], false])
})

t.test('a stream that nobody reads any more is told so, and what was sent as a whole is not touched', async (t) => {
  for (const sending of ['storing', 'passed'] as const) {
    const { calls, exchange, raw } = arrival()
    let destroyed = 0
    const stream = sending === 'passed' ? { destroy: () => destroyed++ } : null
    Object.assign(exchange, { handler: 'settled', sending, stream })
    raw.emit('close')
    t.strictSame([calls, destroyed, exchange.clientGone], [[], stream === null ? 0 : 1, false])
  }
})

t.test('the end of a connection is told to all whose responses wait behind another on it, once', async (t) => {
  const socket = new EventEmitter()
  const first = arrival({ socket })
  t.equal(socket.listenerCount('close'), 0, 'the first has the connection, and is told by its response')
  const waiting = [arrival({ socket, queued: true }), arrival({ socket, queued: true })] as const
  const over = arrival({ socket, queued: true })
  t.equal(socket.listenerCount('close'), 1)
  over.raw.emit('close')
  t.strictSame(over.calls, ['cancel'])
  const elsewhere = arrival({ queued: true })
  socket.emit('close')
  t.strictSame(
    [first, ...waiting, over, elsewhere].map(({ calls }) => calls.length),
    [0, 1, 1, 1, 0]
  )
  t.equal(socket.listenerCount('close'), 0)
})

t.test('a response that knows no request, as one of a test, is watched as well', async (t) => {
  for (const req of [undefined, { socket: null }]) {
    const { calls, raw } = arrival()
    Object.assign(raw, { req })
    raw.emit('close')
    t.strictSame(calls, ['cancel'])
  }
})

t.test('where nobody is there to answer, the reply counts as sent', async (t) => {
  const { calls, reply } = arrival()
  stop(reply as never)
  t.strictSame(calls, ['hijack'])
})
