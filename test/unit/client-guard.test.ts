import { EventEmitter } from 'node:events'
import fc from 'fast-check'
import t from 'tap'
import { Guard } from '../../lib/stores/postgres/client-guard.js'
import { transactionControl } from '../../lib/stores/postgres/transaction-control.js'
import type { TransactionClient } from '../../types/index.js'

const REFUSED = { code: 'FST_IDEMPOTENCY_TRANSACTION' }

/** What begins, ends or prepares a transaction, and how it is named in the error. */
const CONTROL: [sql: string, verb: string][] = [
  ['BEGIN', 'BEGIN'],
  ['BEGIN WORK', 'BEGIN'],
  ['BEGIN TRANSACTION ISOLATION LEVEL SERIALIZABLE', 'BEGIN'],
  ['START TRANSACTION', 'START TRANSACTION'],
  ['START TRANSACTION READ ONLY', 'START TRANSACTION'],
  ['COMMIT', 'COMMIT'],
  ['COMMIT WORK', 'COMMIT'],
  ['COMMIT TRANSACTION', 'COMMIT'],
  ['COMMIT AND CHAIN', 'COMMIT'],
  ['COMMIT AND NO CHAIN', 'COMMIT'],
  ["COMMIT PREPARED 'one'", 'COMMIT'],
  ['END', 'END'],
  ['END TRANSACTION', 'END'],
  ['END AND CHAIN', 'END'],
  ['ABORT', 'ABORT'],
  ['ABORT WORK', 'ABORT'],
  ['ROLLBACK', 'ROLLBACK'],
  ['ROLLBACK WORK', 'ROLLBACK'],
  ['ROLLBACK TRANSACTION', 'ROLLBACK'],
  ['ROLLBACK AND CHAIN', 'ROLLBACK'],
  ["ROLLBACK PREPARED 'to'", 'ROLLBACK'],
  ["PREPARE TRANSACTION 'one'", 'PREPARE TRANSACTION']
]

const ALLOWED = [
  '',
  ' ',
  ';',
  'SELECT 1',
  'SAVEPOINT a',
  'SAVEPOINT begin_end',
  'RELEASE a',
  'RELEASE SAVEPOINT a',
  'ROLLBACK TO a',
  'ROLLBACK TO SAVEPOINT a',
  'ROLLBACK WORK TO a',
  'ROLLBACK WORK TO SAVEPOINT a',
  'ROLLBACK TRANSACTION TO SAVEPOINT a',
  'rollback\n\tto\r\nsavepoint a',
  'ROLLBACK/* not all */TO a',
  'ROLLBACK -- not all\n TO a',
  'SET TRANSACTION READ ONLY',
  'PREPARE stmt AS SELECT 1',
  'PREPARE stmt (int) AS SELECT $1',
  'PREPARE transactions AS SELECT 1',
  'EXECUTE stmt',
  'DEALLOCATE PREPARE stmt',
  'SELECT CASE WHEN a THEN 1 ELSE 2 END FROM b',
  'SELECT CASE WHEN a THEN 1 ELSE 2\nEND;',
  'UPDATE a SET b = CASE WHEN c THEN 1 END WHERE d',
  'CREATE INDEX abort ON a (start)',
  'SELECT begin, end_at, a.commit, rollback FROM a',
  'SELECT "end", "begin", "commit" FROM "abort"',
  'SELECT 1 AS "end";',
  '"end"',
  'beginning',
  'ending; committed; aborted; rollbacks; started',
  'COMMITS',
  'begin_ AS x',
  'SELECT 1; SELECT 2; SAVEPOINT a; ROLLBACK TO a; RELEASE a',
  'COMMENT ON TABLE a IS NULL',
  "SELECT 'COMMIT'",
  "SELECT '; COMMIT'",
  "SELECT 'a''; COMMIT; --'",
  "SELECT ''; SELECT '; COMMIT ;'",
  "SELECT 'a\\', '; COMMIT; '",
  "SELECT E'\\'; COMMIT; --'",
  "SELECT e'\\\\', E'; COMMIT; '",
  "SELECT E'a''; COMMIT; '",
  "SELECT U&'; COMMIT; '",
  "SELECT date'; COMMIT; '",
  "SELECT type'\\', '; COMMIT; '",
  'SELECT "; COMMIT; "',
  'SELECT "a""; COMMIT; "',
  'SELECT U&"; COMMIT; "',
  'SELECT "\'" , \'"; COMMIT; \'',
  'SELECT $$; COMMIT; $$',
  "SELECT $$'$$, '; COMMIT; '",
  'SELECT $tag$; COMMIT; $$; ROLLBACK; $tag$',
  'SELECT $_1$; COMMIT; $_1$',
  'SELECT $1; SELECT $2',
  '-- COMMIT',
  '-- ; COMMIT',
  'SELECT 1 -- ; COMMIT\n, 2',
  "SELECT 1 -- it's\n, '; COMMIT; '",
  '/* COMMIT */',
  '/* a ; COMMIT ; b */ SELECT 1',
  '/*\n; COMMIT;\n*/ SELECT 1',
  "/* it's */ SELECT '; COMMIT; '",
  "SELECT '/*', '; COMMIT; ', '*/'",
  "SELECT '--', '; COMMIT; '",
  'DO $$ BEGIN PERFORM 1; END $$',
  'DO $$ BEGIN\n  BEGIN\n    INSERT INTO a VALUES (1);\n  EXCEPTION WHEN unique_violation THEN NULL;\n  END;\nEND $$',
  'DO LANGUAGE plpgsql $do$ BEGIN EXECUTE $$SELECT 1;$$; END; $do$',
  "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END;'",
  'CREATE FUNCTION f() RETURNS int AS $body$\nBEGIN\n  RETURN 1;\nEND;\n$body$ LANGUAGE plpgsql; SELECT f()'
]

