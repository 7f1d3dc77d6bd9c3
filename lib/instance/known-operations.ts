import type {
  Acquisition,
  IdempotencyStore,
  KeyFormat,
  KnownOperation,
  ListedKey,
  ListedKind,
  ListedOperation,
  ListedPage,
  OperationKey,
  OperationOrigin,
  OperationSelector
} from '../../types/index.js'
import { InvalidOption } from '../errors.js'
import type { Hashes } from '../operation/hashes.js'
import { originOf } from '../operation/origin.js'
import { furthest } from '../operation/rotation.js'
import type { Registration } from '../registration.js'
import { selectedKey } from '../selected-key.js'
import { clock } from '../util/clock.js'

/* What the stores of a registration know of its operations, in the words of `app.idempotency`. */

/** What a store has under a key. */
export type Found = Exclude<Acquisition, { state: 'acquired' }>

/** Where an operation is, and how. */
export interface Place {
  readonly store: IdempotencyStore
  readonly storageKey: string
  readonly found: Found
}

/** A store that can list what it has. */
export type ListingStore = IdempotencyStore & Required<Pick<IdempotencyStore, 'list'>>

export class KnownOperations {
  readonly registration: Registration
  readonly #keyFormat: KeyFormat | undefined

  constructor(registration: Registration) {
    this.registration = registration
    this.#keyFormat = registration.options.routeDefaults.keyFormat
  }

  /**
   * Under the secret that is in use, and, where there are several, under the others.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION
   */
  storageKeys(key: OperationKey, { scope }: OperationSelector = {}): [string, ...string[]] {
    if (typeof key === 'string') {
      const under = (hashes: Hashes) => selectedKey(key, scope, this.#keyFormat, hashes)
      const [first, ...others] = this.registration.hashes
      return [under(first), ...others.map(under)]
    }
    if (typeof key?.storageKey === 'string') return [key.storageKey]
    throw new InvalidOption("an operation is named by its client's key, or by { storageKey }")
  }

  /** Where an operation is, and how. */
  async find(storageKeys: readonly string[]): Promise<Place | null> {
    for (const store of this.#with('get')) {
      const looks = storageKeys.map(async (storageKey): Promise<Place[]> => {
        const found = await store.get(storageKey)
        return found === null || found.state === 'acquired' ? [] : [{ store, storageKey, found }]
      })
      const places = (await Promise.all(looks)).flat()
      const counts = furthest(places.map(({ found }) => found))
      const place = places.find(({ found }) => found === counts)
      if (place !== undefined) return place
    }
    return null
  }

  async get(storageKeys: readonly string[]): Promise<KnownOperation | null> {
    const known = await this.find(storageKeys)
    if (known === null) return null
    const { storageKey, found } = known
    const origin = this.#origin(storageKey, fingerprintOf(found))
    return found.state === 'abandoned'
      ? { ...origin, ...found, ...this.#ownerSeen(found, origin) }
      : { ...origin, ...found }
  }

  /** What all stores list, page by page, with the store of each page. @throws where a store has no `list`. */
  async *pages(kinds: readonly ListedKind[]): AsyncGenerator<[ListingStore, ListedPage]> {
    for (const store of this.#with('list')) {
      let cursor: string | null = null
      do {
        const page: ListedPage = await store.list(kinds, cursor)
        yield [store, page]
        cursor = page.cursor
      } while (cursor !== null)
    }
  }

  /** A key of a list as `app.idempotency.list` gives it. */
  listed(found: ListedKey): ListedOperation {
    const origin = this.#origin(found.key, found.fingerprint)
    switch (found.state) {
      case 'running':
        return { ...origin, state: 'running', attempt: found.attempt, leaseMs: found.leaseMs }
      case 'abandoned': {
        const { attempt, ended } = found
        return { ...origin, state: 'abandoned', attempt, ...(ended && { ended }), ...this.#ownerSeen(found, origin) }
      }
      case 'completed': {
        const { createdAt, outcome, ttlMs } = found
        const what = typeof outcome === 'number' ? { statusCode: outcome } : { reason: outcome }
        return { ...origin, state: 'completed', createdAt, ...what, ttlMs }
      }
    }
  }

  /** Is it the scope's? */
  isOf({ key, fingerprint }: ListedKey, scope: string): boolean {
    const caller = originOf(fingerprint)?.caller
    return this.registration.hashes.some((hashes) => hashes.mark(key, scope) === caller)
  }

  #origin(storageKey: string, fingerprint: string): OperationOrigin {
    const origin = originOf(fingerprint)
    return origin === null ? { storageKey } : { storageKey, route: origin.route, startedAt: origin.startedAt }
  }

  /** An owner renews its lease while it lives: it was last seen a lease before the end of that, unless it has ended it. */
  #ownerSeen(
    { lapsedMs, ended }: { lapsedMs?: number; ended?: true },
    { route }: OperationOrigin
  ): { ownerSeenAt?: number } {
    if (lapsedMs === undefined) return {}
    const lapsedAt = Math.round(clock.date() - lapsedMs)
    return { ownerSeenAt: ended ? lapsedAt : lapsedAt - this.registration.leaseOf(route) }
  }

  #with<M extends 'get' | 'list'>(method: M): (IdempotencyStore & Required<Pick<IdempotencyStore, M>>)[] {
    const { stores } = this.registration
    const able = stores.filter((store) => store[method] !== undefined)
    // What cannot be listed must not look as if it were not there.
    if (able.length === 0 || (method === 'list' && able.length < stores.length)) {
      throw new Error(`This idempotency store has no ${method}()`)
    }
    return able as never
  }
}

export function fingerprintOf(found: Found): string {
  return found.state === 'completed' ? found.record.fingerprint : found.fingerprint
}
