import t from 'tap'
import { isResolved, isThenable, peek, resolved } from '../../lib/util/sync-promise.js'

t.test('an answer at hand shows its value, and is a promise like any other', async (t) => {
  const promise = resolved('value')
  t.ok(promise instanceof Promise)
  t.ok(isResolved(promise))
  t.equal(peek(promise), 'value')
  t.equal(await promise, 'value')
})

t.test('nothing is a value as well', async (t) => {
  t.ok(isResolved(resolved(undefined)))
  t.equal(peek(resolved(undefined)), undefined)
  t.equal(peek(resolved(false)), false)
})

t.test('any other promise is left as it is', async (t) => {
  const promise = Promise.resolve('value')
  t.notOk(isResolved(promise))
  t.equal(peek(promise), promise)
})

t.test('what can be waited for is known by its `then`', async (t) => {
  const withThen = (object: object, then: unknown) => Object.defineProperty(object, 'then', { value: then })
  for (const thenable of [Promise.resolve(), withThen({}, () => {})]) t.equal(isThenable(thenable), true)
  const none = [
    undefined,
    null,
    0,
    'then',
    {},
    withThen({}, 1),
    withThen(
      () => {},
      () => {}
    )
  ]
  for (const other of none) t.equal(isThenable(other), false)
})
