import Libsql from 'libsql'
import t from 'tap'
import { inTurn } from '../../lib/transactions/in-turn.js'
import { type SqlTransactionsOptions, sqlTransactions } from '../../lib/transactions.js'
import { until } from '../support/latch.js'
import { stepOf } from '../support/transaction-scenes.js'

/* sqlTransactions, with a driver that does what drivers may do. */

type Row = Record<string, unknown>
type Options = SqlTransactionsOptions<Driver>

/** A database in memory, whose answers, and transactions, a test may change. */
class Driver {
  readonly database = new Libsql(':memory:')
  sent: string[] = []
  shape: (rows: Row[]) => unknown = (rows) => rows
  readonly options: Options = {
    begin: (work) => this.transact(() => work(this)),
    query: (tx, text, values) => tx.send(text, values),
    placeholders: '?'
  }

  transact<T>(work: () => Promise<T>): Promise<T> {
    return inTurn(this.database, () => this.#transact(work))
  }

  async #transact<T>(work: () => Promise<T>): Promise<T> {
    this.database.exec('BEGIN')
    try {
      const result = await work()
      this.database.exec('COMMIT')
      return result
    } catch (error) {
      this.database.exec('ROLLBACK')
      throw error
    }
  }

  send(text: string, values: unknown[]): unknown {
    this.sent.push(text)
    const statement = this.database.prepare(text)
    if (text.startsWith('SELECT')) return this.shape(statement.all(...values) as Row[])
    statement.run(...values)
    return this.shape([])
  }

  rows(): Row[] {
    return this.database.prepare('SELECT * FROM idempotency_steps').all() as Row[]
  }
}

function numbersAs({ expires_at, version, ...row }: Row, as: (number: unknown) => unknown): Row {
  return { ...row, expires_at: expires_at && as(expires_at), version: version && as(version) }
}

/** With its table, and without a sweep that comes between. */
async function open(changes: (driver: Driver) => Partial<Options> = () => ({})) {
  const driver = new Driver()
  const steps = sqlTransactions<Driver>({ ...driver.options, ...changes(driver) })
  driver.database.exec(steps.ddl)
  await steps.once(stepOf(), async () => '0')
  await until(() => driver.sent.some((text) => text.startsWith('DELETE')), { message: 'the sweep' })
  await driver.transact(async () => {})
  driver.database.exec('DELETE FROM idempotency_steps')
  driver.sent = []
  return { driver, steps }
}

t.test('a step takes two statements; one that was committed is found with one more', async (t) => {
  const { driver, steps } = await open()
  const step = stepOf()
  await steps.once(step, async () => '1')
  t.same(
    driver.sent.map((text) => text.slice(0, 6)),
    ['INSERT', 'UPDATE']
  )
  driver.sent = []
  await steps.once(step, async () => '1')
  t.same(
    driver.sent.map((text) => text.slice(0, 6)),
    ['INSERT', 'SELECT']
  )
})

t.test('numbered placeholders are the default', async (t) => {
  const sent: string[] = []
  const steps = sqlTransactions<null>({
    begin: (work) => work(null),
    query: (_tx, text) => {
      sent.push(text)
      return []
    }
  })
  await steps.once(stepOf(), async () => '1')
  t.match(sent[0], 'INSERT INTO idempotency_steps (operation, step, fingerprint, expires_at) VALUES ($1, $2, $3, $4)')
  t.match(sent[1], 'UPDATE idempotency_steps SET result = $1 WHERE operation = $2 AND step = $3')
})

