import { EventEmitter } from 'node:events'
import t, { type Test } from 'tap'
import { Guard } from '../../lib/stores/postgres/client-guard.js'
import { NestedTransactions } from '../../lib/stores/postgres/nested-transactions.js'
import type { TransactionClient } from '../../types/index.js'

/* What becomes of a handler's BEGIN, COMMIT and ROLLBACK in a transaction that is not its own. */

/** Answers as `pg` does: with a list when there were several statements. What it cannot do is told by `failing`. */
class FakeClient extends EventEmitter {
  readonly sent: unknown[] = []
  failing: (text: string) => string | undefined = () => undefined

  async query(query: string | { text: string }): Promise<unknown> {
    const text = typeof query === 'string' ? query : query.text
    this.sent.push(query)
    const code = this.failing(text)
    if (code !== undefined) throw Object.assign(new Error(`no ${text}`), { code })
    const results = text.split('; ').map((statement) => ({ command: statement.split(' ')[0], rows: [] }))
    return results.length === 1 ? results[0] : results
  }
}

/** Takes a query as a client of `pg` does. */
type Ask = (...args: unknown[]) => Promise<{ command: string }>

function nested() {
  const fake = new FakeClient()
  const client = fake as unknown as TransactionClient
  const guard = new Guard(client, new NestedTransactions(client, 's'))
  return { fake, guard, ask: guard.client.query as unknown as Ask }
}

/** Asks for each statement in turn; what was answered, and what was sent instead. */
async function told(statements: string[], { fake, ask } = nested()) {
  const answers: unknown[] = []
  for (const text of statements) answers.push((await ask(text)).command)
  return { answers, sent: fake.sent }
}

const COMMITTED = (name: string) => [`RELEASE ${name}; SAVEPOINT ${name}`, `ROLLBACK TO ${name}; RELEASE ${name}`]
const ROLLED_BACK = (name: string) => [`ROLLBACK TO ${name}; RELEASE ${name}`]

const BEGINS: [text: string, command: string, modes?: string][] = [
  ['BEGIN', 'BEGIN'],
  ['begin;', 'BEGIN'],
  [' ; BEGIN ; ', 'BEGIN'],
  ['/* traceparent=1; */ BEGIN -- now', 'BEGIN'],
  ['BEGIN WORK', 'BEGIN'],
  ['BEGIN TRANSACTION', 'BEGIN'],
  ['START TRANSACTION', 'START'],
  ['start\n\ttransaction;', 'START'],
  ['BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED', 'BEGIN', 'ISOLATION LEVEL READ COMMITTED'],
  ['begin isolation level read uncommitted', 'BEGIN', 'isolation level read uncommitted'],
  ['START TRANSACTION ISOLATION LEVEL SERIALIZABLE;', 'START', 'ISOLATION LEVEL SERIALIZABLE'],
  ['BEGIN READ ONLY', 'BEGIN', 'READ ONLY'],
  ['BEGIN READ WRITE', 'BEGIN', 'READ WRITE'],
  ['BEGIN NOT DEFERRABLE', 'BEGIN', 'NOT DEFERRABLE'],
  [
    'BEGIN ISOLATION LEVEL REPEATABLE READ , READ ONLY DEFERRABLE',
    'BEGIN',
    'ISOLATION LEVEL REPEATABLE READ , READ ONLY DEFERRABLE'
  ]
]

t.test('what begins a transaction sets a savepoint, and its modes', async (t) => {
  for (const [text, command, modes] of BEGINS) {
    const { answers, sent } = await told([text])
    t.strictSame(
      [answers, sent],
      [[command], [modes === undefined ? 'SAVEPOINT s_1' : `SAVEPOINT s_1; SET TRANSACTION ${modes}`]],
      text
    )
  }
})

