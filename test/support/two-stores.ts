import type { Test } from 'tap'
import {
  type Acquisition,
  type Claim,
  type IdempotencyStore,
  MigratingStore,
  type StoredReply,
  type Tombstone
} from '../../index.js'
import { ModelData, ModelStore } from './model-store.js'
import { claim, newKey, reply, same, tombstone } from './store-fixtures.js'

/*
 * A key in the two stores of a MigratingStore, in all that processes of every deploy may have left there; and what may befall
 * who does something with it: a fault at each call in turn, or another process that asks for the key meanwhile.
 */

export type Whole = Required<Omit<IdempotencyStore, 'begin' | 'sharesLocks'>> & IdempotencyStore

/** Told of a call before it is made, it may give an error; `isLate` when that is to come after the call was made. */
export type Hook = () => Promise<Fault | undefined> | undefined
export interface Fault {
  readonly error: Error
  readonly isLate: boolean
}

/** A store whose clock stands still until it is put forward. */
class StandingStore extends ModelStore {
  constructor(private readonly clock: { now: number }) {
    super(new ModelData())
  }
  protected override now() {
    return this.clock.now
  }
}

export interface TwoStores {
  readonly key: string
  readonly from: ModelStore
  readonly to: ModelStore
  /** A process that moves; each of its calls to the two stores goes through the hook. */
  process(hook?: Hook): Whole
  /** All leases lapse, and nothing is forgotten. */
  lapse(): void
  /** Time passes while something is done: who brings two stores to the same attempt waits for leases of a millisecond. */
  inTime<T>(work: () => Promise<T>): Promise<T>
  /** What each of the two has of the key. */
  look(): Promise<(Acquisition | null)[]>
  /** What `get` says that the key looks like. */
  fingerprint(): Promise<string>
}

/** A claim that is remembered for longer than any test puts the clock forward. */
export function kept(changes: Partial<Claim>): Claim {
  return claim({ retainMs: 100_000_000, ...changes })
}

/** What there may be of a key in one store. */
const states: Record<string, (store: ModelStore, key: string, lapse: () => void) => Promise<unknown>> = {
  free: async () => {},
  abandoned: async (store, key, lapse) => {
    await store.acquire(key, kept({ fingerprint: 'first' }))
    lapse()
  },
  'abandoned twice, with a step': async (store, key, lapse) => {
    const former = kept({ fingerprint: 'first' })
    await store.acquire(key, former)
    await store.step(key, former.token, ['a', '1'])
    lapse()
    await store.acquire(key, kept({ fingerprint: 'second', takeover: true }))
    lapse()
  },
  ended: async (store, key, lapse) => {
    await store.acquire(key, kept({ fingerprint: 'first' }))
    lapse()
    const heir = kept({ fingerprint: 'ended', takeover: true })
    await store.acquire(key, heir)
    await store.release(key, heir.token)
  },
  'a tombstone': (store, key) => completed(store, key, { ...tombstone('hijacked'), fingerprint: 'a tombstone' }),
  'a reply': (store, key) => completed(store, key, reply({ fingerprint: 'a reply' })),
  running: (store, key) => store.acquire(key, kept({ fingerprint: 'running' }))
}
export const UNFINISHED = ['free', 'abandoned', 'abandoned twice, with a step', 'ended'] as const
export const UNSETTLED = [...UNFINISHED, 'a tombstone'] as const
/** All but what runs. */
export const AT_REST = [...UNSETTLED, 'a reply'] as const

type Pair = readonly [inFrom: string, inTo: string]

/** All pairs of what there may be in the two. */
export function pairs(inFrom: readonly string[], inTo: readonly string[]): Pair[] {
  return inFrom.flatMap((a) => inTo.map((b) => [a, b] as const))
}

export const settleable = pairs(UNSETTLED, UNSETTLED).filter(([a, b]) => a !== 'free' || b !== 'free')
export const endable = pairs(UNFINISHED, UNFINISHED).filter(([a, b]) => a !== 'free' || b !== 'free')

/** What has really happened. */
export const TRUTH = reply({ statusCode: 200, body: Buffer.from('"paid out"'), fingerprint: 'settled' })
export const SETTLED = { record: TRUTH, ttlMs: null }

export async function bothReplay(t: Test, { look }: TwoStores, record = TRUTH): Promise<void> {
  for (const found of await look()) same(t, found, record)
}

async function completed(store: ModelStore, key: string, record: StoredReply | Tombstone): Promise<void> {
  const owner = claim()
  await store.acquire(key, owner)
  await store.complete(key, owner.token, record, null)
}

