import type { Test } from 'tap'

/*
 * A judge of what was seen from outside: from what clients sent and got, and from what handlers did, it decides whether
 * the guarantees held. It knows nothing of stores or of how the plugin works.
 */

/** A request, as its client saw it. Times are of `now()`, so that those of several processes can be compared. */
export interface Exchange {
  /** A key that was forgotten on purpose, by expiry or deletion, goes by another name from then on. */
  key: string
  /** What the client asked for: two requests are the same if key and payload are. */
  payload: string
  sent: number
  /** When the whole reply was there; `null` if none came: the connection broke, or the client left. */
  got: number | null
  status?: number
  /** The error's, if it is one of the plugin. */
  code?: string | undefined
  text?: string
  replayed?: boolean
  /** Which process was asked. */
  worker?: string
}

/** A run of the handler, as the handler saw it. */
export interface Run {
  /** Unique. */
  id: string
  key: string
  payload: string
  worker: string
  attempt: number
  started: number
  /** `null` if it did not come to its end: its process died. */
  ended: number | null
  /** Was its reply one to be kept? Unknown of a run that did not end. */
  final?: boolean
  /** The body of its reply. */
  text?: string
}

/** A time in which a process was not itself: paused beyond its lease, or dead. Others may take its keys over in it. */
export interface Absence {
  worker: string
  from: number
  /** `Infinity` for a process that is dead. */
  to: number
}

export interface History {
  exchanges: Exchange[]
  runs: Run[]
  absences?: Absence[]
}

export const GUARANTEES = {
  'one owner': 'no two runs of a key at the same time, but for the run of a process that is dead or paused',
  'one run': 'a key has one run at most, whatever happens',
  'one final run':
    'after a run that was final, no other run of the key begins, unless its process was away before its reply was seen',
  'same reply':
    'all that get a final reply under a key get the same, word for word, but for the client of an owner that was overtaken',
  'no invention': 'every final reply is what a run of this key and payload has said, after it was said',
  'kept once seen':
    'who asks after a final reply has been seen gets it as a replay, or learns that the store cannot be asked',
  'marked replays':
    'a final reply is without the mark of a replay for the client whose request ran, and for nobody else',
  'known answers': 'no answer but the ones that the plugin or the handler may give',
  'no lock-out': 'the last request of every key got a final reply, if it was the same request',
  'rising attempts': 'a run that takes over from another has a higher attempt',
  'last word': 'what is replayed last is what the last final run has said: a late reply overwrites nothing'
} as const

export type Guarantee = keyof typeof GUARANTEES

export interface Violation {
  guarantee: Guarantee
  key: string
  what: string
}

export interface Rules {
  guarantees: readonly Guarantee[]
  /** Besides final replies: statuses, with the code if the plugin's own. */
  answers?: readonly string[]
  /** What a request for a finished key may get instead of the replay. */
  excuses?: readonly string[]
  /** Is this reply final? By default as the plugin has it by default, without its own errors. */
  isFinal?: (exchange: Exchange) => boolean
}

/** Milliseconds on the machine's monotonic clock: the same for all processes, and no jump of the time of day moves it. */
export const now = (): number => Number(process.hrtime.bigint() / 1_000n) / 1_000

const CODE = 'FST_IDEMPOTENCY_'
const NOT_FINAL = [408, 425, 429]
const finalByDefault = ({ status = 0, code }: Exchange) =>
  status > 0 && status < 500 && !NOT_FINAL.includes(status) && !code?.startsWith(CODE)
const answerOf = ({ status, code }: Exchange) => (code === undefined ? String(status) : `${status} ${code}`)

