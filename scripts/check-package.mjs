// Packs the package as it would be published (scripts/release.mjs), asks publint and attw about it, installs it into an empty project beside
// Fastify, and uses it there as an ES module, a CommonJS module, both at once, and from TypeScript as both, under every
// way to resolve modules; then in the applications of test/layouts/, and in examples/nest. One line for each check; exits 1
// when one fails.

import { spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const { name } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const npmQuiet = ['--no-audit', '--no-fund', '--loglevel=error']

const subpaths = ['client', 'conform', 'testing', 'testkit', 'transactions']
const entries = ['dist/index', ...subpaths.map((subpath) => `dist/lib/${subpath}`)].flatMap((entry) => [
  `${entry}.js`,
  `${entry}.mjs`,
  `${entry}.d.ts`,
  `${entry}.d.mts`
])
const docs = readdirSync(join(root, 'docs'))
  .filter((file) => file.endsWith('.md'))
  .map((file) => `docs/${file}`)
const pages = ['README.md', 'CHANGELOG.md', 'SECURITY.md', 'llms.txt']
const required = ['package.json', 'dist/package.json', 'LICENSE', ...pages, ...entries, ...docs]
const allowed =
  /^(package\.json|(README|CHANGELOG|SECURITY)\.md|llms\.txt|LICENSE|docs\/[\w-]+\.md|dist\/(package\.json|(index|(lib|types)\/[\w/-]+)\.(m?js|d\.m?ts)))$/

/** Who publishes the package says where it is. Nothing of this one is published. */
const REPOSITORY = 'https://github.com/example/fastify-idempotency'
const script = join(root, 'scripts', 'release.mjs')

/** For projects that have not come to our own: the oldest way to resolve modules is gone from TypeScript 7. */
const OLDER_TYPESCRIPT = '5.9.3'

/** What the applications of test/layouts/ use besides. */
const layoutPackages = ['@fastify/autoload@6.5.0', 'fastify-cli@8.0.2', 'fastify-plugin@6', 'jest@30.5.2']
const layouts = readdirSync(join(root, 'test', 'layouts'), { withFileTypes: true }).flatMap((entry) =>
  entry.isDirectory() ? [entry.name] : []
)

/** An example that is a project of its own: what it needs besides Fastify and this package. */
const nest = JSON.parse(readFileSync(join(root, 'examples', 'nest', 'package.json'), 'utf8'))
const { [name]: _, ...nestPackages } = { ...nest.dependencies, ...nest.devDependencies }

/** What each consumer does once it has `fastify` and `idempotency`: JavaScript and TypeScript alike. */
const use = `
  const app = fastify()
  const store = new LocalCache(new EncryptedStore(new MemoryStore(), { keys: [Buffer.alloc(32, 1)] }))
  await app.register(idempotency, { store })
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
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  const send = idempotentFetch()
  const reply = await send(url + '/orders', { method: 'POST', idempotencyKey: 'k2' })
  assert.deepEqual(reply.idempotency, { key: 'k2', attempts: 1, replayed: false })
  assert.deepEqual(await reply.json(), { attempt: 1 })
  assert.equal((await send(url + '/orders', { method: 'POST', idempotencyKey: 'k2' })).idempotency.replayed, true)
  await app.close()
`
const named =
  'EncryptedStore, LocalCache, MemoryStore, MysqlStore, PostgresStore, RedisStore, openapiTransform, payloadFingerprint'
const transactions =
  'libsqlTransactions, mongoTransactions, mysqlTransactions, pgTransactions, sqliteTransactions, sqlTransactions'
const functions = `
for (const it of [${named}, ${transactions}]) assert.equal(typeof it, 'function')
`
/** What TypeScript shall find, besides what the code uses. */
const types = `
import type {
  Acquisition, EncryptedStoreOptions, EncryptionKey, IdempotencyEvent, IdempotencyOptions, IdempotencyStore,
  LocalCacheOptions, MemoryStoreOptions, MysqlStoreOptions, OpenapiTransform, PostgresStoreOptions, RedisStoreOptions, StoredRecord, Transactions
} from '${name}'
import type { IdempotentFetch, IdempotentFetchOptions } from '${name}/client'
import type { TestClaim, TestRecord } from '${name}/testing'
import type { ConformanceCase, StoreFactory } from '${name}/testkit'
import type { SqlTransactions, SqlTransactionsOptions } from '${name}/transactions'
export type All = [
  Acquisition, EncryptedStoreOptions, EncryptionKey, IdempotencyEvent, IdempotencyOptions, IdempotencyStore,
  LocalCacheOptions, MemoryStoreOptions, MysqlStoreOptions, OpenapiTransform, PostgresStoreOptions, RedisStoreOptions, StoredRecord,
  IdempotentFetch, IdempotentFetchOptions, TestClaim, TestRecord, ConformanceCase, StoreFactory,
  SqlTransactions<unknown>, SqlTransactionsOptions<unknown>, Transactions<unknown>
]
// @ts-expect-error: an option that is \`any\` would be found here.
export const wrong: IdempotencyOptions = { ttl: true }
// @ts-expect-error
export const alsoWrong: IdempotentFetchOptions = { timeout: 'soon' }
`
/** The clock that a TestStore moves is that of the plugin, however each of them was loaded. */
const testing = `
  const kept = new TestStore()
  const shop = fastify()
  await shop.register(idempotency, { store: kept, ttl: 60_000 })
  shop.post('/', { config: { idempotency: true } }, async () => 'done')
  await shop.inject({ method: 'POST', url: '/', headers: { 'Idempotency-Key': 'k' } })
  await kept.advance(59_000)
  assert.equal(kept.records()[0]?.route, '/')
  await kept.advance(1_000)
  assert.equal(kept.records().length, 0)
  await shop.close()
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
import idempotency, { ${named}, idempotency as named } from '${name}'
import { idempotentFetch } from '${name}/client'
import { TestStore } from '${name}/testing'
import { storeConformance } from '${name}/testkit'
import { ${transactions} } from '${name}/transactions'
assert.equal(idempotency, named)
${functions}${use}${conformance}${testing}`,

  'commonjs.cjs': `
const assert = require('node:assert/strict')
const fastify = require('fastify')
const idempotency = require('${name}')
const { idempotentFetch } = require('${name}/client')
const { TestStore } = require('${name}/testing')
const { storeConformance } = require('${name}/testkit')
const { ${transactions} } = require('${name}/transactions')
const { ${named} } = idempotency
assert.equal(typeof idempotency, 'function')
assert.equal(idempotency, idempotency.default)
assert.equal(idempotency, idempotency.idempotency)
${functions}${main(use + conformance + testing)}`,

  'both.mjs': `
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import * as imported from '${name}'
import * as importedTesting from '${name}/testing'
import * as importedKit from '${name}/testkit'
import * as importedTransactions from '${name}/transactions'
const require = createRequire(import.meta.url)
const required = require('${name}')
assert.equal(imported.default, required)
for (const [name, value] of Object.entries(imported)) assert.equal(value, required[name], name)
assert.equal(importedTesting.TestStore, require('${name}/testing').TestStore)
assert.equal(importedKit.storeConformance, require('${name}/testkit').storeConformance)
assert.equal(importedTransactions.sqlTransactions, require('${name}/transactions').sqlTransactions)
for (const it of Object.keys(require('${name}/client'))) assert.ok(it in (await import('${name}/client')), it)
`,

  'node-test.test.mjs': `
import test from 'node:test'
import { MemoryStore } from '${name}'
import { storeConformance } from '${name}/testkit'
for (const { name, run } of storeConformance(() => new MemoryStore())) test(name, run)
`,

  'typescript-esm.ts': `${types}
import assert from 'node:assert/strict'
import fastify from 'fastify'
import idempotency, { ${named}, idempotency as named } from '${name}'
import { idempotentFetch } from '${name}/client'
import { TestStore } from '${name}/testing'
import { storeConformance } from '${name}/testkit'
import { ${transactions} } from '${name}/transactions'
assert.equal(idempotency, named)
${functions}${use}${conformance}${testing}`,

  'typescript-commonjs-require.cts': `${types}
import assert = require('node:assert/strict')
import fastify = require('fastify')
import idempotency = require('${name}')
import { idempotentFetch } from '${name}/client'
import { TestStore } from '${name}/testing'
import { storeConformance } from '${name}/testkit'
import { ${transactions} } from '${name}/transactions'
const { ${named} } = idempotency
assert.equal(typeof idempotency, 'function')
${functions}${main(use + conformance + testing)}`,

  'typescript-commonjs-import.cts': `${types}
import assert from 'node:assert/strict'
import fastify from 'fastify'
import idempotency, { ${named}, idempotency as named } from '${name}'
import { idempotentFetch } from '${name}/client'
import { TestStore } from '${name}/testing'
import { storeConformance } from '${name}/testkit'
import { ${transactions} } from '${name}/transactions'
assert.equal(idempotency, named)
${functions}${main(use + conformance + testing)}`,

  // In a browser, where there is no Node.
  'browser.ts': `
import { type IdempotentResponse, IdempotentFetchError, idempotentFetch } from '${name}/client'
const send = idempotentFetch({ timeout: null })
export async function pay(form: FormData): Promise<IdempotentResponse | null> {
  try {
    return await send('/payments', { method: 'POST', body: form, idempotencyKey: crypto.randomUUID() })
  } catch (error) {
    if (error instanceof IdempotentFetchError) return null
    throw error
  }
}
`
}

