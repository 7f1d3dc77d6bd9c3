import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import type { Acquisition, Claim, IdempotencyStore, StoredRecord, StoredStep } from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { describeStore } from '../../util/describe.js'
import { innermost, isInFrontOf } from '../innermost.js'
import { A_STORE, isStore } from '../is-store.js'
import { copyOf, seen } from './answers.js'
import { COMPLETION_MS, DoubleClaims, PATIENCE_MS, PAUSE_MS } from './claiming.js'
import { deleteUnlessRunning } from './deleting.js'
import { type KnownClaim, KnownClaims, leaseLeft } from './known-claims.js'
import { listBoth } from './listing.js'
import { DoubleSettlements } from './settling.js'

/** A lease that has longer to go does not lapse while a claim is completed in both stores. */
const SAFE_MS = 5_000
/** How often who waits for a key looks at what only `to` can tell of, as often as the plugin looks by itself. */
const LOOK_MS = 1_000

type Step = NonNullable<IdempotencyStore['step']>

/**
 * Moves an application from one store to another while it runs: claims, steps and records are in both, so that every key is
 * protected whoever looks into which of the two. Deploy it everywhere, leave it for as long as anything lives in `from`, and
 * deploy `to` alone: docs/moving.md has the steps. Never mix processes that use `from` alone with others that use `to` alone.
 *
 * It is as available as both stores together, and takes a trip to each for every call: in parallel to renew, to release and
 * to look, one after the other else. A replay of what `from` has is one trip.
 *
 * What holds in every mixture with one of the two alone: one owner at a time; a record counts when both have it, and what
 * anybody was shown stays; steps and `attempt` are the same in both before an owner hears of them. What cannot be: a process
 * that dies, or stands still for ten seconds, between the two halves of a completion leaves a record that only `to` has, which
 * nobody was shown. Who claims in both completes it; who claims in `from` alone, in the first deploy, may run the handler once
 * more before, as after every crash.
 *
 * To settle a key is such a completion, of what nobody is running in either: `from` is claimed, `to` gets the record in the
 * place of what was looked at there, `from` gets it last. It is settled when both have it, also where one of them knew nothing
 * of the key. Who is left in doubt, by an error, settles once more: that finishes what was begun, or says `false` and leaves
 * what others have made of it. What runs is never deleted by halves: it is claimed in the same way before. `list` shows what
 * either has, first all of `to` and then all of `from`, so most keys twice; what counts of a key is what `get` says.
 */
export class MigratingStore implements IdempotencyStore {
  // What a store need not have, this one has where both have it.
  readonly sharesLocks: boolean
  readonly step?: Step
  readonly changed?: NonNullable<IdempotencyStore['changed']>
  readonly get?: NonNullable<IdempotencyStore['get']>
  readonly delete?: NonNullable<IdempotencyStore['delete']>
  readonly list?: NonNullable<IdempotencyStore['list']>
  readonly settle?: NonNullable<IdempotencyStore['settle']>
  readonly close?: NonNullable<IdempotencyStore['close']>
  readonly #from: IdempotencyStore
  readonly #to: IdempotencyStore
  readonly #known = new KnownClaims()
  readonly #claims: DoubleClaims

