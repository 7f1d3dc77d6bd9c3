// `npm run conformance`: starts each peer's server, runs the suite against it, and writes results.json and the tables.
//
//   npm run conformance                     all
//   npm run conformance -- nestarc idempot  these; the others keep their results
//   npm run conformance -- --tables         the tables only, of the results that are there
//   npm run conformance -- --store redis    prints what comes of those that can keep their keys in Redis, at REDIS_URL;
//                                           writes nothing

import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { peers, profileOf } from './peers.mjs'
import { details, summary, withTable } from './table.mjs'

/** The command of the suite, in this repository's build. */
const SUITE = fileURLToPath(new URL('../dist/lib/cli.js', import.meta.url))

const here = fileURLToPath(new URL('.', import.meta.url))
const common = readJson('profile.json')
const { values: options, positionals: names } = parseArgs({
  allowPositionals: true,
  options: { tables: { type: 'boolean' }, store: { type: 'string' } }
})
const scratch = mkdtempSync(join(tmpdir(), 'conformance-'))

try {
  const results = options.tables ? readJson('results.json') : await tried(names)
  if (options.store === undefined) {
    writeJson('results.json', results)
    rewrite('../README.md', summary(results))
    rewrite('README.md', details(results))
  } else console.log(summary(results))
} finally {
  rmSync(scratch, { recursive: true, force: true })
}

/** @param {string[]} names None: all. */
async function tried(names) {
  install()
  const unknown = names.filter((name) => !peers.some((peer) => peer.name === name))
  if (unknown.length > 0) throw new Error(`There is no peer ${unknown.join(', ')}`)
  const earlier = existsSync(new URL('results.json', import.meta.url))
    ? readJson('results.json')
    : { rules: [], peers: [] }
  if (options.store === 'redis') earlier.peers = []
  const results = { date: new Date().toISOString(), node: process.versions.node, rules: earlier.rules, peers: [] }
  for (const peer of peers) {
    const before = earlier.peers.find(({ name }) => name === peer.name)
    const isWanted = (names.length === 0 || names.includes(peer.name)) && (options.store !== 'redis' || peer.redis)
    if (isWanted && isInstalled(peer)) {
      console.log(`== ${peer.name}`)
      const { rules, result } = await tryPeer(peer)
      if (rules.length > 0) results.rules = rules
      results.peers.push(result)
      for (const { id } of rules.filter(({ id }) => result.outcomes[id].outcome === 'failed'))
        console.log(`   ✘ ${id}: ${result.outcomes[id].reason}`)
      if (result.error) console.log(`   ${result.error}`)
    } else if (before !== undefined) {
      if (isWanted) console.log(`== ${peer.name} is not installed: it keeps its results of ${before.date}`)
      results.peers.push(before)
    }
  }
  return results
}

/** The suite against one peer. */
async function tryPeer(peer) {
  const file = join(scratch, `${peer.name}.json`)
  writeFileSync(file, JSON.stringify(profileOf(common, peer)))
  const server = await start(peer)
  let report
  try {
    report = await suite(server.url, file)
    await checkBytes(server.url, report)
  } finally {
    await server.stop()
  }
  if (server.crashes > 0 && report.rules !== undefined) await tryAgain(peer, file, report)
  const outcomes = {}
  for (const { id, outcome, reason } of report.rules ?? []) outcomes[id] = reason ? { outcome, reason } : { outcome }
  for (const [id, [outcome, reason]] of Object.entries(peer.settled ?? {})) outcomes[id] = { outcome, reason }
  const { name, package: packageName, on, note } = peer
  return {
    rules: (report.rules ?? []).map(({ id, level, title }) => ({ id, level, title })),
    result: {
      name,
      package: packageName,
      ...versionOf(packageName),
      on,
      date: new Date().toISOString(),
      seed: report.seed ?? '',
      crashes: server.crashes,
      ...(note && { note }),
      ...(report.error && { error: report.error }),
      outcomes
    }
  }
}

/** The suite compares a retry with the first reply. What that should have been is known here. */
async function checkBytes(url, { rules = [] }) {
  const rule = rules.find(({ id, outcome }) => id === 'binary-reply' && ['passed', 'not-decidable'].includes(outcome))
  if (rule === undefined) return
  const { headers, body, callers, key, binary } = common
  const reply = await fetch(new URL(binary.path, url), {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers, ...callers[0], [key.header]: crypto.randomUUID() },
    body: JSON.stringify(body)
  })
  const bytes = Buffer.from(await reply.arrayBuffer())
  if (bytes.length === 256 && bytes.every((byte, n) => byte === n)) return
  rule.outcome = 'failed'
  rule.reason = `the first reply is not what the handler has sent: 256 bytes became ${bytes.length}`
}

/** A server that ends takes its keys along, and what was tried next is none of its rule's: once more, one by one. */
async function tryAgain(peer, file, report) {
  for (const [n, { id, outcome }] of report.rules.entries()) {
    if (outcome === 'passed' || outcome === 'not-applicable') continue
    const server = await start(peer)
    try {
      const alone = await suite(server.url, file, id)
      if (alone.rules !== undefined) report.rules[n] = alone.rules[0]
      if (server.crashes > 0) report.rules[n].reason += `; the process ended: ${server.lastWords()}`
    } finally {
      await server.stop()
    }
  }
}

