// Jest in CommonJS, where an ES module cannot be required; all files in one process, one after the other.
const { spawnSync } = require('node:child_process')
const jest = require.resolve('jest/bin/jest')

const { status } = spawnSync(process.execPath, [jest, '--runInBand', '--ci'], { cwd: __dirname, stdio: 'inherit' })
process.exitCode = status ?? 1
