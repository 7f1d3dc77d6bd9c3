import { Readable } from 'node:stream'
import { brotliDecompressSync, gunzipSync, gzipSync } from 'node:zlib'
import compress from '@fastify/compress'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type StoredReply } from '../../index.js'
import { isReplay, type Order, orders, post, register } from './kit.js'

const text = 'All work and no play makes Jack a dull boy. '.repeat(100)

const decoders: Record<string, (bytes: Buffer) => Buffer> = {
  gzip: (bytes) => gunzipSync(bytes),
  br: (bytes) => brotliDecompressSync(bytes),
  identity: (bytes) => bytes
}

/** What handlers reply: each has the same bytes every time. */
const replies: Record<string, () => unknown> = {
  string: () => text,
  object: () => ({ text }),
  buffer: () => Buffer.from(text),
  'node-stream': () => Readable.from([text.slice(0, 1000), text.slice(1000)]),
  'web-stream': () => new Blob([text]).stream(),
  Response: () => new Response(text, { status: 202, headers: { 'content-type': 'text/plain' } })
}

async function server(t: Test, order: Order, { global = true } = {}) {
  const app = Fastify()
  t.teardown(() => app.close())
  await register(
    order,
    () => app.register(idempotency),
    () => app.register(compress, { threshold: 0, global })
  )
  let runs = 0
  const config = { idempotency: true }
  for (const [name, make] of Object.entries(replies)) {
    const own = global ? {} : { compress: { threshold: 0 } }
    app.post(`/${name}`, { config, ...own }, async (_request, reply) => {
      runs++
      reply.type('text/plain')
      if (name === 'object') reply.type('application/json')
      return make()
    })
  }
  app.post<{ Body: unknown }>('/echo', { config }, async (request) => ({ run: ++runs, body: request.body }))
  const ask = async (url: string, encoding: string, key: string) => {
    const reply = await post(app, { url, key, headers: { 'accept-encoding': encoding } })
    const used = String(reply.headers['content-encoding'] ?? 'identity')
    return { reply, used, body: decoders[used]?.(reply.rawPayload) }
  }
  return { app, ask, runs: () => runs }
}

for (const order of orders) {
  for (const global of [true, false]) {
    t.test(`registered ${order} @fastify/compress, for ${global ? 'all routes' : 'one route'}`, async (t) => {
      for (const name of Object.keys(replies)) {
        t.test(`a ${name} is stored uncompressed, and each replay is encoded as its own request asks`, async (t) => {
          for (const firstEncoding of Object.keys(decoders)) {
            const { app, ask, runs } = await server(t, order, { global })
            const url = `/${name}`
            const first = await ask(url, firstEncoding, 'key')
            t.equal(first.used, firstEncoding)
            t.notOk(isReplay(first.reply))

            const { record } = (await app.idempotency.get('key')) as { record: StoredReply }
            const expected = name === 'object' ? JSON.stringify({ text }) : text
            t.equal(record.body.toString(), expected)
            const names = record.headers.map(([header]) => header)
            for (const header of ['content-encoding', 'vary']) t.notOk(names.includes(header), header)

            for (const encoding of Object.keys(decoders)) {
              const replay = await ask(url, encoding, 'key')
              t.ok(isReplay(replay.reply))
              t.equal(replay.used, encoding, `${firstEncoding} first, then ${encoding}`)
              t.equal(replay.reply.statusCode, first.reply.statusCode)
              t.equal(replay.body?.toString(), expected)
              t.same(replay.body, first.body, 'the same bytes')
              t.equal(replay.reply.headers['content-type'], first.reply.headers['content-type'])
            }
            t.equal(runs(), 1)
          }
        })
      }
    })
  }

  t.test(
    `registered ${order} @fastify/compress, a retry that compresses its own body is the same request`,
    async (t) => {
      const { app, runs } = await server(t, order)
      const payload = JSON.stringify({ amount: 1 })
      const type = { 'content-type': 'application/json' }
      const first = await post(app, { url: '/echo', key: 'key', headers: type, payload })
      t.match(first.json(), { run: 1, body: { amount: 1 } })
      const gzip = { ...type, 'content-encoding': 'gzip' }
      const retry = await post(app, { url: '/echo', key: 'key', headers: gzip, payload: gzipSync(payload) })
      t.ok(isReplay(retry))
      t.equal(retry.body, first.body)
      const other = gzipSync(JSON.stringify({ amount: 2 }))
      const mismatch = await post(app, { url: '/echo', key: 'key', headers: gzip, payload: other })
      t.equal(mismatch.statusCode, 422)
      t.equal(runs(), 1)
    }
  )
}
