/** The longest lease, and the longest memory of a claim: their sum still has a date, in the year 280,000 or so. */
const LONGEST_MS = 4e15

/** A number of milliseconds, or the longest that stores in databases can add to the present. */
export function limited(ms: number): number {
  return Math.min(ms, LONGEST_MS)
}
