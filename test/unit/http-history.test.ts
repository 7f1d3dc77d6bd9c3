import t from 'tap'
import {
  type Absence,
  type Exchange,
  GUARANTEES,
  type Guarantee,
  type History,
  type Rules,
  type Run,
  violations
} from '../support/http-history.js'

const ALL = Object.keys(GUARANTEES) as Guarantee[]
const IN_PROGRESS = '409 FST_IDEMPOTENCY_IN_PROGRESS'
const UNAVAILABLE = '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE'
const ANSWERS = [IN_PROGRESS, UNAVAILABLE, '422 FST_IDEMPOTENCY_KEY_REUSED', '500']

/** A run of process `a` from 10 to 20 that says 'first', unless told otherwise. */
const run = (change: Partial<Run> = {}): Run => ({
  id: 'r1',
  key: 'k',
  payload: 'p',
  worker: 'a',
  attempt: 1,
  started: 10,
  ended: 20,
  final: true,
  text: 'first',
  ...change
})

/** Another one, of process `b`, from 40 to 50, that says 'second'. */
const second = (change: Partial<Run> = {}) =>
  run({ id: 'r2', worker: 'b', attempt: 2, started: 40, ended: 50, text: 'second', ...change })

/** A request that was sent at 5 and got the first run's reply at 25. */
const got = (change: Partial<Exchange> = {}): Exchange => ({
  key: 'k',
  payload: 'p',
  sent: 5,
  got: 25,
  status: 200,
  text: 'first',
  replayed: false,
  worker: 'a',
  ...change
})

/** A request that was sent at 30 and got the reply as a replay at 35. */
const replay = (change: Partial<Exchange> = {}) => got({ sent: 30, got: 35, replayed: true, ...change })

const refused = (answer: string, change: Partial<Exchange> = {}): Exchange => {
  const [status, code] = answer.split(' ')
  return replay({ status: Number(status), code, text: `refused: ${answer}`, replayed: false, ...change })
}

const history = (runs: Run[], exchanges: Exchange[], ...absences: Absence[]): History => ({ runs, exchanges, absences })
const away = (from: number, to = Number.POSITIVE_INFINITY): Absence => ({ worker: 'a', from, to })

/** Those that hold in any case; the others are asked for where they are due. */
const ALWAYS = ALL.filter((name) => name !== 'one run' && name !== 'last word')

/** The names of the guarantees that did not hold. */
function broken(history: History, rules: Partial<Rules> = {}): string[] {
  const found = violations(history, { guarantees: ALWAYS, answers: ANSWERS, excuses: [UNAVAILABLE], ...rules })
  return [...new Set(found.map(({ guarantee }) => guarantee))]
}

t.test('a history in which all went well passes', async (t) => {
  const duplicates = [refused(IN_PROGRESS, { sent: 12, got: 13 }), replay({ sent: 15, got: 26 }), replay()]
  const well = history([run()], [got(), ...duplicates])
  t.strictSame(broken(well, { guarantees: ALL }), [])
  t.strictSame(broken(history([], []), { guarantees: ALL }), [])
})

t.test('keys have nothing to do with each other', async (t) => {
  const other = { key: 'other', text: 'second' }
  const both = history([run(), second({ ...other, started: 12, attempt: 1 })], [got(), got({ ...other, got: 60 })])
  t.strictSame(broken(both, { guarantees: ALL }), [])
})

t.test('only what is asked for is judged, and every violation says its key', async (t) => {
  const bad = history([run(), second()], [got(), refused('502')])
  t.strictSame(broken(bad, { guarantees: ['same reply'] }), [])
  const [violation] = violations(bad, { guarantees: ['known answers'], answers: [] })
  t.strictSame(violation, { guarantee: 'known answers', key: 'k', what: '502: refused: 502' })
})

