import type { Acquisition, Claim, IdempotencyStore, StoredStep } from '../../types/index.js'
import { abandoned, answers, claim, equal, FRESH, hasSteps, newKey, take, until } from './fixtures.js'
import { type HarnessWith, shown } from './harness.js'

// What cases about steps have in common.

export type Store = HarnessWith<'step'>['store']

export const STEPS: readonly StoredStep[] = [
  ['account', '{"id":1}'],
  ['charge', '"ch_1"'],
  ['receipt', 'null']
]
export const [FIRST, SECOND, THIRD] = STEPS as [StoredStep, StoredStep, StoredStep]

export async function keep(store: Store, key: string, token: string, ...steps: readonly StoredStep[]): Promise<void> {
  for (const step of steps) equal(await store.step(key, token, step), true, `step ${shown(step[0])}`)
}

/** Claims a free key and keeps steps with it, and returns the owner's token. */
export async function begun(
  store: Store,
  key: string,
  changes: Partial<Claim> = {},
  steps: readonly StoredStep[] = [FIRST]
): Promise<string> {
  const token = await take(store, key, changes)
  await keep(store, key, token, ...steps)
  return token
}

/** Lets a lease lapse. */
export async function lapse(store: IdempotencyStore, key: string, token: string): Promise<void> {
  equal(await store.renew(key, token, 1), true, 'renew')
  await abandoned(store, key)
}

/** Takes over what is abandoned, as soon as it may be. */
export async function takeOver(
  store: IdempotencyStore,
  key: string,
  attempt: number,
  steps: readonly StoredStep[]
): Promise<string> {
  const heir = claim({ fingerprint: `attempt ${attempt}`, takeover: true })
  const taken = async () => {
    const found = await store.acquire(key, heir)
    return found.state !== 'abandoned' && found
  }
  const found = (await until(taken, { message: 'what is abandoned to be taken over' })) as Acquisition
  answers(found, { state: 'acquired', attempt })
  hasSteps(found, steps, 'the takeover')
  return heir.token
}

/** Steps with these names and results, kept by both clients in turn, come back as they are. */
export async function comeBack({ store, second }: HarnessWith<'step'>, steps: readonly StoredStep[]): Promise<void> {
  const key = newKey()
  const token = await take(store, key)
  for (const [n, step] of steps.entries()) await keep(n % 2 === 0 ? store : second, key, token, step)
  await lapse(second, key, token)
  await takeOver(store, key, 2, steps)
}

/** Waits until a key is free, and sees that nothing is left of its steps. */
export async function forgotten(store: IdempotencyStore, key: string): Promise<void> {
  const next = claim()
  const acquired = async () => {
    const found = await store.acquire(key, next)
    return found.state === 'acquired' && { found }
  }
  const { found } = (await until(acquired, { message: 'a claim with steps to be forgotten' })) as { found: Acquisition }
  answers(found, FRESH, 'a key that was forgotten')
  hasSteps(found, [], 'a key that was forgotten')
}
