import type { Acquisition, StoredHeader, StoredRecord, TombstoneReason } from '../../types/index.js'
import { originOf } from '../operation/origin.js'

/* What is in a store, for people: fingerprints and tokens left out. */

/** An operation without a result. */
export interface TestClaim {
  /** A hash of the key and its scope. */
  readonly storageKey: string
  /**
   * `'abandoned'`: its owner has died. `'ended'`: its owner has given it back, and a retry goes on with it, because a step is
   * finished or an earlier attempt was interrupted.
   */
  readonly state: 'running' | 'abandoned' | 'ended'
  readonly attempt: number
  /** The URL pattern of its route; `'run'` for `app.idempotency.run`. `null` where an `EncryptedStore` hides it. */
  readonly route: string | null
  /** When the attempt began, by `Date`. `null` where an `EncryptedStore` hides it. */
  readonly startedAt: Date | null
  /** The names of its finished steps. */
  readonly steps: readonly string[]
}

/** A reply that is replayed. */
export interface TestReply {
  /** A hash of the key and its scope. */
  readonly storageKey: string
  readonly kind: 'reply'
  /** The URL pattern of its route; `'run'` for `app.idempotency.run`. `null` where an `EncryptedStore` hides it. */
  readonly route: string | null
  readonly statusCode: number
  /** By their lower-case names. */
  readonly headers: Readonly<Record<string, string | readonly string[]>>
  /** Text, as JSON is; bytes where the handler has sent bytes or a stream. */
  readonly body: string | Buffer
  /** What is left of its life in milliseconds, `null` for ever. */
  readonly ttlMs: number | null
}

/** A finished operation without a reply: duplicates get 409 NOT_REPLAYABLE. */
export interface TestTombstone {
  /** A hash of the key and its scope. */
  readonly storageKey: string
  readonly kind: 'tombstone'
  /** The URL pattern of its route; `'run'` for `app.idempotency.run`. `null` where an `EncryptedStore` hides it. */
  readonly route: string | null
  /** Why there is none. */
  readonly reason: TombstoneReason
  /** What is left of its life in milliseconds, `null` for ever. */
  readonly ttlMs: number | null
}

/** What is stored of a finished operation. */
export type TestRecord = TestReply | TestTombstone

/** What a store says of a key with nothing finished; `null` where there is something. */
export function claimOf(storageKey: string, found: Acquisition | null): TestClaim | null {
  if (found?.state !== 'running' && found?.state !== 'abandoned') return null
  const { fingerprint, attempt = 1, steps = [] } = found
  const origin = originOf(fingerprint)
  return {
    storageKey,
    state: found.state === 'abandoned' && found.ended ? 'ended' : found.state,
    attempt,
    route: origin?.route ?? null,
    startedAt: origin && new Date(origin.startedAt),
    steps: steps.map(([name]) => name)
  }
}

/** What a store says of a key that is finished; `null` where it is not. */
export function recordOf(storageKey: string, found: Acquisition | null): TestRecord | null {
  if (found?.state !== 'completed') return null
  const { record, ttlMs } = found
  const route = originOf(record.fingerprint)?.route ?? null
  if (record.kind === 'tombstone') return { storageKey, kind: 'tombstone', route, reason: record.reason, ttlMs }
  const { statusCode } = record
  return { storageKey, kind: 'reply', route, statusCode, headers: headersOf(record), body: bodyOf(record), ttlMs }
}

function headersOf({ headers }: { headers: readonly StoredHeader[] }): TestReply['headers'] {
  return Object.fromEntries(headers)
}

function bodyOf({ body, text }: Extract<StoredRecord, { kind: 'reply' }>): string | Buffer {
  return text ? body.toString() : body
}
