import createError from '@fastify/error'
import t from 'tap'
import { InProgress, isRefusal, keyReused, type Refusal, StoreUnavailable, withRetryAfter } from '../../lib/errors.js'

t.test('what answers a request every day carries no stack, and what somebody has to look at does', async (t) => {
  t.notOk(keyReused('payload').stack)
  t.match(new StoreUnavailable({ cause: undefined }).stack, /errors\.test/)
})

t.test('Retry-After is in whole seconds, and one at least', async (t) => {
  for (const [seconds, header] of [
    [0, '1'],
    [1, '1'],
    [7, '7']
  ] as const) {
    t.same(withRetryAfter(new InProgress() as Refusal, seconds).headers, { 'retry-after': header })
  }
})

t.test("the plugin's own errors are known by their code, and others' are not", async (t) => {
  const Other = createError('FST_ERR_VALIDATION', 'Other', 400)
  t.equal(isRefusal(keyReused('payload')), true)
  for (const other of [new Other(), new Error('plain'), { code: 'FST_IDEMPOTENCY_SCOPE' }, 'FST_IDEMPOTENCY_', null]) {
    t.equal(isRefusal(other), false)
  }
})
