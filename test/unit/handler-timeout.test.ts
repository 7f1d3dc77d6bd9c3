import { EventEmitter } from 'node:events'
import { IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyReply } from 'fastify'
import t from 'tap'
import { NowhereResponse } from '../../lib/http/discarding-response.js'
import { Exchange, kExchange } from '../../lib/http/exchange.js'
import {
  goOnNowhere,
  inNameOf,
  interrupt,
  isOf,
  mayBeOf,
  passNothing,
  passTimeout,
  settle
} from '../../lib/http/handler-timeout.js'
import type { Operation } from '../../lib/operation/operation.js'

/** A handler that has set a status and a header when its time is up. */
function late() {
  const calls: string[] = []
  const operation = {
    fingerprint: 'f',
    policy: { shouldStore: (_request: unknown, { raw }: FastifyReply) => raw.statusCode < 500 },
    release: async () => void calls.push('release'),
    complete: async ({ reason }: { reason: string }) => void calls.push(reason)
  }
  let headers: Record<string, string> = { 'x-of': 'handler' }
  const request = { raw: new IncomingMessage(new Socket()), log: { error: () => {} } } as Record<PropertyKey, unknown>
  const fastifys = {
    send(this: unknown, payload: unknown) {
      calls.push(`send ${payload}`)
      return this
    },
    header(name: string, value: string) {
      headers = { ...headers, [name]: value }
    }
  }
  const reply = Object.assign(Object.create(fastifys), {
    raw: Object.assign(new EventEmitter(), { statusCode: 202 }),
    request,
    getHeaders: () => ({ ...headers }),
    removeHeader: (name: string) => {
      const { [name]: _gone, ...others } = headers
      headers = others
    }
  })
  Object.defineProperty(reply, 'statusCode', { get: () => reply.raw.statusCode })
  const exchange = new Exchange(operation as unknown as Operation, reply)
  request[kExchange] = exchange
  exchange.handler = 'started'
  const timeout = interrupt(reply)
  exchange.timeout = timeout
  return {
    calls,
    exchange,
    reply,
    timeout,
    headers: () => headers,
    raw: reply.raw as EventEmitter & FastifyReply['raw']
  }
}

/** The timeout's own reply leaves: with its status and headers, until its response is over. */
function answered(scene: ReturnType<typeof late>) {
  const { exchange, raw, reply, timeout } = scene
  raw.statusCode = 503
  reply.removeHeader('x-of')
  reply.header('retry-after', '1')
  passTimeout(exchange, timeout)
  return scene
}

t.test('what the handler had set is remembered', async (t) => {
  const { timeout } = late()
  t.match(timeout, { statusCode: 202, headers: { 'x-of': 'handler' }, isOver: false, statusSet: null })
})

t.test('what answers in its name is told from all else, however long it takes', async (t) => {
  const [a, b] = [late(), late()]
  t.equal(isOf(a.timeout), false)
  const seen: boolean[][] = []
  const look = () => seen.push([isOf(a.timeout), isOf(b.timeout)])
  await new Promise<void>((resolve) => {
    inNameOf(a.timeout, async () => {
      look()
      await turn()
      look()
      resolve()
    })
  })
  look()
  t.strictSame(seen, [
    [true, false],
    [true, false],
    [false, false]
  ])
  for (const { exchange, timeout } of [a, b]) settle(exchange, timeout)
})

t.test('when all overdue handlers have replied nothing is told apart any more, which costs something', async (t) => {
  const [a, b, another] = [late(), late(), late()]
  inNameOf(b.timeout, () => {})
  inNameOf(a.timeout, () => {
    goOnNowhere(b.exchange, b.timeout)
    b.reply.raw.end()
    settle(another.exchange, another.timeout)
    t.equal(isOf(a.timeout), true, 'this one has not')
    settle(a.exchange, a.timeout)
    t.equal(isOf(a.timeout), false)
  })
  inNameOf(b.timeout, () => t.equal(isOf(b.timeout), true, 'the next one is told apart again'))
  settle(b.exchange, b.timeout)
  t.equal(b.exchange.timeout, null)
})

