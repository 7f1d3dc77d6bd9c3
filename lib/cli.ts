#!/usr/bin/env node
import { readFileSync, writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { ConformError } from './conform/baseline.js'
import { rulesOf } from './conform/report.js'
import { REPORTERS, type Reporter } from './conform/reports.js'
import type { Level } from './conform/rule.js'
import { LEVELS, RULES } from './conform/rules.js'
import { type ConformOptions, conform } from './conform/run.js'

/* The command `fastify-idempotency`. Exit status: 0 conforms, 1 does not, 2 could not be tried, or not all of it. */

const USAGE = `fastify-idempotency conform URL [options]

Tries how an endpoint treats idempotency keys. It sends requests that are carried out: to test systems only.

  --profile FILE        what is said of the endpoint, as JSON
  --reporter NAME[=FILE]
                        ${Object.keys(REPORTERS).join(', ')}; more than once if you like (default: text)
  --level LEVEL         the exit status is 1 if a rule of this level or above fails: ${LEVELS.join(', ')} (default: should)
  --rule ID             try this rule only; more than once if you like
  --seed TEXT           the same keys as in another run (default: random)
  --host NAME           may be sent requests although it is not this machine; more than once if you like
  --timeout DURATION    of one reply (default: 10s)
  --max-duration DURATION
                        of everything (default: 5m)
  --max-requests N      (default: 1000)

fastify-idempotency rules
  lists the rules and their sources
`

class UsageError extends Error {}

async function main(): Promise<number> {
  const { values, positionals } = parse()
  const [command, url, ...others] = positionals
  if (values.help || (command === undefined && others.length === 0)) {
    process.stdout.write(USAGE)
    return values.help ? 0 : 2
  }
  if (command === 'rules' && url === undefined) {
    for (const { id, level, title, source } of RULES)
      process.stdout.write(`${level.padEnd(6)} ${id}: ${title} [${source}]\n`)
    return 0
  }
  if (command !== 'conform') throw new UsageError(`There is no command "${command}"`)
  if (url === undefined || others.length > 0) throw new UsageError('"conform" takes one URL')

  const level = values.level as Level
  if (!LEVELS.includes(level)) throw new UsageError(`--level takes ${LEVELS.join(', ')}, got "${level}"`)
  const outputs = (values.reporter ?? ['text']).map(outputOf)
  const options: ConformOptions = {}
  if (values.profile !== undefined) options.profile = profileOf(values.profile)
  if (values.seed !== undefined) options.seed = values.seed
  if (values.host !== undefined) options.hosts = values.host
  if (values.rule !== undefined) options.rules = values.rule
  if (values.timeout !== undefined) options.timeout = values.timeout
  if (values['max-duration'] !== undefined) options.maxDuration = values['max-duration']
  if (values['max-requests'] !== undefined) options.maxRequests = Number(values['max-requests'])
  if (values.host !== undefined && URL.canParse(url)) {
    process.stderr.write(
      `Requests are carried out at ${new URL(url).host}: a system that people use is no place for this.\n`
    )
  }
  // A file that cannot be written is told before the server is asked anything.
  for (const { file } of outputs) if (file !== undefined) write(file, '')
  const report = await conform(url, options)
  for (const { reporter, file } of outputs) {
    const text = REPORTERS[reporter](report)
    if (file === undefined) process.stdout.write(text)
    else write(file, text)
  }
  const weighty = LEVELS.slice(0, LEVELS.indexOf(level) + 1)
  if (weighty.some((one) => rulesOf(report, one, 'failed').length > 0)) return 1
  for (const problem of report.problems) process.stderr.write(`Not everything was tried: ${problem}\n`)
  return report.problems.length > 0 ? 2 : 0
}

function write(file: string, text: string): void {
  try {
    writeFileSync(file, text)
  } catch (error) {
    throw new UsageError(`--reporter …=${file}: ${(error as Error).message}`)
  }
}

function parse() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        profile: { type: 'string' },
        reporter: { type: 'string', multiple: true },
        level: { type: 'string', default: 'should' },
        rule: { type: 'string', multiple: true },
        seed: { type: 'string' },
        host: { type: 'string', multiple: true },
        timeout: { type: 'string' },
        'max-duration': { type: 'string' },
        'max-requests': { type: 'string' },
        help: { type: 'boolean', short: 'h' }
      }
    })
  } catch (error) {
    throw new UsageError((error as Error).message)
  }
}

function outputOf(text: string): { reporter: Reporter; file: string | undefined } {
  const [reporter, ...file] = text.split('=')
  if (!Object.hasOwn(REPORTERS, reporter as string)) {
    throw new UsageError(`--reporter takes ${Object.keys(REPORTERS).join(', ')}, got "${reporter}"`)
  }
  return { reporter: reporter as Reporter, file: file.length > 0 ? file.join('=') : undefined }
}

function profileOf(file: string) {
  try {
    return JSON.parse(readFileSync(file, 'utf8'))
  } catch (error) {
    throw new UsageError(`--profile ${file}: ${(error as Error).message}`)
  }
}

/** What options of `conform` are called here. */
const FLAGS: Record<string, string> = {
  hosts: '--host',
  rules: '--rule',
  timeout: '--timeout',
  maxDuration: '--max-duration',
  maxRequests: '--max-requests'
}

function inFlags(message: string): string {
  return message.replace(/^conform option "(\w+)"/, (whole, name) => FLAGS[name] ?? whole)
}

// Who reads only the first lines has seen enough.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
})

main().then(
  (status) => {
    process.exitCode = status
  },
  (error) => {
    const isExpected = error instanceof UsageError || error instanceof ConformError || 'code' in error
    process.stderr.write(`${isExpected ? inFlags(error.message) : error.stack}\n`)
    process.exitCode = 2
  }
)
