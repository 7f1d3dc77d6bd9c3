import { randomUUID } from 'node:crypto'
import { HttpLoad, requestsOf } from './http-load.mjs'
import { bodyOf, windowOf } from './paths.mjs'
import { quantile, spread } from './statistics.mjs'
import { COVERED, UNCOVERED } from './subjects/route.mjs'

/*
 * The measuring: in each round every subject does one short window of equally many requests, neighbours in the table
 * right after each other, and the next round goes the other way round. What is compared are the windows of one round,
 * so that what happens to the machine over seconds happens to both; the result is the median of the rounds' ratios,
 * and their quartiles.
 */

/** Rounds that do not count. */
const WARM_ROUNDS = 2

/** Windows in process: requests go through `inject`, no socket but the store's. */
export async function measurePath(contestants, servers, { path, size, rounds, scale = 1 }) {
  for (const one of contestants) await one.ask('start', { path, size })
  const samples = await inRounds(contestants, servers, rounds, async (one) => {
    const count = Math.max(8, Math.floor((windowOf(size) * scale) / (one.definition.slow ?? 1)))
    return { ...(await one.ask('window', { count })), count }
  })
  for (const one of contestants) await one.ask('close')
  return samples
}

/**
 * Windows over HTTP: the client is this process, so that the CPU of the subject's is the server's alone.
 * @param options.inFlight how many keep-alive connections there are, with one request on each
 */
export async function measureHttp(contestants, servers, { path, size, inFlight, rounds, scale = 1 }) {
  const body = bodyOf(size)
  const url = path === 'uncovered' ? UNCOVERED : COVERED
  const loads = new Map()
  const keys = Array.from({ length: 64 }, () => randomUUID())
  for (const one of contestants) {
    await one.ask('start', { path: 'first', size })
    const load = await HttpLoad.connect(await one.ask('listen'), inFlight)
    loads.set(one, load)
    if (path === 'replay') await load.run(requestsOf('replay', keys.length, url, body, keys), 200)
    await load.run(requestsOf(path, 1_000, url, body, keys), 200)
  }
  const samples = await inRounds(contestants, servers, rounds, async (one) => {
    const count = Math.max(8, Math.floor((windowOf(size) * scale) / (one.definition.slow ?? 1)))
    const requests = requestsOf(path, count, url, body, keys)
    await one.ask('clock')
    const latencies = await loads.get(one).run(requests, 200)
    const [p50, p99] = [quantile(latencies, 0.5), quantile(latencies, 0.99)]
    return { ...(await one.ask('stop')), p50, p99, count }
  })
  for (const one of contestants) {
    loads.get(one).close()
    await one.ask('close')
  }
  return samples
}

/** Per subject one sample a round: CPU of both sides and time, each per request, in microseconds. */
async function inRounds(contestants, servers, rounds, window) {
  const samples = new Map(contestants.map((one) => [one.name, []]))
  for (let round = -WARM_ROUNDS; round < rounds; round++) {
    for (const one of round % 2 === 0 ? contestants : [...contestants].reverse()) {
      const { store } = one.definition
      const before = await servers.cpuOf(store)
      const { cpu, wall, p50, p99, count } = await window(one)
      const server = (await servers.cpuOf(store)) - before
      if (round >= 0)
        samples.get(one.name).push({ cpu: cpu / count, wall: wall / count, server: server / count, p50, p99 })
    }
  }
  return samples
}

/** A window in which a subject takes this many times what it mostly takes was disturbed. */
const DISTURBED = 1.5

/**
 * What one subject's windows are to another's of the same round. A round in which either was disturbed by what else went on
 * in the machine does not count: the rule is the same for both, so that it favours neither.
 */
export function ratio(samples, name, reference, what) {
  const [ours, theirs] = [samples.get(name), samples.get(reference)]
  if (ours === undefined || theirs === undefined) return null
  const limits = [ours, theirs].map(
    (list) =>
      DISTURBED *
      quantile(
        list.map((sample) => sample[what]),
        0.5
      )
  )
  const rounds = ours
    .map((sample, round) => [sample[what], theirs[round][what]])
    .filter((pair) => pair.every((value, side) => !(value > limits[side])))
  return spread(rounds.map(([our, their]) => our / their))
}

/**
 * The same of each one's quiet windows, a tenth of the way up from the fastest: what else goes on in the machine only
 * ever adds. Steadier than the pairs where the machine is busy, but blind to what comes by bursts, such as collections.
 */
export function quietRatio(samples, name, reference, what) {
  const [ours, theirs] = [samples.get(name), samples.get(reference)]
  if (ours === undefined || theirs === undefined) return null
  const quiet = (list) =>
    quantile(
      list.map((sample) => sample[what]),
      0.1
    )
  return quiet(ours) / quiet(theirs)
}
