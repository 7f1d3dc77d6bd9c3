import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { read, start } from './app.js'
import { Fleet, type Worker } from './kill-fleet.js'
import {
  HOLD,
  KILL,
  KILLS,
  type Kill,
  type Mode,
  type Point,
  type Sabotage,
  SCHEMA,
  type Transfer
} from './kill-plan.js'
import { countBy } from './lists.js'
import { startPostgres } from './postgres.js'
import { makeFolder } from './process.js'
import { newSeed, Random } from './random.js'

// The workers of kill-worker.ts, the clients that ask them until they have an answer, and the ledger that says what was done.

const script = fileURLToPath(new URL('./kill-worker.js', import.meta.url))

/**
 * How long a client asks. Each kill costs the start of a process, and whoever asks meanwhile waits for it: on a slow
 * machine, which runs other tests as well, for minutes.
 */
export const LIMIT_MS = 240_000

/** A key, and what becomes of those who work on it. */
export interface Plan {
  key: string
  mode: Mode
  kill?: Point
  /** How often. */
  kills?: number
  /** How long the handler takes between its writes. */
  ms?: number
}

export interface Answer {
  status: number
  code: string | undefined
  replayed: boolean
  /** The status, the headers and the body, byte for byte. */
  bytes: string
  transfer: Transfer
  /** How long it took, of the worker's time as well. */
  tookMs: number
}

/** What each reply has of its own, be it a replay or not. */
const OWN_HEADERS = new Set(['date', 'connection', 'keep-alive', 'idempotent-replayed'])

export const isSuccess = ({ status }: Answer): boolean => status === 201
export const isNotYet = ({ status, code }: Answer): boolean => status === 503 || code === 'FST_IDEMPOTENCY_IN_PROGRESS'

export interface Entry {
  id: number
  run: string
  amount: number
}

export interface FleetOptions {
  options: IdempotencyOptions
  sabotage?: Sabotage
  /** What the workers find beside PostgreSQL. */
  env?: Record<string, string>
}

export type Workers = Fleet<Kill>

export class KillScene {
  /** Another connection than those of the workers. */
  readonly pool
  readonly folder = makeFolder('kills')
  /** How many requests were sent. */
  requests = 0
  readonly random: Random
  readonly #host: string

  /** A test file has one. */
  static async open(t: Test): Promise<KillScene> {
    const random = new Random(newSeed())
    t.comment(`SEED=${random.seed}`)
    const postgres = await startPostgres()
    t.teardown(() => postgres.close())
    const scene = new KillScene(postgres, random)
    await scene.pool.query(SCHEMA)
    return scene
  }

  private constructor(postgres: Awaited<ReturnType<typeof startPostgres>>, random: Random) {
    this.pool = postgres.pool()
    this.#host = postgres.host
    this.random = random
  }

  startFleet(t: Test, count: number, { options, sabotage, env }: FleetOptions): Promise<Workers> {
    return Fleet.start(t, count, {
      args: [script, JSON.stringify(options)],
      env: { POSTGRES: this.#host, ...env, ...(sabotage && { SABOTAGE: sabotage }) },
      folder: this.folder,
      random: this.random
    })
  }

  /** One request. Rejects when the connection fails. */
  async send(worker: Worker, { key, mode, kill, kills = 0, ms = 0 }: Plan, hold?: Point): Promise<Answer> {
    this.requests++
    const before = performance.now()
    const sent = start(Number(new URL(worker.url).port), {
      path: `/${mode}`,
      key,
      headers: { ...(kill && { [KILL]: kill, [KILLS]: String(kills) }), ...(hold && { [HOLD]: hold }) },
      body: JSON.stringify({ amount: 100, ms })
    })
    const limit = setTimeout(sent.hangUp, LIMIT_MS)
    const response = await sent.response.then(read).finally(() => clearTimeout(limit))
    const body = response.body.toString('latin1')
    const headers = Object.entries(response.headers).filter(([name]) => !OWN_HEADERS.has(name))
    const { code, ...transfer } = JSON.parse(body)
    return {
      status: response.status,
      code,
      replayed: response.headers['idempotent-replayed'] === 'true',
      bytes: JSON.stringify([response.status, headers, body]),
      transfer,
      tookMs: performance.now() - before
    }
  }

  /** Asks one worker or another until there is an answer; or says what was the last thing that it heard. */
  async ask(fleet: Workers, plan: Plan, limitMs = LIMIT_MS): Promise<Answer | string> {
    const end = performance.now() + limitMs
    let heard = 'nothing'
    while (performance.now() < end) {
      const worker = fleet.any()
      if (worker !== undefined) {
        const answer = await this.send(worker, plan).catch((error: Error) => String(error.cause ?? error))
        if (typeof answer !== 'string' && !isNotYet(answer)) return answer
        heard = typeof answer === 'string' ? answer : `${answer.status} ${answer.code}`
      }
      await sleep(this.random.between(20, 80))
    }
    return heard
  }

  async ledger(key: string): Promise<Entry[]> {
    return (await this.pool.query('SELECT id, run, amount FROM ledger WHERE key = $1 ORDER BY id', [key])).rows
  }

  /** For each point so many keys, the first of which kill so many workers there. */
  plansFor(mode: Mode, points: readonly Point[], keys: number, killing: number[] = []): Plan[] {
    return points.flatMap((kill) =>
      Array.from({ length: keys }, (_, n): Plan => {
        const ms = n % 3 === 0 ? this.random.between(1, 20) : 0
        const kills = killing[n]
        return { key: randomUUID(), mode, ms, ...(kills && { kill, kills }) }
      })
    )
  }
}

/** How often the workers were killed at each of the points, which must be several times. */
export function checkKills(t: Test, kills: Kill[], points: readonly Point[], times: number): void {
  const counts = countBy(kills, ({ point }) => point)
  t.comment(`${kills.length} kills: ${JSON.stringify(counts)}`)
  for (const point of points) t.ok((counts[point] ?? 0) >= times, `${counts[point]} kills ${point}`)
}

/** Where a worker without PostgreSQL alone finds the other servers. */
export const otherServers = (redis: string, mariadb: string, folder: string): Record<string, string> => ({
  REDIS_PATH: redis,
  MARIADB: mariadb,
  SQLITE: join(folder, 'sqlite')
})
