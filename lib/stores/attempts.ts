import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, Claim, IdempotencyStore } from '../../types/index.js'

/*
 * A store counts attempts by itself, by takeovers: there is no other way to tell it of those that it has not seen.
 */

/** A claim that is ours. */
export type Acquired = Extract<Acquisition, { state: 'acquired' }>

/** The lease of a claim that is there to be taken over. */
const PASSING_MS = 1
/** For how long what is taken over is remembered, at least: should this process die here, the next one goes on from it. */
const REMEMBERED_MS = 60_000

/**
 * Raises the attempt of a claim that is ours, one takeover after the other, to the one given. Each leaves a moment in which
 * another may have the key: then what was found is the answer.
 */
export async function raise(
  store: IdempotencyStore,
  key: string,
  claim: Claim,
  held: Acquired,
  attempt: number
): Promise<Acquisition> {
  const heir = { ...claim, retainMs: Math.max(claim.retainMs, REMEMBERED_MS), takeover: true }
  let found: Acquisition = held
  for (let missing = attempt - held.attempt; missing > 0; missing--) {
    // Of a first attempt without steps this leaves nothing, of any other one what can be taken over at once.
    await store.release(key, claim.token)
    if (found.attempt === 1 && found.steps === undefined) {
      const passing = await store.acquire(key, { ...heir, token: randomUUID(), leaseMs: PASSING_MS })
      if (passing.state !== 'acquired') return passing
    }
    found = await lapsed(store, key, heir)
    if (found.state !== 'acquired') return found
  }
  // Once more by the same token: what counts are the times of the newest call.
  return store.acquire(key, claim)
}

/** Takes over what is about to lapse. */
async function lapsed(store: IdempotencyStore, key: string, heir: Claim): Promise<Acquisition> {
  for (;;) {
    const found = await store.acquire(key, heir)
    if (found.state !== 'running' || found.leaseMs > PASSING_MS) return found
    await sleep(PASSING_MS)
  }
}
