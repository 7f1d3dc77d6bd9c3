import { AssertionError } from 'node:assert'
import { setMaxListeners } from 'node:events'
import { inspect } from 'node:util'
import type { Acquisition, IdempotencyStore, ListedKey, ListedPage } from '../../types/index.js'
import type { StoreFactory, StoreUnderTest } from './types.js'

/** Where a promise is put to the test. */
export interface Harness {
  readonly store: IdempotencyStore
  /** Another client on the same data, where there is one. */
  readonly second: IdempotencyStore
  /** Aborts when the case is over: what still listens may go. */
  readonly signal: AbortSignal
  /** Breaks the connections, where the factory knows how. */
  readonly interrupt: (() => Promise<void>) | undefined
  /** Spoils a record, where the factory knows how. */
  readonly spoil: ((key: string) => Promise<void>) | undefined
}

/** A promise of every store, and how it is tried. */
export interface Case {
  readonly name: string
  /** Rejects when the promise is broken. */
  readonly keep: (harness: Harness) => Promise<void>
}

export function conformanceCase(name: string, keep: Case['keep']): Case {
  return { name, keep }
}

type OptionalMethod = 'step' | 'changed' | 'get' | 'delete' | 'list' | 'settle' | 'close'

/** The same on clients that have some of the methods that a store need not have. */
export type HarnessWith<M extends OptionalMethod> = Harness & {
  readonly [client in 'store' | 'second']: IdempotencyStore & Required<Pick<IdempotencyStore, M>>
}

/** A promise that is made with methods which a store need not have. */
export function caseWith<M extends OptionalMethod>(
  methods: M | readonly M[],
  name: string,
  keep: (harness: HarnessWith<M>) => Promise<void>
): Case {
  return conformanceCase(name, async (harness) => {
    if ([methods].flat().every((method) => harness.store[method as M] !== undefined)) {
      await keep(harness as HarnessWith<M>)
    }
  })
}

/** The store has rejected where it should have answered. */
export class Rejection extends AssertionError {}

/** Makes a store, tries the promise on it, and disposes of it: all within the limit. */
export async function runCase({ name, keep }: Case, factory: StoreFactory, limit: number): Promise<void> {
  const over = new AbortController()
  setMaxListeners(0, over.signal)
  const unanswered: string[] = []
  let made: StoreUnderTest | undefined
  const making = open(factory, over.signal).then((subject) => {
    made = subject
    return subject
  })
  const kept = making.then((subject) => keep(harnessOf(subject, unanswered, over.signal)))
  const what = () => (made ? pending(unanswered) : 'the factory to give a store')
  const failure = await outcome(within(limit, kept, what))
  over.abort()
  const untidy = made && (await outcome(within(limit, disposed(made), () => 'dispose to end')))
  if (failure) throw named(name, failure.error)
  if (untidy) throw untidy.error
}

async function open(factory: StoreFactory, over: AbortSignal): Promise<StoreUnderTest> {
  const made = (await factory()) as Partial<IdempotencyStore & StoreUnderTest> | undefined | null
  const subject = (typeof made?.acquire === 'function' ? { store: made } : made) as StoreUnderTest | undefined | null
  if (typeof subject?.store?.acquire !== 'function') {
    throw new TypeError(`The factory has to give a store, or { store }, and gave ${shown(made)}`)
  }
  // Made too late for its case, and yet somebody has to tidy it away.
  if (over.aborted) await disposed(subject)
  return subject
}

async function disposed(subject: StoreUnderTest): Promise<void> {
  if (subject.dispose) await subject.dispose()
  else for (const client of new Set([subject.store, subject.second])) await client?.close?.()
}

function harnessOf(subject: StoreUnderTest, unanswered: string[], signal: AbortSignal): Harness {
  const { store, second = store, interrupt, spoil } = subject
  const first = watched(store, unanswered, signal)
  return {
    store: first,
    second: second === store ? first : watched(second, unanswered, signal),
    signal,
    interrupt: interrupt && (async () => void (await interrupt.call(subject))),
    spoil: spoil && (async (key) => void (await spoil.call(subject, key)))
  }
}

/** The store, with a look at each of its answers. What is given goes to it as it is, and so does what it answers. */
function watched(store: IdempotencyStore, unanswered: string[], over: AbortSignal): IdempotencyStore {
  const ask = <T>(method: string, call: () => Promise<T>, fault: (answer: T) => string | null): Promise<T> => {
    // What a case that was given up still wants to know, nobody wants to hear.
    if (over.aborted) return new Promise(() => {})
    const answer = (async () => {
      const promise = given(method, call)
      unanswered.push(method)
      try {
        const answer = await promise
        const wrong = fault(answer)
        if (wrong !== null) throw new AssertionError({ message: `${method} answered ${shown(answer)}: ${wrong}` })
        return answer
      } catch (error) {
        if (error instanceof AssertionError) throw error
        const message = `${method} rejected with ${error instanceof Error ? error : shown(error)}`
        throw Object.assign(new Rejection({ message }), { cause: error })
      } finally {
        unanswered.splice(unanswered.indexOf(method), 1)
      }
    })()
    // Several calls may be on their way when the first of them fails.
    answer.catch(() => {})
    return answer
  }
  const watched: IdempotencyStore = {
    acquire: (key, claim) => ask('acquire', () => store.acquire(key, claim), faultOf),
    renew: (key, token, leaseMs) => ask('renew', () => store.renew(key, token, leaseMs), notBoolean),
    complete: (...args) => ask('complete', () => store.complete(...args), notBoolean),
    release: (...args) => ask('release', () => store.release(...args), notBoolean)
  }
  const { step, changed, get, delete: forget, list, settle, close } = store
  if (step) watched.step = (...args) => ask('step', () => step.call(store, ...args), notBoolean)
  if (changed) watched.changed = (key, signal) => ask('changed', () => changed.call(store, key, signal), anything)
  if (get) watched.get = (key) => ask('get', () => get.call(store, key), faultOfLook)
  if (forget) watched.delete = (...args) => ask('delete', () => forget.call(store, ...args), notBoolean)
  if (list) watched.list = (...args) => ask('list', () => list.call(store, ...args), faultOfPage)
  if (settle) watched.settle = (...args) => ask('settle', () => settle.call(store, ...args), notBoolean)
  if (close) watched.close = () => ask('close', () => close.call(store), anything)
  return watched
}

