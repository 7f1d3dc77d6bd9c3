// The command itself: installs what only the benchmark needs, into this folder, and runs it.

import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const here = fileURLToPath(new URL('.', import.meta.url))
const lock = readFileSync(new URL('package-lock.json', import.meta.url), 'utf8')

/** Is everything there that the lock names, in the version that it names? By npm's own note, which it writes last. */
function isInstalled() {
  const note = new URL('node_modules/.package-lock.json', import.meta.url)
  if (!existsSync(note)) return false
  const { packages } = JSON.parse(readFileSync(note, 'utf8'))
  return Object.entries(JSON.parse(lock).packages).every(
    ([path, { version, optional }]) => path === '' || optional || packages[path]?.version === version
  )
}

if (!isInstalled()) {
  const npm = process.platform === 'win32' ? 'npm.cmd' : 'npm'
  const { status } = spawnSync(npm, ['ci', '--no-audit', '--no-fund', '--ignore-scripts'], {
    cwd: here,
    stdio: 'inherit'
  })
  if (status !== 0) process.exit(status ?? 1)
}
await import('./main.mjs')
