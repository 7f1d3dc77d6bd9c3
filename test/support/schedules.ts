import type { IdempotencyStore } from '../../index.js'

/*
 * Every order in which the calls of several processes can come to one store: each call of a process waits for its turn, and
 * whose turn it is, is tried in all ways, one after the other (stateless model checking, by depth first).
 */

/** One process: what it does with its view of the store. */
export type Process = (store: IdempotencyStore, turn: () => Promise<void>) => Promise<void>

const METHODS = ['acquire', 'renew', 'complete', 'release', 'step', 'get', 'delete', 'settle'] as const

/** The choices of one run: at each step, which of how many went on. */
interface Choice {
  taken: number
  of: number
}

/**
 * Runs the processes in every order of their calls, each time on a store of its own.
 * @param most After so many runs it is enough.
 * @returns how many there were
 */
export async function everySchedule(
  makeStore: () => IdempotencyStore,
  scene: (store: IdempotencyStore) => Promise<{ processes: Process[]; check: (schedule: string) => Promise<void> }>,
  most = Number.POSITIVE_INFINITY
): Promise<number> {
  let choices: Choice[] = []
  for (let runs = 1; ; runs++) {
    const store = makeStore()
    const { processes, check } = await scene(store)
    const schedule = await run(store, processes, choices)
    await check(schedule)
    choices = next(choices)
    if (choices.length === 0 || runs === most) return runs
  }
}

/** The next choices to try: the last one that has something left to try takes that. */
function next(choices: Choice[]): Choice[] {
  const rest = [...choices]
  for (let last = rest.pop(); last !== undefined; last = rest.pop()) {
    if (last.taken + 1 < last.of) return [...rest, { taken: last.taken + 1, of: last.of }]
  }
  return []
}

/** Follows the choices, and adds to them the first of what there is to choose from. */
async function run(store: IdempotencyStore, processes: readonly Process[], choices: Choice[]): Promise<string> {
  const waiting: (() => Promise<void>)[][] = processes.map(() => [])
  let isDone = 0
  for (const [n, process] of processes.entries()) {
    const calls = waiting[n] as (() => Promise<void>)[]
    const turn = () => new Promise<void>((resolve) => calls.push(async () => resolve()))
    void process(view(store, calls), turn).finally(() => isDone++)
  }
  const order: string[] = []
  for (let step = 0; ; ) {
    await settled()
    const ready = waiting.flatMap((calls, n) => (calls.length > 0 ? [n] : []))
    if (ready.length === 0) {
      if (isDone === processes.length) return order.join('')
      continue
    }
    choices[step] ??= { taken: 0, of: ready.length }
    const n = ready[choices[step]?.taken as number] as number
    step++
    order.push(String(n))
    await waiting[n]?.shift()?.()
  }
}

/** Lets everything happen that waits for nothing. */
function settled(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}

/** The store as one process has it: each call waits for its turn. */
function view(store: IdempotencyStore, waiting: (() => Promise<void>)[]): IdempotencyStore {
  const methods = METHODS.map((name) => [
    name,
    (...args: never[]) =>
      new Promise((resolve, reject) => {
        waiting.push(async () => {
          try {
            resolve(await (store[name] as (...args: never[]) => Promise<unknown>)(...args))
          } catch (error) {
            reject(error)
          }
        })
      })
  ])
  return Object.fromEntries(methods)
}
