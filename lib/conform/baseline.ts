import { countedBy, countedByReplies } from './executions.js'
import { inWords } from './finding.js'
import { type Exchange, json } from './http.js'
import { differences } from './json-value.js'
import { isAccepted, type Session } from './session.js'

/** The endpoint cannot be tried: it does not answer, or not as the profile says. */
export class ConformError extends Error {
  override readonly name = 'ConformError'
}

/**
 * Sends two ordinary requests, to see that the endpoint takes them, and what tells executions apart.
 * @throws ConformError, which says what to mend
 */
export async function baseline(session: Session): Promise<void> {
  const { profile, base, limits } = session
  const named = profile.count !== undefined && 'reply' in profile.count ? [profile.count.reply].flat() : null
  const counter = profile.count !== undefined && !('reply' in profile.count) ? profile.count : null
  const exact = (pointers: readonly string[] | null) =>
    counter && countedBy(counter, { base, timeout: limits.timeout, headers: { ...profile.callers?.[0] }, pointers })

  const before = await exact(null)?.total()
  const one = await accepted(session)
  const other = await accepted(session)
  const pointers = named ?? whatDiffers(one, other)
  if (named !== null) {
    const { mark } = countedByReplies(named)
    if (mark(one.reply) === mark(other.reply)) {
      throw new ConformError(
        `${named.join(', ')} of the reply is the same in two executions: ${inWords(one)}. Name a member that is another each time`
      )
    }
  }
  session.executions = exact(pointers) ?? countedByReplies(pointers)
  if (before === undefined) return
  const count = (await session.executions.total()) - before
  if (count === 2) return
  throw new ConformError(
    count === 0
      ? `Two requests with new keys were not carried out, says ${session.executions.by}: the keys of the seed ` +
          `"${session.seed}" may be known there from an earlier run`
      : `${session.executions.by} counted ${count} executions of two requests: nobody else may use the endpoint meanwhile`
  )
}

async function accepted(session: Session): Promise<Exchange> {
  const exchange = await session.send(session.request())
  if (isAccepted(exchange)) {
    const mark = exchange.reply?.headers.find(([name]) => /idempot\w*-replayed/.test(name))
    if (mark?.[1] !== 'true') return exchange
    throw new ConformError(
      `The keys of the seed "${session.seed}" are known there from an earlier run: take another one`
    )
  }
  const { method, url } = exchange.request
  throw new ConformError(
    `${method} ${url} does not accept the request of the profile: ${inWords(exchange)}. Say in a profile what it takes ` +
      '("method", "headers", "body", "key", "callers")'
  )
}

/** Members that differ from execution to execution; none: the body as a whole does; `null`: nothing does. */
function whatDiffers(one: Exchange, other: Exchange): readonly string[] | null {
  const [first, second] = [json(one.reply), json(other.reply)]
  if (first !== undefined && second !== undefined) {
    const pointers = differences(first, second)
    if (pointers.length > 0) return pointers
  }
  return one.reply?.body.equals(other.reply?.body as Buffer) ? null : []
}
