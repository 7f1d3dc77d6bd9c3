import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

t.test('it compiles for browsers: with the types of the DOM, and nothing else', async (t) => {
  const root = fileURLToPath(new URL('../../../', import.meta.url))
  const folder = mkdtempSync(join(tmpdir(), 'client-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  const compilerOptions = { target: 'ES2022', lib: ['ES2022', 'DOM'], types: [], module: 'ESNext', strict: true }
  const config = { compilerOptions: { ...compilerOptions, noEmit: true, moduleResolution: 'bundler' } }
  const file = join(folder, 'tsconfig.json')
  writeFileSync(file, JSON.stringify({ ...config, files: [join(root, 'lib/client.ts')] }))
  const tsc = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin/tsc')
  // Without the loaders that tap puts into every process of Node, in which TypeScript's does not start.
  const command = ['-u', 'NODE_OPTIONS', process.execPath, tsc, '-p', file]
  const { status, stdout, stderr } = spawnSync('env', command, { encoding: 'utf8' })
  t.equal(status, 0, stdout + stderr)
})
