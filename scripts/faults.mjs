// The long form of all that injects faults: more keys and rounds, other random histories each time, a longer soak. It
// takes some half an hour. Each of these can be set from outside.

import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'

process.env.FAULTS_FACTOR ??= '4'
process.env.HISTORIES ??= '10000'
process.env.SOAK_SECONDS ??= '300'

const folder = '.build/test/faults'
const files = readdirSync(folder).filter((file) => file.endsWith('.test.js'))
const args = ['--jobs=1', '--timeout=7200', '--disable-coverage', '.build/test/properties/plugin-model.test.js']
const { status } = spawnSync('tap', [...args, ...files.map((file) => `${folder}/${file}`)], { stdio: 'inherit' })
process.exitCode = status ?? 1
