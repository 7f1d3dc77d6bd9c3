import { EventEmitter } from 'node:events'
import t from 'tap'
import { AS_TEXT } from '../../lib/stores/postgres/rows.js'
import { KEEP_ALIVE, PostgresSql } from '../../lib/stores/postgres/statements.js'
import { PostgresTransaction } from '../../lib/stores/postgres/transaction.js'
import type { TransactionClaim, TransactionClient } from '../../types/index.js'
import { claim, reply, tombstone } from '../support/store-fixtures.js'

/* What the transaction of a route says to its client, and how it gives it back. */

const sql = new PostgresSql(null, 'keys')
const there = new PostgresSql('public', 'keys')

const said = (code: string, message = 'no') =>
  Object.assign(new Error(message), { code, severity: 'ERROR', detail: 'secret' })
const silent = () => Object.assign(new Error('reset'), { code: 'ECONNRESET' })
const never = () => new Promise<never>(() => {})

/** A claim's answer, as of several statements. */
const found = (row: object | undefined) => [
  { command: 'BEGIN', rows: [] },
  { command: 'SELECT', rows: row === undefined ? [] : [row] },
  { command: 'SELECT', rows: [{ schema: 'public' }] }
]
const ACQUIRED = { found: 'acquired', attempt: '2' }

class Client extends EventEmitter {
  /** What was asked, by the first of its words, or by name. */
  readonly asked: string[] = []
  readonly queries: unknown[][] = []
  readonly released: unknown[][] = []
  /** What is answered instead of yes, by name: one after the other, the last again and again. */
  readonly answers: Record<string, (() => unknown)[]> = {}

  async query(...args: unknown[]): Promise<unknown> {
    this.queries.push(args)
    const text = typeof args[0] === 'string' ? args[0] : (args[0] as { text: string }).text
    const name = nameOf(text)
    this.asked.push(name)
    const answers = this.answers[name]
    const answer = answers && answers.length > 1 ? answers.shift() : answers?.[0]
    if (answer !== undefined) return answer()
    if (name === 'claim') return found(ACQUIRED)
    return { command: name, rows: [], rowCount: 1 }
  }

  escapeLiteral(text: string): string {
    return `'${text}'`
  }

  release(...args: unknown[]): void {
    this.released.push(args)
  }
}

function nameOf(text: string): string {
  if (text.includes('BEGIN;')) return text.startsWith('ROLLBACK;') ? 'claim again' : 'claim'
  if (text === there.completeInTransaction) return 'write'
  if (text === sql.completeInTransaction) return 'write in the wrong schema'
  if (text === there.wake) return 'wake'
  if (text === KEEP_ALIVE) return 'ping'
  return text.replace(/^(ROLLBACK TO) s[0-9a-f]{24}$/, '$1 the claim')
}

/** The answer to a ping: whether somebody is blocked. */
const pinged = (isBlocking: boolean) => [{ rows: [{}] }, { rows: isBlocking ? [{}] : [] }]

const CLAIM: TransactionClaim = {
  ...claim({ token: 't', fingerprint: 'f', leaseMs: 5_000, retainMs: 60_000 }),
  wake: false,
  timeoutMs: 20
}

async function open(members: Partial<TransactionClaim> = {}, prepare: (client: Client) => void = () => {}) {
  const client = new Client()
  prepare(client)
  const mine = { ...CLAIM, ...members }
  const transaction = new PostgresTransaction(client as unknown as TransactionClient, sql, 'k', mine)
  const acquired = await transaction.begin(mine)
  return { acquired, client, transaction }
}

/** Did the pool get its client back once, to close its connection? */
const isGivenUp = ({ released }: Client) => released.length === 1 && released[0]?.[0] instanceof Error

const settle = () => new Promise((resolve) => setImmediate(resolve))

t.test('a transaction begins and claims its key in one trip', async (t) => {
  const { acquired, client, transaction } = await open({ takeover: true, token: 't\0' })
  t.strictSame(acquired, { state: 'acquired', attempt: 2, transaction })
  t.strictSame(client.asked, ['claim'])
  const values = {
    key: "'k'",
    token: "'t\\0'",
    fingerprint: "'f'",
    leaseMs: '5000::float8',
    retainMs: '60000::float8',
    takeover: 'true'
  }
  const begin = client.queries[0]?.[0] as { text: string }
  const [, savepoint = ''] = /SAVEPOINT (s[0-9a-f]{24});/.exec(begin.text) ?? []
  t.strictSame(begin, { text: sql.begin(values, savepoint, 5_000), types: AS_TEXT })
  const other = (await open()).client.queries[0]?.[0] as { text: string }
  t.notOk(other.text.includes(savepoint), 'what it goes back to has a name that nobody knows')
  t.strictSame(client.released, [])
})

