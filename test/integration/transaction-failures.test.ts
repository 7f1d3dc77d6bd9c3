import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { type Duplex, PassThrough, Readable } from 'node:stream'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import type { Pool, PoolClient, PoolConfig } from 'pg'
import t, { type Test } from 'tap'
import { PostgresStore, type TransactionClient } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { build, inject, listen, start } from '../support/app.js'
import { latch, until } from '../support/latch.js'
import {
  BROKEN,
  created,
  held,
  IN_PROGRESS,
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

/* Routes with `transaction: true` whose database fails, or whose handlers do what a transaction does not bear. */

const { server, outside, test, open, gate } = await stage(t, { config: { deadlock_timeout: '50ms' } })

const isStored = async ({ store }: { store: PostgresStore }) =>
  (await store.get(storageKey(null, 'k')))?.state === 'completed'
const isFree = async ({ store }: { store: PostgresStore }) => (await store.get(storageKey(null, 'k'))) === null

/** The events of one name, as long as the test runs. */
function listenTo(t: Test, name: string): unknown[] {
  const events: unknown[] = []
  const listener = (event: unknown) => void events.push(event)
  subscribe(`fastify-idempotency:${name}`, listener)
  t.teardown(() => unsubscribe(`fastify-idempotency:${name}`, listener))
  return events
}

const pidOf = async (client: TransactionClient): Promise<number> =>
  (await client.query<{ pid: number }>('SELECT pg_backend_pid() AS pid')).rows[0]?.pid ?? 0
const terminate = (pid: number) => outside.query('SELECT pg_terminate_backend($1)', [pid])

/** Loses the connection of the handler's transaction, and waits until that is noticed. */
async function cut(request: FastifyRequest): Promise<void> {
  const signal = request.idempotency?.signal
  if (signal === undefined || signal.aborted) throw new Error('There is nothing to lose')
  await terminate(await pidOf(transactionOf(request)))
  await until(() => signal.aborted, { message: 'the loss to be noticed' })
}

/* The connection is lost */

const replies: Record<string, Work> = {
  'a success': created,
  'a refusal': (_request, reply) => reply.code(409).header('location', '/1').send({}),
  'an empty reply': (_request, reply) => reply.code(204).header('location', '/1').send()
}

for (const [name, ending] of Object.entries(replies)) {
  test(`a connection that is lost while the handler runs: its signal aborts, and instead of ${name} there is a 503`, async (t) => {
    const lost = listenTo(t, 'lease-lost')
    const first: Work = async (request, reply, run) => {
      reply.header('x-early', '1')
      await cut(request)
      return ending(request, reply, run)
    }
    const scene = await open(t, {
      first,
      route: { onRequest: async (_request, reply) => void reply.header('x-hook', '1') }
    })
    const reply = await scene.send()
    t.same(told(reply), UNAVAILABLE)
    t.match(reply.headers['retry-after'], /^[1-9]\d*$/)
    t.same([reply.headers.location, reply.headers['x-early'], reply.headers['x-hook']], [undefined, undefined, '1'])
    t.same([await scene.ledger(), await scene.store.get(storageKey(null, 'k'))], [[], null])
    t.equal(lost.length, 1)
    t.same(told(await scene.send()), RAN_2)
    t.same(told(await scene.send()), [201, 2, 'replay'])
    t.same(await scene.ledger(), ['run 2'])
  })
}

test('a handler that lets the loss of its connection through fails with it, and the retry runs', async (t) => {
  const terminateSleeper = async () => {
    const pid = "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
    await terminate(await until(async () => (await outside.query(pid)).rows[0]?.pid))
  }
  const first: Work = async (request) => {
    terminateSleeper().catch(t.fail)
    return transactionOf(request).query('SELECT pg_sleep(60)')
  }
  const { send, ledger } = await open(t, { first })
  t.same(told(await send()), [500, '57P01', 'fresh'])
  t.same(await ledger(), [])
  t.same(told(await send()), RAN_2)
})

test('a connection that is lost while a streamed reply is read is a 503, and the retry runs', async (t) => {
  const stream = new PassThrough()
  const { first, entered, leave } = held((_request, reply) => reply.send(stream))
  const scene = await open(t, { first })
  const reply = scene.send()
  const request = await entered
  leave()
  stream.write('one')
  await cut(request)
  stream.end('two')
  t.same(told(await reply), UNAVAILABLE)
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
})

test('a key whose connection is lost is free elsewhere, even while its handler still runs, and has one effect', async (t) => {
  const { first, entered, leave } = held()
  const scene = await open(t, { first })
  const elsewhere = await scene.again()
  const reply = scene.send()
  await cut(await entered)
  await until(() => isFree(scene))
  t.same(told(await elsewhere.send()), RAN_2)
  leave()
  t.same(told(await reply), UNAVAILABLE)
  for (const { send } of [scene, elsewhere]) t.same(told(await send()), [201, 2, 'replay'])
  t.same(await scene.ledger(), ['run 2'])
})

test('a connection that is lost during the commit is a 503, never a success, and the retry runs', async (t) => {
  const errors = listenTo(t, 'store-error')
  const scene = await open(t, { options: { storeTimeout: 60_000 } })
  const commit = await gate(scene)
  const sending = scene.send()
  await terminate(await commit.reached())
  const reply = await sending
  t.same([told(reply), reply.headers.location], [UNAVAILABLE, undefined])
  t.match(reply.headers['retry-after'], /^[1-9]\d*$/)
  t.equal(errors.length, 1)
  t.same(await scene.ledger(), [])
  await commit.open()
  t.same(told(await scene.send()), RAN_2)
  t.same(await scene.ledger(), ['run 2'])
})

test('a connection that is lost during the commit of a stream is a 503, and its source is stopped', async (t) => {
  for (const options of [{}, { maxReplySize: 2 }]) {
    const source = Readable.from([Buffer.from('one'), Buffer.from('two')])
    const scene = await open(t, {
      first: (_request, reply) => reply.header('location', '/1').send(source),
      options: { storeTimeout: 60_000, ...options }
    })
    const commit = await gate(scene)
    const sending = scene.send()
    await terminate(await commit.reached())
    const reply = await sending
    t.same([told(reply), reply.headers.location, source.destroyed], [UNAVAILABLE, undefined, true])
    t.same(await scene.ledger(), [])
    await commit.open()
    t.same(told(await scene.send()), RAN_2)
  }
})

/** What a client does instead when the next transaction is to be committed, once. */
function instead(
  { pool }: { pool: Pool },
  act: (commit: () => Promise<unknown>, socket: Duplex, query: (sql: string) => Promise<unknown>) => Promise<unknown>
) {
  pool.once('acquire', (client) => {
    const { stream } = (client as unknown as { connection: { stream: Duplex } }).connection
    const query = client.query.bind(client) as (...args: unknown[]) => Promise<unknown>
    const watched = (...args: unknown[]) => {
      if (args[0] !== 'COMMIT') return query(...args)
      Object.assign(client, { query })
      return act(() => query(...args), stream, query)
    }
    Object.assign(client, { query: watched })
  })
}

test('a connection that is lost when the commit has just been sent is a 503, and the retry a replay', async (t) => {
  const scene = await open(t)
  instead(scene, (commit, socket) => {
    const answer = commit()
    socket.destroy()
    return answer
  })
  const reply = await scene.send()
  t.same([told(reply), reply.headers.location], [UNAVAILABLE, undefined])
  await until(async () => (await scene.ledger()).length === 1, { message: 'the server to commit' })
  t.same(told(await scene.send()), REPLAYED_1)
  t.same(await scene.ledger(), ['run 1'])
})

test('a reply that is committed is replayed while its own process still waits for the answer to its commit', async (t) => {
  const scene = await open(t)
  const [committing, answer] = [latch(), latch()]
  instead(scene, async (commit, socket) => {
    const committed = commit()
    socket.pause()
    committing.open()
    await answer.promise
    socket.resume()
    return committed
  })
  const first = scene.send()
  await committing.promise
  const elsewhere = await scene.again()
  await until(() => isStored(elsewhere))
  t.same(told(await elsewhere.send()), REPLAYED_1)
  t.same(told(await scene.send()), REPLAYED_1)
  answer.open()
  t.same(told(await first), RAN_1)
  t.equal(scene.runs(), 1)
})

test('a connection that is lost just before the commit is sent is a 503, and the retry runs', async (t) => {
  const scene = await open(t)
  instead(scene, (commit, socket) => {
    socket.destroy()
    return commit()
  })
  const reply = await scene.send()
  t.same([told(reply), reply.headers.location], [UNAVAILABLE, undefined])
  t.same(told(await scene.send()), RAN_2)
  t.same(await scene.ledger(), ['run 2'])
})

test('a network that falls silent at the commit is a 503, and its client does not stay away for ever', async (t) => {
  const scene = await open(t, { options: { storeTimeout: 1_000, lease: 1_000 } })
  instead(scene, (commit, socket) => {
    socket.pause()
    socket.write = () => true
    return commit()
  })
  t.same(told(await scene.send()), UNAVAILABLE)
  await scene.app.close()
  await until(() => scene.pool.totalCount === 0, { message: 'the silent connection to be given up' })
  const elsewhere = await scene.again()
  await until(() => isFree(elsewhere))
  t.same(told(await elsewhere.send()), RAN_2)
})

test('a commit that takes longer than storeTimeout is a 503, and its key is held until it is decided', async (t) => {
  const scene = await open(t, { options: { storeTimeout: 1_000 } })
  const elsewhere = await scene.again()
  const lost = listenTo(t, 'lease-lost')
  const commit = await gate(scene)
  const reply = await scene.send()
  t.same([told(reply), reply.headers.location], [UNAVAILABLE, undefined])
  t.equal(lost.length, 1, 'the claim is over for this process')
  for (const { send } of [scene, elsewhere]) t.same(told(await send()), IN_PROGRESS)
  await commit.open()
  await until(() => isStored(scene))
  for (const { send } of [scene, elsewhere]) t.same(told(await send()), REPLAYED_1)
  t.same([await scene.ledger(), scene.runs()], [['run 1'], 1])
})

test("the 503 of a commit comes to the application's error handler, and as problem details where they are wanted", async (t) => {
  const first: Work = async (request, reply, run) => {
    await cut(request)
    return created(request, reply, run)
  }
  const handling = await open(t, { first })
  handling.app.setErrorHandler((error: FastifyError, _request, reply) =>
    reply.code(error.statusCode ?? 500).send({ code: `seen ${error.code}` })
  )
  t.same(told(await handling.send()), [503, 'seen FST_IDEMPOTENCY_STORE_UNAVAILABLE', 'fresh'])
  const detailed = await open(t, { first, options: { problemDetails: true } })
  const reply = await detailed.send()
  t.match(reply.headers['content-type'], /^application\/problem\+json/)
  t.match(reply.json(), { status: 503, code: 'FST_IDEMPOTENCY_STORE_UNAVAILABLE' })
  t.same(told(await detailed.send()), RAN_2)
})

test('a process that has stopped loses its transaction after one lease, and the retry runs elsewhere', async (t) => {
  const scene = await open(t)
  const dead = await scene.store.begin(storageKey(null, 'k'), {
    token: 'dead',
    fingerprint: '',
    leaseMs: 200,
    retainMs: 60_000,
    takeover: true,
    wake: false,
    timeoutMs: 2_000
  })
  t.same(told(await scene.send()), IN_PROGRESS)
  await until(() => isFree(scene))
  t.same(told(await scene.send()), RAN_1)
  t.same(await scene.ledger(), ['run 1'])
  if (dead.state === 'acquired') t.ok(dead.transaction.lost.aborted)
})

test('a connection that has fallen silent hides a reply that was stored elsewhere for one lease, not longer', async (t) => {
  const options = { lease: 1_000, storeTimeout: 1_000 }
  const { first, entered, leave } = held()
  const scene = await open(t, { first, options })
  const elsewhere = await scene.again({ options })
  const silent = new Promise<void>((resolve) => {
    scene.pool.once('acquire', (client) => {
      const { stream } = (client as unknown as { connection: { stream: Duplex } }).connection
      void entered.then(() => {
        stream.pause()
        stream.write = () => true
        resolve()
      })
    })
  })
  const lost = scene.send()
  await silent
  await until(() => isFree(elsewhere), { message: 'the server to end the transaction' })
  t.same(told(await elsewhere.send()), RAN_2)
  const reply = await until(async () => {
    const retry = told(await scene.send())
    return retry[0] !== 409 && retry
  })
  t.same(reply, [201, 2, 'replay'])
  leave()
  t.same(told(await lost), UNAVAILABLE)
  t.same(await scene.ledger(), ['run 2'])
})

test('a waiter that has left before the key comes to it gives it back, and its handler does not run', async (t) => {
  const options = { onConflict: 'wait' as const }
  const { first, entered, leave } = held(async () => {
    throw new Error('not today')
  })
  const scene = await open(t, { first, options })
  const [asking, taken, gone] = [latch(), latch(), latch()]
  const elsewhere = await scene.again({
    options,
    route: { onRequest: async (_request, reply) => void reply.raw.on('close', gone.open) }
  })
  const begin = elsewhere.store.begin.bind(elsewhere.store)
  elsewhere.store.begin = async (...args) => {
    const found = await begin(...args)
    if (found.state !== 'acquired') asking.open()
    else {
      taken.open()
      await gone.promise
    }
    return found
  }
  const owner = scene.send()
  await entered
  const waiter = start(await listen(elsewhere.app), { key: 'k' })
  await asking.promise
  leave()
  t.equal((await owner).statusCode, 500)
  await taken.promise
  waiter.hangUp()
  await gone.promise
  await until(() => isFree(scene), { message: 'the key to be given back' })
  t.same(told(await scene.send()), RAN_2)
  t.equal(scene.runs(), 2)
})

test('a handler that misuses its transaction is answered with problem details where they are wanted', async (t) => {
  const first: Work = (request) => transactionOf(request).query('COMMIT')
  const scene = await open(t, { first, options: { problemDetails: true, documentationUrl: 'https://example.com/' } })
  const reply = await scene.send()
  t.match(reply.headers['content-type'], /^application\/problem\+json/)
  t.match(reply.headers.link, '<https://example.com/>; rel="describedby"')
  t.match(reply.json(), { type: 'https://example.com/', status: 500, code: 'FST_IDEMPOTENCY_TRANSACTION' })
  t.same(told(await scene.send()), RAN_2)
})

test('a success that cannot be committed is refused once, and a custom error handler has the last word', async (t) => {
  const first: Work = async (request, reply, run) => {
    await transactionOf(request)
      .query('SELECT 1/0')
      .catch(() => {})
    return created(request, reply, run)
  }
  const scene = await open(t, { first, options: { problemDetails: true, documentationUrl: 'https://example.com/' } })
  scene.app.setErrorHandler((error: FastifyError, _request, reply) =>
    reply.code(500).send({ code: `seen ${error.code}` })
  )
  const reply = await scene.send()
  t.same(told(reply), [500, 'seen FST_IDEMPOTENCY_TRANSACTION', 'fresh'])
  t.match(reply.headers['content-type'], /^application\/json/)
  t.equal(reply.headers.link, '<https://example.com/>; rel="describedby"')
  t.same(told(await scene.send()), RAN_2)
})

/* The database refuses */

const failing =
  (sql: string): Work =>
  async (request) =>
    transactionOf(request).query(sql)

test('an error of the database that the handler lets through is its own: 500, rolled back, and the key free', async (t) => {
  const { send, ledger } = await open(t, { first: failing('SELECT 1 / 0') })
  t.same(told(await send()), [500, '22012', 'fresh'])
  t.same(await ledger(), [])
  t.same(told(await send()), RAN_2)
  t.same(await ledger(), ['run 2'])
})

test('with shouldStore: () => true an error of the database is stored, without what was written', async (t) => {
  const { send, ledger, runs } = await open(t, { first: failing('SELECT 1 / 0'), options: { shouldStore: () => true } })
  t.same(told(await send()), [500, '22012', 'fresh'])
  t.same(told(await send()), [500, '22012', 'replay'])
  t.same([await ledger(), runs()], [[], 1])
})

test('an error of the database that the error handler makes a refusal of is stored as that, without what was written', async (t) => {
  const scene = await open(t, { first: failing('SELECT 1 / 0') })
  scene.app.setErrorHandler((error: FastifyError, _request, reply) =>
    reply.code(error.code === '22012' ? 409 : 500).send({ code: `seen ${error.code}` })
  )
  t.same(told(await scene.send()), [409, 'seen 22012', 'fresh'])
  t.same(told(await scene.send()), [409, 'seen 22012', 'replay'])
  t.same([await scene.ledger(), scene.runs()], [[], 1])
})

/** Two handlers side by side, `/a` and `/b`, in two steps with a meeting between them. */
async function rivals(t: Test, one: string, two: string, pool: PoolConfig = {}) {
  const scene = await open(t, { pool })
  const [entered, leave] = [
    { a: latch(), b: latch() },
    { a: latch(), b: latch() }
  ]
  const ledger = `ledger_${scene.id}`
  scene.app.post('/:me', { config: { idempotency: { transaction: true } } }, async (request, reply) => {
    const { me } = request.params as { me: 'a' | 'b' }
    const run = (sql: string) =>
      transactionOf(request).query(
        sql
          .replaceAll('LEDGER', ledger)
          .replaceAll('ME', me)
          .replaceAll('OTHER', me === 'a' ? 'b' : 'a')
      )
    await run(one)
    entered[me].open()
    await leave[me].promise
    await run(two)
    return reply.code(201).header('location', '/1').send({ run: me })
  })
  const send = (me: 'a' | 'b') => scene.send(me, { url: `/${me}` })
  await outside.query(`INSERT INTO ${ledger} VALUES ('a'), ('b')`)
  const replies = { a: send('a'), b: send('b') }
  await Promise.all([entered.a.promise, entered.b.promise])
  return { ledger: scene.ledger, replies, send, leave }
}

test('a serialization failure that is found at the end is answered as an error of the handler, and the retry runs', async (t) => {
  const serializable = { options: '-c default_transaction_isolation=serializable' }
  const skew = "INSERT INTO LEDGER VALUES ('ME, having seen ' || (SELECT count(*) FROM LEDGER))"
  const { replies, send, leave, ledger } = await rivals(t, skew, 'SELECT', serializable)
  leave.a.open()
  t.same(told(await replies.a), [201, 'a', 'fresh'])
  leave.b.open()
  t.same([told(await replies.b), (await replies.b).headers.location], [[500, '40001', 'fresh'], undefined])
  t.same(await ledger(), ['a', 'a, having seen 2', 'b'])
  t.same(told(await send('b')), [201, 'b', 'fresh'])
  t.same(told(await send('a')), [201, 'a', 'replay'])
  t.same(await ledger(), ['a', 'a, having seen 2', 'b', 'b, having seen 3'])
})

test('of two handlers in a deadlock one fails with its error and is rolled back, and its retry runs', async (t) => {
  const mine = "UPDATE LEDGER SET note = note || ' by ME' WHERE note LIKE 'ME%'"
  const { replies, send, leave, ledger } = await rivals(t, mine, mine.replace("'ME%'", "'OTHER%'"))
  leave.a.open()
  leave.b.open()
  const [a, b] = [told(await replies.a), told(await replies.b)]
  const [winner, loser] = a[0] === 201 ? (['a', 'b'] as const) : (['b', 'a'] as const)
  t.same(winner === 'a' ? [a, b] : [b, a], [
    [201, winner, 'fresh'],
    [500, '40P01', 'fresh']
  ])
  t.same(await ledger(), [`a by ${winner}`, `b by ${winner}`])
  t.same(told(await send(loser)), [201, loser, 'fresh'])
  t.same(told(await send(winner)), [201, winner, 'replay'])
  t.same(await ledger(), [`a by ${winner} by ${loser}`, `b by ${winner} by ${loser}`])
})

/** A ledger that has each note once, which is checked at the commit only; the first run writes its note twice. */
async function once(t: Test, { first = created, ...settings }: Settings = {}) {
  const twice: Work = async (request, reply, run) => {
    await scene.write(request, `run ${run}`)
    return first(request, reply, run)
  }
  const scene = await open(t, { first: twice, ...settings })
  await outside.query(`ALTER TABLE ledger_${scene.id} ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED`)
  return scene
}

test('an error at the commit is answered as an error of the handler: 500, rolled back, and the key free', async (t) => {
  for (const [name, options] of Object.entries({
    'by default': {},
    'where all is final': { shouldStore: () => true }
  })) {
    const { send, ledger } = await once(t, { options })
    const reply = await send()
    t.same([told(reply), reply.headers.location], [[500, '23505', 'fresh'], undefined], name)
    t.same(await ledger(), [])
    t.same(told(await send()), RAN_2)
    t.same(told(await send()), [201, 2, 'replay'])
    t.same(await ledger(), ['run 2'])
  }
})

test("an error at the commit comes to the application's error handler, whose reply is sent, but not stored", async (t) => {
  const scene = await once(t)
  scene.app.setErrorHandler((error: FastifyError, _request, reply) =>
    reply.code(error.code === '23505' ? 409 : 500).send({ code: `seen ${error.code}` })
  )
  t.same(told(await scene.send()), [409, 'seen 23505', 'fresh'])
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
})

test('a handler that has thrown a refusal which cannot be committed is answered with a failure as well', async (t) => {
  const refuse = () => Promise.reject(Object.assign(new Error('sold out'), { statusCode: 409, code: 'SOLD_OUT' }))
  const cutAndRefuse: Work = async (request) => {
    await cut(request)
    return refuse()
  }
  for (const handled of ['by default', 'by an error handler']) {
    const broken = await open(t, { first: refuse })
    instead(broken, (_commit, _socket, query) => query('SELECT 1 / 0'))
    const lost = await open(t, { first: cutAndRefuse })
    for (const { scene, failure } of [
      { scene: broken, failure: [500, '22012', 'fresh'] },
      { scene: lost, failure: UNAVAILABLE }
    ]) {
      if (handled !== 'by default') {
        scene.app.setErrorHandler((error: FastifyError, _request, reply) =>
          reply.code(error.statusCode ?? 500).send({ code: error.code })
        )
      }
      t.same(told(await scene.send()), failure, handled)
      t.same(told(await scene.send()), RAN_2)
      t.same(await scene.ledger(), ['run 2'])
    }
  }
})

test('handlerTimeout that strikes during the commit makes no success of a failure, nor the other way round', async (t) => {
  for (const fails of [false, true]) {
    let struck = false
    const onError = async (_request: FastifyRequest, _reply: FastifyReply, { code }: FastifyError) => {
      struck ||= code === 'FST_ERR_HANDLER_TIMEOUT'
    }
    const route = { handlerTimeout: 200, onError }
    const scene = await open(t, { options: { storeTimeout: 60_000 }, route })
    const commit = await gate(scene)
    const reply = scene.send()
    const pid = await commit.reached()
    await until(() => struck, { message: 'the timeout' })
    if (fails) await terminate(pid)
    await commit.open()
    t.equal((await reply).statusCode, fails ? 503 : 201)
    t.same(told(await scene.send()), fails ? RAN_2 : REPLAYED_1)
    t.same(await scene.ledger(), [fails ? 'run 2' : 'run 1'])
  }
})

test('an error at the commit is known by its code, whatever language the server speaks', async (t) => {
  const scene = await once(t)
  instead(scene, (commit) => commit().catch((error) => Promise.reject(Object.assign(error, { severity: 'FEHLER' }))))
  t.same(told(await scene.send()), [500, '23505', 'fresh'])
  t.same(told(await scene.send()), RAN_2)
})

test('an error at the commit of a stream is the reply, as if the handler had met it, and the retry runs', async (t) => {
  const scene = await once(t, { first: (_request, reply) => reply.send(Readable.from([Buffer.from('one')])) })
  t.same(told(await scene.send()), [500, '23505', 'fresh'])
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
})

test('an error at the commit of a reply that comes after handlerTimeout frees the key', async (t) => {
  const { first, entered, leave } = held()
  const scene = await once(t, { first, route: { handlerTimeout: 200 } })
  const timedOut = scene.send()
  await entered
  t.equal((await timedOut).statusCode, 503)
  leave()
  await until(() => isFree(scene))
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_2)
})

