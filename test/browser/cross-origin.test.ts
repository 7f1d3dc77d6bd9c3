import { readFileSync } from 'node:fs'
import cors, { type FastifyCorsOptions } from '@fastify/cors'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency from '../../index.js'
import { bare, snippet } from '../readme/snippet.js'
import { type Page, startBrowser } from '../support/browser.js'
import { listening } from '../support/latch.js'

/* A page of one origin, and an API of another, in a browser: what of keys and replays gets through. */

type Owner = { teardown(fn: () => unknown): void }

/** What a page has found out. */
interface Found {
  status?: number
  replayed?: string | null
  run?: number
  error?: string
}

/** Sends a request with a key from a page, by `fetch` as it is. */
function post(page: Page, url: string): Promise<Found> {
  const headers = { 'content-type': 'application/json', 'idempotency-key': 'k' }
  const init = JSON.stringify({ method: 'POST', headers, body: '{}' })
  return page.evaluate(`fetch(${JSON.stringify(url)}, ${init}).then(
    async (reply) => ({ status: reply.status, replayed: reply.headers.get('idempotent-replayed'), ...(await reply.json()) }),
    (error) => ({ error: String(error) })
  )`)
}

/** Sends it by the helper, which the page has imported. */
function send(page: Page, url: string, init: object): Promise<Record<string, unknown>> {
  return page.evaluate(`import('/lib/client.js').then(async ({ idempotentFetch }) => {
    const send = idempotentFetch({ minDelay: 1, maxAttempts: 2 })
    const reply = await send(${JSON.stringify(url)}, ${JSON.stringify({ method: 'POST', idempotencyKey: 'k', ...init })})
    return { ...reply.idempotency, status: reply.status, type: reply.type, url: reply.url, text: await reply.text() }
  })`)
}

/** An API for pages of other origins. */
async function api(t: Owner, allow: (app: FastifyInstance) => PromiseLike<unknown>) {
  const app = await bare(t)
  t.teardown(() => app.server.closeAllConnections())
  await allow(app)
  await app.register(idempotency)
  const seen = { runs: 0, requests: [] as string[] }
  app.server.on('request', ({ method, url }) => seen.requests.push(`${method} ${url}`))
  app.post('/charges', { config: { idempotency: true } }, async () => ({ run: ++seen.runs }))
  return { seen, url: await listening(app) }
}

const withCors = (options: FastifyCorsOptions) => (app: FastifyInstance) => app.register(cors, options)

t.test('in Chromium', { timeout: 240_000 }, async (t) => {
  const browser = await startBrowser(t)
  const away = await api(t, withCors({}))

  // Where pages are from: it has the helper, and redirects.
  const site = Fastify() as unknown as FastifyInstance
  t.teardown(() => {
    site.server.closeAllConnections()
    return site.close()
  })
  await site.register(idempotency)
  const compiled = new URL('../../', import.meta.url)
  site.get('/', async (_request, reply) => reply.type('text/html').send('<!doctype html><title>Shop</title>'))
  site.get<{ Params: { '*': string } }>('/lib/*', async (request, reply) =>
    reply.type('text/javascript').send(readFileSync(new URL(`lib/${request.params['*']}`, compiled), 'utf8'))
  )
  site.get('/receipt', async () => 'receipt')
  let orders = 0
  site.post('/orders', { config: { idempotency: true } }, async (_request, reply) => {
    orders++
    return reply.redirect('/receipt', 303)
  })
  site.post('/moved', async (_request, reply) => reply.redirect(`${away.url}/charges`, 307))
  const origin = await listening(site)

  const page = await browser.open()
  await page.goto(origin)

  t.test(
    'the recipe of docs/recipes.md: a key passes the preflight, and the page sees that a reply is a replay',
    async (t) => {
      const { seen, url } = await api(t, (app) => snippet('cors', { app }))
      t.same(await post(page, `${url}/charges`), { status: 200, replayed: null, run: 1 })
      t.same(await post(page, `${url}/charges`), { status: 200, replayed: 'true', run: 1 })
      t.ok(seen.requests.includes('OPTIONS /charges'), 'there was a preflight')
      const { key, attempts, replayed, status } = await send(page, `${url}/charges`, {
        headers: { 'content-type': 'application/json' },
        body: '{}'
      })
      t.same({ key, attempts, replayed, status }, { key: 'k', attempts: 1, replayed: true, status: 200 })
      t.equal(seen.runs, 1)
    }
  )

  t.test('a list of allowed headers without the key: the request never leaves the browser', async (t) => {
    const { seen, url } = await api(t, withCors({ allowedHeaders: ['Content-Type', 'Authorization'] }))
    t.match(await post(page, `${url}/charges`), { error: /Failed to fetch/ })
    t.same(seen, { runs: 0, requests: ['OPTIONS /charges'] })
  })

  t.test('without a list @fastify/cors allows the key, and the page sees no mark that is not exposed', async (t) => {
    const { seen, url } = await api(t, withCors({}))
    for (const _ of [1, 2]) t.same(await post(page, `${url}/charges`), { status: 200, replayed: null, run: 1 })
    t.equal(seen.runs, 1)
  })

  t.test('the helper follows a redirect within the origin of the page, and orders once', async (t) => {
    const { status, text, url, attempts } = await send(page, `${origin}/orders`, {})
    t.same({ status, text, url, attempts }, { status: 200, text: 'receipt', url: `${origin}/receipt`, attempts: 1 })
    t.equal(orders, 1)
  })

  t.test('the helper does not follow it to another origin, which sees nothing of the key', async (t) => {
    const { type, status, attempts } = await send(page, `${origin}/moved`, {})
    t.same({ type, status, attempts }, { type: 'opaqueredirect', status: 0, attempts: 1 })
    t.same(away.seen, { runs: 0, requests: [] })
    t.match(await send(page, `${origin}/moved`, { redirect: 'follow' }), { status: 200, text: '{"run":1}' })
  })
})
