import t from 'tap'
import {
  AT_REST,
  atEachCall,
  besideAnother,
  fails,
  OTHERS,
  orDown,
  pairs,
  type TwoStores,
  twoStores,
  type Whole
} from '../support/two-stores.js'

/*
 * A MigratingStore that is to delete a key unless it is running does so in both of its stores or in none, whatever processes of
 * every deploy have left there, and whatever befalls it on the way.
 */

const atRest = pairs(AT_REST, AT_REST)

const forget = (process: Whole, { key }: TwoStores) => process.delete(key, true)

t.test('what is not running in either is deleted in both', async (t) => {
  for (const pair of atRest) {
    const it = await twoStores(pair)
    const isThere = pair.some((state) => state !== 'free')
    t.equal(await forget(it.process(), it), isThere, `${pair}`)
    t.strictSame(await it.look(), [null, null])
  }
})

t.test('what is running in one of the two is not deleted in the other', async (t) => {
  const all = [...AT_REST, 'running']
  for (const pair of [...pairs(['running'], all), ...pairs(all, ['running'])]) {
    const it = await twoStores(pair)
    const before = await it.look()
    t.equal(await forget(it.process(), it), false, `${pair}`)
    // What is given back lapses anew.
    const [now, then] = [await it.look(), before].map((both) => both.map((each) => each && { ...each, lapsedMs: 0 }))
    t.strictSame(now, then, `${pair}`)
  }
})

for (const isLate of [false, true]) {
  const when = isLate ? 'after it was done' : 'before it is done'
  t.test(`wherever a call fails ${when} by which a key is deleted, it can be deleted again at once`, async (t) => {
    for (const pair of atRest) {
      const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
        const it = await twoStores(pair)
        const first = await orDown(forget(it.process(hook), it))
        if (first === 'down') await forget(it.process(), it)
        t.strictSame(await it.look(), [null, null], `${pair}`)
      }
      await atEachCall(attempt, fails(isLate))
    }
  })
}

t.test('whoever claims a key in both while it is being deleted has it in both', async (t) => {
  for (const pair of atRest) {
    const other = { store: OTHERS['who moves'] as never, does: 'runs' } as const
    await besideAnother(pair, other, forget, async (it, _deleted, found, token) => {
      if (found.state !== 'acquired') return
      t.match(await it.look(), [{ state: 'running' }, { state: 'running' }], `${pair}`)
      t.equal(await it.process().renew(it.key, token, 60_000), true, `${pair}`)
    })
  }
})

t.test('what is completed in both while it is being deleted is there in both, or was deleted in both', async (t) => {
  for (const pair of atRest) {
    const other = { store: OTHERS['who moves'] as never, does: 'completes' } as const
    await besideAnother(pair, other, forget, async (it, _deleted, found) => {
      if (found.state !== 'acquired') return
      const [inFrom, inTo] = await it.look()
      t.equal(inFrom?.state, inTo?.state, `${pair}`)
    })
  }
})

t.test('whoever claims a key in one of the two while it is being deleted has it there', async (t) => {
  for (const who of ['who has `from` alone', 'who has `to` alone']) {
    for (const pair of atRest) {
      const store = OTHERS[who] as NonNullable<(typeof OTHERS)[string]>
      await besideAnother(pair, { store, does: 'runs' }, forget, async (it, _deleted, found, token) => {
        if (found.state !== 'acquired') return
        t.equal(await store(it).renew(it.key, token, 60_000), true, `${who}: ${pair}`)
      })
    }
  }
})