t.test('the server waits for a silent connection no longer than it can count', async (t) => {
  const { client } = await open({ leaseMs: 1e15 })
  t.match(client.queries[0]?.[0], { text: /idle_in_transaction_session_timeout = 2147483647;/ })
})

t.test('without the key it is over at once, and the client goes back', async (t) => {
  for (const row of [{ found: 'locked' }, { found: 'running', attempt: '1', fingerprint: 'g', left_ms: '7' }]) {
    const { acquired, client } = await open({ wake: true }, ({ answers }) => {
      answers.claim = [() => found(row)]
    })
    t.match(acquired, { state: 'running', leaseMs: row.found === 'locked' ? 5_000 : 7 })
    await settle()
    t.strictSame(client.asked, ['claim', 'ROLLBACK'], 'nobody waits for what it has not held')
    t.strictSame(client.released, [[]])
  }
})

t.test('a key that changes hands is asked for anew, in a new transaction, twenty times', async (t) => {
  for (const lose of [
    () => found(undefined),
    () => Promise.reject(said('40001')),
    () => Promise.reject(said('40P01'))
  ]) {
    const { acquired, client } = await open({}, ({ answers }) => {
      answers.claim = [lose]
      answers['claim again'] = [...Array.from({ length: 18 }, () => lose), () => found(ACQUIRED)]
    })
    t.match(acquired, { state: 'acquired' })
    t.strictSame(client.asked, ['claim', ...Array.from({ length: 19 }, () => 'claim again')])
    const tooFast = new Client()
    tooFast.answers.claim = tooFast.answers['claim again'] = [lose]
    const transaction = new PostgresTransaction(tooFast as unknown as TransactionClient, sql, 'k', CLAIM)
    await t.rejects(transaction.begin(CLAIM), { message: 'The idempotency key changes hands too fast' })
    t.equal(tooFast.asked.length, 20)
    t.equal(isGivenUp(tooFast), true)
  }
})

t.test('a claim that fails, or is not answered in time, costs the connection', async (t) => {
  for (const [answer, message] of [
    [() => Promise.reject(said('42501', 'permission denied')), 'permission denied'],
    [() => Promise.reject(silent()), 'reset'],
    [never, /did not answer|no answer|time/i],
    [() => found({ found: 'unknown' }), /could not be decoded/]
  ] as const) {
    const client = new Client()
    client.answers.claim = [answer]
    const transaction = new PostgresTransaction(client as unknown as TransactionClient, sql, 'k', CLAIM)
    const error = await transaction.begin(CLAIM).catch((error) => error)
    t.match(error, { message })
    t.notOk('detail' in error)
    t.equal(isGivenUp(client), true)
    t.equal(client.asked.length, 1)
  }
})

t.test('a reply is written and committed, and the client goes back as it was', async (t) => {
  const { client, transaction } = await open()
  const record = reply({ headers: [], body: Buffer.from('b'), fingerprint: 'f' })
  t.strictSame(await transaction.complete(record, 7), { state: 'committed' })
  t.strictSame(client.asked, ['claim', 'write', 'COMMIT'])
  t.strictSame(client.queries[1]?.[1], ['k', 't', 'f', 1_700_000_000_000, 201, '[]', Buffer.from('b'), true, null, 7])
  t.strictSame(client.released, [[]])
  t.same([client.listenerCount('error'), client.listenerCount('end')], [0, 0])
  t.equal(transaction.lost.aborted, false)
})

t.test('those who wait are told after the commit, and after a rollback', async (t) => {
  for (const how of ['commit', 'rollback']) {
    const { client, transaction } = await open({ wake: true })
    if (how === 'commit') await transaction.complete(reply(), 7)
    else t.equal(await transaction.rollback(), true)
    await settle()
    t.strictSame(client.asked.slice(-2), [how.toUpperCase(), 'wake'])
    t.strictSame(client.queries.at(-1)?.[1], ['k'])
    t.strictSame(client.released, [[]])
  }
})

