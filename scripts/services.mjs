// The servers that the tests start. `node scripts/services.mjs` makes sure that they are there:
// it installs them where root or sudo allow, unpacks them into .cache where not, or says what to do.

import { spawnSync } from 'node:child_process'
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
import { delimiter, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const cache = join(root, '.cache', 'redis')

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
  const server = join(cache, 'usr', 'bin', 'redis-server')
  return isExecutable(server) ? { server, env: { LD_LIBRARY_PATH: unpackedLibraries() } } : null
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

function unpackedLibraries() {
  const dirs = process.env.LD_LIBRARY_PATH ? [process.env.LD_LIBRARY_PATH] : []
  for (const base of [join(cache, 'usr', 'lib'), join(cache, 'lib')]) {
    if (!existsSync(base)) continue
    for (const name of readdirSync(base)) if (name.includes('-linux-')) dirs.unshift(join(base, name))
  }
  return dirs.join(':')
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
 * @param {Redis} redis
 */
function probe({ server, env }) {
  const { stdout, report } = run(server, ['--version'], { env })
  return { version: /\bv=(\S+)/.exec(stdout)?.[1], report }
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
 * @returns {string} what went wrong, if anything
 */
function unpackWithApt() {
  const work = `${cache}.${process.pid}`
  const debs = join(work, 'debs')
  const tree = join(work, 'tree')
  const lists = join(work, 'lists')
  try {
    for (const dir of [debs, tree, join(lists, 'partial')]) mkdirSync(dir, { recursive: true })
    // Package lists of our own: the system's may be stale or absent, and are not ours to update.
    const own = [...quiet, '-o', `Dir::State::Lists=${lists}`, '-o', `Dir::Cache=${work}`]
    const update = run('apt-get', [...own, 'update'])
    const plan = run('apt-get', [...own, '-s', 'install', '--no-install-recommends', 'redis-server'])
    const wanted = [...plan.stdout.matchAll(/^Inst (\S+)/gm)].map((line) => line[1] ?? '')
    // Nothing to install: the package is there already, yet its server is not on the PATH or does not start.
    const packages = wanted.length > 0 ? wanted : ['redis-server', 'redis-tools']
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

/** @returns {boolean} whether redis-server can be started */
function ensureRedis() {
  const ready = () => {
    const redis = findRedis()
    if (!redis) return false
    const { version, report } = probe(redis)
    if (version) console.log(`redis-server ${version}: ${redis.server}`)
    else failures.push(report)
    return version !== undefined
  }
  /** @type {string[]} */
  const failures = []
  if (ready()) return true
  if (!process.env.REDIS_SERVER && run('apt-get', ['--version']).ok) {
    const prefix = asRoot()
    if (prefix) {
      console.log('redis-server is not there: installing it with apt-get')
      failures.push(installWithApt('redis-server', prefix))
      if (ready()) return true
    }
    console.log('redis-server is not there: unpacking it into .cache/redis')
    failures.push(unpackWithApt())
    if (ready()) return true
  }
  console.error(failures.filter(Boolean).join('\n'))
  console.error(
    'The tests start a redis-server of their own, and none can be had here.\n' +
      'Install it (Debian, Ubuntu: sudo apt-get install redis-server; macOS: brew install redis),\n' +
      'or set REDIS_SERVER to the path of one.'
  )
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

const [, script] = process.argv
if (script && realpathSync(script) === import.meta.filename) {
  process.exitCode = ensureCurl() && ensureRedis() ? 0 : 1
}
