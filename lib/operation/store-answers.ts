import { validateHeaderName, validateHeaderValue } from 'node:http'
import type { Acquisition, StoredRecord, TransactionAcquisition } from '../../types/index.js'
import { UnreadableAnswer } from '../errors.js'
import { areHeaders, isReason, isStatus } from '../stores/record-codec.js'

// Stores are also other people's, and what they keep may have been damaged: what they say is looked at before it is
// believed. What no decision rests on, such as `createdAt`, is not.

/** Is this an answer to who asks for a key? */
export function isAcquisition(found: Acquisition | TransactionAcquisition | undefined | null): found is Acquisition {
  switch (found?.state) {
    case 'acquired':
      return isAttempt(found.attempt)
    case 'running':
      return typeof found.fingerprint === 'string' && found.leaseMs >= 0
    case 'abandoned':
      return typeof found.fingerprint === 'string' && isAttempt(found.attempt)
    case 'completed':
      return isRecord(found.record)
    default:
      return false
  }
}

/** Does an answer that is not one say at least that somebody has, or had, the key? */
export function isClaimedKey(found: unknown): boolean {
  const state = (found as { state?: unknown } | null | undefined)?.state
  return state === 'running' || state === 'completed' || state === 'abandoned'
}

/** @throws when it is neither. */
export function toBoolean(answer: boolean): boolean {
  if (typeof answer !== 'boolean') throw new UnreadableAnswer()
  return answer
}

function isAttempt(attempt: unknown): boolean {
  return Number.isInteger(attempt) && (attempt as number) >= 1
}

/** Can it be replayed, or is it a tombstone? */
export function isRecord(record: StoredRecord | undefined | null): boolean {
  if (typeof record?.fingerprint !== 'string') return false
  if (record.kind === 'tombstone') return isReason(record.reason)
  if (record.kind !== 'reply' || !isStatus(record.statusCode)) return false
  return Buffer.isBuffer(record.body) && typeof record.text === 'boolean' && canBeSent(record.headers)
}

/** Node throws for some headers, which would be an error of the server's own. */
function canBeSent(headers: unknown): boolean {
  if (!areHeaders(headers)) return false
  try {
    for (const [name, value] of headers) {
      validateHeaderName(name)
      if (typeof value === 'string') validateHeaderValue(name, value)
      else for (const item of value) validateHeaderValue(name, item)
    }
  } catch {
    return false
  }
  return true
}
