import type { Test } from 'tap'
import type { StoreUnderTest } from '../../lib/testkit.js'
import { FlakyStore, persistent } from './flaky-store.js'
import { newSeed, Random } from './random.js'
import { conforms, REPEATABLE } from './store-fixtures.js'
import { exclusiveHistory, takeoverHistory } from './store-histories.js'

type Pair = StoreUnderTest & Required<Pick<StoreUnderTest, 'second' | 'dispose'>>

/** What a store promises through a network that loses questions and answers, to callers who repeat them. */
export async function endures(t: Test, name: string, stores: () => Pair | Promise<Pair>): Promise<void> {
  await t.test(name, async (t) => {
    const random = new Random(newSeed())
    t.comment(`SEED=${random.seed}`)
    const factory = async () => {
      const { store, second, dispose } = await stores()
      const flaky = (store: Pair['store']) => persistent(new FlakyStore(store, { random }))
      return { store: flaky(store), second: flaky(second), dispose }
    }
    await conforms(t, 'belongs to its tokens for a caller who repeats what got lost', factory, REPEATABLE)
    const { store, second, dispose } = await stores()
    t.teardown(dispose)
    const clients = [new FlakyStore(store, { random }), new FlakyStore(second, { random })]
    await exclusiveHistory(t, clients, random)
    await takeoverHistory(t, clients, random)
  })
}
