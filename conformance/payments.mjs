// What every server here does, whatever it is built with: a small payments API. A server takes a request apart as its
// framework does, calls `run`, and sends what that gives; nothing in here knows about idempotency keys.

import { setTimeout as sleep } from 'node:timers/promises'

/** The routes of POST that are protected in every server. */
export const PATHS = ['/charges', '/refunds', '/receipts', '/exports', '/reports']
/** One more, where a route can have a lifetime of its own. */
export const EXPIRING = '/expiring'
export const LIFETIME_MS = 1_000

/**
 * Who sends the request: `alice`, `bob`, or nobody (a 401).
 * @param {string | undefined} authorization The header.
 * @returns {string | undefined}
 */
export function callerOf(authorization) {
  return /^Bearer (alice|bob)$/.exec(authorization ?? '')?.[1]
}

/**
 * @typedef {object} Reply
 * @property {number} status
 * @property {Record<string, string>} headers Of JSON, without its content-type.
 * @property {object | Buffer | AsyncGenerator<string>} body JSON, bytes, or a stream of text.
 */

/** How often a handler has been started. A process has one API. */
let executions = 0
export const count = () => ({ count: executions })

/**
 * The handler of a route: counts an execution, takes its time, and replies or throws.
 * @param {string} path
 * @param {{ amount?: number, currency?: string, processingMs?: number, fail?: boolean }} [body] Parsed.
 * @returns {Promise<Reply>}
 */
export async function run(path, { amount, currency, processingMs = 0, fail = false } = {}) {
  const id = `${path.slice(1, 3)}_${++executions}`
  if (processingMs > 0) await sleep(processingMs)
  if (fail) throw new Error('The bank does not answer')
  switch (path) {
    case '/receipts':
      return reply(Buffer.from(Array.from({ length: 256 }, (_, byte) => byte)), 'application/octet-stream')
    case '/exports':
      return reply(lines(id), 'text/csv; charset=utf-8')
    case '/reports':
      return reply({
        id,
        entries: Array.from({ length: 4_000 }, (_, n) => ({ n, amount, currency, note: 'x'.repeat(28) }))
      })
    default:
      return { ...reply({ id, amount, currency }), headers: { location: `${path}/${id}` } }
  }
}

/** @returns {Reply} */
function reply(body, type) {
  return { status: 201, headers: type === undefined ? {} : { 'content-type': type }, body }
}

/** A table that is not ready at once: six chunks, with pauses. */
async function* lines(id) {
  yield 'id,line\n'
  for (let line = 1; line <= 5; line++) {
    await sleep(10)
    yield `${id},${line}\n`
  }
}
