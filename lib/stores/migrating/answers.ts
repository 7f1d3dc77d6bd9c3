import type { Acquisition, StoredRecord } from '../../../types/index.js'
import { mergedSteps, withSteps } from '../steps.js'

/* What two stores say of one key, as one answer. */

export type Abandoned = Extract<Acquisition, { state: 'abandoned' }>

/**
 * What is abandoned in both: of the later attempt, given back only when nobody's outcome is unknown, and abandoned for as long
 * as it is so in both.
 */
export function bothAbandoned(inFrom: Abandoned, inTo: Abandoned): Abandoned {
  const later = inTo.attempt > inFrom.attempt ? inTo : inFrom
  const { fingerprint, attempt } = later
  const hasEnded = inFrom.attempt === inTo.attempt ? inFrom.ended && inTo.ended : later.ended
  const found: Abandoned = { state: 'abandoned', fingerprint, attempt, ...(hasEnded && { ended: true }) }
  if (inFrom.lapsedMs !== undefined && inTo.lapsedMs !== undefined) {
    found.lapsedMs = Math.min(inFrom.lapsedMs, inTo.lapsedMs)
  }
  return withSteps(found, mergedSteps(inFrom.steps, inTo.steps))
}

/** What `acquire` would say, for who only looks: what `from` says goes first there, but for what nobody holds. */
export function seen(inFrom: Acquisition | null, inTo: Acquisition | null): Acquisition | null {
  if (inFrom === null || inTo === null) return inFrom ?? inTo
  if (inFrom.state !== 'abandoned') return inFrom
  return inTo.state === 'abandoned' ? bothAbandoned(inFrom, inTo) : inTo
}

/** The caller's record may change as soon as the call was made, and is needed later. */
export function copyOf(record: StoredRecord): StoredRecord {
  if (record.kind === 'tombstone') return { ...record }
  const headers = record.headers.map(([name, value]): [string, string | string[]] => [
    name,
    Array.isArray(value) ? [...value] : value
  ])
  return { ...record, headers, body: Buffer.from(record.body) }
}
