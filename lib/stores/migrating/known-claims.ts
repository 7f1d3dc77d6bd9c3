import type { Claim } from '../../../types/index.js'

/* What this process remembers of the claims that it has made in two stores. */

/** More claims than these are not remembered: the oldest is forgotten, and is not mended any more. */
const MOST_CLAIMS = 100_000

/** A claim that was made here, and may still be held. */
export interface KnownClaim {
  readonly claim: Readonly<Claim>
  /** When the stores were last asked to begin the lease: it ends no sooner than a lease later. Monotonic milliseconds. */
  leasedAt: number
  /** For how long. */
  leaseMs: number
  /** The second store has been given the record, and may have it. */
  isCompleting: boolean
}

/** The claims of this process, by their keys. */
export class KnownClaims {
  readonly #claims = new Map<string, KnownClaim>()

  get(key: string, token: string): KnownClaim | undefined {
    const known = this.#claims.get(key)
    return known?.claim.token === token ? known : undefined
  }

  add(key: string, claim: Readonly<Claim>, leasedAt: number): void {
    const isCompleting = this.get(key, claim.token)?.isCompleting ?? false
    this.#claims.delete(key)
    this.#claims.set(key, { claim, leasedAt, leaseMs: claim.leaseMs, isCompleting })
    if (this.#claims.size <= MOST_CLAIMS) return
    for (const oldest of this.#claims.keys()) {
      this.#claims.delete(oldest)
      break
    }
  }

  delete(key: string, token: string): void {
    if (this.get(key, token) !== undefined) this.#claims.delete(key)
  }
}

/** How many milliseconds of the lease are left, at least. What is not known may have lapsed. */
export function leaseLeft(known: KnownClaim | undefined): number {
  return known === undefined ? 0 : known.leasedAt + known.leaseMs - performance.now()
}