t.test('whatever shape rows come in, and whatever stands for a number or a text', async (t) => {
  const shapes: Record<string, (rows: Row[]) => unknown> = {
    'a list': (rows) => rows,
    'an object with rows': (rows) => ({ rows }),
    'a list with fields behind it': (rows) => [rows, []],
    'a list of a class of its own': (rows) => Object.assign([...rows], { count: rows.length }),
    'text as bytes': (rows) =>
      rows.map(({ result, fingerprint, ...row }) => ({
        ...row,
        result: result && Buffer.from(String(result)),
        fingerprint: fingerprint && Buffer.from(String(fingerprint))
      })),
    'numbers as text': (rows) => rows.map((row) => numbersAs(row, String)),
    'numbers as BigInt': (rows) => rows.map((row) => numbersAs(row, (number) => BigInt(String(number)))),
    'numbers as objects': (rows) => rows.map((row) => numbersAs(row, (number) => ({ toString: () => String(number) })))
  }
  for (const [name, shape] of Object.entries(shapes)) {
    const { driver, steps } = await open()
    driver.shape = shape
    const [fresh, endless, expired] = [stepOf(), stepOf({ expiresAt: null }), stepOf({ expiresAt: Date.now() - 1 })]
    for (const step of [fresh, endless, expired]) await steps.once(step, async () => '"ä"')
    for (const step of [fresh, endless]) {
      const again = await steps.once(step, async () => '2')
      t.same(again, { result: '"\\u00e4"', fingerprint: 'f', resumed: true }, name)
    }
    t.match(await steps.once(expired, async () => '2'), { result: '2', resumed: false }, name)
    t.equal(await steps.forget('nobody'), false, name)
  }
})

t.test('a driver that begins anew calls the work again, and one of them counts', async (t) => {
  const { driver, steps } = await open((driver) => ({
    async begin(work) {
      const failed = driver.transact(async () => {
        await work(driver)
        throw new Error('could not serialize access')
      })
      await failed.catch(() => {})
      return driver.transact(() => work(driver))
    }
  }))
  let runs = 0
  t.same(await steps.once(stepOf(), async () => String(++runs)), { result: '2', fingerprint: 'f', resumed: false })
  t.equal(driver.rows().length, 1)
})

t.test('a driver that begins anew after its own commit gets the result of that', async (t) => {
  const { driver, steps } = await open((driver) => ({
    async begin(work) {
      await driver.transact(() => work(driver))
      return driver.transact(() => work(driver))
    }
  }))
  let runs = 0
  t.same(await steps.once(stepOf(), async () => String(++runs)), { result: '1', fingerprint: 'f', resumed: true })
  t.same([runs, driver.rows().length], [1, 1])
})

t.test('a step that expires before the acknowledgement of its commit is lost is not done again', async (t) => {
  let losses = 0
  const { driver, steps } = await open((driver) => ({
    async begin(work) {
      const result = await driver.options.begin(work)
      if (losses-- > 0) throw new Error('lost')
      return result
    }
  }))
  losses = 1
  let runs = 0
  const step = stepOf({ expiresAt: Date.now() - 1 })
  t.same(await steps.once(step, async () => String(++runs)), { result: '1', fingerprint: 'f', resumed: true })
  t.same([runs, driver.rows().length], [1, 1])
})

t.test('where nobody answers any more, the first error is passed on', async (t) => {
  const driver = new Driver()
  let up = true
  const steps = sqlTransactions<Driver>({
    ...driver.options,
    begin: (work) => (up ? driver.options.begin(work) : Promise.reject(new Error('still down')))
  })
  driver.database.exec(steps.ddl)
  const failed = steps.once(stepOf(), async () => {
    up = false
    throw new Error('down')
  })
  await t.rejects(failed, { message: 'down' })
})

t.test('what fails before the work has begun, as a deadlock does, is tried again; not for ever', async (t) => {
  let failures = 0
  const { steps } = await open((driver) => ({
    query(tx, text, values) {
      if (text.startsWith('INSERT') && failures-- > 0) throw new Error('deadlock')
      return driver.options.query(tx, text, values)
    }
  }))
  failures = 2
  t.match(await steps.once(stepOf(), async () => '1'), { resumed: false })
  failures = 3
  await t.rejects(
    steps.once(stepOf(), async () => '1'),
    { message: 'deadlock' }
  )
})

t.test('what fails once the work has begun is not tried again', async (t) => {
  const { steps } = await open()
  let runs = 0
  const failed = steps.once(stepOf(), async () => {
    runs++
    throw new Error('no')
  })
  await t.rejects(failed, { message: 'no' })
  t.equal(runs, 1)
})

