import fc from 'fast-check'
import { violations } from './http-history.js'
import { PluginModel, STEP, Wrong } from './plugin-model.js'
import {
  type Call,
  ENDS,
  type End,
  LEASE,
  type Process,
  ROUTES,
  type Route,
  TTL,
  World,
  type WorldOptions
} from './plugin-world.js'
import { settled } from './virtual-time.js'

/** One thing that happens. What does not apply when it is its turn does not happen. */
export type Event =
  | { do: 'send'; to: number; key: string; payload: string; route: Route | 'same' }
  | { do: 'end'; which: number; how: End }
  | { do: 'hang up'; which: number }
  | { do: 'pass'; ms: number }
  | { do: 'crash' | 'stop' | 'resume' | 'cut' | 'mend'; process: number }
  | { do: 'lose'; process: number; call: Call }
  | { do: 'delete'; process: number; key: string }

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

const calm: fc.Arbitrary<Event>[] = [
  send,
  send,
  of<Event & { do: 'end' }>({
    do: fc.constant('end'),
    which: fc.nat({ max: 3 }),
    how: fc.oneof(fc.constantFrom('reply' as const, 'fail' as const), fc.constantFrom(...ENDS))
  }),
  of<Event & { do: 'hang up' }>({ do: fc.constant('hang up'), which: fc.nat({ max: 3 }) }),
  of<Event & { do: 'pass' }>({
    do: fc.constant('pass'),
    ms: fc.constantFrom(60, 5_000, LEASE + 2_000, TTL + 5_000)
  })
]

const faults: fc.Arbitrary<Event>[] = [
  ...(['crash', 'stop', 'resume', 'cut', 'cut', 'mend'] as const).map((what) =>
    of<Event & { do: 'crash' }>({ do: fc.constant(what) as fc.Arbitrary<'crash'>, process })
  ),
  of<Event & { do: 'lose' }>({
    do: fc.constant('lose'),
    process,
    call: fc.constantFrom('acquire' as const, 'renew' as const, 'complete' as const, 'release' as const)
  }),
  of<Event & { do: 'delete' }>({ do: fc.constant('delete'), process, key })
]

export const histories = fc.array(fc.oneof(...calm, ...calm, ...faults), { maxLength: 30, size: 'max' })

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
      const able = world.processes.filter(({ stopped }) => !stopped).flatMap(({ running }) => [...running.values()])
      const run = able[event.which % able.length]
      if (run === undefined) return
      model.ends(run, event.how)
      run.end(event.how)
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
    case 'delete': {
      const process = world.processes[event.process] as Process
      if (process.stopped || process.cut) return
      model.deleted(process, event.key, await process.delete(event.key))
      return
    }
    default:
      return befall(event.do, event.process, world, model, start)
  }
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
