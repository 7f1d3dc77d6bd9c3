import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Acquisition, Claim, IdempotencyStore, StoredStep } from '../../types/index.js'
import {
  abandoned,
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
  soon,
  take,
  until
} from './fixtures.js'
import { caseWith, type HarnessWith, shown } from './harness.js'
import { alike, unusual } from './text.js'

// What an operation has finished is not done again: steps stay with a claim, whoever has it, until it is over.

type Store = HarnessWith<'step'>['store']

const STEPS: readonly StoredStep[] = [
  ['account', '{"id":1}'],
  ['charge', '"ch_1"'],
  ['receipt', 'null']
]
const [FIRST, SECOND, THIRD] = STEPS as [StoredStep, StoredStep, StoredStep]

async function keep(store: Store, key: string, token: string, ...steps: readonly StoredStep[]): Promise<void> {
  for (const step of steps) equal(await store.step(key, token, step), true, `step ${shown(step[0])}`)
}

/** Claims a free key and keeps steps with it, and returns the owner's token. */
async function begun(
  store: Store,
  key: string,
  changes: Partial<Claim> = {},
  steps: readonly StoredStep[] = [FIRST]
): Promise<string> {
  const token = await take(store, key, changes)
  await keep(store, key, token, ...steps)
  return token
}

/** Lets a lease lapse. */
async function lapse(store: IdempotencyStore, key: string, token: string): Promise<void> {
  equal(await store.renew(key, token, 1), true, 'renew')
  await abandoned(store, key)
}

/** Takes over what is abandoned, as soon as it may be. */
async function takeOver(
  store: IdempotencyStore,
  key: string,
  attempt: number,
  steps: readonly StoredStep[]
): Promise<string> {
  const heir = claim({ fingerprint: `attempt ${attempt}`, takeover: true })
  const taken = async () => {
    const found = await store.acquire(key, heir)
    return found.state !== 'abandoned' && found
  }
  const found = (await until(taken, { message: 'what is abandoned to be taken over' })) as Acquisition
  answers(found, { state: 'acquired', attempt })
  hasSteps(found, steps, 'the takeover')
  return heir.token
}