t.test("the timeout's reply is over when its response is about to end, has ended, or was closed", async (t) => {
  for (const event of ['prefinish', 'finish', 'close']) {
    const { exchange, headers, raw, timeout } = answered(late())
    t.equal(exchange.sending, 'passed')
    t.equal(timeout.isOver, false)
    t.strictSame(headers(), { 'retry-after': '1' })
    raw.emit(event)
    t.equal(timeout.isOver, true)
    t.strictSame(headers(), { 'x-of': 'handler' }, 'as the handler had left them')
    await timeout.over
  }
})

t.test('it is over once', async (t) => {
  const { headers, raw, reply } = answered(late())
  raw.emit('prefinish')
  reply.header('x-since', '1')
  raw.emit('finish')
  raw.emit('close')
  t.strictSame(headers(), { 'x-of': 'handler', 'x-since': '1' })
})

t.test('a handler that goes on before is not interrupted again', async (t) => {
  const { exchange, headers, raw, timeout } = answered(late())
  goOnNowhere(exchange, timeout)
  raw.emit('finish')
  t.equal(timeout.isOver, false)
  t.strictSame(headers(), { 'retry-after': '1' })
})

t.test('to a client that is gone already it is over in a moment, and may be told so twice', async (t) => {
  const { exchange, raw, timeout } = late()
  passNothing(exchange, timeout)
  t.equal(timeout.isOver, false)
  await turn()
  t.equal(timeout.isOver, true)
  passNothing(exchange, timeout)
  raw.statusCode = 418
  t.equal(timeout.statusSet, 418)
})

t.test("the response keeps the timeout's status, and what the handler sets since is remembered", async (t) => {
  const { raw, timeout } = answered(late())
  raw.statusCode = 503
  t.equal(timeout.statusSet, null, 'Node sets it once more')
  raw.statusCode = 201
  t.equal(raw.statusCode, 503)
  t.equal(timeout.statusSet, 201)
  raw.emit('finish')
  raw.statusCode = 503
  t.equal(timeout.statusSet, 503, 'now it can only be the handler')
})

t.test("a status that is set in the timeout's name is that of its reply, and none of the handler's", async (t) => {
  const { raw, timeout } = answered(late())
  for (const status of [504, 503]) {
    inNameOf(timeout, () => {
      raw.statusCode = status
    })
    t.equal(raw.statusCode, status)
    t.equal(timeout.statusSet, null)
    raw.emit('finish')
  }
})

t.test('what the handler sends afterwards takes the usual way, on a response that leads nowhere', async (t) => {
  const { calls, exchange, raw, reply } = answered(late())
  raw.emit('finish')
  Object.assign(exchange, { failed: true })
  const { send } = reply
  t.equal(reply.send('late'), reply)
  t.strictSame(calls, ['send late'])
  t.ok(reply.raw instanceof NowhereResponse)
  t.equal(reply.raw.statusCode, 202)
  t.match(exchange, { timeout: null, sending: 'no', failed: false })
  const nowhere = reply.raw
  send.call(reply, 'again')
  t.strictSame(calls, ['send late', 'send again'])
  t.equal(reply.raw, nowhere, 'the same one')
})

t.test("what it sends while the timeout's reply is still leaving waits for the end of that", async (t) => {
  const { calls, exchange, raw, reply } = answered(late())
  t.equal(reply.send('late'), reply)
  t.equal(reply.send('again'), reply)
  await turn()
  t.strictSame(calls, [])
  t.equal(reply.raw, raw)
  raw.emit('finish')
  await turn()
  t.strictSame(calls, ['send late', 'send again'])
  t.ok(reply.raw instanceof NowhereResponse)
  t.equal(exchange.timeout, null)
})

t.test('what cannot be sent then is an error that is sent', async (t) => {
  const { calls, raw, reply } = answered(late())
  reply.send('late')
  const { send } = Object.getPrototypeOf(reply)
  Object.getPrototypeOf(reply).send = function (payload: unknown) {
    if (payload === 'late') throw new Error('no serialiser')
    return send.call(this, payload)
  }
  raw.emit('finish')
  await turn()
  t.strictSame(calls, ['send Error: no serialiser'])
})

