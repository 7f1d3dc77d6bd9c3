import t from 'tap'
import { atHand, isAtHand, reveal } from '../../lib/at-hand.js'

t.test('an answer at hand shows its value, and is a promise like any other', async (t) => {
  const promise = atHand('value')
  t.ok(promise instanceof Promise)
  t.ok(isAtHand(promise))
  t.equal(reveal(promise), 'value')
  t.equal(await promise, 'value')
})

t.test('nothing is a value as well', async (t) => {
  t.ok(isAtHand(atHand(undefined)))
  t.equal(reveal(atHand(undefined)), undefined)
  t.equal(reveal(atHand(false)), false)
})

t.test('any other promise is left as it is', async (t) => {
  const promise = Promise.resolve('value')
  t.notOk(isAtHand(promise))
  t.equal(reveal(promise), promise)
})
