import type { IdempotencyRouteOptions } from '../types/index.js'
import type { Checked } from './option-rules.js'
import { warn } from './warnings.js'

/** Numbers of seconds: half an hour, one, two, six and twelve hours, a day, two, three, seven, fourteen and thirty. */
const SECONDS: ReadonlySet<number> = new Set([
  ...[1_800, 3_600, 7_200, 21_600, 43_200],
  ...[86_400, 172_800, 259_200, 604_800, 1_209_600, 2_592_000]
])

/** Which numbers look like seconds: a store may well get half a second to answer, but nobody keeps a reply so short. */
const SECONDS_LIKE: Record<'ttl' | 'lease' | 'waitTimeout' | 'storeTimeout', (n: number) => boolean> = {
  ttl: (n) => n < 1_000 || SECONDS.has(n),
  lease: (n) => n < 1_000 || SECONDS.has(n),
  waitTimeout: (n) => n <= 120,
  storeTimeout: (n) => n <= 60
}

type RouteOptions = Checked<IdempotencyRouteOptions>

/** Warns of durations that are allowed and yet hardly meant. Those of a route only where it has its own. */
export function warnOfDurations(own: RouteOptions, defaults: RouteOptions, where: string): void {
  for (const name of ['ttl', 'lease', 'waitTimeout', 'storeTimeout'] as const) {
    const value = own[name]
    if (typeof value === 'number' && SECONDS_LIKE[name](value)) {
      warn(
        'FST_IDEMPOTENCY_DURATION',
        `option "${name}"${where} is ${value} milliseconds: if ${value} seconds are meant, it is ${value * 1_000}`
      )
    }
  }
  if (own.lease === undefined && own.storeTimeout === undefined) return
  const { lease = 30_000, storeTimeout = 2_000 } = { ...defaults, ...own }
  if (lease < 3 * storeTimeout) {
    warn(
      'FST_IDEMPOTENCY_DURATION',
      `option "lease"${where} is ${lease}, less than 3 × storeTimeout (${storeTimeout}): ` +
        'a store that is slow once lets a claim lapse while its handler runs'
    )
  }
}
