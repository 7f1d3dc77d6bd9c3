import t from 'tap'
import { claim, reply, same } from '../support/store-fixtures.js'
import {
  atEachCall,
  besideAnother,
  bothReplay,
  dies,
  endable,
  fails,
  kept,
  OTHERS,
  orDown,
  pairs,
  SETTLED,
  settleable,
  someTurns,
  TRUTH,
  type TwoStores,
  twoStores,
  UNSETTLED,
  type Whole
} from '../support/two-stores.js'

/* What a MigratingStore settles is settled in both of its stores, or can be settled again: whatever befalls it on the way. */

async function isSettled({ look }: TwoStores): Promise<boolean> {
  return (await look()).every((found) => found?.state === 'completed' && found.record.kind === 'reply')
}

/* Deaths and failures */

t.test('wherever a process dies that settles, who settles again finishes it', async (t) => {
  for (const pair of settleable) {
    const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
      const it = await twoStores(pair)
      const fingerprint = await it.fingerprint()
      await someTurns(it.process(hook).settle(it.key, fingerprint, SETTLED))
      it.lapse()
      if (pair[1] === 'free') t.not((await it.to.get(it.key))?.state, 'abandoned', 'what was free is so again')
      const wasDone = await isSettled(it)
      const later = { ...SETTLED, record: { ...TRUTH, createdAt: TRUTH.createdAt + 1 } }
      t.equal(await it.process().settle(it.key, fingerprint, later), !wasDone, `${pair}`)
      const [inFrom, inTo] = await it.look()
      t.strictSame(inFrom, inTo)
      t.match(inFrom, { state: 'completed', record: { statusCode: 200, fingerprint: 'settled' } })
    }
    const deaths = await atEachCall(attempt, dies)
    t.ok(deaths >= 4, `${deaths} deaths`)
  }
})

t.test('where a process has died that settles, another reply does not replace what `to` may have shown', async (t) => {
  const other = reply({ statusCode: 402 })
  for (const pair of settleable) {
    const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
      const it = await twoStores(pair)
      const fingerprint = await it.fingerprint()
      await someTurns(it.process(hook).settle(it.key, fingerprint, SETTLED))
      it.lapse()
      const shown = await it.to.get(it.key)
      const wasShown = shown?.state === 'completed' && shown.record.kind === 'reply'
      t.equal(await it.process().settle(it.key, fingerprint, { record: other, ttlMs: null }), !wasShown, `${pair}`)
      await bothReplay(t, it, wasShown ? TRUTH : other)
    }
    await atEachCall(attempt, dies)
  }
})

t.test('where a process has died that settles, nobody who claims in both runs what `to` may have shown', async (t) => {
  for (const pair of settleable) {
    const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
      const it = await twoStores(pair)
      await someTurns(it.process(hook).settle(it.key, await it.fingerprint(), SETTLED))
      it.lapse()
      const shown = await it.to.get(it.key)
      const wasShown = shown?.state === 'completed' && shown.record.kind === 'reply'
      const found = await it.inTime(() => it.process().acquire(it.key, kept({ takeover: true })))
      if (!wasShown) return
      // A tombstone in `from` is what it says until it is settled again.
      if (pair[0] === 'a tombstone') t.match(found, { state: 'completed' })
      else {
        same(t, found, TRUTH)
        await bothReplay(t, it)
      }
    }
    await atEachCall(attempt, dies)
  }
})

for (const isLate of [false, true]) {
  const when = isLate ? 'after it was done' : 'before it is done'
  t.test(`wherever a call fails ${when} by which a key is settled, it can be settled again at once`, async (t) => {
    for (const pair of settleable) {
      const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
        const it = await twoStores(pair)
        const fingerprint = await it.fingerprint()
        const first = await orDown(it.process(hook).settle(it.key, fingerprint, SETTLED))
        if (first === 'down') {
          const wasDone = await isSettled(it)
          t.equal(await it.process().settle(it.key, fingerprint, SETTLED), !wasDone, `${pair}`)
        } else t.equal(first, true)
        await bothReplay(t, it)
      }
      const failures = await atEachCall(attempt, fails(isLate))
      t.ok(failures >= 4, `${failures} failures`)
    }
  })
}

