import type { RedisOptions } from 'ioredis'
import type { PoolOptions } from 'mysql2'
import type { IdempotencyOptions } from '../../index.js'
import type { Absence, Run } from './http-history.js'

// What the clients of a load, load.ts, and its workers, load-worker.ts, have agreed on.

/** How a worker is set up. */
export interface WorkerSetup {
  name: string
  /** The file that its runs are written to: not to the Redis that is under fault. */
  runs: string
  /** Where the claims are: in Redis, or in MariaDB. */
  mysql?: PoolOptions
  redis?: (RedisOptions & { replyMapping?: 'legacy' }) | { host: string; port: number }[]
  /** Of which library its client of Redis is; ioredis by default. */
  client?: 'node-redis' | undefined
  options: IdempotencyOptions
  /** Removes a safeguard. */
  sabotage?: 'no owner check' | undefined
}

/** What a request asks of its handler. */
export interface Job {
  key: string
  /** Which of the routes is asked. */
  route: Route
  ms: number
  /** How likely a run fails. */
  fails: number
}

/** What becomes of duplicates, and of claims whose owner has gone away. */
export const ROUTES = {
  reject: { onConflict: 'reject' },
  wait: { onConflict: 'wait' },
  strict: { onConflict: 'reject', onAbandoned: 'reject' }
} as const
export type Route = keyof typeof ROUTES

/** A line in the file of runs. */
export type RunLine =
  | Omit<Run, 'ended'>
  | (Pick<Run, 'id' | 'final' | 'text'> & { ended: number })
  // The process did not get on, as on a busy machine.
  | Absence
