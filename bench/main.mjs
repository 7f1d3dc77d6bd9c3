// `npm run bench [-- growth] [--quick] [--only <path>,…] [--rounds <n>]`

import { writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { Contestant } from './contestant.mjs'
import { countTrips } from './counting.mjs'
import { environmentOf } from './environment.mjs'
import { measureGrowth } from './growth.mjs'
import { describeMachine } from './machine.mjs'
import { measureHttp, measurePath } from './measure.mjs'
import { growthReport, report } from './report.mjs'
import { startServers } from './servers.mjs'
import { measureRecord } from './storage.mjs'
import { subjects } from './subjects/index.mjs'
import { measureWaiting } from './waiting.mjs'

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { quick: { type: 'boolean', default: false }, only: { type: 'string' }, rounds: { type: 'string' } }
})
const quick = options.quick
const started = performance.now()
const minutes = () => ((performance.now() - started) / 60_000).toFixed(1)
const log = (line) => console.error(`[${minutes()} min] ${line}`)
const command = ['npm run bench', ...(process.argv.length > 2 ? ['--', ...process.argv.slice(2)] : [])].join(' ')

/** Those who take part, path by path; neighbours are compared most often. */
const all = subjects.map(({ name }) => name)
const main = ['bare', 'floor-memory', 'memory', 'cached', 'floor-redis', 'redis', 'node-idempotency-redis', 'postgres']
const plan = [
  ['uncovered small', ['bare', 'memory', 'redis']],
  [
    'no-key small',
    ['bare', 'floor-memory', 'memory', 'node-idempotency-memory', 'floor-redis', 'redis', 'powertools-redis']
  ],
  ['first small', all],
  ['replay small', all],
  ['conflict small', all],
  ...(quick
    ? []
    : ['reply-10k', 'reply-256k', 'request-10k', 'request-256k'].flatMap((size) => [
        [`first ${size}`, main],
        [`replay ${size}`, main]
      ]))
]
const overHttp = ['bare', 'floor-memory', 'memory', 'cached', 'floor-redis', 'redis']

const servers = await startServers()
try {
  const machine = describeMachine(servers.versions)
  log(machine)
  if (positionals[0] === 'growth') await growth(machine)
  else await ratios(machine)
} finally {
  await servers.close()
}
process.exit()

async function growth(machine) {
  const rows = await measureGrowth(servers, { quick, log, rounds: Number(options.rounds ?? (quick ? 8 : 30)) })
  publish('growth.md', growthReport(rows, { machine, command, minutes: minutes() }))
}

async function ratios(machine) {
  const contestants = new Map()
  for (const definition of subjects) {
    const contestant = await Contestant.start(definition, environmentOf(definition, servers))
    if (contestant === null) {
      log(`skipped: ${definition.title}, which this version does not have yet`)
      continue
    }
    await contestant.ask('proof')
    contestants.set(definition.name, contestant)
  }
  log(`${contestants.size} subjects, each of which has proved that it replays`)
  const present = (names) => names.flatMap((name) => contestants.get(name) ?? [])
  const wanted = (name) => options.only === undefined || options.only.split(',').some((part) => name.startsWith(part))

  const results = { paths: new Map(), http: new Map(), counts: new Map(), records: new Map(), waiting: new Map() }
  const scale = quick ? 0.5 : 1
  const rounds = (key) => {
    if (options.rounds !== undefined) return Number(options.rounds)
    if (quick) return 8
    return key.endsWith('small') ? 50 : 24
  }
  for (const [key, names] of plan) {
    if (!wanted(key)) continue
    log(key)
    const [path, size] = key.split(' ')
    results.paths.set(key, await measurePath(present(names), servers, { path, size, rounds: rounds(key), scale }))
    await flush()
  }
  for (const path of ['uncovered', 'first', 'replay']) {
    if (!wanted(`http-${path}`)) continue
    log(`${path}, HTTP`)
    const samples = await measureHttp(present(overHttp), servers, {
      path,
      size: 'small',
      rounds: quick ? 8 : 40,
      scale
    })
    results.http.set(`${path} small`, samples)
    await flush()
  }
  if (wanted('waiting')) {
    for (const [waiters, repeats] of quick
      ? [
          [1, 10],
          [100, 5],
          [5_000, 1]
        ]
      : [
          [1, 40],
          [100, 20],
          [5_000, 5]
        ]) {
      for (const contestant of present(['memory', 'redis', 'cached', 'postgres'])) {
        log(`${waiters} waiters, ${contestant.definition.title}`)
        const measured = await measureWaiting(contestant, servers, { waiters, repeats })
        results.waiting.set(`${contestant.name} ${waiters}`, measured)
      }
    }
  }
  for (const contestant of contestants.values()) await contestant.end()
  if (wanted('counts')) {
    log('round trips, commands and bytes')
    for (const { definition } of contestants.values()) {
      if (definition.store !== 'redis' && definition.store !== 'postgres') continue
      const environment = environmentOf(definition, servers)
      results.counts.set(
        definition.name,
        await countTrips(definition, servers, environment, ['first', 'replay', 'conflict'])
      )
    }
  }
  if (wanted('records')) {
    log('memory per record')
    for (const { definition } of contestants.values()) {
      if (definition.store !== 'memory' && definition.store !== 'redis') continue
      if (definition.name.startsWith('express')) continue
      const environment = environmentOf(definition, servers)
      results.records.set(definition.name, await measureRecord(definition, servers, environment, 20_000))
    }
  }
  publish('results.md', report(results, { machine, command, minutes: minutes() }))
}

async function flush() {
  await servers.control.flushall()
}

function publish(file, text) {
  console.log(text)
  // A part of a run is for those who work on that part.
  if (options.only !== undefined) return
  writeFileSync(new URL(file, import.meta.url), text)
  log(`written to bench/${file}`)
}
