import { randomFillSync } from 'node:crypto'

/** RFC 4086: 128 bits are beyond guessing, and beyond meeting twice. */
const TOKEN_BYTES = 16

const pool = Buffer.allocUnsafeSlow(TOKEN_BYTES * 256)
let used = pool.length

/** A unique owner token. Random bytes are drawn for many at a time. */
export function newToken(): string {
  if (used === pool.length) {
    randomFillSync(pool)
    used = 0
  }
  const start = used
  used += TOKEN_BYTES
  return pool.toString('base64url', start, used)
}
