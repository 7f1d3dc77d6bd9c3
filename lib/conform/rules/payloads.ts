import { failed, inWords, notApplicable, notDecidable, passed, shown } from '../finding.js'
import type { Exchange } from '../http.js'
import { isObject } from '../json-value.js'
import { DRAFT, type Rule } from '../rule.js'
import { isAccepted, type Session } from '../session.js'

/* A key belongs to one request: another one with it is neither carried out nor answered with the first one's reply. */

const otherPayloadNotExecuted: Rule = {
  id: 'other-payload-not-executed',
  level: 'must',
  title: 'A key that was used with another payload is not carried out',
  source: DRAFT('2.7'),
  async check(session) {
    let isHidden = false
    for (const body of bodies(session)) {
      const { first, other, isRun } = await another(session, body)
      if (isRun ?? (isAccepted(other) && !session.isSame(first, other))) {
        return failed('it was carried out', ...both(first, other))
      }
      isHidden ||= isRun === null && !isAccepted(other)
    }
    return isHidden ? notDecidable('it was refused; whether it was carried out is not to be seen in replies') : passed()
  }
}

const otherPayloadNoReply: Rule = {
  id: 'other-payload-no-reply',
  level: 'must',
  title: 'A key that was used with another payload does not get the reply to that one',
  source: DRAFT('2.7'),
  async check(session) {
    for (const body of bodies(session)) {
      const { first, other } = await another(session, body)
      session.needsMarks(first)
      if (isAccepted(other) && session.isSame(first, other)) {
        return failed('it got the reply to another payload, as if it had been carried out', ...both(first, other))
      }
    }
    return passed()
  }
}

const otherPayloadWhileRunning: Rule = {
  id: 'other-payload-while-running',
  level: 'must',
  title: 'While a request runs, its key with another payload is neither carried out nor answered with its reply',
  source: DRAFT('2.7'),
  async check(session) {
    const { first, others, count } = await session.whileRunning(async (ask) => [
      await session.send(session.request({ ...ask, body: session.otherBody() }))
    ])
    const [second] = others as [Exchange]
    if (!isAccepted(first)) return notDecidable(`the first request was not accepted: ${inWords(first)}`)
    if (count !== null && count > 1) return failed('both were carried out', ...both(first, second))
    if (isAccepted(second)) return failed('it got the reply to another payload', ...both(first, second))
    return passed()
  }
}

const mismatchKeepsReply: Rule = {
  id: 'mismatch-keeps-reply',
  level: 'must',
  title: 'A refused request does not change what retries of the first one get',
  source: DRAFT('2.6'),
  async check(session) {
    const { ask, first, other } = await another(session)
    if (isAccepted(other))
      return notDecidable('another payload is not refused: see other-payload-not-executed and other-payload-no-reply')
    const retry = await session.retry(session.request(ask))
    if (isAccepted(retry) && session.isSame(first, retry)) return passed()
    return failed(
      `the retry got something else: ${inWords(retry)}`,
      ...both(first, other),
      shown('a retry of the first request', retry)
    )
  }
}

const otherPayload422: Rule = {
  id: 'other-payload-422',
  level: 'should',
  title: 'A key that was used with another payload is refused with 422',
  source: DRAFT('2.7'),
  async check(session) {
    const { first, other } = await another(session)
    if (isAccepted(other))
      return notDecidable('it is not refused: see other-payload-not-executed and other-payload-no-reply')
    return other.reply?.status === 422
      ? passed()
      : failed(`refused otherwise: ${inWords(other)}`, ...both(first, other))
  }
}

const byValue: Rule = {
  id: 'by-value',
  level: 'may',
  title: 'JSON with other white space and another order of members is the same payload',
  source: 'RFC 8259 §1 (objects are unordered), RFC 8785 (how to compare them)',
  async check(session) {
    const { body } = session.profile
    if (!isObject(body)) return notApplicable('the payload of the profile is no object of JSON')
    const compared = await another(session)
    if (isAccepted(compared.other)) return notApplicable('payloads are not compared: see other-payload-no-reply')
    const { ask, exchange } = await session.first()
    const reversed = Object.fromEntries(Object.entries(body).reverse())
    const text = JSON.stringify(reversed, null, 4)
    const retry = await session.retry(session.request({ ...ask, text }))
    if (isAccepted(retry) && session.isSame(exchange, retry)) return passed()
    return failed(`it counts as another: ${inWords(retry)}`, ...both(exchange, retry))
  }
}

const otherTargetNoReply: Rule = {
  id: 'other-target-no-reply',
  level: 'must',
  title: 'A key that was used at another URL does not get the reply from there',
  source: 'RFC 9110 §3.1 (a request is for its target); common practice: Adyen',
  async check(session) {
    const { otherPath } = session.profile
    if (otherPath === undefined) return notApplicable('the profile names no other URL ("otherPath")')
    await session.first({ path: otherPath })
    const { ask, exchange } = await session.first()
    session.needsMarks(exchange)
    const other = await session.send(session.request({ ...ask, path: otherPath }))
    return isAccepted(other) && session.isSame(exchange, other)
      ? failed('it got the reply from another URL, as if it had been carried out', ...both(exchange, other))
      : passed()
  }
}

const otherQueryNoReply: Rule = {
  id: 'other-query-no-reply',
  level: 'should',
  title: 'A key that was used with another query does not get the reply to that one',
  source: 'RFC 9110 §3.1, RFC 3986 §3.4 (the query is a part of the target)',
  async check(session) {
    await session.first({ query: 'other=1' })
    const { ask, exchange } = await session.first()
    session.needsMarks(exchange)
    const other = await session.send(session.request({ ...ask, query: 'other=1' }))
    return isAccepted(other) && session.isSame(exchange, other)
      ? failed('it got the reply to another query', ...both(exchange, other))
      : passed()
  }
}

/** Other payloads, of which there is one at least. */
function bodies(session: Session): readonly unknown[] {
  session.otherBody()
  return session.others
}

/** A key with one payload, and then with another. */
async function another(session: Session, body = session.otherBody()) {
  const { ask, exchange: first } = await session.first()
  const { exchange: other, isRun } = await session.probe(session.request({ ...ask, body }))
  return { ask, first, other, isRun }
}

function both(first: Exchange, other: Exchange) {
  return [shown('the first request', first), shown('another one with the same key', other)]
}

export const PAYLOADS: readonly Rule[] = [
  otherPayloadNotExecuted,
  otherPayloadNoReply,
  otherPayloadWhileRunning,
  mismatchKeepsReply,
  otherTargetNoReply,
  otherQueryNoReply,
  otherPayload422,
  byValue
]
