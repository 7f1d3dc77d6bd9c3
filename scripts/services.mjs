// The servers and programs that the tests start. `node scripts/services.mjs` makes sure that they are there:
// it installs them where root or sudo allow, unpacks them into .cache where not, or says what to do.

import { spawn, spawnSync } from 'node:child_process'
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync
} from 'node:fs'
import { createRequire } from 'node:module'
import { delimiter, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const caches = {
  redis: join(root, '.cache', 'redis'),
  postgres: join(root, '.cache', 'postgres'),
  mariadb: join(root, '.cache', 'mariadb'),
  chromium: join(root, '.cache', 'chromium')
}

/**
 * @typedef {object} Redis
 * @property {string} server Path of redis-server. A link to redis-check-rdb on Debian, which looks at the name it was
 *   called by: never resolve it.
 * @property {Record<string, string>} env What its environment needs on top of ours.
 */

/**
 * Where redis-server is: `REDIS_SERVER` when set, else on the PATH, else unpacked in .cache.
 * @returns {Redis | null}
 */
export function findRedis() {
  const named = process.env.REDIS_SERVER
  if (named) return { server: named, env: {} }
  for (const dir of (process.env.PATH ?? '').split(delimiter)) {
    const server = join(dir || '.', 'redis-server')
    if (isExecutable(server)) return { server, env: {} }
  }
  const server = join(caches.redis, 'usr', 'bin', 'redis-server')
  return isExecutable(server) ? { server, env: unpackedLibraries(caches.redis) } : null
}

/**
 * @typedef {object} Postgres
 * @property {string} bin The folder with initdb and postgres.
 * @property {Record<string, string>} env What its environment needs on top of ours.
 */

/**
 * Where PostgreSQL's programs are: in `POSTGRES_BIN` when set, else where Debian puts them, else on the PATH, else
 * unpacked in .cache.
 * @returns {Postgres | null}
 */
export function findPostgres() {
  const named = process.env.POSTGRES_BIN
  if (named) return { bin: named, env: {} }
  const bins = [...versionsIn('/usr/lib/postgresql'), ...(process.env.PATH ?? '').split(delimiter)]
  const has = (/** @type {string} */ bin) => isExecutable(join(bin, 'initdb')) && isExecutable(join(bin, 'postgres'))
  const bin = bins.find(has)
  if (bin) return { bin, env: {} }
  const unpacked = versionsIn(join(caches.postgres, 'usr', 'lib', 'postgresql')).find(has)
  return unpacked ? { bin: unpacked, env: unpackedLibraries(caches.postgres) } : null
}

/**
 * @typedef {object} Mariadb
 * @property {string} server Path of mariadbd.
 * @property {string[]} args What it has to be told on top of ours.
 * @property {Record<string, string>} env What its environment needs on top of ours.
 */

/**
 * Where mariadbd is: `MARIADB_SERVER` when set, else on the PATH or where Debian puts it, else unpacked in .cache.
 * @returns {Mariadb | null}
 */
export function findMariadb() {
  const named = process.env.MARIADB_SERVER
  if (named) return { server: named, args: [], env: {} }
  for (const dir of [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin']) {
    const server = join(dir || '.', 'mariadbd')
    if (isExecutable(server)) return { server, args: [], env: {} }
  }
  const base = join(caches.mariadb, 'usr')
  const server = join(base, 'sbin', 'mariadbd')
  if (!isExecutable(server)) return null
  return { server, args: [`--basedir=${base}`], env: unpackedLibraries(caches.mariadb) }
}

/**
 * @typedef {object} Chromium
 * @property {string} program Path of the browser.
 * @property {Record<string, string>} env What its environment needs on top of ours.
 */

/**
 * Where Chromium is, or Chrome: `CHROMIUM` when set, else on the PATH, else unpacked in .cache.
 * @returns {Chromium | null}
 */
export function findChromium() {
  const named = process.env.CHROMIUM
  if (named) return { program: named, env: {} }
  for (const name of ['chromium', 'google-chrome', 'chromium-browser'])
    for (const dir of (process.env.PATH ?? '').split(delimiter)) {
      const program = join(dir || '.', name)
      if (isExecutable(program)) return { program, env: {} }
    }
  // Not usr/bin/chromium: that is a script which starts the one in /usr/lib.
  const program = join(caches.chromium, 'usr', 'lib', 'chromium', 'chromium')
  if (!isExecutable(program)) return null
  // Without fonts it draws no text. They are unpacked where the system has none.
  const fonts = existsSync(join(caches.chromium, 'etc', 'fonts')) ? { FONTCONFIG_SYSROOT: caches.chromium } : {}
  return { program, env: { ...unpackedLibraries(caches.chromium), ...fonts } }
}

/** @param {string} dir Debian's folder of versions; the newest comes first */
function versionsIn(dir) {
  if (!existsSync(dir)) return []
  const versions = readdirSync(dir).sort((a, b) => Number(b) - Number(a))
  return versions.map((version) => join(dir, version, 'bin'))
}

/** @param {string} path */
function isExecutable(path) {
  try {
    accessSync(path, constants.X_OK)
    return statSync(path).isFile()
  } catch {
    return false
  }
}

/** @param {string} cache */
function unpackedLibraries(cache) {
  const dirs = process.env.LD_LIBRARY_PATH ? [process.env.LD_LIBRARY_PATH] : []
  for (const base of [join(cache, 'usr', 'lib'), join(cache, 'lib')]) {
    if (!existsSync(base)) continue
    for (const name of readdirSync(base)) {
      if (!name.includes('-linux-')) continue
      // Some libraries have a folder of their own, as those of PulseAudio.
      for (const inner of readdirSync(join(base, name), { withFileTypes: true }))
        if (inner.isDirectory() && readdirSync(join(base, name, inner.name)).some((file) => file.startsWith('lib')))
          dirs.push(join(base, name, inner.name))
      dirs.unshift(join(base, name))
    }
  }
  return { LD_LIBRARY_PATH: dirs.join(':') }
}

/**
 * Runs a command to its end. Its output is kept, not shown.
 * @param {string} command
 * @param {string[]} args
 * @param {{ cwd?: string, env?: Record<string, string> }} [options]
 */
function run(command, args, { cwd, env } = {}) {
  const { status, signal, error, stdout, stderr } = spawnSync(command, args, {
    cwd,
    env: { ...process.env, LC_ALL: 'C', ...env },
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 1 << 26
  })
  const ok = status === 0
  const said = `${stdout ?? ''}${stderr ?? ''}`.trim()
  const reason = error ? error.message : `exit ${status ?? signal}`
  return { ok, stdout: stdout ?? '', report: ok ? '' : `$ ${[command, ...args].join(' ')}\n${said}\n(${reason})` }
}

/**
 * Whether the server starts at all: `version` says so, `report` says why not.
 * @param {string} server
 * @param {Record<string, string>} env
 */
function probe(server, env) {
  const { stdout, report } = run(server, ['--version'], { env })
  return { version: /(?:\bv=|PostgreSQL\) |mariadbd +Ver |Chromium |Chrome )(\S+)/.exec(stdout)?.[1], report }
}

// An update that could not fetch its lists is an error, not the warning that `install` then says nothing of.
const quiet = ['-qq', '-o', 'APT::Update::Error-Mode=any']

/** @returns {string[] | null} what to put before a command to run it as root; `null` when that is not allowed */
function asRoot() {
  if (process.getuid?.() === 0) return []
  return run('sudo', ['-n', 'true']).ok ? ['sudo', '-n'] : null
}

/**
 * Installs one of Debian's packages. A service in it may fail to start, or not: only the binary matters.
 * @param {string} name
 * @param {string[]} prefix `sudo`, or nothing
 * @returns {string} what went wrong, if anything
 */
function installWithApt(name, prefix) {
  const command = [
    ...prefix,
    'env',
    'DEBIAN_FRONTEND=noninteractive',
    'apt-get',
    ...quiet,
    '-o',
    'DPkg::Lock::Timeout=120'
  ]
  const apt = (/** @type {string[]} */ ...args) => run(command[0] ?? '', [...command.slice(1), ...args])
  const update = apt('update')
  const install = apt('install', '-y', '--no-install-recommends', name)
  return [update.report, install.report].filter(Boolean).join('\n')
}

/**
 * Downloads Debian's package, and what it needs that is not installed, and unpacks them into .cache: no rights needed.
 * @param {string[]} names the package, and others that it consists of
 * @param {string} cache
 * @returns {string} what went wrong, if anything
 */
function unpackWithApt(names, cache) {
  const work = `${cache}.${process.pid}`
  const debs = join(work, 'debs')
  const tree = join(work, 'tree')
  const lists = join(work, 'lists')
  try {
    for (const dir of [debs, tree, join(lists, 'partial')]) mkdirSync(dir, { recursive: true })
    // Package lists of our own: the system's may be stale or absent, and are not ours to update.
    const own = [...quiet, '-o', `Dir::State::Lists=${lists}`, '-o', `Dir::Cache=${work}`]
    const update = run('apt-get', [...own, 'update'])
    const plan = run('apt-get', [...own, '-s', 'install', '--no-install-recommends', names[0] ?? ''])
    const wanted = [...plan.stdout.matchAll(/^Inst (\S+)/gm)].map((line) => line[1] ?? '')
    // Nothing to install: the package is there already, yet its server is not on the PATH or does not start.
    const packages = wanted.length > 0 ? wanted : names
    const download = plan.ok ? run('apt-get', [...own, 'download', ...packages], { cwd: debs }) : plan
    if (!download.ok) return [update.report, download.report].filter(Boolean).join('\n')
    for (const deb of readdirSync(debs)) {
      const unpack = run('dpkg-deb', ['-x', join(debs, deb), tree])
      if (!unpack.ok) return unpack.report
    }
    rmSync(cache, { recursive: true, force: true })
    renameSync(tree, cache)
    return ''
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

/**
 * @typedef {object} Service
 * @property {string} name
 * @property {string[]} packages Debian's, the first of which needs the others
 * @property {string} cache
 * @property {string} variable The environment variable that says where it is.
 * @property {string} hint
 * @property {() => { server: string, env: Record<string, string> } | null} find
 */

/** @type {Service[]} */
const services = [
  {
    name: 'redis-server',
    packages: ['redis-server', 'redis-tools'],
    cache: caches.redis,
    variable: 'REDIS_SERVER',
    hint: 'sudo apt-get install redis-server; macOS: brew install redis), or set REDIS_SERVER to the path of one.',
    find: findRedis
  },
  {
    name: 'PostgreSQL',
    packages: ['postgresql'],
    cache: caches.postgres,
    variable: 'POSTGRES_BIN',
    hint: 'sudo apt-get install postgresql; macOS: brew install postgresql), or set POSTGRES_BIN to the folder with initdb.',
    find() {
      const postgres = findPostgres()
      return postgres && { server: join(postgres.bin, 'postgres'), env: postgres.env }
    }
  },
  {
    name: 'MariaDB',
    packages: ['mariadb-server-core'],
    cache: caches.mariadb,
    variable: 'MARIADB_SERVER',
    hint: 'sudo apt-get install mariadb-server-core; macOS: brew install mariadb), or set MARIADB_SERVER to the path of mariadbd.',
    find: findMariadb
  },
  {
    name: 'Chromium',
    packages: ['chromium', 'chromium-common'],
    cache: caches.chromium,
    variable: 'CHROMIUM',
    hint: 'sudo apt-get install chromium; macOS: brew install --cask chromium), or set CHROMIUM to the path of one.',
    find() {
      const chromium = findChromium()
      return chromium && { server: chromium.program, env: chromium.env }
    }
  }
]

/**
 * @param {Service} service
 * @returns {boolean} whether it can be started
 */
function ensure({ name, packages, cache, variable, hint, find }) {
  const ready = () => {
    const found = find()
    if (!found) return false
    const { version, report } = probe(found.server, found.env)
    if (version) console.log(`${name} ${version}: ${found.server}`)
    else failures.push(report)
    return version !== undefined
  }
  /** @type {string[]} */
  const failures = []
  if (ready()) return true
  if (!process.env[variable] && run('apt-get', ['--version']).ok) {
    const prefix = asRoot()
    if (prefix) {
      console.log(`${name} is not there: installing it with apt-get`)
      failures.push(installWithApt(packages[0] ?? '', prefix))
      if (ready()) return true
    }
    console.log(`${name} is not there: unpacking it into ${relative(root, cache)}`)
    failures.push(unpackWithApt(packages, cache))
    if (ready()) return true
  }
  console.error(failures.filter(Boolean).join('\n'))
  console.error(`The tests start ${name}, and none can be had here.\nInstall it (Debian, Ubuntu: ${hint}`)
  return false
}

/** @returns {boolean} whether curl is there, with which the tests send what the example prints */
function ensureCurl() {
  if (run('curl', ['--version']).ok) return true
  const prefix = asRoot()
  const report = prefix ? installWithApt('curl', prefix) : ''
  if (run('curl', ['--version']).ok) return true
  console.error(`${report}\nThe tests need curl. Install it (Debian, Ubuntu: sudo apt-get install curl).`)
  return false
}

/**
 * A package of npm that is no dependency: compiling it takes a minute or two, or it is a program that must not take the place
 * of another on the PATH of npm's scripts.
 * @typedef {object} Module
 * @property {string} name
 * @property {string} version
 * @property {string} cache
 */

/** @type {Module} */
const betterSqlite = { name: 'better-sqlite3', version: '12.11.1', cache: join(root, '.cache', 'better-sqlite3') }
/** The first version of Node that has `node:sqlite` without a flag and a warning is 24. @type {Module} */
const newerNode = {
  name: `node-${process.platform}-${process.arch}`,
  version: '24.22.3',
  cache: join(root, '.cache', 'node')
}

/** `better-sqlite3`, where this version of Node can load it: its first database loads what was compiled. */
export function findBetterSqlite() {
  try {
    const Database = createRequire(join(betterSqlite.cache, 'package.json'))('better-sqlite3')
    new Database(':memory:').close()
    return Database
  } catch {
    return null
  }
}

/** Where there is a Node that has `node:sqlite`: this one, or one that was put into .cache. @returns {string | null} */
export function findNodeWithSqlite() {
  if (Number(process.versions.node.split('.')[0]) >= 24) return process.execPath
  const node = join(newerNode.cache, 'node_modules', newerNode.name, 'bin', 'node')
  return isExecutable(node) ? node : null
}

/**
 * Installs a package into a folder of its own, which is there when all of it is: to npm, what was broken off is installed.
 * Its output is kept, not shown.
 * @param {Module} module
 * @returns {Promise<string>} what went wrong, if anything
 */
async function installWithNpm({ name, version, cache }) {
  const work = `${cache}.${process.pid}`
  mkdirSync(work, { recursive: true })
  // Beside what apt does meanwhile.
  const args = ['install', `${name}@${version}`, '--prefix', work, '--no-save', '--no-audit', '--no-fund']
  const child = spawn('npm', args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (said += text))
  const report = await new Promise((resolve) => {
    child.on('error', (error) => resolve(`npm: ${error.message}`))
    child.on('close', (code) => resolve(code === 0 ? '' : `$ npm ${args.join(' ')}\n${said.trim()}\n(exit ${code})`))
  })
  if (report === '') {
    rmSync(cache, { recursive: true, force: true })
    renameSync(work, cache)
  }
  rmSync(work, { recursive: true, force: true })
  return report
}

/**
 * @param {Module} module
 * @param {() => unknown} find
 * @returns {Promise<boolean>} whether it can be used
 */
async function ensureModule(module, find) {
  const label = `${module.name} ${module.version}`
  if (find()) return true
  console.log(`${label} is not there: installing it into ${relative(root, module.cache)}`)
  const report = await installWithNpm(module)
  if (find()) return true
  console.error(
    `${report}\nThe tests need ${label}, which could not be installed into ${relative(root, module.cache)}.`
  )
  return false
}

const [, script] = process.argv
if (script && realpathSync(script) === import.meta.filename) {
  const modules = [ensureModule(betterSqlite, findBetterSqlite), ensureModule(newerNode, findNodeWithSqlite)]
  const isReady = ensureCurl() && services.every(ensure)
  process.exitCode = isReady && (await Promise.all(modules)).every(Boolean) ? 0 : 1
}
