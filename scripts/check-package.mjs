// Packs the package as it would be published, installs it into an empty project beside Fastify, and uses it there as an
// ES module, a CommonJS module and from TypeScript as both. One line for each check; exits 1 when one fails.

import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, posix } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const { name } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const npmQuiet = ['--no-audit', '--no-fund', '--loglevel=error']

const entries = ['dist/index', 'dist/lib/testkit'].flatMap((entry) => [`${entry}.js`, `${entry}.d.ts`])
const required = ['package.json', 'README.md', 'CHANGELOG.md', 'LICENSE', ...entries]
const allowed =
  /^(package\.json|README\.md|CHANGELOG\.md|LICENSE|dist\/(?!test\/|examples\/).*\.(js|d\.ts|js\.map|d\.ts\.map))$/

/** What each consumer does once it has `fastify` and `idempotency`: JavaScript and TypeScript alike. */
const use = `
  const app = fastify()
  await app.register(idempotency)
  let runs = 0
  app.post('/orders', { config: { idempotency: true } }, async (request) => {
    runs++
    return { attempt: request.idempotency?.attempt }
  })
  app.post('/payments', { config: { idempotency: { required: true, ttl: 3_600_000 } } }, async () => 'paid')
  assert.equal(typeof app.idempotency.generateKey(), 'string')
  const post = () =>
    app.inject({ method: 'POST', url: '/orders', headers: { 'Idempotency-Key': 'k1' }, payload: { item: 1 } })
  const first = await post()
  const second = await post()
  assert.equal(first.statusCode, 200, first.body)
  assert.notEqual(first.headers['idempotent-replayed'], 'true', 'the first reply is not a replay')
  assert.equal(second.statusCode, 200, second.body)
  assert.equal(second.headers['idempotent-replayed'], 'true', 'the second reply is a replay')
  assert.equal(second.body, first.body)
  assert.equal(runs, 1, 'the handler ran once')
  await app.close()
`
const classes = `
  assert.equal(typeof MemoryStore, 'function')
  assert.equal(typeof RedisStore, 'function')
  assert.equal(typeof PostgresStore, 'function')
`
/** All cases of the conformance kit, without a test runner. */
const conformance = `
  const cases = storeConformance(() => new MemoryStore())
  assert.ok(cases.length > 100, 'the kit has its cases')
  const outcomes = await Promise.allSettled(cases.map(({ run }) => run()))
  for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
`
const main = (/** @type {string} */ body) =>
  `async function main() {${body}}\nmain().catch((error) => {\n  console.error(error)\n  process.exitCode = 1\n})\n`

/** @type {Record<string, string>} */
const sources = {
  'esm.mjs': `
import assert from 'node:assert/strict'
import fastify from 'fastify'
import idempotency, { MemoryStore, PostgresStore, RedisStore, idempotency as named } from '${name}'
import { storeConformance } from '${name}/testkit'
assert.equal(idempotency, named)
${classes}${use}${conformance}`,

  'commonjs.cjs': `
const assert = require('node:assert/strict')
const fastify = require('fastify')
const idempotency = require('${name}')
const { storeConformance } = require('${name}/testkit')
const { MemoryStore, PostgresStore, RedisStore } = idempotency
assert.equal(typeof idempotency, 'function')
assert.equal(idempotency, idempotency.default)
assert.equal(idempotency, idempotency.idempotency)
${classes}${main(use + conformance)}`,

  'node-test.test.mjs': `
import test from 'node:test'
import { MemoryStore } from '${name}'
import { storeConformance } from '${name}/testkit'
for (const { name, run } of storeConformance(() => new MemoryStore())) test(name, run)
`,

  'typescript-esm.ts': `
import assert from 'node:assert/strict'
import fastify from 'fastify'
import idempotency, { MemoryStore, PostgresStore, RedisStore, idempotency as named } from '${name}'
import { storeConformance } from '${name}/testkit'
assert.equal(idempotency, named)
${classes}${use}${conformance}`,

  'typescript-commonjs-require.cts': `
import assert = require('node:assert/strict')
import fastify = require('fastify')
import idempotency = require('${name}')
import { storeConformance } from '${name}/testkit'
const { MemoryStore, PostgresStore, RedisStore } = idempotency
assert.equal(typeof idempotency, 'function')
${classes}${main(use + conformance)}`,

  'typescript-commonjs-import.cts': `
import assert from 'node:assert/strict'
import fastify from 'fastify'
import idempotency, { MemoryStore, PostgresStore, RedisStore, idempotency as named } from '${name}'
import { storeConformance } from '${name}/testkit'
assert.equal(idempotency, named)
${classes}${main(use + conformance)}`
}

const work = mkdtempSync(join(tmpdir(), 'check-package-'))
process.on('exit', () => rmSync(work, { recursive: true, force: true }))
let failures = 0

