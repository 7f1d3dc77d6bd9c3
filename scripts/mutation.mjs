// Plants small faults in a file of lib/, one at a time (StrykerJS), and tells which of them no test notices:
//
//   npm run mutation -- http/key                     for lib/http/key.ts
//   npm run mutation -- http/key:10-20               for some lines
//   npm run mutation -- http/key test/unit/key       with other tests than those that import the file
//
// Without tests it takes those of test/unit and test/properties that import the file, or all of test/integration where
// none does. MUTATION_JOBS: how many at once; MUTATION_EXCLUDE: kinds of faults to leave out. Where a fault may live and
// a reader would wonder, the code says why: `// Stryker disable next-line <kind>: <reason>`.

import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const tools = join(root, 'test', 'mutation')
const work = join(root, '.build', 'mutation')
const report = join(work, 'report.json')

/** @param {string} folder */
const testsIn = (folder) =>
  readdirSync(join(root, folder))
    .filter((test) => test.endsWith('.test.ts'))
    .map((test) => `${folder}/${test}`)

/**
 * The tests in which a file is specified.
 * @param {string} file
 */
function testsOf(file) {
  const imported = `/${file.replace(/\.ts$/, '.js')}'`
  const tests = [...testsIn('test/unit'), ...testsIn('test/properties')]
  const specified = tests.filter((test) => readFileSync(join(root, test), 'utf8').includes(imported))
  return specified.length > 0 ? specified : testsIn('test/integration')
}

/**
 * Runs Stryker over a file of lib/.
 * @param {string} mutate the file, or a part of it
 * @param {string[]} tests
 */
function run(mutate, tests) {
  const module = (/** @type {string} */ path) => join(tools, 'node_modules', '@stryker-mutator', path)
  const config = join(work, 'config.json')
  const options = {
    mutate: [mutate],
    plugins: [module('tap-runner/dist/src/index.js'), join(tools, 'ignore-messages.mjs')],
    ignorers: ['messages'],
    mutator: { excludedMutations: (process.env.MUTATION_EXCLUDE ?? '').split(',').filter(Boolean) },
    testRunner: 'tap',
    tap: {
      testFiles: tests.map((test) => join('.build', test.replace(/(\.test)?(\.ts)?$/, '.test.js'))),
      forceBail: true
    },
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
  if (status !== 0) throw new Error(`Stryker failed on ${mutate}`)
}

/** Code on one line, and not too much of it. @param {string} code */
function brief(code) {
  const line = code.replaceAll(/\s+/g, ' ').trim()
  return line.length <= 100 ? line : `${line.slice(0, 70)} … ${line.slice(-25)}`
}

/**
 * @typedef {object} Mutant
 * @property {string} status
 * @property {string} mutatorName
 * @property {string} replacement
 * @property {{ start: { line: number, column: number }, end: { line: number, column: number } }} location
 */

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
  return `${before.trimStart()}«${brief(lines.join('\n'))}»${after} → ${brief(replacement)}`
}

const [wanted, ...named] = process.argv.slice(2)
if (wanted === undefined) {
  console.error('Name a file of lib/, such as http/key: npm run mutation -- http/key')
  process.exit(1)
}
if (!existsSync(join(tools, 'node_modules', '.package-lock.json'))) {
  const { status } = spawnSync('npm', ['ci', '--no-audit', '--no-fund'], { cwd: tools, stdio: 'inherit' })
  if (status !== 0) process.exit(1)
}
mkdirSync(work, { recursive: true })
// Tests that start servers take longer where several run at once.
process.env.TAP_TIMEOUT ??= '120'

const [name = '', lines] = wanted.split(':')
const file = `lib/${name}.ts`
run(lines === undefined ? file : `${file}:${lines}`, named.length > 0 ? named : testsOf(file))
/** @type {{ source: string, mutants: Mutant[] }} */
const { source, mutants } = JSON.parse(readFileSync(report, 'utf8')).files[file] ?? { source: '', mutants: [] }
const counted = mutants.filter(({ status }) => status !== 'Ignored')
const alive = counted.filter(({ status }) => status === 'Survived' || status === 'NoCoverage')
for (const mutant of alive) {
  console.log(`${file}:${mutant.location.start.line} ${mutant.mutatorName}, ${mutant.status}`)
  console.log(`  ${describe(source, mutant)}`)
}
console.log(`${file}: ${counted.length} faults, ${alive.length} of which no test has noticed`)
