import fc from 'fast-check'
import { violations } from './http-history.js'
import { PluginModel, STEP, Wrong } from './plugin-model.js'
import {
  type Call,
  ENDS,
  type End,
  KEYS,
  LATE,
  LEASE,
  type Process,
  ROUTES,
  type Route,
  type Running,
  STEP_FAULTS,
  STEPS,
  type StepEnd,
  type StepFault,
  type StepName,
  TTL,
  World,
  type WorldOptions
} from './plugin-world.js'
import { settled } from './virtual-time.js'

/** One thing that happens. What does not apply when it is its turn does not happen. */
export type Event =
  | { do: 'send'; to: number; key: string; payload: string; route: Route | 'same' }
  | { do: 'end'; which: number; how: End }
  /** A run does something in a step, and comes to the end of a slow one. */
  | { do: 'step'; which: number; name: StepName; how: StepEnd }
  | { do: 'finish'; which: number }
  | { do: 'hang up'; which: number }
  | { do: 'pass'; ms: number }
  | { do: 'crash' | 'stop' | 'resume' | 'cut' | 'mend'; process: number }
  | { do: 'lose'; process: number; call: Call }
  | { do: 'fail step'; process: number; how: StepFault }
  | { do: 'delete' | 'look'; process: number; key: string }
  | { do: 'forget' }

const process = fc.nat({ max: 1 })
const key = fc.constantFrom('k', 'k', 'k', 'l')

const send = fc.record(
  {
    do: fc.constant('send' as const),
    to: process,
    key,
    payload: fc.oneof({ weight: 5, arbitrary: fc.constant('p') }, { weight: 1, arbitrary: fc.constant('q') }),
    // The last one with the key, for the most part: two routes are two different requests.
    route: fc.oneof(
      { weight: 3, arbitrary: fc.constant('same' as const) },
      { weight: 1, arbitrary: fc.constantFrom(...ROUTES) }
    )
  },
  { noNullPrototype: true }
)
const of = <T extends object>(model: { [K in keyof T]: fc.Arbitrary<T[K]> }) =>
  fc.record(model, { noNullPrototype: true })

const pass = (...ms: number[]) => of<Event & { do: 'pass' }>({ do: fc.constant('pass'), ms: fc.constantFrom(...ms) })

const calm: fc.Arbitrary<Event>[] = [
  send,
  send,
  of<Event & { do: 'end' }>({
    do: fc.constant('end'),
    which: fc.nat({ max: 3 }),
    how: fc.oneof(fc.constantFrom('reply' as const, 'fail' as const), fc.constantFrom(...ENDS))
  }),
  of<Event & { do: 'hang up' }>({ do: fc.constant('hang up'), which: fc.nat({ max: 3 }) }),
  pass(60, LATE, LEASE + 2_000, TTL + 5_000)
]

const step = of<Event & { do: 'step' }>({
  do: fc.constant('step'),
  which: fc.nat({ max: 1 }),
  name: fc.constantFrom(...STEPS),
  how: fc.constantFrom('done' as const, 'done' as const, 'done' as const, 'slow' as const, 'failed' as const)
})
const finish = of<Event & { do: 'finish' }>({ do: fc.constant('finish'), which: fc.nat({ max: 1 }) })

const faults: fc.Arbitrary<Event>[] = [
  ...(['crash', 'stop', 'resume', 'cut', 'cut', 'mend'] as const).map((what) =>
    of<Event & { do: 'crash' }>({ do: fc.constant(what) as fc.Arbitrary<'crash'>, process })
  ),
  of<Event & { do: 'lose' }>({
    do: fc.constant('lose'),
    process,
    call: fc.constantFrom('acquire' as const, 'renew' as const, 'complete' as const, 'release' as const)
  }),
  of<Event & { do: 'fail step' }>({ do: fc.constant('fail step'), process, how: fc.constantFrom(...STEP_FAULTS) }),
  of<Event & { do: 'delete' }>({ do: fc.constantFrom('delete', 'look') as fc.Arbitrary<'delete'>, process, key }),
  of<Event & { do: 'forget' }>({ do: fc.constant('forget') })
]

const anything = fc.array(fc.oneof(...calm, ...calm, step, finish, ...faults), { maxLength: 30, size: 'max' })

