import type { Difference } from '../../types/index.js'

/*
 * A fingerprint is `<head><hint>.<payload>`. The head is a hash of what the request is for and who sent it, known as
 * soon as the request has headers; the hint, a few characters of the hash of the first alone, tells in which of the
 * two others differ. The payload's hash may be missing while it is not known.
 */
const SEPARATOR = '.'
/** Of the head without its hint, and of a payload. */
export const HASH_LENGTH = 22
export const HINT_LENGTH = 4

export function composeFingerprint(head: string, payload: string): string {
  return `${head}${SEPARATOR}${payload}`
}

/** In what two fingerprints differ; `null` where they agree in all that both know. */
export function difference(theirs: string, ours: string): Difference | null {
  if (theirs === ours || theirs === '' || ours === '') return null
  const [their, our] = [headIn(theirs), headIn(ours)]
  if (their !== our) return their.slice(HASH_LENGTH) === our.slice(HASH_LENGTH) ? 'credentials' : 'target'
  return knowsPayload(theirs) && knowsPayload(ours) ? 'payload' : null
}

/** From the one that says least of another request to the one that says most: under another secret all differ. */
const BY_CLOSENESS: readonly (Difference | null)[] = [null, 'payload', 'credentials', 'target']

/** The same, where the one of ours that theirs is to be compared with is not known: the one that comes closest. */
export function closestDifference(theirs: string, ours: readonly string[]): Difference | null {
  const closeness = ours.map((one) => BY_CLOSENESS.indexOf(difference(theirs, one)))
  return BY_CLOSENESS[Math.min(...closeness)] as Difference | null
}

function headIn(fingerprint: string): string {
  return fingerprint.slice(0, fingerprint.indexOf(SEPARATOR))
}

/** Does the fingerprint say anything of the payload? */
export function knowsPayload(fingerprint: string): boolean {
  return fingerprint !== '' && !fingerprint.endsWith(SEPARATOR)
}
