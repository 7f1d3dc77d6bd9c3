import type { FastifyReply } from 'fastify'
import t from 'tap'
import { InProgress, type Refusal, withRetryAfter } from '../../lib/errors.js'
import { wasSentByFastify, watchHeaders } from '../../lib/http/problem-details.js'

const replyWith = (statusCode: number, length = true) =>
  ({ statusCode, hasHeader: () => length }) as unknown as FastifyReply
const refuse = (): Refusal => {
  const refusal = withRetryAfter(new InProgress(), 1) as Refusal
  watchHeaders(refusal)
  return refusal
}

t.test('an error answers when its headers were asked for, and its own status is sent with a length', async (t) => {
  const refusal = refuse()
  t.equal(wasSentByFastify(replyWith(409), refusal), false, 'nobody has asked')
  t.same(refusal.headers, { 'retry-after': '1' })
  t.equal(wasSentByFastify(replyWith(409), refusal), true)
  t.equal(wasSentByFastify(replyWith(400), refusal), false, 'another status')
  t.equal(wasSentByFastify(replyWith(409, false), refusal), false, 'a stream')
})

t.test('who looks at an error from outside, as a logger does, does not ask', async (t) => {
  const refusal = refuse()
  t.notOk(Object.keys(refusal).includes('headers'))
  t.equal(wasSentByFastify(replyWith(409), refusal), false)
})

t.test('an error that refuses twice is watched twice', async (t) => {
  const refusal = refuse()
  watchHeaders(refusal)
  t.same(refusal.headers, { 'retry-after': '1' })
})

t.test('the headers of an error are those that a handler gives it, and are its own then', async (t) => {
  const refusal = refuse()
  refusal.headers = { 'x-mine': '1' }
  t.same(refusal.headers, { 'x-mine': '1' })
  t.ok(Object.keys(refusal).includes('headers'))
  refusal.headers = { 'x-mine': '2' }
  t.same(refusal.headers, { 'x-mine': '2' })
  t.equal(wasSentByFastify(replyWith(409), refusal), false)
  watchHeaders(refusal)
  t.same(refusal.headers, { 'x-mine': '2' })
  t.equal(wasSentByFastify(replyWith(409), refusal), true)
})
