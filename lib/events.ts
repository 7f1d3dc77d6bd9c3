import { type Channel, channel } from 'node:diagnostics_channel'
import type { FastifyBaseLogger } from 'fastify'
import type { IdempotencyEvent, IdempotencyEventName } from '../types/index.js'

/* The diagnostics channels. A subscriber never changes a request. */

/** The events of the diagnostics channels `fastify-idempotency:<name>`. */
export const idempotencyEvents: readonly IdempotencyEventName[] = Object.freeze([
  'acquired',
  'replayed',
  'conflict',
  'mismatch',
  'stored',
  'released',
  'tombstoned',
  'takeover',
  'lease-lost',
  'store-error',
  'bypassed',
  'step-stored',
  'step-resumed',
  'refused',
  'settled'
])

// Channels are held here because Node forgets a channel that nobody refers to.
const channels = Object.fromEntries(
  idempotencyEvents.map((name) => [name, channel(`fastify-idempotency:${name}`)])
) as Record<IdempotencyEventName, Channel>

/** What an event is about. */
export interface Subject {
  readonly request: IdempotencyEvent['request']
  readonly log: FastifyBaseLogger
  readonly storageKey: string
  readonly policy: { readonly route: string }
  readonly attempt: number
}

/** What some events tell besides. */
export type EventDetails = Pick<IdempotencyEvent, 'error' | 'differs' | 'loss' | 'step'>

/** Tells the subscribers of an event. Free when there are none. */
export function publish(name: IdempotencyEventName, subject: Subject, details: EventDetails = {}): void {
  const target = channels[name]
  if (!target.hasSubscribers) return
  const event: IdempotencyEvent = {
    request: subject.request,
    key: subject.storageKey,
    route: subject.policy.route,
    attempt: subject.attempt,
    ...details
  }
  target.publish(event)
}