t.test('what begins or ends a transaction is found, and named', async (t) => {
  for (const [sql, verb] of CONTROL) t.equal(transactionControl(sql), verb, sql)
})

t.test('it is found in whatever case and behind whatever white space', async (t) => {
  const mixed = (sql: string) => sql.replace(/[A-Z]/g, (letter, n) => (n % 2 === 0 ? letter : letter.toLowerCase()))
  for (const [sql, verb] of CONTROL) {
    for (const spelled of [
      sql.toLowerCase(),
      mixed(sql),
      `  ${sql}`,
      `\n\t\r\f\v${sql}`,
      `${sql};`,
      `${sql} ;\n`,
      sql.replaceAll(' ', '\n \t\r\f\v')
    ]) {
      t.equal(transactionControl(spelled)?.replace(/\s+/g, ' '), verb, JSON.stringify(spelled))
    }
  }
})

t.test('it is found behind comments, and with comments in it', async (t) => {
  for (const [sql, verb] of CONTROL) {
    for (const spelled of [
      `/* now */ ${sql}`,
      `/**/${sql}`,
      `/* ' " $$ */ ${sql} /* ' " $$ */`,
      `/* a *//* b */${sql}`,
      `-- now\n${sql}`,
      `-- it's\r\n${sql}`,
      `--\n--\n${sql} -- now`,
      sql.replaceAll(' ', '/* */'),
      sql.replaceAll(' ', ' -- $$\n')
    ]) {
      t.equal(transactionControl(spelled)?.replace(/\s+/g, ' '), verb, JSON.stringify(spelled))
    }
  }
})

