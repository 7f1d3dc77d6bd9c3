import { randomUUID } from 'node:crypto'
import type { FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import { MemoryStore } from '../../index.js'
import type { SqlTransactions } from '../../lib/transactions.js'
import { build, inject, REPLAYED } from './app.js'
import { latch, until } from './latch.js'

/* What is promised of steps in transactions of an ORM or a driver, through the plugin. */

/** What becomes of a commit: it is not sent, its answer is lost, or nobody knows. Its connection is lost each time. */
export type CommitLoss = 'unsent' | 'unheard' | 'cut'

/** The database of a file of tests, with a table `orders` that has a unique `ref`. */
export interface World {
  /** Sends a statement, on a connection of its own, and gives its rows. */
  outside(text: string): Promise<unknown[]> | unknown[]
  /** What becomes of the next commit. */
  lose(loss: CommitLoss): void
  /** How many statements wait for another transaction; where transactions take turns, nobody can see that. */
  waiting?(): Promise<number>
  /** Kills the connections that have a transaction open. */
  kill?(): Promise<void>
}

/** An ORM or a driver, as its users write it. */
export interface Orm<Tx> {
  books: SqlTransactions<Tx>
  /** Inserts an order by its own interface. */
  order(tx: Tx, ref: string): unknown
  /** What it says when there is one with this `ref` already. */
  duplicate: object
  /** Its own transaction within a transaction. */
  nested?(tx: Tx, work: (tx: Tx) => Promise<unknown>): Promise<unknown>
  /** Does the process end with a connection that is killed while its transaction is open? */
  dies?: true
  close?(): unknown
}

/** Of each it is not known here what its transactions are: only the scenes do something with them. */
export function orm<Tx>(open: () => Orm<Tx> | Promise<Orm<Tx>>): (t: Test, world: World) => Promise<void> {
  return async (t, world) => scenes(t, world, await open())
}

async function scenes<Tx>(t: Test, { outside, lose, waiting, kill }: World, orm: Orm<Tx>): Promise<void> {
  const { books, order, nested } = orm
  t.teardown(() => orm.close?.())
  await books.createTable()

  const ordered = async (ref: string) => (await outside(`SELECT ref FROM orders WHERE ref = '${ref}'`)).length
  const steps = async () => (await outside('SELECT step FROM idempotency_steps')).length

  /** An app with a store of its own, as another process has, whose handler orders in a step. */
  async function shop(t: Test) {
    const shop = {
      /** What the step does before it orders, and behind that. */
      before: async (_tx: Tx): Promise<unknown> => null,
      behind: async (_tx: Tx): Promise<unknown> => null,
      /** What the handler does after the step. */
      after: async () => {},
      /** What the step has thrown. */
      thrown: undefined as unknown,
      handlers: 0,
      runs: 0,
      app: await build(t, { store: new MemoryStore() })
    }
    shop.app.post<{ Body: { ref: string } }>(
      '/orders',
      { config: { idempotency: { required: true } } },
      async (request, reply) => {
        const { ref } = request.body
        shop.handlers++
        const placed = await request.idempotency
          ?.step('order', books, async (tx) => {
            const run = ++shop.runs
            await shop.before(tx)
            await order(tx, ref)
            await shop.behind(tx)
            return { ref, run }
          })
          .catch((error: unknown) => {
            shop.thrown = error
            throw error
          })
        await shop.after()
        return reply.code(201).send(placed)
      }
    )
    return shop
  }
  const post = async (app: FastifyInstance, ref: string) => {
    const reply = await inject(app, {
      method: 'POST',
      url: '/orders',
      headers: { 'idempotency-key': ref },
      payload: { ref }
    })
    return [reply.statusCode, reply.json().run, reply.headers[REPLAYED] === 'true' ? 'replay' : 'fresh']
  }
  const once = async () => {}
  const failing = async () => {
    throw new Error('no')
  }

  t.test('an order is placed once, and its reply is replayed', async (t) => {
    const ref = randomUUID()
    const { app } = await shop(t)
    t.same(await post(app, ref), [201, 1, 'fresh'])
    t.same(await post(app, ref), [201, 1, 'replay'])
    t.equal(await ordered(ref), 1)
  })

  t.test('a retry after a failure of the handler goes on behind the step', async (t) => {
    const ref = randomUUID()
    const one = await shop(t)
    one.after = failing
    t.match(await post(one.app, ref), [500])
    one.after = once
    t.same(await post(one.app, ref), [201, 1, 'fresh'])
    t.same([one.runs, await ordered(ref)], [1, 1])
  })

  t.test('the step is known where the store is not', async (t) => {
    const ref = randomUUID()
    const [one, other] = [await shop(t), await shop(t)]
    t.same(await post(one.app, ref), [201, 1, 'fresh'])
    t.same(await post(other.app, ref), [201, 1, 'fresh'])
    t.same([other.runs, await ordered(ref)], [0, 1])
  })

  t.test('what throws is undone, and done anew by a retry', async (t) => {
    const ref = randomUUID()
    const before = await steps()
    const one = await shop(t)
    one.behind = failing
    t.match(await post(one.app, ref), [500])
    t.match(one.thrown, { message: 'no' })
    t.same([await ordered(ref), await steps()], [0, before])
    one.behind = once
    t.same(await post(one.app, ref), [201, 2, 'fresh'])
    t.equal(await ordered(ref), 1)
  })

  t.test("a violated constraint of the user's own table is passed on as it is", async (t) => {
    const ref = randomUUID()
    const one = await shop(t)
    let seen: unknown
    one.before = async (tx) => {
      await order(tx, ref)
      seen = await Promise.resolve(order(tx, ref)).catch((error: unknown) => error)
      throw seen
    }
    t.match(await post(one.app, ref), [500])
    t.match(seen, orm.duplicate)
    t.equal(one.thrown, seen)
    t.equal(await ordered(ref), 0)
  })

  t.test('of two attempts at once one waits, and has the result of the other', async (t) => {
    const ref = randomUUID()
    const [one, other] = [await shop(t), await shop(t)]
    const [entered, leave] = [latch(), latch()]
    one.behind = async () => {
      entered.open()
      await leave.promise
    }
    const first = post(one.app, ref)
    await entered.promise
    const second = post(other.app, ref)
    await until(() => other.handlers === 1, { message: 'the second attempt' })
    if (waiting) await until(async () => (await waiting()) > 0, { message: 'the second attempt to wait' })
    leave.open()
    t.same(await Promise.all([first, second]), [
      [201, 1, 'fresh'],
      [201, 1, 'fresh']
    ])
    t.same([one.runs, other.runs, await ordered(ref)], [1, 0, 1])
  })

  t.test('a commit that does not leave undoes the step', async (t) => {
    const ref = randomUUID()
    const one = await shop(t)
    one.behind = async () => lose('unsent')
    t.match(await post(one.app, ref), [500])
    t.equal(await ordered(ref), 0)
    one.behind = once
    t.same(await post(one.app, ref), [201, 2, 'fresh'])
    t.equal(await ordered(ref), 1)
  })

  t.test('a commit whose answer is lost counts', async (t) => {
    const ref = randomUUID()
    const one = await shop(t)
    one.behind = async () => lose('unheard')
    t.same(await post(one.app, ref), [201, 1, 'fresh'])
    t.same([one.runs, await ordered(ref)], [1, 1])
  })

  t.test('a commit of which nobody knows: the step is done, or is undone', async (t) => {
    for (let n = 0; n < 3; n++) {
      const ref = randomUUID()
      const one = await shop(t)
      one.behind = async () => one.runs === 1 && lose('cut')
      await post(one.app, ref)
      t.match(await post(one.app, ref), [201])
      t.equal(await ordered(ref), 1)
    }
  })

  if (kill && !orm.dies) {
    t.test('a connection that is killed while the step runs undoes it', async (t) => {
      const ref = randomUUID()
      const one = await shop(t)
      one.behind = kill
      t.match(await post(one.app, ref), [500])
      t.equal(await ordered(ref), 0)
      one.behind = once
      t.same(await post(one.app, ref), [201, 2, 'fresh'])
      t.equal(await ordered(ref), 1)
    })
  }

  if (nested) {
    t.test('its own transaction within the step is undone alone, and committed with it', async (t) => {
      const ref = randomUUID()
      const one = await shop(t)
      one.behind = async (tx) => {
        await t.rejects(nested(tx, async (inner) => order(inner, ref)))
        await nested(tx, async (inner) => order(inner, `${ref}+`))
        await t.rejects(
          nested(tx, async (inner) => {
            await order(inner, `${ref}-`)
            throw new Error('no')
          }),
          { message: 'no' }
        )
      }
      t.same(await post(one.app, ref), [201, 1, 'fresh'])
      t.same([await ordered(ref), await ordered(`${ref}+`), await ordered(`${ref}-`)], [1, 1, 0])
    })
  }
}
