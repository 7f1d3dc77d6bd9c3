// Builds dist/: CommonJS, because Jest cannot require() an ES module, and a thin ES module in front of it, so that a
// process that uses both has one copy of the plugin and of what it knows. The client has no state that is shared, and
// comes as both: a browser cannot load CommonJS.

import { spawnSync } from 'node:child_process'
import { appendFileSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const dist = join(root, 'dist')
const require = createRequire(import.meta.url)

/** @type {(...args: string[]) => void} */
function tsc(...args) {
  const compiler = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
  const { status } = spawnSync(process.execPath, [compiler, ...args], { cwd: root, stdio: 'inherit' })
  if (status !== 0) process.exit(1)
}

rmSync(dist, { recursive: true, force: true })
tsc('-p', 'tsconfig.build.json')
writeFileSync(join(dist, 'package.json'), '{ "type": "commonjs" }\n')
const names = Object.keys(require(join(dist, 'index.js'))).filter((name) => /^\w+$/.test(name) && name !== 'default')
// Everything hangs on the function: that is what require() gives.
appendFileSync(join(dist, 'index.js'), 'module.exports = idempotency;\n')
writeFileSync(
  join(dist, 'index.mjs'),
  `import all from './index.js'\nexport const { ${names.join(', ')} } = all\nexport { idempotency as default }\n`
)
writeFileSync(
  join(dist, 'index.d.mts'),
  "export * from './index.js'\nexport { idempotency as default } from './index.js'\n"
)
for (const entry of ['conform', 'testing', 'testkit', 'transactions'])
  for (const extension of ['mjs', 'd.mts'])
    writeFileSync(join(dist, 'lib', `${entry}.${extension}`), `export * from './${entry}.js'\n`)

const esm = mkdtempSync(join(tmpdir(), 'build-'))
try {
  tsc('-p', 'tsconfig.build.json', '--module', 'ESNext', '--outDir', esm)
  const parts = readdirSync(join(esm, 'lib', 'client')).map((file) => join('client', file))
  for (const file of ['client.js', 'client.d.ts', ...parts]) {
    const text = readFileSync(join(esm, 'lib', file), 'utf8').replaceAll(/( from '\.[^']*)\.js'/g, "$1.mjs'")
    writeFileSync(join(dist, 'lib', file.replace(/(js|ts)$/, 'm$1')), text)
  }
} finally {
  rmSync(esm, { recursive: true, force: true })
}
