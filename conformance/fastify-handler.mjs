// The handler of the servers that are on Fastify, whatever its version.

import { Readable } from 'node:stream'
import { run } from './payments.mjs'

export async function handler(request, reply) {
  const { status, headers, body } = await run(request.routeOptions.url, request.body)
  const isStream = Symbol.asyncIterator in body
  return reply
    .code(status)
    .headers(headers)
    .send(isStream ? Readable.from(body) : body)
}
