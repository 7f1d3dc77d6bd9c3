import t from 'tap'
import {
  claimFailure,
  discreet,
  isReadOnly,
  isRefused,
  isSyntaxError,
  isWrongType
} from '../../lib/stores/redis/errors.js'

t.test('an error is passed on without the command that it carries', async (t) => {
  const error = Object.assign(new TypeError('READONLY'), { command: { name: 'set', args: ['key', 'secret'] } })
  const passed = discreet(error)
  t.strictSame({ ...passed, message: passed.message }, { name: 'TypeError', message: 'READONLY' })
  t.match(discreet('away'), { name: 'Error', message: 'away' })
  t.match(discreet({ message: 'a', name: 'b' }), { name: 'Error', message: '[object Object]' })
})

t.test('what a server repeats of a command that it does not know is not passed on', async (t) => {
  for (const words of [
    "ERR unknown command 'EVALSHA', with args beginning with: 'key' 'se\ncret' ",
    'ERR unknown command `set`, with args beginning with: `secret`, '
  ]) {
    t.match(discreet(new Error(words)).message, /^ERR unknown command .(EVALSHA|set).$/)
  }
})

t.test('the words of a replica, and of a server that does not know NX with GET, are known', async (t) => {
  t.equal(isReadOnly(new Error("READONLY You can't write against a read only replica.")), true)
  t.equal(isReadOnly(new Error('ERR')), false)
  t.equal(isReadOnly('READONLY'), false)
  t.equal(isSyntaxError(new Error('ERR syntax error')), true)
  t.equal(isSyntaxError(new Error('OOM')), false)
})

t.test('a command that a user may not give, or a server does not have, is known by its error', async (t) => {
  for (const [message, is] of [
    ["NOPERM User default has no permissions to run the 'info' command", true],
    ["NOPERM this user has no permissions to run the 'info' command or its subcommand", true],
    ["ERR unknown command 'INFO', with args beginning with: 'server' ", true],
    ['ERR syntax error', false],
    ['Socket closed unexpectedly', false]
  ] as const) {
    t.equal(isRefused(new Error(message)), is, message)
  }
})

t.test('a key of another type is known by its error, be it that of a script', async (t) => {
  for (const [message, is] of [
    ['WRONGTYPE Operation against a key holding the wrong kind of value', true],
    ['ERR Error running script: @user_script:1: WRONGTYPE Operation against a key', true],
    ['NOTWRONGTYPE Operation', false],
    ['READONLY You can not write against a read only replica', false]
  ] as const) {
    t.equal(isWrongType(new Error(message)), is, message)
  }
})

t.test(
  'a server that has no room is full for a claim, be it by the error of a script, and any other error is itself',
  async (t) => {
    for (const message of [
      "OOM command not allowed when used memory > 'maxmemory'.",
      "ERR Error running script: @user_script:1: -OOM command not allowed when used memory > 'maxmemory'."
    ]) {
      const cause = new Error(message)
      const failure = claimFailure(cause) as Error
      t.match(failure, { name: 'StoreFull', code: 'FST_IDEMPOTENCY_STORE_FULL' })
      t.equal(failure.cause, cause)
    }
    const other = new Error('LOADING')
    t.equal(claimFailure(other), other)
  }
)
