import type { IncomingMessage } from 'node:http'
import { buffer } from 'node:stream/consumers'
import multipart, { type MultipartFile, type MultipartValue } from '@fastify/multipart'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyRouteOptions } from '../../index.js'
import { listening } from '../support/latch.js'
import { type Order, orders, register } from './kit.js'

/** How the handler gets its parts: from `request.body` in two forms, or by reading them itself. */
const modes = [true, 'keyValues', false] as const
type Mode = (typeof modes)[number]

const described = (mode: Mode) => (mode === false ? 'read by the handler' : `attachFieldsToBody: ${mode}`)

interface Upload {
  order: Order
  mode: Mode
  options?: IdempotencyRouteOptions
  onFile?: (part: MultipartFile) => Promise<void>
}

async function server(t: Test, { order, mode, options = {}, onFile }: Upload) {
  const app = Fastify()
  t.teardown(() => app.close())
  const attach = { attachFieldsToBody: mode, ...(onFile && { onFile }) } as { attachFieldsToBody: true }
  await register(
    order,
    () => app.register(idempotency),
    () => app.register(multipart, mode === false ? {} : attach)
  )
  let runs = 0
  app.post('/', { config: { idempotency: options } }, async (request) => {
    runs++
    if (mode === false) {
      let file = ''
      for await (const part of request.parts()) if (part.type === 'file') file = String(await part.toBuffer())
      return { run: runs, file }
    }
    const body = request.body as { file: MultipartFile | Buffer }
    if (Buffer.isBuffer(body.file)) return { run: runs, file: String(body.file) }
    return { run: runs, file: onFile ? '' : String(await body.file.toBuffer()) }
  })
  const url = await listening(app)
  const send = async (fields: Record<string, string | Blob>, key?: string) => {
    const form = new FormData()
    for (const [name, value] of Object.entries(fields)) form.append(name, value as string)
    const response = await fetch(url, {
      method: 'POST',
      body: form,
      ...(key && { headers: { 'idempotency-key': key } })
    })
    return {
      status: response.status,
      replayed: response.headers.get('idempotent-replayed') === 'true',
      json: (await response.json()) as { run?: number; file?: string; code?: string }
    }
  }
  return { url, send, runs: () => runs }
}

const file = (content: string, type = 'text/plain') => new File([content], 'a.txt', { type })

for (const order of orders) {
  for (const mode of modes) {
    t.test(`registered ${order} @fastify/multipart, parts ${described(mode)}`, async (t) => {
      t.test('a retry has another boundary, and is a replay all the same', async (t) => {
        const { url, send, runs } = await server(t, { order, mode })
        const boundaries = await Promise.all(
          [1, 2].map(async () => {
            const form = new FormData()
            form.append('amount', '1')
            return new Request(url, { method: 'POST', body: form }).headers.get('content-type')
          })
        )
        t.not(boundaries[0], boundaries[1], 'the client does choose a new one each time')

        const first = await send({ amount: '1', file: file('content') }, 'key')
        t.match(first, { status: 200, replayed: false, json: { run: 1, file: 'content' } })
        const retry = await send({ amount: '1', file: file('content') }, 'key')
        t.match(retry, { status: 200, replayed: true, json: first.json })
        t.equal(runs(), 1)
      })

      t.test('large parts do not stand in the way of a replay', async (t) => {
        const { send, runs } = await server(t, { order, mode })
        const content = 'x'.repeat(500_000)
        t.equal((await send({ file: file(content) }, 'key')).json.file, content)
        for (let i = 0; i < 3; i++) t.match(await send({ file: file(content) }, 'key'), { status: 200, replayed: true })
        t.equal(runs(), 1)
      })
    })
  }

  for (const mode of [true, 'keyValues'] as const) {
    t.test(`registered ${order} @fastify/multipart, with ${described(mode)}`, async (t) => {
      t.test('another file content, or another field, is 422, and the handler does not run', async (t) => {
        const { send, runs } = await server(t, { order, mode })
        const fields = { amount: '1', file: file('content') }
        const first = await send(fields, 'key')
        const others: Record<string, string | Blob>[] = [
          { ...fields, file: file('content!') },
          { ...fields, amount: '2' },
          { ...fields, currency: 'EUR' },
          { file: fields.file }
        ]
        for (const other of others) {
          t.match(await send(other, 'key'), { status: 422, json: { code: 'FST_IDEMPOTENCY_KEY_REUSED' } })
        }
        t.match(await send(fields, 'key'), { status: 200, replayed: true, json: first.json })
        t.equal(runs(), 1)
      })

      t.test('the order of the fields does not matter', async (t) => {
        const { send } = await server(t, { order, mode })
        await send({ a: '1', file: file('content'), b: '2' }, 'key')
        t.match(await send({ b: '2', a: '1', file: file('content') }, 'key'), { status: 200, replayed: true })
      })

      t.test('the key may come in a field of the form', async (t) => {
        const { send, runs } = await server(t, { order, mode, options: { field: '__key', required: true } })
        const first = await send({ file: file('content'), __key: 'key' })
        t.match(first, { status: 200, replayed: false, json: { run: 1, file: 'content' } })
        t.match(await send({ file: file('content'), __key: 'key' }), { status: 200, replayed: true, json: first.json })
        t.match(await send({ file: file('content!'), __key: 'key' }), { status: 422 })
        t.match(await send({ file: file('content!'), __key: 'other key' }), { status: 200, json: { run: 2 } })
        t.match(await send({ file: file('content') }), {
          status: 400,
          json: { code: 'FST_IDEMPOTENCY_KEY_MISSING' }
        })
        t.equal(runs(), 2)
      })

      t.test('a field that was sent twice is not a key', async (t) => {
        const { url, runs } = await server(t, { order, mode, options: { field: '__key' } })
        const form = new FormData()
        form.append('__key', 'one')
        form.append('__key', 'two')
        const response = await fetch(url, { method: 'POST', body: form })
        t.equal(response.status, 422)
        t.equal(((await response.json()) as { code: string }).code, 'FST_IDEMPOTENCY_KEY_INVALID')
        t.equal(runs(), 0)
      })
    })
  }

  t.test(`registered ${order} @fastify/multipart, files that onFile has taken`, async (t) => {
    t.test('do not stand in the way of a replay', { timeout: 20_000 }, async (t) => {
      const taken: string[] = []
      const onFile = async (part: MultipartFile) => {
        const content = String(await buffer(part.file))
        taken.push(content)
        // Where the handler will look for it, as in the documentation of @fastify/multipart.
        ;(part as unknown as MultipartValue).value = content
      }
      const { send, runs } = await server(t, { order, mode: true, onFile })
      t.match(await send({ amount: '1', file: file('content') }, 'key'), { status: 200, replayed: false })
      t.match(await send({ amount: '1', file: file('content') }, 'key'), { status: 200, replayed: true })
      t.same(taken, ['content', 'content'])
      t.equal(runs(), 1)
    })
  })
}

