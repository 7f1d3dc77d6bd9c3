import { Deadlines } from '../util/deadlines.js'

/** A claim that has to be renewed when it lives long enough. */
export interface Renewable {
  readonly lease: number
  /** Tells the store once, and asks to be kept alive again. */
  renew(): void
}

/** A lease is renewed after this part of it: two renewals may fail before it lapses. */
const RENEWALS_PER_LEASE = 3

// One timer for all claims with the same lease; there are as many as `lease` options.
const renewals = new Map<number, Deadlines<Renewable>>()

function renewalsOf(lease: number): Deadlines<Renewable> {
  let deadlines = renewals.get(lease)
  if (deadlines === undefined) {
    deadlines = new Deadlines(lease / RENEWALS_PER_LEASE, (claim) => claim.renew(), false)
    renewals.set(lease, deadlines)
  }
  return deadlines
}

/** Renews the claim once, when a third of its lease has passed. A claim that ends before costs nothing more. */
export function keepAlive(claim: Renewable): void {
  renewalsOf(claim.lease).add(claim)
}

export function letGo(claim: Renewable): void {
  renewalsOf(claim.lease).delete(claim)
}
