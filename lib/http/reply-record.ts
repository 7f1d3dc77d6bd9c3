import type { FastifyReply } from 'fastify'
import type { StoredHeader, StoredReply, Tombstone, TombstoneReason } from '../../types/index.js'
import { clock } from '../util/clock.js'
import type { Headers } from './headers.js'

/* What is stored of a reply: which of its headers, and what stands for one that cannot be kept. */

/**
 * Headers that belong to one connection, one client or one moment (RFC 9110 §7.6.1, RFC 9111 §3.1), beside
 * all of `proxy-*`.
 */
const NEVER_STORED: ReadonlySet<string> = new Set([
  'set-cookie',
  'connection',
  'keep-alive',
  'transfer-encoding',
  'content-length',
  'trailer',
  'upgrade',
  'date',
  'www-authenticate'
])

/** @param name in lower case */
export function isStorable(name: string): boolean {
  return !NEVER_STORED.has(name) && !name.startsWith('proxy-')
}

/** The headers that have come or changed since the snapshot. */
export function headersSince(
  before: Headers,
  reply: FastifyReply,
  { excludeHeaders, replayHeader }: { excludeHeaders: ReadonlySet<string>; replayHeader: string | null }
): StoredHeader[] {
  const stored: StoredHeader[] = []
  const now = reply.getHeaders()
  for (const name in now) {
    const value = now[name as keyof Headers]
    if (value === undefined || equal(value, before[name as keyof Headers])) continue
    if (!isStorable(name)) continue
    if (excludeHeaders.has(name) || name === replayHeader) continue
    stored.push([name, Array.isArray(value) ? value.map(String) : String(value)])
  }
  return stored
}

function equal(a: Headers[keyof Headers], b: Headers[keyof Headers]): boolean {
  if (!Array.isArray(a) || !Array.isArray(b)) return a === b
  return a.length === b.length && a.every((item, index) => item === b[index])
}

/** The record of a reply whose body is at hand. */
export function replyRecord(
  fingerprint: string,
  statusCode: number,
  headers: StoredHeader[],
  body: string | Buffer | null | undefined
): StoredReply {
  return {
    kind: 'reply',
    fingerprint,
    createdAt: clock.date(),
    statusCode,
    headers,
    body: typeof body === 'string' ? Buffer.from(body) : (body ?? Buffer.alloc(0)),
    text: typeof body === 'string'
  }
}

export function tombstone(fingerprint: string, reason: TombstoneReason): Tombstone {
  return { kind: 'tombstone', fingerprint, createdAt: clock.date(), reason }
}
