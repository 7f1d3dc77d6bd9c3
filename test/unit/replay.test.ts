import Fastify, { type FastifyReply } from 'fastify'
import t from 'tap'
import { restoreAll } from '../../lib/http/headers.js'
import { hasType, LARGE, putOn, replayPayload, takeOff } from '../../lib/http/replay.js'
import type { StoredReply } from '../../types/index.js'

const STORED: StoredReply = {
  kind: 'reply',
  fingerprint: 'f',
  createdAt: 1,
  statusCode: 201,
  headers: [
    ['content-type', 'text/plain'],
    ['x-new', 'new']
  ],
  body: Buffer.from('done'),
  text: true
}

/** What the work makes of a fresh reply's headers. */
async function headersAfter(work: (reply: FastifyReply) => void): Promise<[status: number, headers: object]> {
  const app = Fastify()
  let after: [number, object] | undefined
  app.get('/', async (_request, reply) => {
    work(reply)
    after = [reply.statusCode, { ...reply.getHeaders() }]
    reply.hijack().raw.end()
  })
  await app.inject('/')
  await app.close()
  if (after === undefined) throw new Error('The work has failed')
  return after
}

t.test('a replay has the stored status and headers and its mark, and no length but its own', async (t) => {
  const work = (mark: string | null) => (reply: FastifyReply) => {
    reply.header('content-length', 3).header('x-own', 'own')
    putOn(reply, STORED, mark)
  }
  const headers = { 'x-own': 'own', 'content-type': 'text/plain', 'x-new': 'new' }
  t.strictSame(await headersAfter(work('replayed')), [201, { ...headers, replayed: 'true' }])
  t.strictSame(await headersAfter(work(null)), [201, headers])
})

t.test('a stored reply has a type, or has none', async (t) => {
  t.equal(hasType(STORED), true)
  t.equal(hasType({ ...STORED, headers: STORED.headers.slice(1) }), false)
  t.equal(hasType({ ...STORED, headers: [] }), false)
})

t.test('a replay that is taken off leaves the headers as they were', async (t) => {
  for (const mark of ['replayed', null]) {
    const [, headers] = await headersAfter((reply) => {
      reply.header('content-type', 'text/html').header('x-own', 'own')
      const before = { ...reply.getHeaders() }
      putOn(reply, STORED, mark)
      takeOff(reply, STORED, mark, before)
    })
    t.strictSame(headers, { 'content-type': 'text/html', 'x-own': 'own' })
  }
})

t.test('restored headers are what they were: none more, none less, none changed or added to', async (t) => {
  const [, headers] = await headersAfter((reply) => {
    reply.header('x-same', 'same').header('x-changed', 'before').header('x-gone', 'gone').header('set-cookie', 'a=1')
    const before = { ...reply.getHeaders() }
    reply.header('x-changed', 'after').header('x-come', 'come').header('set-cookie', 'b=2').removeHeader('x-gone')
    restoreAll(reply, before)
  })
  t.strictSame(headers, { 'x-same': 'same', 'x-changed': 'before', 'set-cookie': 'a=1', 'x-gone': 'gone' })
})

t.test('a payload is of the kind that was stored, and none where nothing was', async (t) => {
  t.equal(replayPayload(STORED, true), 'done')
  t.strictSame(replayPayload({ ...STORED, text: false }, true), Buffer.from('done'))
  for (const text of [true, false]) t.equal(replayPayload({ ...STORED, body: Buffer.alloc(0), text }, true), undefined)
})

t.test('where no hook looks at it, large text is sent as the bytes that it is stored as', async (t) => {
  const of = (bytes: number, text = true) => ({ ...STORED, body: Buffer.alloc(bytes, 'x'), text })
  t.strictSame(replayPayload(of(LARGE), false), Buffer.alloc(LARGE, 'x'))
  t.equal(replayPayload(of(LARGE), true), 'x'.repeat(LARGE))
  t.equal(replayPayload(of(LARGE - 1), false), 'x'.repeat(LARGE - 1))
  t.strictSame(replayPayload(of(1, false), false), Buffer.from('x'))
  t.equal(replayPayload(of(0), false), undefined)
})