t.test('what commits releases it, whatever has failed meanwhile', async (t) => {
  for (const text of [
    'COMMIT',
    'commit;',
    'COMMIT WORK',
    'COMMIT TRANSACTION',
    'COMMIT AND NO CHAIN',
    'END',
    'end transaction;'
  ]) {
    const { answers, sent } = await told(['BEGIN', text])
    t.strictSame([answers[1], sent.slice(1)], ['COMMIT', COMMITTED('s_1')], text)
  }
})

t.test('what rolls back goes back to it, and releases it', async (t) => {
  for (const text of [
    'ROLLBACK',
    'rollback;',
    'ROLLBACK WORK',
    'ROLLBACK TRANSACTION AND NO CHAIN',
    'ABORT',
    'abort work'
  ]) {
    const { answers, sent } = await told(['BEGIN', text])
    t.strictSame([answers[1], sent.slice(1)], ['ROLLBACK', ROLLED_BACK('s_1')], text)
  }
})

t.test('each end is that of the last one that was begun; names are used once', async (t) => {
  const { answers, sent } = await told(['BEGIN', 'BEGIN', 'COMMIT', 'BEGIN', 'ROLLBACK', 'ROLLBACK', 'BEGIN', 'COMMIT'])
  t.strictSame(answers, ['BEGIN', 'BEGIN', 'COMMIT', 'BEGIN', 'ROLLBACK', 'ROLLBACK', 'BEGIN', 'COMMIT'])
  t.strictSame(sent, [
    ...['SAVEPOINT s_1', 'SAVEPOINT s_2', ...COMMITTED('s_2')],
    ...['SAVEPOINT s_3', ...ROLLED_BACK('s_3'), ...ROLLED_BACK('s_1')],
    ...['SAVEPOINT s_4', ...COMMITTED('s_4')]
  ])
})

t.test('what is not awaited is sent in the same order', async (t) => {
  const { fake, ask } = nested()
  const texts = ['BEGIN', 'INSERT 1', 'BEGIN', 'INSERT 2', 'ROLLBACK', 'COMMIT', 'INSERT 3']
  const answers = await Promise.all(texts.map((text) => ask(text)))
  t.strictSame(
    answers.map(({ command }) => command),
    ['BEGIN', 'INSERT', 'BEGIN', 'INSERT', 'ROLLBACK', 'COMMIT', 'INSERT']
  )
  t.strictSame(fake.sent, [
    ...['SAVEPOINT s_1', 'INSERT 1', 'SAVEPOINT s_2', 'INSERT 2'],
    ...[...ROLLED_BACK('s_2'), ...COMMITTED('s_1'), 'INSERT 3']
  ])
})

t.test('savepoints of the handler are its own', async (t) => {
  const texts = [
    'SAVEPOINT a',
    'ROLLBACK TO a',
    'ROLLBACK WORK TO SAVEPOINT a',
    'RELEASE a',
    'SET TRANSACTION READ ONLY'
  ]
  const { fake, guard, ask } = nested()
  for (const text of texts) await ask(text)
  t.strictSame([fake.sent, guard.hasBegun], [texts, false])
})

const refused = async (t: Test, asked: Promise<unknown>, message: RegExp, name?: string) =>
  t.rejects(asked, { code: 'FST_IDEMPOTENCY_TRANSACTION', message }, name ?? '')

t.test('an end without a beginning is refused: it would end the transaction of the request', async (t) => {
  const { fake, ask } = nested()
  for (const text of ['COMMIT', 'END', 'ROLLBACK', 'ABORT']) {
    await refused(t, ask(text), new RegExp(`^${text} without a BEGIN`))
    await ask('BEGIN')
    await ask('ROLLBACK')
    fake.sent.length = 0
    await refused(t, ask(text), new RegExp(`^${text} without a BEGIN`))
    t.strictSame(fake.sent, [])
  }
})