/* Handlers that do not let their errors through */

const swallow = async (request: FastifyRequest, sql = 'SELECT 1 / 0') =>
  void (await transactionOf(request)
    .query(sql)
    .catch(() => {}))

test('a handler that refuses because a statement has failed: its reply is stored, and its writes are undone', async (t) => {
  const first = careless((_request, reply) => reply.code(409).header('location', '/2').send({ code: 'TAKEN' }))
  const { send, ledger, runs } = await open(t, { first })
  t.same(told(await send()), [409, 'TAKEN', 'fresh'])
  const retry = await send()
  t.same([told(retry), retry.headers.location], [[409, 'TAKEN', 'replay'], '/2'])
  t.same([await ledger(), runs()], [[], 1])
})

/** A handler that does not mind an error of its transaction. */
const careless =
  (ending: Work): Work =>
  async (request, reply, run) => {
    await swallow(request)
    return ending(request, reply, run)
  }

const pretending: Record<string, Work> = {
  'replies with a success': careless(created),
  'replies with a redirect': careless((_request, reply) => reply.redirect('/1', 303)),
  'replies with more than can be kept': careless((_request, reply) => reply.code(201).send('x'.repeat(100))),
  'replies with a stream': careless((_request, reply) => reply.code(201).send(Readable.from([Buffer.from('{}')]))),
  'replies with a stream that cannot be kept': careless((_request, reply) =>
    reply.code(201).send(Readable.from([Buffer.alloc(30), Buffer.alloc(30)]))
  ),
  'does not even wait for the failure': (request, reply, run) => {
    void swallow(request)
    return created(request, reply, run)
  }
}

