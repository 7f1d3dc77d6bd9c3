import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { post } from '../support/app.js'
import { until } from '../support/latch.js'
import { launch, makeFolder, type ServerProcess } from '../support/process.js'
import { startRedis } from '../support/redis.js'
import { soon } from '../support/store-fixtures.js'
import type { Done, Job } from '../support/worker.js'

// Several server processes on one Redis, some of which are killed or paused.

const script = fileURLToPath(new URL('../support/worker.js', import.meta.url))
const folder = makeFolder('workers')

const server = await startRedis()
t.teardown(() => server.close())
const redis = await server.client()

interface Answer {
  status: number
  replayed: boolean
  retryAfter: string | null
  body: Done & { code?: string }
}

class Worker {
  constructor(
    readonly process: ServerProcess,
    readonly url: string
  ) {}

  async send(key: string, job: Job): Promise<Answer> {
    const { port } = new URL(this.url)
    const { status, headers, text } = await post(Number(port), { path: '/jobs', key, body: JSON.stringify(job) })
    return {
      status,
      replayed: headers['idempotent-replayed'] === 'true',
      retryAfter: headers['retry-after'] ?? null,
      body: JSON.parse(text) as Answer['body']
    }
  }
}

function workers(t: Test, count: number, options: IdempotencyOptions): Promise<Worker[]> {
  return Promise.all(
    Array.from({ length: count }, async () => {
      const process = await launch(globalThis.process.execPath, [script, JSON.stringify(options)], {
        env: { REDIS_PATH: server.path },
        log: join(folder, `${randomUUID()}.log`)
      })
      t.teardown(async () => {
        process.signal('SIGKILL')
        await process.exited
      })
      const url = await until(
        () => {
          if (!process.running) throw new Error(`The worker ended at its start:\n${process.output()}`)
          return /^http:\S+/m.exec(process.output())?.[0]
        },
        { message: 'a worker to listen' }
      )
      return new Worker(process, url as string)
    })
  )
}

/** The key and the job of a test. */
function work(job: Omit<Job, 'name'> = {}): [key: string, job: Job] {
  return [randomUUID(), { name: randomUUID(), ...job }]
}

const runs = async ({ name }: Job) => Number(await redis.get(`runs:${name}`))
const started = (job: Job, count = 1) =>
  until(async () => (await runs(job)) === count, { message: `run ${count} to start` })

t.test(
  "'reject': of 100 parallel duplicates at two processes one runs the handler, the others get 409 or its reply",
  async (t) => {
    const pair = await workers(t, 2, { lease: 5_000 })
    const [key, job] = work({ ms: 50 })
    const answers = await Promise.all(Array.from({ length: 100 }, (_, n) => (pair[n % 2] as Worker).send(key, job)))
    t.equal(await runs(job), 1)
    const [own, others] = [answers.filter(isOwn), answers.filter((answer) => !isOwn(answer))]
    t.equal(own.length, 1)
    for (const { status, replayed, retryAfter, body } of others) {
      if (replayed) {
        t.equal(status, 201)
        t.strictSame(body, own[0]?.body)
      } else {
        t.equal(status, 409)
        t.equal(body.code, 'FST_IDEMPOTENCY_IN_PROGRESS')
        t.equal(retryAfter, '1')
      }
    }
    for (const worker of pair) {
      const { status, replayed, body } = await worker.send(key, job)
      t.strictSame({ status, replayed, body }, { status: 201, replayed: true, body: own[0]?.body })
    }
  }
)

t.test("'wait': of 100 parallel duplicates at two processes one runs the handler, and all get its reply", async (t) => {
  const pair = await workers(t, 2, { lease: 5_000, onConflict: 'wait' })
  const [key, job] = work({ ms: 50 })
  const answers = await Promise.all(Array.from({ length: 100 }, (_, n) => (pair[n % 2] as Worker).send(key, job)))
  t.equal(await runs(job), 1)
  const own = answers.filter(isOwn)
  t.equal(own.length, 1)
  for (const { status, body } of answers) {
    t.equal(status, 201)
    t.strictSame(body, own[0]?.body)
  }
})

t.test('the key of a killed process is free after the lease, and the rerun sees attempt 2', async (t) => {
  // Long enough for the second worker to see it, however slow the machine is.
  const [first, second] = (await workers(t, 2, { lease: 5_000 })) as [Worker, Worker]
  const go = randomUUID()
  const [key, job] = work({ until: go })
  first.send(key, job).catch(() => 'broken off')
  await started(job)
  first.process.signal('SIGKILL')
  await first.process.exited
  const held = await second.send(key, job)
  t.strictSame([held.status, held.body.code], [409, 'FST_IDEMPOTENCY_IN_PROGRESS'])
  await redis.set(go, '1')
  const { body } = await accepted(second, key, job)
  t.strictSame(body, { run: 2, attempt: 2, pid: second.process.pid })
  const replay = await second.send(key, job)
  t.strictSame([replay.replayed, replay.body], [true, body])
})

t.test('a process that was killed again and again is counted in the attempts', async (t) => {
  const four = await workers(t, 4, { lease: 200 })
  const go = randomUUID()
  const [key, job] = work({ until: go })
  const last = four.pop() as Worker
  for (const [n, worker] of four.entries()) {
    const answer = accepted(worker, key, job).catch(() => {})
    await started(job, n + 1)
    worker.process.signal('SIGKILL')
    await worker.process.exited
    await answer
  }
  await redis.set(go, '1')
  t.match(await accepted(last, key, job), { body: { run: 4, attempt: 4 } })
})

