import type { FastifyRequest } from 'fastify'
import { isClientError, ScopeFailed } from '../errors.js'
import type { Policy } from '../options.js'

/** Who asks, as the application says: keys of different scopes are different keys. */
export async function scopeOf(request: FastifyRequest, scope: NonNullable<Policy['scope']>): Promise<string> {
  let value: unknown
  try {
    value = await scope(request)
  } catch (cause) {
    // An answer to the client, such as 403 for somebody who is no member of the account.
    if (isClientError(cause)) throw cause
    throw new ScopeFailed('the option "scope" failed', { cause })
  }
  if (typeof value === 'bigint' || Number.isFinite(value)) return String(value)
  if (typeof value === 'string' && !NO_NAMES.has(value)) return value
  throw new ScopeFailed('the option "scope" gave nothing')
}

/** What comes of nothing in a template or by String(): everybody's scope would be the same. */
const NO_NAMES: ReadonlySet<unknown> = new Set(['', 'undefined', 'null', '[object Object]'])
