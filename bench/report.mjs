import { goalsTable } from './goals.mjs'
import { quietRatio, ratio } from './measure.mjs'
import { paths, sizes } from './paths.mjs'
import { subjectNamed } from './subjects/index.mjs'
import { number, ratioCell, table } from './table.mjs'

/** All of a run as Markdown. Only ratios, and what is exact. */
export function report(results, { machine, command, minutes }) {
  return `# Benchmark

${new Date().toISOString().slice(0, 10)}; ${machine}. ${minutes} minutes. Run it again: \`${command}\`.

Each subject runs in processes of its own, two in turn; in each round every subject does one short window of equally many requests,
and what is compared are the windows of one round. A cell is the median of the rounds' ratios, with the quartiles behind
it: where they are far apart, the machine had other things to do. A round does not count in which either of the two took
more than 1.5 times what it mostly takes. *Quiet windows* is the CPU ÷ by hand of each one's
fastest tenth. Smaller is better everywhere. All ioredis clients have
\`enableAutoPipelining\`; 64 requests are in flight; replies are 0.5 KiB of JSON unless a heading says otherwise.

*By hand* is the least that works on one route: one hook that claims (Redis: \`SET … NX GET PX\`; PostgreSQL: one prepared
insert that reads what is there), compares and replays, one that stores the reply before it leaves (Redis: a script that
compares and sets; PostgreSQL: a prepared update). It has no leases, scopes, streams or options.

## Goals

${goalsTable(results)}

## CPU per request

${pathTables(results.paths)}

## Over HTTP

Keep-alive connections with one request in flight on each. The client is another process; CPU is the server's. Latencies
are those of the requests in a window.

${httpTables(results.http)}

## Waiting for a running request

As many duplicates as the first column says, until all are answered by the one run; ÷ as many replays at once.

${waitingTable(results.waiting)}

## What the store hears and keeps

Exact, one request at a time. Commands are those that Redis executes, in scripts too.

${countsTable(results.counts)}

Per stored reply with a body of 500 bytes:

${recordsTable(results.records)}
`
}

function httpTables(runs) {
  const sections = []
  for (const [key, samples] of runs) {
    const [path, inFlight] = key.split(' ')
    const perBare = samples.has('bare')
    const rows = [...samples.keys()].map((name) => {
      const floor = floorOf(name)
      const cells = ['cpu', 'wall', 'p50', 'p99'].map((what) => {
        if (floor === null) return '–'
        return name === floor ? '1' : cell(ratio(samples, name, floor, what))
      })
      const ofBare = name === 'bare' ? '1' : cell(ratio(samples, name, 'bare', 'cpu'))
      return [subjectNamed(name).title, ...(perBare ? [ofBare] : []), ...cells]
    })
    const head = [
      '',
      ...(perBare ? ['CPU ÷ bare'] : []),
      ...['CPU', 'time', 'median latency', 'p99 latency'].map((what) => `${what} ÷ by hand`)
    ]
    sections.push(`### ${paths[path].title}, ${inFlight} in flight\n\n${table(head, rows)}`)
  }
  return sections.join('\n\n')
}

function pathTables(runs) {
  const sections = []
  for (const [key, samples] of runs) {
    const [path, size] = key.split(' ')
    const heading = `### ${paths[path].title}${size === 'small' ? '' : `, ${sizes[size].title}`}`
    const head = [
      '',
      'CPU ÷ bare',
      'CPU ÷ by hand',
      'quiet windows',
      "server's CPU ÷ by hand",
      'time ÷ bare',
      'time ÷ by hand'
    ]
    const rows = [...samples.keys()].map((name) => {
      const floor = floorOf(name)
      const per = (reference, what) => (reference === null ? '–' : cell(ratio(samples, name, reference, what)))
      const row = [
        subjectNamed(name).title,
        name === 'bare' ? '1' : per('bare', 'cpu'),
        name === floor ? '1' : per(floor, 'cpu'),
        floor === null || name === floor ? '–' : number(quietRatio(samples, name, floor, 'cpu')),
        !['redis', 'postgres'].includes(subjectNamed(name).store) ? '–' : name === floor ? '1' : per(floor, 'server'),
        name === 'bare' ? '1' : per('bare', 'wall'),
        name === floor ? '1' : per(floor, 'wall')
      ]
      return row
    })
    sections.push(`${heading}\n\n${table(head, rows)}`)
  }
  return sections.join('\n\n')
}

const cell = (value) => (value === null ? '–' : ratioCell(value))

/** The version by hand on the same store; that on Redis for those that have none. */
function floorOf(name) {
  const { store, floor } = subjectNamed(name)
  if (store === 'none') return null
  if (name.startsWith('floor-')) return name
  return floor ?? (['memory', 'postgres'].includes(store) ? `floor-${store}` : 'floor-redis')
}

function waitingTable(waiting) {
  const rows = [...waiting].map(([key, { wall, cpu, gathered, delay, channels }]) => {
    const [name, waiters] = key.split(' ')
    const cells = [wall, cpu, gathered, delay].map(ratioCell)
    return [subjectNamed(name).title, Number(waiters).toLocaleString('en'), ...cells, channels ?? '–']
  })
  return table(
    [
      '',
      'waiters',
      'time ÷ replays',
      'CPU to answer ÷ replays',
      'CPU to gather ÷ replays',
      'longest event-loop delay ÷ replays',
      'subscriptions'
    ],
    rows
  )
}

function countsTable(counts) {
  const rows = []
  for (const [name, byPath] of counts) {
    for (const [path, { trips, commands, scripts, writes, sent, received }] of Object.entries(byPath)) {
      const cells = [trips, commands, scripts, writes].map(number)
      rows.push([subjectNamed(name).title, paths[path].title, ...cells, Math.round(sent), Math.round(received)])
    }
  }
  return table(['', '', 'round trips', 'commands', 'scripts', 'writes', 'bytes to the store', 'bytes from it'], rows)
}

function recordsTable(records) {
  const rows = [...records].map(([name, { process, server, overhead, usage }]) => {
    const cells = [process, server, usage, overhead].map((value) => (value === undefined ? '–' : Math.round(value)))
    return [subjectNamed(name).title, ...cells]
  })
  return table(
    [
      '',
      "bytes of the process's heap",
      'bytes of Redis in all',
      'of that `MEMORY USAGE`',
      'value beside body and content-type'
    ],
    rows
  )
}

export function growthReport(rows, { machine, command, minutes }) {
  const order = ['stored keys', 'running claims', 'waiters', 'processes']
  const sections = order.map((what) => {
    const cells = rows
      .filter((row) => row.what === what)
      .map(({ subject, path, step, cpu, server, wall }) => [
        subject,
        path,
        step.toLocaleString('en'),
        ratioCell(cpu),
        server === null ? '–' : ratioCell(server),
        ratioCell(wall)
      ])
    const unit = what === 'waiters' ? 'as many replays' : 'the first step'
    return `## ${what}\n\n${table(['', '', what, `CPU ÷ ${unit}`, `Redis's CPU ÷ ${unit}`, `time ÷ ${unit}`], cells)}`
  })
  return `# Growth

${new Date().toISOString().slice(0, 10)}; ${machine}. ${minutes} minutes. Run it again: \`${command}\`.

Cost per request as there is more of everything, against the first step of each row; median of the rounds, with the
quartiles behind it. Flat is good. With several processes on one machine, time and caches are shared: there, Redis's CPU
per request is what says something.

${sections.join('\n\n')}
`
}