t.test('it is found among other statements, wherever it stands', async (t) => {
  for (const [sql, verb] of CONTROL) {
    for (const spelled of [
      `SELECT 1; ${sql}`,
      `${sql}; SELECT 1`,
      `SELECT 1;${sql};SELECT 2`,
      `;;${sql}`,
      `SELECT ';'; ${sql}`,
      `SELECT ''; ${sql}; SELECT ''`,
      `SELECT 'it''s'; ${sql}; SELECT '`,
      `SELECT '\\'; ${sql}; SELECT '`,
      `SELECT E'\\\\'; ${sql}; SELECT '`,
      `SELECT "'"; ${sql}; SELECT "'"`,
      `SELECT $$'$$; ${sql}; SELECT $$'$$`,
      `SELECT $a$ $$ $a$; ${sql}; SELECT $$ $$`,
      `SELECT $1; ${sql}; SELECT $1`,
      `SELECT '--'; ${sql}`,
      `SELECT '/*'; ${sql} /* '*/`,
      `SELECT CASE WHEN a THEN 1 END; ${sql}`,
      `ROLLBACK TO a; ${sql}`,
      `PREPARE stmt AS SELECT 1; ${sql}`,
      `DO $$ BEGIN END $$; ${sql}`
    ]) {
      t.equal(transactionControl(spelled), verb, spelled)
    }
  }
})

t.test('what only looks like it is let through', async (t) => {
  for (const sql of ALLOWED) {
    t.equal(transactionControl(sql), null, JSON.stringify(sql))
    t.equal(transactionControl(sql.toLowerCase()), null, JSON.stringify(sql.toLowerCase()))
    t.equal(transactionControl(`SELECT 1; ${sql}`), null, JSON.stringify(`SELECT 1; ${sql}`))
  }
})

t.test('a comment in a comment does not end it', async (t) => {
  t.equal(transactionControl('/* a /* b */ ; COMMIT; */ SELECT 1'), null)
  t.equal(transactionControl('/* a /* b */ c */ COMMIT'), 'COMMIT')
  t.equal(transactionControl('/* /* /* */ */ */ SELECT 1; /*/**/*/ROLLBACK'), 'ROLLBACK')
})

t.test('a comment ends with its line, by whatever character that ends', async (t) => {
  t.equal(transactionControl('-- now\rCOMMIT'), 'COMMIT')
  t.equal(transactionControl('SELECT 1; -- now\r\nCOMMIT'), 'COMMIT')
})

t.test('a dollar quote ends at its own tag only, by case, and tags need not be of ASCII', async (t) => {
  t.equal(transactionControl('SELECT $a$ $A$; COMMIT; $a$'), null)
  t.equal(transactionControl('SELECT $é$; COMMIT; $é$'), null)
  t.equal(transactionControl('SELECT $a$ $a$; COMMIT; SELECT $A$ $A$'), 'COMMIT')
})

t.test('dollars in a name do not begin a quote', async (t) => {
  t.equal(transactionControl('SELECT 1 AS a$b$; COMMIT; SELECT 1 AS c$b$'), 'COMMIT')
  t.equal(transactionControl('SELECT a$$, b$$; COMMIT; SELECT c$$'), 'COMMIT')
  for (const name of ['a', 'ab', 'abc', 'abcd']) {
    t.equal(transactionControl(`SELECT 1 AS ${name}$b$; COMMIT; SELECT 1 AS c$b$`), 'COMMIT', name)
  }
})

t.test('what does not end hides what is behind it, and is for the server to refuse', async (t) => {
  for (const open of ['$$', '$tag$', '/*', '/* /* */'])
    t.equal(transactionControl(`SELECT 1 ${open} ; COMMIT`), null, open)
  for (const open of ["'", '"', "E'"]) t.doesNotThrow(() => transactionControl(`SELECT 1 ${open} ; COMMIT`), open)
})

t.test('a savepoint may be gone back to, with as much space as one likes', async (t) => {
  for (const sql of ['ROLLBACK  WORK  TO  a', 'ROLLBACK\n\tTRANSACTION\n TO SAVEPOINT a', 'ROLLBACK  TO a']) {
    t.equal(transactionControl(sql), null, JSON.stringify(sql))
  }
})

t.test('an escaped line break does not end a literal', async (t) => {
  t.equal(transactionControl("SELECT E'\\\n\\'; COMMIT; --'"), null)
})

t.test('a routine with a body of BEGIN ATOMIC … END is refused as well: a handler creates no routines', async (t) => {
  const body = 'BEGIN ATOMIC SELECT 1; SELECT 2; END'
  t.equal(transactionControl(`CREATE FUNCTION one() RETURNS int LANGUAGE sql ${body}`), 'END')
  t.equal(transactionControl(`CREATE FUNCTION one() RETURNS int LANGUAGE sql AS $$ ${body} $$`), null)
})

