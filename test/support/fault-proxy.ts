import http from 'node:http'
import type { AddressInfo } from 'node:net'

/** Something with a teardown: a tap test. */
interface Owner {
  teardown(fn: () => unknown): void
}

/**
 * What goes wrong on the way:
 * - `cut-request`: the connection breaks before the server has seen anything;
 * - `lose-reply`: the server has replied, and nothing of it arrives;
 * - `cut-reply`: half of the reply's body arrives, and then the connection breaks;
 * - `bad-gateway`, `gateway-timeout`: the server has replied, and the gateway answers 502 or 504 in its place;
 * - `unavailable`: the gateway answers 503 before the server has seen anything.
 */
export const FAULTS = [
  'cut-request',
  'lose-reply',
  'cut-reply',
  'bad-gateway',
  'gateway-timeout',
  'unavailable'
] as const

export type Fault = (typeof FAULTS)[number]

const GATEWAY_STATUSES: Partial<Record<Fault, number>> = { 'bad-gateway': 502, 'gateway-timeout': 504 }

/** A gateway before a server on loopback, that spoils what it is told to. Returns its base URL. */
export async function faultProxy(t: Owner, port: number, nextFault: () => Fault | null): Promise<string> {
  const agent = new http.Agent({ keepAlive: true })
  const proxy = http.createServer((request, response) => {
    const fault = nextFault()
    if (fault === 'cut-request') return void request.socket.destroy()
    if (fault === 'unavailable') return void response.writeHead(503, { 'retry-after': '0' }).end()
    const { method, url, headers } = request
    const onward = http.request({ agent, host: '127.0.0.1', port, method, path: url, headers })
    onward.on('error', () => request.socket.destroy())
    onward.on('response', async (reply) => {
      const chunks: Buffer[] = []
      for await (const chunk of reply) chunks.push(chunk)
      const body = Buffer.concat(chunks)
      const status = fault === null ? undefined : GATEWAY_STATUSES[fault]
      if (status !== undefined) return void response.writeHead(status).end()
      if (fault === 'lose-reply') return void request.socket.destroy()
      response.writeHead(reply.statusCode ?? 500, reply.headers)
      if (fault !== 'cut-reply') return void response.end(body)
      response.write(body.subarray(0, Math.ceil(body.length / 2)), () => request.socket.destroy())
    })
    request.pipe(onward)
  })
  await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve))
  t.teardown(async () => {
    agent.destroy()
    proxy.closeAllConnections()
    await new Promise((resolve) => proxy.close(resolve))
  })
  return `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`
}
