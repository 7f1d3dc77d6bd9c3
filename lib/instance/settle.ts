import { validateHeaderName, validateHeaderValue } from 'node:http'
import type { FastifyBaseLogger } from 'fastify'
import type { IdempotencyStore, Outcome, Settlement, StoredHeader, StoredRecord } from '../../types/index.js'
import { InvalidOption, NotSettled } from '../errors.js'
import { isStorable } from '../http/reply-record.js'
import { originOf } from '../operation/origin.js'
import { tell } from '../operation/report.js'
import { StoreContext } from '../operation/store-context.js'
import { clock } from '../util/clock.js'
import { describe } from '../util/describe.js'
import { type Found, fingerprintOf, type KnownOperations } from './known-operations.js'

/* `app.idempotency.settle`: a person, or a job, says what has become of an operation that nobody is running. */

/** @throws FST_IDEMPOTENCY_SETTLE, FST_IDEMPOTENCY_INVALID_OPTION */
export async function settle(
  known: KnownOperations,
  storageKeys: readonly string[],
  outcome: Outcome,
  log: FastifyBaseLogger
): Promise<void> {
  const makeRecord = recordMaker(outcome)
  const place = await known.find(storageKeys)
  if (place === null) throw new NotSettled('nothing is known of it. Is it another key, or another scope?')
  const { store, storageKey, found } = place
  const { live } = StoreContext.of(store)
  if (found.state === 'running' || storageKeys.some((key) => live.has(key))) throw new NotSettled('it is running')
  if (found.state === 'completed' && found.record.kind === 'reply') throw new NotSettled('it has a reply')
  const fingerprint = fingerprintOf(found)
  const { ttl = 86_400_000 } = known.registration.options.routeDefaults
  const settlement = makeRecord === null ? 'ended' : { record: makeRecord(fingerprint), ttlMs: ttl }
  if (!(await carryOut(store, storageKey, found, settlement))) throw new NotSettled('it has changed meanwhile')
  const route = originOf(fingerprint)?.route ?? ''
  const attempt = found.state === 'abandoned' ? found.attempt : 0
  tell({ request: null, log, storageKey, policy: { route }, attempt }, 'settled')
}

function carryOut(store: IdempotencyStore, key: string, found: Found, settlement: Settlement): Promise<boolean> {
  // A tombstone has no attempt to go on from: the next request is as good as the first.
  if (found.state === 'completed' && settlement === 'ended') {
    if (store.delete === undefined) throw new Error('This idempotency store has no delete()')
    return store.delete(key, true)
  }
  if (store.settle === undefined) throw new Error('This idempotency store has no settle()')
  return store.settle(key, fingerprintOf(found), settlement)
}

/** What is to be recorded; `null` for nothing, because the handler is to run. */
function recordMaker(outcome: Outcome): ((fingerprint: string) => StoredRecord) | null {
  const createdAt = clock.date()
  if (outcome === 'rerun') return null
  if (outcome === 'never') return (fingerprint) => ({ kind: 'tombstone', reason: 'settled', fingerprint, createdAt })
  const { statusCode, headers = {}, body } = outcome?.reply ?? {}
  if (!Number.isInteger(statusCode) || (statusCode as number) < 200 || (statusCode as number) > 599) {
    const got = outcome?.reply === undefined ? outcome : statusCode
    throw new InvalidOption(
      `settle() takes 'rerun', 'never' or { reply: { statusCode, headers, body } }, with a status of 200 to 599, got ${describe(got)}`
    )
  }
  const stored = headersOf(headers)
  const isText = typeof body === 'string'
  const isJson = !isText && body !== undefined && body !== null && !ArrayBuffer.isView(body)
  const type = isJson ? 'application/json; charset=utf-8' : isText ? 'text/plain; charset=utf-8' : null
  if (type !== null && !stored.some(([name]) => name === 'content-type')) stored.push(['content-type', type])
  return (fingerprint) => ({
    kind: 'reply',
    fingerprint,
    createdAt,
    statusCode: statusCode as number,
    headers: stored,
    body: bytesOf(body),
    text: isText || isJson
  })
}

function bytesOf(body: unknown): Buffer {
  if (body === undefined || body === null) return Buffer.alloc(0)
  if (ArrayBuffer.isView(body)) return Buffer.from(new Uint8Array(body.buffer, body.byteOffset, body.byteLength))
  return Buffer.from(typeof body === 'string' ? body : JSON.stringify(body))
}

function headersOf(headers: Readonly<Record<string, string | readonly string[]>>): StoredHeader[] {
  return Object.entries(headers).map(([name, value]): StoredHeader => {
    const values = [value].flat().map(String)
    try {
      validateHeaderName(name)
      for (const item of values) validateHeaderValue(name, item)
    } catch {
      throw new InvalidOption(`settle() takes headers that HTTP can carry; "${name}" is none`)
    }
    if (!isStorable(name.toLowerCase()))
      throw new InvalidOption(`settle() takes no header "${name}", which is never stored`)
    return [name.toLowerCase(), typeof value === 'string' ? value : values]
  })
}