const node = { target: 'ES2023', lib: ['ES2023'], types: ['node'] }
const inCommonJs = ['typescript-commonjs-require.cts', 'typescript-commonjs-import.cts']

/**
 * How projects resolve modules. The first one's output is run.
 * @type {[what: string, compiler: string, files: string[], compilerOptions: Record<string, unknown>][]}
 */
const compilations = [
  ['NodeNext', 'typescript', ['typescript-esm.ts', ...inCommonJs], { ...node, module: 'NodeNext', outDir: 'built' }],
  ['Node20', 'typescript', ['typescript-esm.ts', ...inCommonJs], { ...node, module: 'Node20' }],
  ['Node16', 'typescript', ['typescript-esm.ts'], { ...node, module: 'Node16' }],
  ['Bundler', 'typescript', ['typescript-esm.ts'], { ...node, module: 'Preserve', moduleResolution: 'Bundler' }],
  [
    'Bundler, for browsers',
    'typescript',
    ['browser.ts'],
    { target: 'ES2023', lib: ['ES2023', 'DOM'], types: [], module: 'ESNext', moduleResolution: 'Bundler' }
  ],
  ['NodeNext', 'typescript-5', ['typescript-esm.ts', ...inCommonJs], { ...node, module: 'NodeNext' }],
  // Knows neither `exports` nor what `require()` gets: there the plugin is imported.
  [
    'Node10',
    'typescript-5',
    ['typescript-commonjs-import.cts'],
    { ...node, module: 'CommonJS', moduleResolution: 'Node10', esModuleInterop: true }
  ]
]

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
  const refused = spawnSync(process.execPath, [script], { env: { ...process.env, RELEASE_REPOSITORY: '' } })
  assert(refused.status !== 0, 'it is made although nobody says where the repository is')
  run('npm', ['run', 'build', '--silent'], root)
  const folder = join(work, 'release')
  run(process.execPath, [script, '--repository', REPOSITORY, '--out', folder], root)
  run('npm', ['pack', '--pack-destination', work, '--loglevel=error'], folder)
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
  const read = (/** @type {string} */ file) => readFileSync(join(work, 'package', file), 'utf8')
  const { repository, homepage, bugs, scripts } = JSON.parse(read('package.json'))
  const named = [repository?.url, homepage, bugs?.url].join()
  assert(named === `git+${REPOSITORY}.git,${REPOSITORY}#readme,${REPOSITORY}/issues`, `package.json names ${named}`)
  assert(scripts === undefined, 'package.json has scripts')
  const relative = read('README.md').match(/\]\((?!https:|#)[^)]*\)/g)
  assert(relative === null, `npm shows the README by itself, and it has relative links: ${relative}`)
  // No maps, and so none is named: the sources are not there.
  const mapped = files.filter((file) =>
    /^\/\/# sourceMappingURL=/m.test(readFileSync(join(work, 'package', file), 'utf8'))
  )
  assert(mapped.length === 0, `names a source map: ${mapped.join(', ')}`)
  return ` (${files.length} files, ${Math.ceil(statSync(tarball).size / 1024)} KiB packed)`
}

/** @type {(tarball: string) => void} */
function lintPackage(tarball) {
  run(join(root, 'node_modules', '.bin', 'publint'), ['run', tarball, '--strict'], root)
}

/** @type {(tarball: string) => void} */
function lintTypes(tarball) {
  run(join(root, 'node_modules', '.bin', 'attw'), [tarball, '--no-color'], root)
}

/** @type {(dependency: string) => string} The version that is installed here. */
function versionOf(dependency) {
  return JSON.parse(readFileSync(join(root, 'node_modules', dependency, 'package.json'), 'utf8')).version
}

/** @type {(tarball: string) => string} An empty project with the package, and with our versions of what it is used with. */
function install(tarball) {
  const project = join(work, 'project')
  mkdirSync(project)
  const others = ['fastify', 'ioredis', 'typescript', '@types/node'].map((other) => `${other}@${versionOf(other)}`)
  others.push(`typescript-5@npm:typescript@${OLDER_TYPESCRIPT}`, ...layoutPackages)
  const known = new Set(others.map((other) => other.slice(0, other.indexOf('@', 1))))
  for (const [other, version] of Object.entries(nestPackages)) if (!known.has(other)) others.push(`${other}@${version}`)
  // One Fastify for all of them, as there is where only Nest brings one.
  const overrides = { '@nestjs/platform-fastify': { fastify: versionOf('fastify') } }
  writeFileSync(join(project, 'package.json'), JSON.stringify({ private: true, type: 'module', overrides }))
  run('npm', ['install', ...npmQuiet, '--prefer-offline', '--no-package-lock', tarball, ...others], project)
  for (const [file, source] of Object.entries(sources)) writeFileSync(join(project, file), source)
  cpSync(join(root, 'test', 'layouts'), join(project, 'layouts'), { recursive: true })
  // Without what was installed and built there.
  const isSource = (/** @type {string} */ path) => !/[\\/]nest[\\/](node_modules|dist)$/.test(path)
  cpSync(join(root, 'examples', 'nest'), join(project, 'nest'), { recursive: true, filter: isSource })
  return project
}

/** @type {(project: string, compilation: (typeof compilations)[number]) => void} */
function compile(project, [what, compiler, files, { outDir, ...compilerOptions }]) {
  const strict = { strict: true, exactOptionalPropertyTypes: true, skipLibCheck: false }
  const output = outDir === undefined ? { noEmit: true } : { outDir, rootDir: '.' }
  const config = join(project, `tsconfig.${compiler}-${what.replace(/\W/g, '')}.json`)
  writeFileSync(config, JSON.stringify({ compilerOptions: { ...compilerOptions, ...strict, ...output }, files }))
  run(process.execPath, [join(project, 'node_modules', compiler, 'bin', 'tsc'), '-p', config], project)
}

/** @type {(project: string) => void} Its tests, by Jest in CommonJS. */
function testNest(project) {
  const cwd = join(project, 'nest')
  const modules = join(project, 'node_modules')
  run(process.execPath, [join(modules, 'typescript', 'bin', 'tsc')], cwd)
  run(process.execPath, [join(modules, 'jest', 'bin', 'jest.js'), '--ci', '--runInBand', '--no-cache'], cwd)
}

let tarball = ''
let project = ''
const ready =
  step('npm pack', () => {
    tarball = pack()
  }) &&
  step('the tarball', () => checkFiles(tarball)) && [
    step('publint', () => lintPackage(tarball)),
    step('attw', () => lintTypes(tarball))
  ] &&
  step('npm install of the tarball', () => {
    project = install(tarball)
  })
if (ready) {
  for (const compilation of compilations) {
    const [what, compiler] = compilation
    step(`${compiler}, strict, ${what}`, () => compile(project, compilation))
  }
  for (const file of Object.keys(sources).filter((file) => file !== 'browser.ts')) {
    const script = /\.c?ts$/.test(file) ? join('built', file.replace(/ts$/, 'js')) : file
    step(file, () => void run(process.execPath, [script], project))
  }
  step('the command', () => {
    const rules = run(join(project, 'node_modules', '.bin', name), ['rules'], project)
    assert(rules.startsWith('must'), `it lists no rules: ${rules}`)
  })
  for (const layout of layouts) {
    step(`layout ${layout}`, () => void run(process.execPath, ['run.js'], join(project, 'layouts', layout)))
  }
  step('example nest', () => testNest(project))
}
process.exitCode = failures > 0 ? 1 : 0
