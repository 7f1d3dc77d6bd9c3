import type { Acquisition, Claim, IdempotencyStore, StoredStep } from '../../types/index.js'
import { UnreadableAnswer } from '../errors.js'
import { type Acquired, raise } from '../stores/attempts.js'
import { mergedSteps, withSteps } from '../stores/steps.js'
import { isAcquisition, isClaimedKey } from './store-answers.js'

/*
 * While several secrets are in use, one key has several storage keys in one store: its own, under the first secret, which is
 * the only one that this process claims, and others, under which processes claim it that have another order of secrets, or
 * have claimed it before. Handlers run under one of them at a time:
 *
 * 1. Claim, then look. Who wants to run claims its own, and looks at the others after that. What is running or finished there
 *    counts, and the own claim is given back as one that never ran. Of two who claim different ones, the later look comes
 *    after both claims: so at least one of the two sees the other, and goes. If both do, nobody runs. Lest that goes on for
 *    ever where many come, who has the lesser storage key looks again, for a while: the other goes at once.
 *    What makes that true is that each lists the secret which is the other's first, and that `get` sees every claim. An open
 *    transaction it does not see, so that options.ts refuses those.
 * 2. What was interrupted elsewhere is moved. A lapsed claim is nobody's flag: its owner may only have been paused, and would
 *    renew it unseen. So who has claimed its own takes the other over as well, which ends that owner's claim, and what it still
 *    says is refused; then its attempts and steps are brought to the own claim; and only then it is deleted. Nobody else
 *    comes in between: all who look find it running. Who dies on the way leaves two claims that lapse, each with all that it
 *    had, and the next one begins again. If the own claim had to be given up for a moment, to raise its attempt, the rest is
 *    looked at once more.
 * 3. So nothing new is kept under a secret that is not the writer's first, but by an operator who settles what is there. When
 *    no process has the old secret in the first place any more, what is kept under it only gets older: after the longest `ttl`
 *    and the longest `lease` nothing is left that anybody was promised to find, and it need not be looked for.
 *
 * The look before the claim is for good manners only: a replay needs no claim that others would meet.
 */

/** What was found, and under which of the storage keys; left out for the own one. */
export type Placed<F> = F & { readonly storageKey?: string }

type Found = Acquisition & { readonly storageKey: string }

/** Who asks for a key that has several storage keys, its own first. */
export interface Asker {
  readonly store: IdempotencyStore
  readonly keys: readonly [string, ...string[]]
  readonly claim: Claim
  /** It has claimed its own already, by the same token, and asks once more. */
  readonly isHolder: boolean
  /** Gives a claim back in the background, as one that never ran. */
  readonly giveBack: (storageKey: string) => void
  /** Waits for another look, the nth one; `false` when it has been long enough. */
  readonly pause: (n: number) => Promise<boolean>
}

/** Claims the own storage key, unless the key is somebody's under any of them. */
export async function acquireAmong(asker: Asker): Promise<Placed<Acquisition>> {
  const { store, keys, claim, isHolder, pause } = asker
  const [own, ...others] = keys
  if (!isHolder) {
    const seen = furthest(await lookAt(store, keys))
    if (seen !== null && !(seen.state === 'abandoned' && claim.takeover)) return seen
  }
  for (let n = 1; ; n++) {
    // By the same token, so that the lease does not end while others are waited for.
    const held = checked(await store.acquire(own, claim))
    if (held.state !== 'acquired') return held
    const elsewhere = await lookAt(store, others)
    const rival = furthest(elsewhere)
    if (rival === null) return held
    if (rival.state === 'abandoned' && claim.takeover) return inherit(asker, held, elsewhere)
    const isToYield = elsewhere.every(({ state, storageKey }) => state === 'running' && own < storageKey)
    if (!isToYield || !(await pause(n))) return yieldTo(asker, rival)
  }
}

/** Is the key somebody's, or was it, under another storage key than the own one? */
export async function isElsewhere(store: IdempotencyStore, others: readonly string[]): Promise<boolean> {
  return others.length > 0 && (await lookAt(store, others)).length > 0
}

/** What the store has under any of the storage keys. */
async function lookAt(store: IdempotencyStore, keys: readonly string[]): Promise<Found[]> {
  const { get } = store as Required<IdempotencyStore>
  const found = await Promise.all(keys.map((key) => get.call(store, key)))
  return keys.flatMap((storageKey, n) => {
    const here = found[n] ?? null
    return here === null ? [] : { ...checked(here), storageKey }
  })
}

const STATES: readonly Acquisition['state'][] = ['abandoned', 'running', 'completed']

/** What counts of several: what is finished, else what is running, else the latest attempt. */
export function furthest<F extends Acquisition>(found: readonly F[]): F | null {
  let furthest: F | null = null
  for (const one of found) if (furthest === null || isFurther(one, furthest)) furthest = one
  return furthest
}

function isFurther(one: Acquisition, other: Acquisition): boolean {
  if (one.state === 'abandoned' && other.state === 'abandoned') return one.attempt > other.attempt
  return STATES.indexOf(one.state) > STATES.indexOf(other.state)
}

async function yieldTo<F extends Acquisition>({ store, keys, claim }: Asker, rival: F): Promise<F> {
  await store.release(keys[0], claim.token, true)
  return rival
}

function checked(found: Acquisition): Acquisition {
  if (!isAcquisition(found)) throw new UnreadableAnswer(undefined, !isClaimedKey(found))
  return found
}

/**
 * Moves what was interrupted under other storage keys to the own one, which is held.
 * @param interrupted Where there is something: if it turns out not to be abandoned any more, the key is left to it.
 */
async function inherit(asker: Asker, held: Acquired, interrupted: readonly Found[]): Promise<Placed<Acquisition>> {
  const { store, keys, claim, giveBack } = asker
  const [own, ...others] = keys
  const taken = new Set<string>()
  try {
    let { attempt, steps } = held
    for (const { storageKey } of interrupted) {
      const found = checked(await store.acquire(storageKey, claim))
      if (found.state !== 'acquired') return await yieldTo(asker, { ...found, storageKey })
      taken.add(storageKey)
      attempt = Math.max(attempt, found.attempt)
      steps = mergedSteps(found.steps, steps)
    }
    if (!(await copySteps(asker, held, steps))) return lost(claim)
    const raised = await raise(store, own, claim, withSteps(held, steps ?? []), attempt)
    if (raised.state !== 'acquired') return raised
    const rest = others.filter((key) => !taken.has(key))
    const rival = furthest(await lookAt(store, rest))
    if (rival !== null) return await yieldTo(asker, rival)
    for (const storageKey of taken) {
      await (store as Required<IdempotencyStore>).delete(storageKey)
      taken.delete(storageKey)
    }
    return raised
  } finally {
    for (const storageKey of taken) giveBack(storageKey)
  }
}

/** `false` when the own claim is lost. A store that keeps no steps has found none. */
async function copySteps(
  { store, keys, claim }: Asker,
  { steps: held = [] }: Acquired,
  steps: readonly StoredStep[] = []
): Promise<boolean> {
  const names = new Set(held.map(([name]) => name))
  for (const step of steps) {
    if (!names.has(step[0]) && !(await store.step?.(keys[0], claim.token, step))) return false
  }
  return true
}

/** Somebody has the own key now, who will be found when it is asked for again. */
function lost({ leaseMs }: Claim): Acquisition {
  return { state: 'running', fingerprint: '', leaseMs }
}
