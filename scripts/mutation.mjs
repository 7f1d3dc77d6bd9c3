// Plants small faults in lib/, one at a time (StrykerJS), and tells which of them no test notices. `npm run mutation`
// does so for all files; `npm run mutation -- key fingerprint` for lib/key.ts and lib/fingerprint.ts;
// `npm run mutation -- key:10-20` for some lines; `npm run mutation -- --again key` for what survived the last time.
// `--last` tells the last outcome once more, without running anything.
// MUTATION_JOBS: how many at once; MUTATION_EXCLUDE: kinds of faults to leave out.
// What may survive is listed in test/mutation/survivors.md, with the reason.

import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const tools = join(root, 'test', 'mutation')
const work = join(root, '.build', 'mutation')

/** For each file of lib/ the tests in which its behaviour is specified, the quick ones first. */
const SPECIFIED_IN = {
  key: 'unit/key properties/key integration/identity',
  fingerprint: 'unit/fingerprint integration/identity',
  options: 'unit/options integration/coverage',
  replay: 'unit/replay integration/replies integration/errors interop/errors interop/cors interop/cookie-and-session',
  'at-hand': 'unit/at-hand unit/local-cache integration/coverage',
  capture: 'unit/capture',
  'client-watch': 'unit/client-watch',
  deadlines: 'unit/deadlines unit/within',
  leases: 'unit/leases unit/deadlines integration/life pitfalls/claim',
  within: 'unit/within unit/deadlines integration/closing',
  waiting: 'unit/waiting integration/duplicates integration/closing',
  token: 'unit/token',
  problem: 'unit/problem integration/problem-details',
  ending: 'unit/ending',
  errors: 'unit/errors unit/within integration/errors integration/duplicates',
  events: 'integration/coverage integration/life integration/errors integration/duplicates',
  exchange: 'unit/exchange integration/coverage integration/life pitfalls/claim pitfalls/failures',
  handler: 'unit/handler',
  'handler-timeout': 'unit/handler-timeout',
  coverage: 'integration/layouts',
  'early-routes': 'unit/early-routes integration/layouts',
  forms: 'unit/forms',
  siblings: 'unit/siblings',
  values: 'unit/options',
  warnings: 'unit/warnings',
  'request-context': 'integration/coverage integration/life integration/identity integration/transactions',
  'instance-api': 'unit/instance-api integration/life',
  'nowhere-response': 'unit/nowhere-response integration/life pitfalls/failures',
  registration: 'integration/layouts integration/coverage integration/closing integration/duplicates',
  plugin:
    'integration/layouts integration/coverage integration/closing interop/hooks interop/encapsulation interop/auth',
  'store-in-use':
    'unit/store-in-use integration/errors integration/life integration/closing pitfalls/failures pitfalls/claim',
  operation: 'unit/operation-claim unit/operation-end unit/operation-transaction',
  lifecycle: 'unit/lifecycle',
  'stores/memory': 'unit/memory-store stores/memory',
  'stores/shelf': 'unit/shelf unit/memory-store unit/local-cache',
  'stores/inner': 'unit/siblings',
  'stores/kept': 'unit/kept unit/memory-store unit/local-cache',
  'stores/local-cache': 'unit/local-cache',
  'stores/record': 'unit/record properties/record',
  'stores/sweeper': 'unit/sweeper',
  'stores/listening': 'stores/redis-wire',
  'stores/redis-eviction': 'stores/redis-eviction',
  'stores/redis-scripts': 'stores/redis-wire stores/redis',
  'stores/redis-batches': 'unit/redis-batching',
  'stores/redis-renewals': 'unit/redis-batching',
  'stores/redis-run': 'unit/redis-batching',
  'stores/redis-errors': 'unit/redis-errors unit/redis-batching',
  'stores/redis-subscriptions': 'unit/redis-subscriptions',
  'stores/sealing': 'unit/sealing',
  'stores/encrypted': 'unit/encrypted stores/encrypted',
  openapi: 'unit/openapi interop/swagger',
  'covered-routes': 'interop/swagger',
  client: 'unit/client',
  'stores/redis': 'unit/redis-store',
  'stores/postgres-errors': 'unit/postgres-errors',
  'stores/postgres-guard': 'unit/sql-guard',
  'stores/postgres-notifications': 'unit/postgres-notifications',
  'stores/postgres-rows': 'unit/postgres-rows',
  'stores/postgres-sql': 'unit/postgres-sql stores/postgres-server stores/postgres',
  'stores/postgres-transaction': 'unit/postgres-transaction',
  'stores/postgres': 'unit/postgres-store'
}

/**
 * @typedef {object} Mutant
 * @property {string} status
 * @property {string} mutatorName
 * @property {string} replacement
 * @property {{ start: { line: number, column: number }, end: { line: number, column: number } }} location
 */

/** @param {string} name */
const reportOf = (name) => join(work, `${name.replaceAll('/', '.')}.json`)

/**
 * Runs Stryker over a file of lib/.
 * @param {string} name
 * @param {string} mutate the file, or parts of it
 */
