import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, Claim, IdempotencyStore } from '../../../types/index.js'
import { type Acquired, raise } from '../attempts.js'
import { mergedSteps, withSteps } from '../steps.js'
import { type Abandoned, bothAbandoned } from './answers.js'
import { type KnownClaims, leaseLeft } from './known-claims.js'

/*
 * One claim in two stores. `from` comes first, always, and nobody waits for `to` while holding `from`: who does not get
 * both gives back. So of those who claim in both, `from` decides at once who goes on, and none can block another.
 *
 * What is answered is in both stores before: a process that dies at any call leaves what nobody was told of, or what the
 * next one finds and brings in order.
 */

/** The lease under which a claim is completed in one store and then in the other. Hardly anybody has this one. */
export const COMPLETION_MS = 10_007
/** Who asks so soon after that began waits for its end. */
const COMPLETION_WINDOW_MS = 250
/** Between two looks at what somebody else is about to end. */
export const PAUSE_MS = 5
/** For how long these go on. */
export const PATIENCE_MS = 1_000
/** For how long a claim is remembered that takes over in order to put a record in its place. */
export const DAY_MS = 86_400_000

/** Claims that are held in two stores by the same token. */
export class DoubleClaims {
  readonly #from: IdempotencyStore
  readonly #to: IdempotencyStore
  readonly #known: KnownClaims

  constructor(from: IdempotencyStore, to: IdempotencyStore, known: KnownClaims) {
    this.#from = from
    this.#to = to
    this.#known = known
  }

  async acquire(key: string, claim: Readonly<Claim>): Promise<Acquisition> {
    for (;;) {
      const askedAt = performance.now()
      const found = await this.#acquireOnce(key, claim)
      if (found?.state === 'acquired') this.#known.add(key, claim, askedAt)
      if (found !== null) return found
    }
  }

  /**
   * One of the two stores does not know a claim any more, whose lease cannot have lapsed: it has lost its data, and the key
   * is claimed there anew. A lapsed one may have been taken over, and its loss is its owner's to notice.
   */
  async mend(key: string, token: string, lost: IdempotencyStore): Promise<boolean> {
    const known = this.#known.get(key, token)
    if (known === undefined || leaseLeft(known) <= 0) return false
    const kept = lost === this.#from ? this.#to : this.#from
    if (!(await kept.renew(key, token, known.leaseMs))) return false
    // This token has given it back: nothing was lost.
    if (await lost.release(key, token, true)) return false
    const again = { ...known.claim, leaseMs: known.leaseMs, takeover: false }
    for (const until = performance.now() + PATIENCE_MS; ; await sleep(PAUSE_MS)) {
      const found = await this.acquire(key, again)
      if (found.state === 'acquired') return true
      // In `from` that may be somebody who is about to find `to` taken, and to give `from` back.
      if (found.state !== 'running' || lost !== this.#from || performance.now() > until) break
    }
    // Nobody is to wait for the rest of a claim that is lost.
    await kept.release(key, token)
    return false
  }

  /** `null`: something has changed between the two stores, and has to be asked for once more. */
  async #acquireOnce(key: string, claim: Readonly<Claim>): Promise<Acquisition | null> {
    const inFrom = await this.#askFrom(key, claim)
    if (inFrom.state === 'abandoned') return this.#lookBehind(key, claim, inFrom)
    if (inFrom.state !== 'acquired') return inFrom
    const inTo = await this.#to.acquire(key, claim)
    return inTo.state === 'acquired' ? this.#align(key, claim, inFrom, inTo) : this.#concede(key, claim, inTo)
  }

