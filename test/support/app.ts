import http from 'node:http'
import type { AddressInfo } from 'node:net'
import Fastify, { type FastifyInstance, type FastifyServerOptions, type InjectOptions } from 'fastify'
import idempotency, { type IdempotencyOptions } from '../../index.js'

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
}

export async function listen(app: FastifyInstance): Promise<number> {
  await app.listen({ host: '127.0.0.1', port: 0 })
  return (app.server.address() as AddressInfo).port
}

/** Starts a request over a real socket. The promise rejects when the reply breaks off. */
export function start(port: number, { path = '/', method = 'POST', key, body, headers = {} }: Post = {}) {
  const request = http.request({
    host: '127.0.0.1',
    port,
    path,
    method,
    agent: false,
    headers: {
      ...(key === undefined ? {} : { 'idempotency-key': key }),
      ...(body === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }),
      ...headers
    }
  })
  const reply = new Promise<Reply>((resolve, reject) => {
    request.on('error', reject)
    request.on('response', (response) => {
      const chunks: Buffer[] = []
      response.on('data', (chunk) => chunks.push(chunk))
      response.on('error', reject)
      response.on('end', () => {
        const bytes = Buffer.concat(chunks)
        resolve({ status: response.statusCode ?? 0, headers: response.headers, body: bytes, text: bytes.toString() })
      })
    })
  })
  reply.catch(() => {})
  request.end(body)
  return { request, reply, hangUp: () => request.destroy() }
}

export function post(port: number, options: Post = {}): Promise<Reply> {
  return start(port, options).reply
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