t.test("what is sent in the timeout's name is sent at once, and is no reply of the handler", async (t) => {
  for (const isOver of [false, true]) {
    const { calls, exchange, raw, reply, timeout } = answered(late())
    if (isOver) raw.emit('finish')
    inNameOf(timeout, () => t.equal(reply.send('error'), reply))
    t.strictSame(calls, ['send error'])
    t.equal(exchange.timeout, timeout)
    t.equal(reply.raw, raw)
  }
  const { calls, reply } = answered(late())
  inNameOf(late().timeout, () => reply.send('late'))
  t.strictSame(calls, [], "in another request's it waits, as all that a handler sends")
})

t.test('a status that the handler has set since is that of its reply', async (t) => {
  const { raw, reply } = answered(late())
  raw.emit('finish')
  raw.statusCode = 404
  reply.send('late')
  t.equal(reply.raw.statusCode, 404)
})

t.test('a late reply that Fastify has not brought to onSend ends the claim by its status', async (t) => {
  for (const [change, status, call] of [
    [{}, 202, 'hijacked'],
    [{}, 500, 'release'],
    [{ failed: true, error: { statusCode: 409 } }, 200, 'hijacked'],
    [{ failed: true, error: new Error('x') }, 200, 'release'],
    [{ error: { statusCode: 500 } }, 200, 'hijacked']
  ] as const) {
    const { calls, exchange, reply, timeout } = answered(late())
    goOnNowhere(exchange, timeout)
    Object.assign(exchange, change)
    reply.raw.statusCode = status
    reply.raw.end()
    t.strictSame(calls, [call])
  }
})

t.test('a late reply that was stored on its way has ended its claim', async (t) => {
  for (const sending of ['storing', 'passed'] as const) {
    const { calls, exchange, reply, timeout } = answered(late())
    goOnNowhere(exchange, timeout)
    exchange.sending = sending
    reply.raw.end()
    t.strictSame(calls, [])
  }
})

/* Between the moment at which the time is up, and the one at which the timeout's reply is on its way */

t.test('a 503 that has come without its context is the timeout’s, unless it may be the handler’s', async (t) => {
  for (const [of, status, handler, expected] of [
    [{}, 503, 'started', true],
    [{ isAnswered: true, ownStatus: 503 }, 503, 'started', true],
    [{ isAnswered: true, ownStatus: 503 }, 503, 'detached', true],
    [{}, 504, 'started', false],
    [{ isAnswered: true, ownStatus: 504 }, 504, 'started', false],
    [{ isAnswered: true, ownStatus: 503 }, 503, 'settled', false],
    [{ isJoined: true }, 503, 'started', true],
    [{ isJoined: true }, 503, 'settled', false],
    [{ isJoined: true, ownStatus: 503 }, 503, 'started', false],
    [{ isJoined: true, isAnswered: true }, 503, 'started', false],
    [{ isJoined: true, isAnswered: true, ownStatus: 503 }, 503, 'started', false]
  ] as const) {
    const { exchange, raw, timeout } = late()
    raw.statusCode = status
    Object.assign(timeout, of)
    exchange.handler = handler
    t.equal(mayBeOf(timeout, exchange), expected, JSON.stringify([of, status, handler]))
  }
})

t.test('a status that the handler sets meanwhile is not that of the timeout’s reply', async (t) => {
  for (const own of [504, null]) {
    const { exchange, raw, timeout } = late()
    inNameOf(timeout, () => {
      if (own !== null) raw.statusCode = own
    })
    raw.statusCode = 201
    t.equal(raw.statusCode, 201)
    inNameOf(timeout, () => passTimeout(exchange, timeout))
    t.equal(raw.statusCode, own ?? 201)
    t.equal(timeout.statusSet, 201)
    raw.emit('finish')
    goOnNowhere(exchange, timeout)
    t.equal(exchange.reply.raw.statusCode, 201)
  }
})

