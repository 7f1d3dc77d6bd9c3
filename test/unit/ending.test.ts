import type { FastifyReply, FastifyRequest } from 'fastify'
import t from 'tap'
import { isFinalReply, statusOf } from '../../lib/ending.js'
import type { Policy } from '../../lib/options.js'

t.test("an error's status is its own where that is one of an error, else the reply's, else 500", async (t) => {
  for (const [error, current, status] of [
    [{ statusCode: 400 }, 200, 400],
    [{ statusCode: 599 }, 200, 599],
    [{ status: 404 }, 200, 404],
    [{ statusCode: 409, status: 404 }, 200, 409],
    [{ statusCode: 399, status: 404 }, 200, 404],
    [{ statusCode: 600 }, 503, 503],
    [{ statusCode: 200 }, 302, 500],
    [undefined, 200, 500],
    [null, 422, 422]
  ] as const) {
    t.equal(statusOf(error, current), status)
  }
})

t.test('shouldStore must answer at once: what else it gives is logged, and the default decides', async (t) => {
  const logged: unknown[] = []
  const request = { log: { error: (...args: unknown[]) => logged.push(args) } } as unknown as FastifyRequest
  const decide = (shouldStore: unknown, statusCode: number) =>
    isFinalReply({ shouldStore } as Policy, request, { statusCode } as FastifyReply)
  t.equal(
    decide(() => 1, 500),
    true
  )
  t.equal(
    decide(() => undefined, 200),
    false
  )
  t.same(logged, [])
  const fail = () => {
    throw new Error('no decision')
  }
  for (const undecided of [async () => true, async () => false, fail]) {
    t.equal(decide(undecided, 500), false)
    t.equal(decide(undecided, 201), true)
  }
  t.equal(logged.length, 6)
  t.match(logged[0], [{ err: { message: /must answer at once/ } }, /shouldStore failed/])
  t.match(logged[4], [{ err: { message: 'no decision' } }, /shouldStore failed/])
})