const words = fc.constantFrom(
  ...[';', ' ', '\n', '\t', '--', '/', '*', "'", '"', '$', '$$', '$a$', '\\', 'E', "e'", 'x', '1', '_', '(', ')'],
  ...['COMMIT', 'rollback', 'Begin', 'END', 'abort', 'START TRANSACTION', "PREPARE TRANSACTION 'a'", 'TO', 'SAVEPOINT']
)
/** Text that would be statements if it were not in a literal. */
const text = fc
  .array(fc.oneof({ weight: 5, arbitrary: words }, fc.string({ unit: 'grapheme', maxLength: 3 })), { maxLength: 12 })
  .map((parts) => parts.join(''))

const tag = fc.stringMatching(/^(?:[A-Za-z_][A-Za-z0-9_]{0,3})?$/)

/** https://www.postgresql.org/docs/current/sql-syntax-lexical.html */
const literal = fc.oneof(
  text.map((text) => `'${text.replaceAll("'", "''")}'`),
  text.map((text) => `date '${text.replaceAll("'", "''")}'`),
  text.map((text) => `name'${text.replaceAll("'", "''")}'`),
  text.map((text) => `U&'${text.replaceAll("'", "''")}'`),
  text.map((text) => `E'${text.replaceAll(/['\\]/g, '\\$&')}'`),
  text.map((text) => `e'${text.replaceAll('\\', '\\\\').replaceAll("'", "''")}'`),
  text.map((text) => `"${text.replaceAll('"', '""')}"`),
  fc
    .tuple(tag, text)
    .map(([tag, text]) => [text, `$${tag}$`] as const)
    // By case, the tags of PostgreSQL differ; here they are far enough from each other.
    .filter(([text, quote]) => `${text}${quote}`.toLowerCase().indexOf(quote.toLowerCase()) === text.length)
    .map(([text, quote]) => `${quote}${text}${quote}`),
  text.map((text) => `1 --${text.replaceAll(/[\r\n]/g, '')}\n`),
  text
    .filter((text) => `${text}*/`.indexOf('*/') === text.length && !`${text}*/`.includes('/*'))
    .map((text) => `1 /*${text}*/`)
)

const literals = fc.array(literal, { minLength: 1, maxLength: 4 }).map((list) => list.join(', '))

t.test('whatever is in a literal, a quoted name or a comment is never taken for a statement', async () => {
  fc.assert(
    fc.property(
      literals,
      (literals) =>
        transactionControl(`SELECT ${literals}`) === null &&
        transactionControl(`INSERT INTO "end" VALUES (${literals}); SAVEPOINT a; SELECT ${literals}`) === null
    ),
    { numRuns: 5_000 }
  )
})

t.test('whatever is in literals before and behind it, a statement is found', async () => {
  fc.assert(
    fc.property(
      literals,
      literals,
      fc.constantFrom(...CONTROL),
      (before, behind, [sql, verb]) =>
        transactionControl(`SELECT ${before}; ${sql}; SELECT ${behind}`) === verb &&
        transactionControl(`SELECT ${before};\n-- now\n${sql.toLowerCase()}`) === verb
    ),
    { numRuns: 5_000 }
  )
})

/** Takes the place of a client of `pg`; its methods work on their own `this` only. */
class FakeClient extends EventEmitter {
  readonly #queries: unknown[][] = []
  readonly answer = Promise.resolve({ rows: [{ a: 1 }] })
  readonly processID = 42
  let = 'go'

  get queries(): unknown[][] {
    return this.#queries
  }

  query(...args: unknown[]): unknown {
    this.#queries.push(args)
    return this.answer
  }

  escapeLiteral(text: string): string {
    return `'${text}' of ${this.#queries.length}`
  }

  release(): void {
    this.let = 'gone'
  }

  end(): void {
    this.let = 'gone'
  }

  connect(): void {
    this.let = 'gone'
  }
}

