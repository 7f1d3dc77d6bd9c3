import type { FastifyInstance, FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import { othersHook } from '../../lib/http/hooks-of-others.js'
import { LARGE } from '../../lib/http/replay.js'
import { build, inject, REPLAYED } from '../support/app.js'

/* What is done for the eyes of others' hooks is done only where there are some. It rests on what Fastify keeps to itself. */

/** Large enough to be sent as bytes. */
const REPLY = { text: 'zwölf €'.repeat(LARGE / 8) }

interface Setup {
  before?: (app: FastifyInstance) => unknown
  route?: object
}

/** Sends a request and its repetition, and tells what was seen on the way. */
async function serve(t: Test, { before = () => {}, route = {} }: Setup) {
  const app = await build(t)
  await before(app)
  const seen = { isWatched: false, written: [] as unknown[] }
  // Behind the plugin's first hook, and before the body is read.
  app.addHook('preParsing', async (request, reply) => {
    seen.isWatched = Object.getOwnPropertyDescriptor(request, 'body')?.get !== undefined
    const { raw } = reply
    const { end } = raw
    raw.end = (...args: unknown[]) => {
      seen.written.push(args[0])
      return Reflect.apply(end, raw, args)
    }
  })
  app.post('/', { config: { idempotency: true }, ...route }, async () => REPLY)
  const send = () =>
    inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' }, payload: { amount: 1 } })
  const first = await send()
  const again = await send()
  t.equal(again.headers[REPLAYED], 'true')
  t.equal(again.payload, first.payload)
  t.strictSame(again.rawPayload, first.rawPayload)
  t.equal(again.headers['content-type'], first.headers['content-type'])
  t.equal(again.headers['content-length'], first.headers['content-length'])
  return seen
}

const hook = async () => {}
const isText = ({ written }: { written: unknown[] }) => typeof written[1] === 'string'

t.test(
  'where no hook can see it, the body is not watched, and a large replay is sent as the bytes that are stored',
  async (t) => {
    const seen = await serve(t, {})
    t.notOk(seen.isWatched)
    t.notOk(isText(seen))
  }
)

t.test('a preValidation hook, wherever it was added, has the body watched until then', async (t) => {
  for (const setup of [
    { before: (app: FastifyInstance) => app.addHook('preValidation', hook) },
    { route: { preValidation: hook } },
    { route: { preValidation: [hook] } }
  ]) {
    t.ok((await serve(t, setup)).isWatched)
  }
})

t.test('an onSend hook, wherever it was added, sees a replay as the text that it was', async (t) => {
  const payloads: unknown[] = []
  const onSend = async (_request: FastifyRequest, _reply: unknown, payload: unknown) => void payloads.push(payload)
  const instance = await serve(t, { before: (app) => app.addHook('onSend', onSend as never) })
  const route = await serve(t, { route: { onSend } })
  t.strictSame(payloads, Array(4).fill(JSON.stringify(REPLY)))
  t.ok(isText(instance))
  t.ok(isText(route))
})

t.test('where Fastify shows nothing of its hooks, there may be others', async (t) => {
  const app = await build(t)
  let kContext: symbol | undefined
  app.post('/', { config: { idempotency: true } }, async (request) => {
    kContext = Object.getOwnPropertySymbols(request).find(({ description }) => description === 'fastify.context')
    return othersHook(request, 'onSend')
  })
  t.equal((await inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })).payload, 'false')
  const looking = (context: unknown) => othersHook({ [kContext as symbol]: context } as never, 'onSend')
  for (const context of [undefined, {}, { onSend: null }, { onSend: [] }, { onSend: new Set([hook]) }]) {
    t.ok(looking(context))
  }
  t.notOk(looking({ onSend: [hook] }))
  t.ok(othersHook({} as never, 'onSend'))
})
