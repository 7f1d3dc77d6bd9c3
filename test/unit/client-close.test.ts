import { setImmediate as turn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { build, inject } from '../support/app.js'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

t.test('who keeps a response does not keep its request, with what was in its body', async (t) => {
  const app = await build(t)
  let body: WeakRef<object> | undefined
  app.post('/', { config: { idempotency: true } }, async (request) => {
    body = new WeakRef(request.body as object)
    return 'done'
  })
  const send = (key: string) =>
    inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': key }, payload: { amount: 1 } })
  const kept = await send('k')
  const first = body as unknown as WeakRef<object>
  // What was under way with the one before is over with the next.
  await send('another')
  for (let turns = 0; turns < 100 && first.deref() !== undefined; turns++) {
    await turn()
    collect()
  }
  t.equal(first.deref(), undefined)
  t.equal(kept.payload, 'done')
})
