// The parts, and the life of a request, without servers, browser and neighbours: what to run while one works. `npm test` runs all. Each
// file is a process of its own, as many at a time as there are processors; of those that fail the output is shown.

import { spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const SERVERS = /support\/(?:every-store|redis|postgres|browser|fleet|bad-network|process)\b/
/** Thousands of inputs or waiters, packages that are installed, and the conformance kit on over a hundred stores; deaths at each call. */
const LONG =
  /hostile-input|plugin-model|value-hash-size|testkit|layouts|client-types|transaction|migrating-deaths|examples?\.test|waiting|docs\.test|docs\/clients|same-request/

const files = ['unit', 'integration', 'docs']
  .flatMap((folder) => readdirSync(join(root, 'test', folder)).map((file) => `test/${folder}/${file}`))
  .filter((file) => file.endsWith('.test.ts') && !LONG.test(file))
  .filter((file) => !SERVERS.test(readFileSync(join(root, file), 'utf8')))
const started = performance.now()
const failed = /** @type {string[]} */ ([])

/** As in `.taprc`, which is for `tap` alone. */
const env = { ...process.env, TAP_TIMEOUT: '900' }

/** @param {string} file */
function run(file) {
  const args = [
    '--enable-source-maps',
    '--disable-warning=FST_IDEMPOTENCY_DURATION',
    `.build/${file.replace(/ts$/, 'js')}`
  ]
  const child = spawn(process.execPath, args, { cwd: root, env, stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (output += chunk))
  return new Promise((resolve) => {
    child.on('close', (status) => {
      if (status !== 0) {
        failed.push(file)
        console.log(output)
      }
      resolve(undefined)
    })
  })
}

const queue = [...files]
const lane = async () => {
  for (let file = queue.shift(); file !== undefined; file = queue.shift()) await run(file)
}
await Promise.all(Array.from({ length: availableParallelism() }, lane))
const seconds = Math.round((performance.now() - started) / 1_000)
console.log(`${files.length - failed.length} of ${files.length} files passed, in ${seconds} seconds`)
for (const file of failed) console.log(`failed: ${file}`)
process.exitCode = failed.length === 0 ? 0 : 1