for (const [name, first] of Object.entries(pretending)) {
  test(`a handler whose statement has failed, and that ${name}, is answered with an error, and all is undone`, async (t) => {
    const { send, ledger } = await open(t, { first, options: { maxReplySize: 50 } })
    const reply = await send()
    t.same([told(reply), reply.headers.location], [BROKEN, undefined])
    t.match(reply.json().message, /let the error through, or use SAVEPOINT|await every query/)
    t.same(await ledger(), [])
    t.same(told(await send()), RAN_2)
    t.same(await ledger(), ['run 2'])
  })
}

test('a handler that goes back to a savepoint of its own has lost nothing else', async (t) => {
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    await client.query('SAVEPOINT mine')
    await swallow(request)
    await client.query('ROLLBACK TO mine')
    await scene.write(request, 'more')
    return created(request, reply, run)
  }
  const scene = await open(t, { first })
  t.same(told(await scene.send()), RAN_1)
  t.same(told(await scene.send()), REPLAYED_1)
  t.same(await scene.ledger(), ['more', 'run 1'])
})

test('a handler may go to another schema, and the reply is stored all the same', async (t) => {
  const first: Work = async (request, reply, run) => {
    await transactionOf(request).query('SET LOCAL search_path TO pg_catalog')
    return created(request, reply, run)
  }
  const { send, ledger } = await open(t, { first })
  t.same(told(await send()), RAN_1)
  t.same(told(await send()), REPLAYED_1)
  t.same(await ledger(), ['run 1'])
})

