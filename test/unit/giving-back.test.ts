import t from 'tap'
import { StoreContext } from '../../lib/operation/store-context.js'
import type { IdempotencyStore } from '../../types/index.js'
import { type Latch, latch, until } from '../support/latch.js'

/** A store whose releases the test settles. */
function store() {
  const asked: { key: string; answer: Latch<boolean> }[] = []
  const release = (key: string) => {
    const answer = latch<boolean>()
    asked.push({ key, answer })
    return answer.promise
  }
  return { asked, inUse: StoreContext.of({ release } as unknown as IdempotencyStore) }
}

const LONG = 60_000

t.test('many claims are given back side by side by a store that answers, and each once', async (t) => {
  const { asked, inUse } = store()
  const keys = Array.from({ length: 100 }, (_, n) => `key ${n}`)
  const given = Promise.all(keys.map((key) => inUse.giveBack(key, 'token', LONG, true)))
  t.equal(asked.length, 1, 'nobody knows yet whether it answers')
  let most = 0
  for (let settled = 0; settled < keys.length; ) {
    await until(() => asked.length > settled)
    const open = asked.slice(settled)
    most = Math.max(most, open.length)
    for (const { answer } of open) answer.open(true)
    settled += open.length
  }
  await given
  t.ok(most > 4 && most <= 16, `${most} at a time`)
  t.strictSame(asked.map(({ key }) => key).sort(), keys.sort())
})

t.test('a store that has stopped answering is asked for one claim at a time, until it is back', async (t) => {
  const { asked, inUse } = store()
  const keys = Array.from({ length: 20 }, (_, n) => `key ${n}`)
  const given = Promise.all(keys.map((key) => inUse.giveBack(key, 'token', LONG, true)))
  asked[0]?.answer.open(true)
  await until(() => asked.length >= 3)
  const failed = asked.slice(1)
  for (const { answer } of failed) answer.fail(new Error('gone'))
  const before = asked.length
  await until(() => asked.length > before)
  for (let n = before; n < before + 3; n++) {
    await until(() => asked.length > n)
    t.equal(asked.length, n + 1, 'one')
    asked[n]?.answer.fail(new Error('still gone'))
  }
  let settled = before + 3
  const answering = setInterval(() => {
    for (; settled < asked.length; settled++) asked[settled]?.answer.open(true)
  }, 1)
  await given
  clearInterval(answering)
  for (const key of keys) t.ok(asked.some((each) => each.key === key))
})
