import fc from 'fast-check'
import t from 'tap'
import { type Event, histories, play } from '../support/plugin-history.js'
import { sabotages } from '../support/plugin-sabotages.js'
import { LEASE } from '../support/plugin-world.js'

// Random histories of the whole plugin, in virtual time, against a model and the judge of HTTP histories.
// HISTORIES=10000 tries more of them, and other ones each time; without it they are always the same, because time is
// virtual. SEED=… and FC_PATH=…, as a failure prints them, repeat one.

const { HISTORIES, SEED, FC_PATH } = process.env
const RUNS = Number(HISTORIES) || 200
const seed = Number(SEED) || (HISTORIES === undefined ? 1 : Math.floor(Math.random() * 2 ** 31))
const patient = { timeout: Math.max(120_000, RUNS * 1_000) }

t.comment(`SEED=${seed}`)

t.test('does what its model does, whatever befalls it', patient, async () => {
  const parameters = { numRuns: RUNS, seed, ...(FC_PATH === undefined ? {} : { path: FC_PATH }) }
  await fc.assert(
    fc.asyncProperty(histories, async (events) => void (await play(events))),
    parameters
  )
})

for (const [name, { between, events }] of Object.entries(sabotages)) {
  t.test(`is seen to be wrong: ${name}`, async (t) => {
    await t.resolves(play(events), 'the plugin as it is')
    await t.rejects(play(events, { between }), { name: 'Wrong' })
  })
}

const send = (to: number) => ({ do: 'send', to, key: 'k', payload: 'p', route: '/reject' }) as const
const overtaken: Event[] = [
  send(0),
  { do: 'cut', process: 0 },
  { do: 'end', which: 0, how: 'reply' },
  send(0),
  { do: 'pass', ms: LEASE + 1_000 },
  send(1),
  { do: 'end', which: 0, how: 'reply' },
  send(0),
  { do: 'mend', process: 0 },
  send(0)
]

t.test('who is overtaken before its reply could be stored replays that of the other', async (t) => {
  const { log } = await play(overtaken)
  t.match(log.join('; '), /q2 gets 201 reply of r1 \(replayed\).*q4 gets 503.*q5 gets 201 reply of r2 \(replayed\)/)
})

t.test('random histories find what is wrong', patient, async (t) => {
  const { between } = sabotages['replies are not kept']
  const property = fc.asyncProperty(histories, async (events) => void (await play(events, { between })))
  const { failed, counterexample } = await fc.check(property, { numRuns: 300, seed })
  t.ok(failed)
  t.ok((counterexample?.[0].length ?? 0) <= 6, 'and give a short one')
})