test('a handler that keeps the reply from being stored is an error that says why, and all is undone', async (t) => {
  for (const sql of ['SET LOCAL ROLE pg_monitor', 'SET TRANSACTION READ ONLY']) {
    const first: Work = async (request, reply, run) => {
      await transactionOf(request).query(sql)
      return created(request, reply, run)
    }
    const { send, ledger } = await open(t, { first })
    const reply = await send()
    t.same([told(reply), reply.headers.location], [BROKEN, undefined], sql)
    t.match(reply.json().message, /permission denied|read-only/)
    t.same(await ledger(), [])
    t.same(told(await send()), RAN_2)
  }
})

const unawaited: Record<string, (write: (note: string) => Promise<unknown>, client: TransactionClient) => unknown> = {
  'one statement': (write) => void write('a'),
  'two statements': (write) => {
    void write('a')
    void write('b')
  },
  'one statement behind another': (write) => void write('a').then(() => write('b')),
  'many statements one behind the other': async (write) => {
    for (const note of 'abcdefgh') await write(note)
  },
  'one statement behind another, by callbacks': (write, client) => {
    client.query('SELECT 1', () => void write('b'))
  },
  'a statement that fails': (_write, client) => void client.query('SELECT nothing'),
  'a statement that ends the transaction, and another': (write, client) => {
    void client.query('COMMIT')
    void write('a')
  }
}

