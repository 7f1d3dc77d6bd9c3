import http from 'node:http'
import type { AddressInfo } from 'node:net'
import Fastify, { type FastifyInstance, type FastifyServerOptions, type InjectOptions } from 'fastify'
import idempotency, { type IdempotencyOptions, type IdempotencyStore, type MemoryStore } from '../../index.js'

/** Something with a teardown: a tap test. */
interface Owner {
  teardown(fn: () => unknown): void
}

/** A Fastify app with the plugin, closed when the test ends. */
export async function build(
  t: Owner,
  options: IdempotencyOptions = {},
  server: FastifyServerOptions = {}
): Promise<FastifyInstance> {
  const app = Fastify(server) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(idempotency, options)
  return app
}

/** The store as another process sees it, which does not know what goes on in this one. */
export function elsewhere(store: MemoryStore): IdempotencyStore {
  return {
    acquire: (...args) => store.acquire(...args),
    renew: (...args) => store.renew(...args),
    complete: (...args) => store.complete(...args),
    release: (...args) => store.release(...args),
    step: (...args) => store.step(...args),
    changed: (...args) => store.changed(...args),
    get: (...args) => store.get(...args)
  }
}

/**
 * The name of the service, whichever of its servers is asked: a part of what a request is for. It is what `inject` says.
 */
export const SERVICE = 'localhost:80'

/** A reply as it came over the wire. */
export interface Reply {
  status: number
  headers: http.IncomingHttpHeaders
  body: Buffer
  text: string
}

export interface Post {
  path?: string
  method?: string
  key?: string
  body?: string | Buffer
  headers?: Record<string, string>
  /** Whose connections are used; otherwise each request has one of its own. */
  agent?: http.Agent
}

export async function listen(app: FastifyInstance): Promise<number> {
  await app.listen({ host: '127.0.0.1', port: 0 })
  return (app.server.address() as AddressInfo).port
}

/** Starts a request over a real socket, and leaves its response to be read. */
export function start(port: number, { path = '/', method = 'POST', key, body, headers = {}, agent }: Post = {}) {
  const request = http.request({
    host: '127.0.0.1',
    port,
    path,
    method,
    agent: agent ?? false,
    headers: {
      host: SERVICE,
      ...(key === undefined ? {} : { 'idempotency-key': key }),
      ...(body === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }),
      ...headers
    }
  })
  const response = new Promise<http.IncomingMessage>((resolve, reject) => {
    request.on('error', reject)
    request.on('response', resolve)
  })
  response.catch(() => {})
  request.end(body)
  return { response, hangUp: () => request.destroy() }
}

/** A whole exchange. Rejects when the reply breaks off. */
export async function post(port: number, options: Post = {}): Promise<Reply> {
  return read(await start(port, options).response)
}

/** All of a reply. Rejects when it breaks off. */
export async function read(response: http.IncomingMessage): Promise<Reply> {
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk)
  const body = Buffer.concat(chunks)
  return { status: response.statusCode ?? 0, headers: response.headers, body, text: body.toString() }
}

/** `app.inject`, begun at once: by itself it waits until somebody awaits it. */
export async function inject(app: FastifyInstance, request: InjectOptions) {
  return await app.inject(request)
}

/** The body of a Fastify error. */
export function codeOf(reply: { text?: string; payload?: string }): string | undefined {
  return JSON.parse(reply.text ?? reply.payload ?? '{}').code
}

export const REPLAYED = 'idempotent-replayed'