t.test('what a savepoint cannot be is refused, and changes nothing', async (t) => {
  for (const text of [
    'COMMIT AND CHAIN',
    'ROLLBACK AND CHAIN',
    "PREPARE TRANSACTION 'a'",
    "COMMIT PREPARED 'a'",
    "ROLLBACK PREPARED 'a'",
    'BEGIN ISOLATION LEVEL SNAPSHOT',
    'BEGIN READ ONLY, ',
    'BEGIN, READ ONLY',
    'BEGIN $1',
    'COMMIT a'
  ]) {
    const { fake, guard, ask } = nested()
    await ask('BEGIN')
    await refused(t, ask(text), /^A nested transaction has no /, text)
    t.strictSame([fake.sent, guard.hasBegun], [['SAVEPOINT s_1'], true], text)
  }
})

t.test('it is refused among other statements of one text, none of which is sent then', async (t) => {
  for (const text of [
    'BEGIN; INSERT 1; COMMIT',
    'BEGIN; SELECT 1',
    'SELECT 1; COMMIT',
    'COMMIT; BEGIN',
    ';ROLLBACK;;SELECT 1;'
  ]) {
    const { fake, ask } = nested()
    await ask('BEGIN')
    await refused(t, ask(text), /^(?:BEGIN|COMMIT|ROLLBACK) has to be sent by itself/, text)
    t.strictSame(fake.sent, ['SAVEPOINT s_1'], text)
  }
})

t.test('it may come as an object, named or not, with values or a callback', async (t) => {
  const { fake, ask, guard } = nested()
  t.match(await ask({ text: 'BEGIN' }), { command: 'BEGIN' })
  t.match(await ask({ name: 'begin', text: 'BEGIN', values: [] }), { command: 'BEGIN' })
  t.match(await ask({ text: 'COMMIT', rowMode: 'array', types: {} }, []), { command: 'COMMIT' })
  t.match(await ask('ROLLBACK', []), { command: 'ROLLBACK' })
  t.strictSame(fake.sent, ['SAVEPOINT s_1', 'SAVEPOINT s_2', ...COMMITTED('s_2'), ...ROLLED_BACK('s_1')])
  for (const [n, args] of [['BEGIN'], ['BEGIN', []], [{ text: 'BEGIN' }]].entries()) {
    const heard = await new Promise<unknown[]>((resolve) => {
      t.equal(
        ask(...args, (...heard: unknown[]) => resolve(heard)),
        undefined
      )
    })
    t.match(heard, [null, { command: 'BEGIN' }], String(n))
  }
  t.match(
    await new Promise((resolve) => ask({ text: 'ROLLBACK', callback: (...heard: unknown[]) => resolve(heard) })),
    [null, { command: 'ROLLBACK' }]
  )
  fake.failing = () => '08006'
  t.match(await new Promise((resolve) => ask('COMMIT', resolve)), { code: '08006' })
  guard.over = 'over'
  t.match(await new Promise((resolve) => ask('COMMIT', resolve)), { message: 'over' })
})

t.test('what a callback throws is not lost in a promise', async (t) => {
  const { ask } = nested()
  const thrown = new Promise((resolve) => t.teardown(listenOnce('uncaughtException', (...heard) => resolve(heard))))
  ask('BEGIN', () => {
    throw new Error('mine')
  })
  t.match(await thrown, [{ message: 'mine' }, 'uncaughtException'])
})

/** Takes the place of all listeners for one event of the process. */
function listenOnce(event: 'uncaughtException', listener: NodeJS.UncaughtExceptionListener): () => void {
  const others = process.listeners(event)
  process.removeAllListeners(event)
  process.once(event, listener)
  return () => {
    for (const other of others) process.on(event, other)
  }
}

t.test('an object that takes its answer itself is refused there: its text cannot be another', async (t) => {
  const { fake, ask } = nested()
  const error = await new Promise<Error>((handleError) => ask({ text: 'BEGIN', submit() {}, handleError }))
  t.match(error, { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /^BEGIN has to be asked for by its text/ })
  await refused(t, ask({ text: 'BEGIN', submit() {} }), /has to be asked for by its text/)
  t.strictSame(fake.sent, [])
})

