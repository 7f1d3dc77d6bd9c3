import { drizzle } from 'drizzle-orm/node-postgres'
import fc from 'fast-check'
import { Kysely, PostgresDialect, sql } from 'kysely'
import type { PoolClient } from 'pg'
import t from 'tap'
import type { TransactionClient } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { Guard } from '../../lib/stores/postgres/client-guard.js'
import { NestedTransactions } from '../../lib/stores/postgres/nested-transactions.js'
import { until } from '../support/latch.js'
import {
  BROKEN,
  created,
  RAN_1,
  RAN_2,
  REPLAYED_1,
  type Settings,
  stage,
  told,
  transactionOf,
  UNAVAILABLE,
  type Work
} from '../support/transactions.js'

/* Routes with `transaction: 'nested'`: what a handler calls begins and ends transactions of its own. */

const { server, outside, test, open: openStage } = await stage(t)

/** What a first run does on its client; `note` writes to the ledger, and `fail` is a statement that fails. */
type Service = (tx: Ledger) => Promise<unknown>
interface Ledger {
  readonly client: TransactionClient
  note(text: string): Promise<unknown>
  fail(): Promise<unknown>
  /** Sends a text; the command that was answered. */
  ask(text: string): Promise<string>
}

/** A scene whose first run does what `service` does, and then replies as `ending` does. */
async function open(t: Parameters<typeof openStage>[0], service: Service, ending = created, settings: Settings = {}) {
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    const note = (text: string) => scene.write(request, text)
    const fail = () => client.query('SELECT 1 / 0')
    await service({ client, note, fail, ask: async (text) => (await client.query(text)).command })
    return ending(request, reply, run)
  }
  const options = { transaction: 'nested', ...settings.options } as const
  const scene = await openStage(t, { ...settings, first, options })
  return scene
}

const refusal: Work = (_request, reply) => reply.code(402).header('location', '/1').send({})

/** A service as they are written for `pg`: it begins, works, and commits, or rolls back what has failed. */
async function transact({ client }: Ledger, work: () => Promise<unknown>): Promise<void> {
  try {
    await client.query('BEGIN')
    await work()
    await client.query('COMMIT')
  } catch (error) {
    await client.query('ROLLBACK')
    throw error
  }
}

const oops = () => Promise.reject(new Error('oops'))
const ignore = () => {}