/** @returns {Promise<{ rules?: { id: string, level: string, title: string, outcome: string, reason: string }[], seed?: string, error?: string }>} */
async function suite(url, profile, rule) {
  const args = [SUITE, 'conform', url, '--profile', profile, '--reporter', 'json', ...(rule ? ['--rule', rule] : [])]
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  const [output, errors] = [textOf(child.stdout), textOf(child.stderr)]
  const status = await new Promise((resolve) => child.once('close', resolve))
  return status === 2 ? { error: errors().trim() } : JSON.parse(output())
}

/** Starts a peer's server, and starts it again, at the same port, whenever it ends. */
async function start({ name }) {
  let port = 0
  let child
  let errors
  let isWanted = true
  const server = { url: '', crashes: 0, lastWords: () => lastError(errors()), stop }
  await run()
  return server

  async function run() {
    child = spawn(process.execPath, [join(here, 'servers', `${name}.mjs`), '--store', options.store ?? 'memory'], {
      env: { ...process.env, PORT: String(port) },
      stdio: ['ignore', 'pipe', 'pipe']
    })
    errors = textOf(child.stderr)
    const output = textOf(child.stdout)
    const ended = new Promise((resolve) => child.once('exit', resolve))
    await new Promise((resolve, reject) => {
      child.stdout.on('data', () => {
        const [url] = /http:\S+/.exec(output()) ?? []
        if (url === undefined) return
        server.url = url
        port = new URL(url).port
        resolve()
      })
      ended.then(() => reject(new Error(`The server of ${name} ended: ${errors()}`)))
    })
    ended.then(() => {
      if (!isWanted) return
      server.crashes++
      const words = lastError(errors())
      server.lastWords = () => words
      run().catch((error) => {
        if (isWanted) console.error(error.message)
      })
    })
  }

  async function stop() {
    isWanted = false
    if (child.exitCode !== null || child.signalCode !== null) return
    const ended = new Promise((resolve) => child.once('exit', resolve))
    child.kill('SIGKILL')
    await ended
  }
}

/** The line of an uncaught error that names it. */
function lastError(text) {
  return /^.*\w*Error\b.*$/m.exec(text)?.[0].trim() ?? 'without a word'
}

function textOf(stream) {
  let text = ''
  stream.setEncoding('utf8').on('data', (chunk) => {
    text += chunk
  })
  return () => text
}

/**
 * What package.json names is installed as it is locked; what peers.mjs names besides, all at once where npm has it, because
 * it takes away what it is not told of.
 */
function install() {
  const { dependencies } = readJson('package.json')
  if (!Object.entries(dependencies).every(isThere)) npm('ci', '--no-audit', '--no-fund')
  if (peers.every(isInstalled)) return
  const specs = peers
    .filter(({ install = [] }) => install.every((spec) => tarballOf(spec) || isPublished(spec)))
    .flatMap(({ install = [] }) => install.map((spec) => tarballOf(spec) ?? spec))
  if (specs.length > 0) npm('install', '--no-save', '--no-package-lock', ...specs)
}

/** The file that a package was installed from. */
function tarballOf(spec) {
  const { resolved = '' } = installed()[`node_modules/${nameIn(spec)}`] ?? {}
  return resolved.startsWith('file:') ? join(here, resolved.slice(5)) : undefined
}

function isPublished(spec) {
  return spawnSync('npm', ['view', spec, 'version'], { cwd: here, shell: process.platform === 'win32' }).status === 0
}

function npm(...args) {
  const { status } = spawnSync('npm', args, { cwd: here, stdio: 'inherit', shell: process.platform === 'win32' })
  if (status !== 0) console.error(`npm ${args[0]} failed`)
}

function isInstalled({ install = [] }) {
  return install.every((spec) => isThere([nameIn(spec), spec]))
}

/** Is a package there, in the version that a text ends with? */
function isThere([name, spec]) {
  return installed()[`node_modules/${name}`]?.version === /[^@]*$/.exec(spec)[0]
}

function nameIn(spec) {
  return spec.replace(/(?<=.)@[^@]*$/, '')
}

/** What npm says of what is installed. */
function installed() {
  const file = 'node_modules/.package-lock.json'
  return existsSync(new URL(file, import.meta.url)) ? readJson(file).packages : {}
}

function versionOf(name) {
  if (name === readJson('../package.json').name) return { version: readJson('../package.json').version }
  const { version, resolved = '' } = installed()[`node_modules/${name}`]
  return { version, ...(resolved.startsWith('file:') && { built: true }) }
}

function rewrite(page, text) {
  const url = new URL(page, import.meta.url)
  writeFileSync(url, withTable(readFileSync(url, 'utf8'), text))
}

function readJson(file) {
  return JSON.parse(readFileSync(new URL(file, import.meta.url), 'utf8'))
}

function writeJson(file, value) {
  writeFileSync(new URL(file, import.meta.url), `${JSON.stringify(value, null, 2)}\n`)
}
