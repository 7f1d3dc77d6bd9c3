import { readFileSync } from 'node:fs'
import t, { type Test } from 'tap'
import { buildApp } from '../../examples/app.js'
import { startDemo } from '../../examples/demo/demo.js'
import { readSettings } from '../../examples/settings.js'
import { conform } from '../../lib/conform.js'
import { listening } from '../support/latch.js'

// The profile of the example, as the pages tell people to use it.

const profile = JSON.parse(readFileSync(new URL('../../../examples/profile.json', import.meta.url), 'utf8'))

t.test('the example keeps every rule that its profile lets be tried', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  await conforms(t, await listening(app))
})

t.test('so it does behind the demo, where `npm start` has it', async (t) => {
  const demo = await startDemo(readSettings({ DATABASE_URL: 'memory:' }), { host: '127.0.0.1', port: 0 })
  t.teardown(() => demo.close())
  await conforms(t, demo.url)
})

async function conforms(t: Test, url: string): Promise<void> {
  const { rules } = await conform(`${url}/charges`, { profile })
  for (const { id, outcome, reason } of rules) t.not(outcome, 'failed', `${id} ${reason}`)
  t.ok(rules.filter(({ outcome }) => outcome === 'passed').length > 20, 'and that are most of them')
}
