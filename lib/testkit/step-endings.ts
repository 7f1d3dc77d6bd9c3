import { randomUUID } from 'node:crypto'
import type { Acquisition } from '../../types/index.js'
import { answers, claim, equal, FRESH, hasSteps, LONG, newKey, passed, replays, reply, soon, take } from './fixtures.js'
import { caseWith } from './harness.js'
import { begun, FIRST, forgotten, lapse, SECOND, STEPS, takeOver } from './step-fixtures.js'

// Steps stay with a claim that is given back, and go with what is completed, deleted or forgotten.

export const endingsOfSteps = [
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
