// The process of one subject: does what the benchmark asks for over IPC, one thing at a time.

import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { monitorEventLoopDelay, performance } from 'node:perf_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import { bodyOf, paths, requestTo, sizes, windowOf, withResolvers } from './paths.mjs'
import { subjectNamed } from './subjects/index.mjs'
import { COVERED, jsonOf, Route, WAITING } from './subjects/route.mjs'

const [, , subjectName, environment] = process.argv
const definition = subjectNamed(subjectName)
const module = await import(`./subjects/${definition.from}`)
const env = JSON.parse(environment)

/** Requests in flight in a window. */
const IN_FLIGHT = 64

/** Milliseconds of CPU: a slow subject must not spend the run on warming up. */
const LONGEST_WARM_UP = 2_000

let route
let subject
let way
let port = null

async function open() {
  await close()
  route = new Route()
  subject = await module[definition.build]({ ...env, route })
}

async function close() {
  await way?.end?.()
  way = undefined
  port = null
  await subject?.close()
  subject = undefined
}

/** Sends `count` requests, so many at a time, and looks at each status. */
async function run(count) {
  let left = count
  const lane = async () => {
    while (left-- > 0) {
      const { statusCode } = await subject.inject(way.next())
      if (statusCode !== way.status) throw new Error(`${subjectName}: got ${statusCode}, wanted ${way.status}`)
    }
  }
  await Promise.all(Array.from({ length: Math.min(IN_FLIGHT, count) }, lane))
}

const delay = monitorEventLoopDelay({ resolution: 1 })
let started

function startClock() {
  delay.reset()
  delay.enable()
  started = { cpu: process.cpuUsage(), at: performance.now() }
}

/** Microseconds of CPU and of time, and milliseconds of delay. */
function stopClock() {
  const { user, system } = process.cpuUsage(started.cpu)
  const wall = (performance.now() - started.at) * 1_000
  delay.disable()
  return { cpu: user + system, wall, delay: { p99: delay.percentile(99) / 1e6, max: delay.max / 1e6 } }
}

/** Until nothing more happens: everybody who waits has come to where they wait. */
async function quiet() {
  for (let calm = 0; calm < 3; ) {
    const before = performance.eventLoopUtilization()
    await sleep(15)
    calm = performance.eventLoopUtilization(before).utilization < 0.3 ? calm + 1 : 0
  }
}

