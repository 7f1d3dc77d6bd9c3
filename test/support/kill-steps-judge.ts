import type { Told } from './kill-steps-books.js'
import { type Place, type Result, STEPS, type StepName } from './kill-steps-plan.js'

// What is wrong with the runs and the effects of one key.

export interface Violation {
  /**
   * `late`: no answer within the limit; `refused`: an answer that is none; `reply`: a final reply that differs from another;
   * `effects`: not exactly one of a transactional step; `keyed`: the same of a service, by the key of a step; `again`: a
   * finished step runs again; `overlap`: a transactional step runs twice at the same time; `result`: a finished step gives
   * different results.
   */
  readonly kind: 'late' | 'refused' | 'reply' | 'effects' | 'keyed' | 'again' | 'overlap' | 'result'
  readonly what: string
}

type Ids = Readonly<Record<StepName, number>>

/** The effects that there are of each step. */
export type Effects = Readonly<Record<StepName, readonly { readonly id: number }[]>>

/** Each effect is there once, and is that of the reply. */
export function judgeEffects(effects: Effects, ids: Ids): Violation[] {
  return STEPS.flatMap(({ name, in: place }): Violation[] => {
    const found = JSON.stringify(effects[name].map(({ id }) => id))
    if (found === JSON.stringify([ids[name]])) return []
    const kind = place === 'service' ? 'keyed' : 'effects'
    return [{ kind, what: `${name}: ${found}, replied ${ids[name]}` }]
  })
}

/**
 * No finished step runs again, and each has one result.
 * @param told In the order in which it happened.
 * @param deaths When which worker was killed.
 */
export function judgeRuns(place: Place, told: readonly Told[], deaths: ReadonlyMap<string, number>): Violation[] {
  return STEPS.flatMap(({ name, in: home }): Violation[] => {
    const events = told.filter(({ step }) => step === name)
    const isTransactional = home !== 'service'
    const violations: Violation[] = []
    const violated = (kind: Violation['kind'], ...what: object[]) =>
      void violations.push({ kind, what: `${name}: ${what.map((each) => JSON.stringify(each)).join(', ')}` })

    events.forEach((event, n) => {
      if (event.what !== 'runs') return
      const earlier = events.slice(0, n)
      const binds = (other: Told) =>
        other.what === 'returned' && (isTransactional || (isRemembered(place, other, event) && !isLate(event, other)))
      const first = earlier.find(binds)
      if (first !== undefined) violated('again', first, event)
      if (!isTransactional) return
      const hasEnded = ({ run, worker }: Told) =>
        (deaths.get(worker) ?? Number.POSITIVE_INFINITY) <= event.at ||
        earlier.some((other) => other.what === 'ran' && other.run === run)
      const rival = earlier.find((other) => other.what === 'runs' && !hasEnded(other))
      if (rival !== undefined) violated('overlap', rival, event)
    })

    const results = events.flatMap(({ what, result }) => (what === 'returned' && result ? [result] : []))
    const given = new Set(results.map((result) => resultOf(result, isTransactional || place !== 'forgetful')))
    if (given.size > 1) violated('result', ...results)
    return violations
  })
}

/** Both have a claim in a store that has not forgotten since. */
function isRemembered(place: Place, one: Told, other: Told): boolean {
  return place !== 'forgetful' || (one.epoch === other.now && other.epoch === other.now)
}

/** Its lease has lapsed before it came to the step: nobody can keep it from that. */
function isLate(event: Told, other: Told): boolean {
  return event.attempt < other.attempt
}

function resultOf({ id, run }: Result, isTheRunsOwn: boolean): string {
  return isTheRunsOwn ? `${id} ${run}` : String(id)
}
