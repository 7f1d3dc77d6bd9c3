import type { IdempotencyStore } from '../../types/index.js'
import type { Registration } from '../registration.js'
import { withTimeout } from '../util/timeout.js'

/* `app.idempotency.healthy`: whether requests with a key would be served. */

/** A key that no request has: storage keys are longer. */
const PROBE = 'health'

export async function isHealthy({ stores, options }: Registration): Promise<boolean> {
  const { storeTimeout = 2_000 } = options.routeDefaults
  const answers = await Promise.all(stores.map((store) => answersIn(store, storeTimeout)))
  return answers.every(Boolean)
}

async function answersIn(store: IdempotencyStore, limit: number): Promise<boolean> {
  // What cannot be looked at without a claim is taken for well: its requests will tell.
  const { get } = store
  if (get === undefined) return true
  try {
    await withTimeout(limit, () => get.call(store, PROBE))
    return true
  } catch {
    return false
  }
}
