import t from 'tap'
import { storageKey } from '../../lib/operation/storage-key.js'
import { mongoTransactions } from '../../lib/transactions.js'
import { latch } from '../support/latch.js'
import { stepOf } from '../support/transaction-scenes.js'

/*
 * mongoTransactions against a stand-in, which does what MongoDB's manual says of transactions: writes are seen by others with the commit; who
 * writes what another transaction has written fails at once, with a conflict, after which withTransaction calls its function again. There is
 * no server to be had here.
 */

interface Doc {
  _id: string
  version: number
  fingerprint: string
  result?: string
  expiresAt: Date | null
}

const conflict = () => Object.assign(new Error('WriteConflict'), { label: 'TransientTransactionError' })

class Collection {
  readonly committed = new Map<string, Doc>()
  readonly writers = new Map<string, Session>()

  write(id: string, session: Session): Map<string, Doc | null> {
    const writer = this.writers.get(id)
    if (writer !== undefined && writer !== session) throw conflict()
    this.writers.set(id, session)
    return session.changes
  }
  seen(id: string, session?: Session): Doc | null {
    return session?.changes.get(id) ?? (session?.changes.has(id) ? null : (this.committed.get(id) ?? null))
  }

  async insertOne(doc: Doc, { session }: { session: Session }) {
    const changes = this.write(doc._id, session)
    if (this.seen(doc._id, session)) throw Object.assign(new Error('E11000 duplicate key error'), { code: 11000 })
    changes.set(doc._id, { ...doc })
  }
  async updateOne({ _id }: Doc, { $set }: { $set: Partial<Doc> }, { session }: { session: Session }) {
    this.write(_id, session).set(_id, { ...(this.seen(_id, session) as Doc), ...$set })
  }
  async deleteOne({ _id, expiresAt }: { _id: string; expiresAt: { $lte: Date } }, { session }: { session: Session }) {
    const found = this.seen(_id, session)?.expiresAt
    if (found && found <= expiresAt.$lte) this.write(_id, session).set(_id, null)
  }
  async findOne({ _id }: { _id: string }) {
    return this.seen(_id)
  }
  async deleteMany({ _id }: { _id: RegExp }) {
    const ids = [...this.committed.keys()].filter((id) => _id.test(id))
    for (const id of ids) this.committed.delete(id)
    return { deletedCount: ids.length }
  }
}

class Session {
  changes = new Map<string, Doc | null>()
  readonly orders: string[] = []
  ended = false

  constructor(readonly collection: Collection) {}

  async withTransaction(work: () => Promise<void>) {
    for (;;) {
      try {
        await work()
        for (const [id, doc] of this.changes) {
          if (doc === null) this.collection.committed.delete(id)
          else this.collection.committed.set(id, doc)
        }
        return { ok: 1 }
      } catch (error) {
        if ((error as { label?: string }).label !== 'TransientTransactionError') throw error
        await new Promise((resolve) => setTimeout(resolve, 1))
      } finally {
        this.changes = new Map()
        for (const [id, writer] of this.collection.writers) if (writer === this) this.collection.writers.delete(id)
      }
    }
  }
  async endSession() {
    this.ended = true
  }
}

function open() {
  const collection = new Collection()
  const sessions: Session[] = []
  const client = {
    startSession() {
      const session = new Session(collection)
      sessions.push(session)
      return session
    }
  }
  return { collection, sessions, steps: mongoTransactions(client, collection) }
}

t.test('a step is committed once, and every session is ended', async (t) => {
  const { steps, sessions, collection } = open()
  const step = stepOf()
  t.same(await steps.once(step, async () => '"ä"'), { result: '"ä"', fingerprint: 'f', resumed: false })
  const again = await steps.once({ ...step, fingerprint: 'g' }, async () => t.fail() as never)
  t.same(again, { result: '"ä"', fingerprint: 'f', resumed: true })
  t.equal(collection.committed.size, 1)
  t.ok(sessions.length > 0 && sessions.every(({ ended }) => ended))
})

t.test('what throws is passed on and undone', async (t) => {
  const { steps, collection } = open()
  const step = stepOf()
  const error = new Error('no')
  await t.rejects(
    steps.once(step, async () => {
      throw error
    }),
    error
  )
  t.equal(collection.committed.size, 0)
  t.match(await steps.once(step, async () => '1'), { resumed: false })
})

t.test('duplicates get the result of the first, and a conflict of the work calls it again', async (t) => {
  const { steps } = open()
  const step = stepOf()
  const [entered, leave] = [latch(), latch()]
  let runs = 0
  const work = async () => {
    if (++runs === 1) throw conflict()
    entered.open()
    await leave.promise
    return String(runs)
  }
  const first = steps.once(step, work)
  await entered.promise
  const others = Array.from({ length: 3 }, () => steps.once(step, work))
  leave.open()
  t.match(await first, { result: '2', resumed: false })
  for (const other of await Promise.all(others)) t.match(other, { result: '2', resumed: true })
  t.equal(runs, 2)
})

t.test('a document of another version is an error that says so, until it has expired', async (t) => {
  const { steps, collection } = open()
  const [fresh, expired] = [stepOf(), stepOf({ expiresAt: Date.now() - 1 })]
  for (const step of [fresh, expired]) await steps.once(step, async () => '1')
  for (const doc of collection.committed.values()) {
    t.equal(doc.version, 1)
    doc.version = 2
  }
  await t.rejects(
    steps.once(fresh, async () => t.fail() as never),
    { message: /another version of fastify-idempotency/ }
  )
  t.match(await steps.once(expired, async () => '2'), { result: '2', resumed: false })
})

t.test('an expired step is done anew; names and operations are told apart', async (t) => {
  const { steps } = open()
  const step = stepOf({ expiresAt: Date.now() - 1 })
  await steps.once(step, async () => '1')
  t.match(await steps.once({ ...step, expiresAt: null }, async () => '2'), { result: '2', resumed: false })
  t.match(await steps.once(step, async () => '3'), { result: '2', resumed: true })
  t.match(await steps.once({ ...step, name: 'Step' }, async () => '4'), { result: '4' })
})

t.test('forget: all steps of an operation, and of no other', async (t) => {
  const { steps } = open()
  for (const scope of [null, 'alice'])
    for (const name of ['a', 'b'])
      await steps.once(stepOf({ operation: storageKey(scope, 'key'), name }), async () => '1')
  t.same([await steps.forget('key'), await steps.forget('key')], [true, false])
  t.same([await steps.forget('key', { scope: 'alice' }), await steps.forget('key', { scope: 'alice' })], [true, false])
})
