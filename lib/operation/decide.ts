import type { Acquisition, Difference, StoredReply, StoredStep } from '../../types/index.js'
import { closestDifference } from './fingerprint.js'
import { withoutOrigin } from './origin.js'

const NONE: readonly StoredStep[] = []

/** What is to be done about a key that was asked for. */
export type Decision =
  /** It is ours, with the steps that earlier attempts have finished. `reserve`: for one lease, because not all is known yet. */
  | { readonly do: 'hold'; readonly attempt: number; readonly steps: readonly StoredStep[] }
  | { readonly do: 'reserve' }
  | { readonly do: 'replay'; readonly reply: StoredReply }
  | { readonly do: 'wait' }
  | { readonly do: 'take over' }
  /** Ask again, or decide again, when all is known of the request. */
  | { readonly do: 'postpone' }
  | { readonly do: 'refuse'; readonly with: 'KEY_REUSED'; readonly differs: Difference }
  | { readonly do: 'refuse'; readonly with: 'NOT_REPLAYABLE' | 'IN_PROGRESS' | 'ABANDONED' }

/**
 * The verdict on a duplicate, as the contract has it: another request is refused first, then what the key's state refuses.
 * @param ours The fingerprints of this request, as far as it is known: one for each secret that is in use.
 * @param knowsAll Is everything known of this request that can be?
 * @param policy `waits`: a duplicate waits for the first request's reply. `reruns`: what was abandoned is run again.
 */
export function decide(
  found: Acquisition,
  ours: readonly string[],
  knowsAll: boolean,
  policy: { readonly waits: boolean; readonly reruns: boolean }
): Decision {
  if (found.state === 'acquired') {
    return knowsAll ? { do: 'hold', attempt: found.attempt, steps: found.steps ?? NONE } : { do: 'reserve' }
  }
  const theirs = found.state === 'completed' ? found.record.fingerprint : found.fingerprint
  const differs = closestDifference(withoutOrigin(theirs), ours)
  if (differs !== null) return { do: 'refuse', with: 'KEY_REUSED', differs }
  switch (found.state) {
    case 'completed':
      if (!knowsAll) return { do: 'postpone' }
      if (found.record.kind === 'tombstone') return { do: 'refuse', with: 'NOT_REPLAYABLE' }
      return { do: 'replay', reply: found.record }
    case 'running':
      if (!policy.waits) return { do: 'refuse', with: 'IN_PROGRESS' }
      return { do: knowsAll ? 'wait' : 'postpone' }
    case 'abandoned':
      // What its owner has given back is nobody's unknown outcome.
      if (!policy.reruns && !found.ended) return { do: 'refuse', with: 'ABANDONED' }
      return { do: knowsAll ? 'take over' : 'postpone' }
  }
}
