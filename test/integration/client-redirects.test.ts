import t from 'tap'
import { type IdempotentFetchOptions, idempotentFetch } from '../../lib/client.js'
import { build } from '../support/app.js'

/* Where the helper for clients goes when a server sends it elsewhere, and what it takes along. */

type Tap = { teardown(fn: () => unknown): void }

const quick: IdempotentFetchOptions = { minDelay: 1, maxDelay: 5, maxAttempts: 3 }

/** What a server has seen of a request. */
interface Seen {
  method: string
  url: string
  key: unknown
  body: unknown
  authorization: unknown
  type: unknown
}

/** A server that redirects from `/<status>?to=<where>`, before anything is done, or behind an operation: `/done/<status>`. */
async function server(t: Tap) {
  const app = await build(t)
  const seen: Seen[] = []
  app.addHook('preHandler', async ({ method, url, headers, body }) => {
    const { authorization, 'idempotency-key': key, 'content-type': type } = headers
    seen.push({ method, url: url.split('?')[0] as string, key, body, authorization, type })
  })
  const methods = ['GET', 'POST', 'PUT', 'PATCH']
  /** How often the page cannot be had. */
  const page = { unready: 0 }
  app.route({
    method: methods,
    url: '/page',
    handler: async (_request, reply) => (page.unready-- > 0 ? reply.code(503).send('later') : 'page')
  })
  app.post('/round', async (_request, reply) => reply.redirect('/round', 307))
  for (const [path, idempotency] of [
    ['', false],
    ['/done', true]
  ] as const) {
    app.route<{ Params: { status: string }; Querystring: { to: string } }>({
      method: methods,
      url: `${path}/:status`,
      config: { idempotency },
      handler: async (request, reply) =>
        reply.code(Number(request.params.status)).header('location', request.query.to).send('moved')
    })
  }
  return { seen, page, base: await app.listen({ host: '127.0.0.1', port: 0 }) }
}

const send = idempotentFetch(quick)

function order(method = 'POST') {
  const headers = { 'content-type': 'application/json', authorization: 'Bearer secret' }
  return { method, headers, body: '{"amount":1}', idempotencyKey: 'k' }
}

/** A browser, which shows nothing of a redirect; what it says when it is to follow one; and what it was asked. */
function unseeing() {
  const asked: [redirect: string, mode: string, key: string | null][] = []
  const redirect = { type: { value: 'opaqueredirect' }, status: { value: 0 } }
  const browser = (followed: () => Response | Promise<Response>) =>
    idempotentFetch({
      ...quick,
      async fetch({ redirect: how, mode, headers }) {
        asked.push([how, mode, headers.get('idempotency-key')])
        return how === 'manual' ? Object.defineProperties(new Response(null), redirect) : followed()
      }
    })
  return { asked, browser }
}

const to = (base: string, status: number, target: string) => `${base}/${status}?to=${encodeURIComponent(target)}`

for (const status of [307, 308]) {
  t.test(`${status} within the origin: the operation goes on there, with key and body`, async (t) => {
    const { seen, base } = await server(t)
    const response = await send(to(base, status, '/page?at=home'), order())
    t.same([response.status, await response.text(), response.redirected], [200, 'page', true])
    t.equal(response.url, `${base}/page?at=home`)
    const sent = { method: 'POST', key: 'k', body: { amount: 1 }, authorization: 'Bearer secret' }
    t.match(seen, [
      { ...sent, url: `/${status}` },
      { ...sent, url: '/page' }
    ])
  })

  t.test(`${status} to another origin: the redirect is the reply, and the other one sees nothing`, async (t) => {
    const [one, two] = [await server(t), await server(t)]
    const response = await send(to(one.base, status, `${two.base}/page`), order())
    t.same([response.status, response.headers.get('location')], [status, `${two.base}/page`])
    t.same([await response.text(), response.redirected, response.idempotency.attempts], ['moved', false, 1])
    t.same(two.seen, [])
  })
}

t.test('a redirect to another origin that comes behind one within it is not followed either', async (t) => {
  const [one, two] = [await server(t), await server(t)]
  const response = await send(to(one.base, 307, to(one.base, 308, `${two.base}/page`)), order())
  t.same([response.status, response.redirected, one.seen.length, two.seen], [308, true, 2, []])
})

for (const [status, method] of [
  [301, 'POST'],
  [302, 'POST'],
  [303, 'POST'],
  [303, 'PATCH'],
  [303, 'PUT']
] as const) {
  t.test(`${status} of a ${method}: the page is read, without key and body`, async (t) => {
    const { seen, base } = await server(t)
    const response = await send(to(base, status, '/page'), order(method))
    t.same([response.status, await response.text(), response.redirected], [200, 'page', true])
    const [, page] = seen
    t.strictSame(page, {
      method: 'GET',
      url: '/page',
      key: undefined,
      body: undefined,
      authorization: 'Bearer secret',
      type: undefined
    })
  })
}

t.test('303 to another origin: the page is read there, without key and credentials', async (t) => {
  const [one, two] = [await server(t), await server(t)]
  const response = await send(to(one.base, 303, `${two.base}/page`), order())
  t.equal(await response.text(), 'page')
  t.match(two.seen, [{ method: 'GET', key: undefined, authorization: undefined, body: undefined }])
  t.equal(two.seen.length, 1)
})

