import { Ended, type Finding, failed, inWords, notApplicable, notDecidable, passed, shown } from '../finding.js'
import type { Exchange } from '../http.js'
import { DRAFT_SECURITY, type Rule } from '../rule.js'
import { isAccepted, type Session } from '../session.js'

/* Nobody gets what is somebody else's. */

const otherCallerNoReply: Rule = {
  id: 'other-caller-no-reply',
  level: 'must',
  title: "A caller's key does not get another caller's reply",
  source: `${DRAFT_SECURITY} (data leaks)`,
  async check(session) {
    const other = callers(session)[1]
    const { ask, exchange } = await session.first()
    session.needsMarks(exchange)
    const second = await session.send(session.request({ ...ask, caller: other }))
    if (isAccepted(second) && session.isSame(exchange, second)) {
      return failed(
        "the second caller got the first one's reply",
        shown('the first caller', exchange),
        shown('the second caller, with the same key', second)
      )
    }
    if (session.profile.slow === undefined) return passed()
    const met = await session.whileRunning(async (slow) => [
      await session.send(session.request({ ...slow, caller: other }))
    ])
    const [waiting] = met.others as [Exchange]
    if (isAccepted(met.first) && isAccepted(waiting) && session.isSame(met.first, waiting)) {
      return failed(
        "while it ran, the second caller waited for the first one's reply, and got it",
        shown('the first caller', met.first),
        shown('the second caller, with the same key', waiting)
      )
    }
    return passed()
  }
}

const credentialsBeforeReplay: Rule = {
  id: 'credentials-before-replay',
  level: 'must',
  title: 'Who is refused does not get a stored reply either',
  source: `RFC 9110 §11 (authentication); ${DRAFT_SECURITY}`,
  async check(session) {
    callers(session)
    const { anonymous = {} } = session.profile
    const alone = await session.send(session.request({ caller: anonymous }))
    if (isAccepted(alone)) return letIn(session, alone)
    const { ask, exchange } = await session.first()
    const second = await session.send(session.request({ ...ask, caller: anonymous }))
    if (!isAccepted(second) && !second.reply?.body.equals(exchange.reply?.body as Buffer)) return passed()
    return failed(
      `a key alone was enough to get the reply: ${inWords(second)}`,
      shown('the first request', exchange),
      shown('the same without credentials', second)
    )
  }
}

const refusedCallerKeepsReply: Rule = {
  id: 'refused-caller-keeps-reply',
  level: 'must',
  title: "Who is refused does not change what a caller's key gets, before and after the caller has used it",
  source: DRAFT_SECURITY,
  async check(session) {
    callers(session)
    const { anonymous = {} } = session.profile
    const key = session.key()
    const before = await session.send(session.request({ key, caller: anonymous }))
    if (isAccepted(before)) return letIn(session, before)
    const first = await session.send(session.request({ key }))
    if (!isAccepted(first)) {
      await session.first()
      return failed(
        `the caller's own request was refused after that: ${inWords(first)}`,
        shown('a request without credentials', before),
        shown("the caller's first request with that key", first)
      )
    }
    const between = await session.send(session.request({ key, caller: anonymous }))
    const retry = await session.retry(session.request({ key }))
    if (isAccepted(retry) && session.isSame(first, retry)) return passed()
    return failed(
      `the caller's retry got something else: ${inWords(retry)}`,
      shown('the first request', first),
      shown('the same without credentials', between),
      shown("the caller's retry", retry)
    )
  }
}

/** Who should be refused is not. */
function letIn(session: Session, exchange: Exchange): Finding {
  const reason = 'a request with the headers of "anonymous" is accepted'
  session.say(reason)
  return notDecidable(reason, shown('a request of theirs', exchange))
}

function callers({ profile }: Session) {
  if (profile.callers === undefined) throw new Ended(notApplicable('the profile names no callers ("callers")'))
  return profile.callers
}

export const CALLERS: readonly Rule[] = [otherCallerNoReply, credentialsBeforeReplay, refusedCallerKeepsReply]
