import t from 'tap'
import { warn } from '../../lib/warnings.js'
import { warningsOf } from '../support/warnings.js'

t.test('a warning is given once for each code and text, and has both', async (t) => {
  const given: (Error & { code?: string })[] = []
  const listen = (warning: Error) => given.push(warning)
  process.on('warning', listen)
  await warningsOf('', () => {
    for (const _ of [1, 2]) {
      warn('FST_IDEMPOTENCY_ONE', 'a')
      warn('FST_IDEMPOTENCY_ONE', 'b')
      warn('FST_IDEMPOTENCY_TWO', 'a')
    }
  })
  process.off('warning', listen)
  t.strictSame(
    given.map(({ name, code, message }) => `${name} ${code} ${message}`),
    [
      'IdempotencyWarning FST_IDEMPOTENCY_ONE a',
      'IdempotencyWarning FST_IDEMPOTENCY_ONE b',
      'IdempotencyWarning FST_IDEMPOTENCY_TWO a'
    ]
  )
})
