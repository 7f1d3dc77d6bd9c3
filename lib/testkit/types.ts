import type { IdempotencyStore } from '../../types/index.js'

/** A store under test, and what helps to test it. */
export interface StoreUnderTest {
  store: IdempotencyStore
  /**
   * Another client on the same data, as another process would have it. Without it everything is asked of one client,
   * which cannot show what goes wrong between two.
   */
  second?: IdempotencyStore
  /** Called after each case, whatever came of it. Without it the stores are closed, where they have a `close`. */
  dispose?(): unknown
  /**
   * Breaks the connections of both clients, as a network would. Calls may fail for a while and then have to work, and
   * those who listen have to hear of what happens to their key all the same. Without it none of this is tried. Where
   * cases share connections, those about `interruptions` must not run at the same time as others.
   */
  interrupt?(): unknown
  /**
   * Makes the record that is stored under the key undecodable, as another version or a bug would. Whoever asks for the
   * key then has to get an error. Without it this is not tried.
   */
  spoil?(key: string): unknown
}

/** Makes a store for one case. Stores may share their data: cases keep out of each other's way. */
export type StoreFactory = () => IdempotencyStore | StoreUnderTest | Promise<IdempotencyStore | StoreUnderTest>

/** Options of `storeConformance`. */
export interface ConformanceOptions {
  /**
   * Milliseconds after which a case is given up, because the store does not answer.
   * @default 30_000
   */
  timeout?: number
}

/** What a case is about, for those who want to try a part. All of it is promised of every store. */
export type ConformanceTopic =
  | 'claims'
  | 'ownership'
  | 'releases'
  | 'steps'
  | 'races'
  | 'lifetimes'
  | 'records'
  | 'text'
  | 'copies'
  | 'wake-ups'
  | 'looking'
  | 'listing'
  | 'settling'
  | 'interruptions'

/** One promise of `IdempotencyStore`. */
export interface ConformanceCase {
  /** The promise, as a sentence; no two are the same. */
  name: string
  about: ConformanceTopic
  /**
   * Tries the promise on a store that the factory makes for it. Rejects with an `AssertionError` when it is broken.
   * What a store does not have, of the methods it need not have, is not tried. Cases may run at the same time.
   */
  run(this: void): Promise<void>
}