const common = (weight: number, arbitrary: fc.Arbitrary<Event>) => ({ weight, arbitrary })
/** One operation in steps, most of whose attempts fail. */
const attempts = fc.array(
  fc.oneof(
    common(
      6,
      of<Event & { do: 'send' }>({
        do: fc.constant('send'),
        to: process,
        key: fc.constant('k'),
        payload: fc.constantFrom(...'ppppppq'),
        route: fc.constantFrom(
          ...ROUTES.filter((route) => route !== '/short').flatMap((route) => [route, 'same' as const])
        )
      })
    ),
    common(8, step),
    common(1, finish),
    common(
      4,
      of<Event & { do: 'end' }>({
        do: fc.constant('end'),
        which: fc.nat({ max: 1 }),
        how: fc.constantFrom(...(['fail', 'fail', 'fail', 'throw', 'discard', 'reply'] as const))
      })
    ),
    common(3, pass(60, LATE, LEASE + 2_000)),
    ...faults.map((fault) => common(1, fault))
  ),
  { maxLength: 40, size: 'max' }
)

export const histories = fc.oneof(anything, attempts)

/** Lets it all happen, and says how it went; rejects when something happens that must not. */
export async function play(events: Event[], options: WorldOptions = {}): Promise<PluginModel> {
  const model = new PluginModel()
  const world = new World(model, options)
  model.world = world
  const all: Process[] = []
  const start = async (slot: number) => all.push(await world.start(slot))
  let left: number
  try {
    for (const slot of [0, 1]) await start(slot)
    for (const event of events) {
      await happen(event, world, model, start)
      await settled()
      model.check()
    }
  } finally {
    left = await world.close(all)
  }
  if (left > 0) throw new Error(`${left} timers are left`)
  const { history, rules } = model.history()
  const [violation] = violations(history, rules)
  if (violation) throw new Wrong(`${violation.guarantee}: ${violation.what}\n\n${model.log.join('\n')}`)
  return model
}

async function happen(
  event: Event,
  world: World,
  model: PluginModel,
  start: (slot: number) => Promise<unknown>
): Promise<void> {
  switch (event.do) {
    case 'send': {
      const process = world.processes[event.to] as Process
      const last = model.asked.findLast(({ key }) => key === event.key)?.route ?? '/wait'
      const asked = world.asked(process, event.key, event.payload, event.route === 'same' ? last : event.route)
      model.sent(asked)
      process.send(asked)
      return
    }
    case 'end': {
      const able = awake(world).filter(({ steps }) => steps.size === 0)
      const run = able[event.which % able.length]
      if (run === undefined) return
      model.ends(run, event.how)
      run.end(event.how)
      return
    }
    case 'step': {
      const able = awake(world).filter(({ used }) => !used.has(event.name))
      const run = able[event.which % able.length]
      if (run === undefined) return
      model.steps(run, event.name, event.how)
      run.step(event.name, event.how)
      return
    }
    case 'finish': {
      const able = awake(world).flatMap(({ steps }) => [...steps].filter(({ finish }) => finish !== null))
      able[event.which % able.length]?.finish?.()
      return
    }
    case 'hang up': {
      const able = model.asked.filter(({ answer, gone, process }) => answer === null && !gone && !process.stopped)
      const asked = able[event.which % able.length]
      if (asked === undefined) return
      asked.gone = true
      model.log.push(`${asked.id} hangs up`)
      asked.hangUp()
      return
    }
    case 'pass': {
      // In steps in which whatever happens can be told apart.
      for (let left = event.ms; left > 0; left -= STEP) {
        await world.time.pass(Math.min(left, STEP))
        model.check()
      }
      return
    }
    case 'lose':
      world.processes[event.process]?.losing.add(event.call)
      return
    case 'fail step':
      ;(world.processes[event.process] as Process).stepFault = event.how
      return
    case 'delete':
    case 'look': {
      const process = world.processes[event.process] as Process
      if (process.stopped || process.cut) return
      if (event.do === 'look') model.looked(event.key, await process.look(event.key))
      else model.deleted(process, event.key, await process.delete(event.key))
      return
    }
    case 'forget':
      for (const key of KEYS) model.deleted(null, key, null)
      await world.forget()
      return
    default:
      return befall(event.do, event.process, world, model, start)
  }
}

/** The runs of processes that do something. */
function awake({ processes }: World): Running[] {
  return processes.filter(({ stopped }) => !stopped).flatMap(({ running }) => [...running.values()])
}

async function befall(
  what: 'crash' | 'stop' | 'resume' | 'cut' | 'mend',
  slot: number,
  world: World,
  model: PluginModel,
  start: (slot: number) => Promise<unknown>
): Promise<void> {
  const process = world.processes[slot] as Process
  switch (what) {
    case 'crash':
      process.die()
      model.died(process)
      await start(slot)
      return
    case 'stop':
      process.stop()
      model.weakened(process)
      return
    case 'cut':
      process.cut = true
      model.weakened(process)
      return
    case 'mend':
      if (!process.cut) return
      process.cut = false
      model.recovered(process)
      return
    case 'resume':
      if (!process.stopped) return
      process.stopped = false
      model.recovered(process)
      await process.resume()
  }
}
