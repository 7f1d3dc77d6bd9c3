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
const pairs = ['floor-memory', 'memory', 'floor-redis', 'redis']
const unpipelined = ['floor-redis-unpipelined', 'redis-unpipelined']
const plan = [
  ['uncovered small', ['bare', 'memory']],
  ['no-key small', ['bare', 'memory']],
  ['first small', all],
  ['replay small', all],
  ['conflict small', [...pairs, 'node-idempotency-memory', 'node-idempotency-redis']],
  ...(quick
    ? []
    : ['replay reply-10k', 'replay reply-256k', 'first request-10k', 'first request-256k'].map((key) => [key, pairs]))
]
/** How many processes of each subject take turns. */
const PROCESSES = 2
/** Requests in flight: a quiet hour, an ordinary one, and a rush. */
const overHttp = [
  [1, pairs],
  [16, ['bare', ...pairs, ...unpipelined]],
  [256, pairs]
]

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
  const proved = []
  for (const definition of subjects) {
    const contestant = await Contestant.start(definition, environmentOf(definition, servers))
    if (contestant === null) {
      log(`skipped: ${definition.title}, which this version does not have yet`)
      continue
    }
    await contestant.ask('proof')
    await contestant.end()
    proved.push(definition)
  }
  log(`${proved.length} subjects, each of which has proved that it replays`)
  const wanted = (name) => options.only === undefined || options.only.split(',').some((part) => name.startsWith(part))
  /** New processes of these subjects, for as long as something is measured. */
  const among = async (names, measure) => {
    const contestants = []
    for (const definition of proved.filter(({ name }) => names.includes(name))) {
      contestants.push(await Contestant.start(definition, environmentOf(definition, servers)))
    }
    const measured = await measure(contestants)
    for (const contestant of contestants) await contestant.end()
    await flush()
    return measured
  }
  /** The same by several processes of each, because no two of them are equally fast: all their rounds. */
  const inProcesses = async (names, rounds, measure) => {
    const samples = new Map()
    for (let process = 0; process < PROCESSES; process++) {
      const some = await among(names, (contestants) => measure(contestants, Math.ceil(rounds / PROCESSES)))
      for (const [name, list] of some) samples.set(name, [...(samples.get(name) ?? []), ...list])
    }
    return samples
  }

  const results = { paths: new Map(), http: new Map(), counts: new Map(), records: new Map(), waiting: new Map() }
  const scale = quick ? 0.5 : 1
  const rounds = Number(options.rounds ?? (quick ? 6 : 16))
  for (const [key, names] of plan) {
    if (!wanted(key)) continue
    log(key)
    const [path, size] = key.split(' ')
    const samples = await inProcesses(names, rounds, (contestants, rounds) =>
      measurePath(contestants, servers, { path, size, rounds, scale })
    )
    results.paths.set(key, samples)
  }
  for (const path of ['first', 'replay']) {
    if (!wanted(`http-${path}`)) continue
    for (const [inFlight, names] of overHttp) {
      log(`${path}, HTTP, ${inFlight} in flight`)
      const samples = await inProcesses(names, rounds, (contestants, rounds) =>
        measureHttp(contestants, servers, { path, size: 'small', inFlight, rounds, scale })
      )
      results.http.set(`${path} ${inFlight}`, samples)
    }
  }
  if (wanted('waiting')) {
    for (const [waiters, repeats] of quick
      ? [
          [1, 10],
          [100, 5],
          [5_000, 1]
        ]
      : [
          [1, 20],
          [100, 10],
          [5_000, 3]
        ]) {
      for (const name of ['memory', 'redis', 'cached', 'postgres']) {
        log(`${waiters} waiters, ${name}`)
        const measured = await among([name], ([one]) => measureWaiting(one, servers, { waiters, repeats }))
        results.waiting.set(`${name} ${waiters}`, measured)
      }
    }
  }
  if (wanted('counts')) {
    log('round trips, commands and bytes')
    for (const definition of proved) {
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
    for (const definition of proved) {
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