  /**
   * @param from The store that is left.
   * @param to The one that comes in its place.
   * @throws FST_IDEMPOTENCY_INVALID_OPTION
   */
  constructor(from: IdempotencyStore, to: IdempotencyStore) {
    for (const [name, store] of Object.entries({ from, to })) {
      if (isStore(store)) continue
      throw new InvalidOption(`MigratingStore takes ${A_STORE} as "${name}", got ${describeStore(store)}`)
    }
    if (innermost(from).some((store) => innermost(to).includes(store))) {
      throw new InvalidOption('MigratingStore takes two stores, got the same one twice')
    }
    this.#from = from
    this.#to = to
    this.#claims = new DoubleClaims(from, to, this.#known)
    isInFrontOf(this, from, to)
    this.sharesLocks = from.sharesLocks === true || to.sharesLocks === true
    if (from.step && to.step) {
      const steps = [from.step.bind(from), to.step.bind(to)] as const
      this.step = (key, token, [name, result]) => this.#step(...steps, key, token, [name, result])
    }
    if (from.changed && to.changed) {
      const changes = [from.changed.bind(from), to.changed.bind(to)] as const
      this.changed = (key, signal) => whenChanged(...changes, key, signal)
    }
    if (has(from, 'get') && has(to, 'get')) {
      this.get = async (key) => seen(...(await Promise.all([from.get(key), to.get(key)])))
    }
    if (has(from, 'get', 'settle') && has(to, 'get', 'settle')) {
      const settlements = new DoubleSettlements(from, to)
      this.settle = (...args) => settlements.settle(...args)
    }
    if (has(from, 'delete') && has(to, 'delete')) {
      // Should who asks in between find the record of `to`, it would be put into `from` again: so `to` forgets it first.
      this.delete = async (key, unlessRunning = false) => {
        if (unlessRunning) return deleteUnlessRunning(from, to, key)
        const existed = await to.delete(key)
        return (await from.delete(key)) || existed
      }
    }
    if (from.list && to.list) {
      const lists = [from.list.bind(from), to.list.bind(to)] as const
      this.list = (kinds, cursor) => listBoth(...lists, kinds, cursor)
    }
    if (from.close || to.close) this.close = async () => void (await this.#inBoth(async (store) => store.close?.()))
  }

  async acquire(key: string, claim: Claim): Promise<Acquisition> {
    // What one store lacks is copied from the other, with what is left of it.
    return this.#claims.acquire(key, { ...claim, withTtl: true })
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    const known = this.#known.get(key, token)
    const askedAt = performance.now()
    if (!(await this.#renew(key, token, leaseMs, known))) return false
    if (known !== undefined) this.#known.add(key, { ...known.claim, leaseMs }, askedAt)
    return true
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const isDone = await this.#complete(key, token, copyOf(record), ttlMs)
    if (isDone) this.#known.delete(key, token)
    return isDone
  }

  async release(key: string, token: string, unused?: boolean): Promise<boolean> {
    const [inFrom, inTo] = await this.#inBoth((store) => store.release(key, token, unused))
    this.#known.delete(key, token)
    return inFrom && inTo
  }

  /** What both give, when both have ended: one that fails does not keep the other from being asked. */
  async #inBoth<T>(ask: (store: IdempotencyStore) => Promise<T>): Promise<readonly [inFrom: T, inTo: T]> {
    const asked = [ask(this.#from), ask(this.#to)] as const
    await Promise.allSettled(asked)
    return Promise.all(asked)
  }

  async #renew(key: string, token: string, leaseMs: number, known: KnownClaim | undefined): Promise<boolean> {
    if (leaseLeft(known) <= 0) return this.#renewInTurn(key, token, leaseMs)
    const [inFrom, inTo] = await this.#inBoth((store) => store.renew(key, token, leaseMs))
    // What is completed in `to` is no claim there any more, and needs the one in `from` until it is there as well.
    if (inFrom === inTo || known?.isCompleting) return inFrom
    return this.#claims.mend(key, token, inFrom ? this.#to : this.#from)
  }

  /** What may have lapsed is `from`'s to decide: renewed in `to` at once, it would stand in the way of who takes it over. */
  async #renewInTurn(key: string, token: string, leaseMs: number): Promise<boolean> {
    if (!(await this.#from.renew(key, token, leaseMs))) return false
    if ((await this.#to.renew(key, token, leaseMs)) || this.#known.get(key, token)?.isCompleting) return true
    await this.#from.release(key, token)
    return false
  }

  /**
   * `to` first, `from` last: who claims in both asks `from` first, so that nobody is shown a record which `to` does not have,
   * and who only knows `to` has it as soon as anybody. In between the claim in `from` keeps all others out: its lease must not
   * lapse there.
   */
  async #complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const known = this.#known.get(key, token)
    const completeIn = (store: IdempotencyStore) => store.complete(key, token, record, ttlMs)
    if (leaseLeft(known) < SAFE_MS && !(await this.#secure(key, token))) {
      // It may have been completed before.
      if (await completeIn(this.#from)) return true
      if (known?.isCompleting) return this.#finish(key, token, record, ttlMs)
      if (!(await this.#claims.mend(key, token, this.#from))) return false
    }
    this.#isCompleting(key, token, true)
    const isInTo = await completeIn(this.#to)
    if (!isInTo && !((await this.#claims.mend(key, token, this.#to)) && (await completeIn(this.#to)))) {
      this.#isCompleting(key, token, false)
      // Others must not wait for what is left of a claim that is lost.
      await this.#from.release(key, token)
      return false
    }
    return (await completeIn(this.#from)) || this.#finish(key, token, record, ttlMs)
  }

  #isCompleting(key: string, token: string, is: boolean): void {
    const known = this.#known.get(key, token)
    if (known !== undefined) known.isCompleting = is
  }

  /** Makes sure that the claim in `from` outlasts what is to come. */
  async #secure(key: string, token: string): Promise<boolean> {
    const known = this.#known.get(key, token)
    const askedAt = performance.now()
    if (!(await this.#from.renew(key, token, COMPLETION_MS))) return false
    if (known !== undefined) Object.assign(known, { leasedAt: askedAt, leaseMs: COMPLETION_MS })
    return true
  }

  /**
   * `to` has the record, and the claim in `from` is gone all the same: it lost its data, or this process stood still. True if
   * the record is there in the end. Who has taken over meanwhile, and claims in both, is about to put it there.
   */
  async #finish(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const { fingerprint } = record
    const claim = { token, fingerprint, leaseMs: COMPLETION_MS, retainMs: COMPLETION_MS, takeover: false }
    for (const until = performance.now() + PATIENCE_MS; ; await sleep(PAUSE_MS)) {
      const found = await this.#from.acquire(key, claim)
      if (found.state === 'completed') return isDeepStrictEqual(found.record, record)
      if (found.state === 'acquired' && (await this.#from.complete(key, token, record, ttlMs))) return true
      if (found.state === 'abandoned' || performance.now() > until) return false
    }
  }

  /** `from` first: who takes over there gets it by that. A later step of the same name in `to` alone counts more. */
  async #step(inFrom: Step, inTo: Step, key: string, token: string, done: StoredStep): Promise<boolean> {
    const isInFrom = await inFrom(key, token, done)
    if (!isInFrom && !((await this.#claims.mend(key, token, this.#from)) && (await inFrom(key, token, done))))
      return false
    if (await inTo(key, token, done)) return true
    if (leaseLeft(this.#known.get(key, token)) > 0) {
      return (await this.#claims.mend(key, token, this.#to)) && inTo(key, token, done)
    }
    return this.#hasPassedOn(inFrom, key, token, done)
  }

  /** `from` has the step of a claim that had lapsed: true if who has taken it over since has got the step with it. */
  async #hasPassedOn(inFrom: Step, key: string, token: string, done: StoredStep): Promise<boolean> {
    const look = { token: randomUUID(), fingerprint: '', leaseMs: COMPLETION_MS, retainMs: 0, takeover: false }
    for (const until = performance.now() + PATIENCE_MS; ; await sleep(PAUSE_MS)) {
      // Still ours there: then it was taken over in `to` alone.
      if (await inFrom(key, token, done)) return false
      const found = await this.#to.acquire(key, look)
      const steps = found.state === 'completed' ? [] : (found.steps ?? [])
      if (steps.some((step) => isDeepStrictEqual(step, done))) return true
      if (found.state === 'acquired') await this.#to.release(key, look.token, true)
      if (found.state !== 'running' || performance.now() > until) return false
    }
  }
}

function has<M extends keyof IdempotencyStore>(
  store: IdempotencyStore,
  ...methods: M[]
): store is IdempotencyStore & Required<Pick<IdempotencyStore, M>> {
  return methods.every((method) => store[method] !== undefined)
}

/**
 * Waits for `from` first, because for as long as a claim runs there it is what `acquire` says; then for `to`, where there may
 * be one of a process that only knows `to`. That one may also be what is left of a process that died, of whose end nobody tells.
 */
async function whenChanged(
  inFrom: NonNullable<IdempotencyStore['changed']>,
  inTo: NonNullable<IdempotencyStore['changed']>,
  key: string,
  signal: AbortSignal
): Promise<void> {
  const over = new AbortController()
  const stop = () => over.abort()
  signal.addEventListener('abort', stop)
  if (signal.aborted) stop()
  try {
    const changedInTo = inTo(key, over.signal)
    changedInTo.catch(() => {})
    await inFrom(key, over.signal)
    await Promise.race([changedInTo, pause(over.signal)])
  } finally {
    signal.removeEventListener('abort', stop)
    stop()
  }
}

function pause(signal: AbortSignal): Promise<void> {
  return sleep(LOOK_MS, undefined, { signal, ref: false }).catch(() => {})
}
