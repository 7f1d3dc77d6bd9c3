import { randomUUID } from 'node:crypto'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import Libsql from 'libsql'
import type { RowDataPacket } from 'mysql2/promise'
import type { Test } from 'tap'
import { type IdempotencyOptions, PostgresStore } from '../../index.js'
import { mysqlTransactions, pgTransactions, type SqliteDatabase, sqliteTransactions } from '../../lib/transactions.js'
import { read, start } from './app.js'
import { Fleet, type Worker } from './kill-fleet.js'
import { Books } from './kill-steps-books.js'
import { type Effects, judgeEffects, judgeRuns, type Violation } from './kill-steps-judge.js'
import {
  BLOCKING,
  CLAIMS,
  EPOCH,
  HOLD,
  type Place,
  type Point,
  RUN,
  SABOTAGE,
  type Sabotage,
  SILENT,
  type StepName,
  TABLES
} from './kill-steps-plan.js'
import { until } from './latch.js'
import { some } from './lists.js'
import { startMariadb } from './mariadb.js'
import { startPostgres } from './postgres.js'
import { makeFolder } from './process.js'
import type { Random } from './random.js'
import { startRedis } from './redis.js'

const script = fileURLToPath(new URL('./kill-steps-worker.js', import.meta.url))

/** How long a client asks. */
const LIMIT_MS = 240_000
/** Handlers take far less, and the leases of the dead are waited for. */
export const LEASE_MS = 1_000
const options: IdempotencyOptions = { lease: LEASE_MS, storeTimeout: LIMIT_MS }

/** A key, and what becomes of those who work on it. */
export interface Plan {
  key: string
  place: Place
  /** The points at which its workers are killed, one after the other. */
  kills?: Point[]
  /** After which steps the handler fails, once each. */
  fails?: StepName[]
  /** The safeguard that is missing. */
  sabotage?: Sabotage
}

export interface Answer {
  status: number
  code: string | undefined
  replayed: boolean
  ids: Record<StepName, number>
  /** The run of the handler that has made it. */
  run: string
  /** The status, the headers and the body, byte for byte, without what names the run. */
  bytes: string
  /** How long it took, of the worker's time as well. */
  tookMs: number
}

export type KeyViolation = Violation & { key: string }

interface Sending {
  hold?: Point
  /** Its renewals get lost. */
  silent?: boolean
}

/** What each reply has of its own, be it a replay or not. */
const OWN_HEADERS = new Set(['date', 'connection', 'keep-alive', 'idempotent-replayed', RUN])

const isNotYet = ({ status, code }: Answer) =>
  status === 503 ||
  code === 'FST_IDEMPOTENCY_IN_PROGRESS' ||
  code === 'FST_IDEMPOTENCY_CLAIM_LOST' ||
  code === 'PLANNED'

