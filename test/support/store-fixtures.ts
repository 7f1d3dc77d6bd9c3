import type { Test } from 'tap'
import { replays } from '../../lib/testkit/fixtures.js'
import { type ConformanceTopic, type StoreFactory, storeConformance } from '../../lib/testkit.js'
import type { Acquisition, StoredRecord } from '../../types/index.js'

export { claim, finish, lapsed, newKey, reply, take, tombstone } from '../../lib/testkit/fixtures.js'
export { soon } from './latch.js'

/** The stores keep every promise of a store, or every one about these topics. */
export function conforms(t: Test, name: string, factory: StoreFactory, topics?: ConformanceTopic[]): Promise<unknown> {
  return t.test(name, async (t) => {
    t.jobs = 4
    const cases = storeConformance(factory).filter(({ about }) => topics?.includes(about) ?? true)
    const [alone, others] = [true, false].map((is) => cases.filter(({ about }) => (about === 'interruptions') === is))
    await Promise.all((others ?? []).map(({ name, run }) => t.test(name, { buffered: true }, run)))
    for (const { name, run } of alone ?? []) await t.test(name, run)
  })
}

/** What holds as well for a caller who repeats what may have got lost. */
export const REPEATABLE: ConformanceTopic[] = ['claims', 'ownership', 'steps']

/** The key is completed, with this record. */
export function same(t: Test, found: Acquisition | null, record: StoredRecord): void {
  t.doesNotThrow(() => replays(found, record))
}