for (const [name, forget] of Object.entries(unawaited)) {
  test(`a reply whose handler has not waited for ${name} is refused, nothing is committed, and the process goes on`, async (t) => {
    const first: Work = (request, reply, run) => {
      forget((note) => scene.write(request, note), transactionOf(request))
      return created(request, reply, run)
    }
    const scene = await open(t, { first })
    const reply = await scene.send()
    t.same([told(reply), reply.headers.location], [BROKEN, undefined])
    t.match(reply.json().message, /await every query/)
    t.same(await scene.ledger(), [])
    t.same(told(await scene.send()), RAN_2)
    t.same(await scene.ledger(), ['run 2'])
  })

  test(`a failure whose handler has not waited for ${name} is one, and the process goes on`, async (t) => {
    const first: Work = (request) => {
      forget((note) => scene.write(request, note), transactionOf(request))
      throw new Error('failed')
    }
    const scene = await open(t, { first })
    t.equal((await scene.send()).statusCode, 500)
    t.same(await scene.ledger(), [])
  })
}

test('a failure stays one although not all that was asked for at once has ended by then', async (t) => {
  const first: Work = async (request, reply) => {
    const client = transactionOf(request)
    const all = [client.query('SELECT nothing'), client.query('SELECT pg_sleep(0.05)'), scene.write(request, 'b')]
    await Promise.all(all).catch(() => {})
    return reply.code(409).send({ failed: true })
  }
  const scene = await open(t, { first })
  t.equal((await scene.send()).statusCode, 409)
  t.same(await scene.ledger(), [])
})