function run(name, mutate) {
  const tests = SPECIFIED_IN[name].split(' ').map((test) => `.build/test/${test}.test.js`)
  const module = (/** @type {string} */ path) => join(tools, 'node_modules', '@stryker-mutator', path)
  const config = join(work, `${name.replaceAll('/', '.')}.config.json`)
  const report = reportOf(name)
  const options = {
    mutate: mutate.split(','),
    plugins: [module('tap-runner/dist/src/index.js'), join(tools, 'ignore-messages.mjs')],
    ignorers: ['messages'],
    mutator: { excludedMutations: (process.env.MUTATION_EXCLUDE ?? '').split(',').filter(Boolean) },
    testRunner: 'tap',
    tap: { testFiles: tests, forceBail: true },
    coverageAnalysis: 'perTest',
    // TypeScript is a native compiler here, which Stryker cannot ask; types are of no account to mutants either.
    buildCommand: 'tsc -p tsconfig.json --noCheck --sourceMap false',
    tsconfigFile: 'none',
    disableTypeChecks: false,
    tempDirName: join('.build', 'mutation', 'sandbox'),
    symlinkNodeModules: false,
    ignorePatterns: ['/.build', '/dist', '/.tap', '/test/mutation'],
    timeoutMS: 5_000,
    concurrency: Number(process.env.MUTATION_JOBS ?? 2),
    reporters: ['json', 'progress-append-only'],
    jsonReporter: { fileName: report },
    allowEmpty: true
  }
  writeFileSync(config, JSON.stringify(options, null, 2))
  const { status } = spawnSync(process.execPath, [module('core/bin/stryker.js'), 'run', config], {
    cwd: root,
    stdio: 'inherit'
  })
  if (status !== 0) throw new Error(`Stryker failed on ${name}`)
  return outcomeOf(name)
}

/** @param {string} name @returns {{ source: string, mutants: Mutant[] }} */
function outcomeOf(name) {
  return JSON.parse(readFileSync(reportOf(name), 'utf8')).files[`lib/${name}.ts`] ?? { source: '', mutants: [] }
}

/** Code on one line, and not too much of it. @param {string} code */
function brief(code) {
  const line = code.replaceAll(/\s+/g, ' ').trim()
  return line.length <= 100 ? line : `${line.slice(0, 70)} … ${line.slice(-25)}`
}

/**
 * A fault in the line of code in which it begins, where it stands in « ».
 * @param {string} source
 * @param {Mutant} mutant
 */
function describe(source, { location: { start, end }, replacement }) {
  const lines = source.split('\n').slice(start.line - 1, end.line)
  const last = lines.length - 1
  const after = (lines[last] ?? '').slice(end.column - 1)
  lines[last] = (lines[last] ?? '').slice(0, end.column - 1)
  const before = (lines[0] ?? '').slice(0, start.column - 1)
  lines[0] = (lines[0] ?? '').slice(start.column - 1)
  return `- \`${before.trimStart()}«${brief(lines.join('\n'))}»${after}\` → \`${brief(replacement)}\``
}

/** What may live, by file. @returns {Map<string, Set<string>>} */
function listed() {
  const known = new Map()
  let file = ''
  const list = join(tools, 'survivors.md')
  for (const line of existsSync(list) ? readFileSync(list, 'utf8').split('\n') : []) {
    if (line.startsWith('## ')) file = line.slice(3).trim()
    if (!known.has(file)) known.set(file, new Set())
    if (line.startsWith('- `')) known.get(file).add(line.trim())
  }
  return known
}

/** The places of what survived the last time. @param {string} name @param {string} file */
function survivorsOf(name, file) {
  const report = reportOf(name)
  if (!existsSync(report)) return file
  const { source, mutants } = JSON.parse(readFileSync(report, 'utf8')).files[file]
  // Of a file that has changed since, the places are not known.
  if (source !== readFileSync(join(root, file), 'utf8')) return file
  return mutants
    .filter(({ status }) => lives(status))
    .map(({ location: { start, end } }) => `${file}:${start.line}:${start.column - 1}-${end.line}:${end.column - 1}`)
    .join(',')
}

/** @param {string} status */
const lives = (status) => status === 'Survived' || status === 'NoCoverage'

if (!existsSync(join(tools, 'node_modules'))) {
  const { status } = spawnSync('npm', ['ci', '--no-audit', '--no-fund'], { cwd: tools, stdio: 'inherit' })
  if (status !== 0) process.exit(1)
}
mkdirSync(work, { recursive: true })
// Tests that start servers take longer where several run at once.
process.env.TAP_TIMEOUT ??= '120'

const names = process.argv.slice(2).filter((arg) => !arg.startsWith('--'))
const again = process.argv.includes('--again')
const last = process.argv.includes('--last')
const known = listed()
let news = 0
for (const wanted of names.length > 0 ? names : Object.keys(SPECIFIED_IN)) {
  const [name = '', lines] = wanted.split(':')
  const file = `lib/${name}.ts`
  const { source, mutants } = last
    ? outcomeOf(name)
    : run(name, again ? survivorsOf(name, file) : lines ? `${file}:${lines}` : file)
  const counted = mutants.filter(({ status }) => status !== 'Ignored')
  const living = counted.filter(({ status }) => lives(status))
  const score = ((1 - living.length / counted.length) * 100).toFixed(1)
  console.log(`\n| \`${file}\` | ${counted.length} | ${living.length} | ${score} % |`)
  for (const mutant of living) {
    const described = describe(source, mutant)
    if (known.get(file)?.has(described)) continue
    news++
    console.log(`${file}:${mutant.location.start.line} ${mutant.mutatorName}, ${mutant.status}\n  ${described}`)
  }
}
console.log(news === 0 ? '\nNo survivor that is not listed.' : `\n${news} survivors that are not listed.`)
process.exitCode = news === 0 ? 0 : 1
