import type { Acquisition, StoredStep } from '../../types/index.js'

/* The steps of one operation that is known in two places. */

type Steps = readonly StoredStep[] | undefined

/**
 * The steps of both, each name once. Where results differ that of the second counts. Of `MigratingStore` that is `to`: a step
 * is kept in `from` first, so what only `from` has nobody was told of, if a process that claims in `to` alone did it again
 * meanwhile.
 */
export function mergedSteps(first: Steps, second: Steps): readonly StoredStep[] {
  const merged = new Map(first ?? [])
  for (const [name, result] of second ?? []) merged.set(name, result)
  return [...merged]
}

/** As answers have them: left out where there are none. */
export function withSteps<T extends Acquisition>(found: T, steps: readonly StoredStep[]): T {
  return steps.length === 0 ? found : { ...found, steps }
}