t.test('wherever a process dies that settles as ended, who settles again finishes it', async (t) => {
  for (const pair of endable) {
    const attempt = async (hook: Parameters<TwoStores['process']>[0]) => {
      const it = await twoStores(pair)
      const fingerprint = await it.fingerprint()
      await someTurns(it.process(hook).settle(it.key, fingerprint, 'ended'))
      t.equal(await it.process().settle(it.key, fingerprint, 'ended'), true)
      for (const found of await it.look()) if (found !== null) t.match(found, { state: 'abandoned', ended: true })
    }
    const deaths = await atEachCall(attempt, dies)
    t.ok(deaths >= 3, `${deaths} deaths`)
  }
})

/* Others at the same time */

const settle = async (process: Whole, it: TwoStores) => process.settle(it.key, await it.fingerprint(), SETTLED)

for (const [who, store] of Object.entries(OTHERS)) {
  for (const does of ['runs', 'completes'] as const) {
    const what = does === 'runs' ? 'takes over' : 'takes over and completes'
    t.test(`whenever ${who} ${what} what is being settled, it is theirs or it is settled`, async (t) => {
      for (const pair of settleable) {
        await besideAnother(pair, { store, does }, settle, async (it, settled, found, token) => {
          t.equal(settled, found.state !== 'acquired', `${pair}: ${found.state}`)
          if (settled === true) return bothReplay(t, it)
          if (does === 'runs') t.equal(await store(it).renew(it.key, token, 60_000), true, `${pair}`)
          const shown = await store(it).acquire(it.key, claim({ takeover: true }))
          t.match(shown, does === 'runs' ? { state: 'running' } : { record: { statusCode: 299 } }, `${pair}`)
          for (const each of await it.look()) t.notMatch(each, { record: { statusCode: 200 } }, `${pair}`)
          if (who === 'who has `to` alone') t.not((await it.from.get(it.key))?.state, 'running', 'is given back')
        })
      }
    })
  }

  t.test(
    `when ${who} takes over while who settles stands still, it is theirs, and not said to be settled`,
    async (t) => {
      for (const pair of settleable) {
        await besideAnother(pair, { store, does: 'runs', isLate: true }, settle, async (it, settled, found, token) => {
          if (found.state !== 'acquired') {
            t.equal(settled, true, `${pair}: ${found.state}`)
            return bothReplay(t, it)
          }
          const inTo = await it.to.get(it.key)
          const isChanged = inTo?.state === 'completed' && inTo.record.fingerprint === TRUTH.fingerprint
          if (isChanged) t.match(settled, { message: /taken while it was being settled/ }, `${pair}`)
          else t.equal(settled, false, `${pair}`)
          t.equal(await store(it).renew(it.key, token, 60_000), true, `${pair}`)
        })
      }
    }
  )
}

t.test('what was taken over and abandoned again while it was being settled is not what was meant', async (t) => {
  for (const [who, inTo] of [
    ['who moves', UNSETTLED],
    ['who has `from` alone', ['free', 'abandoned']]
  ] as const) {
    for (const pair of pairs(['abandoned', 'ended'], inTo)) {
      const other = { store: OTHERS[who] as never, does: 'dies' } as const
      await besideAnother(pair, other, settle, async (it, settled, found) => {
        t.equal(settled, found.state !== 'acquired', `${pair}: ${found.state}`)
        if (found.state !== 'acquired') return
        t.match(await it.process().get(it.key), { state: 'abandoned', fingerprint: 'the heir' }, `${pair}`)
      })
    }
  }
})