test('a handler that waits for itself, because it asks its pool for what its transaction holds, is ended after a lease', async (t) => {
  const first: Work = async (request, reply, run) => {
    await transactionOf(request).query(`UPDATE ledger_${scene.id} SET note = 'mine'`)
    await scene.pool.query(`UPDATE ledger_${scene.id} SET note = 'not mine'`)
    return created(request, reply, run)
  }
  const scene = await open(t, { first, options: { lease: 300 } })
  await outside.query(`INSERT INTO ledger_${scene.id} VALUES ('old')`)
  const reply = await scene.send()
  t.same(told(reply), UNAVAILABLE)
  t.same(await scene.ledger(), ['not mine'], 'what it did by its transaction is undone, and no more')
  t.same(told(await scene.send()), RAN_2)
})

test('a handler that asks for what another connection holds for longer than a lease gets an error', async (t) => {
  const first: Work = async (request, reply, run) => {
    await transactionOf(request).query(`UPDATE ledger_${scene.id} SET note = 'mine'`)
    return created(request, reply, run)
  }
  const scene = await open(t, { first, options: { lease: 300 } })
  await outside.query(`INSERT INTO ledger_${scene.id} VALUES ('old')`)
  const holder = await outside.connect()
  await holder.query(`BEGIN; UPDATE ledger_${scene.id} SET note = 'held'`)
  const reply = await scene.send()
  t.equal(reply.statusCode, 500)
  t.match(reply.json().message, /lock timeout/)
  await holder.query('ROLLBACK')
  holder.release()
  t.same(await scene.ledger(), ['old'])
})

