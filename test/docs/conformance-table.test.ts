import { readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import t from 'tap'

/* The tables that compare packages are what conformance/results.json gives, and that is of the peers that are there. */

interface Results {
  rules: { id: string; level: string }[]
  peers: {
    name: string
    package: string
    version: string
    outcomes: Record<string, { outcome: string; reason?: string }>
  }[]
}

interface Tables {
  summary(results: Results): string
  details(results: Results): string
  tableIn(page: string): string
  withTable(page: string, text: string): string
}

const root = new URL('../../../', import.meta.url)
const text = (file: string) => readFileSync(new URL(file, root), 'utf8')
const module = (file: string) => import(new URL(file, root).href)

const { details, summary, tableIn, withTable } = (await module('conformance/table.mjs')) as Tables
const { peers } = (await module('conformance/peers.mjs')) as {
  peers: { name: string; package: string; install?: string[]; declared?: object; settled?: object }[]
}
const results = JSON.parse(text('conformance/results.json')) as Results

t.test('the README has the summary of results.json', async (t) => {
  t.equal(tableIn(text('README.md')), summary(results).trim())
})

t.test('conformance/README.md has every rule and every finding of results.json', async (t) => {
  const table = tableIn(text('conformance/README.md'))
  t.equal(table, details(results).trim())
  for (const { id } of results.rules) t.ok(table.includes(`\`${id}\``), id)
})

t.test('a table that is out of date is noticed, and made anew', async (t) => {
  const page = text('README.md')
  const peer = results.peers[0] as Results['peers'][0]
  const other = { ...results, peers: [{ ...peer, version: '99.0.0' }, ...results.peers.slice(1)] }
  t.not(summary(other).trim(), tableIn(page))
  t.equal(tableIn(withTable(page, summary(other))), summary(other).trim())
})

t.test('results are of the peers, in the versions, that are named', async (t) => {
  t.same(
    results.peers.map(({ name }) => name),
    peers.map(({ name }) => name)
  )
  t.same(
    readdirSync(fileURLToPath(new URL('conformance/servers/', root))).sort(),
    peers.map(({ name }) => `${name}.mjs`).sort()
  )
  const { dependencies } = JSON.parse(text('conformance/package.json')) as { dependencies: Record<string, string> }
  for (const { name, package: packageName, install = [] } of peers) {
    const { version } = results.peers.find((peer) => peer.name === name) as Results['peers'][0]
    if (name === 'fastify-idempotency') continue
    t.ok(
      dependencies[packageName] === version || install.includes(`${packageName}@${version}`),
      `${packageName} ${version}`
    )
    t.ok(text(`conformance/servers/${name}.mjs`).startsWith(`// ${packageName} ${version}`), name)
  }
})

t.test(
  'what is declared or settled for a peer is of rules that there are, and everything that does not hold has a reason',
  async (t) => {
    const ids = results.rules.map(({ id }) => id)
    for (const { name, declared = {}, settled = {} } of peers) {
      for (const id of [...Object.keys(declared), ...Object.keys(settled)]) t.ok(ids.includes(id), `${name}: ${id}`)
    }
    for (const { name, outcomes } of results.peers) {
      t.same(Object.keys(outcomes).sort(), [...ids].sort(), name)
      for (const [id, { outcome, reason }] of Object.entries(outcomes))
        if (outcome !== 'passed') t.ok(reason, `${name}: ${id}`)
    }
  }
)
