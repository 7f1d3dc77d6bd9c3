import type { RedisConnection } from './connection.js'

/* A Redis that evicts keys forgets replies, and is warned of. */

/**
 * Warns when the server evicts keys as soon as it is full: who loses a claim or a reply runs its handler again. A
 * server that does not tell, as an ACL or a provider may have it, is left alone.
 */
export async function warnOfEviction(connection: Pick<RedisConnection, 'config'>): Promise<void> {
  let settings: Map<unknown, unknown>
  try {
    settings = settingsOf(await connection.config('maxmemory*'))
  } catch {
    return
  }
  const policy = settings.get('maxmemory-policy')
  if (policy === undefined || policy === 'noeviction' || Number(settings.get('maxmemory')) === 0) return
  process.emitWarning(`Redis evicts keys when it is full (maxmemory-policy ${policy})`, {
    type: 'IdempotencyWarning',
    code: 'FST_IDEMPOTENCY_EVICTION',
    detail: 'A claim or reply that is evicted lets its handler run again. Use maxmemory-policy noeviction.'
  })
}

/**
 * A list of names and values in turn, or a map, as the protocol has it.
 * @throws when there is nothing, which tells nothing.
 */
function settingsOf(answer: unknown): Map<unknown, unknown> {
  if (answer instanceof Map) return answer
  if (!Array.isArray(answer)) return new Map(Object.entries(answer as object))
  const settings = new Map()
  for (let n = 0; n < answer.length; n += 2) settings.set(answer[n], answer[n + 1])
  return settings
}