t.test('a COMMIT of what has failed is a rollback, and says so', async (t) => {
  const { fake, guard, ask } = nested()
  await ask('BEGIN')
  fake.failing = (text) => (text.startsWith('RELEASE') ? '25P02' : undefined)
  t.match(await ask('COMMIT'), { command: 'ROLLBACK' })
  t.strictSame([fake.sent.slice(1), guard.hasBegun], [COMMITTED('s_1'), false])
})

t.test('a COMMIT that fails otherwise leaves something to be rolled back, which is not what is outside', async (t) => {
  for (const [text, code] of [
    [/^RELEASE/, '57014'],
    [/./, '3B001'],
    [/^ROLLBACK/, '08006']
  ] as const) {
    const s = nested()
    await told(['BEGIN', 'BEGIN'], s)
    s.fake.failing = (sent) => (text.test(sent) ? code : undefined)
    await t.rejects(s.ask('COMMIT'), { code })
    s.fake.failing = () => undefined
    s.fake.sent.length = 0
    await told(['ROLLBACK', 'COMMIT'], s)
    t.strictSame([s.fake.sent, s.guard.hasBegun], [[...ROLLED_BACK('s_2'), ...COMMITTED('s_1')], false])
  }
  const s = nested()
  await s.ask('BEGIN')
  s.fake.failing = (text) => (text.startsWith('RELEASE') ? '25P02' : '08006')
  await t.rejects(s.ask('COMMIT'), { code: '08006' }, 'what ends it has the last word')
})

t.test('a BEGIN that fails is to be rolled back as well: whoever asks so does not end what is outside', async (t) => {
  const s = nested()
  await s.ask('BEGIN')
  s.fake.failing = () => '25P02'
  await t.rejects(s.ask('BEGIN'), { code: '25P02' })
  s.fake.failing = () => undefined
  s.fake.sent.length = 0
  await told(['ROLLBACK', 'ROLLBACK'], s)
  t.strictSame(s.fake.sent, [...ROLLED_BACK('s_2'), ...ROLLED_BACK('s_1')])
})

t.test('modes that the server refuses for a savepoint are told as such; other errors are its own', async (t) => {
  const { fake, ask } = nested()
  fake.failing = () => '25001'
  const cause = { code: '25001' }
  await t.rejects(ask('BEGIN isolation level serializable'), {
    code: 'FST_IDEMPOTENCY_TRANSACTION',
    message: /^A nested transaction cannot be ISOLATION LEVEL SERIALIZABLE: no SAVEPOINT/,
    cause
  })
  await t.rejects(ask('BEGIN'), cause)
  fake.failing = () => '08006'
  await t.rejects(ask('BEGIN READ ONLY'), { code: '08006' })
})

t.test('the guard knows what is under way and what is open', async (t) => {
  const { guard, ask } = nested()
  t.equal(guard.hasBegun, false)
  const begun = ask('BEGIN')
  t.same([guard.busy, guard.hasBegun, guard.asked], [true, true, 1])
  await begun
  await guard.idle
  t.same([guard.busy, guard.hasBegun], [false, true])
  const committed = ask('COMMIT')
  t.same([guard.busy, guard.hasBegun, guard.asked], [true, false, 2], 'one question, whatever is sent for it')
  await committed
  await guard.dry()
  t.equal(guard.busy, false)
})

t.test('a refusal or an error that nobody listens to does not end the process', async (t) => {
  const { fake, guard, ask } = nested()
  const unheard: unknown[] = []
  const hear = (error: unknown) => void unheard.push(error)
  process.on('unhandledRejection', hear)
  t.teardown(() => process.off('unhandledRejection', hear))
  void ask('COMMIT')
  void ask('BEGIN; COMMIT')
  fake.failing = () => '08006'
  void ask('BEGIN')
  void ask('BEGIN')
  void ask('COMMIT')
  void ask('ROLLBACK')
  await guard.dry()
  await new Promise(setImmediate)
  t.strictSame(unheard, [])
})
