import t from 'tap'
import { conform, rules } from '../../lib/conform.js'
import { FAULTS, PROFILE, startEndpoint } from '../support/broken-endpoint.js'

// The suite is tried on servers that break one rule each: every rule finds its server, and no other.

async function outcomes(fault: string | null) {
  const { url, close } = await startEndpoint(fault)
  try {
    const report = await conform(url, { profile: PROFILE, seed: `fault ${fault}` })
    return report.rules
  } finally {
    await close()
  }
}

t.test('a server that keeps every rule passes them all', async (t) => {
  const found = await outcomes(null)
  for (const { id, outcome, reason } of found) {
    if (id === 'waiting') t.equal(outcome, 'not-applicable', 'it refuses duplicates')
    else t.equal(outcome, 'passed', `${id} ${reason}`)
  }
  t.strictSame(
    found.map(({ id }) => id),
    rules.map(({ id }) => id)
  )
})

t.strictSame(Object.keys(FAULTS).sort(), rules.map(({ id }) => id).sort(), 'each rule has a server that breaks it')

t.test('a server that breaks one rule', { jobs: 8 }, async (t) => {
  for (const [id, fault] of Object.entries(FAULTS)) {
    t.test(`${id}: ${fault}`, async (t) => {
      const failed = (await outcomes(id)).filter(({ outcome }) => outcome === 'failed')
      t.strictSame(
        failed.map((rule) => rule.id),
        [id],
        failed.map((rule) => `${rule.id}: ${rule.reason}`).join('; ')
      )
      t.not(failed[0]?.exchanges.length, 0, 'what shows it is shown')
    })
  }
})
