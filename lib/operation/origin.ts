import { hash } from 'node:crypto'

/*
 * What a store keeps as the fingerprint of a claim or a record: `<fingerprint>~<startedAt>~<caller>~<route>`. Behind what is
 * compared stands what is told to people: when the attempt began, in milliseconds since the epoch, to the base of 36; a mark
 * of who asked, empty without a scope; and the route. Stores carry one text, and need not know.
 */

const SEPARATOR = '~'
/** 12 bytes in base64url. */
export const MARK_LENGTH = 16

/** Where a claim or a record comes from. */
export interface Origin {
  /** When the attempt began. Wall-clock milliseconds since the epoch. */
  readonly startedAt: number
  /** Of `Hashes.mark`; empty without a scope. */
  readonly caller: string
  /** The URL pattern of the route; `'run'` for `app.idempotency.run`. */
  readonly route: string
}

/** The fingerprint as stores keep it. */
export function withOrigin(fingerprint: string, { startedAt, caller, route }: Origin): string {
  return `${fingerprint}${SEPARATOR}${startedAt.toString(36)}${SEPARATOR}${caller}${SEPARATOR}${route}`
}

/** What is compared of a fingerprint that a store has kept. */
export function withoutOrigin(stored: string): string {
  const end = stored.indexOf(SEPARATOR)
  return end === -1 ? stored : stored.slice(0, end)
}

/** Where it comes from; `null` where it does not say so. */
export function originOf(stored: string): Origin | null {
  const [, startedAt = '', caller = '', ...route] = stored.split(SEPARATOR)
  const time = Number.parseInt(startedAt, 36)
  if (route.length === 0 || !Number.isFinite(time)) return null
  return { startedAt: time, caller, route: route.join(SEPARATOR) }
}

/**
 * Tells whether a key is of a scope, to who knows the scope. It is another for each key, so that the keys of one caller
 * have nothing in common for others.
 */
export function markOf(storageKey: string, scope: string | null): string {
  if (scope === null) return ''
  return hash('sha256', JSON.stringify(['caller', storageKey, scope]), 'base64url').slice(0, MARK_LENGTH)
}
