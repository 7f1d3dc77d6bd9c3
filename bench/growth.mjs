import { Contestant } from './contestant.mjs'
import { environmentOf } from './environment.mjs'
import { ratio } from './measure.mjs'
import { windowOf } from './paths.mjs'
import { subjectNamed } from './subjects/index.mjs'
import { measureWaiting } from './waiting.mjs'

/*
 * Does a request cost more when there is more of everything? Each step is a process of its own, and the steps take
 * turns in rounds, so that the ratios to the first step are of windows side by side.
 */

const PATHS = ['first', 'replay']

export async function measureGrowth(servers, { quick, rounds, log }) {
  const rows = []
  for (const name of ['memory', 'redis', 'sqlite', 'mysql']) {
    // Filling a database takes its time.
    if (name === 'sqlite' || name === 'mysql') {
      rows.push(
        ...(await steps(servers, name, 'stored keys', [1_000, quick ? 100_000 : 1_000_000], 'fill', { rounds, log }))
      )
      continue
    }
    const keys = quick ? [1_000, 10_000, 100_000] : [1_000, 10_000, 100_000, 1_000_000]
    rows.push(...(await steps(servers, name, 'stored keys', keys, 'fill', { rounds, log })))
    const claims = quick ? [1, 1_000] : [1, 100, 1_000, 10_000]
    rows.push(...(await steps(servers, name, 'running claims', claims, 'hold', { rounds, log })))
    rows.push(...(await waiters(servers, name, quick ? [1, 100, 1_000] : [1, 100, 1_000, 10_000], { quick, log })))
  }
  rows.push(...(await processes(servers, quick ? [1, 2, 4] : [1, 2, 4, 8], { rounds, log })))
  return rows
}

/** One process for each step, in which there is so much already. */
async function steps(servers, name, what, counts, task, { rounds, log }) {
  const definition = subjectNamed(name)
  const rows = []
  for (const path of PATHS) {
    log(`growth: ${what}, ${definition.title}, ${path}`)
    const contestants = []
    for (const [i, count] of counts.entries()) {
      const environment = { ...environmentOf(definition, servers), redis: { path: servers.redisPath, db: 30 + i } }
      const contestant = await Contestant.start(definition, environment)
      contestant.name = String(count)
      await contestant.ask('start', { path, size: 'small' })
      await contestant.ask(task, { count, size: 'small' })
      contestants.push(contestant)
    }
    const samples = new Map(contestants.map((one) => [one.name, []]))
    for (let round = 0; round < rounds; round++) {
      for (const one of round % 2 === 0 ? contestants : [...contestants].reverse()) {
        const before = await servers.cpuOf(definition.store)
        const { cpu, wall, delay } = await one.ask('window', { count: windowOf('small') })
        samples
          .get(one.name)
          .push({ cpu, wall, delay: delay.p99, server: (await servers.cpuOf(definition.store)) - before })
      }
    }
    const first = contestants[0].name
    for (const { name: step } of contestants) {
      rows.push({
        what,
        subject: definition.title,
        path,
        step: Number(step),
        cpu: ratio(samples, step, first, 'cpu'),
        server: definition.store === 'redis' ? ratio(samples, step, first, 'server') : null,
        wall: ratio(samples, step, first, 'wall')
      })
    }
    for (const one of contestants) {
      await one.ask('close')
      await one.end()
    }
    for (const i of counts.keys()) {
      await servers.control.select(30 + i)
      await servers.control.flushdb()
    }
    await servers.control.select(0)
  }
  return rows
}

/** What a waiter costs, as there are more of them; a replay in the same process is the measure. */
async function waiters(servers, name, counts, { quick, log }) {
  const definition = subjectNamed(name)
  const rows = []
  for (const count of counts) {
    log(`growth: ${count} waiters, ${definition.title}`)
    const contestant = await Contestant.start(definition, environmentOf(definition, servers))
    const repeats = Math.max(2, Math.min(quick ? 5 : 15, Math.round(10_000 / count)))
    const { wall, cpu } = await measureWaiting(contestant, servers, { waiters: count, repeats })
    rows.push({
      what: 'waiters',
      subject: definition.title,
      path: 'answer ÷ replays',
      step: count,
      cpu,
      server: null,
      wall
    })
    await contestant.end()
  }
  return rows
}

/** Several processes on one Redis, all at work at the same time: CPU per request, here and there, against one. */
async function processes(servers, counts, { rounds, log }) {
  const definition = subjectNamed('redis')
  const all = []
  for (let i = 0; i < Math.max(...counts); i++) {
    all.push(await Contestant.start(definition, environmentOf(definition, servers)))
  }
  const rows = []
  for (const path of PATHS) {
    log(`growth: processes on one Redis, ${path}`)
    for (const one of all) await one.ask('start', { path, size: 'small' })
    const samples = new Map(counts.map((count) => [String(count), []]))
    for (let round = 0; round < rounds; round++) {
      for (const count of round % 2 === 0 ? counts : [...counts].reverse()) {
        const before = await servers.cpuOf('redis')
        const at = performance.now()
        const busy = await Promise.all(
          all.slice(0, count).map((one) => one.ask('window', { count: windowOf('small') }))
        )
        const server = ((await servers.cpuOf('redis')) - before) / count
        const cpu = busy.reduce((sum, { cpu }) => sum + cpu, 0) / count
        samples.get(String(count)).push({ cpu, server, wall: (performance.now() - at) / count })
      }
    }
    for (const count of counts) {
      const per = (what) => ratio(samples, String(count), String(counts[0]), what)
      rows.push({
        what: 'processes',
        subject: definition.title,
        path,
        step: count,
        cpu: per('cpu'),
        server: per('server'),
        wall: per('wall')
      })
    }
    for (const one of all) await one.ask('close')
  }
  for (const one of all) await one.end()
  return rows
}