t.test('a begin without a transaction is told apart from a step that was committed', async (t) => {
  const { driver, steps } = await open((driver) => ({ begin: (work) => work(driver) }))
  const step = stepOf()
  const failed = steps.once(step, async () => {
    throw new Error('no')
  })
  await t.rejects(failed, { message: 'no' })
  t.match(driver.rows(), [{ result: null }])
  const again = steps.once(step, async () => '1')
  await t.rejects(again, { message: /not written in a transaction/, cause: { code: /CONSTRAINT/ } })
})

t.test('a row of another version is an error that says so, until it has expired', async (t) => {
  const { driver, steps } = await open()
  const [fresh, expired] = [stepOf(), stepOf({ expiresAt: Date.now() - 1 })]
  for (const step of [fresh, expired]) await steps.once(step, async () => '1')
  t.match(driver.rows(), [{ version: 1 }, { version: 1 }])
  driver.database.exec('UPDATE idempotency_steps SET version = 2')
  const before = driver.rows()[0]
  let runs = 0
  const again = steps.once(fresh, async () => String(++runs))
  await t.rejects(again, { message: /another version of fastify-idempotency/, cause: { code: /CONSTRAINT/ } })
  t.same([runs, driver.rows()[0]], [0, before])
  t.match(await steps.once(expired, async () => '2'), { result: '2', resumed: false })
  t.match(driver.rows()[1], { result: '2', version: 1 })
})

t.test('a winner of another version is an error that says so, also where it has expired already', async (t) => {
  const step = stepOf({ expiresAt: Date.now() - 1 })
  const { steps } = await open((driver) => ({
    async begin(work) {
      const result = await driver.options.begin(work)
      const isWon = driver.rows().some(({ operation, version }) => operation === step.operation && version === 1)
      if (!isWon) return result
      driver.database.exec('UPDATE idempotency_steps SET version = 2')
      throw new Error('lost')
    }
  }))
  await t.rejects(
    steps.once(step, async () => '1'),
    { message: /another version of fastify-idempotency/, cause: { message: 'lost' } }
  )
})

t.test('a begin that does not wait for its work is found out', async (t) => {
  const { steps } = await open().then(({ driver }) => ({
    steps: sqlTransactions<Driver>({ ...driver.options, begin: async () => undefined as never })
  }))
  await t.rejects(
    steps.once(stepOf(), async () => '1'),
    { message: /begin\(\) has resolved before its work was done/ }
  )
})

t.test('a begin need not pass on what its work gave', async (t) => {
  const { steps } = await open((driver) => ({
    async begin(work) {
      await driver.transact(() => work(driver))
      return undefined as never
    }
  }))
  t.match(await steps.once(stepOf(), async () => '1'), { result: '1' })
})

t.test('a sweep that fails is no failure of the step', async (t) => {
  const driver = new Driver()
  const steps = sqlTransactions<Driver>({
    ...driver.options,
    query(tx, text, values) {
      if (/^DELETE FROM idempotency_steps WHERE expires_at/.test(text)) throw new Error('no')
      return driver.options.query(tx, text, values)
    }
  })
  driver.database.exec(steps.ddl)
  t.match(await steps.once(stepOf(), async () => '1'), { resumed: false })
  await t.rejects(steps.sweep(), { message: 'no' })
})

t.test('options are checked by name', async (t) => {
  const { options } = new Driver()
  const wrong: [Record<string, unknown>, RegExp][] = [
    [{ begin: undefined }, /^sqlTransactions option "begin" takes a function, got undefined/],
    [{ query: 'SELECT' }, /option "query" takes a function, got 'SELECT' \(string\)/],
    [{ placeholders: ':1' }, /option "placeholders" takes '\$1' or '\?', got ':1'/],
    [{ table: 'steps; DROP TABLE orders' }, /option "table" takes a name of letters/],
    [{ table: 'a.b.c' }, /option "table"/],
    [{ table: '1a' }, /option "table"/],
    [{ tabel: 'steps' }, /option "tabel" is not known; known are begin, query, placeholders, table/]
  ]
  for (const [changes, message] of wrong) {
    t.throws(() => sqlTransactions({ ...options, ...changes } as Options), {
      code: 'FST_IDEMPOTENCY_INVALID_OPTION',
      message
    })
  }
  for (const table of ['steps', 'own.steps', '_s1', undefined]) t.ok(sqlTransactions({ ...options, table } as Options))
})
