import type { Difference, IdempotencyEventName, Loss, StoredRecord } from '../../types/index.js'
import {
  Abandoned,
  ClaimLost,
  InProgress,
  keyReused,
  NotReplayable,
  StoreUnavailable,
  withRetryAfter
} from '../errors.js'
import { publish, type Subject } from '../events.js'
import type { Policy } from '../options.js'
import type { Decision } from './decide.js'
import type { StoreHealth } from './store-health.js'

/* What is told of an operation: to the subscribers of events, to the log, and to the client that is refused. */

/** An event, which the log has too, for who looks for details. */
export function tell(subject: Subject, event: IdempotencyEventName, error?: unknown): void {
  publish(event, subject, error === undefined ? undefined : { error })
  subject.log.debug(bindings(subject), `idempotency ${event}`)
}

export function tellStored(subject: Subject, record: StoredRecord): void {
  tell(subject, record.kind === 'reply' ? 'stored' : 'tombstoned')
}

/** A step has failed, or was not tried because the store is known to be down: each is an event, an outage one error. */
export function tellFailure(subject: Subject, health: StoreHealth, error: unknown): void {
  publish('store-error', subject, { error })
  health.report(error, subject.log, bindings(subject))
}

export function tellStep(subject: Subject, event: 'step-stored' | 'step-resumed', step: string): void {
  publish(event, subject, { step })
  subject.log.debug({ ...bindings(subject), step }, `idempotency ${event}`)
}

/** The reply is stored, and nobody will ever ask for the results of these. */
export function tellUnfinishedSteps(subject: Subject, steps: readonly string[]): void {
  subject.log.warn({ ...bindings(subject), steps }, 'idempotency steps still run when the reply is stored')
}

/** The end of a transaction was refused: nothing of it is there. */
export function tellUndone(subject: Subject, error: unknown): void {
  publish('released', subject)
  subject.log.warn({ ...bindings(subject), err: error }, 'idempotency transaction rolled back at its end')
}

const LOSSES: Record<Loss, string> = {
  taken: 'to another owner',
  deleted: 'because its key was deleted',
  connection: 'with the connection of its transaction',
  unknown: 'because the store does not know it any more'
}

export function tellLost(subject: Subject, loss: Loss): void {
  publish('lease-lost', subject, { loss })
  subject.log.warn(bindings(subject), `idempotency claim lost ${LOSSES[loss]}`)
}

/** The request has no key that could be asked for: a refusal without an operation. */
export function tellRefused(subject: Subject, error: unknown): void {
  publish('refused', subject, { error })
  subject.log.debug({ idempotency: { route: subject.policy.route }, err: error }, 'idempotency refused')
}

/** The error that refuses a duplicate. */
export function refusal(subject: Subject, refused: Extract<Decision, { do: 'refuse' }>): Error {
  switch (refused.with) {
    case 'KEY_REUSED':
      return reused(subject, refused.differs)
    case 'NOT_REPLAYABLE':
      return conflict(subject, new NotReplayable())
    case 'IN_PROGRESS':
      return inProgress(subject)
    case 'ABANDONED':
      return conflict(subject, new Abandoned())
  }
}

/** The key belongs to another request. */
export function reused(subject: Subject, differs: Difference): Error {
  publish('mismatch', subject, { differs })
  subject.log.debug({ ...bindings(subject), differs }, 'idempotency mismatch')
  return keyReused(differs)
}

/** Another has the key now, so that the handler must go no further. */
export function claimLost(): Error {
  return withRetryAfter(new ClaimLost(), 1)
}

export function inProgress(subject: Subject): Error {
  return conflict(subject, withRetryAfter(new InProgress(), 1))
}

export function unavailable({ storeTimeout }: Policy, cause: unknown): Error {
  return withRetryAfter(new StoreUnavailable({ cause }), Math.ceil(storeTimeout / 1_000))
}

function conflict(subject: Subject, error: Error): Error {
  tell(subject, 'conflict', error)
  return error
}

function bindings({ storageKey, policy, attempt }: Subject): object {
  return { idempotency: { key: storageKey, route: policy.route, attempt } }
}