t.test('those who cannot be told look by themselves: the connection is given up', async (t) => {
  for (const answer of [() => Promise.reject(silent()), never]) {
    const { client, transaction } = await open({ wake: true }, ({ answers }) => {
      answers.wake = [answer]
    })
    t.strictSame(await transaction.complete(reply(), 7), { state: 'committed' }, 'it is')
    while (client.released.length === 0) await new Promise((resolve) => setTimeout(resolve, 5))
    t.equal(isGivenUp(client), true)
  }
})

t.test("a handler's failure is undone up to the claim, and its record is written", async (t) => {
  const { client, transaction } = await open()
  t.match(await transaction.complete(reply({ statusCode: 404 }), 7, true), { state: 'committed' })
  t.strictSame(client.asked, ['claim', 'ROLLBACK TO the claim', 'write', 'COMMIT'])
})

t.test('a refusal behind a statement that has failed is true without its writes; a success is not', async (t) => {
  const broken = ({ answers }: Client) => {
    answers.write = [() => Promise.reject(said('25P02')), () => ({ command: 'SELECT', rows: [], rowCount: 1 })]
  }
  const { client, transaction } = await open({}, broken)
  t.match(await transaction.complete(reply({ statusCode: 400 }), 7), { state: 'committed' })
  t.strictSame(client.asked, ['claim', 'write', 'ROLLBACK TO the claim', 'write', 'COMMIT'])
  for (const record of [reply({ statusCode: 399 }), tombstone('hijacked')]) {
    const { client, transaction } = await open({}, broken)
    const outcome = await transaction.complete(record, 7)
    t.match(outcome, {
      state: 'refused',
      error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /as if all was well, but a statement .* has failed/ }
    })
    t.strictSame(client.asked, ['claim', 'write', 'ROLLBACK'])
    t.strictSame(client.released, [[]])
  }
})

t.test('a nested transaction that is open at the end is not committed: no success is true with it', async (t) => {
  for (const record of [reply({ statusCode: 399 }), tombstone('hijacked')]) {
    const { client, transaction } = await open({ nested: true })
    await transaction.client.query('BEGIN')
    t.match(await transaction.complete(record, 7), {
      state: 'refused',
      error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /before a transaction that it has begun was ended/ }
    })
    t.match(client.asked, ['claim', /^SAVEPOINT s[0-9a-f]{24}_1$/, 'ROLLBACK'])
  }
  for (const undo of [false, true]) {
    const { client, transaction } = await open({ nested: true })
    await transaction.client.query('BEGIN')
    t.match(await transaction.complete(reply({ statusCode: 400 }), 7, undo), { state: 'committed' })
    t.strictSame(client.asked.slice(2), ['ROLLBACK TO the claim', 'write', 'COMMIT'])
  }
  const { transaction } = await open({ nested: false })
  await t.rejects(transaction.client.query('BEGIN'), { code: 'FST_IDEMPOTENCY_TRANSACTION' })
})

t.test('a claim that is not there any more was ended by its handler', async (t) => {
  const { client, transaction } = await open({}, ({ answers }) => {
    answers.write = [() => ({ command: 'SELECT', rows: [], rowCount: 0 })]
  })
  t.match(await transaction.complete(reply(), 7), {
    state: 'refused',
    error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /was ended by its handler/ }
  })
  t.strictSame(client.asked, ['claim', 'write', 'ROLLBACK'])
})

t.test(
  'a record that the server refuses to write: contention as it is, all else as what the handler has done',
  async (t) => {
    const refused = async (error: Error) => {
      const scene = await open({}, ({ answers }) => {
        answers.write = [() => Promise.reject(error)]
      })
      return { ...scene, outcome: await scene.transaction.complete(reply(), 7) }
    }
    for (const code of ['40001', '40P01']) {
      const error = said(code)
      const { client, outcome } = await refused(error)
      t.strictSame(outcome, { state: 'refused', error })
      t.strictSame(client.asked, ['claim', 'write', 'ROLLBACK'])
    }
    const { outcome } = await refused(said('23503', 'violates foreign key'))
    t.match(outcome, {
      state: 'refused',
      error: {
        code: 'FST_IDEMPOTENCY_TRANSACTION',
        message:
          /What its handler has done keeps the reply from being stored in the transaction: violates foreign key$/,
        cause: { message: 'violates foreign key', code: '23503' }
      }
    })
    t.notOk('detail' in ((outcome as { error: Error }).error.cause as Error))
  }
)