function memory() {
  globalThis.gc()
  globalThis.gc()
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

let waiting

const tasks = {
  /** Fails loudly unless the subject does what it is measured for. */
  async proof() {
    await open()
    const send = (key, body) => subject.inject(requestTo(COVERED, body, key))
    const body = bodyOf('small')
    const key = randomUUID()
    const first = await send(key, body)
    assert.equal(first.statusCode, 200, first.payload)
    assert.deepEqual(JSON.parse(first.payload), route.reply)
    if (subjectName === 'bare') return
    // express-idempotency stores after it has replied.
    if (definition.slow) await sleep(50)
    const second = await send(key, body)
    assert.equal(second.statusCode, 200, second.payload)
    assert.equal(second.payload, first.payload)
    assert.equal(second.headers['content-type'], first.headers['content-type'])
    assert.equal(route.runs, 1, `${subjectName} ran the handler twice`)
    if (definition.marks) assert.equal(second.headers['idempotent-replayed'], 'true')
    await send(randomUUID(), body)
    assert.equal(route.runs, 2)
    await tasks.start({ path: 'conflict', size: 'small', warm: 1 })
    await close()
  },

  /** Makes one path ready and warm. */
  async start({ path, size, warm }) {
    await open()
    const { reply } = sizes[size]
    route.reply = jsonOf(reply)
    way = await paths[path].start({ body: bodyOf(size), subject, route, subjectName })
    const before = process.cpuUsage()
    const spent = () => process.cpuUsage(before).user / 1_000
    for (let left = warm ?? windowOf(size) * 10; left > 0 && spent() < LONGEST_WARM_UP; left -= IN_FLIGHT) {
      await run(Math.min(left, IN_FLIGHT))
    }
  },

  async window({ count }) {
    startClock()
    await run(count)
    return stopClock()
  },

  /** The same path on a socket: gives the port, and requests as `count` sources of bytes. */
  async listen() {
    port ??= await subject.listen()
    return port
  },

  clock: () => startClock(),
  stop: () => stopClock(),
  close,

  /** Bytes of memory that a stored reply takes. */
  async memory({ count, size }) {
    await tasks.start({ path: 'uncovered', size })
    await run(count)
    way = await paths.first.start({ body: bodyOf(size), subject, route, subjectName })
    await run(count)
    await sleep(100)
    const before = memory()
    await run(count)
    await sleep(100)
    return (memory() - before) / count
  },

  /** Brings so many duplicates of a running request to wait. */
  async gather({ waiters, size }) {
    await open()
    const body = bodyOf(size)
    const { promise, resolve } = withResolvers()
    route.gate = promise
    const request = requestTo(WAITING, body, randomUUID())
    const first = subject.inject(request).then((reply) => reply)
    while (route.runs === 0) await sleep(1)
    const all = [first]
    startClock()
    for (let i = 0; i < waiters; i++) all.push(subject.inject(request).then((reply) => reply))
    await quiet()
    const gathered = stopClock()
    waiting = { request, resolve, all }
    return gathered
  },

  /** Lets the request end, until all have their answer; then as many replays of it, all at once. */
  async answer() {
    const { request, resolve, all } = waiting
    startClock()
    resolve()
    const replies = await Promise.all(all)
    const answered = stopClock()
    for (const { statusCode, payload } of replies) {
      if (statusCode !== 200 || payload !== replies[0].payload) throw new Error(`A waiter got ${statusCode}`)
    }
    if (route.runs !== 1) throw new Error(`The handler ran ${route.runs} times`)
    startClock()
    await Promise.all(Array.from({ length: all.length - 1 }, () => subject.inject(request).then((reply) => reply)))
    const replayed = stopClock()
    return { answered, replayed }
  },

  /** Stores so many replies without the detour of requests. */
  async fill({ count }) {
    const { store } = subject
    const body = Buffer.from(JSON.stringify(jsonOf(500)))
    const record = { kind: 'reply', fingerprint: 'f'.repeat(87), createdAt: Date.now(), statusCode: 200, text: true }
    const headers = [['content-type', 'application/json; charset=utf-8']]
    const claim = { fingerprint: record.fingerprint, leaseMs: 30_000, retainMs: 86_400_000, takeover: true }
    let left = count
    const lane = async () => {
      while (left-- > 0) {
        const key = randomUUID()
        await store.acquire(key, { ...claim, token: key })
        await store.complete(key, key, { ...record, headers, body }, 86_400_000)
      }
    }
    await Promise.all(Array.from({ length: 256 }, lane))
  },

  /** Holds so many claims: handlers that do not end until `close`. */
  async hold({ count, size }) {
    const { promise, resolve } = withResolvers()
    const body = bodyOf(size)
    const held = []
    const { runs } = route
    route.gate = promise
    for (let i = 0; i < count; i++) held.push(subject.inject(requestTo(COVERED, body, randomUUID())).then((r) => r))
    while (route.runs < runs + count) await sleep(2)
    route.gate = null
    const { end } = way
    way.end = async () => {
      resolve()
      await Promise.all(held)
      await end?.()
    }
  },

  /** What goes on when nothing is asked of the process. */
  async idle({ ms }) {
    startClock()
    await sleep(ms)
    return stopClock()
  }
}

process.on('message', async ({ id, task, ...given }) => {
  try {
    process.send({ id, result: await tasks[task](given) })
  } catch (error) {
    process.send({ id, error: `${subjectName}, ${task}: ${error.stack}` })
  }
})
process.on('disconnect', () => process.exit())
process.send({ ready: definition.needs === undefined || Boolean(module[definition.needs]) })
