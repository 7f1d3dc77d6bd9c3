import { randomUUID } from 'node:crypto'
import type { Test } from 'tap'
import { storageKey } from '../../lib/operation/storage-key.js'
import type { SqlTransactions } from '../../lib/transactions.js'
import type { TransactionalStep } from '../../types/index.js'
import { latch, until } from './latch.js'

/* What is promised of steps in transactions, on a real database. */

/** When a connection is lost. */
export type Loss = 'before the commit' | 'in the commit' | 'after the commit' | 'before the rollback'

/** A database under test, with a table `orders` that has a unique `ref`. */
export interface TestDatabase<Tx> {
  /** Steps in this table; with `loss`, its first transaction loses its connection. */
  steps(table: string, loss?: Loss): SqlTransactions<Tx>
  /** Sends a statement in the transaction. */
  send(tx: Tx, text: string): unknown
  /** Sends one outside of it, on another connection, and gives its rows. */
  outside(text: string): Promise<Record<string, unknown>[]> | Record<string, unknown>[]
  /** Do transactions wait for one another in the database? Then, how many do so now. Elsewhere they take turns. */
  waiting?(): Promise<number>
  /** Kills the connection of a transaction. */
  kill?(tx: Tx): Promise<unknown>
}

const DAY = 86_400_000
export const ORDERS = 'CREATE TABLE orders (ref varchar(64) NOT NULL, PRIMARY KEY (ref))'