t.test('301 and 302 of a PUT or PATCH leave it one, so they are followed within the origin only', async (t) => {
  const [one, two] = [await server(t), await server(t)]
  for (const [status, method] of [
    [301, 'PUT'],
    [302, 'PATCH']
  ] as const) {
    one.seen.length = 0
    t.equal((await send(to(one.base, status, '/page'), order(method))).status, 200)
    t.match(one.seen[1], { method, key: 'k', body: { amount: 1 } })
    t.equal(
      (await send(to(one.base, status, `${two.base}/page`), { ...order(method), idempotencyKey: 'l' })).status,
      status
    )
  }
  t.same(two.seen, [])
})

t.test('a redirect that is a replay tells that the operation had run before', async (t) => {
  const { base } = await server(t)
  const url = to(`${base}/done`, 303, `${base}/page`)
  t.equal((await send(url, order())).idempotency.replayed, false)
  const again = await send(url, order())
  t.same([await again.text(), again.idempotency.replayed, again.idempotency.attempts], ['page', true, 1])
  const onward = () => send(to(`${base}/done`, 307, `${base}/page`), { ...order(), idempotencyKey: 'l' })
  t.same([(await onward()).idempotency.replayed, (await onward()).idempotency.replayed], [false, true])
})

t.test('a page that cannot be had yet is asked for by way of the operation, with the same key', async (t) => {
  const { base, page, seen } = await server(t)
  page.unready = 1
  const response = await send(to(`${base}/done`, 303, '/page'), order())
  t.same([await response.text(), response.idempotency], ['page', { key: 'k', attempts: 2, replayed: true }])
  t.same(
    seen.map(({ method, key }) => [method, key]),
    [
      ['POST', 'k'],
      ['GET', undefined],
      ['POST', 'k'],
      ['GET', undefined]
    ]
  )
})

t.test("redirect: 'manual' hands it over, and what leads nowhere is handed over as well", async (t) => {
  const { base, seen } = await server(t)
  const manual = await send(to(base, 303, '/page'), { ...order(), redirect: 'manual' })
  t.same([manual.status, manual.redirected], [303, false])
  for (const target of ['mailto:a@example.com', 'http://[']) {
    for (const status of [303, 307]) {
      const response = await send(to(base, status, target), order())
      t.same([response.status, response.headers.get('location')], [status, target])
    }
  }
  t.notOk(seen.some(({ url }) => url === '/page'))
})

t.test('a circle ends after as many redirects as fetch follows', async (t) => {
  const { base, seen } = await server(t)
  t.equal((await send(`${base}/round`, order())).status, 307)
  t.equal(seen.length, 21)
})

t.test('what a Request does not show goes along to where it is sent on', async (t) => {
  const { base } = await server(t)
  const { Request } = globalThis
  const priorities: unknown[] = []
  globalThis.Request = class extends Request {
    constructor(input: string | URL | Request, init?: RequestInit & { priority?: string }) {
      super(input, init)
      if (!(input instanceof Request)) priorities.push(init?.priority)
    }
  }
  t.teardown(() => {
    globalThis.Request = Request
  })
  await send(to(base, 307, to(base, 303, '/page')), { ...order(), priority: 'high' } as RequestInit)
  t.same(priorities, ['high', 'high', 'high'])
})

t.test('in a browser, which does not show where it leads, it is followed within the origin of the page', async (t) => {
  const { asked, browser } = unseeing()
  const url = 'https://example.com/orders'
  t.equal(await (await browser(() => new Response('page'))(url, order())).text(), 'page')
  const away = await browser(() => Promise.reject(new TypeError('Failed to fetch')))(url, order())
  t.same([away.type, away.idempotency.attempts], ['opaqueredirect', 1], 'to elsewhere')
  t.same(asked, [
    ['manual', 'cors', 'k'],
    ['follow', 'same-origin', 'k'],
    ['manual', 'cors', 'k'],
    ['follow', 'same-origin', 'k']
  ])
})

t.test(
  'in a browser it is followed anywhere by wish of the caller, and what is lost there is asked for again',
  async (t) => {
    const { asked, browser } = unseeing()
    let losses = 1
    const send = browser(() => {
      if (losses-- > 0) throw new TypeError('Failed to fetch')
      return new Response('page')
    })
    const response = await send('https://example.com/orders', { ...order(), redirect: 'follow' })
    t.same([await response.text(), response.idempotency.attempts], ['page', 2])
    t.same(asked, [
      ['manual', 'cors', 'k'],
      ['follow', 'cors', 'k'],
      ['manual', 'cors', 'k'],
      ['follow', 'cors', 'k']
    ])
  }
)

t.test('in a browser, a signal that aborts while it is followed is the reason for the end', async (t) => {
  const controller = new AbortController()
  const { browser } = unseeing()
  const send = browser(() => {
    controller.abort(new Error('enough'))
    throw new TypeError('Failed to fetch')
  })
  await t.rejects(send('https://example.com/orders', { ...order(), signal: controller.signal }), { message: 'enough' })
})
