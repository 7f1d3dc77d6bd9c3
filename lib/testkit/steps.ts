import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, StoredStep } from '../../types/index.js'
import {
  answers,
  claim,
  equal,
  FRESH,
  hasSteps,
  inTime,
  LONG,
  lapsed,
  left,
  newKey,
  passed,
  replays,
  reply,
  take
} from './fixtures.js'
import { caseWith } from './harness.js'
import { begun, comeBack, FIRST, forgotten, keep, lapse, SECOND, STEPS, THIRD, takeOver } from './step-fixtures.js'
import { alike, unusual } from './text.js'

// What an operation has finished is not done again: steps stay with a claim, whoever has it, until it is over.

export const steps = [
  caseWith('step', 'steps come back in the order in which they were stored', async ({ store, second }) => {
    const key = newKey()
    const token = await take(store, key)
    for (const [client, step] of [
      [store, THIRD],
      [second, FIRST],
      [store, SECOND]
    ] as const) {
      await keep(client, key, token, step)
    }
    await lapse(second, key, token)
    await takeOver(store, key, 2, [THIRD, FIRST, SECOND])
  }),

  caseWith('step', 'step by another token is false, and keeps nothing', async ({ store, second }) => {
    const key = newKey()
    equal(await store.step(key, randomUUID(), FIRST), false, 'step on a free key')
    const token = await begun(store, key)
    for (const client of [store, second]) {
      equal(await client.step(key, randomUUID(), SECOND), false, 'step by another token')
    }
    await lapse(store, key, token)
    equal(await second.step(key, randomUUID(), THIRD), false, 'step of an abandoned claim by another token')
    await takeOver(second, key, 2, [FIRST])
  }),

  caseWith('step', 'a step that was refused does not keep a released key from being free', async (harness) => {
    const { store, second } = harness
    const key = newKey()
    const token = await take(store, key)
    equal(await second.step(key, randomUUID(), FIRST), false, 'step by another token')
    equal(await store.release(key, token), true, 'release')
    const found = await second.acquire(key, claim())
    answers(found, FRESH)
    hasSteps(found, [])
  }),

  caseWith(
    'step',
    'step after a takeover is false, and the heir keeps its own beside those of before',
    async (harness) => {
      const { store, second } = harness
      const key = newKey()
      const token = await begun(store, key)
      await lapse(store, key, token)
      const heir = await takeOver(second, key, 2, [FIRST])
      for (const client of [store, second])
        equal(await client.step(key, token, THIRD), false, 'step by the former owner')
      await keep(store, key, heir, SECOND)
      await lapse(second, key, heir)
      await takeOver(store, key, 3, [FIRST, SECOND])
    }
  ),

  caseWith('step', 'step of a lapsed claim that nobody took is true', async ({ store, second }) => {
    const key = newKey()
    const token = await lapsed(store, key)
    await keep(second, key, token, FIRST)
    await keep(store, key, token, SECOND)
    answers(await second.acquire(key, claim()), { state: 'abandoned', attempt: 1 })
    await takeOver(store, key, 2, [FIRST, SECOND])
  }),

  caseWith('step', 'a step of a name that there is already is true, and the first result stays', async (harness) => {
    const { store, second } = harness
    const key = newKey()
    const token = await begun(store, key, {}, STEPS)
    for (const client of [store, second]) await keep(client, key, token, [SECOND[0], 'another'], [FIRST[0], ''])
    await lapse(store, key, token)
    await takeOver(second, key, 2, STEPS)
  }),

  caseWith(
    'step',
    'a step of a name that an earlier attempt has finished is true, and its result stays',
    async (harness) => {
      const { store, second } = harness
      const key = newKey()
      const token = await begun(store, key)
      await lapse(store, key, token)
      const heir = await takeOver(second, key, 2, [FIRST])
      for (const client of [store, second]) await keep(client, key, heir, [FIRST[0], 'another'], SECOND)
      await lapse(store, key, heir)
      await takeOver(second, key, 3, [FIRST, SECOND])
    }
  ),

  caseWith('step', 'names of steps are told apart to the letter', (harness) => {
    const names = ['', 'a', 'ab', 'b', '["a",', '"', '0', '__proto__', ...unusual, ...alike]
    return comeBack(
      harness,
      [...new Set(names)].map((name, n) => [name, `${n}`])
    )
  }),

  caseWith('step', 'results of steps come back whatever is in them', (harness) => {
    const results = ['', '"', '\n', '["a","b"]\n', '{"a":["\\u0000"]}', ...unusual, ...alike]
    return comeBack(
      harness,
      results.map((result, n) => [`${n}`, result])
    )
  }),

  caseWith('step', 'results of steps of 64 KiB come back', (harness) =>
    comeBack(harness, [
      ['half', 'r'.repeat(32_768)],
      ['whole', 'r'.repeat(65_536)],
      ['of letters', 'é🔑'.repeat(10_000)],
      ['short', 'r']
    ])
  ),

  caseWith('step', 'a claim with steps can be claimed again, renewed and completed by its owner', async (harness) => {
    const { store, second } = harness
    const key = newKey()
    const mine = claim()
    answers(await store.acquire(key, mine), FRESH)
    await keep(second, key, mine.token, FIRST)
    for (const client of [second, store]) {
      answers(await client.acquire(key, { ...mine, fingerprint: 'of then' }), FRESH)
      equal(await client.renew(key, mine.token, LONG), true, 'renew')
      answers(await client.acquire(key, claim({ takeover: true })), { state: 'running', fingerprint: 'of then' })
      await keep(client, key, mine.token, SECOND)
    }
    for (const client of [second, store]) {
      equal(await client.complete(key, mine.token, reply(), LONG), true, 'complete')
      replays(await client.acquire(key, claim({ takeover: true })), reply())
    }
  }),

  caseWith('step', 'whoever acquires again gets the steps', async ({ store, second }) => {
    const key = newKey()
    const mine = claim()
    const again = async (steps: readonly StoredStep[]) => {
      for (const [n, client] of [store, second].entries()) {
        const found = await client.acquire(key, { ...mine, fingerprint: 'f'.repeat(n), takeover: n > 0 })
        answers(found, FRESH)
        hasSteps(found, steps)
      }
    }
    await again([])
    for (const n of STEPS.keys()) {
      await keep(store, key, mine.token, STEPS[n] as StoredStep)
      await again(STEPS.slice(0, n + 1))
    }
  }),

  caseWith('step', 'a conflict shows the steps, and so does what is abandoned', async ({ store, second }) => {
    const key = newKey()
    const token = await begun(store, key, { fingerprint: 'at work' }, STEPS)
    const shows = async (expected: Partial<Acquisition>) => {
      for (const client of [store, second]) {
        const found = await client.acquire(key, claim())
        answers(found, expected)
        hasSteps(found, STEPS)
      }
    }
    await shows({ state: 'running', fingerprint: 'at work' })
    await lapse(store, key, token)
    await shows({ state: 'abandoned', fingerprint: 'at work', attempt: 1 })
    equal(await second.release(key, token), true, 'release')
    await shows({ state: 'abandoned', fingerprint: 'at work', attempt: 1, ended: true })
  }),

  caseWith(['step', 'get'], 'get shows the steps', async ({ store, second }) => {
    const key = newKey()
    const token = await begun(store, key, {}, STEPS)
    const shows = async (expected: Partial<Acquisition>) => {
      for (const client of [store, second]) {
        const found = await client.get(key)
        answers(found, expected)
        hasSteps(found, STEPS)
      }
    }
    await shows({ state: 'running' })
    await lapse(store, key, token)
    await shows({ state: 'abandoned', attempt: 1 })
    equal(await second.release(key, token), true, 'release')
    await shows({ state: 'abandoned', attempt: 1, ended: true })
  }),

  caseWith('step', 'a step does not change the lease', async ({ store, second }) => {
    const key = newKey()
    const before = performance.now()
    const token = await take(store, key)
    await sleep(60)
    for (const step of STEPS) {
      await keep(second, key, token, step)
      const found = await store.acquire(key, claim())
      answers(found, { state: 'running' })
      const { leaseMs } = found as { leaseMs: number }
      left(leaseMs, LONG - 60, before + 60)
    }
  }),

  caseWith(
    'step',
    'a lapsed claim with steps is remembered for retainMs, then forgotten with them',
    async (harness) => {
      const { store, second } = harness
      let [key, before] = ['', 0]
      // Nothing but steps, which must not touch what a renewal would mend.
      const remember = async (ms: number) => {
        key = newKey()
        before = performance.now()
        const token = await take(store, key, { leaseMs: ms / 2, retainMs: ms / 2 })
        for (const step of STEPS) if (!(await second.step(key, token, step))) return false
        return true
      }
      const ms = await inTime(remember, 'step was refused')
      await forgotten(second, key)
      passed(ms, before, 'the claim was forgotten')
    }
  )
]