export async function twoStores([inFrom, inTo]: Pair): Promise<TwoStores> {
  const clock = { now: 1_000_000 }
  const lapse = () => {
    clock.now += 61_000
  }
  const [from, to, key] = [new StandingStore(clock), new StandingStore(clock), newKey()]
  // What runs would lapse with the rest.
  for (const isRunning of [false, true]) {
    if ((inFrom === 'running') === isRunning) await states[inFrom]?.(from, key, lapse)
    if ((inTo === 'running') === isRunning) await states[inTo]?.(to, key, lapse)
  }
  const process = (hook: Hook = () => undefined) =>
    new MigratingStore(hooked(from, hook), hooked(to, hook)) as unknown as Whole
  return {
    key,
    from,
    to,
    lapse,
    process,
    inTime: async (work) => {
      const passing = setInterval(() => {
        clock.now += 2
      }, 1)
      return work().finally(() => clearInterval(passing))
    },
    look: () => Promise.all([from.get(key), to.get(key)]),
    fingerprint: async () => {
      const found = await process().get(key)
      if (found === null || found.state === 'acquired') return ''
      return found.state === 'completed' ? found.record.fingerprint : found.fingerprint
    }
  }
}

function hooked(store: ModelStore, hook: Hook): ModelStore {
  return new Proxy(store, {
    get(target, name) {
      const value = Reflect.get(target, name)
      if (typeof value !== 'function') return value
      return async (...args: unknown[]) => {
        const fault = await hook()
        if (fault?.isLate === false) throw fault.error
        const answer = await Reflect.apply(value, target, args)
        if (fault !== undefined) throw fault.error
        return answer
      }
    }
  })
}

/** Tries something again and again, with a fault at the next call each time, until there was no call left for it. */
export async function atEachCall(
  attempt: (hook: Hook) => Promise<unknown>,
  fault: () => ReturnType<Hook>
): Promise<number> {
  for (let at = 1; ; at++) {
    let calls = 0
    await attempt(() => (++calls === at ? fault() : undefined))
    if (calls < at) return at - 1
  }
}

/** A process that dies before a call: neither is the call made, nor anything after it. */
export const dies = (): ReturnType<Hook> => new Promise(() => {})

/** A call that fails, before or after it was done. */
export const fails = (isLate: boolean) => async () => ({ error: new Error('down'), isLate })

/** What work gives; `'down'` when a call has failed. */
export function orDown<T>(work: Promise<T>): Promise<T | 'down'> {
  return work.catch((error: Error) => {
    if (error.message !== 'down') throw error
    return 'down'
  })
}

/** Gives something that hangs, or waits for others, so many turns. It may go on after that. */
export async function someTurns(work: Promise<unknown>): Promise<void> {
  const turns = async () => {
    for (let n = 0; n < 10; n++) await new Promise<void>((resolve) => setImmediate(resolve))
  }
  await Promise.race([work.catch(() => {}), turns()])
}

/** Another process that asks for the key. */
export interface Other {
  store(it: TwoStores): IdempotencyStore
  /** What it does when it has the key. */
  readonly does: 'runs' | 'completes' | 'dies'
  /** Before it asks, everybody stands still for longer than any lease. */
  readonly isLate?: boolean
}

/** The reply of the other process. */
export const HEIR = reply({ statusCode: 299, fingerprint: 'the heir' })

export const OTHERS: Record<string, Other['store']> = {
  'who has `from` alone': ({ from }) => from,
  'who has `to` alone': ({ to }) => to,
  'who moves': ({ process }) => process()
}

/** Lets another one ask for the key before each call of some work in turn, and judges what both have got. */
export async function besideAnother<T>(
  pair: Pair,
  other: Other,
  work: (process: Whole, it: TwoStores) => Promise<T>,
  judge: (it: TwoStores, answer: T | Error, found: Acquisition, token: string) => Promise<unknown>
): Promise<void> {
  await atEachCall(
    async (hook) => {
      const it = await twoStores(pair)
      const mine = kept({ takeover: true, fingerprint: 'the heir' })
      const ask = async () => {
        if (other.isLate) it.lapse()
        const found = await other.store(it).acquire(it.key, mine)
        if (found.state === 'acquired' && other.does === 'dies') it.lapse()
        if (found.state === 'acquired' && other.does === 'completes') {
          await other.store(it).complete(it.key, mine.token, HEIR, null)
        }
        return found
      }
      let asked: Promise<Acquisition> | undefined
      const process = it.process(async () => {
        if (hook() === undefined) return undefined
        asked = ask()
        await someTurns(asked)
        return undefined
      })
      await it.inTime(async () => {
        const answer = await work(process, it).catch((error: Error) => error)
        if (asked !== undefined) await judge(it, answer, await asked, mine.token)
      })
    },
    async () => undefined
  )
}
