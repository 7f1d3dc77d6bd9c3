import { randomUUID } from 'node:crypto'
import type { Claim, IdempotencyStore } from '../../../types/index.js'
import { COMPLETION_MS, DAY_MS } from './claiming.js'

/*
 * To forget what nobody is running, in two stores, without ever forgetting one half of what somebody is.
 *
 * What is unfinished is claimed in `from` first: so nobody who asks `from` begins, or is between the halves of a completion,
 * while `to` forgets the key. Of a record in `from` that is known already. Who claims in `to` alone is left there, and then
 * `from` is given back as it was found. A process that dies on the way leaves what is abandoned in `from`: the key can be
 * deleted again when that claim has lapsed.
 */

type Deletable = IdempotencyStore & Required<Pick<IdempotencyStore, 'delete'>>

export async function deleteUnlessRunning(from: Deletable, to: Deletable, key: string): Promise<boolean> {
  const mine = { token: randomUUID(), fingerprint: '', leaseMs: COMPLETION_MS, retainMs: DAY_MS, takeover: true }
  try {
    const inFrom = await from.acquire(key, mine)
    if (inFrom.state === 'running' || inFrom.state === 'abandoned') return false
    const wasInTo = await to.delete(key, true)
    if (!wasInTo && (await isHeld(to, key, mine))) {
      if (inFrom.state === 'acquired') await from.release(key, mine.token, true)
      return false
    }
    if (inFrom.state === 'completed') return (await from.delete(key, true)) || wasInTo
    return (await forget(from, key, mine)) && (wasInTo || inFrom.attempt > 1)
  } catch (error) {
    // It may be deleted again at once.
    await Promise.allSettled([from, to].map((store) => store.release(key, mine.token, true)))
    throw error
  }
}

/** Does anything hold the key? Nothing is left behind where nothing does. */
async function isHeld(store: IdempotencyStore, key: string, mine: Claim): Promise<boolean> {
  const found = await store.acquire(key, { ...mine, retainMs: 0, takeover: false })
  if (found.state !== 'acquired') return true
  await store.release(key, mine.token, true)
  return false
}

/** Gives a claim back that is not to be remembered: only what is still ours is forgotten. */
async function forget(store: IdempotencyStore, key: string, mine: Claim): Promise<boolean> {
  const found = await store.acquire(key, { ...mine, retainMs: 0, takeover: false })
  return found.state === 'acquired' && store.release(key, mine.token)
}