function given<T>(method: string, call: () => Promise<T>): Promise<T> {
  let promise: Promise<T>
  try {
    promise = call()
  } catch (error) {
    throw new AssertionError({ message: `${method} threw ${error}, where it has to give a promise` })
  }
  if (typeof promise?.then === 'function') return promise
  throw new AssertionError({ message: `${method} gave ${shown(promise)}, where it has to give a promise` })
}

const isText = (value: unknown) => typeof value === 'string'
const isCount = (value: unknown) => Number.isSafeInteger(value) && (value as number) > 0
const isDuration = (value: unknown) => Number.isFinite(value) && (value as number) >= 0
const isRecord = (value: unknown) => typeof value === 'object' && value !== null
// Left out where there are none, so that answers without steps are what they were.
const areSteps = optional((value) => Array.isArray(value) && value.length > 0 && value.every(isStep))
const isStep = (value: unknown) => Array.isArray(value) && value.length === 2 && value.every(isText)

const shapes: Record<Acquisition['state'], Shape> = {
  acquired: { attempt: isCount, steps: areSteps },
  running: { fingerprint: isText, leaseMs: isDuration, attempt: optional(isCount), steps: areSteps },
  abandoned: {
    fingerprint: isText,
    attempt: isCount,
    ended: optional((value) => value === true),
    lapsedMs: optional(isDuration),
    steps: areSteps
  },
  completed: { record: isRecord, ttlMs: (value) => value === null || isDuration(value) }
}

type Shape = Record<string, (value: unknown) => boolean>

const listedShapes: Record<ListedKey['state'], Shape> = {
  running: { key: isText, fingerprint: isText, leaseMs: isDuration, attempt: isCount },
  abandoned: { ...shapes.abandoned, key: isText, lapsedMs: isDuration, steps: (value) => value === undefined },
  completed: {
    key: isText,
    fingerprint: isText,
    createdAt: Number.isFinite,
    outcome: (value) => isText(value) || isCount(value),
    ttlMs: (value) => value === null || isDuration(value)
  }
}

function optional(is: (value: unknown) => boolean): (value: unknown) => boolean {
  return (value) => value === undefined || is(value)
}

/** What is wrong with an answer. What it says is for the case to judge. */
function faultOf(found: Acquisition): string | null {
  return faultIn(found, shapes[found?.state])
}

function faultIn(found: object, shape: Shape | undefined): string | null {
  if (shape === undefined) return 'that is none of the states of a key'
  const wrong = Object.entries(shape).find(([name, isRight]) => !isRight((found as Record<string, unknown>)[name]))
  return wrong === undefined ? null : `its ${wrong[0]} is missing, of the wrong type, or out of range`
}

function faultOfPage(page: ListedPage): string | null {
  if (!Array.isArray(page?.keys)) return 'its keys are missing'
  if (page.cursor !== null && !isText(page.cursor)) return 'its cursor has to be a text, or null'
  for (const found of page.keys) {
    const fault = faultIn(found, listedShapes[found?.state as ListedKey['state']])
    if (fault !== null) return fault
  }
  return null
}

function faultOfLook(found: Acquisition | null): string | null {
  return found === null ? null : faultOf(found)
}

function notBoolean(answer: unknown): string | null {
  return typeof answer === 'boolean' ? null : 'it has to be true or false'
}

function anything(): null {
  return null
}

/** What a case waits for that does not end. */
function pending(unanswered: string[]): string {
  if (unanswered.length === 0) return 'the case to end'
  return [...new Set(unanswered)].map((method) => `${method} to answer`).join(', ')
}

/** Rejects when the promise takes longer. */
export async function within<T>(limit: number, promise: Promise<T>, what: () => string): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  // It keeps the process alive: nothing else may, with a store that never answers.
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      reject(new AssertionError({ message: `Waited ${limit} ms in vain for ${what()}` }))
    }, limit)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** The error, if there is one. */
function outcome(promise: Promise<unknown>): Promise<{ error: unknown } | null> {
  return promise.then(
    () => null,
    (error: unknown) => ({ error })
  )
}

/** The error, with the promise that was broken in front. */
function named(name: string, error: unknown): unknown {
  if (!(error instanceof AssertionError)) return error
  const { message, stack } = error
  error.message = `${name}: ${message}`
  error.stack = stack?.replace(message, () => error.message) ?? error.message
  return error
}

export function shown(value: unknown): string {
  return inspect(value, {
    breakLength: Number.POSITIVE_INFINITY,
    compact: true,
    maxStringLength: 200,
    maxArrayLength: 20,
    depth: 4
  })
}