t.test("onAbandoned 'reject': the key of a killed process gives 409, and the handler does not run again", async (t) => {
  const [first, second] = (await workers(t, 2, { lease: 300, onAbandoned: 'reject' })) as [Worker, Worker]
  const [key, job] = work({ until: randomUUID() })
  first.send(key, job).catch(() => 'broken off')
  await started(job)
  first.process.signal('SIGKILL')
  const refused = (await until(async () => {
    const answer = await second.send(key, job)
    t.equal(answer.status, 409)
    return answer.body.code !== 'FST_IDEMPOTENCY_IN_PROGRESS' && answer
  })) as Answer
  t.equal(refused.body.code, 'FST_IDEMPOTENCY_ABANDONED')
  t.equal((await second.send(key, job)).body.code, 'FST_IDEMPOTENCY_ABANDONED', 'and again')
  t.equal(await runs(job), 1)
})

t.test("'wait': those who wait for a killed process run the handler once more, and all get that reply", async (t) => {
  const [first, ...others] = (await workers(t, 3, { lease: 300, onConflict: 'wait' })) as [Worker, ...Worker[]]
  const go = randomUUID()
  const [key, job] = work({ until: go })
  first.send(key, job).catch(() => 'broken off')
  await started(job)
  const waiting = Array.from({ length: 20 }, (_, n) => (others[n % 2] as Worker).send(key, job))
  await sleep(50)
  first.process.signal('SIGKILL')
  await started(job, 2)
  await redis.set(go, '1')
  const answers = await Promise.all(waiting)
  t.equal(await runs(job), 2)
  t.equal(answers.filter(isOwn).length, 1)
  for (const { status, body } of answers) t.match({ status, body }, { status: 201, body: { run: 2, attempt: 2 } })
})

t.test('a handler that takes five times its lease runs once, whoever asks meanwhile', async (t) => {
  const lease = 600
  const pair = (await workers(t, 2, { lease })) as [Worker, Worker]
  const [key, job] = work({ ms: 5 * lease })
  let over = false
  const own = pair[0].send(key, job).finally(() => {
    over = true
  })
  await started(job)
  const meanwhile: Answer[] = []
  for (let n = 0; !over; n++) {
    meanwhile.push(await (pair[n % 2] as Worker).send(key, job))
    await sleep(10)
  }
  const { status, body } = await own
  t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1, pid: pair[0].process.pid } })
  t.equal(await runs(job), 1)
  const conflicts = meanwhile.filter(({ status }) => status === 409)
  t.ok(conflicts.length >= 5, `${conflicts.length} duplicates were refused`)
  for (const answer of meanwhile) t.ok(answer.replayed || answer.body.code === 'FST_IDEMPOTENCY_IN_PROGRESS')
})

for (const order of ['while its handler is at work', 'when its handler has its reply'] as const) {
  t.test(
    `a process that was paused for longer than its lease, ${order}, does not overwrite the reply of whoever took over`,
    async (t) => {
      const [paused, heir] = (await workers(t, 2, { lease: 300 })) as [Worker, Worker]
      const go = randomUUID()
      const [key, job] = work({ until: go })
      const late = paused.send(key, job)
      await started(job)
      await paused.process.pause()

      const taken = accepted(heir, key, job)
      await started(job, 2)
      t.strictSame(await redis.lrange(`aborted:${job.name}`, 0, -1), [])
      const aborted = () =>
        until(async () => (await redis.lrange(`aborted:${job.name}`, 0, -1))[0] === String(paused.process.pid), {
          message: 'the signal to abort'
        })
      if (order === 'while its handler is at work') {
        paused.process.resume()
        await aborted()
      }
      await redis.set(go, '1')
      const { body } = await taken
      t.strictSame(body, { run: 2, attempt: 2, pid: heir.process.pid })
      paused.process.resume()

      const own = await soon(late, 'the late reply to its own client')
      t.equal(own.status, 201)
      t.strictSame(own.body, { run: 1, attempt: 1, pid: paused.process.pid })
      t.equal(own.replayed, false)
      await aborted()
      for (const worker of [paused, heir]) {
        const replay = await worker.send(key, job)
        t.strictSame([replay.replayed, replay.body], [true, body], 'the reply of whoever took over stands')
      }
      t.strictSame(
        await redis.lrange(`aborted:${job.name}`, 0, -1),
        [String(paused.process.pid)],
        'and nobody else lost'
      )
      t.equal(await runs(job), 2)
    }
  )
}

t.test('a process that was paused for longer than its lease, and that nobody replaced, keeps its claim', async (t) => {
  const [paused, other] = (await workers(t, 2, { lease: 200 })) as [Worker, Worker]
  const go = randomUUID()
  const [key, job] = work({ until: go })
  const late = paused.send(key, job)
  await started(job)
  await paused.process.pause()
  await sleep(300)
  paused.process.resume()
  await redis.set(go, '1')
  const { status, body } = await late
  t.strictSame({ status, body }, { status: 201, body: { run: 1, attempt: 1, pid: paused.process.pid } })
  const replay = await other.send(key, job)
  t.strictSame([replay.replayed, replay.body], [true, body])
  t.strictSame(await redis.lrange(`aborted:${job.name}`, 0, -1), [])
  t.equal(await runs(job), 1)
})

/** The reply of the handler's own run. */
function isOwn({ status, replayed }: Answer): boolean {
  return status === 201 && !replayed
}

/** Sends until the key is free. */
function accepted(worker: Worker, key: string, job: Job): Promise<Answer> {
  return until(async () => {
    const answer = await worker.send(key, job)
    if (answer.status === 201) return answer
    if (answer.body.code !== 'FST_IDEMPOTENCY_IN_PROGRESS') throw new Error(`Refused: ${JSON.stringify(answer)}`)
    await sleep(20)
    return false
  }) as Promise<Answer>
}