const reply = async (response: Response) => ({
  status: response.status,
  replayed: response.headers.get('idempotent-replayed') === 'true',
  text: await response.text()
})

const RUN = { status: 200, replayed: false }
const REPLAY = { status: 200, replayed: true }

for (const order of orders) {
  t.test(
    `registered ${order} @fastify/multipart, a JSON field that looks like a part of a form is a value`,
    async (t) => {
      for (const mode of [true, 'keyValues'] as const) {
        for (const field of [undefined, 'payment']) {
          const app = Fastify()
          t.teardown(() => app.close())
          await register(
            order,
            () => app.register(idempotency, { ...(field && { field }), header: field ? false : 'Idempotency-Key' }),
            () => app.register(multipart, { attachFieldsToBody: mode as true })
          )
          app.post('/', { config: { idempotency: true } }, async () => 'done')
          const url = await listening(app)
          let n = 0
          const send = async (key: string, value: unknown) => {
            const boundary = `----boundary${n++}`
            const type = 'Content-Type: application/json'
            const part = `Content-Disposition: form-data; name="payment"\r\n${type}\r\n\r\n${JSON.stringify(value)}`
            const headers = { 'content-type': `multipart/form-data; boundary=${boundary}`, 'idempotency-key': key }
            const body = `--${boundary}\r\n${part}\r\n--${boundary}--\r\n`
            return reply(await fetch(url, { method: 'POST', headers, body }))
          }
          const looks = (amount: number) => [
            { type: 'field', value: 1, amount },
            { type: 'field', fieldname: 'payment', mimetype: 'text/plain', value: 'key', amount },
            { type: 'file', fieldname: 'payment', filename: 'a', toBuffer: 'b', file: { bytesRead: 0 }, amount }
          ]
          for (const [n, value] of looks(1).entries()) {
            if (field !== undefined) {
              t.match(await send('', value), { status: 422, text: 'FST_IDEMPOTENCY_KEY_INVALID' }, 'nor is it a key')
              continue
            }
            t.match(await send(`k${n}`, value), RUN)
            t.match(await send(`k${n}`, looks(2)[n]), { status: 422 })
            t.match(await send(`k${n}`, value), REPLAY)
          }
        }
      }
    }
  )

  t.test(
    `registered ${order} @fastify/multipart, a body that is made form data is compared by its content`,
    async (t) => {
      const makers: Record<string, (app: FastifyInstance) => unknown> = {
        'by a hook, as in its documentation': async (app) => {
          await register(
            order,
            () => app.register(idempotency),
            () => app.register(multipart, { attachFieldsToBody: true })
          )
          app.addHook('preValidation', async (request) => {
            request.body = await request.formData()
          })
        },
        'by a parser': async (app) => {
          await app.register(idempotency)
          app.addContentTypeParser('multipart/form-data', async (request: FastifyRequest, payload: IncomingMessage) => {
            const headers = { 'content-type': String(request.headers['content-type']) }
            return new Response(await buffer(payload), { headers }).formData()
          })
        },
        'by a parser, and then changed by a hook': async (app) => {
          await makers['by a parser']?.(app)
          let now = 0
          app.addHook('preValidation', async (request) => {
            ;(request.body as FormData).set('receivedAt', String(++now))
          })
        }
      }
      for (const [how, make] of Object.entries(makers)) {
        const app = Fastify()
        t.teardown(() => app.close())
        await make(app)
        app.post(
          '/',
          { config: { idempotency: true } },
          async (request) => [...(request.body as FormData).keys()].length
        )
        const url = await listening(app)
        const send = async (...fields: [string, string | Blob][]) => {
          const body = new FormData()
          for (const [name, value] of fields) body.append(name, value as string)
          return reply(await fetch(url, { method: 'POST', headers: { 'idempotency-key': 'k' }, body }))
        }
        const one: [string, string | Blob][] = [
          ['amount', '1'],
          ['doc', file('content')]
        ]
        t.match(await send(...one), RUN, how)
        t.match(await send(['amount', '2'], ['doc', file('content')]), { status: 422 }, `${how}: another amount`)
        t.match(await send(['amount', '1'], ['doc', file('Content')]), { status: 422 }, `${how}: another file`)
        t.match(await send(['amount', '1']), { status: 422 }, `${how}: no file`)
        t.match(await send(...one.toReversed()), REPLAY, how)
      }
    }
  )
}