/** Steps with these names and results, kept by both clients in turn, come back as they are. */
async function comeBack({ store, second }: HarnessWith<'step'>, steps: readonly StoredStep[]): Promise<void> {
  const key = newKey()
  const token = await take(store, key)
  for (const [n, step] of steps.entries()) await keep(n % 2 === 0 ? store : second, key, token, step)
  await lapse(second, key, token)
  await takeOver(store, key, 2, steps)
}

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
  ),

  caseWith(
    'step',
    'a claim with steps that is released is abandoned at once, says that it has ended, and can be taken over',
    async ({ store, second }) => {
      for (const unused of [false, true]) {
        const key = newKey()
        const token = await begun(store, key, { fingerprint: 'attempt 1' }, STEPS)
        equal(await second.release(key, token, unused), true, 'release')
        for (const client of [store, second]) {
          const ended = { state: 'abandoned', fingerprint: 'attempt 1', attempt: 1, ended: true } as const
          answers(await client.acquire(key, claim()), ended)
        }
        const heir = await takeOver(store, key, 2, STEPS)
        equal(await second.release(key, heir), true, 'release by the heir')
        const ended = { state: 'abandoned', fingerprint: 'attempt 2', attempt: 2, ended: true } as const
        answers(await store.acquire(key, claim()), ended)
        const last = await takeOver(second, key, 3, STEPS)
        equal(await store.complete(key, last, reply(), LONG), true, 'complete')
        replays(await second.acquire(key, claim({ takeover: true })), reply())
      }
    }
  ),

  caseWith(
    'step',
    'releasing a claim with steps again with the same token is true again, and changes nothing',
    async (harness) => {
      const { store, second } = harness
      const key = newKey()
      const token = await begun(store, key)
      for (const client of [store, second, store]) {
        for (const unused of [false, true]) equal(await client.release(key, token, unused), true, 'release')
        equal(await client.release(key, randomUUID()), false, 'release by another token')
        equal(await client.renew(key, token, LONG), false, 'renew after the release')
        equal(await client.complete(key, token, reply(), LONG), false, 'complete after the release')
      }
      answers(await store.acquire(key, claim({ token })), { state: 'abandoned', attempt: 1, ended: true })
      await takeOver(second, key, 2, [FIRST])
      equal(await store.release(key, token), false, 'release after a takeover')
    }
  ),

  caseWith(
    'step',
    'a claim that was released with steps is remembered for retainMs from the release on, then forgotten with them',
    async ({ store, second }) => {
      const [key, retainMs] = [newKey(), 250]
      const token = await begun(store, key, { retainMs }, STEPS)
      const before = performance.now()
      equal(await second.release(key, token), true, 'release')
      await forgotten(store, key)
      passed(retainMs, before, 'the released claim was forgotten')
    }
  ),

  caseWith(
    'step',
    'a claim that took over and is released unused leaves the steps with what it found',
    async ({ store, second }) => {
      for (const ended of [undefined, true]) {
        const key = newKey()
        const token = await begun(store, key, { fingerprint: 'the first' }, STEPS)
        if (ended) equal(await store.release(key, token), true, 'release')
        else await lapse(store, key, token)
        for (const client of [second, store]) {
          const heir = await takeOver(client, key, 2, STEPS)
          equal(await client.release(key, heir, true), true, 'release')
          const found = { state: 'abandoned', fingerprint: 'the first', attempt: 1, ended } as object as Acquisition
          answers(await second.acquire(key, claim()), found)
        }
        await takeOver(second, key, 2, STEPS)
      }
    }
  ),

  caseWith('step', 'what is completed has no steps any more', async ({ store, second }) => {
    const key = newKey()
    const token = await begun(store, key, {}, STEPS)
    equal(await second.complete(key, token, reply(), LONG), true, 'complete')
    for (const client of [store, second]) {
      const found = await client.acquire(key, claim({ takeover: true }))
      replays(found, reply())
      hasSteps(found, [])
    }
  }),

  caseWith('step', 'step after the completion or the release is false', async ({ store, second }) => {
    const [done, released, ended] = [newKey(), newKey(), newKey()]
    const tokens = [await begun(store, done), await take(store, released), await begun(store, ended)] as const
    equal(await store.complete(done, tokens[0], reply(), LONG), true, 'complete')
    equal(await store.release(released, tokens[1]), true, 'release')
    equal(await store.release(ended, tokens[2]), true, 'release with steps')
    for (const client of [second, store]) {
      for (const step of [FIRST, SECOND]) {
        equal(await client.step(done, tokens[0], step), false, 'step after the completion')
        equal(await client.step(released, tokens[1], step), false, 'step after the release')
        equal(await client.step(ended, tokens[2], step), false, 'step after the release with steps')
      }
    }
    replays(await store.acquire(done, claim()), reply())
    const found = await store.acquire(released, claim())
    answers(found, FRESH)
    hasSteps(found, [])
    await takeOver(second, ended, 2, [FIRST])
  }),

  caseWith(['step', 'delete'], 'delete forgets the steps', async ({ store, second }) => {
    const key = newKey()
    const token = await begun(store, key, {}, STEPS)
    equal(await second.delete(key), true, 'delete')
    equal(await store.step(key, token, SECOND), false, 'step by the former owner')
    const found = await store.acquire(key, claim({ takeover: true }))
    answers(found, FRESH)
    hasSteps(found, [])
  }),

  caseWith(['step', 'changed'], 'whoever listens hears when a claim with steps is released', async (harness) => {
    const { store, second, signal } = harness
    for (const [listener, owner] of [
      [store, store],
      [store, second],
      [second, store]
    ] as const) {
      const key = newKey()
      const token = await begun(owner, key)
      const heard = listener.changed(key, signal)
      equal(await owner.step(key, token, SECOND), true, 'step by the owner')
      equal(await owner.release(key, token), true, 'release')
      await soon(heard, 'the listener to hear that the key is released')
    }
  })
]

/** Waits until a key is free, and sees that nothing is left of its steps. */
async function forgotten(store: IdempotencyStore, key: string): Promise<void> {
  const next = claim()
  const acquired = async () => {
    const found = await store.acquire(key, next)
    return found.state === 'acquired' && { found }
  }
  const { found } = (await until(acquired, { message: 'a claim with steps to be forgotten' })) as { found: Acquisition }
  answers(found, FRESH, 'a key that was forgotten')
  hasSteps(found, [], 'a key that was forgotten')
}
