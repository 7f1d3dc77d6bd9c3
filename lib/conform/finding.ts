import type { Exchange } from './http.js'

/* What a rule comes to. */

export type Outcome = 'passed' | 'failed' | 'not-applicable' | 'not-decidable'

/** An exchange that shows something, and what it is. */
export interface Shown {
  readonly what: string
  readonly exchange: Exchange
}

export interface Finding {
  readonly outcome: Outcome
  /** Why; empty where it passed and there is nothing to add. */
  readonly reason: string
  /** What shows it, in the order in which it was sent. */
  readonly shown: readonly Shown[]
}

/** Ends a rule early, with what it came to. */
export class Ended extends Error {
  constructor(readonly finding: Finding) {
    super(finding.reason)
  }
}

export const passed = (reason = ''): Finding => ({ outcome: 'passed', reason, shown: [] })
export const failed = (reason: string, ...shown: Shown[]): Finding => ({ outcome: 'failed', reason, shown })
export const notApplicable = (reason: string): Finding => ({ outcome: 'not-applicable', reason, shown: [] })
export const notDecidable = (reason: string, ...shown: Shown[]): Finding => ({
  outcome: 'not-decidable',
  reason,
  shown
})

export const shown = (what: string, exchange: Exchange): Shown => ({ what, exchange })

/** A reply in a few words. */
export function inWords({ reply, failure }: Exchange): string {
  if (reply === null) return failure as string
  const text = reply.body.length > 80 ? `${reply.body.subarray(0, 80)}…` : String(reply.body)
  return text === '' ? `${reply.status}` : `${reply.status} ${text.replaceAll(/\s+/g, ' ')}`
}
