import type { KillNote } from './kill-note.js'

// What the supervisor of test/faults/kill.test.ts and kill-transaction.test.ts and its workers, kill-worker.ts, have agreed on.

/** The points of a request's life at which a worker can kill itself, where claim, effect and reply are one transaction. */
export const TRANSACTION_POINTS = [
  'before the claim',
  'during the claim',
  'after the claim',
  'between the writes',
  'after the writes',
  'during the record',
  'before COMMIT',
  'during COMMIT',
  'after COMMIT',
  'before the reply',
  'after the reply'
] as const

/** The same where they are not. */
export const PLAIN_POINTS = [
  'before the claim',
  'after the claim',
  'between the writes',
  'after the writes',
  'after the completion',
  'before the reply',
  'after the reply'
] as const

export type Point = (typeof TRANSACTION_POINTS | typeof PLAIN_POINTS)[number]

/** The routes of a worker: what holds the claims, and what becomes of duplicates, or of claims whose owner has died. */
export type Mode = TransactionMode | PlainMode
export type TransactionMode = 'transaction' | 'transaction-wait'
export type PlainMode = `${(typeof PLAIN_STORES)[number]}-${'rerun' | 'reject'}`
export const PLAIN_STORES = ['postgres', 'redis', 'mysql', 'sqlite'] as const

/** What a request asks of the worker besides its work. Not in the body: duplicates may differ in it. */
export const KILL = 'x-kill'
/** How often the workers kill themselves for this key, all together. */
export const KILLS = 'x-kills'
/** The point at which the request is held until the gate of its key is open. */
export const HOLD = 'x-hold'

export type Sabotage = 'commit-after-reply' | 'no-owner-check' | 'lock-outside'

export interface Kill extends KillNote {
  readonly point: Point
  /** The run of the handler, where there was one already: what stands in the ledger. */
  readonly run: string | null
}

/** What the handler answers: the two rows that it wrote, and the run that wrote them. */
export interface Transfer {
  run: string
  entries: [debit: number, credit: number]
  attempt: number
}

/** No constraint keeps a key from having several effects. */
export const SCHEMA = `
CREATE TABLE ledger (id serial PRIMARY KEY, key text NOT NULL, run text NOT NULL, amount integer NOT NULL);
CREATE INDEX ON ledger (key);
CREATE TABLE runs (
  run text PRIMARY KEY, key text NOT NULL, worker text NOT NULL, attempt integer NOT NULL,
  asked timestamptz NOT NULL, started timestamptz NOT NULL DEFAULT clock_timestamp(), ended timestamptz
);
CREATE TABLE gates (key text NOT NULL, state text NOT NULL);`
