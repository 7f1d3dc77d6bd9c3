import fc from 'fast-check'
import t from 'tap'
import { calm, type Event, faults, play } from '../support/plugin-history.js'

const RUNS = Number(process.env.HISTORIES) || 100

const histories = (kinds: fc.Arbitrary<Event>[]) => fc.array(fc.oneof(...kinds), { maxLength: 30, size: 'max' })

/** `SEED=… FC_PATH=…` repeats a history that failed. */
const repeat = {
  ...(process.env.SEED === undefined ? {} : { seed: Number(process.env.SEED) }),
  ...(process.env.FC_PATH === undefined ? {} : { path: process.env.FC_PATH })
}

t.test('does what its model does', async () => {
  await fc.assert(
    fc.asyncProperty(histories(process.env.FAULTS ? [...calm, ...faults] : calm), async (events) => void (await play(events))),
    { numRuns: RUNS, ...repeat }
  )
})