function guarded() {
  const fake = new FakeClient()
  const guard = new Guard(fake as unknown as TransactionClient, null)
  return { fake, guard, client: guard.client as unknown as FakeClient }
}

t.test("a query's arguments reach the client as they are, and so does its result the caller", async (t) => {
  const { fake, client } = guarded()
  const [values, config, callback] = [[1, 'a'], { text: 'SELECT $1', values: [1], rowMode: 'array' }, () => {}]
  const submittable = { text: 'SELECT 1', submit() {} }
  for (const args of [
    ['SELECT 1'],
    ['SELECT $1', values],
    ['SELECT $1', values, callback],
    [config],
    [config, values],
    [config, callback],
    [submittable],
    [{ name: 'known' }],
    [undefined],
    [null],
    [{ text: 42 }],
    [42]
  ]) {
    t.equal(client.query(...args), fake.answer, 'the very same promise')
    const [got] = fake.queries.slice(-1)
    t.equal(got?.length, args.length)
    for (const [n, arg] of args.entries()) t.equal(got?.[n], arg, 'the very same argument')
  }
})

t.test('query works without its client, as libraries call it that take it apart', async (t) => {
  const { fake, client } = guarded()
  const { query } = client
  t.equal(query('SELECT 1'), fake.answer)
  t.equal(query.call(undefined, 'SELECT 2'), fake.answer)
  t.strictSame(fake.queries, [['SELECT 1'], ['SELECT 2']])
  await t.rejects(query('COMMIT') as Promise<unknown>, REFUSED)
})

t.test('what would end the transaction is refused, however it is given, and never reaches the client', async (t) => {
  const { fake, client } = guarded()
  const message = /: COMMIT is not for its handler, which may use SAVEPOINT, or have transaction: 'nested'$/
  for (const args of [
    ['COMMIT'],
    ['SELECT 1; commit'],
    ['COMMIT', []],
    [{ text: 'COMMIT' }],
    [{ text: '/* now */ COMMIT;', values: [] }],
    [{ name: 'end', text: 'COMMIT' }]
  ]) {
    await t.rejects(client.query(...args) as Promise<unknown>, { ...REFUSED, message })
  }
  await t.rejects(client.query('ROLLBACK') as Promise<unknown>, { ...REFUSED, message: /ROLLBACK/ })
  t.strictSame(fake.queries, [])
})

t.test('whoever listens by a callback, or by an object that takes the answer, hears of a refusal there', async (t) => {
  const { fake, client, guard } = guarded()
  const refusal = (ask: (heard: (error: Error) => void) => unknown) =>
    new Promise<Error>((resolve) => {
      let returned = false
      ask((error) => {
        t.ok(returned, 'later, as everything that is asked for')
        resolve(error)
      })
      returned = true
    })
  for (const over of [null, 'The transaction is over']) {
    guard.over = over
    t.match(await refusal((heard) => client.query('COMMIT', heard)), REFUSED)
    t.match(await refusal((heard) => client.query('COMMIT', [], heard)), REFUSED)
    t.match(await refusal((callback) => client.query({ text: 'COMMIT', callback })), REFUSED)
    t.match(await refusal((handleError) => client.query({ text: 'COMMIT', submit() {}, handleError })), REFUSED)
  }
  t.strictSame(fake.queries, [])
})

t.test('a method that gives the client itself gives the guarded one', async (t) => {
  const { fake, client } = guarded()
  t.equal(
    client.on('notice', () => {}),
    client
  )
  await t.rejects(client.on('notice', () => {}).query('COMMIT') as Promise<unknown>, REFUSED)
  t.strictSame(fake.queries, [])
})

t.test("the guard knows whether queries of the handler's are under way, and when they are not any more", async (t) => {
  const { client, guard, fake } = guarded()
  t.equal(guard.busy, false)
  await guard.idle
  let answer!: () => void
  const slow = new Promise<void>((resolve) => {
    answer = resolve
  })
  Object.assign(fake, { answer: slow })
  client.query('SELECT pg_sleep(1)')
  t.equal(guard.busy, true)
  let idle = false
  const waited = guard.idle.then(() => {
    idle = true
  })
  await new Promise(setImmediate)
  t.equal(idle, false)
  answer()
  await waited
  t.equal(guard.busy, false)
  Object.assign(fake, { answer: undefined })
  t.equal(
    client.query('SELECT 1', () => {}),
    undefined,
    'who listens by a callback is not known to be at work'
  )
  t.equal(guard.busy, false)
})

