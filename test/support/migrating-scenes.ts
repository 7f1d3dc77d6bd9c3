import { isDeepStrictEqual } from 'node:util'
import { MigratingStore } from '../../index.js'
import type { Acquisition, IdempotencyStore, StoredRecord, StoredStep } from '../../types/index.js'
import { ModelData, ModelStore } from './model-store.js'
import { Life, mortal } from './mortal-store.js'
import { claim, newKey, reply } from './store-fixtures.js'

/*
 * A process dies at each call that it makes to its two stores. Others go on, of all kinds that a deploy has beside it, in
 * whatever order; and what anybody was told before has to stay true.
 */

type Store = IdempotencyStore & Required<Pick<IdempotencyStore, 'step' | 'get' | 'settle'>>
export type Pair = Record<'from' | 'to', Store>
/** What is wrong with the way in which a process uses its two stores. */
export type Sabotage = (pair: Pair) => Pair

export const LEASE_MS = 60_000

/** A store whose clock can be put forward. */
class TimedStore extends ModelStore {
  constructor(
    private readonly clock: { ahead: number },
    data = new ModelData()
  ) {
    super(data)
  }
  protected override now() {
    return performance.now() + this.clock.ahead
  }
}

/** What was told of the key, to anybody, and what was broken of it later. */
class Told {
  attempt = 0
  record: StoredRecord | null = null
  owner: string | null = null
  readonly steps = new Map<string, string>()
  readonly broken: string[] = []

  answer(who: string, token: string, found: Acquisition): void {
    if (found.state === 'completed') {
      this.record ??= found.record
      if (!isDeepStrictEqual(this.record, found.record)) this.broken.push(`${who} was shown another record`)
      return
    }
    if (this.record !== null && found.state !== 'running')
      this.broken.push(`${who} found a finished key ${found.state}`)
    if (found.state !== 'acquired') return
    if (this.owner !== null && this.owner !== token) this.broken.push(`${who} owns the key beside another`)
    if (this.owner !== token && found.attempt <= this.attempt) {
      this.broken.push(`${who} was given attempt ${found.attempt} after ${this.attempt}`)
    }
    const steps = new Map(found.steps)
    for (const [name, result] of this.steps) {
      if (steps.get(name) !== result)
        this.broken.push(`${who} was given ${steps.get(name)} for a step that was ${result}`)
    }
    for (const [name, result] of steps) this.steps.set(name, result)
    this.owner = token
    this.attempt = found.attempt
  }
}

/** A key in two stores, and the processes that ask for it. */
export class Scene {
  readonly key = newKey()
  readonly told = new Told()
  readonly #clock = { ahead: 0 }
  readonly #pair: Pair = { from: new TimedStore(this.#clock), to: new TimedStore(this.#clock) }
  readonly #sabotage: Sabotage
  #tokens = 0

  constructor(sabotage: Sabotage) {
    this.#sabotage = sabotage
  }

  /** All leases lapse, and nothing is forgotten yet. */
  lapse(): void {
    this.#clock.ahead += 2 * LEASE_MS
    this.told.owner = null
  }

  process(who: Who, life = new Life(Number.POSITIVE_INFINITY)): Process {
    const store = who === 'both' ? this.#moving(life) : this.#pair[who]
    return new Process(who, store, this.key, this.told, `${who} ${++this.#tokens}`)
  }

  #moving(life: Life): Store {
    const { from, to } = this.#sabotage({ from: mortal(this.#pair.from, life), to: mortal(this.#pair.to, life) })
    return new MigratingStore(from, to) as MigratingStore & Store
  }
}

export type Who = 'from' | 'to' | 'both'

export class Process {
  constructor(
    private readonly who: Who,
    private readonly store: Store,
    private readonly key: string,
    private readonly told: Told,
    readonly token: string
  ) {}

  async acquire(takeover = true): Promise<Acquisition['state']> {
    const { token, key } = this
    const asked = claim({ token, fingerprint: token, leaseMs: LEASE_MS, retainMs: 1_000 * LEASE_MS, takeover })
    const found = await this.store.acquire(key, asked)
    this.told.answer(this.who, token, found)
    return found.state
  }

  async renew(): Promise<void> {
    if (await this.store.renew(this.key, this.token, LEASE_MS)) this.#mustOwn('renew')
  }

  async step(name: string): Promise<void> {
    const step: StoredStep = [name, `${name} by ${this.token}`]
    if (!(await this.store.step(this.key, this.token, step))) return
    this.#mustOwn('keep a step')
    if (!this.told.steps.has(name)) this.told.steps.set(...(step as [string, string]))
  }

  async complete(): Promise<void> {
    const record = reply({ fingerprint: this.token })
    if (!(await this.store.complete(this.key, this.token, record, null))) return
    this.#mustOwn('complete')
    this.told.record ??= record
    this.told.owner = null
  }

  /** Somebody has found out what became of it. */
  async settle(): Promise<void> {
    const found = await this.store.get(this.key)
    if (found?.state !== 'abandoned') return
    const record = reply({ fingerprint: this.token })
    if (!(await this.store.settle(this.key, found.fingerprint, { record, ttlMs: null }))) return
    this.#mustOwn('settle')
    this.told.record ??= record
  }

