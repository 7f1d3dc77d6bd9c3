import { claims } from './testkit/claims.js'
import { copies } from './testkit/copies.js'
import { type Case, runCase } from './testkit/harness.js'
import { interruptions } from './testkit/interruptions.js'
import { lifetimes } from './testkit/lifetimes.js'
import { listing } from './testkit/listing.js'
import { looking } from './testkit/looking.js'
import { ownership } from './testkit/ownership.js'
import { races } from './testkit/races.js'
import { records } from './testkit/records.js'
import { releases } from './testkit/releases.js'
import { settling } from './testkit/settling.js'
import { endingsOfSteps } from './testkit/step-endings.js'
import { steps } from './testkit/steps.js'
import { text } from './testkit/text.js'
import type { ConformanceCase, ConformanceOptions, ConformanceTopic, StoreFactory } from './testkit/types.js'
import { wakeUps } from './testkit/wake-ups.js'

export type {
  ConformanceCase,
  ConformanceOptions,
  ConformanceTopic,
  StoreFactory,
  StoreUnderTest
} from './testkit/types.js'

const topics: Record<ConformanceTopic, readonly Case[]> = {
  claims,
  ownership,
  releases,
  steps: [...steps, ...endingsOfSteps],
  races,
  lifetimes,
  records,
  text,
  copies,
  'wake-ups': wakeUps,
  looking,
  listing,
  settling,
  interruptions
}

/**
 * Everything that is promised of an `IdempotencyStore`, but for `begin`. It needs no test runner, and goes with any:
 *
 *     for (const { name, run } of storeConformance(() => new MyStore())) test(name, run)
 */
export function storeConformance(factory: StoreFactory, options: ConformanceOptions = {}): ConformanceCase[] {
  const { timeout = 30_000 } = options
  if (typeof factory !== 'function') throw new TypeError(`storeConformance takes a function, got ${typeof factory}`)
  if (typeof timeout !== 'number' || !(timeout > 0 && timeout < 2 ** 31)) {
    throw new RangeError(`storeConformance option "timeout" takes a positive number of milliseconds, got ${timeout}`)
  }
  return Object.entries(topics).flatMap(([about, promises]) =>
    promises.map((promised) => ({
      name: promised.name,
      about: about as ConformanceTopic,
      run: () => runCase(promised, factory, timeout)
    }))
  )
}
