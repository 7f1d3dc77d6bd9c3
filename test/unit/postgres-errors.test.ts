import t from 'tap'
import { claimFailure, explain, isAnswer, isContention, isRefusal } from '../../lib/stores/postgres/errors.js'

const answer = (code?: string) => Object.assign(new Error('x'), { severity: 'ERROR', ...(code && { code }) })

t.test('who loses against another transaction may repeat', async (t) => {
  for (const code of ['40001', '40P01']) t.equal(isContention(answer(code)), true, code)
  for (const code of ['40000', '40003', '23505', undefined]) t.equal(isContention(answer(code)), false, `${code}`)
})

t.test('an error is an answer when the server has sent it', async (t) => {
  t.equal(isAnswer(answer('23505')), true)
  t.equal(isAnswer(Object.assign(new Error('x'), { code: 'ECONNRESET' })), false)
})

t.test('an answer is a refusal unless the server itself is to blame', async (t) => {
  for (const code of ['23505', '40001', '25P02', '22P02', '42601', '10800', '15300', undefined]) {
    t.equal(isRefusal(answer(code)), true, `${code}`)
  }
  for (const code of ['08006', '53300', '57P01', '58030', 'XX000']) t.equal(isRefusal(answer(code)), false, code)
  t.equal(isRefusal(Object.assign(new Error('x'), { code: '23505' })), false)
})

t.test('an error is told without the values that it carries', async (t) => {
  const error = Object.assign(new RangeError('duplicate key'), {
    name: 'error',
    code: '23505',
    detail: 'Key (body)=(secret) already exists.',
    severity: 'ERROR'
  })
  const explained = explain(error)
  t.ok(explained instanceof Error)
  t.strictSame({ ...explained }, { name: 'error', code: '23505' })
  t.equal(explained.message, 'duplicate key')
  t.strictSame({ ...explain(new TypeError('x')) }, { name: 'TypeError' })
  t.match(explain('x'), { message: 'x' })
})

t.test('a table that is not there is told with what makes it', async (t) => {
  const error = Object.assign(new Error('relation "keys" does not exist'), { code: '42P01' })
  t.equal(
    explain(error).message,
    'relation "keys" does not exist: create it by a migration, or by "await store.createTable()"'
  )
})

t.test('a server that has no room is full for a claim, and any other error is explained', async (t) => {
  for (const code of ['53100', '53200']) {
    const failure = claimFailure(Object.assign(answer(code), { detail: 'secret' }))
    t.match(failure, { name: 'StoreFull', code: 'FST_IDEMPOTENCY_STORE_FULL', cause: { message: 'x', code } })
    t.notOk('detail' in (failure.cause as object))
  }
  for (const code of ['53000', '53300', '57P01', undefined])
    t.equal(claimFailure(answer(code)).name, 'Error', `${code}`)
})