  async release(unused = false): Promise<void> {
    const { told, token } = this
    // Who has begun to give a key away does not own it any more, and a first attempt is as if it had never been.
    if (told.owner === token) {
      told.owner = null
      if (told.attempt === 1 && told.steps.size === 0) told.attempt = 0
      else if (unused && told.attempt > 1) told.attempt--
    }
    await this.store.release(this.key, token, unused)
  }

  #mustOwn(what: string): void {
    const { owner, broken } = this.told
    if (owner !== null && owner !== this.token) broken.push(`${this.who} could ${what} beside another`)
  }
}

/** What there is of a key before the process comes that dies. */
const befores: Record<string, (scene: Scene, who: Who) => Promise<void>> = {
  'a free key': async () => {},
  'what was abandoned': async (scene, who) => {
    await scene.process(who).acquire()
    scene.lapse()
  },
  'what was abandoned twice, with a step': async (scene, who) => {
    for (let attempt = 1; attempt <= 2; attempt++) {
      const dead = scene.process(who)
      await dead.acquire()
      await dead.step(`step ${attempt}`)
      scene.lapse()
    }
  },
  'what was given back with a step': async (scene, who) => {
    const former = scene.process(who)
    await former.acquire()
    await former.step('step 1')
    await former.release()
  },
  'what is finished': async (scene, who) => {
    const former = scene.process(who)
    await former.acquire()
    await former.complete()
  },
  'what runs': async (scene, who) => {
    await scene.process(who).acquire()
  }
}

type Deed = (process: Process, scene: Scene) => Promise<void>

/** What is done by who has the key. */
function owning(deed: Deed): Deed {
  return async (process, scene) => {
    if ((await process.acquire()) === 'acquired') await deed(process, scene)
  }
}

/** What the process is about to do when it dies. */
const deeds: Record<string, Deed> = {
  acquires: owning(async () => {}),
  renews: owning((process) => process.renew()),
  'keeps a step': owning((process) => process.step('of the dead')),
  completes: owning((process) => process.complete()),
  'completes what has lapsed': owning((process, scene) => {
    scene.lapse()
    return process.complete()
  }),
  'gives back': owning((process) => process.release()),
  'gives back unused': owning((process) => process.release(true)),
  settles: (process) => process.settle()
}

/** What is asked of both stores at the same time. */
const PARALLEL = ['renews', 'gives back', 'gives back unused']

/** What the others do, one after the other. */
const afters: Record<string, (process: Process) => Promise<void>> = {
  complete: (process) => process.complete(),
  'keep a step and give back': async (process) => {
    await process.step('of the living')
    await process.release()
  },
  'give back unused': (process) => process.release(true)
}

/** Whom a deploy has at the same time as those that move. */
export const PHASES: Record<string, Who[]> = {
  'the first deploy': ['from', 'both'],
  'the second deploy': ['both', 'to']
}

/**
 * Lets a process die wherever it can, and gives what was broken then, and how many deaths there were. With a sabotage it
 * ends with the first thing that was broken.
 */
export async function allDeaths(phase: Who[], sabotage?: Sabotage): Promise<{ broken: string[]; deaths: number }> {
  const broken: string[] = []
  let deaths = 0
  const die = async (before: string, who: Who, deed: string, after: string, order: Who[], life: Life) => {
    const scene = new Scene(sabotage ?? ((pair) => pair))
    await befores[before]?.(scene, who)
    const dying = scene.process('both', life)
    await Promise.race([deeds[deed]?.(dying, scene), settled(life)])
    if (life.isOver) deaths++
    await goOn(scene, order, after)
    const where = `${before} of ${who}: who ${deed} dies; then ${order} ${after}`
    broken.push(...scene.told.broken.map((what) => `${what} (${where})`))
    return life.isOver && (sabotage === undefined || broken.length === 0)
  }
  const dieEverywhere = async (before: string, who: Who, deed: string, after: string, order: Who[]) => {
    for (const isLost of PARALLEL.includes(deed) ? [false, true] : [false]) {
      for (let calls = 0; await die(before, who, deed, after, order, new Life(calls, isLost)); calls++) {}
    }
  }
  const orders = [phase, phase.toReversed()]
  for (const before of Object.keys(befores)) {
    for (const who of phase) {
      for (const deed of Object.keys(deeds)) {
        if (sabotage !== undefined && broken.length > 0) return { broken, deaths }
        // Each has a key and stores of its own, and mostly waits.
        const all = Object.keys(afters).flatMap((after) =>
          orders.map((order) => dieEverywhere(before, who, deed, after, order))
        )
        await Promise.all(all)
      }
    }
  }
  return { broken, deaths }
}

/** The others ask at once, when the lease of the dead is over, and again after each of them. */
async function goOn(scene: Scene, order: Who[], after: string): Promise<void> {
  for (const who of order) {
    const early = scene.process(who)
    if ((await early.acquire()) === 'acquired') await early.release(true)
  }
  scene.lapse()
  for (let round = 0; round < 2; round++) {
    for (const who of order) {
      await scene.process(who).acquire(false)
      const next = scene.process(who)
      if ((await next.acquire()) !== 'acquired') continue
      for (const other of order) await scene.process(other).acquire()
      await afters[after]?.(next)
    }
  }
}

/** Resolves when a process has died, or has nothing more to do. */
async function settled(life: Life): Promise<void> {
  for (let quiet = 0; quiet < 20 || !life.isOver; quiet++) {
    await new Promise<void>((resolve) => setImmediate(resolve))
    if (quiet > 10_000) throw new Error('The process neither ended nor died')
  }
}