t.test('a header that the handler sets meanwhile has mixed with those of the timeout', async (t) => {
  for (const [set, isMixed] of [
    [() => {}, false],
    [({ reply, timeout }: ReturnType<typeof late>) => inNameOf(timeout, () => void reply.header('x-of', 't')), false],
    [({ reply }: ReturnType<typeof late>) => void reply.header('x-of', 'h'), true],
    [({ reply }: ReturnType<typeof late>) => void reply.send('late'), true]
  ] as const) {
    const scene = late()
    const { exchange, headers, reply, timeout } = scene
    set(scene)
    t.equal(timeout.isMixed, isMixed)
    if (set.length > 0 && headers()['x-of'] !== 'handler') t.match(headers()['x-of'], /^[th]$/)
    inNameOf(timeout, () => passTimeout(exchange, timeout))
    reply.header('x-since', '1')
    t.equal(timeout.isMixed, isMixed, 'what is set from then on is lost, which is another matter')
    t.equal(Object.hasOwn(reply, 'header'), false)
    goOnNowhere(exchange, timeout)
    t.equal(exchange.isMixed, isMixed)
  }
})

t.test('what was set by an error handler that lost its context is the timeout’s', async (t) => {
  const { exchange, raw, reply, timeout } = late()
  raw.statusCode = 503
  reply.header('retry-after', '1')
  passTimeout(exchange, timeout)
  t.match(timeout, { statusSet: null, isMixed: false })
})

t.test('a client that leaves changes nothing of what the handler has set', async (t) => {
  const { exchange, raw, reply, timeout } = late()
  raw.statusCode = 201
  reply.header('location', '/1')
  passNothing(exchange, timeout)
  t.match(timeout, { statusSet: 201, isMixed: true })
})

t.test('what is sent meanwhile is sent, and by whom is known', async (t) => {
  const ours = late()
  inNameOf(ours.timeout, () => t.equal(ours.reply.send('slow'), ours.reply))
  t.strictSame(ours.calls, ['send slow'])
  t.match(ours.timeout, { isAnswered: true, isJoined: false, isMixed: false })
  const theirs = late()
  t.equal(theirs.reply.send('late'), theirs.reply)
  t.strictSame(theirs.calls, ['send late'])
  t.match(theirs.timeout, { isAnswered: false, isJoined: true, isMixed: true })
  const neither = late()
  neither.exchange.timeout = null
  neither.reply.send('late')
  t.strictSame(neither.calls, ['send late'])
})

t.test('what the handler sends when its reply was hijacked in its name waits, and ends its claim', async (t) => {
  for (const [payload, status, call] of [
    ['late', 202, 'hijacked'],
    [Object.assign(new Error('no'), { statusCode: 409 }), 202, 'hijacked'],
    [new Error('no'), 202, 'release'],
    ['late', 500, 'release']
  ] as const) {
    const { calls, raw, reply, timeout, exchange } = late()
    Object.assign(reply, { sent: true })
    reply.send(payload)
    t.strictSame(calls, [])
    t.equal(timeout.isMixed, false)
    inNameOf(timeout, () => passTimeout(exchange, timeout))
    raw.emit('finish')
    raw.statusCode = status
    await turn()
    t.strictSame(calls, [call, `send ${payload}`])
  }
})

t.test('what an error handler does when the handler has replied comes too late', async (t) => {
  const { calls, exchange, headers, raw, reply, timeout } = answered(late())
  raw.emit('finish')
  goOnNowhere(exchange, timeout)
  inNameOf(timeout, () => {
    reply.raw.statusCode = 504
    t.equal(reply.header('x-of', 'timeout'), reply)
    t.equal(reply.send('slow'), reply)
  })
  t.equal(reply.raw.statusCode, 202)
  t.strictSame([headers(), calls], [{ 'x-of': 'handler' }, []])
  reply.raw.statusCode = 201
  reply.header('x-of', 'late')
  reply.send('late')
  t.equal(reply.raw.statusCode, 201)
  t.strictSame([headers(), calls], [{ 'x-of': 'late' }, ['send late']])
})
