import { ratio } from './measure.mjs'
import { number, ratioCell, table } from './table.mjs'

/*
 * What the project has set itself, in CPU per request, and whether this run has met it. A limit that lies between the quartiles is too
 * close to call by one run on one machine.
 */

export function goalsTable(results) {
  const { paths, http, counts, records, waiting } = results
  const of = (key, name, reference) => {
    const samples = paths.get(key)
    return samples === undefined ? null : ratio(samples, name, reference, 'cpu')
  }
  const per = (path, name, reference) => of(`${path} small`, name, reference)
  const trips = (name, path) => counts.get(name)?.[path]
  const rows = []
  const goal = (what, limit, measured, verdict) => rows.push([what, limit, measured, verdict])
  const atMost = (what, value, limit) =>
    goal(what, `≤ ${number(limit)}`, value && ratioCell(value), judge(value, limit))
  const exactly = (what, value, limit) =>
    goal(what, `≤ ${limit}`, value === undefined || value === null ? null : number(value), exact(value, limit))

  const uncovered = per('uncovered', 'memory', 'bare')
  goal('uncovered route ÷ bare', '1.00 within noise', uncovered && ratioCell(uncovered), around(uncovered))
  const noKey = per('no-key', 'memory', 'bare')
  goal('no key ÷ bare', '1.00 within noise', noKey && ratioCell(noKey), around(noKey))
  for (const path of ['first', 'replay']) {
    atMost(`${path}, memory ÷ by hand`, per(path, 'memory', 'floor-memory'), 1.15)
    for (const inFlight of [1, 16, 256]) {
      const samples = http.get(`${path} ${inFlight}`)
      const value = samples === undefined ? null : ratio(samples, 'memory', 'floor-memory', 'cpu')
      atMost(`${path}, memory ÷ by hand, HTTP, ${inFlight} in flight`, value, 1.1)
    }
    atMost(`${path}, memory ÷ best peer`, per(path, 'memory', 'node-idempotency-memory'), 1)
    atMost(`${path}, Redis ÷ by hand`, per(path, 'redis', 'floor-redis'), 1.1)
    atMost(`${path}, Redis ÷ best peer`, per(path, 'redis', 'node-idempotency-redis'), 1)
    atMost(`${path}, PostgreSQL ÷ by hand`, per(path, 'postgres', 'floor-postgres'), path === 'first' ? 1.25 : 1.1)
  }
  for (const store of ['memory', 'redis']) {
    for (const size of ['10k', '256k']) {
      atMost(`replay of ${size}, ${store} ÷ by hand`, of(`replay reply-${size}`, store, `floor-${store}`), 1.1)
      atMost(`request of ${size}, ${store} ÷ by hand`, of(`first request-${size}`, store, `floor-${store}`), 1.25)
    }
  }
  exactly('first, Redis: round trips', trips('redis', 'first')?.trips, 2)
  exactly('replay, Redis: round trips', trips('redis', 'replay')?.trips, 1)
  exactly('replay, Redis: writes', trips('redis', 'replay')?.writes, 0)
  exactly('replay, Redis + LocalCache: round trips', trips('cached', 'replay')?.trips, 0)
  exactly('conflict, Redis: round trips', trips('redis', 'conflict')?.trips, 2)
  exactly('first, PostgreSQL: round trips', trips('postgres', 'first')?.trips, 2)
  exactly('replay, PostgreSQL: round trips', trips('postgres', 'replay')?.trips, 1)
  const many = waiting.get('redis 5000')
  exactly('5,000 waiters, Redis: subscriptions', many?.channels, 1)
  atMost('5,000 waiters, Redis ÷ 5,000 replays, time', many?.wall ?? null, 3)
  exactly('stored reply, Redis: bytes beside key, headers and body', records.get('redis')?.overhead, 150)
  const byHand = records.get('floor-memory')?.process
  const beyond = byHand === undefined ? undefined : records.get('memory').process - byHand
  exactly('stored reply, memory: bytes beyond by hand', beyond, 32)
  return table(
    ['Goal', 'limit', 'measured', ''],
    rows.map((row) => row.map((cell) => cell ?? '–'))
  )
}

function judge(value, limit) {
  if (value === null) return 'not measured'
  if (value.high <= limit) return 'met'
  if (value.low > limit) return '**not met**'
  return value.median <= limit ? 'met, within noise' : 'not met, within noise'
}

function exact(value, limit) {
  if (value === undefined || value === null) return 'not measured'
  return value <= limit + 1e-9 ? 'met' : '**not met**'
}

function around(value) {
  if (value === null) return 'not measured'
  if (value.low > 1.02 || value.high < 0.98) return '**not met**'
  return Math.abs(value.median - 1) <= 0.03 ? 'met' : 'within noise'
}
