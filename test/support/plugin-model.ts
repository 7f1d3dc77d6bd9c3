import { storageKey } from '../../lib/operation/storage-key.js'
import type { Acquisition } from '../../types/index.js'
import type { Absence, Exchange, History, Rules, Run } from './http-history.js'
import { isExpired, type Row } from './plugin-database.js'
import { agrees, doubted, joined, type Known, NONE, seen, without, withStep } from './plugin-known-steps.js'
import {
  type Answer,
  type Asked,
  type Call,
  type End,
  isTransactional,
  LATE,
  type Process,
  type Route,
  type Running,
  resultOf,
  SHORT_TTL,
  STORE_TIMEOUT,
  type StepEnd,
  type StepFault,
  type Stepping,
  saying,
  TTL,
  type Witness,
  type World
} from './plugin-world.js'

// What the plugin has to do, as a model: of every key it keeps the states in which the store may be, which are several
// where nobody outside can know, and strikes out those that do not agree with what is seen. When none is left, what
// was seen must not happen.

/** The longest time until something is repeated that failed, or looked at again. */
const LAG = 1_300
/** The longest time until somebody looks who is told of a change. */
const SHORT_LAG = 50

type Entry =
  | { is: 'free' }
  | {
      is: 'claim'
      run: string
      route: Route
      payload: string
      attempt: number
      /** The lease ends at some time from the one to the other. */
      from: number
      to: number
      /** What the store has of its steps. */
      steps: Known
    }
  /**
   * A later attempt was given back, or one with steps (`ended`), or one that never ran: what it was for is remembered
   * until some time from the one to the other.
   */
  | {
      is: 'ended'
      route: Route
      payload: string
      attempt: number
      ended: boolean
      from: number
      to: number
      steps: Known
    }
  /**
   * A claim that nobody knows of, because the answer got lost: its process gives it back as soon as it can, and what
   * was there before is there again.
   */
  | { is: 'ghost'; process: string; route: Route; attempt: number; since: number; to: number; found: Ended | null }
  | { is: 'done'; run: string; route: Route; payload: string; from: number; to: number }

type Claimed = Extract<Entry, { is: 'claim' }>
type Ended = Extract<Entry, { is: 'ended' }>

/** The longest step in which time passes without a look at the model. */
export const STEP = 1_000

/** What the store may look like, as far as one key is concerned. */
interface State {
  entry: Entry
  /** Runs that believe to own the key, but do not, and since when. */
  beaten: Record<string, number>
  /** What runs know of the steps of their operations, and whether their lease has lapsed, so that another could have it. */
  minds: Record<string, Mind>
}

interface Mind {
  steps: Known
  lapsed: boolean
}

interface RunInfo {
  run: Running
  /** What its process still tries to do. */
  intent: 'complete' | 'release' | null
  /** Has it failed to do so, and may still fail? */
  tries: boolean
}

interface ProcessInfo {
  healthy: boolean
  since: number
  /**
   * Replies that could not be stored, and those that may have been in the meantime. `forgotten`: the key was deleted
   * elsewhere, which the process need not know.
   */
  unstored: Map<string, { run: string; sure: boolean; forgotten: boolean }>
  /** It may have renewed what it does not know to be renewed. */
  doubts: boolean
  /** When a call has failed last that has to do with steps; later, while one is on its way. */
  failedAt: number
  /** Until then it may wait for an answer, or think that the store is down. */
  silentUntil: number
}

/** What is known of a step that a run is at. */
interface StepInfo {
  /** A call to the store has failed meanwhile. */
  failed: boolean
  /** It need not be stored yet. */
  doubtful: boolean
  /** It may have been known that an earlier attempt has come to it. */
  known: boolean
  committed: boolean
}

/** A step that was committed in a transaction. */
interface Committed {
  run: Running
  row: Row
}

/** What may have become of a state. */
type After = (state: State) => State[]

type Verdict = { is: string; state: State }

const FREE: State = { entry: { is: 'free' }, beaten: {}, minds: {} }
const FINAL: readonly End[] = ['reply', 'refuse', 'stream', 'broken stream', 'too large', 'hijack']
const REPLAYABLE: readonly End[] = ['reply', 'refuse', 'stream']

const IN_PROGRESS = '409 FST_IDEMPOTENCY_IN_PROGRESS'
const NOT_REPLAYABLE = '409 FST_IDEMPOTENCY_NOT_REPLAYABLE'
const REUSED = '422 FST_IDEMPOTENCY_KEY_REUSED'
const UNAVAILABLE = '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE'
/** Who has done a step in a transaction: the store does not know. */
const SOMEBODY = 'somebody'

/** What was seen must not happen. */
export class Wrong extends Error {
  override name = 'Wrong'
}

export class PluginModel implements Witness {
  world!: World
  readonly asked: Asked[] = []
  readonly log: string[] = []
  readonly #states = new Map<string, State[]>()
  readonly #changedAt = new Map<string, number>()
  readonly #runs = new Map<string, RunInfo>()
  readonly #processes = new Map<Process, ProcessInfo>()
  /** Requests that may fail, because an answer of the store was lost to their process. */
  readonly #mayFail = new Set<Asked>()
  readonly #wrong: string[] = []
  readonly #exchanges = new Map<Asked, Exchange>()
  readonly #seenRuns = new Map<string, Run>()
  readonly #absences: Absence[] = []
  readonly #steps = new Map<Stepping, StepInfo>()
  readonly #committed = new Map<string, Committed>()
  /** How often a key was forgotten on purpose. */
  readonly #lives = new Map<string, number>()
  /** Lives of keys of which the judge cannot know enough. */
  readonly #excepted = new Set<string>()
  #ticks = 0

