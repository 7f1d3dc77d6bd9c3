import { exec } from 'node:child_process'
import { promisify } from 'node:util'
import { type Exchange, json, type Reply, send } from './http.js'
import { at } from './json-value.js'
import type { Counter, Headers } from './profile.js'

/* How it is known how often the endpoint has carried something out. */

const run = promisify(exec)

/** Counts executions. */
export interface Executions {
  /** In words, for the report. */
  readonly by: string
  /** Does it see those that no reply tells of? */
  readonly exact: boolean
  /** All executions so far. Only where it is exact. */
  total(): Promise<number>
  /** What tells the execution that made a reply from others; `null` where nothing does. */
  mark(reply: Reply | null): string | null
}

/** Executions cannot be counted: the counter's answer is none. */
export class CountError extends Error {
  /** Because nobody answers. */
  readonly isGone: boolean

  constructor(message: string, isGone = false) {
    super(message)
    this.isGone = isGone
  }
}

/** Counts at a URL, or by a command. */
export function countedBy(
  counter: Exclude<Counter, { reply: unknown }>,
  {
    base,
    timeout,
    headers,
    pointers
  }: { base: URL; timeout: number; headers: Headers; pointers: readonly string[] | null }
): Executions {
  const mark = markedBy(pointers)
  if ('command' in counter) {
    const total = async () => {
      const { stdout } = await run(counter.command, { timeout }).catch((error: Error) => {
        throw new CountError(`The command that counts executions failed: ${error.message}`)
      })
      return numberOf(stdout.trim(), `The command "${counter.command}"`)
    }
    return { by: `the command "${counter.command}"`, exact: true, total, mark }
  }
  const url = new URL(counter.url, base)
  const total = async () => {
    const lines = Object.entries({ ...headers, ...counter.headers })
    const { reply, failure } = await send({ method: 'GET', url, headers: lines, body: '' }, { timeout })
    if (reply?.status !== 200)
      throw new CountError(`${url} does not count executions: ${failure ?? reply?.status}`, failure === 'ECONNREFUSED')
    return numberOf(at(json(reply), counter.pointer ?? ''), `${url}`)
  }
  return { by: `GET ${url.pathname}`, exact: true, total, mark }
}

function numberOf(value: unknown, who: string): number {
  const number = value === '' ? Number.NaN : Number(value)
  if (!Number.isSafeInteger(number))
    throw new CountError(`${who} does not count executions: it says ${JSON.stringify(value)}`)
  return number
}

/** Counts by what replies say: what no reply tells of is not seen. */
export function countedByReplies(pointers: readonly string[] | null): Executions {
  const by =
    pointers === null
      ? 'nothing: replies to different keys are all the same'
      : pointers.length === 0
        ? 'the whole body of replies'
        : `${pointers.join(', ')} of replies`
  const total = () => Promise.reject(new CountError('Executions are counted by replies'))
  return { by, exact: false, total, mark: markedBy(pointers) }
}

/** @param pointers Members that differ from execution to execution; none of them: the whole body. */
function markedBy(pointers: readonly string[] | null): Executions['mark'] {
  return (reply) => {
    if (pointers === null || reply === null || reply.status >= 400) return null
    if (pointers.length === 0) return String(reply.body)
    const body = json(reply)
    const values = pointers.map((pointer) => at(body, pointer))
    return values.every((value) => value === undefined) ? null : JSON.stringify(values)
  }
}

/** How many executions made these replies; `null` where that cannot be told. */
export function executionsIn(exchanges: readonly Exchange[], executions: Executions): number | null {
  const marks = exchanges.map(({ reply }) => executions.mark(reply)).filter((mark) => mark !== null)
  return marks.length === 0 ? null : new Set(marks).size
}
