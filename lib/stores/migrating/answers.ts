import type { Acquisition, StoredRecord, StoredStep } from '../../../types/index.js'

/* What two stores say of one key, as one answer. */

export type Acquired = Extract<Acquisition, { state: 'acquired' }>
export type Abandoned = Extract<Acquisition, { state: 'abandoned' }>
type Steps = readonly StoredStep[] | undefined

/**
 * The steps of both, each name once. Where results differ that of `to` counts: a step is kept in `from` first, so what
 * only `from` has nobody was told of, if a process that claims in `to` alone did it again meanwhile.
 */
export function mergedSteps(inFrom: Steps, inTo: Steps): readonly StoredStep[] {
  const merged = new Map(inFrom ?? [])
  for (const [name, result] of inTo ?? []) merged.set(name, result)
  return [...merged]
}

/** As answers have them: left out where there are none. */
export function withSteps<T extends Acquisition>(found: T, steps: readonly StoredStep[]): T {
  return steps.length === 0 ? found : { ...found, steps }
}

/** What is abandoned in both: of the later attempt, and given back only when nobody's outcome is unknown. */
export function bothAbandoned(inFrom: Abandoned, inTo: Abandoned): Abandoned {
  const later = inTo.attempt > inFrom.attempt ? inTo : inFrom
  const { fingerprint, attempt } = later
  const hasEnded = inFrom.attempt === inTo.attempt ? inFrom.ended && inTo.ended : later.ended
  const found: Abandoned = { state: 'abandoned', fingerprint, attempt, ...(hasEnded && { ended: true }) }
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
