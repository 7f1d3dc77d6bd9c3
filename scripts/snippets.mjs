// Makes a module of every snippet of README.md and of docs/*.md, under test/docs/snippets, so that it is compiled and run
// like any test. A name is used once in all pages.
//
// A snippet is a fenced block of ts or js under a comment `<!-- snippet: name -->`. Its imports, and what it declares of a
// module, stay on top, the rest becomes the function `run(given)`, which returns what the snippet declares. What the
// snippet uses but does not declare, such as `app`, it gets from `given`.

import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'

const root = new URL('..', import.meta.url)
/** What snippets use without declaring it: see test/docs/given.ts. */
const GIVEN = [
  'app',
  'idempotency',
  'handler',
  'accountOf',
  'verifySession',
  'verifySignature',
  'AppModule',
  'schema',
  'resolvers',
  'chargeCard',
  'askBank',
  'callTool',
  'printLabel',
  'sendMail',
  'MapStore',
  'redis',
  'server',
  'send',
  'sessionStorage'
]
/** The same of the tests of docs/testing.md, whose first snippets declare it. */
const GIVEN_TESTS = ['buildApp', 'store', 'bank', 'post']
/** What tests have on top, and is shown once. */
const IMPORTS = { assert: "import assert from 'node:assert/strict'", test: "import { test } from 'node:test'" }
const docs = readdirSync(new URL('docs/', root)).filter((file) => file.endsWith('.md'))

extract(['README.md', ...docs.map((file) => `docs/${file}`)], 'test/docs/snippets/')

/** @param {string[]} pages @param {string} into */
function extract(pages, into) {
  const folder = new URL(into, root)
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(folder, { recursive: true })
  const names = new Set()
  for (const page of pages) {
    const text = readFileSync(new URL(page, root), 'utf8')
    const blocks = [...text.matchAll(/(?:<!-- snippet: ([\w-]+) -->\n)?```(ts|js)\n([\s\S]*?)```/g)]
    for (const [, name, language, code = ''] of blocks) {
      if (name === undefined) throw new Error(`${page} has a snippet without a name:\n${code}`)
      if (names.has(name)) throw new Error(`${page} has a snippet of a name that is taken: ${name}`)
      names.add(name)
      if (language === 'js') writeFileSync(new URL(`${name}.cts`, folder), commonJsOf(code))
      else writeFileSync(new URL(`${name}.ts`, folder), moduleOf(code, name))
    }
  }
}

/** @param {string} code @param {string} name */
function moduleOf(code, name) {
  const [declarations = ''] = /^declare module [\s\S]*?^}\n/m.exec(code) ?? []
  const lines = code.replace(declarations, '').split('\n')
  const imports = lines.filter((line) => line.startsWith('import ')).map(toSource)
  const statements = lines.filter((line) => !line.startsWith('import ') && !line.includes('app.listen('))
  const body = statements
    .map((line) => line.replace(/^export default /, 'const exported = ').replace(/^export /, ''))
    .join('\n')
  const declared = [...body.matchAll(/^(?:const|let|class|function|async function) (\w+)/gm)].map(([, name]) => name)
  const known = new Set([...declared, ...imports.flatMap((line) => line.match(/\w+/g) ?? [])])
  const isNeeded = (/** @type {string} */ name) =>
    !known.has(name) && new RegExp(`(?<!\\.)\\b${name}\\b(?![:-])`).test(body)
  const needed = [...GIVEN, ...(/^testing-(?!app)/.test(name) ? GIVEN_TESTS : [])].filter(isNeeded)
  for (const [name, line] of Object.entries(IMPORTS)) {
    if (!known.has(name) && new RegExp(`^\\s*${name}\\b[.(]`, 'm').test(body)) imports.push(line)
  }
  return `${[...imports, "import type { Given } from '../given.js'"].join('\n')}

${declarations}
export async function run(${needed.length > 0 ? 'given' : '_given'}: Given) {
${needed.length > 0 ? `const { ${needed.join(', ')} } = given\n` : ''}${body}
return { ${declared.join(', ')} }
}
`
}

/** @param {string} code */
function commonJsOf(code) {
  const lines = code.split('\n').filter((line) => !line.includes('app.listen('))
  const exported = code.includes('module.exports =') ? '' : 'module.exports = { app }\n'
  return `// @ts-nocheck\n${lines.map(toSource).join('\n')}\n${exported}`
}

/** @param {string} line */
function toSource(line) {
  return (
    line
      .replace("'fastify-idempotency'", "'../../../index.js'")
      // It has the interface, and need not be compiled.
      .replace("'better-sqlite3'", "'libsql'")
      .replace("'fastify-idempotency/conform'", "'../../../lib/conform.js'")
      .replace("'fastify-idempotency/testing'", "'../../../lib/testing.js'")
      .replace("'fastify-idempotency/testkit'", "'../../../lib/testkit.js'")
      .replace("'fastify-idempotency/client'", "'../../../lib/client.js'")
      .replace("'fastify-idempotency/transactions'", "'../../../lib/transactions.js'")
  )
}
