import { existsSync, readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import t from 'tap'
import { conform, type Profile, rules, written } from '../../lib/conform.js'
import { startEndpoint } from '../support/broken-endpoint.js'

/* docs/conformance.md tells what the suite does. */

const root = new URL('../../../', import.meta.url)
const page = readFileSync(new URL('docs/conformance.md', root), 'utf8')

t.test('every rule is listed, under its level and in order', async (t) => {
  const [, ...levels] = page.slice(page.indexOf('## The rules'), page.indexOf('### To add one')).split('\n### ')
  const listed = levels.flatMap((level) =>
    [...level.matchAll(/^\| `([\w-]+)` \| (.*) \| (.*) \|$/gm)].map(([, id, title, source]) => ({
      id,
      level: level.split('\n', 1)[0],
      title,
      source: source?.replaceAll('draft', 'draft-ietf-httpapi-idempotency-key-header')
    }))
  )
  t.strictSame(listed, rules)
})

t.test('every test of the table of the draft is there', async (t) => {
  const named = [...page.matchAll(/`(test\/[\w/.-]+\.ts)`/g)].map(([, path]) => path as string)
  t.ok(named.length > 8)
  for (const path of named) t.ok(existsSync(new URL(path, root)), path)
})

t.test('every member of a profile is explained', async (t) => {
  const known = readFileSync(new URL('lib/conform/profile.ts', root), 'utf8')
  const [, body = ''] = /export interface Profile \{([\s\S]*?)\n\}/.exec(known) ?? []
  const members = [...body.matchAll(/^ {2}readonly (\w+)\?/gm)].map(([, name]) => name as string)
  t.ok(members.length > 15)
  const table = page.slice(page.indexOf('| member |'), page.indexOf('`slow`, `fail`, `binary`'))
  for (const name of members) t.ok(table.includes(`\`${name}\``), name)
})

t.test('the profile of the page is one, and most rules can be tried with it', async (t) => {
  const { url, close } = await startEndpoint(null)
  t.teardown(close)
  const profile = JSON.parse(/```json\n([\s\S]*?)```/.exec(page)?.[1] ?? '') as Profile
  const report = await conform(`${url}/charges`, { profile })
  const passed = report.rules.filter(({ outcome }) => outcome === 'passed')
  t.ok(passed.length > 25, written(report, 'text'))
})

t.test('the snippet throws where a rule is broken', async (t) => {
  const { run } = (await import('./snippets/conform.js')) as { run(given: object): Promise<unknown> }
  let number = 0
  const server = createServer((_, response) => {
    response.writeHead(201, { 'content-type': 'application/json' }).end(JSON.stringify({ id: ++number }))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.teardown(() => server.close())
  const { port } = server.address() as { port: number }
  await t.rejects(run({ server: `http://127.0.0.1:${port}` }), { message: /✗ sequential-once/ })
})