export async function scenes<Tx>(t: Test, database: TestDatabase<Tx>): Promise<void> {
  const { outside, waiting, kill } = database
  const steps = database.steps('steps')
  await steps.createTable()
  // The first step sweeps: it is not to meet what the tests look at.
  await steps.once(stepOf(), async () => '0')

  const order = async (tx: Tx, ref: string) => database.send(tx, `INSERT INTO orders (ref) VALUES ('${ref}')`)
  const orders = async (ref: string) => (await outside(`SELECT ref FROM orders WHERE ref = '${ref}'`)).length
  const rows = (operation: string, table = 'steps') =>
    outside(`SELECT * FROM ${table} WHERE operation = '${operation}'`)
  /** A `work` that orders, with what it has done to look at. */
  const ordering = (ref: string, result = '{"id":1}') => {
    const work = async (tx: Tx) => {
      work.runs++
      await order(tx, ref)
      return result
    }
    work.runs = 0
    return work
  }

  t.test('a step is committed with what it does', async (t) => {
    const step = stepOf({ expiresAt: 4_102_444_800_000 })
    const work = ordering(step.operation)
    t.same(await steps.once(step, work), { result: '{"id":1}', fingerprint: 'f', resumed: false })
    t.equal(await orders(step.operation), 1)
    const [row] = await rows(step.operation)
    t.equal(row?.step, 'step')
    t.equal(Number(row?.expires_at), 4_102_444_800_000)
  })

  t.test(
    'a step that was committed is not done again: its result and fingerprint are those of the first time',
    async (t) => {
      const step = stepOf()
      const work = ordering(step.operation)
      await steps.once(step, work)
      const again = await steps.once({ ...step, fingerprint: 'another' }, work)
      t.same(again, { result: '{"id":1}', fingerprint: 'f', resumed: true })
      t.same([work.runs, await orders(step.operation)], [1, 1])
    }
  )

  t.test('what throws is passed on, is undone, and can be done again', async (t) => {
    const step = stepOf()
    const error = new Error('no')
    await t.rejects(
      steps.once(step, async (tx) => {
        await order(tx, step.operation)
        throw error
      }),
      error
    )
    t.same([await orders(step.operation), await rows(step.operation)], [0, []])
    t.match(await steps.once(step, ordering(step.operation)), { resumed: false })
    t.equal(await orders(step.operation), 1)
  })

  t.test("a violated constraint of the user's own table is passed on as it is", async (t) => {
    const step = stepOf()
    await steps.once(step, ordering(step.operation))
    let seen: unknown
    const other = stepOf()
    const failed = steps.once(other, async (tx) => {
      await order(tx, other.operation)
      try {
        await order(tx, step.operation)
      } catch (error) {
        seen = error
        throw error
      }
      return '1'
    })
    const thrown: unknown = await failed.catch((error: unknown) => error)
    t.ok(seen instanceof Error)
    t.equal(thrown, seen)
    t.same([await orders(other.operation), await rows(other.operation)], [0, []])
  })

  t.test('a duplicate waits for the first, and gets its result', async (t) => {
    const step = stepOf()
    const [entered, leave] = [latch(), latch()]
    const work = ordering(step.operation)
    const first = steps.once(step, async (tx) => {
      const result = await work(tx)
      entered.open()
      await leave.promise
      return result
    })
    await entered.promise
    const second = steps.once({ ...step, fingerprint: 'another' }, work)
    if (waiting) await until(async () => (await waiting()) > 0, { message: 'the duplicate to wait' })
    leave.open()
    t.match(await first, { resumed: false })
    t.same(await second, { result: '{"id":1}', fingerprint: 'f', resumed: true })
    t.same([work.runs, await orders(step.operation)], [1, 1])
  })

  t.test('duplicates wait for one that fails, and then one of them does it', async (t) => {
    const step = stepOf()
    const [entered, leave] = [latch(), latch()]
    const work = ordering(step.operation)
    const first = steps.once(step, async (tx) => {
      await order(tx, step.operation)
      entered.open()
      await leave.promise
      throw new Error('no')
    })
    await entered.promise
    const others = Array.from({ length: 3 }, () => steps.once(step, work))
    if (waiting) await until(async () => (await waiting()) >= 3, { message: 'the duplicates to wait' })
    leave.open()
    // Unless another was faster than its look at the row: then it is done all the same.
    const outcome = await first.catch((error: Error) => error)
    if (outcome instanceof Error) t.equal(outcome.message, 'no')
    else t.equal(outcome.resumed, true)
    const resumed = (await Promise.all(others)).map((committed) => committed.resumed)
    t.same(resumed.sort(), [false, true, true])
    t.same([work.runs, await orders(step.operation)], [1, 1])
  })

  t.test('ten at once: one does it, and all have its result', async (t) => {
    const step = stepOf()
    const all = await Promise.all(
      Array.from({ length: 10 }, (_, n) => steps.once(step, ordering(step.operation, String(n))))
    )
    t.equal(all.filter(({ resumed }) => !resumed).length, 1)
    t.equal(new Set(all.map(({ result }) => result)).size, 1)
    t.equal(await orders(step.operation), 1)
  })

  t.test('ten steps at once do not meet', async (t) => {
    const { operation } = stepOf()
    const all = await Promise.all(
      Array.from({ length: 10 }, (_, n) =>
        steps.once(stepOf({ operation, name: `step ${n}` }), ordering(`${operation}${n}`, String(n)))
      )
    )
    t.same(
      all.map(({ result, resumed }) => [result, resumed]),
      Array.from({ length: 10 }, (_, n) => [String(n), false])
    )
    t.equal((await rows(operation)).length, 10)
  })

  t.test('names are told apart to the letter', async (t) => {
    const { operation } = stepOf()
    const long = 'x'.repeat(255)
    const names = [
      'pay',
      'Pay',
      'PAY',
      'pay ',
      ' pay',
      'páy',
      'pa\u0301y',
      'pay#',
      'pay\0',
      '',
      '💶',
      '\ud800',
      '\ud801'
    ]
    for (const name of [...names, 'ß', 'ss', 'a b', 'a-b', long, `${long}y`, `${long}z`]) {
      const committed = await steps.once(stepOf({ operation, name }), async () => JSON.stringify(name))
      t.equal(JSON.parse(committed.result), name)
      t.match(await steps.once(stepOf({ operation, name }), async () => '0'), { ...committed, resumed: true })
    }
  })

  t.test('a result may hold any text, and is what JSON.parse makes of it', async (t) => {
    const value = { text: 'ä💶\0\\"\u2028\u007f\ud800', question: 'why? $1' }
    for (const text of [JSON.stringify(value), 'undefined', '""']) {
      const step = stepOf()
      const first = await steps.once(step, async () => text)
      const again = await steps.once(step, async () => 'not called')
      t.equal(again.result, first.result)
      if (text !== 'undefined') t.same(JSON.parse(again.result), JSON.parse(text))
      else t.equal(again.result, text)
    }
  })

  t.test('a result of 65,535 bytes is kept; a larger one undoes its step', async (t) => {
    const [fits, larger] = [stepOf(), stepOf()]
    const text = JSON.stringify('x'.repeat(65_533))
    await steps.once(fits, async () => text)
    t.equal((await steps.once(fits, async () => '')).result, text)
    await t.rejects(steps.once(larger, ordering(larger.operation, `${text} `)), { message: /takes 65536 bytes/ })
    t.same([await orders(larger.operation), await rows(larger.operation)], [0, []])
  })

  t.test('a step that has expired is done anew, by one of ten at once', async (t) => {
    const step = stepOf({ expiresAt: Date.now() - 1 })
    await steps.once(step, async () => '"old"')
    t.equal((await rows(step.operation)).length, 1)
    const fresh = { ...step, expiresAt: Date.now() + DAY, fingerprint: 'new' }
    const all = await Promise.all(
      Array.from({ length: 10 }, () => steps.once(fresh, ordering(step.operation, '"new"')))
    )
    for (const { result, fingerprint } of all) t.same([result, fingerprint], ['"new"', 'new'])
    t.equal(all.filter(({ resumed }) => !resumed).length, 1)
    t.equal(await orders(step.operation), 1)
  })

  t.test('a step without an end is kept', async (t) => {
    const step = stepOf({ expiresAt: null })
    await steps.once(step, ordering(step.operation))
    await steps.sweep()
    t.match(await steps.once(step, ordering(step.operation)), { resumed: true })
  })

  t.test('the sweep deletes what has expired, and happens by itself', async (t) => {
    const [expired, kept] = [stepOf({ expiresAt: Date.now() - 1 }), stepOf()]
    for (const step of [expired, kept]) await steps.once(step, async () => '1')
    await steps.sweep()
    t.same([await rows(expired.operation), (await rows(kept.operation)).length], [[], 1])
    await steps.once(expired, async () => '1')
    await database.steps('steps').once(stepOf(), async () => '1')
    await until(async () => (await rows(expired.operation)).length === 0, { message: 'the sweep' })
    t.equal((await rows(kept.operation)).length, 1)
  })

  t.test('forget: all steps of an operation, and of no other', async (t) => {
    const key = randomUUID()
    const [own, scoped] = [storageKey(null, key), storageKey('alice', key)]
    for (const operation of [own, scoped])
      for (const name of ['a', 'B']) await steps.once(stepOf({ operation, name }), async () => '1')
    t.same([await steps.forget(`"${key}"`), await steps.forget(key)], [true, false])
    t.same([(await rows(own)).length, (await rows(scoped)).length], [0, 2])
    t.same([await steps.forget(key, { scope: 'bob' }), await steps.forget(key, { scope: 'alice' })], [false, true])
    t.same(await rows(scoped), [])
  })

  t.test('the table can be created by ten at once, and when it is there', async (t) => {
    const table = `Steps_${randomUUID().replaceAll('-', '')}`
    const others = Array.from({ length: 10 }, () => database.steps(table))
    await Promise.all(others.map((other) => other.createTable()))
    await others[0]?.createTable()
    t.match(await others[0]?.once(stepOf(), async () => '1'), { resumed: false })
    t.match(steps.ddl, /^CREATE TABLE IF NOT EXISTS steps /)
  })

  t.test('without its table a step fails with what the database says', async (t) => {
    const error = await database
      .steps('missing')
      .once(stepOf(), async () => '1')
      .catch((error: Error) => error)
    t.match(error, /missing/i)
  })

  t.test('a commit whose acknowledgement is lost counts', async (t) => {
    const step = stepOf()
    const work = ordering(step.operation)
    t.match(await database.steps('steps', 'after the commit').once(step, work), { result: '{"id":1}' })
    t.match(await steps.once(step, work), { resumed: true })
    t.same([work.runs, await orders(step.operation)], [1, 1])
  })

  t.test('a connection that is lost before the commit undoes the step', async (t) => {
    const step = stepOf()
    const work = ordering(step.operation)
    await t.rejects(database.steps('steps', 'before the commit').once(step, work))
    t.equal(await orders(step.operation), 0)
    t.match(await steps.once(step, work), { resumed: false })
    t.same([work.runs, await orders(step.operation)], [2, 1])
  })

  t.test('a connection that is lost in the commit: the step is done, or is undone', async (t) => {
    for (let n = 0; n < 10; n++) {
      const step = stepOf()
      const work = ordering(step.operation)
      const outcome = await database
        .steps('steps', 'in the commit')
        .once(step, work)
        .catch(() => null)
      // What the server still does with a connection that is gone, it does behind our back: the next one waits for that.
      const again = await steps.once(step, work)
      if (outcome !== null) t.equal(again.resumed, true)
      t.equal(await orders(step.operation), 1)
    }
  })

  if (kill) {
    t.test('a connection that could not be told to roll back is not used again', async (t) => {
      const step = stepOf()
      const failed = database.steps('steps', 'before the rollback').once(step, async (tx) => {
        await order(tx, step.operation)
        throw new Error('no')
      })
      await t.rejects(failed, { message: 'no' })
      // As many as there are connections in the pool: whoever got this one would commit what was left in it.
      for (let n = 0; n < 25; n++) await steps.once(stepOf(), async () => '1')
      t.equal(await orders(step.operation), 0)
    })

    t.test('a step that does not end holds up its duplicates, until its connection is gone', async (t) => {
      const step = stepOf()
      const entered = latch<Tx>()
      const leave = latch()
      const first = steps.once(step, async (tx) => {
        await order(tx, step.operation)
        entered.open(tx)
        await leave.promise
        return '"late"'
      })
      const held = await entered.promise
      const second = steps.once(step, ordering(step.operation))
      if (waiting) await until(async () => (await waiting()) > 0, { message: 'the duplicate to wait' })
      await kill(held)
      t.match(await second, { resumed: false, result: '{"id":1}' })
      leave.open()
      t.same(await first, { result: '{"id":1}', fingerprint: 'f', resumed: true }, 'the row decides')
      t.equal(await orders(step.operation), 1)
    })
  }
}

/** A step that nothing else has. */
export function stepOf(changes: Partial<TransactionalStep> = {}): TransactionalStep {
  const operation = storageKey(null, randomUUID())
  return { operation, name: 'step', fingerprint: 'f', expiresAt: Date.now() + DAY, ...changes }
}