const bad: Record<Guarantee, Record<string, History>> = {
  'one owner': {
    'a run begins while another is at work': history(
      [run({ final: false }), second({ started: 15, final: true })],
      [got({ text: 'second' })]
    ),
    'a run begins while one is at work that never ends': history(
      [run({ ended: null }), second()],
      [got({ text: 'second', got: 55 })]
    ),
    'the run at work is not the one before': history(
      [
        run({ ended: 60, final: false, text: 'x' }),
        second({ started: 12, ended: 13, final: false }),
        second({ id: 'r3' })
      ],
      [got({ text: 'second', got: 55 })],
      { worker: 'b', from: 5, to: 6 }
    ),
    'the process was away before, and is back': history(
      [run({ final: false }), second({ started: 15 })],
      [got({ text: 'second', got: 55 })],
      away(0, 10)
    ),
    'another process was away': history(
      [run({ final: false }), second({ started: 15 })],
      [got({ text: 'second', got: 55 })],
      { worker: 'c', from: 0, to: 100 }
    ),
    'the process went away later': history(
      [run({ ended: 60, final: false }), second({ started: 15 })],
      [got({ text: 'second', got: 55 })],
      away(16, 100)
    )
  },
  'one run': {
    'the first was not final': history(
      [run({ final: false }), second({ attempt: 1 })],
      [got({ text: 'second', got: 55 })]
    ),
    'the first died': history([run({ ended: null }), second()], [got({ text: 'second', got: 55 })], away(15))
  },
  'one final run': {
    'a final one after a final one': history([run(), second()], []),
    'one that is not final after a final one': history([run(), second({ final: false })], [got()]),
    'one that dies after a final one': history([run(), second({ ended: null })], [got()]),
    'after one whose reply had been seen when its process died': history(
      [run(), second({ final: false })],
      [got()],
      away(26)
    ),
    'after the late reply of an owner that was overtaken, which was kept all the same': history(
      [run({ ended: 60 }), second({ final: false }), second({ id: 'r3', started: 80, ended: 90, final: false })],
      [got({ got: 65 }), replay({ sent: 66, got: 70 })],
      away(15, 55)
    )
  },
  'same reply': {
    'another body': history(
      [run({ ended: null, text: 'other' }), second()],
      [got({ got: null }), got({ sent: 30, got: 55, text: 'second' }), replay({ sent: 60, got: 61, text: 'other' })],
      away(15)
    ),
    'another status': history([run()], [got(), replay({ status: 201 })]),
    'each of two runs has its listeners': history(
      [run({ ended: 60 }), second()],
      [got({ got: 65 }), replay({ got: 66 }), got({ sent: 36, got: 55, text: 'second', worker: 'b' })],
      away(15, 55)
    )
  },
  'no invention': {
    'what nobody has said': history([], [got()]),
    'what was said to another payload': history([run({ payload: 'q' })], [got()]),
    'what was said under another key': history([run({ key: 'other' })], [got()]),
    'what has not been said yet': history([run()], [got({ got: 9 })]),
    'a replay of what was not to be kept': history([run({ final: false })], [got({ sent: 5 }), replay()])
  },
  'kept once seen': {
    'the retry is told that it is in progress': history(
      [run()],
      [got(), refused(IN_PROGRESS), replay({ sent: 40, got: 41 })]
    ),
    'the retry gets an error of the handler': history([run()], [got(), refused('500'), replay({ sent: 40, got: 41 })]),
    'a waiter saw it first': history(
      [run()],
      [got({ got: 40 }), replay({ sent: 11, got: 25 }), refused(IN_PROGRESS), replay({ sent: 50, got: 51 })]
    ),
    'the late reply of an owner that was overtaken comes first, and the kept one is lost later': history(
      [run({ ended: 45 }), second()],
      [
        got({ got: 46 }),
        got({ sent: 30, got: 55, text: 'second' }),
        refused(IN_PROGRESS, { sent: 60, got: 61 }),
        replay({ sent: 62, got: 63, text: 'second' })
      ],
      away(15, 42)
    )
  },
  'marked replays': {
    'a waiter gets it as if it were new': history([run()], [got(), replay({ sent: 6, replayed: false })]),
    'the first client has left, and a later one gets it as if it were new': history(
      [run()],
      [got({ got: null }), got({ sent: 11 })]
    ),
    'the only client gets it as a replay': history([run()], [got({ replayed: true })]),
    'the only client that was first gets it as a replay': history([run()], [got({ replayed: true }), replay()]),
    'the other client had asked for something else': history(
      [run()],
      [got({ replayed: true }), refused('422 FST_IDEMPOTENCY_KEY_REUSED', { payload: 'q', sent: 6 })]
    )
  },
  'known answers': {
    'a status of nobody': history([run()], [got(), refused('502', { sent: 11 }), replay()]),
    'a status that is known, with a code that is not': history(
      [run()],
      [got(), refused('500 FST_X', { sent: 11 }), replay()]
    ),
    'a code of the plugin that is not expected': history(
      [run()],
      [got(), refused('409 FST_IDEMPOTENCY_ABANDONED', { sent: 11 }), replay()]
    )
  },
  'no lock-out': {
    'the last one is still told that it is in progress': history(
      [run({ ended: null })],
      [got({ got: null }), refused(IN_PROGRESS)],
      away(15)
    ),
    'the last one got no answer': history([run()], [got(), replay({ got: null })]),
    'all are refused because of somebody who never got a reply': history(
      [],
      [got({ got: null }), refused('422 FST_IDEMPOTENCY_KEY_REUSED', { payload: 'q' })]
    ),
    'a stranger comes after the last one': history(
      [run()],
      [got(), replay({ got: null }), refused('422 FST_IDEMPOTENCY_KEY_REUSED', { payload: 'q', sent: 40, got: 41 })]
    )
  },
  'rising attempts': {
    'the same again': history(
      [run({ ended: null }), second({ attempt: 1 })],
      [got({ got: 55, text: 'second' })],
      away(15)
    ),
    'a lower one': history([run({ ended: null, attempt: 3 }), second()], [got({ got: 55, text: 'second' })], away(15)),
    'none at all': history([run({ attempt: 0 })], [got()]),
    'the same as one that is still at work in a paused process': history(
      [run({ ended: 60 }), second({ attempt: 1 })],
      [got({ got: 55, text: 'second' })],
      away(15, 58)
    )
  },
  'last word': {
    'the late reply of an owner that was overtaken is replayed': history(
      [run({ ended: 110 }), second()],
      [got({ got: null }), replay({ sent: 120, got: 125 })],
      away(15, 105)
    )
  }
}