t.test('a record that could not be written because of the server, or of nobody knows what, is its error', async (t) => {
  for (const [error, isAlive] of [
    [said('53100', 'disk full'), true],
    [silent(), true],
    [said('23503'), false],
    [said('40001'), false]
  ] as const) {
    const { client, transaction } = await open({}, ({ answers }) => {
      answers.write = [() => Promise.reject(error)]
      if (!isAlive) answers.ROLLBACK = [() => Promise.reject(silent())]
    })
    const thrown = await transaction.complete(reply(), 7).catch((error) => error)
    t.match(thrown, { message: error.message, code: (error as { code?: string }).code })
    t.notOk('detail' in thrown)
    t.equal(isGivenUp(client), !isAlive)
  }
})

t.test('a COMMIT that is refused has rolled back', async (t) => {
  const error = said('23503')
  const { client, transaction } = await open({}, ({ answers }) => {
    answers.COMMIT = [() => Promise.reject(error)]
  })
  t.strictSame(await transaction.complete(reply(), 7), { state: 'refused', error })
  t.strictSame(client.asked.slice(-2), ['COMMIT', 'ROLLBACK'])
  t.strictSame(client.released, [[]])
})

t.test('a COMMIT that rolls back instead is no commit', async (t) => {
  const { transaction } = await open({}, ({ answers }) => {
    answers.COMMIT = [() => ({ command: 'ROLLBACK' })]
  })
  t.match(await transaction.complete(reply(), 7), {
    state: 'refused',
    error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /could not be committed/ }
  })
})

t.test('a COMMIT of which nobody knows the outcome is an error, and ends the connection', async (t) => {
  for (const [error, rollsBack] of [
    [silent(), true],
    [said('57P01', 'terminating'), false]
  ] as const) {
    const { client, transaction } = await open({ wake: true }, ({ answers }) => {
      answers.COMMIT = [() => Promise.reject(error)]
      if (!rollsBack) answers.ROLLBACK = [() => Promise.reject(silent())]
    })
    const thrown = await transaction.complete(reply(), 7).catch((error) => error)
    t.match(thrown, { message: error.message })
    t.notOk('detail' in thrown)
    t.equal(isGivenUp(client), true)
    t.equal(client.asked.includes('wake'), false)
  }
})

t.test('a rollback that is not answered in time ends the connection', async (t) => {
  const { client, transaction } = await open({}, ({ answers }) => {
    answers.ROLLBACK = [never]
  })
  t.equal(await transaction.rollback(), false)
  t.equal(isGivenUp(client), true)
})

t.test('the end waits for what the handler still asks, and what follows, and then lets it ask no more', async (t) => {
  for (const end of ['complete', 'rollback'] as const) {
    let answer = () => {}
    const { client, transaction } = await open({}, ({ answers }) => {
      answers['UPDATE x'] = [
        () =>
          new Promise<void>((resolve) => {
            answer = resolve
          })
      ]
    })
    const asked = transaction.client.query('UPDATE x').then(() => transaction.client.query('UPDATE y'))
    const failure = reply({ statusCode: 409 })
    const ended = end === 'complete' ? transaction.complete(failure, 7) : transaction.rollback()
    await settle()
    t.strictSame(client.asked, ['claim', 'UPDATE x'])
    answer()
    await asked
    await ended
    const last = end === 'complete' ? ['write', 'COMMIT'] : ['ROLLBACK']
    t.strictSame(client.asked, ['claim', 'UPDATE x', 'UPDATE y', ...last])
    await t.rejects(transaction.client.query('UPDATE z'), { code: 'FST_IDEMPOTENCY_TRANSACTION' })
  }
})

t.test('a handler that goes on asking is not waited for without an end', async (t) => {
  const { client, transaction } = await open()
  let rounds = 0
  const goOn = async () => {
    for (;;) {
      await transaction.client.query('UPDATE x')
      rounds++
      await settle()
    }
  }
  const gone = goOn().catch((error) => error)
  t.match(await transaction.complete(reply(), 7), { state: 'refused' })
  t.match(await gone, { code: 'FST_IDEMPOTENCY_TRANSACTION' })
  t.ok(rounds > 1)
  t.strictSame(client.released, [[]])
})

t.test('a lost connection is told once, and the client goes back broken', async (t) => {
  for (const [event, error] of [
    ['error', new Error('terminated')],
    ['end', undefined]
  ] as const) {
    const { client, transaction } = await open()
    client.emit(event, error)
    t.equal(transaction.lost.aborted, true)
    t.match(client.released, [[error ?? { message: 'The connection of the transaction has ended' }]])
    client.emit('end')
    t.equal(client.released.length, 1)
  }
})

