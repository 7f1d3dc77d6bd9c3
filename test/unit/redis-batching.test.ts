import t from 'tap'
import type { IoredisClient } from '../../lib/stores/redis/client.js'
import { discreet, isWrongType } from '../../lib/stores/redis/errors.js'
import { IoredisConnection } from '../../lib/stores/redis/ioredis.js'
import { Renewals } from '../../lib/stores/redis/renewals.js'
import { runScript } from '../../lib/stores/redis/run-script.js'
import { RENEW, WATCH } from '../../lib/stores/redis/scripts.js'
import { soon } from '../support/store-fixtures.js'

/* What goes to Redis together, and what each asker gets of the answer. The client is a fake: it may lie. */

/** An error as ioredis has it: with the command, and what was in it. */
function failure(message: string, name = 'ReplyError'): Error {
  return Object.assign(new Error(message), { name, command: { name: 'set', args: ['a key', 'a secret'] } })
}

const outcomes = async (promises: Promise<unknown>[]) =>
  (await Promise.allSettled(promises)).map((one) => (one.status === 'fulfilled' ? one.value : one.reason))

/** A client whose scripts are noted, and answered as told. */
function scripts(answer: (keys: string[], args: string[], command: 'evalsha' | 'eval') => unknown, isCluster = false) {
  const sent: [script: string, keys: string[], args: string[]][] = []
  const command =
    (name: 'evalsha' | 'eval') =>
    async (script: string, count: number, ...rest: string[]) => {
      const [keys, args] = [rest.slice(0, count), rest.slice(count)]
      sent.push([script, keys, args])
      return answer(keys, args, name)
    }
  const client = { evalshaBuffer: command('evalsha'), evalBuffer: command('eval'), isCluster }
  return { sent, connection: new IoredisConnection(client as unknown as IoredisClient) }
}

const numbered = (count: number) => Array.from({ length: count }, (_, n) => `key ${n}`)

t.test('renewals of one turn go by one script, no more than 500 at once', async (t) => {
  const { sent, connection } = scripts((keys) => keys.map(() => 1))
  const renewals = new Renewals(connection)
  const due = numbered(1_001).map((key) => renewals.renew(key, `owner of ${key}`, 1_000))
  t.strictSame(sent, [], 'nothing goes before the turn is over')
  t.ok((await Promise.all(due)).every((renewed) => renewed === true))
  t.strictSame(
    sent.map(([script, keys, args]) => [script, keys.length, args.length]),
    [500, 500, 1].map((count) => [RENEW.sha, count, 2 * count])
  )
  t.strictSame(
    sent.flatMap(([, keys]) => keys),
    numbered(1_001)
  )
  t.strictSame(sent[2]?.[2], ['owner of key 1000', '1000'])
  t.equal(await renewals.renew('another', 'owner', 1_000), true)
  t.equal(sent.length, 4)
  t.strictSame(sent[3]?.[1], ['another'], 'with nothing of those before')
})

t.test('a renewal that is alone in its turn goes as well', async (t) => {
  const { sent, connection } = scripts(() => [1])
  t.equal(await soon(new Renewals(connection).renew('key', 'owner', 1_000)), true)
  t.strictSame(sent, [[RENEW.sha, ['key'], ['owner', '1000']]])
})

t.test('in a Cluster each renewal goes alone', async (t) => {
  const { sent, connection } = scripts((keys) => keys.map(() => 1), true)
  const renewals = new Renewals(connection)
  t.strictSame(await Promise.all(numbered(3).map((key) => renewals.renew(key, 'owner', 1_000))), [true, true, true])
  t.strictSame(
    sent.map(([, keys]) => keys),
    numbered(3).map((key) => [key])
  )
})

t.test('a renewal counts, does not, or fails with its own words, whatever becomes of its neighbours', async (t) => {
  const told = [1, 0, Buffer.from('1'), Buffer.from('0'), Buffer.from('ERR 1'), Buffer.from('10'), undefined]
  const { connection } = scripts(() => told)
  const renewals = new Renewals(connection)
  t.match(await outcomes(told.map((_, n) => renewals.renew(`${n}`, 'owner', 1_000))), [
    true,
    false,
    true,
    false,
    { message: 'ERR 1' },
    { message: '10' },
    false
  ])
})

t.test('a script that fails fails for all that went with it, and for no others', async (t) => {
  const { connection } = scripts((keys) => {
    if (keys.includes('key 0')) throw failure('lost')
    return keys.map(() => 1)
  })
  const renewals = new Renewals(connection)
  const told = await outcomes(numbered(501).map((key) => renewals.renew(key, 'owner', 1_000)))
  t.ok(told.slice(0, 500).every((error) => error instanceof Error && error.message === 'lost'))
  t.equal(told[500], true)
})

t.test('a script is named, and sent whole to a server that does not know it', async (t) => {
  const known = scripts(() => 'told')
  t.equal(await runScript(known.connection, WATCH, ['k'], ['a']), 'told')
  t.strictSame(known.sent, [[WATCH.sha, ['k'], ['a']]])
  const forgotten = scripts((_keys, _args, command) => {
    if (command === 'evalsha') throw failure('NOSCRIPT No matching script. Please use EVAL.')
    return 'told'
  })
  t.equal(await runScript(forgotten.connection, WATCH, ['k'], ['a']), 'told')
  t.strictSame(forgotten.sent, [
    [WATCH.sha, ['k'], ['a']],
    [WATCH.source, ['k'], ['a']]
  ])
})

t.test('another failure of a script is not tried again, and says nothing of what was sent', async (t) => {
  for (const [thrown, message] of [
    [failure('OOM, not NOSCRIPT'), 'OOM, not NOSCRIPT'],
    ['NOSCRIPT', 'NOSCRIPT']
  ] as const) {
    const { sent, connection } = scripts(() => {
      throw thrown
    })
    const [error] = await outcomes([runScript(connection, WATCH, ['k'], ['a'])])
    t.equal((error as Error).message, message)
    t.notOk('command' in (error as Error))
    t.equal(sent.length, 1)
  }
  const { connection } = scripts((_keys, _args, command) => {
    throw failure(command === 'evalsha' ? 'NOSCRIPT' : 'READONLY')
  })
  const [error] = await outcomes([runScript(connection, WATCH, ['k'], ['a'])])
  t.equal((error as Error).message, 'READONLY')
  t.notOk('command' in (error as Error))
})

t.test('of an error its name and words are told, and not the command', (t) => {
  const error = discreet(failure('OOM', 'ReplyError'))
  t.ok(error instanceof Error)
  t.match(error, { name: 'ReplyError', message: 'OOM' })
  t.notOk('command' in error)
  t.match(discreet('words'), { name: 'Error', message: 'words' })
  t.match(discreet(undefined), { name: 'Error', message: 'undefined' })
  t.end()
})

t.test('a value of another type is told from other errors, as Redis says it before 7.0 and since', (t) => {
  const words = 'WRONGTYPE Operation against a key holding the wrong kind of value'
  t.ok(isWrongType(new Error(words)))
  t.ok(isWrongType(new Error(`ERR Error running script (call to f_1): @user_script:1: ${words}`)))
  t.notOk(isWrongType(new Error('OOM command not allowed')))
  t.end()
})
