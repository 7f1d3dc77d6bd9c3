// What the test of killed steps, kill-steps.test.ts, and its workers, kill-steps-worker.ts, have agreed on.

/** The steps of the handler, in their order, and where each has its effect. `service`: called with the key of the step. */
export const STEPS = [
  { name: 'charge', in: 'service' },
  { name: 'order', in: 'postgres' },
  { name: 'mail', in: 'service' },
  { name: 'invoice', in: 'mariadb' },
  { name: 'audit', in: 'sqlite' }
] as const

export type StepName = (typeof STEPS)[number]['name']
export type Database = Exclude<(typeof STEPS)[number]['in'], 'service'>

/** Where a worker can be killed. `in`: the effect is there, and `run` has not returned. */
const KEYED_POINTS = ['before', 'in', 'before its result is kept', 'after'] as const
const TRANSACTION_POINTS = ['before', 'in', 'before COMMIT', 'after COMMIT', 'after'] as const

export type Moment = (typeof KEYED_POINTS | typeof TRANSACTION_POINTS)[number]
export type Point = `${StepName}: ${Moment}`

export const POINTS: readonly Point[] = STEPS.flatMap(({ name, in: place }) =>
  (place === 'service' ? KEYED_POINTS : TRANSACTION_POINTS).map((moment): Point => `${name}: ${moment}`)
)

/**
 * Those that hold up all other transactions of SQLite, in other processes as well. COMMIT does not wait there: it is the
 * whole worker that is held, and can only be killed.
 */
export const BLOCKING: ReadonlySet<Point> = new Set<Point>(['audit: in', 'audit: before COMMIT', 'audit: after COMMIT'])

/** Where the claims are, which are the routes of a worker. `forgetful`: a Redis that is emptied after each kill. */
export const PLACES = ['redis', 'postgres', 'forgetful'] as const
export type Place = (typeof PLACES)[number]

// What a request tells the worker besides its work. Not in the body: duplicates may differ in it.

/** The point at which the request is held until its gate is open, or its worker is killed. */
export const HOLD = 'x-hold'
/** The safeguard that is missing for it. */
export const SABOTAGE = 'x-sabotage'
/** Its renewals get lost. */
export const SILENT = 'x-silent'
/** How often the claims had been forgotten when the request was sent. */
export const EPOCH = 'x-epoch'
/** Of a reply: which run of the handler has made it. */
export const RUN = 'x-run'

/**
 * `memo last`: the row of a step is inserted behind its work. `memo outside`: it is inserted when the work is committed.
 * `no owner check`: whoever finishes a step, it is kept. `steps lost`: a release forgets them.
 */
export type Sabotage = 'memo last' | 'memo outside' | 'no owner check' | 'steps lost'

/** What a step gives: the number of its effect, and the run of the handler that had it. */
export interface Result {
  readonly id: number
  readonly run: string
}

/**
 * What a worker tells of a run of the handler. `asks`: it comes to a step; `runs`: the step's function is called; `ran`: that has
 * come to its end; `returned`: the handler has its result; `held`: it waits at its gate.
 */
export interface Event {
  readonly what: 'asks' | 'runs' | 'ran' | 'returned' | 'held'
  readonly key: string
  readonly step: StepName
  readonly run: string
  readonly attempt: number
  readonly worker: string
  /** By Date.now(). */
  readonly at: number
  /** When its request was sent. */
  readonly epoch: number
  readonly result?: Result
  /** Where it is held. */
  readonly point?: Point
}

/** What is asked of the service. */
export interface Call {
  readonly key: string
  readonly step: StepName
  readonly run: string
  /** The key of the step. */
  readonly derived: string
}

/** No constraint keeps a key from having several effects. */
export const TABLES: Readonly<Record<Database, string>> = {
  postgres: 'CREATE TABLE effects (id serial PRIMARY KEY, key text NOT NULL, run text NOT NULL)',
  mariadb:
    'CREATE TABLE effects (id integer AUTO_INCREMENT PRIMARY KEY, `key` varchar(64) NOT NULL, run varchar(64) NOT NULL)',
  sqlite: 'CREATE TABLE effects (id integer PRIMARY KEY, key text NOT NULL, run text NOT NULL)'
}

/** The table of the claims in PostgreSQL. */
export const CLAIMS = 'claims'
