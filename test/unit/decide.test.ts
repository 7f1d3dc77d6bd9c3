import t from 'tap'
import { decide } from '../../lib/operation/decide.js'
import type { Acquisition, StoredRecord } from '../../types/index.js'
import { reply } from '../support/store-fixtures.js'

/* The verdict on a duplicate: what was found, what is known of this request, and what the route wants. */

const HEAD = `${'h'.repeat(22)}hint`
const OURS = `${HEAD}.payload`
const REPLY = { ...reply(), fingerprint: OURS }
const TOMBSTONE: StoredRecord = { kind: 'tombstone', fingerprint: OURS, createdAt: 1, reason: 'too-large' }

/** What is found under a key, with the fingerprint of who has it. */
const FOUND: Record<string, (fingerprint: string) => Acquisition> = {
  running: (fingerprint) => ({ state: 'running', fingerprint, leaseMs: 1 }),
  abandoned: (fingerprint) => ({ state: 'abandoned', fingerprint, attempt: 1 }),
  ended: (fingerprint) => ({ state: 'abandoned', fingerprint, attempt: 1, ended: true }),
  reply: (fingerprint) => ({ state: 'completed', record: { ...REPLY, fingerprint }, ttlMs: 1 }),
  tombstone: (fingerprint) => ({ state: 'completed', record: { ...TOMBSTONE, fingerprint }, ttlMs: 1 })
}

const refuse = (code: string) => ({ do: 'refuse', with: code })
const POSTPONE = { do: 'postpone' }

/** For the same request: when all is known of it, and before that, for each of what `onConflict` and `onAbandoned` say. */
const TABLE: [found: string, waits: boolean, reruns: boolean, knowingAll: object, before: object][] = [
  ['running', false, true, refuse('IN_PROGRESS'), refuse('IN_PROGRESS')],
  ['running', false, false, refuse('IN_PROGRESS'), refuse('IN_PROGRESS')],
  ['running', true, true, { do: 'wait' }, POSTPONE],
  ['running', true, false, { do: 'wait' }, POSTPONE],
  ['abandoned', false, true, { do: 'take over' }, POSTPONE],
  ['abandoned', true, true, { do: 'take over' }, POSTPONE],
  ['abandoned', false, false, refuse('ABANDONED'), refuse('ABANDONED')],
  ['abandoned', true, false, refuse('ABANDONED'), refuse('ABANDONED')],
  ['ended', false, true, { do: 'take over' }, POSTPONE],
  ['ended', true, true, { do: 'take over' }, POSTPONE],
  ['ended', false, false, { do: 'take over' }, POSTPONE],
  ['ended', true, false, { do: 'take over' }, POSTPONE],
  ['reply', false, true, { do: 'replay', reply: REPLY }, POSTPONE],
  ['reply', true, true, { do: 'replay', reply: REPLY }, POSTPONE],
  ['reply', false, false, { do: 'replay', reply: REPLY }, POSTPONE],
  ['reply', true, false, { do: 'replay', reply: REPLY }, POSTPONE],
  ['tombstone', false, true, refuse('NOT_REPLAYABLE'), POSTPONE],
  ['tombstone', true, true, refuse('NOT_REPLAYABLE'), POSTPONE],
  ['tombstone', false, false, refuse('NOT_REPLAYABLE'), POSTPONE],
  ['tombstone', true, false, refuse('NOT_REPLAYABLE'), POSTPONE]
]

for (const [found, waits, reruns, knowingAll, before] of TABLE) {
  const policy = { waits, reruns }
  const options = `onConflict: '${waits ? 'wait' : 'reject'}', onAbandoned: '${reruns ? 'rerun' : 'reject'}'`
  t.test(`the same request finds ${found} (${options})`, async (t) => {
    const given = FOUND[found]?.(OURS) as Acquisition
    t.strictSame(decide(given, [OURS], true, policy), knowingAll)
    t.strictSame(decide(given, [OURS], false, policy), before)
    t.strictSame(decide(given, [`${HEAD}.`], false, policy), before, 'its payload is not known yet')
  })

  t.test(`another request finds ${found} (${options}): it is refused, whatever else`, async (t) => {
    for (const [theirs, differs] of [
      [`${HEAD}.other`, 'payload'],
      [`${'g'.repeat(22)}hint.payload`, 'credentials'],
      [`${'g'.repeat(22)}tnih.payload`, 'target']
    ] as const) {
      for (const knowsAll of [true, false]) {
        const decision = decide(FOUND[found]?.(theirs) as Acquisition, [OURS], knowsAll, policy)
        t.strictSame(decision, { do: 'refuse', with: 'KEY_REUSED', differs })
      }
    }
  })
}

t.test('a key that was free is held, or reserved while not all is known of the request', async (t) => {
  for (const attempt of [1, 2]) {
    const policy = { waits: false, reruns: true }
    t.strictSame(decide({ state: 'acquired', attempt }, [OURS], true, policy), { do: 'hold', attempt, steps: [] })
    t.strictSame(decide({ state: 'acquired', attempt }, [OURS], false, policy), { do: 'reserve' })
  }
})
