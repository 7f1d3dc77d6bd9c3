import { ratio } from './measure.mjs'
import { number, ratioCell, table } from './table.mjs'

/*
 * What the project has set itself, and whether this run has met it. A limit that lies between the quartiles is too
 * close to call by one run on one machine.
 */

/** Requests per second of at least 0.9 times: time of at most so many times. */
const NINE_TENTHS = 1 / 0.9

export function goalsTable(results) {
  const { paths, counts, records, waiting } = results
  const per = (path, name, reference, what = 'cpu') => {
    const samples = paths.get(`${path} small`)
    return samples === undefined ? null : ratio(samples, name, reference, what)
  }
  const peers = (path, name, others) => others.map((other) => per(path, name, other)).filter((value) => value !== null)
  const trips = (name, path) => counts.get(name)?.[path]
  const rows = []
  const goal = (what, limit, measured, verdict) => rows.push([what, limit, measured, verdict])
  const atMost = (what, value, limit) =>
    goal(what, `≤ ${number(limit)}`, value && ratioCell(value), judge(value, limit))
  const exactly = (what, value, limit) =>
    goal(what, `≤ ${limit}`, value === undefined || value === null ? null : number(value), exact(value, limit))

  const uncovered = per('uncovered', 'memory', 'bare')
  goal('uncovered route ÷ bare, CPU', '1.00 within noise', uncovered && ratioCell(uncovered), around(uncovered))
  atMost('no key ÷ bare, CPU', per('no-key', 'memory', 'bare'), 1.08)
  atMost('no key ÷ by hand, CPU', per('no-key', 'memory', 'floor-memory'), 1.05)
  for (const path of ['first', 'replay']) {
    atMost(`${path}, memory ÷ by hand, CPU`, per(path, 'memory', 'floor-memory'), 1.2)
    for (const value of peers(path, 'memory', ['node-idempotency-memory'])) {
      atMost(`${path}, memory ÷ best peer, CPU`, value, 1)
    }
  }
  exactly('first, Redis: round trips', trips('redis', 'first')?.trips, 2)
  atMost(
    'first, Redis ÷ by hand, time (0.9 × the requests/s)',
    per('first', 'redis', 'floor-redis', 'wall'),
    NINE_TENTHS
  )
  exactly('replay, Redis: round trips', trips('redis', 'replay')?.trips, 1)
  exactly('replay, Redis: writes', trips('redis', 'replay')?.writes, 0)
  atMost('replay, Redis ÷ by hand, time', per('replay', 'redis', 'floor-redis', 'wall'), NINE_TENTHS)
  for (const path of ['first', 'replay']) {
    for (const value of peers(path, 'redis', ['node-idempotency-redis'])) {
      atMost(`${path}, Redis ÷ best peer, CPU`, value, 1)
    }
  }
  exactly('replay, Redis + LocalCache: round trips', trips('cached', 'replay')?.trips, 0)
  atMost('replay, Redis + LocalCache ÷ memory, time', per('replay', 'cached', 'memory', 'wall'), NINE_TENTHS)
  exactly('conflict, Redis: round trips', trips('redis', 'conflict')?.trips, 1)
  exactly('conflict, Redis: scripts', trips('redis', 'conflict')?.scripts, 0)
  const [conflict, replay] = [per('conflict', 'redis', 'bare'), per('replay', 'redis', 'bare')]
  if (conflict && replay) {
    exactly('conflict ÷ replay, Redis, CPU (both ÷ bare)', conflict.median / replay.median, 1)
  }
  const many = waiting.get('redis 5000')
  exactly('5,000 waiters, Redis: subscriptions', many?.channels, 1)
  atMost('5,000 waiters, Redis ÷ 5,000 replays, time', many?.wall ?? null, 3)
  exactly('stored reply, Redis: bytes beside key, headers and body', records.get('redis')?.overhead, 150)
  exactly('stored reply, memory: bytes for a body of 500', records.get('memory')?.process, 800)
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
