import { Timer } from '../util/timer.js'

/* A claim is renewed for as long as its handler runs. */

/** A claim that has to be renewed when it lives long enough. */
export interface Renewable {
  readonly lease: number
  /** The next renewal, while one is due. */
  renewal: Timer<Renewable> | null
  /** Tells the store once, and schedules the next renewal. */
  renew(): void
}

/** A lease is renewed after this part of it: two renewals may fail before it lapses. */
const RENEWALS_PER_LEASE = 3

/** Renews the claim once, when a third of its lease has passed. */
export function scheduleRenewal(claim: Renewable): void {
  claim.renewal?.cancel()
  claim.renewal = new Timer<Renewable>(claim.lease / RENEWALS_PER_LEASE, renew, claim, false)
}

export function cancelRenewal(claim: Renewable): void {
  claim.renewal?.cancel()
  claim.renewal = null
}

function renew(claim: Renewable): void {
  claim.renewal = null
  claim.renew()
}