/** All that is wrong in a history. */
export function violations({ exchanges, runs, absences = [] }: History, rules: Rules): Violation[] {
  const found: Violation[] = []
  const { answers = [], excuses = [], isFinal = finalByDefault } = rules
  const exchangesBy = byKey(exchanges)
  const runsBy = byKey(runs)
  for (const key of new Set([...exchangesBy.keys(), ...runsBy.keys()])) {
    const own = (runsBy.get(key) ?? []).toSorted((a, b) => a.started - b.started)
    const asked = (exchangesBy.get(key) ?? []).toSorted((a, b) => a.sent - b.sent)
    const answered = asked.filter(isAnswered)
    const finals = answered.filter(isFinal).toSorted((a, b) => a.got - b.got)
    const overtaken = new Set(own.filter((run) => isOvertaken(run, own, finals, absences)))
    // The late reply of an owner that was overtaken goes to its own client, and is not kept.
    const isLate = ({ text, replayed }: Exchange) => {
      const said = own.filter((run) => run.text === text)
      return !replayed && said.length > 0 && said.every((run) => overtaken.has(run))
    }
    const kept = finals.filter((answer) => !isLate(answer))
    const checks: Record<Guarantee, () => Generator<string>> = {
      *'one owner'() {
        for (const [n, run] of own.entries()) {
          for (const later of own.slice(n + 1)) {
            if (later.started < endOf(run, absences)) yield `run ${later.id} began while ${run.id} was at work`
          }
        }
      },
      *'one run'() {
        if (own.length > 1) yield `${own.length} runs: ${own.map(({ id }) => id).join(', ')}`
      },
      *'one final run'() {
        const final = own.filter((run) => run.final && run.ended !== null)
        const [first, ...others] = final.filter((run) => !overtaken.has(run))
        for (const { id } of others) yield `run ${id} is final, and so was ${first?.id}`
        for (const run of final) {
          // What was overtaken is kept only if somebody got it from there.
          const replay = finals.find(({ text, replayed }) => replayed && text === run.text)
          const from = overtaken.has(run) ? replay?.got : run.ended
          if (typeof from !== 'number') continue
          for (const later of own) {
            if (later !== run && later.started >= from && !others.includes(later)) {
              yield `run ${later.id} began after ${run.id} was final`
            }
          }
        }
      },
      *'same reply'() {
        for (const { status, text } of kept.slice(1)) {
          const [first] = kept as [Answered]
          if (status !== first.status || text !== first.text) {
            yield `${first.status} ${first.text}, and also ${status} ${text}`
          }
        }
      },
      *'no invention'() {
        for (const { payload, text, got, replayed } of finals) {
          const said = own.filter((run) => run.text === text)
          if (said.length === 0) yield `no run has said ${text}`
          else if (!said.some((run) => run.payload === payload)) yield `${text} was said to another payload`
          else if (!said.some((run) => run.started <= got)) yield `${text} arrived before it was said`
          else if (replayed && !said.some((run) => run.final !== false)) yield `${text} was replayed, and is not final`
        }
      },
      *'kept once seen'() {
        const [seen] = kept
        if (!seen) return
        for (const answer of answered) {
          if (answer.sent < seen.got || answer.payload !== seen.payload) continue
          const is = isFinal(answer) ? 'final' : answerOf(answer)
          if (is === 'final' ? !answer.replayed : !excuses.includes(is)) {
            yield `after ${seen.text} had been seen, a retry got ${answerOf(answer)} ${answer.text}`
          }
        }
      },
      *'marked replays'() {
        for (const text of new Set(own.map((run) => run.text))) {
          if (text === undefined) continue
          const said = own.filter((run) => run.text === text)
          const unmarked = finals.filter((answer) => answer.text === text && !answer.replayed)
          if (unmarked.length > said.length) {
            yield `${unmarked.length} clients got ${text} as if it were new, of ${said.length} runs`
          } else if (unmarked.some(({ sent }) => said.every(({ started }) => started < sent))) {
            yield `${text} was given as if it were new to a client that asked later`
          }
          for (const answer of finals) {
            const isAlone = asked.every(
              (other) =>
                other === answer || said.every((run) => other.sent > run.started || other.payload !== run.payload)
            )
            if (answer.text === text && answer.replayed && isAlone) {
              yield `${text} was marked as a replay for the only client that had asked`
            }
          }
        }
      },
      *'known answers'() {
        for (const answer of answered) {
          if (!isFinal(answer) && !answers.includes(answerOf(answer))) yield `${answerOf(answer)}: ${answer.text}`
        }
      },
      *'no lock-out'() {
        // Whoever sends something else under the same key is refused for good.
        const last = asked.findLast(({ payload }) => kept.length === 0 || payload === kept[0]?.payload)
        if (last === undefined) return
        if (!isAnswered(last)) yield 'the last request got no answer'
        else if (!isFinal(last)) yield `the last request got ${answerOf(last)} ${last.text}`
      },
      *'rising attempts'() {
        for (const [n, run] of own.entries()) {
          const before = own[n - 1]
          // After a release it starts at 1 again.
          const takesOver = before !== undefined && (before.ended === null || before.ended > run.started)
          if (takesOver && run.attempt <= before.attempt) {
            yield `run ${run.id} is attempt ${run.attempt}, after ${before.id}, attempt ${before.attempt}`
          }
          if (run.attempt < 1) yield `run ${run.id} is attempt ${run.attempt}`
        }
      },
      *'last word'() {
        const last = own.findLast(({ final }) => final)
        const replay = finals.findLast(({ replayed }) => replayed)
        if (last && replay && replay.sent > (last.ended as number) && replay.text !== last.text) {
          yield `${last.text} was the last, and ${replay.text} is replayed`
        }
      }
    }
    for (const guarantee of rules.guarantees) {
      for (const what of checks[guarantee]()) found.push({ guarantee, key, what })
    }
  }
  return found
}

/** Says which guarantees held, one assertion for each. */
export function holds(t: Test, history: History, rules: Rules): void {
  const found = violations(history, rules)
  for (const guarantee of rules.guarantees) {
    const against = found.filter((violation) => violation.guarantee === guarantee)
    const lines = against.slice(0, 10).map(({ key, what }) => `${key}: ${what}`)
    t.strictSame(lines, [], `${guarantee}: ${GUARANTEES[guarantee]}`)
  }
  t.comment(`${history.exchanges.length} requests, ${history.runs.length} runs, ${found.length} violations`)
}

function byKey<T extends { key: string }>(items: readonly T[]): Map<string, T[]> {
  const groups = new Map<string, T[]>()
  for (const item of items) {
    const group = groups.get(item.key)
    if (group) group.push(item)
    else groups.set(item.key, [item])
  }
  return groups
}

type Answered = Exchange & { got: number }

const isAnswered = (exchange: Exchange): exchange is Answered => exchange.got !== null

/** When a run was over for the others: at its end, or when its process went away. */
function endOf({ started, ended, worker }: Run, absences: readonly Absence[]): number {
  const away = absences.filter((absence) => absence.worker === worker && absence.to > started)
  return Math.min(ended ?? Number.POSITIVE_INFINITY, ...away.map(({ from }) => Math.max(from, started)))
}

/** Did another run begin after the process of this one had gone away, and before anybody had seen its reply? */
function isOvertaken(
  run: Run,
  all: readonly Run[],
  finals: readonly Answered[],
  absences: readonly Absence[]
): boolean {
  const first = finals.find(({ text }) => text !== undefined && text === run.text)
  const seen = first?.got ?? Number.POSITIVE_INFINITY
  const gone = endOf({ ...run, ended: null }, absences)
  return gone < seen && all.some((other) => other !== run && other.started >= gone && other.started < seen)
}