/* What a handler must not do with its client */

/** Each way of saying it is in test/unit/client-guard.test.ts. */
const forbidden: (string | { text: string })[] = [
  'BEGIN',
  'START TRANSACTION',
  ' \n\tCommit work;',
  'END',
  'ABORT',
  'ROLLBACK /* not */ -- to\n',
  "PREPARE TRANSACTION 'x'",
  'SELECT 1; COMMIT',
  "SELECT E'it\\'s'; COMMIT; SELECT E'over'",
  '/* now /* really */ at last */ COMMIT',
  { text: 'SELECT 1; rollback' }
]

test('a handler cannot begin or end its transaction, however it says so', async (t) => {
  const outcomes: unknown[] = []
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    const calledBack = (statement: string) =>
      new Promise((_, reject) => client.query(statement, (error: Error) => reject(error)))
    outcomes.push(await calledBack('COMMIT').catch((error) => error))
    for (const statement of forbidden) {
      // Like an async function or not: to whoever awaits it, it is the same.
      const attempt = async () => client.query(statement as string)
      outcomes.push(
        await attempt().then(
          () => 'done',
          (error) => error
        )
      )
    }
    await scene.write(request, 'more')
    return created(request, reply, run)
  }
  const scene = await open(t, { first })
  const reply = scene.send()
  const result = told(await reply)
  for (const [i, statement] of ['with a callback', ...forbidden].entries()) {
    const says = { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /ends with the reply[\s\S]*SAVEPOINT/ }
    t.match(outcomes[i], says, JSON.stringify(statement))
  }
  t.same(result, RAN_1)
  t.same(told(await scene.send()), REPLAYED_1)
  t.same(await scene.ledger(), ['more', 'run 1'])
})

const allowed: (string | { text: string; values?: unknown[] })[] = [
  'SAVEPOINT commit_it',
  'ROLLBACK /* back */ TO commit_it; SELECT 1',
  'rollback to savepoint commit_it',
  'RELEASE commit_it',
  "SELECT E'it\\'s; COMMIT'",
  'SELECT $end$; END; $$; COMMIT; $end$',
  'SELECT 1 /* now /* really */ ; COMMIT */',
  'SELECT CASE WHEN true THEN 1\nEND; SELECT 2',
  'SELECT 1 AS begin, 2 AS commit, 3 AS rollback',
  'DO $$ BEGIN PERFORM 1; END $$',
  'PREPARE prepared AS SELECT 1',
  'SET LOCAL statement_timeout = 60000',
  { text: "SELECT $1 || '; COMMIT'", values: ['ROLLBACK'] }
]

test('savepoints are for the handler, and words that end no transaction are no matter', async (t) => {
  const outcomes: unknown[] = []
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    for (const statement of allowed) {
      const attempt = async () => client.query(statement as string)
      outcomes.push(
        await attempt().then(
          () => 'done',
          (error) => error.message
        )
      )
    }
    return created(request, reply, run)
  }
  const { send, ledger } = await open(t, { first })
  const reply = await send()
  for (const [i, statement] of allowed.entries()) t.equal(outcomes[i], 'done', JSON.stringify(statement))
  t.same([told(reply), await ledger()], [RAN_1, ['run 1']])
})