  /** The completion of a claim that had lapsed is one step for who asks: it is waited for. */
  async #askFrom(key: string, claim: Readonly<Claim>): Promise<Acquisition> {
    for (;;) {
      const found = await this.#from.acquire(key, claim)
      const left = found.state === 'running' ? found.leaseMs : 0
      if (left > COMPLETION_MS || left <= COMPLETION_MS - COMPLETION_WINDOW_MS) return found
      await sleep(PAUSE_MS)
    }
  }

  /** What is abandoned in `from`, and must not be taken over, may be held or finished in `to`. */
  async #lookBehind(key: string, claim: Readonly<Claim>, inFrom: Abandoned): Promise<Acquisition | null> {
    const inTo = await this.#to.acquire(key, { ...claim, takeover: false })
    switch (inTo.state) {
      case 'running':
        return inTo
      case 'abandoned':
        return bothAbandoned(inFrom, inTo)
      case 'acquired':
        // There is nothing.
        await this.#to.release(key, claim.token, true)
        return inFrom
      case 'completed': {
        const heir = { ...claim, retainMs: Math.max(claim.retainMs, DAY_MS), takeover: true }
        const taken = await this.#from.acquire(key, heir)
        return taken.state === 'acquired' ? this.#concede(key, claim, inTo) : null
      }
    }
  }

  /**
   * Leaves the key to what holds it in `to`. A record was put there by somebody who died before it was in `from` as well, or
   * by who completes in `to` alone: before it is shown to anybody, it is put into `from`, or those who claim there alone would
   * run the handler again.
   */
  async #concede(key: string, { token }: Readonly<Claim>, inTo: Acquisition): Promise<Acquisition | null> {
    if (inTo.state !== 'completed') {
      await this.#from.release(key, token, true)
      return inTo
    }
    const { record, ttlMs } = inTo
    // What is left may be less than a millisecond, which is no time to a store.
    const isThere = await this.#from.complete(key, token, record, ttlMs === null ? null : Math.max(1, Math.ceil(ttlMs)))
    return isThere ? inTo : null
  }

  /**
   * Brings a claim that is held in both to the same attempt and the same steps in both, before its owner hears of it: whoever
   * takes over in one of them alone goes on from there.
   */
  async #align(key: string, claim: Readonly<Claim>, inFrom: Acquired, inTo: Acquired): Promise<Acquisition | null> {
    if (inFrom.attempt < inTo.attempt) {
      const raised = await raise(this.#from, key, claim, inFrom, inTo.attempt)
      if (raised.state !== 'acquired') return this.#lostFrom(key, claim)
      // Others have been there meanwhile.
      return raised.attempt > inTo.attempt ? null : this.#copySteps(key, claim, raised, inTo)
    }
    if (inFrom.attempt > inTo.attempt) {
      const raised = await raise(this.#to, key, claim, inTo, inFrom.attempt)
      if (raised.state !== 'acquired') return this.#concede(key, claim, raised)
      return raised.attempt > inFrom.attempt ? null : this.#copySteps(key, claim, inFrom, raised)
    }
    return this.#copySteps(key, claim, inFrom, inTo)
  }

  async #copySteps(key: string, claim: Readonly<Claim>, inFrom: Acquired, inTo: Acquired): Promise<Acquisition | null> {
    const steps = mergedSteps(inFrom.steps, inTo.steps)
    if (!(await copySteps(this.#to, key, claim, inTo, steps))) return null
    if (!(await copySteps(this.#from, key, claim, inFrom, steps))) return this.#lostFrom(key, claim)
    return withSteps<Acquisition>({ state: 'acquired', attempt: Math.max(inFrom.attempt, inTo.attempt) }, steps)
  }

  /** The key was lost in `from` on the way: who has it there must not wait for the rest in `to`. */
  async #lostFrom(key: string, { token }: Readonly<Claim>): Promise<null> {
    await this.#to.release(key, token, true)
    return null
  }
}

/** `false` when the claim is not ours any more. A store that keeps no steps has none to give, nor to lose. */
async function copySteps(
  store: IdempotencyStore,
  key: string,
  { token }: Readonly<Claim>,
  held: Acquired,
  steps: ReturnType<typeof mergedSteps>
): Promise<boolean> {
  const names = new Set(held.steps?.map(([name]) => name))
  for (const step of steps) {
    if (names.has(step[0]) || store.step === undefined) continue
    if (!(await store.step(key, token, step))) return false
  }
  return true
}