t.test('what is no error is one all the same when a client goes back', async (t) => {
  const { client } = await open()
  client.emit('error', 'text')
  t.strictSame(client.released, [[true]])
})

t.test('an abandoned transaction gives its client back broken, and lets nobody ask', async (t) => {
  const { client, transaction } = await open()
  transaction.abandon()
  t.match(client.released, [[{ message: 'The transaction was abandoned' }]])
  await t.rejects(transaction.client.query('SELECT 1'), { code: 'FST_IDEMPOTENCY_TRANSACTION' })
  transaction.abandon()
  t.equal(client.released.length, 1)
  transaction.keepAlive()
  t.strictSame(client.asked, ['claim'])
})

t.test('a transaction is kept alive by one query at a time, and not beside those of its handler', async (t) => {
  const pings: { done: () => void; fail: (error: Error) => void }[] = []
  const { client, transaction } = await open({}, ({ answers }) => {
    answers.ping = [() => new Promise((done, fail) => pings.push({ done: () => done(pinged(false)), fail }))]
  })
  transaction.keepAlive()
  transaction.keepAlive()
  t.strictSame(client.asked, ['claim', 'ping'])
  pings[0]?.done()
  await settle()
  transaction.keepAlive()
  t.equal(client.asked.length, 3)
  pings[1]?.fail(new Error('reset'))
  await settle()
  const asked = transaction.client.query('UPDATE x')
  transaction.keepAlive()
  t.equal(client.asked.length, 4)
  await asked
  await settle()
  transaction.keepAlive()
  t.equal(client.asked.length, 5)
})

t.test(
  'a transaction that stands still while somebody waits for it is ended at the fourth sign of life in a row',
  async (t) => {
    const { client, transaction } = await open()
    const ping = async (answer: () => unknown) => {
      client.answers.ping = [answer]
      transaction.keepAlive()
      await settle()
    }
    const blocking = () => pinged(true)
    for (const other of [() => pinged(false), () => Promise.reject(new Error('no'))]) {
      for (let n = 0; n < 3; n++) await ping(blocking)
      await ping(other)
    }
    for (let n = 0; n < 3; n++) await ping(blocking)
    await transaction.client.query('UPDATE x')
    for (let n = 0; n < 3; n++) await ping(blocking)
    t.equal(transaction.lost.aborted, false, 'not when it was free, or asked for something, meanwhile')
    await ping(blocking)
    t.equal(transaction.lost.aborted, true)
    const error = { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /^The transaction was ended: .* not by its pool$/ }
    t.match(transaction.lost.reason, error)
    t.equal(isGivenUp(client), true)
    await t.rejects(transaction.client.query('SELECT 1'), error, 'and its handler hears why')
    await transaction.rollback()
    t.equal(client.released.length, 1)
  }
)

t.test('a reply that comes before the end of its queries is refused, unless it is a failure', async (t) => {
  const refused = { state: 'refused', error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /await every query/ } }
  for (const [record, undo, outcome] of [
    [reply({ statusCode: 201 }), false, refused],
    [tombstone('hijacked'), false, refused],
    [reply({ statusCode: 409 }), false, { state: 'committed' }],
    [reply({ statusCode: 201 }), true, { state: 'committed' }]
  ] as const) {
    const { client, transaction } = await open()
    void transaction.client.query('INSERT a')
    void transaction.client.query('INSERT b')
    t.match(await transaction.complete(record, 7, undo), outcome)
    if (outcome === refused) t.strictSame(client.asked, ['claim', 'INSERT a', 'INSERT b', 'ROLLBACK'])
    await settle()
    t.strictSame(client.released, [[]])
  }
})

t.test('a query that is asked for while the reply is being stored keeps it from being committed', async (t) => {
  for (const [undo, outcome] of [
    [false, { state: 'refused', error: { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /await every query/ } }],
    [true, { state: 'committed' }]
  ] as const) {
    const { client, transaction } = await open()
    client.answers.write = [
      () => {
        // As in the callback of one that was asked for in time.
        void transaction.client.query('INSERT b')
        return { command: 'SELECT', rows: [], rowCount: 1 }
      }
    ]
    t.match(await transaction.complete(reply({ statusCode: 201 }), 7, undo), outcome)
    t.strictSame(client.asked.at(-1), undo ? 'COMMIT' : 'ROLLBACK', 'where all is undone, nothing is missing')
  }
})