test('a handler cannot give its client away, or end it', async (t) => {
  const outcomes: unknown[] = []
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    const tries = [() => client.release(), () => client.release(true), () => client.end(), () => client.connect()]
    for (const attempt of tries)
      outcomes.push(
        await (async () => attempt())().then(
          () => 'done',
          (error) => error
        )
      )
    return created(request, reply, run)
  }
  const { send, ledger } = await open(t, { first })
  t.same(told(await send()), RAN_1)
  t.same(outcomes.length, 4)
  const says = { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /goes back to its pool with the reply/ }
  for (const outcome of outcomes) t.match(outcome, says)
  t.same(await ledger(), ['run 1'])
})

test('the client is of no more use once the handler has replied, whatever has become of its transaction', async (t) => {
  const endings: Record<string, Work> = {
    committed: created,
    'rolled back': (_request, reply) => reply.code(503).send({}),
    lost: async (request, reply, run) => {
      await cut(request)
      return created(request, reply, run)
    }
  }
  for (const [name, ending] of Object.entries(endings)) {
    let client: PoolClient | undefined
    const inOnSend: unknown[] = []
    const attempt = async () => client?.query('SELECT 1')
    const scene = await open(t, {
      first: (request, reply, run) => {
        client = transactionOf(request)
        return ending(request, reply, run)
      },
      route: { onSend: async () => void inOnSend.push(await attempt().catch((error) => error.code)) }
    })
    await scene.send()
    t.same(inOnSend, ['FST_IDEMPOTENCY_TRANSACTION'], name)
    await t.rejects(
      attempt(),
      { code: 'FST_IDEMPOTENCY_TRANSACTION', message: /is over: its handler has replied/ },
      name
    )
    // Its connection has become somebody else's: they must not meet.
    await scene.pool.query('SELECT')
    await t.rejects(attempt(), { code: 'FST_IDEMPOTENCY_TRANSACTION' }, name)
  }
})

test("the client does all else that one of pg's does", async (t) => {
  const first: Work = async (request, reply, run) => {
    const client = transactionOf(request)
    const { rows } = await client.query('SELECT $1::int AS n', [7])
    const named = await client.query<[number]>({ name: 'seven', text: 'SELECT 7', rowMode: 'array' } as never)
    const called = await new Promise((resolve, reject) =>
      client.query('SELECT 8 AS n', (error: Error, result) => (error ? reject(error) : resolve(result.rows)))
    )
    const notices: unknown[] = []
    client.on('notice', ({ message }) => notices.push(message))
    await client.query("DO $$ BEGIN RAISE NOTICE 'hear, hear'; END $$")
    seen.push(rows, named.rows, called, notices, client.escapeLiteral("it's"))
    return created(request, reply, run)
  }
  const seen: unknown[] = []
  const { send } = await open(t, { first })
  t.same(told(await send()), RAN_1)
  t.same(seen, [[{ n: 7 }], [[7]], [{ n: 8 }], ['hear, hear'], "'it''s'"])
})

/* The pool */

test('whatever becomes of fifty requests, every client comes back, and only what is stored has effects', async (t) => {
  const scene = await open(t, { pool: { max: 5 } })
  const endings: Work[] = [
    created,
    (_request, reply) => reply.code(503).send({}),
    () => Promise.reject(new Error('oops')),
    (request) => {
      request.idempotency?.discard()
      return {}
    },
    (request) => transactionOf(request).query('SELECT 1 / 0'),
    (_request, reply) => reply.send(Readable.from([Buffer.from('{}')]))
  ]
  scene.app.post('/:n', { config: { idempotency: { transaction: true } } }, async (request, reply) => {
    const { n } = request.params as { n: string }
    await scene.write(request, n)
    return endings[Number(n) % endings.length]?.(request, reply, Number(n))
  })
  const send = (_: unknown, n: number) => scene.send(`${n >> 1}`, { url: `/${n >> 1}` })
  const statuses = (await Promise.all(Array.from({ length: 50 }, send))).map((reply) => reply.statusCode)
  t.ok(
    statuses.every((status) => [200, 201, 409, 500, 503].includes(status)),
    String(statuses)
  )
  const kept = Array.from({ length: 25 }, (_, n) => n).filter(
    (n) => n % endings.length === 0 || n % endings.length === 5
  )
  t.same(
    (await scene.ledger()).map(Number).sort((a, b) => a - b),
    kept
  )
})

test('a pool that has no client to give within storeTimeout is a 503, and a client that comes later goes back', async (t) => {
  const scene = await open(t, { options: { storeTimeout: 1_000 }, pool: { max: 1 } })
  const client = await scene.pool.connect()
  const refused = await scene.send()
  t.same([told(refused), scene.runs()], [UNAVAILABLE, 0])
  t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
  t.equal(scene.pool.waitingCount, 1)
  client.release()
  await until(() => scene.pool.waitingCount === 0 && scene.pool.idleCount === 1)
  t.same(await scene.ledger(), [])
  t.same(told(await scene.send()), RAN_1)
})

test('a database that cannot be reached is a 503, and nothing runs', async (t) => {
  const scene = await open(t)
  const store = new PostgresStore({ pool: server.pool({ host: '/nowhere' }), sweepInterval: null })
  const app = await build(t, { store, transaction: true })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ++runs)
  const refused = await inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' } })
  t.same([told(refused), runs], [UNAVAILABLE, 0])
  t.same(told(await scene.send()), RAN_1)
})
