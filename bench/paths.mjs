import { randomUUID } from 'node:crypto'
import { COVERED, jsonOf, UNCOVERED } from './subjects/route.mjs'

/** How many different keys are replayed in turn. */
const REPLAYED = 64

/** In one piece, as from a socket: `randomUUID` gives a rope of many small strings, which whoever keeps it keeps too. */
const newKey = () => Buffer.from(randomUUID(), 'latin1').toString('latin1')

/** A request as `inject` takes it. */
export function requestTo(url, body, key) {
  const headers = { 'content-type': 'application/json', host: 'localhost' }
  if (key !== undefined) headers['idempotency-key'] = key
  return { method: 'POST', url, headers, payload: body }
}

/**
 * The ways of a request. `start` makes ready what the path needs, and gives the source of requests, the status that
 * each must have, and how to end.
 */
export const paths = {
  uncovered: {
    title: 'uncovered route',
    async start({ body }) {
      return { status: 200, next: () => requestTo(UNCOVERED, body) }
    }
  },
  'no-key': {
    title: 'covered route, no key',
    async start({ body }) {
      return { status: 200, next: () => requestTo(COVERED, body) }
    }
  },
  first: {
    title: 'first request',
    async start({ body }) {
      return { status: 200, next: () => requestTo(COVERED, body, newKey()) }
    }
  },
  replay: {
    title: 'replay',
    async start({ body, subject }) {
      const requests = Array.from({ length: REPLAYED }, () => requestTo(COVERED, body, newKey()))
      for (const request of requests) await subject.inject(request)
      let at = 0
      return { status: 200, next: () => requests[at++ % REPLAYED] }
    }
  },
  conflict: {
    title: 'conflict (409)',
    async start({ body, subject, route, subjectName }) {
      if (subjectName === 'bare') return paths.first.start({ body })
      const request = requestTo(COVERED, body, newKey())
      const { promise, resolve } = withResolvers()
      route.gate = promise
      const { runs } = route
      // Sent here and now: an inject without a `then` starts with the first one.
      const first = Promise.resolve(subject.inject(request)).then((reply) => reply)
      while (route.runs === runs) await new Promise((next) => setTimeout(next, 1))
      // Should a claim lapse, the next handler answers at once, with a status that was not wanted.
      route.gate = null
      return {
        status: 409,
        next: () => request,
        end: () => {
          resolve()
          return first
        }
      }
    }
  }
}

export function withResolvers() {
  let resolve
  const promise = new Promise((done) => {
    resolve = done
  })
  return { promise, resolve }
}

/** The bodies of a request and of a reply, in bytes. */
export const sizes = {
  small: { title: '0.5 KiB', request: 300, reply: 500 },
  'reply-10k': { title: 'reply of 10 KiB', request: 300, reply: 10 * 1024 },
  'reply-256k': { title: 'reply of 256 KiB', request: 300, reply: 256 * 1024 },
  'request-10k': { title: 'request of 10 KiB', request: 10 * 1024, reply: 500 },
  'request-256k': { title: 'request of 256 KiB', request: 256 * 1024, reply: 500 }
}

/** How many requests make a window of some ten milliseconds. */
export function windowOf(size) {
  const bytes = sizes[size].request + sizes[size].reply
  if (bytes < 2_000) return 512
  return bytes < 20_000 ? 256 : 32
}

export function bodyOf(size) {
  return JSON.stringify(jsonOf(sizes[size].request))
}
