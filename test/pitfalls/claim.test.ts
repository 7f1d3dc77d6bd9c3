/*
 * The claim: what goes wrong when several requests with one key meet.
 *
 * guard                                            test
 * look-up and claim are two steps                  a duplicate that arrives between look-up and claim never runs the handler
 *                                                  a duplicate that arrives before the first one's end and is looked up after it gets the reply, not a 409
 *                                                  the look-up and the claim are one command to Redis
 * key gone between failed claim and look-up        a key that vanishes during the claim is claimed anew, never run unprotected
 * claim lives as long as the reply                 a process that dies blocks its keys for its lease, not for the ttl
 * claim without an expiry                          nothing that is put in Redis stays for ever
 *                                                  a key is free again when its reply has expired
 * lease without renewal                            a handler that runs for many leases runs once
 *                                                  a handler that has lost its claim is told
 * takeover without an owner                        a late owner neither overwrites nor deletes what the new owner did
 * token made by the store                          a claim whose acknowledgement was lost is not in conflict with itself
 * deadlines by the wall clock, 0 for none          leases and replies expire, wherever the wall clock stands
 * expiry checked in reads only                     an expired reply (or claim) can be claimed again, by exactly one of those who ask at once
 * mutex of one process, without a limit            duplicates that wait on several servers never run at the same time
 *                                                  duplicates that wait give up in time when one run after the other fails
 * claim held during the look-up only               the key is held until the reply is stored
 * one timer per key, no eviction                   a ttl of months is as good as any other
 *                                                  keys in memory do not have a timer each
 *                                                  the memory that replies take is bounded, and running claims are never evicted
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { type Acquisition, type Claim, MemoryStore } from '../../index.js'
import { isReplay, post } from '../interop/kit.js'
import { latch, until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { CutOff, Delegate, kinds, postUntil, redisStore, serve, tally, times } from './kit.js'

const redis = await startRedis()
t.teardown(() => redis.close())

for (const { name, fresh } of kinds(redis)) {
  t.test(name, async (t) => {
    t.test('a duplicate that arrives between look-up and claim never runs the handler', async (t) => {
      const open = fresh()
      const allAsked = latch()
      const firstEnds = latch()
      let asked = 0
      let runs = 0
      class Barrier extends Delegate {
        override async acquire(key: string, claim: Claim) {
          const found = await super.acquire(key, claim)
          if (++asked === 30) allAsked.open()
          await allAsked.promise
          return found
        }
      }
      const apps: FastifyInstance[] = []
      for (let i = 0; i < 3; i++) {
        apps.push(
          await serve(t, { store: new Barrier(await open()) }, async () => {
            runs++
            await firstEnds.promise
            return { run: runs }
          })
        )
      }
      const replies = times(30, (i) => post(apps[i % 3] as FastifyInstance, { key: 'key' }).then((reply) => reply))
      const conflicts = Promise.all(replies.map(async (reply) => (await reply).statusCode === 409))
      await until(() => runs > 0)
      firstEnds.open()
      t.equal((await conflicts).filter(Boolean).length, 29)
      t.same(tally(await Promise.all(replies)), { 200: 1, 409: 29 })
      t.equal(runs, 1)
    })

    t.test(
      "a duplicate that arrives before the first one's end and is looked up after it gets the reply, not a 409",
      async (t) => {
        const open = fresh()
        const goOn = latch()
        const firstEnded = latch()
        const arrived = latch()
        class Late extends Delegate {
          override async acquire(key: string, claim: Claim) {
            arrived.open()
            await firstEnded.promise
            return super.acquire(key, claim)
          }
        }
        let runs = 0
        const handler = async () => {
          runs++
          await goOn.promise
          return { run: runs }
        }
        const first = post(await serve(t, { store: await open() }, handler), { key: 'key' }).then((reply) => reply)
        await until(() => runs === 1)
        const duplicate = post(await serve(t, { store: new Late(await open()) }, handler), { key: 'key' }).then(
          (reply) => reply
        )
        await arrived.promise
        goOn.open()
        t.equal((await first).statusCode, 200)
        firstEnded.open()
        t.ok(isReplay(await duplicate))
        t.same((await duplicate).json(), { run: 1 })
        t.equal(runs, 1)
      }
    )

    t.test('a process that dies blocks its keys for its lease, not for the ttl', async (t) => {
      const open = fresh()
      const goOn = latch()
      const attempts: unknown[] = []
      const dying = new CutOff(await open())
      const dead = await serve(t, { store: dying, lease: 150 }, async (request) => {
        attempts.push(request.idempotency?.attempt)
        await goOn.promise
        return {}
      })
      void post(dead, { key: 'key' }).then(() => {})
      await until(() => attempts.length === 1)
      dying.cut = true
      const survivor = await serve(t, { store: await open(), lease: 150 }, async (request) => {
        attempts.push(request.idempotency?.attempt)
        return { by: 'survivor' }
      })
      t.equal((await post(survivor, { key: 'key' })).statusCode, 409, 'as long as the lease')
      const reply = await postUntil(survivor, ({ statusCode }) => statusCode !== 409)
      t.same(reply.json(), { by: 'survivor' })
      t.same(attempts, [1, 2])
      goOn.open()
    })

    t.test('a key is free again when its reply has expired', async (t) => {
      const open = fresh()
      let runs = 0
      const app = await serve(t, { store: await open(), ttl: 400 }, async () => ({ run: ++runs }))
      t.same((await post(app, { key: 'key' })).json(), { run: 1 })
      for (const run of [1, 2]) {
        const retry = await post(app, { key: 'key' })
        t.ok(isReplay(retry))
        t.same(retry.json(), { run })
        // Nothing but requests ask the store: it has to see by itself that the reply has expired.
        const next = await postUntil(app, (reply) => !isReplay(reply))
        t.same(next.json(), { run: run + 1 })
      }
    })

    t.test('a handler that runs for many leases runs once', async (t) => {
      const open = fresh()
      let renewals = 0
      class Counting extends Delegate {
        override async renew(...args: Parameters<Delegate['renew']>) {
          const renewed = await super.renew(...args)
          if (renewed) renewals++
          return renewed
        }
      }
      const goOn = latch()
      let runs = 0
      const handler = async () => {
        runs++
        await goOn.promise
        return { run: runs }
      }
      const app = await serve(t, { store: new Counting(await open()), lease: 300 }, handler)
      const other = await serve(t, { store: await open(), lease: 300 }, handler)
      const first = post(app, { key: 'key' }).then((reply) => reply)
      await until(() => runs === 1)
      const start = performance.now()
      while (performance.now() - start < 700 || renewals < 4) {
        t.equal((await post(other, { key: 'key' })).statusCode, 409)
        await sleep(50)
      }
      goOn.open()
      t.equal((await first).statusCode, 200)
      t.ok(isReplay(await post(other, { key: 'key' })))
      t.equal(runs, 1)
    })

    t.test('a handler that has lost its claim is told', async (t) => {
      const open = fresh()
      const cutOff = new CutOff(await open())
      let signal: AbortSignal | undefined
      const goOn = latch()
      const app = await serve(t, { store: cutOff, lease: 60 }, async (request) => {
        signal = request.idempotency?.signal
        await goOn.promise
        return { by: 'first' }
      })
      const first = post(app, { key: 'key' }).then((reply) => reply)
      await until(() => signal)
      cutOff.cut = true
      const other = await serve(t, { store: await open(), lease: 10_000 }, async () => ({ by: 'other' }))
      await postUntil(other, ({ statusCode }) => statusCode === 200)
      t.notOk(signal?.aborted)
      cutOff.cut = false
      await until(() => signal?.aborted, { message: 'the signal to abort' })
      goOn.open()
      t.same((await first).json(), { by: 'first' }, 'its own client gets its reply all the same')
      t.same((await post(other, { key: 'key' })).json(), { by: 'other' })
    })

    for (const ending of ['reply', 'failure'] as const) {
      for (const newOwner of ['has finished', 'is still running'] as const) {
        t.test(
          `a late owner neither overwrites nor deletes what the new owner did (a ${ending}, while the new owner ${newOwner})`,
          async (t) => {
            const open = fresh()
            const cutOff = new CutOff(await open())
            const started = [latch(), latch()] as const
            const goOn = [latch(), latch()] as const
            const late = await serve(t, { store: cutOff, lease: 60 }, async () => {
              started[0].open()
              await goOn[0].promise
              if (ending === 'failure') throw new Error('failed late')
              return { by: 'late' }
            })
            const current = await serve(t, { store: await open(), lease: 10_000 }, async () => {
              started[1].open()
              await goOn[1].promise
              return { by: 'current' }
            })
            const lateReply = post(late, { key: 'key' }).then((reply) => reply)
            await started[0].promise
            cutOff.cut = true
            // Past its lease, in one way or the other.
            await until(async () => {
              const found = await late.idempotency.get('key')
              return found?.state === 'abandoned'
            })
            const currentReply = post(current, { key: 'key' }).then((reply) => reply)
            await started[1].promise
            if (newOwner === 'has finished') {
              goOn[1].open()
              await currentReply
            }
            cutOff.cut = false
            goOn[0].open()
            t.equal((await lateReply).statusCode, ending === 'failure' ? 500 : 200)
            if (newOwner === 'is still running') {
              t.match(await current.idempotency.get('key'), { state: 'running' })
              goOn[1].open()
            }
            t.same((await currentReply).json(), { by: 'current' })
            for (const app of [late, current]) {
              const retry = await post(app, { key: 'key' })
              t.ok(isReplay(retry))
              t.same(retry.json(), { by: 'current' })
            }
          }
        )
      }
    }

    t.test('a claim whose acknowledgement was lost is not in conflict with itself', async (t) => {
      const open = fresh()
      const answers: Acquisition[] = []
      class Resending extends Delegate {
        override async acquire(key: string, claim: Claim) {
          await super.acquire(key, claim)
          const answer = await super.acquire(key, claim)
          answers.push(answer)
          return answer
        }
      }
      let runs = 0
      const app = await serve(t, { store: new Resending(await open()) }, async () => ({ run: ++runs }))
      const first = await post(app, { key: 'key' })
      t.equal(first.statusCode, 200)
      t.same(answers, [{ state: 'acquired', attempt: 1 }])
      t.ok(isReplay(await post(app, { key: 'key' })))
      t.equal(runs, 1)
    })

    t.test('leases and replies expire, wherever the wall clock stands', async (t) => {
      const now = Date.now
      t.teardown(() => {
        Date.now = now
      })
      for (const clock of [0, 999, now() + 1e12]) {
        Date.now = () => clock
        const open = fresh()
        const goOn = latch()
        let runs = 0
        const store = new CutOff(await open())
        const dead = await serve(t, { store, lease: 1, ttl: 60_000 }, async () => {
          runs++
          store.cut = true
          await goOn.promise
        })
        void post(dead, { key: 'key' }).then(() => {})
        await until(() => runs === 1)
        // The shortest lease and the shortest ttl that there are.
        const app = await serve(t, { store: await open(), ttl: 1 }, async () => ({ run: ++runs }))
        const second = await postUntil(app, ({ statusCode }) => statusCode === 200)
        t.same(second.json(), { run: 2 })
        await sleep(10)
        t.same((await post(app, { key: 'key' })).json(), { run: 3 })
        goOn.open()
        await dead.close()
        Date.now = now
      }
    })

    for (const expired of ['reply', 'claim'] as const) {
      t.test(`an expired ${expired} can be claimed again, by exactly one of those who ask at once`, async (t) => {
        const open = fresh()
        const store = new CutOff(await open())
        const forgotten = latch()
        let runs = 0
        const before = await serve(t, { store, ttl: expired === 'reply' ? 1 : 60_000, lease: 1 }, async () => {
          runs++
          if (expired === 'claim') {
            store.cut = true
            await forgotten.promise
          }
          return {}
        })
        const first = post(before, { key: 'key' }).then((reply) => reply)
        await until(() => runs === 1)
        if (expired === 'reply') await first
        // Nobody asks the store meanwhile: those who come have to see by themselves that it has expired.
        await sleep(20)
        const goOn = latch()
        const apps: FastifyInstance[] = []
        for (let i = 0; i < 3; i++) {
          apps.push(
            await serve(t, { store: await open() }, async () => {
              runs++
              await goOn.promise
              return {}
            })
          )
        }
        const replies = times(30, (i) => post(apps[i % 3] as FastifyInstance, { key: 'key' }).then((reply) => reply))
        let answered = 0
        for (const reply of replies) void reply.then(() => answered++)
        await until(() => answered === 29)
        goOn.open()
        t.same(tally(await Promise.all(replies)), { 200: 1, 409: 29 })
        t.equal(runs, 2)
        forgotten.open()
      })
    }

    t.test('duplicates that wait on several servers never run at the same time', async (t) => {
      const open = fresh()
      let runs = 0
      let running = 0
      let most = 0
      const arrived = latch()
      const handler = async () => {
        const run = ++runs
        most = Math.max(most, ++running)
        if (run === 1) await arrived.promise
        await sleep(20)
        running--
        if (run === 1) throw new Error('the first run fails')
        return { run }
      }
      let asked = 0
      class Counting extends Delegate {
        override acquire(key: string, claim: Claim) {
          if (++asked === 40) arrived.open()
          return super.acquire(key, claim)
        }
      }
      const apps: FastifyInstance[] = []
      for (let i = 0; i < 2; i++) {
        apps.push(await serve(t, { store: new Counting(await open()), onConflict: 'wait' }, handler))
      }
      const replies = await Promise.all(times(40, (i) => post(apps[i % 2] as FastifyInstance, { key: 'key' })))
      t.same(tally(replies), { 200: 39, 500: 1 })
      t.equal(replies.filter(isReplay).length, 38)
      t.equal(runs, 2, 'after a failure exactly one runs next, and all others get its reply')
      t.equal(most, 1)
    })

    t.test('duplicates that wait give up in time when one run after the other fails', async (t) => {
      const open = fresh()
      let runs = 0
      const handler = async () => {
        runs++
        await sleep(60)
        throw new Error('no luck')
      }
      const app = await serve(t, { store: await open(), onConflict: 'wait', waitTimeout: 200 }, handler)
      const start = performance.now()
      const replies = await Promise.all(times(60, () => post(app, { key: 'key' })))
      t.ok(performance.now() - start < 3_000, 'sixty runs of 60 ms would have taken longer')
      const counts = tally(replies)
      t.equal(counts[500], runs)
      t.equal((counts[409] ?? 0) + runs, 60)
      t.ok(runs < 30, `${runs} runs`)
    })

    t.test('the key is held until the reply is stored', async (t) => {
      const open = fresh()
      const stages = { running: latch(), storing: latch() }
      const goOn = { running: latch(), storing: latch() }
      class Slow extends Delegate {
        override async complete(...args: Parameters<Delegate['complete']>) {
          stages.storing.open()
          await goOn.storing.promise
          return super.complete(...args)
        }
      }
      let runs = 0
      const app = await serve(t, { store: new Slow(await open()) }, async () => {
        runs++
        stages.running.open()
        await goOn.running.promise
        return { run: runs }
      })
      const other = await serve(t, { store: await open() }, async () => ({ run: ++runs }))
      const first = post(app, { key: 'key' }).then((reply) => reply)
      for (const stage of ['running', 'storing'] as const) {
        await stages[stage].promise
        for (const server of [app, other]) t.equal((await post(server, { key: 'key' })).statusCode, 409, stage)
        goOn[stage].open()
      }
      await first
      for (const server of [app, other]) t.ok(isReplay(await post(server, { key: 'key' })))
      t.equal(runs, 1)
    })

    t.test('a ttl of months is as good as any other', async (t) => {
      const warnings: string[] = []
      const listener = ({ name }: Error) => name === 'TimeoutOverflowWarning' && warnings.push(name)
      process.on('warning', listener)
      t.teardown(() => process.off('warning', listener))
      const open = fresh()
      const months = 2 ** 31 + 1
      let runs = 0
      const limits = { ttl: months, lease: months, waitTimeout: months, storeTimeout: months }
      const app = await serve(t, { store: await open(), ...limits, onConflict: 'wait' }, async () => {
        runs++
        await sleep(20)
        return { run: runs }
      })
      const replies = await Promise.all(times(2, () => post(app, { key: 'key' })))
      t.same(
        replies.map((reply) => reply.json()),
        [{ run: 1 }, { run: 1 }]
      )
      await sleep(20)
      t.ok(isReplay(await post(app, { key: 'key' })))
      const found = (await app.idempotency.get('key')) as { ttlMs: number }
      t.ok(found.ttlMs > months - 60_000)
      t.equal(runs, 1)
      t.same(warnings, [], 'no timer was set to more than it can take')
    })
  })
}

t.test('the look-up and the claim are one command to Redis', async (t) => {
  const app = await serve(t, { store: redisStore(await redis.client()) }, async () => 'done')
  for (const replayed of [false, true]) {
    const { result, sent } = await redis.commands(() => post(app, { key: 'key' }))
    t.equal(isReplay(result), replayed)
    const commands = sent.map(([command = '']) => command.toUpperCase())
    t.equal(commands.filter((command) => command !== 'PTTL')[0], 'SET', 'nothing is read before')
    t.ok(['NX', 'GET'].every((word) => sent.find(([command]) => /^set$/i.test(command ?? ''))?.includes(word)))
    t.notOk(commands.includes('GET'))
  }
})

t.test('a key that vanishes during the claim is claimed anew, never run unprotected', async (t) => {
  const client = await redis.client()
  const meddler = await redis.client()
  const store = redisStore(client, 'vanishing:')
  let vanish = false
  // Between the two commands of the claim the key goes away, as when its owner releases it or its record expires.
  const pipeline = client.pipeline.bind(client)
  client.pipeline = ((...args: []) => {
    const commands = pipeline(...args)
    if (!vanish) return commands
    const pttl = commands.pttl.bind(commands)
    const exec = commands.exec.bind(commands)
    commands.pttl = ((key: string) => {
      commands.unlink(key)
      return pttl(key)
    }) as typeof commands.pttl
    commands.exec = (async () => {
      const results = await exec()
      results?.splice(1, 1)
      return results
    }) as typeof commands.exec
    return commands
  }) as typeof client.pipeline

  const other = redisStore(meddler, 'vanishing:')
  const goOn = latch()
  let runs = 0
  const app = await serve(t, { store }, async (request) => {
    runs++
    await goOn.promise
    return { attempt: request.idempotency?.attempt }
  })
  let storageKey = ''
  class Spy extends Delegate {
    override acquire(key: string, claim: Claim) {
      storageKey = key
      return super.acquire(key, claim)
    }
  }
  const holder = await serve(t, { store: new Spy(other) }, async () => {
    await goOn.promise
  })
  void post(holder, { key: 'key' }).then(() => {})
  await until(() => storageKey)
  await until(async () => (await other.get(storageKey))?.state === 'running')
  vanish = true
  const reply = post(app, { key: 'key' }).then((reply) => reply)
  await until(() => runs === 1)
  vanish = false
  t.match(await other.get(storageKey), { state: 'running' }, 'the handler runs under a claim')
  t.equal((await post(app, { key: 'key' })).statusCode, 409)
  goOn.open()
  t.same((await reply).json(), { attempt: 1 })
  t.ok(isReplay(await post(app, { key: 'key' })))
  t.equal(runs, 1)
})

t.test('nothing that is put in Redis stays for ever', async (t) => {
  const client = await redis.client()
  const keyPrefix = 'expiring:'
  const goOn = latch()
  let running = false
  const app = await serve(t, { store: redisStore(client, keyPrefix), ttl: 5_000, lease: 5_000 }, async (request) => {
    const { how } = request.body as { how: string }
    if (how === 'fails') throw new Error('failed')
    if (how === 'is discarded') request.idempotency?.discard()
    if (how === 'runs') {
      running = true
      await goOn.promise
    }
    return {}
  })
  const still = post(app, { key: 'runs', payload: { how: 'runs' } }).then((reply) => reply)
  await until(() => running)
  for (const how of ['succeeds', 'fails', 'is discarded']) await post(app, { key: how, payload: { how } })
  const keys = await client.keys(`${keyPrefix}*`)
  t.equal(keys.length, 4, 'one for each operation')
  for (const key of keys) {
    const pttl = await client.pttl(key)
    t.ok(pttl > 0 && pttl <= 60_000, `expires in ${pttl} ms`)
  }
  goOn.open()
  await still
})

t.test('keys in memory do not have a timer each', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((type) => type === 'Timeout').length
  const app = await serve(t, { store: new MemoryStore(), lease: 12_345 }, async () => 'done')
  await post(app)
  const before = timers()
  for (let i = 0; i < 200; i++) await post(app)
  t.ok(timers() <= before + 1, `${before} timers before, ${timers()} after`)
})

t.test('the memory that replies take is bounded, and running claims are never evicted', async (t) => {
  const goOn = latch()
  let runs = 0
  const app = await serve(t, { store: new MemoryStore({ maxEntries: 10 }) }, async (request) => {
    runs++
    if ((request.body as { wait?: true }).wait) await goOn.promise
    return { run: runs }
  })
  const first = post(app, { key: 'running', payload: { wait: true } }).then((reply) => reply)
  await until(() => runs === 1)
  for (let i = 0; i < 50; i++) t.equal((await post(app, { key: `key ${i}` })).statusCode, 200)
  t.equal((await post(app, { key: 'running', payload: { wait: true } })).statusCode, 409)
  const known = await Promise.all(times(50, (i) => app.idempotency.get(`key ${i}`)))
  t.ok(known.filter(Boolean).length <= 10)
  t.ok(known.at(-1), 'the youngest are still known')
  goOn.open()
  t.equal((await first).statusCode, 200)
  t.ok(isReplay(await post(app, { key: 'running', payload: { wait: true } })))
})