test('a service that begins and commits does so in the transaction of the request', async (t) => {
  const seen: unknown[] = []
  const scene = await open(t, async (tx) => {
    await transact(tx, () => tx.note('service'))
    seen.push(await scene.ledger())
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(seen, [[]], 'nobody sees what it has committed before all is')
  t.same(await scene.ledger(), ['run 1', 'service'])
  t.same(told(await scene.send()), REPLAYED_1)
})

test('what a service has committed is undone with the request', async (t) => {
  const scene = await open(t, async (tx) => {
    await transact(tx, () => tx.note('service'))
    throw new Error('oops')
  })
  t.equal((await scene.send()).statusCode, 500)
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
  t.same(await scene.ledger(), ['run 2'])
})

test('a service that rolls back undoes what it did, and the handler goes on', async (t) => {
  const scene = await open(t, async (tx) => {
    await tx.note('before')
    await transact(tx, () => tx.note('service').then(oops)).catch(ignore)
    await tx.note('after')
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'before', 'run 1'])
})

test('a statement that fails in a service spoils no more than that', async (t) => {
  const scene = await open(t, async (tx) => {
    await t.rejects(
      transact(tx, () => tx.note('service').then(tx.fail)),
      { code: '22012' }
    )
    await tx.note('after')
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'run 1'])
})

test('services in services: each commits or rolls back what it has begun itself', async (t) => {
  const scene = await open(t, async (tx) => {
    await transact(tx, async () => {
      await tx.note('outer')
      await transact(tx, () => tx.note('first'))
      await transact(tx, () => tx.note('second').then(tx.fail)).catch(ignore)
      await transact(tx, () => tx.note('third'))
    })
    await transact(tx, async () => {
      await tx.note('undone')
      await transact(tx, () => tx.note('committed, and undone'))
      await oops()
    }).catch(ignore)
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['first', 'outer', 'run 1', 'third'])
})

test('a COMMIT behind a statement that has failed rolls back, and says so', async (t) => {
  const answers: string[] = []
  const scene = await open(t, async ({ ask, note, fail }) => {
    answers.push(await ask('BEGIN'), await ask('START TRANSACTION'))
    await note('lost')
    await fail().catch(ignore)
    answers.push(await ask('COMMIT'))
    await note('kept')
    answers.push(await ask('END'))
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(answers, ['BEGIN', 'START', 'ROLLBACK', 'COMMIT'])
  t.same(await scene.ledger(), ['kept', 'run 1'])
})

test('what is sent without waiting is done in its order, also behind what has failed', async (t) => {
  const scene = await open(t, ({ client, note, fail }) =>
    Promise.all([
      client.query('BEGIN'),
      note('lost'),
      fail().catch(ignore),
      client.query('COMMIT'),
      client.query('BEGIN'),
      note('kept'),
      client.query('BEGIN'),
      note('rolled back'),
      client.query('ROLLBACK'),
      client.query('COMMIT'),
      note('after')
    ])
  )
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'kept', 'run 1'])
})

test('a BEGIN where a statement has failed fails, and its ROLLBACK does not undo what is outside', async (t) => {
  const scene = await open(t, async (tx) => {
    await transact(tx, async () => {
      await tx.note('undone')
      await tx.fail().catch(ignore)
      await t.rejects(transact(tx, oops))
      await t.rejects(tx.note('nothing'), { code: '25P02' })
      await oops()
    }).catch(ignore)
    await tx.note('after')
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'run 1'])
})

test('savepoints of a service work in it, and end with it', async (t) => {
  const scene = await open(t, async (tx) => {
    await tx.client.query('SAVEPOINT a')
    await transact(tx, async () => {
      await tx.client.query('SAVEPOINT a')
      await tx.note('lost')
      await tx.fail().catch(ignore)
      await tx.client.query('ROLLBACK TO a')
      await tx.note('kept')
    })
    await tx.note('lost as well')
    await tx.client.query('ROLLBACK TO a')
    await tx.note('after')
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'run 1'], 'the outer one of that name goes back over the service')
})

test('one whose savepoint the handler has gone back over cannot be committed', async (t) => {
  const scene = await open(t, async ({ client, note, ask }) => {
    await client.query('SAVEPOINT a')
    await client.query('BEGIN')
    await note('undone')
    await client.query('ROLLBACK TO a')
    await t.rejects(ask('COMMIT'), { code: '3B001' })
    await t.rejects(ask('ROLLBACK'), { code: '3B001' })
  })
  t.same(told(await scene.send()), BROKEN)
  t.same(await scene.ledger(), [])
})

test('modes: those that the transaction has, and READ ONLY, which ends with the savepoint; no others', async (t) => {
  const scene = await open(t, async ({ ask, note }) => {
    for (const modes of [
      'ISOLATION LEVEL READ COMMITTED',
      'ISOLATION LEVEL READ COMMITTED, READ WRITE',
      'READ WRITE'
    ]) {
      t.equal(await ask(`BEGIN TRANSACTION ${modes}`), 'BEGIN')
      await ask('SET TRANSACTION ISOLATION LEVEL READ COMMITTED')
      await note(modes)
      t.equal(await ask('COMMIT'), 'COMMIT')
    }
    for (const end of ['COMMIT', 'ROLLBACK']) {
      t.equal(await ask('START TRANSACTION READ ONLY'), 'START')
      await ask('SELECT 1')
      await t.rejects(ask('BEGIN READ WRITE'), { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /be READ WRITE/ })
      await ask('ROLLBACK')
      if (end === 'ROLLBACK') await t.rejects(note('nothing'), { code: '25006' })
      t.equal(await ask(end), end)
      await note(`after the ${end}`)
    }
    for (const modes of ['ISOLATION LEVEL REPEATABLE READ', 'ISOLATION LEVEL SERIALIZABLE', 'DEFERRABLE']) {
      await t.rejects(ask(`BEGIN ${modes}`), { code: 'FST_IDEMPOTENCY_TRANSACTION', cause: { code: '25001' } }, modes)
      t.equal(await ask('ROLLBACK'), 'ROLLBACK')
    }
  })
  t.same(told(await scene.send()), RAN_1)
  t.equal((await scene.ledger()).length, 6)
})

test('modes are those of the server where it has others', async (t) => {
  const service: Service = async ({ ask }) => {
    await ask('BEGIN ISOLATION LEVEL SERIALIZABLE')
    await ask('COMMIT')
  }
  const pool = { options: '-c default_transaction_isolation=serializable' }
  t.same(told(await (await open(t, service, created, { pool })).send()), RAN_1)
  t.same(told(await (await open(t, service)).send()), BROKEN)
})

test('what would end the transaction of the request is refused, and leaves it as it is', async (t) => {
  const scene = await open(t, async ({ ask, note }) => {
    for (const text of [
      'COMMIT',
      'ROLLBACK',
      'BEGIN; SELECT 1; COMMIT',
      "PREPARE TRANSACTION 'a'",
      'COMMIT AND CHAIN'
    ]) {
      await t.rejects(ask(text), { code: 'FST_IDEMPOTENCY_TRANSACTION' }, text)
    }
    await note('after')
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['after', 'run 1'])
})

test('a success whose handler has left a transaction open is refused, and nothing is there', async (t) => {
  const scene = await open(t, async (tx) => {
    await transact(tx, () => tx.note('committed'))
    await tx.ask('BEGIN')
    await tx.note('open')
  })
  const reply = await scene.send()
  t.same(told(reply), BROKEN)
  t.match(reply.json().message, /before a transaction that it has begun was ended/)
  t.same([await scene.ledger(), await scene.store.get(storageKey(null, 'k'))], [[], null])
  t.same(told(await scene.send()), RAN_2)
})

test('a ROLLBACK that was meant for a refused BEGIN has ended another: no success is believed behind it', async (t) => {
  for (const refused of ['BEGIN; SELECT 1', 'BEGIN ISOLATION LEVEL CHAOS']) {
    const scene = await open(t, async ({ ask, note }) => {
      await ask('BEGIN')
      await note('outer')
      await ask(refused).catch(() => ask('ROLLBACK'))
      await ask('COMMIT').catch(() => {})
    })
    t.same(told(await scene.send()), BROKEN, refused)
    t.same(await scene.ledger(), [])
  }
})

test('a refusal with a transaction open is stored, and all is undone', async (t) => {
  for (const begin of ['BEGIN', 'BEGIN READ ONLY']) {
    const scene = await open(t, ({ ask, note }) => note('undone').then(() => ask(begin)), refusal)
    for (const replayed of [undefined, 'true']) {
      const { statusCode, headers } = await scene.send()
      t.same([statusCode, headers['idempotent-replayed']], [402, replayed])
    }
    t.same(await scene.ledger(), [])
  }
})

test('a refusal behind a transaction that was committed is stored with it', async (t) => {
  const scene = await open(t, (tx) => transact(tx, () => tx.note('kept')), refusal)
  t.equal((await scene.send()).statusCode, 402)
  t.same(await scene.ledger(), ['kept', 'run 1'])
})

test('a COMMIT that nobody has waited for is a query that had not ended', async (t) => {
  const scene = await open(t, async ({ ask }) => {
    await ask('BEGIN')
    void ask('COMMIT')
  })
  const reply = await scene.send()
  t.same(told(reply), BROKEN)
  t.match(reply.json().message, /before its queries have ended/)
})

test('a connection that is lost in a nested transaction is a 503, and the retry runs', async (t) => {
  const scene = await open(t, async (tx) => {
    const work = async () => {
      const pid = (await tx.client.query('SELECT pg_backend_pid() AS pid')).rows[0].pid
      let ended = false
      tx.client.once('end', () => {
        ended = true
      })
      await outside.query('SELECT pg_terminate_backend($1)', [pid])
      await until(() => ended, { message: 'the loss to be noticed' })
    }
    await t.rejects(transact(tx, work))
  })
  t.same(told(await scene.send()), UNAVAILABLE)
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
})

test('behind the reply nothing begins any more', async (t) => {
  let client: TransactionClient | undefined
  const scene = await open(t, async (tx) => {
    client = tx.client
  })
  t.same(told(await scene.send()), RAN_1)
  const { result, sent } = await server.statements(() => client?.query('BEGIN').catch((error) => error))
  t.match(result, { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /its handler has replied/ })
  t.same(sent, [])
})

type Act = 'begin' | 'commit' | 'rollback' | 'write' | 'fail'

/** What a handler asks for, what it is answered, and which of its writes are there in the end. */
function planned(acts: Act[]) {
  const asked: [text: string, answer: string][] = []
  const levels: { rows: number[]; hasFailed: boolean }[] = []
  let rows: number[] = []
  const end = (text: string) => {
    const level = levels.pop() as (typeof levels)[number]
    const isKept = text === 'COMMIT' && !level.hasFailed
    asked.push([text, isKept ? 'COMMIT' : 'ROLLBACK'])
    if (!isKept) rows = level.rows
  }
  for (const [n, act] of acts.entries()) {
    const top = levels.at(-1)
    if (act === 'begin' && !top?.hasFailed) {
      levels.push({ rows, hasFailed: false })
      asked.push(['BEGIN', 'BEGIN'])
    } else if (act === 'write') {
      asked.push([`INSERT INTO random VALUES (${n})`, top?.hasFailed ? '25P02' : 'INSERT'])
      if (!top?.hasFailed) rows = [...rows, n]
    } else if (top !== undefined && act === 'fail') {
      asked.push(['SELECT 1 / 0', top.hasFailed ? '25P02' : '22012'])
      top.hasFailed = true
    } else if (top !== undefined && act !== 'begin') end(act.toUpperCase())
  }
  while (levels.length > 0) end('COMMIT')
  return { asked, rows }
}

/** Asks for all of it in a transaction, waiting for each answer or for none. */
async function carriedOut(client: PoolClient, asked: [text: string, answer: string][], waits: boolean) {
  await client.query('TRUNCATE random')
  await client.query('BEGIN')
  const guard = new Guard(client, new NestedTransactions(client, 's'))
  const answers: Promise<string>[] = []
  for (const [text] of asked) {
    const answer = guard.client.query(text).then(
      ({ command }) => command,
      ({ code }) => code
    )
    answers.push(answer)
    if (waits) await answer
  }
  const given = await Promise.all(answers)
  const { command } = await client.query('COMMIT')
  const { rows } = await client.query('SELECT n FROM random ORDER BY n')
  return { given, isOpen: guard.hasBegun, command, rows: rows.map(({ n }) => n) }
}

test('whatever is begun, committed, rolled back and fails: what is there is what was committed', async (t) => {
  await outside.query('CREATE TABLE random (n int)')
  const client = await outside.connect()
  t.teardown(() => client.release())
  const acts = fc.array(fc.constantFrom<Act>('begin', 'begin', 'commit', 'rollback', 'write', 'write', 'fail'), {
    maxLength: 30
  })
  await fc.assert(
    fc.asyncProperty(acts, fc.boolean(), async (acts, waits) => {
      const { asked, rows } = planned(acts)
      const found = await carriedOut(client, asked, waits)
      t.strictSame(found, { given: asked.map(([, answer]) => answer), isOpen: false, command: 'COMMIT', rows })
    }),
    { numRuns: 100 }
  )
})

test("Drizzle's transactions are nested, as are those in them", async (t) => {
  const scene = await open(t, async ({ client }) => {
    const db = drizzle(client)
    const note = (tx: Pick<typeof db, 'execute'>, text: string) =>
      tx.execute(`INSERT INTO ledger_${scene.id} VALUES ('${text}')`)
    await db.transaction(async (tx) => {
      await note(tx, 'committed')
      await tx.transaction((inner) => note(inner, 'inner'))
      await tx.transaction((inner) => note(inner, 'lost').then(() => inner.rollback())).catch(ignore)
    })
    await db.transaction((tx) => note(tx, 'undone').then(() => tx.rollback())).catch(ignore)
    await db.transaction((tx) => tx.execute('SELECT 1 / 0')).catch(ignore)
    await db.transaction((tx) => note(tx, 'read committed'), { isolationLevel: 'read committed' })
    await t.rejects(
      db.transaction((tx) => note(tx, 'no'), { accessMode: 'read only' }),
      /Failed query/
    )
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['committed', 'inner', 'read committed', 'run 1'])
})

test("Kysely's transactions are nested", async (t) => {
  const scene = await open(t, async ({ client: { query } }) => {
    const pool = { connect: async () => ({ query, release() {} }), end: async () => {} }
    const db = new Kysely<Record<string, { note: string }>>({ dialect: new PostgresDialect({ pool }) })
    const note = (tx: typeof db, text: string) =>
      sql`INSERT INTO ${sql.table(`ledger_${scene.id}`)} VALUES (${text})`.execute(tx)
    await db.transaction().execute((tx) => note(tx, 'committed'))
    await db
      .transaction()
      .setIsolationLevel('read committed')
      .execute((tx) => note(tx, 'undone').then(oops))
      .catch(ignore)
  })
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['committed', 'run 1'])
})