/** The servers of a test, its service, and its clients. */
export async function openScene(t: Test, random: Random) {
  const folder = makeFolder('kill-steps')
  const [postgres, mariadb, redis, forgetful] = await Promise.all([
    startPostgres(),
    startMariadb(),
    startRedis(),
    startRedis()
  ])
  t.teardown(() => Promise.all([postgres, mariadb, redis, forgetful].map((server) => server.close())))
  const books = new Books(folder)
  await books.open()
  t.teardown(() => books.close())

  /* Other connections than those of the workers. */
  const pool = postgres.pool()
  const maria = mariadb.pool()
  const path = join(folder, 'sqlite')
  const file = new Libsql(path) as unknown as SqliteDatabase & { close(): void }
  t.teardown(() => file.close())
  file.exec('PRAGMA busy_timeout = 30000')
  file.prepare('PRAGMA journal_mode = WAL').all()
  await pool.query(TABLES.postgres)
  await maria.query(TABLES.mariadb)
  file.exec(TABLES.sqlite)
  for (const steps of [pgTransactions(pool), mysqlTransactions(maria), sqliteTransactions(file)]) {
    await steps.createTable()
  }
  await new PostgresStore({ pool, table: CLAIMS, sweepInterval: null }).createTable()
  const forgetfulClient = await forgetful.client()

  let requests = 0
  /** How many requests were held where. */
  const struck = new Map<Point, number>()
  /** The workers that are to be killed. */
  const targets = new Set<Worker>()

  async function forget(): Promise<void> {
    books.epoch++
    await forgetfulClient.flushall()
  }

  const workers = await Fleet.start(t, 3, {
    args: [script, JSON.stringify(options)],
    env: {
      POSTGRES: postgres.host,
      MARIADB: mariadb.url,
      SQLITE: path,
      REDIS: redis.path,
      FORGETFUL: forgetful.path,
      BOOKS: books.path,
      HELD: folder
    },
    folder,
    random,
    killed: forget
  })

  /** One request. Rejects when the connection fails. */
  async function send(worker: Worker, { key, place, sabotage }: Plan, { hold, silent }: Sending = {}): Promise<Answer> {
    requests++
    const before = performance.now()
    const sent = start(Number(new URL(worker.url).port), {
      path: `/${place}`,
      key,
      headers: {
        [EPOCH]: String(books.epoch),
        ...(hold && { [HOLD]: hold }),
        ...(silent && { [SILENT]: 'yes' }),
        ...(sabotage && { [SABOTAGE]: sabotage })
      },
      body: '{"amount":100}'
    })
    const limit = setTimeout(sent.hangUp, LIMIT_MS)
    const response = await sent.response.then(read).finally(() => clearTimeout(limit))
    const headers = Object.entries(response.headers).filter(([name]) => !OWN_HEADERS.has(name))
    const { code, ...ids } = JSON.parse(response.text)
    return {
      status: response.status,
      code,
      replayed: response.headers['idempotent-replayed'] === 'true',
      ids,
      run: String(response.headers[RUN]),
      bytes: JSON.stringify([response.status, headers, response.text]),
      tookMs: performance.now() - before
    }
  }

  /** Asks one worker or another until there is an answer; or says what was the last thing that it heard. */
  async function ask(plan: Plan): Promise<Answer | string> {
    const end = performance.now() + LIMIT_MS
    let heard = 'nothing'
    while (performance.now() < end) {
      const worker = workers.any()
      if (worker !== undefined) {
        const answer = await send(worker, plan).catch((error: Error) => String(error.cause ?? error))
        if (typeof answer !== 'string' && !isNotYet(answer)) return answer
        heard = typeof answer === 'string' ? answer : `${answer.status} ${answer.code}`
      }
      await sleep(random.between(10, 40))
    }
    return heard
  }

  async function effectsOf(key: string): Promise<Effects> {
    const { rows: order } = await pool.query('SELECT id FROM effects WHERE key = $1', [key])
    const [invoice] = await maria.query<(RowDataPacket & { id: number })[]>('SELECT id FROM effects WHERE `key` = ?', [
      key
    ])
    const audit = file.prepare('SELECT id FROM effects WHERE key = ?').all(...([key] as never[]))
    return {
      charge: books.effects(key, 'charge'),
      order,
      mail: books.effects(key, 'mail'),
      invoice,
      audit: audit as { id: number }[]
    }
  }

  /** Has some clients ask for a key until each has an answer, then one more; and says what is wrong. */
  async function follow(plan: Plan, clients: number, earlier: Promise<Answer>[] = []) {
    const { key, place } = plan
    const violations: Violation[] = []
    const violated = (kind: Violation['kind'], what: string) => void violations.push({ kind, what })
    const answers: Answer[] = []
    const heard = async (answer: Answer | string): Promise<void> => {
      if (typeof answer === 'string') return violated('late', answer)
      if (answer.status !== 201) return violated('refused', answer.bytes)
      answers.push(answer)
      violations.push(...judgeEffects(await effectsOf(key), answer.ids))
    }
    await Promise.all([
      ...Array.from({ length: clients }, async () => heard(await ask(plan))),
      ...earlier.map(async (own) => {
        const answer = await own.catch(() => null)
        await heard(answer === null || isNotYet(answer) ? await ask(plan) : answer)
      })
    ])
    await heard(await ask(plan))
    const remembers = place !== 'forgetful'
    const last = answers.at(-1)
    if (remembers && last?.replayed === false) violated('reply', `The last retry was no replay: ${last.bytes}`)
    const replies = new Set(answers.map(({ bytes }) => bytes))
    if (replies.size > 1) violated('reply', [...replies].join('\n'))
    // Whose lease may have lapsed may have been replaced.
    const runs = new Set(answers.filter(({ tookMs }) => tookMs < LEASE_MS).map(({ run }) => run))
    if (remembers && runs.size > 1) violated('reply', `of the runs ${[...runs]}`)
    violations.push(...judgeRuns(place, books.told(key), workers.deaths()))
    return violations.map((violation): KeyViolation => ({ ...violation, key }))
  }

  /** Sends a request until it is held there, or has an answer because it does not come there any more. */
  async function approach(worker: Worker, plan: Plan, point: Point): Promise<void> {
    const isThere = () => books.isHeld(plan.key, point, worker.name) || existsSync(join(folder, `${plan.key} ${point}`))
    while (worker.process.running) {
      const heard: { answer?: Answer | null } = {}
      void send(worker, plan, { hold: point }).then(
        (answer) => Object.assign(heard, { answer }),
        () => Object.assign(heard, { answer: null })
      )
      const isOver = () => heard.answer !== undefined
      await until(() => isOver() || isThere(), { timeout: LIMIT_MS, message: `a request to be at ${point}` })
      if (isThere()) {
        struck.set(point, (struck.get(point) ?? 0) + 1)
        return
      }
      if (heard.answer && !isNotYet(heard.answer)) return
      await sleep(20)
    }
  }

  /** A worker that listens, and that nobody else is about to kill. */
  async function target(): Promise<Worker> {
    const found = () => {
      const worker = workers.all().find((worker) => !targets.has(worker))
      if (worker !== undefined) targets.add(worker)
      return worker
    }
    return (await until(found, { timeout: LIMIT_MS, message: 'a worker to listen' })) as Worker
  }

  /** Two workers that listen. */
  async function two(): Promise<[Worker, Worker]> {
    const isThere = () => workers.all().length >= 2
    await until(isThere, { timeout: LIMIT_MS, message: 'two workers to listen' })
    return workers.all() as [Worker, Worker]
  }

  /** Kills a worker when each of these keys is at its point, as often as there are points; two clients ask on. */
  async function strike(plans: Plan[]): Promise<KeyViolation[]> {
    for (const { key, fails = [] } of plans) books.toFail(key, fails)
    const rounds = Math.max(...plans.map(({ kills = [] }) => kills.length))
    const follows: Promise<KeyViolation[]>[] = []
    for (let round = 0; round < rounds; round++) {
      const worker = await target()
      const aims = plans.flatMap((plan) => {
        const point = plan.kills?.[round]
        return point ? [{ plan, point }] : []
      })
      const [blocking, others] = [true, false].map((is) => aims.filter(({ point }) => BLOCKING.has(point) === is))
      for (const wave of [others, blocking]) {
        await Promise.all((wave ?? []).map(({ plan, point }) => approach(worker, plan, point)))
      }
      if (round === rounds - 1) follows.push(...plans.map((plan) => follow(plan, 2)))
      await workers.kill(worker)
      targets.delete(worker)
    }
    if (rounds === 0) follows.push(...plans.map((plan) => follow(plan, 2)))
    return (await Promise.all(follows)).flat()
  }

  /** Works on groups of keys, two at a time, and says what is wrong. */
  async function check(groups: Plan[][]): Promise<KeyViolation[]> {
    const violations: KeyViolation[] = []
    await some(groups, 2, async (plans) => void violations.push(...(await strike(plans))))
    return violations
  }

  /**
   * Two attempts in two processes are at one step at the same time: the first is in it when its claim is forgotten, and
   * another gets the key.
   */
  async function meet(step: StepName, sabotage?: Sabotage): Promise<KeyViolation[]> {
    const plan: Plan = { key: randomUUID(), place: 'forgetful', ...(sabotage && { sabotage }) }
    const [one, other] = await two()
    const point: Point = `${step}: in`
    const first = send(one, plan, { hold: point })
    await until(() => books.isHeld(plan.key, point, one.name), { message: `an attempt to be ${point}` })
    const told = () => books.told(plan.key).filter((event) => event.worker === other.name)
    // The first one claims it anew as soon as it notices.
    const second = until(
      async () => {
        await forget()
        const answer = await send(other, plan)
        return !isNotYet(answer) && answer
      },
      { timeout: LIMIT_MS, message: 'another attempt' }
    ) as Promise<Answer>
    const isThere = async () => {
      const events = told().filter((event) => event.step === step)
      return events.some(({ what }) => what === 'runs') || (events.length > 0 && (await isWaiting(step)))
    }
    await until(isThere, { timeout: LIMIT_MS, message: `another attempt to come to ${step}` })
    books.release(plan.key, point, one.name)
    return follow(plan, 0, [first, second])
  }

  /** Does the database hold somebody up? SQLite does not say. */
  async function isWaiting(step: StepName): Promise<boolean> {
    if (step === 'order') {
      return ((await pool.query("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'")).rowCount ?? 0) > 0
    }
    if (step !== 'invoice') return true
    // The server looks anew when it has not been asked for a tenth of a second.
    await sleep(150)
    const waits = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    return (await maria.query<RowDataPacket[]>(waits))[0].length > 0
  }

  /** An owner whose renewals get lost is in a step when another takes over, has finished that step, and goes on. */
  async function outlive(place: Place, sabotage?: Sabotage): Promise<KeyViolation[]> {
    const plan: Plan = { key: randomUUID(), place, ...(sabotage && { sabotage }) }
    const [zombie, heir] = await two()
    const late = send(zombie, plan, { hold: 'charge: in', silent: true })
    await until(() => books.isHeld(plan.key, 'charge: in', zombie.name), { message: 'the first owner to be held' })
    const next = until(
      async () => {
        const answer = await send(heir, plan, { hold: 'order: before' })
        if (isNotYet(answer)) await sleep(20)
        return !isNotYet(answer) && answer
      },
      { timeout: LIMIT_MS, message: 'the heir to answer' }
    ) as Promise<Answer>
    const isHeld = () => books.isHeld(plan.key, 'order: before', heir.name)
    await until(isHeld, { timeout: LIMIT_MS, message: 'the heir to be held' })
    books.release(plan.key, 'charge: in', zombie.name)
    const hasReturned = () =>
      books.told(plan.key).some(({ what, worker }) => what === 'returned' && worker === zombie.name)
    const heard: { answer?: Answer } = {}
    late.then(
      (answer) => Object.assign(heard, { answer }),
      () => {}
    )
    await until(() => heard.answer !== undefined || hasReturned(), { message: 'the first owner to be refused' })
    // It would wait for an answer to its renewal.
    if (heard.answer === undefined) await workers.kill(zombie)
    books.release(plan.key, 'order: before', heir.name)
    return follow(plan, 0, [late, next])
  }

  return { workers, books, check, meet, outlive, struck, requests: () => requests }
}
