import { readFile } from 'node:fs/promises'
import { createServer, type IncomingMessage, type ServerResponse, request as send } from 'node:http'
import Fastify, { type FastifyInstance } from 'fastify'
import type { Feed } from './feed.js'
import type { ShopProcess } from './shop-process.js'
import type { Plan, World } from './world.js'

/* What listens where people look: the page, what it is told and what its buttons do; all else goes to the shop. */

// This file is compiled to .build/examples/demo.
const page = new URL('../../../examples/demo/page/', import.meta.url)
const shopSource = new URL('../../../examples/demo/shop.ts', import.meta.url)
const lib = new URL('../../lib/', import.meta.url)

const TYPES: Record<string, string> = {
  html: 'text/html; charset=utf-8',
  css: 'text/css; charset=utf-8',
  js: 'text/javascript; charset=utf-8',
  svg: 'image/svg+xml'
}

export interface FrontOptions {
  shop: ShopProcess
  world: World
  feed: Feed
}

export function buildFront({ shop, world, feed }: FrontOptions): FastifyInstance {
  const isOwn = ({ url = '' }: IncomingMessage) => url === '/' || url.startsWith('/demo/') || url.startsWith('/?')
  const app = Fastify({
    forceCloseConnections: true,
    serverFactory: (handler) =>
      createServer((request, response) =>
        isOwn(request) ? handler(request, response) : void forward(shop, request, response)
      )
  })

  const serve = (path: string, find: (name: string) => URL) =>
    app.get<{ Params: { name?: string } }>(path, async (request, reply) => {
      const url = find(request.params.name ?? '')
      const text = await readFile(url).catch(() => null)
      if (text === null) return reply.callNotFound()
      const type = TYPES[url.pathname.split('.').at(-1) ?? '']
      return reply
        .headers({ 'content-type': type, 'cache-control': 'no-cache', 'content-security-policy': "default-src 'self'" })
        .send(text)
    })
  serve('/', () => new URL('index.html', page))
  serve('/demo/:name(^[a-z-]+\\.(?:css|js|svg)$)', (name) => new URL(name, page))
  // The page sends by the client of the package.
  serve('/demo/lib/client.js', () => new URL('client.js', lib))
  serve('/demo/lib/client/:name(^[a-z]+\\.js$)', (name) => new URL(`client/${name}`, lib))

  /** The handler that the page shows is the one that runs. */
  app.get('/demo/handler', async (_request, reply) => {
    const [, lines = ''] = (await readFile(shopSource, 'utf8')).split(/^.*--8<--.*\n/m)
    return reply.type('text/plain; charset=utf-8').send(lines.replaceAll(/^ {4}/gm, ''))
  })

  app.get('/demo/events', (request, reply) => {
    reply.hijack()
    reply.raw.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' })
    const end = feed.listen((message) => reply.raw.write(`data: ${JSON.stringify(message)}\n\n`))
    request.raw.once('close', end)
  })

  app.post<{ Body: { title: string; orders: number; amount: number } }>('/demo/begin', async (request) => {
    const { title, orders, amount } = request.body
    world.wanted.orders += orders
    world.wanted.amount += amount
    feed.tell('begin', { title })
    return {}
  })
  app.post<{ Body: Plan & { kill?: boolean } }>('/demo/next', async (request) => {
    const { kill = false, ...plan } = request.body
    world.plan({ ...plan, holdPayments: plan.holdPayments === true || kill })
    world.onBothPaid = () => {
      if (kill) void shop.kill().finally(() => world.go())
    }
    return {}
  })
  app.post('/demo/go', async () => {
    world.go()
    return {}
  })
  app.post<{ Body: { running: boolean } }>('/demo/store', async (request) => {
    await shop.port
    await shop.stopStore(!request.body.running)
    feed.tell(request.body.running ? 'store-started' : 'store-stopped')
    return {}
  })
  app.post('/demo/reset', async () => {
    world.reset()
    feed.forget()
    return {}
  })
  return app as unknown as FastifyInstance
}

/** As a load balancer does: waits for a shop that starts, and answers 502 when one dies in the middle. */
async function forward(shop: ShopProcess, request: IncomingMessage, response: ServerResponse): Promise<void> {
  const fail = () => {
    if (response.headersSent) response.destroy()
    else response.writeHead(502, { 'content-type': 'application/json' }).end('{"message":"The shop is gone"}')
  }
  const port = await shop.port.catch(() => null)
  // Nobody has an order carried out that nobody waits for any more.
  if (response.destroyed) return
  if (port === null) return fail()
  const { method, url, rawHeaders } = request
  const upstream = send({ host: '127.0.0.1', port, method, path: url, headers: rawHeaders as never })
  upstream.on('error', fail)
  upstream.on('response', (answer) => {
    response.writeHead(answer.statusCode as number, answer.statusMessage, answer.rawHeaders)
    answer.on('error', fail)
    answer.pipe(response)
  })
  // A client that leaves is seen to leave by the shop.
  response.on('close', () => {
    if (!response.writableFinished) upstream.destroy()
  })
  request.pipe(upstream)
}
