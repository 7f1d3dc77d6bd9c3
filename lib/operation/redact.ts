import type { FastifyBaseLogger } from 'fastify'
import type { StoredRecord, StoredReply } from '../../types/index.js'
import { isRecord } from './store-answers.js'

/**
 * What the option `redact` makes of a reply before it is stored. It may change its copy. Where it fails, or makes no reply,
 * nothing of the reply is kept: a tombstone says that the operation has run.
 */
export function redacted(
  record: StoredReply,
  redact: (reply: StoredReply) => StoredReply,
  log: FastifyBaseLogger
): StoredRecord {
  const { fingerprint, createdAt } = record
  try {
    const made: StoredReply = redact({
      ...record,
      headers: structuredClone(record.headers),
      body: Buffer.from(record.body)
    })
    const body: unknown = made?.body
    const kept: StoredReply = {
      ...made,
      kind: 'reply',
      fingerprint,
      createdAt,
      body: typeof body === 'string' ? Buffer.from(body) : made.body
    }
    if (isRecord(kept)) return kept
    throw new TypeError('option "redact" must return a reply with statusCode, headers, body and text')
  } catch (error) {
    log.error({ err: error }, 'idempotency option redact failed: the reply is not stored')
    return { kind: 'tombstone', reason: 'redact-failed', fingerprint, createdAt }
  }
}