  // What happens to the world.

  sent(asked: Asked): void {
    asked.sent = this.#now
    this.asked.push(asked)
    const { key, payload, route, process } = asked
    // What a route does is part of what is asked for.
    const exchange = {
      key: this.#life(key),
      payload: payload + route,
      sent: this.#tick(),
      got: null,
      worker: process.name
    }
    this.#exchanges.set(asked, exchange)
    this.#say(`${asked.id} ${asked.key} ${asked.payload} ${asked.route} to ${asked.process.name}`)
  }

  /** The handler is about to end so. */
  ends(run: Running, how: End): void {
    const { process, key } = run.asked
    const info = this.#runs.get(run.id) as RunInfo
    this.#say(`${run.id} ends: ${how}`)
    run.ended = how
    const { text } = saying(how, run.id)
    const seen = this.#seenRuns.get(run.id) as Run
    Object.assign(seen, { ended: this.#tick(), final: FINAL.includes(how), text })
    this.#sameLife(seen.key, key)
    const call = FINAL.includes(how) ? 'complete' : 'release'
    const states = this.#of(key)
    const isFree = (state: State) => run.id in state.beaten && state.entry.is === 'free'
    const claims = process.losing.has('acquire') && call === 'complete' && states.some(isFree)
    // A release is behind the steps that the store does not have yet.
    const waits = process.stepFault !== null && call === 'release' && this.#now <= this.#info(process).failedAt + LAG
    info.intent = call
    info.tries = process.cut || claims || waits || process.losing.has(call)
    // What is said and not stored yet is more than one can see from outside.
    if (info.tries) this.#except(run)
    if (!info.tries) {
      this.#put(
        key,
        states.flatMap((state) => this.#after(state, run.id))
      )
      return
    }
    const own = this.#info(process)
    own.since = this.#now
    if (call === 'complete' && states.some((state) => knows(state, run.id))) {
      const sure = process.cut && states.every((state) => owner(state) === run.id)
      own.unstored.set(key, { run: run.id, sure, forgotten: states.some((state) => run.id in state.beaten) })
    }
    if (process.cut) return
    // The store may have done it, only nobody knows.
    const { route, payload } = run.asked
    const anew: Entry = {
      is: 'claim',
      run: run.id,
      route,
      payload,
      attempt: 1,
      from: Infinity,
      to: Infinity,
      steps: NONE
    }
    this.#put(
      key,
      states.flatMap((state) => {
        if (owner(state) === run.id)
          return process.losing.has(call) ? this.#after(state, run.id) : [...this.#after(state, run.id), state]
        return isFree(state) && claims ? [state, { ...state, entry: anew }] : [state]
      })
    )
  }

  died(process: Process): void {
    this.#say(`${process.name} dies`)
    this.#away(process)
    this.#weaken(process)
    this.#info(process).unstored.clear()
    for (const [key, states] of this.#states) {
      this.#put(
        key,
        states.map((state) => this.#without(state, process))
      )
    }
  }

  /** The process is stopped, or cannot reach the store, or both. */
  weakened(process: Process): void {
    this.#say(`${process.name} is ${process.stopped ? 'stopped' : 'cut off'}`)
    this.#away(process)
    this.#weaken(process)
  }

  recovered(process: Process): void {
    this.#say(`${process.name} is ${process.stopped ? 'stopped' : process.cut ? 'cut off' : 'well again'}`)
    const info = this.#info(process)
    info.healthy = !process.stopped && !process.cut
    info.since = this.#now
    if (!info.healthy) return
    for (const reply of info.unstored.values()) reply.sure = false
    // Until it has renewed its claims.
    for (const absence of this.#absences) {
      if (absence.worker === process.name) absence.to = Math.min(absence.to, this.#now + process.lease / 3 + LAG)
    }
    for (const [key, states] of this.#states) {
      this.#put(
        key,
        states.map((state) => {
          const beaten = { ...state.beaten }
          for (const run of Object.keys(beaten)) if (this.#processOf(run) === process) beaten[run] = -1
          if (state.entry.is !== 'claim' || this.#processOf(state.entry.run) !== process) return { ...state, beaten }
          return { ...state, entry: { ...state.entry, to: Infinity }, beaten }
        })
      )
    }
  }

  /** A key was deleted by a process, or the store has lost it, if it was there. */
  deleted(process: Process | null, key: string, existed: boolean | null): void {
    this.#say(process === null ? `${key} is lost` : `${process.name} deletes ${key}: ${existed}`)
    this.#lives.set(key, (this.#lives.get(key) ?? 0) + 1)
    if (process !== null) this.#info(process).unstored.delete(key)
    for (const { unstored } of this.#processes.values()) {
      const reply = unstored.get(key)
      if (reply !== undefined) reply.forgotten = true
    }
    const next: State[] = []
    for (const state of this.#of(key)) {
      if (existed !== null && (state.entry.is !== 'free') !== existed) continue
      const own = this.#mayStillStore(state, key)
      const beaten = { ...state.beaten }
      // An owner in the process itself is told.
      if (own !== null && this.#processOf(own) !== process && !this.#processOf(own).dead) beaten[own] = this.#now
      const free: State = { ...state, entry: { is: 'free' }, beaten }
      next.push(free)
      // So is a run that does not know yet that it is none.
      if (process !== null) next.push(this.#without(free, process))
    }
    this.#put(key, next)
    if (next.length === 0) this.#fail(`delete of ${key} was ${existed}`)
  }

  /** Who may claim a deleted key anew: its owner, or who does not know yet that its reply was stored. */
  #mayStillStore(state: State, key: string): string | null {
    const { entry } = state
    if (entry.is !== 'done') return owner(state)
    const { run } = this.#runs.get(entry.run) as RunInfo
    return this.#info(run.asked.process).unstored.get(key)?.run === entry.run ? entry.run : null
  }

  // What is seen.

  started(run: Running): void {
    const { asked, attempt, id } = run
    this.#say(`${id} starts for ${asked.id}, attempt ${attempt}`)
    if (asked.gone) this.#fail(`${id} runs for a client that has left`)
    this.#seen(asked, `run ${attempt}`)
    const { process, key, payload, route } = asked
    const life = this.#life(key)
    this.#sameLife((this.#exchanges.get(asked) as Exchange).key, key)
    const started = this.#tick()
    this.#seenRuns.set(id, {
      id,
      key: life,
      payload: payload + route,
      worker: process.name,
      attempt,
      started,
      ended: null
    })
    this.#runs.set(id, { run, intent: null, tries: false })
  }

  answered(asked: Asked, answer: Answer): void {
    const { status, code, text, replayed } = answer
    const what = code ?? `${text}${replayed ? ' (replayed)' : ''}`
    this.#say(`${asked.id} gets ${status} ${what}`)
    const exchange = this.#exchanges.get(asked) as Exchange
    Object.assign(exchange, { got: this.#tick(), status, code, text, replayed })
    this.#sameLife(exchange.key, asked.key)
    // A process may still have what was forgotten elsewhere, or be at work on it.
    for (const { run } of this.#runs.values()) {
      const { key: life, text: said } = this.#seenRuns.get(run.id) as Run
      if (run.asked.key === asked.key && (run.ended === null || said === text)) this.#sameLife(life, asked.key)
    }
    if (asked.run !== null) {
      const { ended, id } = asked.run
      if (ended === null) {
        this.#fail(`${asked.id} is answered before its run has ended`)
        return
      }
      const expected = saying(ended, id)
      if (status !== expected.status || text !== expected.text || replayed || code !== undefined) {
        this.#fail(`${asked.id} gets another reply than that of its run`)
      }
      return
    }
    this.#seen(asked, code === undefined ? `${status} ${what}` : `${status} ${code}`)
  }

  /** A run is about to do something in a step. */
  steps(run: Running, name: string, how: StepEnd): void {
    this.#say(`${run.id} comes to step ${name}: ${how}`)
  }

  worked(run: Running, step: Stepping): void {
    const { name, knew } = step
    const { key, process } = run.asked
    this.#say(`${run.id} does ${name}`)
    if (knew) this.#fail(`${run.id} does ${name}, and knows that it has lost its key`)
    const inTransaction = isTransactional(name)
    if (inTransaction && this.#committedOf(key, name) !== null) this.#fail(`${run.id} does ${name} again`)
    this.#stepInfo(step).known = this.#of(key).some((state) => mindOf(state, run.id).steps[name] !== undefined)
    this.#keep(key, `${run.id} does ${name}`, (state) => {
      const { steps, lapsed } = mindOf(state, run.id)
      const before = steps[name]
      const isOwner = owner(state) === run.id
      // It has asked whether the key is still its own.
      const mayBegin = !lapsed && !(isOwner && process.cut && this.#now > (state.entry as Claimed).to)
      if (!inTransaction && (before?.sure || !mayBegin)) return []
      if (before?.sure) return [state]
      // It may be stored before anybody knows.
      const begun = (known: Known) => withStep(known, name, inTransaction ? SOMEBODY : run.id, false)
      return [this.#minding(state, run.id, begun(steps), begun)]
    })
  }

  committed(run: Running, name: string, row: Row): void {
    const { key } = run.asked
    this.#say(`${run.id} commits ${name}`)
    if (this.#committedOf(key, name) !== null) this.#fail(`${run.id} commits ${name} again`)
    this.#committed.set(`${key} ${name}`, { run, row })
    for (const step of run.steps) if (step.name === name) this.#stepInfo(step).committed = true
  }

  stepFails(process: Process, stored: string, name: string, how: StepFault): void {
    this.#say(`the store of ${process.name} ${how}: step ${name}`)
    const info = this.#info(process)
    const isLate = how === 'late' || how === 'answer late'
    info.failedAt = Math.max(info.failedAt, this.#now + (isLate ? LATE : 0))
    if (isLate) info.silentUntil = this.#now + STORE_TIMEOUT + LAG
    this.#failsAt(process, stored, (step, info) => {
      if (step.name === name && (how === 'fails' || how === 'late')) info.doubtful = true
    })
  }

  stepped(run: Running, step: Stepping, result: string | Error): void {
    const { code, message } = result as { code?: string; message?: string }
    const what = `${run.id}: ${step.name} ${typeof result === 'string' ? 'gives' : 'fails:'} ${code ?? message ?? result}`
    this.#say(what)
    const after =
      typeof result === 'string' ? this.#afterResult(run, step, result) : this.#afterFailure(run, step, code)
    this.#steps.delete(step)
    if (after === null) this.#fail(what)
    else this.#keep(run.asked.key, what, after)
  }

  /** What may be then; `null` for nothing. */
  #afterResult(run: Running, step: Stepping, result: string): After | null {
    const { process, key } = run.asked
    const { name, worked, how, knew } = step
    const { failed, doubtful, known, committed } = this.#stepInfo(step)
    const inTransaction = isTransactional(name)
    if (knew) return null
    if (worked) {
      if (result !== resultOf(name, run.id) || how === 'failed' || committed !== inTransaction) return null
      const of = inTransaction ? SOMEBODY : run.id
      return (state) => {
        const { steps, lapsed } = mindOf(state, run.id)
        const isStored = (kept: Known) => withStep(kept, name, of, !doubtful && !process.cut)
        const own = this.#minding(state, run.id, withStep(steps, name, of, true), isStored)
        if (owner(state) === run.id) return [own]
        const anew = run.id in state.beaten && state.entry.is === 'free' ? this.#after(own, run.id) : []
        // Where an earlier attempt has come to it, it is enough that the lease has not lapsed.
        return failed || process.cut || (known && inTransaction && !lapsed) ? [own, ...anew] : anew
      }
    }
    if (inTransaction) {
      const before = this.#committedOf(key, name)
      const isRight = before !== null && isSame(before.run, run) && result === resultOf(name, before.run.id)
      return isRight ? (state) => [state] : null
    }
    return (state) => {
      const { steps } = mindOf(state, run.id)
      const of = steps[name]?.of
      if (of === undefined || result !== resultOf(name, of)) return []
      const isThere = (known: Known) => withStep(known, name, of, true)
      return [this.#minding(state, run.id, isThere(steps), isThere)]
    }
  }

  #afterFailure(run: Running, step: Stepping, code: string | undefined): After | null {
    const { process, key } = run.asked
    const { name, worked, how } = step
    const { failed, known, committed } = this.#stepInfo(step)
    const inTransaction = isTransactional(name)
    if (committed) return null
    switch (code) {
      case 'FST_IDEMPOTENCY_CLAIM_LOST':
        return (state) => {
          if (owner(state) === run.id || (state.entry.is === 'free' && run.id in state.beaten)) return []
          const { [run.id]: _, ...beaten } = state.beaten
          return [{ ...state, beaten }]
        }
      case 'FST_IDEMPOTENCY_STORE_UNAVAILABLE': {
        if (!(failed || process.cut) || (worked && !inTransaction)) return null
        const isLeased = (state: State) => owner(state) === run.id && this.#now < (state.entry as Claimed).from
        return (state) => (isLeased(state) ? [] : [state])
      }
      case 'FST_IDEMPOTENCY_KEY_REUSED': {
        const before = this.#committedOf(key, name)
        return inTransaction && !worked && before !== null && !isSame(before.run, run) ? (state) => [state] : null
      }
      default: {
        if (code !== undefined || how !== 'failed' || !worked) return null
        const isUndone = (steps: Known) => (known ? steps : without(steps, name))
        return (state) => [this.#minding(state, run.id, isUndone(mindOf(state, run.id).steps), isUndone)]
      }
    }
  }

  /** A process was asked for what is known of a key. */
  looked(key: string, found: Acquisition | null): void {
    const steps = found === null || found.state === 'completed' ? undefined : found.steps
    const results = new Map(
      (steps ?? []).map(([name, result]) => [name, isTransactional(name) ? SOMEBODY : doerOf(JSON.parse(result))])
    )
    const ended = found?.state === 'abandoned' && found.ended === true
    const attempt = found?.state === 'abandoned' ? found.attempt : 0
    const is = found === null ? 'free' : `${found.state}${ended ? ' and ended' : ''}`
    const what = `${key} is ${is} ${attempt || ''} ${[...results].join(' ')}`
    this.#say(what)
    this.#keep(key, what, (state) => {
      const { entry } = state
      switch (entry.is) {
        case 'free':
          return found === null ? [state] : []
        case 'done':
          return found?.state === 'completed' ? [state] : []
        case 'ghost': {
          const isSeen = found?.state === 'running' || found?.state === 'abandoned'
          return isSeen && agrees(entry.found?.steps ?? NONE, results) ? [state] : []
        }
        case 'ended': {
          const isSeen = found?.state === 'abandoned' && attempt === entry.attempt && ended === entry.ended
          return isSeen && agrees(entry.steps, results)
            ? [{ ...state, entry: { ...entry, steps: seen(entry.steps, results) } }]
            : []
        }
        case 'claim': {
          const isSeen =
            (found?.state === 'running' && this.#now < entry.to) ||
            (found?.state === 'abandoned' && this.#now >= entry.from && attempt === entry.attempt && !ended)
          return isSeen && agrees(entry.steps, results)
            ? [{ ...state, entry: { ...entry, steps: seen(entry.steps, results) } }]
            : []
        }
      }
    })
  }

  lost(process: Process, call: Call, stored: string, takeover: boolean): void {
    this.#say(`an answer is lost to ${process.name}: ${call}`)
    const info = this.#info(process)
    info.doubts = true
    info.failedAt = Math.max(info.failedAt, this.#now)
    this.#failsAt(process, stored)
    for (const asked of process.asked) {
      if (asked.answer !== null || asked.run !== null || storageKey(null, asked.key) !== stored) continue
      // Who asks for a reply that has not been stored yet stores it first, and may have no answer.
      if (call === 'acquire' || call === 'complete') this.#mayFail.add(asked)
      if (call !== 'acquire') continue
      const ghost = (found: Ended | null): Entry => {
        const since = this.#now
        const attempt = (found?.attempt ?? 0) + 1
        return {
          is: 'ghost',
          process: process.name,
          route: asked.route,
          attempt,
          since,
          to: since + process.lease,
          found
        }
      }
      this.#put(
        asked.key,
        this.#of(asked.key).flatMap((state) => {
          const { entry } = state
          if (entry.is === 'free') return [state, this.#beat(state, ghost(null))]
          const mayBeTaken = entry.is === 'ended' || (entry.is === 'claim' && this.#now >= entry.from)
          if (!mayBeTaken || !takeover) return [state]
          const found = entry.is === 'ended' ? entry : this.#ended(entry, false)
          return [state, this.#beat(state, ghost(found)), this.#beat(state, found)]
        })
      )
    }
  }

  /** Nothing moves any more without the passing of time: who must have been answered by now? */
  check(): void {
    for (const key of this.#states.keys()) this.#of(key)
    for (const asked of this.asked) {
      const { process, answer, run, gone } = asked
      if (answer !== null || gone || process.stopped || this.#isSilent(process)) continue
      if (run !== null) {
        if (run.ended !== null) this.#fail(`${asked.id} has no answer after its run has ended`)
        continue
      }
      if (!this.#mayWait(asked)) this.#fail(`${asked.id} has no answer`)
    }
    for (const { run } of this.#runs.values()) {
      const { process, key } = run.asked
      for (const step of run.steps) if (!this.#mayTake(run, step)) this.#fail(`${run.id}: ${step.name} has no end`)
      if (run.ended !== null || process.dead || !run.signal.aborted) continue
      if (this.#of(key).every((state) => owner(state) === run.id)) this.#fail(`${run.id} was told to have lost its key`)
    }
    const [wrong] = this.#wrong
    if (wrong !== undefined) throw new Wrong(`${wrong}\n\n${this.log.join('\n')}`)
  }

  /** What the judge of histories is to see. */
  history(): { history: History; rules: Rules } {
    const judged = ({ key }: { key: string }) => !this.#excepted.has(key)
    const exchanges = [...this.#exchanges.values()].filter(judged)
    const runs = [...this.#seenRuns.values()].filter(judged)
    const finals = new Set(runs.filter(({ final }) => final).map(({ text }) => text))
    const excuses = [UNAVAILABLE, NOT_REPLAYABLE]
    return {
      history: { exchanges, runs, absences: this.#absences },
      rules: {
        guarantees: [
          'one owner',
          'one final run',
          'same reply',
          'no invention',
          'kept once seen',
          'marked replays',
          'known answers',
          'rising attempts'
        ],
        // Those of runs whose reply is not kept, and of the plugin.
        answers: ['201', '500', '503', IN_PROGRESS, REUSED, ...excuses],
        excuses,
        isFinal: ({ text, code }) => code === undefined && finals.has(text)
      }
    }
  }

  /** Later than all that was before. */
  #tick(): number {
    return this.#now + ++this.#ticks / 1e6
  }

  #life(key: string): string {
    return `${key}#${this.#lives.get(key) ?? 0}`
  }

  /** What goes on while its key is forgotten is not judged. */
  #sameLife(life: string, key: string): void {
    if (life === this.#life(key)) return
    this.#excepted.add(life).add(this.#life(key))
  }

  #except({ asked, id }: Running): void {
    this.#excepted.add((this.#seenRuns.get(id) as Run).key).add(this.#life(asked.key))
  }

  #away({ name }: Process): void {
    this.#absences.push({ worker: name, from: this.#tick(), to: Number.POSITIVE_INFINITY })
  }

  #isSilent(process: Process): boolean {
    return this.#now <= this.#info(process).silentUntil
  }

  #mayTake({ asked }: Running, step: Stepping): boolean {
    const { process, key } = asked
    if (process.stopped || step.finish !== null || this.#isSilent(process)) return true
    // Only one at a time can be in its transaction.
    const isOther = (other: Stepping) => other !== step && isTransactional(step.name) && other.name === step.name
    return [...this.#runs.values()].some(({ run }) => run.asked.key === key && [...run.steps].some(isOther))
  }

  #committedOf(key: string, name: string): Committed | null {
    const committed = this.#committed.get(`${key} ${name}`)
    return committed === undefined || isExpired(committed.row) ? null : committed
  }

  #stepInfo(step: Stepping): StepInfo {
    const info = this.#steps.get(step) ?? { failed: false, doubtful: false, known: false, committed: false }
    this.#steps.set(step, info)
    return info
  }

  /** A call of a process for a key has failed, which the steps that are under way may feel. */
  #failsAt(process: Process, stored: string, tell?: (step: Stepping, info: StepInfo) => void): void {
    for (const { run } of this.#runs.values()) {
      if (run.asked.process !== process || storageKey(null, run.asked.key) !== stored) continue
      for (const step of run.steps) {
        const info = this.#stepInfo(step)
        info.failed = true
        tell?.(step, info)
      }
    }
  }

  /** What may have become of the states that agree with what was seen. */
  #keep(key: string, what: string, after: After): void {
    const next = this.#of(key).flatMap(after)
    if (next.length === 0) this.#fail(what)
    else this.#put(key, next)
  }

  /** A run knows these steps now; `kept`: what the store has of them, if the run has the key. */
  #minding(state: State, run: string, steps: Known, kept: (steps: Known) => Known): State {
    const minds = { ...state.minds, [run]: { ...mindOf(state, run), steps } }
    const { entry } = state
    if (entry.is !== 'claim' || entry.run !== run) return { ...state, minds }
    return { ...state, entry: { ...entry, steps: kept(entry.steps) }, minds }
  }

  #mayWait({ route, key, process, sent }: Asked): boolean {
    if (route !== '/wait') return false
    const { since } = this.#info(process)
    if (this.#now > Math.max(sent + process.waitTimeout, since) + LAG) return false
    const lag = this.#isOver(process) ? SHORT_LAG : LAG
    if (this.#now <= Math.max(since, this.#changedAt.get(key) ?? 0) + lag) return true
    if (process.cut) return this.#isAtWork(process, key)
    return this.#of(key).some(
      ({ entry }) =>
        (entry.is === 'claim' || entry.is === 'ghost') && (this.#now <= entry.to + LAG || this.#isAtWork(process, key))
    )
  }

  /** The states that agree with what was seen of a request. */
  #seen(asked: Asked, what: string): void {
    const states = this.#of(asked.key)
    const next: State[] = []
    const expected = new Set<string>()
    for (const state of states) {
      for (const { is, state: after } of this.#verdicts(state, asked)) {
        expected.add(is)
        if (is === what) next.push(after)
      }
    }
    if (next.length === 0) this.#fail(`${asked.id}: ${what}, instead of ${[...expected].join(' or ')}`)
    else this.#put(asked.key, next)
  }

  /** What may become of a request, if the store is in this state. */
  #verdicts(state: State, asked: Asked): Verdict[] {
    const { process, key, route, payload, sent } = asked
    const { entry } = state
    const refuse = (is: string): Verdict => ({ is, state })
    const busy = () => {
      if (route !== '/wait') return [refuse(IN_PROGRESS)]
      return this.#now >= sent + process.waitTimeout ? [refuse(IN_PROGRESS)] : []
    }
    /** What the process itself knows of its own runs. */
    const besides = ({ run }: RunInfo) => {
      const isOther = run.asked.route !== route || run.asked.payload !== payload
      return isOther ? [...busy(), refuse(REUSED)] : busy()
    }
    const done = (id: string, theirs: { route: Route; payload: string }): Verdict => {
      if (theirs.route !== route || theirs.payload !== payload) return refuse(REUSED)
      const how = (this.#runs.get(id) as RunInfo).run.ended as End
      if (!REPLAYABLE.includes(how)) return refuse(NOT_REPLAYABLE)
      const { status, text } = saying(how, id)
      return refuse(`${status} ${text} (replayed)`)
    }
    const found: Verdict[] = []
    const unstored = this.#info(process).unstored.get(key)
    if (unstored !== undefined) {
      const { run } = this.#runs.get(unstored.run) as RunInfo
      if (this.#mayCount(unstored, state, process)) found.push(done(unstored.run, run.asked))
      const isLeased = entry.is === 'claim' && entry.run === unstored.run && this.#now < entry.from
      if (process.cut && unstored.sure && isLeased && !this.#info(process).doubts) return found
    }
    if (this.#mayFail.has(asked) || this.#isSilent(process)) {
      found.push(refuse(UNAVAILABLE))
      // Who was to have the key had to wait until its owner's steps were stored again.
      if (this.#isSilent(process)) found.push(...busy())
      found.push(...this.#atWork(process, key).flatMap(besides))
    }
    // A run that has lost its key may know it or not.
    if (process.cut) return [...found, refuse(UNAVAILABLE), ...this.#atWork(process, key).flatMap(besides)]
    if (entry.is === 'free') {
      found.push(...this.#claimed(state, asked, 1, NONE))
      // A run of the process itself that has lost its claim, and does not know, gets it back instead.
      for (const info of this.#atWork(process, key)) {
        if (!(info.run.id in state.beaten) || info.intent === 'release') continue
        for (const verdict of besides(info)) {
          found.push(verdict, ...this.#after(state, info.run.id).map((after) => ({ ...verdict, state: after })))
        }
      }
    } else if (entry.is === 'done') {
      found.push(done(entry.run, entry))
    } else if (entry.is === 'ended') {
      if (entry.route !== route || entry.payload !== payload) found.push(refuse(REUSED))
      else found.push(...this.#claimed(state, asked, entry.attempt + 1, entry.steps))
      found.push(...this.#atWork(process, key).flatMap(besides))
    } else if (entry.is === 'ghost') {
      // What the ghost had wanted may be known, and something else.
      found.push(refuse(REUSED))
      if (entry.route === route) found.push(...busy())
      if (entry.route === route && this.#now >= entry.to) {
        found.push(...this.#claimed(state, asked, entry.attempt + 1, entry.found?.steps ?? NONE))
      }
    } else {
      if (entry.route !== route) return [...found, refuse(REUSED)]
      const own = this.#isAtWork(process, key)
      const isOther = entry.payload !== payload
      if (this.#now <= entry.to || own) {
        if (isOther) found.push(refuse(REUSED))
        // Who waits already does not look at who has the key next.
        if (!isOther || route === '/wait') found.push(...busy())
      }
      if (own && payload !== this.#atWork(process, key)[0]?.run.asked.payload) found.push(refuse(REUSED))
      const { run, intent } = this.#runs.get(entry.run) as RunInfo
      // A process does not take over from itself, but for what it is about to give back.
      if (this.#now >= entry.from && (run.asked.process !== process || intent === 'release')) {
        if (isOther) found.push(refuse(REUSED))
        else found.push(...this.#claimed(state, asked, entry.attempt + 1, entry.steps))
      }
    }
    return found
  }

  /** May a reply be replayed that its process does not know to be stored? Not if another may have the key. */
  #mayCount({ run, forgotten }: { run: string; forgotten: boolean }, { entry }: State, process: Process): boolean {
    if (forgotten || entry.is === 'free') return true
    if (entry.is === 'ghost' || entry.is === 'ended' || entry.run !== run) return false
    return entry.is === 'done' || !process.cut || this.#now <= entry.to
  }

  #claimed(state: State, { run, route, payload, process }: Asked, attempt: number, steps: Known): Verdict[] {
    const { healthy } = this.#info(process)
    const lease = healthy ? Infinity : this.#now + process.lease
    const id = run?.id ?? ''
    const next = this.#beat(state, { is: 'claim', run: id, route, payload, attempt, from: lease, to: lease, steps })
    const minds = { ...next.minds, [id]: { steps, lapsed: false } }
    return [{ is: `run ${attempt}`, state: { ...next, minds } }]
  }

  /** Another entry takes the place of a claim, whose owner does not know. */
  #beat(state: State, entry: Entry): State {
    const own = owner(state)
    if (own === null || this.#processOf(own).dead) return { ...state, entry }
    const mind = { ...mindOf(state, own), lapsed: true }
    return { entry, beaten: { ...state.beaten, [own]: this.#now }, minds: { ...state.minds, [own]: mind } }
  }

  /** @param isOld It was so at some time since the last look. */
  #ended({ route, payload, attempt, steps }: Claimed, ended: boolean, isOld = true): Ended {
    const to = this.#now + retained(route)
    return { is: 'ended', route, payload, attempt, ended, from: isOld ? to - STEP : to, to, steps }
  }

  /** The last step of a run, or its renewal, has come to the store. */
  #after(state: State, id: string): State[] {
    const { run, intent, tries } = this.#runs.get(id) as RunInfo
    const { [id]: since, ...beaten } = state.beaten
    const { route, payload, process } = run.asked
    const { entry } = state
    const owns = entry.is === 'claim' && entry.run === id
    if (!owns && (since === undefined || entry.is !== 'free' || intent === 'release')) return [{ ...state, beaten }]
    if (intent === 'complete') {
      const to = this.#now + retained(route)
      // What failed before was repeated at some time since the last look.
      return [{ ...state, entry: { is: 'done', run: id, route, payload, from: tries ? to - STEP : to, to }, beaten }]
    }
    const mind = mindOf(state, id)
    if (owns && intent === 'release') {
      const steps = joined(entry.steps, mind.steps)
      const free: State = { ...state, entry: { is: 'free' }, beaten }
      const ended: State = { ...state, entry: this.#ended({ ...entry, steps }, true, tries), beaten }
      const all = Object.values(steps)
      if (entry.attempt > 1 || all.some(({ sure }) => sure)) return [ended]
      // It is forgotten, if the store has no step of it.
      return all.length === 0 ? [free] : [free, ended]
    }
    if (owns) return [{ ...state, entry: { ...entry, from: Infinity, to: Infinity }, beaten }]
    // The payload is known by now, to whomever claims anew; the steps come behind the claim.
    const steps = this.#isQuiet(process) && process.stepFault === null ? mind.steps : doubted(mind.steps)
    const anew: Entry = { is: 'claim', run: id, route, payload, attempt: 1, from: Infinity, to: Infinity, steps }
    return [{ entry: anew, beaten, minds: { ...state.minds, [id]: { ...mind, lapsed: false } } }]
  }

  /** Nothing has failed of late, so that the store knows all that the process wants it to know. */
  #isQuiet(process: Process): boolean {
    const { healthy, since, failedAt } = this.#info(process)
    return healthy && this.#now > Math.max(since, failedAt) + LAG
  }

  #without(state: State, process: Process): State {
    const beaten = Object.fromEntries(Object.entries(state.beaten).filter(([run]) => this.#processOf(run) !== process))
    return { ...state, beaten }
  }

  #weaken(process: Process): void {
    const info = this.#info(process)
    const wasHealthy = info.healthy
    info.healthy = false
    info.since = this.#now
    if (!wasHealthy) return
    for (const [key, states] of this.#states) {
      this.#put(
        key,
        states.map((state) => {
          const { entry } = state
          if (entry.is !== 'claim' || this.#processOf(entry.run) !== process) return state
          const from = Math.min(entry.from, this.#now + (process.lease * 2) / 3)
          return { ...state, entry: { ...entry, from, to: Math.min(entry.to, this.#now + process.lease) } }
        })
      )
    }
  }

  /** The states of a key, as they may have become in the meantime. */
  #of(key: string): State[] {
    let states = this.#states.get(key) ?? [FREE]
    const wereFree = states.some(({ entry }) => entry.is === 'free')
    states = states.map((state) => this.#settled(state))
    for (let later = this.#later(key, states); nameOf(later) !== nameOf(states); later = this.#later(key, states))
      states = later
    const areFree = states.some(({ entry }) => entry.is === 'free')
    if (areFree && !wereFree) this.#lives.set(key, (this.#lives.get(key) ?? 0) + 1)
    this.#put(key, states)
    return states
  }

  /** What failed before has been done by now. */
  #settled(state: State): State {
    const { entry } = state
    if (entry.is !== 'claim') return state
    const { run, intent } = this.#runs.get(entry.run) as RunInfo
    if (intent === 'complete' || !this.#isQuiet(run.asked.process)) return state
    return { ...state, entry: { ...entry, steps: joined(entry.steps, mindOf(state, entry.run).steps) } }
  }

  #later(key: string, states: State[]): State[] {
    const later: State[] = []
    for (const state of states) {
      const { entry } = state
      if (entry.is === 'done' && this.#now >= entry.from) {
        later.push({ ...state, entry: { is: 'free' } })
        if (this.#now > entry.to) continue
      }
      if (entry.is === 'ended' && this.#now >= entry.from) {
        later.push({ ...state, entry: { is: 'free' } })
        if (this.#now > entry.to) continue
      }
      if (entry.is === 'ghost') {
        later.push({ ...state, entry: entry.found ?? { is: 'free' } })
        const giver = [...this.#processes].find(([{ name }]) => name === entry.process)?.[1]
        if (giver?.healthy && this.#now > Math.max(entry.since, giver.since) + LAG) continue
      }
      if (entry.is === 'claim') {
        const retain = retained(entry.route)
        if (this.#now >= entry.from + retain) later.push(this.#beat(state, { is: 'free' }))
        if (this.#now > entry.to + retain) continue
      }
      const unsettled = [...Object.keys(state.beaten), ...(entry.is === 'claim' ? [entry.run] : [])]
      let stays = true
      for (const id of unsettled) {
        const { run, intent } = this.#runs.get(id) as RunInfo
        const { process } = run.asked
        const info = this.#info(process)
        const owns = owner(state) === id
        if (!info.healthy || (owns && intent === null && entry.is === 'claim' && entry.from === Infinity)) continue
        const since = state.beaten[id] ?? -1
        // Who asks its process for the key at this very moment gets it for the run.
        if (this.#now <= since && !this.#isAsked(process, key)) continue
        later.push(...this.#after(state, id))
        const patience = intent === null ? process.lease / 3 : 0
        if (this.#now > Math.max(since, info.since) + patience + LAG) stays = false
      }
      if (stays) later.push(state)
    }
    return unique(later)
  }

  #put(key: string, states: State[]): void {
    const next = unique(states.map((state) => this.#remembered(state)))
    if (nameOf(next) !== nameOf(this.#states.get(key) ?? [])) {
      this.#changedAt.set(key, this.#now)
      this.#states.set(key, next)
    }
    for (const [process, { unstored }] of this.#processes) if (this.#isOver(process)) unstored.delete(key)
  }

  /** Without what is in the minds of those that will not do anything any more. */
  #remembered(state: State): State {
    const { minds } = state
    const isOver = (id: string) => {
      // One that is about to start is not there yet.
      const run = this.#runs.get(id)?.run
      return run !== undefined && (run.asked.process.dead || (run.ended !== null && !knows(state, id)))
    }
    const over = Object.keys(minds).filter(isOver)
    if (over.length === 0) return state
    return { ...state, minds: Object.fromEntries(Object.entries(minds).filter(([id]) => !over.includes(id))) }
  }

  /** The runs of a process that are at work, whether or not they have lost their key. */
  #atWork(process: Process, key: string): RunInfo[] {
    return [...this.#runs.values()].filter(
      ({ run, intent, tries }) =>
        run.asked.process === process &&
        run.asked.key === key &&
        (run.ended === null || (intent === 'complete' && tries && !this.#isOver(process)))
    )
  }

  #isAsked(process: Process, key: string): boolean {
    return process.asked.some(
      (asked) => asked.key === key && asked.answer === null && asked.run === null && !asked.gone
    )
  }

  /** Has the process had the time to do what it could not do before? */
  #isOver(process: Process): boolean {
    const { healthy, since } = this.#info(process)
    return healthy && this.#now > since + LAG
  }

  #isAtWork(process: Process, key: string): boolean {
    return this.#atWork(process, key).length > 0
  }

  #processOf(run: string): Process {
    return (this.#runs.get(run) as RunInfo).run.asked.process
  }

  #info(process: Process): ProcessInfo {
    let info = this.#processes.get(process)
    if (info === undefined) {
      info = {
        healthy: true,
        since: -Infinity,
        unstored: new Map(),
        doubts: false,
        failedAt: -Infinity,
        silentUntil: -Infinity
      }
      this.#processes.set(process, info)
    }
    return info
  }

  get #now(): number {
    return this.world.time.now
  }

  #say(what: string): void {
    this.log.push(`${this.#now}: ${what}`)
  }

  #fail(what: string): void {
    this.#say(`WRONG: ${what}`)
    this.#wrong.push(what)
  }
}

/** For how long a route's records are kept, and claims that were not finished. */
const retained = (route: Route) => (route === '/short' ? SHORT_TTL : TTL)

function owner({ entry }: State): string | null {
  return entry.is === 'claim' ? entry.run : null
}

/** Whose result it is. */
function doerOf(result: string): string {
  return result.split(' ').at(-1) as string
}

function mindOf({ minds }: State, run: string): Mind {
  return minds[run] ?? { steps: NONE, lapsed: false }
}

function isSame({ asked: one }: Running, { asked: other }: Running): boolean {
  return one.route === other.route && one.payload === other.payload
}

function knows(state: State, run: string): boolean {
  return owner(state) === run || run in state.beaten
}

function unique(states: State[]): State[] {
  return [...new Map(states.map((state) => [nameOf(state), state])).values()]
}

/** The same for what is the same. JSON has no infinity. */
function nameOf(states: State | State[]): string {
  return JSON.stringify(states, (_name, value) => (value === Infinity ? 'Infinity' : value))
}
