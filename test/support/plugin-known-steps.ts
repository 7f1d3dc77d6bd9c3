/** Of each step that may be there, whose result it has, and whether it is there for sure. */
export type Known = Readonly<Record<string, KnownStep>>

interface KnownStep {
  of: string
  sure: boolean
}

export const NONE: Known = {}

export function withStep(known: Known, name: string, of: string, sure: boolean): Known {
  return inOrder({ ...known, [name]: { of, sure } })
}

export function without(known: Known, name: string): Known {
  const { [name]: _, ...others } = known
  return others
}

/** None of it need be there. */
export function doubted(known: Known): Known {
  return Object.fromEntries(Object.entries(known).map(([name, { of }]) => [name, { of, sure: false }]))
}

/** What is in one or the other: the first result of a step stays, if it is there for sure. */
export function joined(first: Known, second: Known): Known {
  const all = { ...second }
  for (const [name, step] of Object.entries(first)) if (step.sure || !all[name]?.sure) all[name] = step
  return inOrder(all)
}

/** May these be all that are there, by whose result they have? */
export function agrees(known: Known, found: ReadonlyMap<string, string>): boolean {
  const isKnown = ([name, of]: [string, string]) => known[name]?.of === of
  return [...found].every(isKnown) && Object.entries(known).every(([name, { sure }]) => !sure || found.has(name))
}

/** What is known when these were seen. */
export function seen(known: Known, found: ReadonlyMap<string, string>): Known {
  return Object.fromEntries(
    Object.entries(known).map(([name, step]) => [name, found.has(name) ? { ...step, sure: true } : step])
  )
}

/** The same always looks the same. */
function inOrder(known: Known): Known {
  return Object.fromEntries(Object.entries(known).sort(([a], [b]) => (a < b ? -1 : 1)))
}
