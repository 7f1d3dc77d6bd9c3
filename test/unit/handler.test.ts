import { EventEmitter } from 'node:events'
import { IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import t from 'tap'
import { Exchange, kExchange } from '../../lib/http/exchange.js'
import { type Handler, protect } from '../../lib/http/handler.js'
import type { Operation } from '../../lib/operation/operation.js'

/** What Fastify gives a handler, and what a handler makes of its claim and its reply. */
function scene({ starts = () => true, phase = 'held' }: { starts?: () => boolean; phase?: string } = {}) {
  const calls: string[] = []
  const logged: unknown[][] = []
  const operation = {
    fingerprint: 'f',
    phase,
    policy: { shouldStore: (_request: unknown, { raw }: { raw: { statusCode: number } }) => raw.statusCode < 500 },
    start: starts,
    release: async () => void calls.push('release'),
    complete: async ({ reason }: { reason: string }) => void calls.push(reason)
  }
  const log = { warn: (...args: unknown[]) => logged.push(args), error: (...args: unknown[]) => logged.push(args) }
  const request = { raw: new IncomingMessage(new Socket()), log, routeOptions: {} } as Record<PropertyKey, unknown>
  let over = () => {}
  const fastifys = {
    send(this: unknown, payload: unknown) {
      calls.push(`send ${payload}`)
      return this
    },
    // biome-ignore lint/suspicious/noThenProperty: a reply is a thenable.
    then(fulfilled: () => void) {
      over = fulfilled
    }
  }
  const reply = Object.assign(Object.create(fastifys), {
    raw: Object.assign(new EventEmitter(), { statusCode: 200, destroyed: false }),
    request,
    log,
    sent: false,
    getHeaders: () => ({ 'x-before': '1' }),
    header: () => {},
    removeHeader: () => {},
    hijack: () => calls.push('hijack')
  })
  Object.defineProperty(reply, 'statusCode', { get: () => reply.raw.statusCode })
  const exchange = new Exchange(operation as unknown as Operation, reply)
  request[kExchange] = exchange
  const instance = {}
  const refuse = (_request: unknown, _reply: unknown, error: unknown) => new Error('refused', { cause: error })
  const run = (handler: (...args: Parameters<Handler>) => unknown): unknown =>
    protect(handler as Handler, refuse as never).call(instance as never, request as never, reply)
  return { calls, exchange, instance, logged, reply, request, run, isOver: () => over() }
}

/** A handler that is at work, and how it ends. */
function atWork(s: ReturnType<typeof scene>) {
  let end!: (value?: unknown) => void
  let fail!: (error: unknown) => void
  const work = new Promise((resolve, reject) => {
    end = resolve
    fail = reject
  })
  const done = s.run(() => work)
  return { done, end, fail }
}

t.test('a request without a claim goes to its handler as if there were no plugin', async (t) => {
  for (const s of [scene({ phase: 'unprotected' }), scene()]) {
    if (s.exchange.operation.phase === 'held') s.request[kExchange] = null
    const reply = s.run(function (this: unknown, request, reply) {
      t.equal(this, s.instance)
      t.equal(request, s.request)
      return reply
    })
    t.equal(reply, s.reply)
    t.equal(s.exchange.handler, 'waiting')
    t.equal(Object.hasOwn(s.reply, 'then'), false)
  }
})

t.test('a handler whose client has left does not start', async (t) => {
  const s = scene({ starts: () => false })
  t.equal(
    s.run(() => t.fail('it ran')),
    undefined
  )
  t.strictSame(s.calls, ['hijack'])
  t.equal(s.exchange.handler, 'waiting')
})

t.test('a claim that was lost before the handler refuses the request', async (t) => {
  const lost = new Error('lost')
  const s = scene({
    starts: () => {
      throw lost
    }
  })
  t.throws(() => s.run(() => t.fail('it ran')), { message: 'refused', cause: lost })
})

t.test('the handler finds itself started, and the headers before it are remembered', async (t) => {
  const s = scene()
  s.run(function (this: unknown, request, reply) {
    t.equal(this, s.instance)
    t.same([request, reply], [s.request, s.reply])
    t.equal(s.exchange.handler, 'started')
    t.match(s.exchange.headersBefore, { 'x-before': '1' })
  })
})

t.test('who returns nothing, or the reply, sends from elsewhere', async (t) => {
  for (const result of ['nothing', 'reply']) {
    const s = scene()
    t.equal(
      s.run(() => (result === 'reply' ? s.reply : undefined)),
      undefined
    )
    t.equal(s.exchange.handler, 'detached')
  }
})

t.test('a value is passed on to Fastify, at once or by a promise', async (t) => {
  for (const value of [null, 0, '', 'x', {}]) {
    const s = scene()
    t.equal(
      s.run(() => value),
      value
    )
    t.equal(s.exchange.handler, 'settled')
    const { exchange, run } = scene()
    const promised = run(async () => value)
    t.equal(exchange.handler, 'started')
    t.equal(await promised, value)
    t.equal(exchange.handler, 'settled')
  }
})

t.test('an error is passed on to Fastify, at once or by a promise', async (t) => {
  const error = new Error('x')
  const s = scene()
  t.throws(
    () =>
      s.run(() => {
        throw error
      }),
    error
  )
  t.equal(s.exchange.handler, 'failed')
  const { exchange, logged, run } = scene()
  await t.rejects(
    run(async () => {
      throw error
    }) as Promise<unknown>,
    error
  )
  t.equal(exchange.handler, 'failed')
  t.strictSame(logged, [])
})

t.test('a thenable that is no promise does its work once', async (t) => {
  let works = 0
  // biome-ignore lint/suspicious/noThenProperty: that is what this is about.
  const thenable = { then: (fulfilled: (value: unknown) => void) => fulfilled(++works) }
  const done = scene().run(() => thenable) as Promise<unknown>
  t.same([await done, await done, works], [1, 1, 1])
})

/** Whoever gets the reply waits for its end, as for any thenable. Resolves when that has been seen. */
async function givesReply({ isOver }: ReturnType<typeof scene>, done: unknown): Promise<boolean> {
  let isSettled = false
  const settled = Promise.resolve(done).then(() => {
    isSettled = true
  })
  await new Promise((resolve) => setImmediate(resolve))
  const waits = !isSettled
  isOver()
  await settled
  return waits
}

t.test('what is returned after a reply was sent is not sent, and warned of where it is something', async (t) => {
  for (const sending of ['storing', 'passed'] as const) {
    for (const value of [undefined, 'x', null]) {
      const s = scene()
      const { done, end } = atWork(s)
      s.exchange.sending = sending
      end(value)
      t.equal(await givesReply(s, done), true)
      t.equal(s.exchange.handler, 'settled')
      t.match(s.logged, value === undefined ? [] : [['handler returned a value after its reply was sent']])
      t.equal(s.logged.length, value === undefined ? 0 : 1)
    }
  }
})

t.test('who was told that the reply is over, and sent nothing, sends from elsewhere', async (t) => {
  for (const [value, sent] of [
    [undefined, false],
    [undefined, true],
    ['x', false]
  ] as const) {
    const s = scene()
    const done = s.run(async () => {
      await s.reply
      s.reply.sent = sent
      return value
    })
    await Promise.resolve()
    s.isOver()
    await new Promise((resolve) => setImmediate(resolve))
    t.equal(s.exchange.toldOver, true)
    const isDetached = value === undefined && !sent
    t.equal(s.exchange.handler, isDetached ? 'detached' : 'settled')
    if (isDetached) t.equal(await givesReply(s, done), true)
    else t.equal(await done, value)
  }
})

t.test('nothing for a client that is gone is an empty reply, which Fastify would not send', async (t) => {
  for (const gone of ['noticed', 'not noticed yet', 'no']) {
    for (const value of [undefined, 'x']) {
      const s = scene()
      const { done, end } = atWork(s)
      if (gone === 'noticed') s.exchange.clientGone = true
      if (gone === 'not noticed yet') s.reply.raw.destroyed = true
      end(value)
      const isSent = gone !== 'no' && value === undefined
      t.equal(isSent ? await givesReply(s, done) : await done, isSent ? true : value)
      t.strictSame(s.calls, isSent ? ['send undefined'] : [])
      t.equal(s.exchange.handler, 'settled')
    }
  }
})

t.test('a reply that was hijacked for a client that is gone is a tombstone', async (t) => {
  const s = scene()
  const { done, end } = atWork(s)
  Object.assign(s.exchange, { clientGone: true })
  s.reply.sent = true
  end()
  t.equal(await done, undefined)
  t.strictSame(s.calls, ['hijacked'])
})

/* After its time */

t.test('an error after a reply was sent is logged, and changes nothing', async (t) => {
  for (const sending of ['storing', 'passed'] as const) {
    const s = scene()
    const { done, fail } = atWork(s)
    s.exchange.sending = sending
    const error = new Error('x')
    fail(error)
    t.equal(await givesReply(s, done), true)
    t.strictSame(s.calls, [])
    t.strictSame(s.logged, [[{ err: error }, 'handler failed after its reply was sent']])
  }
})
