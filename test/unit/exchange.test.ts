import type { FastifyReply } from 'fastify'
import t from 'tap'
import { isClosed } from '../../lib/http/exchange.js'

const reply = ({ raw = {}, request = {}, socket = {} as object | null } = {}) =>
  ({
    raw: { destroyed: false, ...raw },
    request: { raw: { aborted: false, ...request }, socket }
  }) as unknown as FastifyReply

t.test('a client is there until something says that it is gone', async (t) => {
  t.equal(isClosed(reply()), false)
  t.equal(isClosed(reply({ raw: { stream: { destroyed: false } } })), false, 'on HTTP/2')
  t.equal(isClosed(reply({ socket: null })), false, 'an injected request')
})

t.test('a client is gone with its response, its HTTP/2 stream, its request or its socket', async (t) => {
  t.equal(isClosed(reply({ raw: { destroyed: true } })), true)
  t.equal(isClosed(reply({ raw: { stream: { destroyed: true } } })), true)
  t.equal(isClosed(reply({ request: { aborted: true } })), true)
  t.equal(isClosed(reply({ socket: { destroyed: true } })), true)
})