t.test('an object that takes the answer, but no refusal, gets it by a promise', async (t) => {
  const { client } = guarded()
  await t.rejects(client.query({ text: 'COMMIT', submit() {} }) as Promise<unknown>, REFUSED)
  await t.rejects(client.query({ text: 'COMMIT', handleError() {} }) as Promise<unknown>, REFUSED)
})

t.test('a refused statement does not end what follows', async (t) => {
  const { fake, client } = guarded()
  await t.rejects(client.query('COMMIT') as Promise<unknown>, REFUSED)
  t.equal(client.query('SELECT 1'), fake.answer)
})

t.test('every other property is that of the client, and every method works on the client', async (t) => {
  const { fake, client } = guarded()
  t.equal(client.processID, 42)
  t.equal(client.let, 'go')
  client.let = 'on'
  t.equal(fake.let, 'on')
  t.equal((client as unknown as Record<string, unknown>).nothing, undefined)
  t.equal(client.escapeLiteral('a'), "'a' of 0")
  const { escapeLiteral } = client
  t.equal(escapeLiteral('b'), "'b' of 0")
  t.strictSame(client.queries, [])
  t.ok('escapeLiteral' in client)
  t.ok(client instanceof FakeClient)
  t.equal(client.constructor, FakeClient, 'by which libraries tell a client from a pool')
})

t.test('whoever listens on the guarded client listens on the client', async (t) => {
  const { fake, client } = guarded()
  const heard: unknown[] = []
  const listener = (message: unknown) => heard.push(message)
  client.on('notice', listener)
  fake.emit('notice', 1)
  client.emit('notice', 2)
  client.off('notice', listener)
  fake.emit('notice', 3)
  t.strictSame(heard, [1, 2])
  t.equal(fake.listenerCount('notice'), 0)
})

t.test('the client cannot be let go: release, end and connect throw', async (t) => {
  const { fake, client, guard } = guarded()
  for (const over of [null, 'The transaction is over']) {
    guard.over = over
    for (const name of ['release', 'end', 'connect'] as const) {
      t.throws(() => client[name](), { ...REFUSED, message: /goes back to its pool/ })
      const letGo = client[name]
      t.throws(() => letGo(), REFUSED)
    }
  }
  t.equal(fake.let, 'go')
})

t.test('when the transaction is over, every query is refused, whatever it is', async (t) => {
  const { fake, client, guard } = guarded()
  const { query } = client
  client.query('SELECT 1')
  guard.over = 'The transaction is over'
  t.equal(guard.wasLate, false)
  for (const args of [['SELECT 1'], ['COMMIT'], [{ text: 'SELECT 1' }], ['SAVEPOINT a'], []]) {
    await t.rejects(client.query(...args) as Promise<unknown>, { ...REFUSED, message: /^The transaction is over/ })
    await t.rejects(query(...args) as Promise<unknown>, { ...REFUSED, message: /^The transaction is over/ })
  }
  t.strictSame(fake.queries, [['SELECT 1']])
  t.equal(guard.wasLate, true)
})

t.test('a refusal that nobody listens to does not end the process', async (t) => {
  const { client, guard } = guarded()
  const unheard: unknown[] = []
  const hear = (error: unknown) => void unheard.push(error)
  process.on('unhandledRejection', hear)
  t.teardown(() => process.off('unhandledRejection', hear))
  void client.query('COMMIT')
  t.equal(guard.wasLate, false, 'that is no query that came too late')
  guard.over = 'over'
  void client.query('SELECT 1')
  await new Promise(setImmediate)
  await new Promise(setImmediate)
  t.strictSame(unheard, [])
  t.equal(guard.asked, 2)
})