for (const [guarantee, cases] of Object.entries(bad)) {
  t.test(`reports what is against: ${guarantee}`, async (t) => {
    for (const [name, history] of Object.entries(cases)) {
      const guarantees = [...new Set([...ALWAYS, guarantee as Guarantee])]
      t.strictSame(broken(history, { guarantees }), [guarantee], name)
    }
  })
}

const fine: Record<string, History> = {
  'the reply of who took over is replayed, however late the owner replies': history(
    [run({ ended: 110 }), second()],
    [got({ got: null }), replay({ sent: 120, got: 125, text: 'second' })],
    away(15, 105)
  ),
  'a run begins at the moment in which the one before has ended': history(
    [run({ final: false }), second({ started: 20, attempt: 1 })],
    [got({ got: 55, text: 'second' })]
  ),
  'the run of a paused process overlaps': history(
    [run({ ended: 60, final: false }), second()],
    [got({ got: 55, text: 'second' })],
    away(15, 58)
  ),
  'the run of a paused process overlaps, of which a later pause is noted first': history(
    [run({ ended: 60, final: false }), second()],
    [got({ got: 55, text: 'second' })],
    away(57, 58),
    away(15, 56)
  ),
  'the run of a dead process has no end': history(
    [run({ ended: null }), second()],
    [got({ got: null }), got({ sent: 30, got: 55, text: 'second' })],
    away(15)
  ),
  'after a release attempts start at 1 again, while a paused run is at work that was taken over from': history(
    [
      run({ ended: 100, final: false }),
      second({ final: false }),
      second({ id: 'r3', started: 60, ended: 70, attempt: 1 })
    ],
    [got({ got: 75, text: 'second' })],
    away(15, 90)
  ),
  'the first run that is seen takes over from a process that died before its handler': history(
    [run({ attempt: 3 })],
    [got()]
  ),
  'a final run is repeated because its process died before anybody saw its reply': history(
    [run(), second()],
    [got({ got: null }), got({ sent: 30, got: 55, text: 'second' })],
    away(22)
  ),
  'the late reply of an owner that was overtaken goes to its own client': history(
    [run({ ended: 60 }), second()],
    [got({ got: 65 }), got({ sent: 30, got: 55, text: 'second' }), replay({ sent: 70, got: 71, text: 'second' })],
    away(15, 58)
  ),
  'while an owner that was overtaken has its late reply already, others are told to wait': history(
    [run({ ended: 42 }), second({ ended: 70 })],
    [
      got({ got: 43 }),
      got({ sent: 30, got: 75, text: 'second' }),
      refused(IN_PROGRESS, { sent: 50, got: 51 }),
      replay({ sent: 80, got: 81, text: 'second' })
    ],
    away(15, 41)
  ),
  'a request was under way when the reply was seen, and is refused': history(
    [run()],
    [got(), refused(IN_PROGRESS, { sent: 24, got: 60 }), replay()]
  ),
  'who asks later learns that the store cannot be asked': history(
    [run()],
    [got(), refused(UNAVAILABLE), replay({ sent: 40, got: 41 })]
  ),
  'who asks later for something else is refused': history(
    [run()],
    [got(), refused('422 FST_IDEMPOTENCY_KEY_REUSED', { payload: 'q' })]
  ),
  'a reply that is not final is not a replay, and need not be the same': history(
    [run({ final: false }), second({ attempt: 1 })],
    [
      refused('500', { sent: 5, got: 25 }),
      refused('429', { sent: 26, got: 27 }),
      got({ sent: 30, got: 55, text: 'second' })
    ]
  ),
  'the client of the run has left, and all others get replays': history([run()], [got({ got: null }), replay()]),
  'one of two clients at the same time is the one whose request ran': history(
    [run()],
    [got({ replayed: true }), got({ sent: 6 })]
  )
}

t.test('what only looks like a violation is not reported', async (t) => {
  for (const [name, history] of Object.entries(fine)) {
    t.strictSame(broken(history, { answers: [...ANSWERS, '429'] }), [], name)
  }
})

t.test('who says what is final can say something else', async (t) => {
  const failing = history([run({ text: 'oops' })], [got({ status: 500, text: 'oops' }), replay({ text: 'other' })])
  t.strictSame(broken(failing, { guarantees: ['same reply'] }), [])
  t.strictSame(broken(failing, { guarantees: ['same reply'], isFinal: () => true }), ['same reply'])
})
