import { readFileSync } from 'node:fs'
import t from 'tap'
import { buildApp } from '../../examples/app.js'
import { conform } from '../../lib/conform.js'
import { listening } from '../support/latch.js'

// The profile of the example, as the pages tell people to use it.

const profile = JSON.parse(readFileSync(new URL('../../../examples/profile.json', import.meta.url), 'utf8'))

t.test('the example keeps every rule that its profile lets be tried', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const { rules } = await conform(`${await listening(app)}/charges`, { profile })
  for (const { id, outcome, reason } of rules) t.not(outcome, 'failed', `${id} ${reason}`)
  t.ok(rules.filter(({ outcome }) => outcome === 'passed').length > 20, 'and that are most of them')
})
