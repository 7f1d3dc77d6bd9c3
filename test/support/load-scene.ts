import type { Test } from 'tap'
import type { IdempotencyOptions } from '../../index.js'
import { Fleet } from './fleet.js'
import { type Exchange, type Guarantee, type History, holds, type Rules } from './http-history.js'
import { Load, type LoadOptions } from './load.js'
import type { WorkerSetup } from './load-plan.js'
import { newSeed, Random } from './random.js'

/** How many times as long the faults last. */
export const FACTOR = Number(process.env.FAULTS_FACTOR) || 1

/** What holds whatever happens to the store, as long as it is gone for less than a lease and forgets nothing. */
export const ALL: readonly Guarantee[] = [
  'one owner',
  'one final run',
  'same reply',
  'no invention',
  'kept once seen',
  'marked replays',
  'known answers',
  'no lock-out',
  'rising attempts',
  'last word'
]

/** What holds of keys whose claim was lost, with the store's memory or by lapsing while its owner could not renew it. */
export const AFTER_LOSS: readonly Guarantee[] = ['no invention', 'known answers', 'no lock-out', 'last word']

export const IN_PROGRESS = '409 FST_IDEMPOTENCY_IN_PROGRESS'
export const ABANDONED = '409 FST_IDEMPOTENCY_ABANDONED'
export const UNAVAILABLE = '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE'
/** A run that is made to fail, whose reply is not kept. */
export const FAILED = '500 FAILED'

/** The rules while nothing is wrong. */
export const CALM: Rules = { guarantees: ALL, answers: [IN_PROGRESS, FAILED] }
/** The rules while the store cannot be reached now and then: a reply may wait to be stored, its key held meanwhile. */
export const TROUBLED: Rules = {
  guarantees: ALL,
  answers: [IN_PROGRESS, FAILED, UNAVAILABLE],
  excuses: [IN_PROGRESS, UNAVAILABLE]
}

export interface SceneOptions {
  /** One for each worker. */
  workers: (Omit<WorkerSetup, 'name' | 'runs' | 'options'> & { options?: IdempotencyOptions })[]
  options?: IdempotencyOptions
  load?: Partial<LoadOptions>
  seed?: number
}

/** Workers, and clients that load them. */
export class Scene {
  readonly #t: Test
  readonly fleet: Fleet
  readonly load: Load
  readonly random: Random

  private constructor(t: Test, fleet: Fleet, load: Load, random: Random) {
    this.#t = t
    this.fleet = fleet
    this.load = load
    this.random = random
  }

  static async open(t: Test, { workers, options, load: loadOptions, seed = newSeed() }: SceneOptions): Promise<Scene> {
    t.comment(`SEED=${seed}`)
    const random = new Random(seed)
    const fleet = new Fleet(t)
    const common = { lease: 5_000, storeTimeout: 300, ...options }
    await Promise.all(workers.map((setup) => fleet.start({ ...setup, options: { ...common, ...setup.options } })))
    const load = new Load({ random, targets: () => fleet.workers, ...loadOptions })
    t.teardown(() => load.close())
    return new Scene(t, fleet, load, random)
  }

  /** What has been seen, of some keys or of all. */
  history(of: (key: string) => boolean = () => true): Required<History> {
    const { runs, absences } = this.fleet.seen()
    const own = ({ key }: { key: string }) => of(key)
    return { exchanges: this.load.exchanges.filter(own), runs: runs.filter(own), absences }
  }

  /** Keys of which a run was under way, or might still have had its reply unstored, within a time. */
  caught(from: number, to: number, worker?: string): Set<string> {
    const within = this.fleet
      .seen()
      .runs.filter(
        ({ started, ended, worker: by }) =>
          started <= to && (ended ?? Number.POSITIVE_INFINITY) >= from && (worker === undefined || worker === by)
      )
    return new Set(within.map(({ key }) => key))
  }

  /** Keys that may have been lost because a worker did not get on: for those with short leases on busy machines. */
  stalled(): Set<string> {
    const { absences } = this.fleet.seen()
    return new Set(absences.flatMap(({ worker, from, to }) => [...this.caught(from - 1_000, to + 1_000, worker)]))
  }

  /** Judges, after every key has been asked for once more. */
  async judge(rules: Rules): Promise<Required<History>> {
    await this.load.revisit()
    const history = this.history()
    holds(this.#t, history, rules)
    this.isWell()
    return history
  }

  isWell(): void {
    this.#t.strictSame(this.fleet.trouble, [], 'no worker has ended, or complained')
    this.#t.comment(countsOf(this.load.exchanges))
  }
}

/** How many got which answer. */
export function countsOf(exchanges: readonly Exchange[]): string {
  const counts = new Map<string, number>()
  for (const { got, status, code, replayed } of exchanges) {
    const answer = got === null ? 'none' : `${status}${code ? ` ${code}` : ''}${replayed ? ' replayed' : ''}`
    counts.set(answer, (counts.get(answer) ?? 0) + 1)
  }
  return [...counts].map(([answer, count]) => `${answer}: ${count}`).join(', ')
}

/** How many got this answer. */
export const howMany = ({ exchanges }: History, answer: string): number =>
  exchanges.filter(({ status, code }) => answer === `${status}${code ? ` ${code}` : ''}`).length

/** A stretch of time. */
export interface Span {
  from: number
  to: number
}

/** From when to when something was seen of each key. */
export function spansOf({ exchanges, runs }: History): Map<string, Span> {
  const spans = new Map<string, Span>()
  const stretch = (key: string, from: number, to: number) => {
    const span = spans.get(key)
    spans.set(key, span ? { from: Math.min(span.from, from), to: Math.max(span.to, to) } : { from, to })
  }
  for (const { key, sent, got } of exchanges) stretch(key, sent, got ?? sent)
  for (const { key, started, ended } of runs) stretch(key, started, ended ?? started)
  return spans
}
