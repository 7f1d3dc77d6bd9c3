import { setTimeout as sleep } from 'node:timers/promises'
import {
  answered,
  answers,
  claim,
  equal,
  FRESH,
  finish,
  LONG,
  later,
  newKey,
  replays,
  reply,
  soon,
  take
} from './fixtures.js'
import { caseWith, conformanceCase } from './harness.js'

// Connections break, and a store goes on. Tried where the factory can break them.

export const interruptions = [
  conformanceCase('a store whose connections broke answers again, and holds what it held', async (harness) => {
    const { store, second, interrupt } = harness
    if (interrupt === undefined) return
    const [running, done] = [newKey(), newKey()]
    const token = await take(store, running)
    await finish(store, done)
    await interrupt()
    for (const client of [store, second]) {
      const found = await answered(() => client.acquire(running, claim({ takeover: true })))
      answers(found, { state: 'running' })
      replays(await answered(() => client.acquire(done, claim())), reply())
    }
    equal(await answered(() => store.complete(running, token, reply(), LONG)), true, 'complete by the owner')
  }),

  caseWith(
    'changed',
    'whoever listens hears of what happens to the key although the connections broke meanwhile',
    async ({ store, second, signal, interrupt }) => {
      if (interrupt === undefined) return
      const key = newKey()
      const token = await take(store, key)
      // Whoever hears of the loss itself, by an answer or an error, can ask again.
      const heard = [store, second].map((client) => client.changed(key, signal).catch(() => {}))
      await sleep(100)
      await interrupt()
      equal(await answered(() => second.complete(key, token, reply(), LONG)), true, 'complete by the owner')
      await soon(Promise.all(heard), 'the listeners to hear of the completion')
    }
  ),

  caseWith(
    'changed',
    'one can listen again after the connections broke',
    async ({ store, second, signal, interrupt }) => {
      if (interrupt === undefined) return
      const [first, key, mine] = [newKey(), newKey(), claim()]
      await take(store, first)
      for (const client of [store, second]) void client.changed(first, signal)
      await sleep(50)
      await interrupt()
      answers(await answered(() => store.acquire(key, mine)), FRESH)
      const heard = [store, second].map((client) => later(answered(() => client.changed(key, signal))))
      await sleep(50)
      equal(await answered(() => second.complete(key, mine.token, reply(), LONG)), true, 'complete by the owner')
      await soon(Promise.all(heard), 'the listeners to hear of the completion')
    }
  )
]
