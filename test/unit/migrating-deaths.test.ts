import t from 'tap'
import { sabotages } from '../support/migrating-sabotages.js'
import { allDeaths, PHASES } from '../support/migrating-scenes.js'

/* Processes that move from one store to another die, at whatever call; and those of before or after the move go on. */

for (const [phase, who] of Object.entries(PHASES)) {
  t.test(`in ${phase}, wherever a process dies, what was told of a key stays true`, async (t) => {
    const { broken, deaths } = await allDeaths(who)
    t.strictSame(broken, [])
    t.ok(deaths > 1_000, `${deaths} deaths`)
  })
}

for (const [phase, planted] of Object.entries(sabotages)) {
  for (const [name, sabotage] of Object.entries(planted)) {
    t.test(`in ${phase} it is noticed when a process that moves ${name}`, async (t) => {
      const { broken } = await allDeaths(PHASES[phase] ?? [], sabotage)
      t.not(broken.length, 0)
    })
  }
}