/** @type {(what: string, check: () => string | void) => boolean} */
function step(what, check) {
  try {
    console.log(`ok      ${what}${check() ?? ''}`)
    return true
  } catch (error) {
    failures++
    console.log(`not ok  ${what}\n${error instanceof Error ? error.message : error}`)
    return false
  }
}

/** @type {(command: string, args: string[], cwd: string) => string} */
function run(command, args, cwd) {
  const { status, signal, error, stdout, stderr } = spawnSync(command, args, {
    cwd,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 1 << 26,
    timeout: 600_000
  })
  if (status === 0) return stdout
  const reason = error ? error.message : `exit ${status ?? signal}`
  throw new Error(`$ ${[command, ...args].join(' ')}\n${stdout ?? ''}${stderr ?? ''}(${reason})`)
}

/** @type {(check: unknown, message: string) => asserts check} */
function assert(check, message) {
  if (!check) throw new Error(message)
}

function pack() {
  run('npm', ['pack', '--pack-destination', work, '--loglevel=error'], root)
  const tarball = readdirSync(work).find((file) => file.endsWith('.tgz'))
  assert(tarball, 'npm pack made no tarball')
  return join(work, tarball)
}

/** @type {(tarball: string) => string} */
function checkFiles(tarball) {
  const files = run('tar', ['-tzf', tarball], work)
    .split('\n')
    .filter((file) => file && !file.endsWith('/'))
    .map((file) => file.replace(/^package\//, ''))
  const missing = required.filter((file) => !files.includes(file))
  const strange = files.filter((file) => !allowed.test(file) || /\.test\./.test(file))
  assert(missing.length === 0, `missing from the tarball: ${missing.join(', ')}`)
  assert(strange.length === 0, `should not be in the tarball: ${strange.join(', ')}`)
  run('tar', ['-xzf', tarball], work)
  for (const file of files.filter((file) => /\.(js|ts|map)$/.test(file))) checkMap(files, file)
  return ` (${files.length} files, ${Math.ceil(statSync(tarball).size / 1024)} KiB packed)`
}

/**
 * A map's sources are in it or in the package, and the map that a file names is there.
 * @type {(files: string[], file: string) => void}
 */
function checkMap(files, file) {
  const text = readFileSync(join(work, 'package', file), 'utf8')
  const beside = (/** @type {string} */ path) => posix.normalize(posix.join(dirname(file), path))
  if (file.endsWith('.map')) {
    const { sources, sourcesContent } = JSON.parse(text)
    const lost = sources.filter(
      (/** @type {string} */ source, /** @type {number} */ at) =>
        !sourcesContent?.[at] && !files.includes(beside(source))
    )
    assert(lost.length === 0, `${file} points to what is not in the tarball: ${lost.join(', ')}`)
  } else {
    const map = /^\/\/# sourceMappingURL=(\S+)$/m.exec(text)?.[1]
    assert(
      !map || map.startsWith('data:') || files.includes(beside(map)),
      `${file} names a map that is not there: ${map}`
    )
  }
}

/** @type {(tarball: string) => string} An empty project with the package, and with our versions of what it is used with. */
function install(tarball) {
  const project = join(work, 'project')
  mkdirSync(project)
  writeFileSync(join(project, 'package.json'), '{ "private": true, "type": "module" }\n')
  const others = ['fastify', 'ioredis', 'typescript', '@types/node'].map((dependency) => {
    const { version } = JSON.parse(readFileSync(join(root, 'node_modules', dependency, 'package.json'), 'utf8'))
    return `${dependency}@${version}`
  })
  run('npm', ['install', ...npmQuiet, '--prefer-offline', '--no-package-lock', tarball, ...others], project)
  for (const [file, source] of Object.entries(sources)) writeFileSync(join(project, file), source)
  return project
}

/** @type {(project: string) => void} */
function compile(project) {
  const compilerOptions = {
    target: 'ES2023',
    module: 'NodeNext',
    moduleResolution: 'NodeNext',
    lib: ['ES2023'],
    types: ['node'],
    strict: true,
    exactOptionalPropertyTypes: true,
    skipLibCheck: false,
    outDir: 'built'
  }
  writeFileSync(join(project, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts', '*.cts'] }))
  run(process.execPath, [join(project, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', project], project)
}

let tarball = ''
let project = ''
const ready =
  step('npm pack', () => {
    tarball = pack()
  }) &&
  step('the tarball', () => checkFiles(tarball)) &&
  step('npm install of the tarball', () => {
    project = install(tarball)
  })
if (ready) {
  const compiled = step('TypeScript, strict, NodeNext', () => compile(project))
  for (const file of Object.keys(sources)) {
    const script = /\.c?ts$/.test(file) ? join('built', file.replace(/ts$/, 'js')) : file
    if (script === file || (compiled && existsSync(join(project, script)))) {
      step(file, () => void run(process.execPath, [script], project))
    }
  }
}
process.exitCode = failures > 0 ? 1 : 0
