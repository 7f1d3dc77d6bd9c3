import type { Difference } from '../../types/index.js'

/*
 * A fingerprint is `<head><hint>.<payload>`. The head is a hash of what the request is for and who sent it, known as
 * soon as the request has headers; the hint, a few characters of the hash of the first alone, tells in which of the
 * two others differ. The payload's hash may be missing while it is not known.
 */
const SEPARATOR = '.'
const HEAD_LENGTH = 22
export const HINT_LENGTH = 4

export function composeFingerprint(head: string, payload: string): string {
  return `${head}${SEPARATOR}${payload}`
}

/** In what two fingerprints differ; `null` where they agree in all that both know. */
export function difference(theirs: string, ours: string): Difference | null {
  if (theirs === ours || theirs === '' || ours === '') return null
  const [their, our] = [headIn(theirs), headIn(ours)]
  if (their !== our) return their.slice(HEAD_LENGTH) === our.slice(HEAD_LENGTH) ? 'credentials' : 'target'
  return knowsPayload(theirs) && knowsPayload(ours) ? 'payload' : null
}

function headIn(fingerprint: string): string {
  return fingerprint.slice(0, fingerprint.indexOf(SEPARATOR))
}

/** Does the fingerprint say anything of the payload? */
export function knowsPayload(fingerprint: string): boolean {
  return fingerprint !== '' && !fingerprint.endsWith(SEPARATOR)
}
