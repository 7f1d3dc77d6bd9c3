import { InvalidOption } from '../errors.js'

/**
 * Refuses what is none of a store's options.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION, which names those that it has
 */
export function onlyKnown(store: string, unknown: object, known: readonly string[]): void {
  for (const name of Object.keys(unknown)) {
    throw new InvalidOption(`${store} has no option "${name}"; it has ${known.join(', ')}`)
  }
}
