import { Ended, failed, inWords, notApplicable, notDecidable, passed, shown } from '../finding.js'
import { type Exchange, header } from '../http.js'
import { DRAFT, type Rule } from '../rule.js'
import { isAccepted, isRefused, type Session } from '../session.js'

/* What a duplicate gets while the first request runs. */

const inProgress409: Rule = {
  id: 'in-progress-409',
  level: 'should',
  title: 'A duplicate is refused with 409 while the first request runs',
  source: DRAFT('2.7'),
  async check(session) {
    const { first, duplicate } = await duplicates(session)
    if (!isRefused(duplicate)) return notApplicable(`duplicates are not refused: ${inWords(duplicate)}`)
    return duplicate.reply?.status === 409
      ? passed()
      : failed(`refused otherwise: ${inWords(duplicate)}`, ...both(first, duplicate))
  }
}

const retryAfter: Rule = {
  id: 'retry-after',
  level: 'should',
  title: 'A duplicate that is refused while the first request runs is told when to try again',
  source: 'RFC 9110 §10.2.3 (Retry-After)',
  async check(session) {
    const { first, duplicate } = await duplicates(session)
    if (!isRefused(duplicate)) return notApplicable(`duplicates are not refused: ${inWords(duplicate)}`)
    const value = header(duplicate.reply, 'retry-after')
    // Seconds or an HTTP date.
    if (value !== undefined && (/^\d+$/.test(value) || !Number.isNaN(Date.parse(value)))) return passed()
    const what = value === undefined ? 'there is no Retry-After' : `Retry-After is neither seconds nor a date: ${value}`
    return failed(what, ...both(first, duplicate))
  }
}

const conflictKeepsReply: Rule = {
  id: 'conflict-keeps-reply',
  level: 'must',
  title: 'A duplicate that is refused while the first request runs changes nothing for the retries after that',
  source: DRAFT('2.6'),
  async check(session) {
    const { first, others, count } = await session.whileRunning(
      async (ask) => {
        const request = session.request(ask)
        return [await session.send(request), await session.send(request)]
      },
      async (ask) => [await session.retry(session.request(ask))]
    )
    const [duplicate, , retry] = others as [Exchange, Exchange, Exchange]
    if (!isRefused(duplicate)) return notApplicable('duplicates are not refused')
    if (!isAccepted(first)) return notDecidable(`the first request was not accepted: ${inWords(first)}`)
    const all = [...both(first, duplicate), shown('a retry when it had ended', retry)]
    if (count !== null && count > 1) return failed(`it was carried out ${count} times`, ...all)
    if (!isAccepted(retry) || !session.isSame(first, retry)) {
      return failed(`the retry got something else: ${inWords(retry)}`, ...all)
    }
    return passed()
  }
}

const waiting: Rule = {
  id: 'waiting',
  level: 'may',
  title: 'A duplicate that is not refused while the first request runs waits, and gets its reply',
  source: 'common practice: an alternative to the 409',
  async check(session) {
    const { first, duplicate } = await duplicates(session)
    if (isRefused(duplicate)) return notApplicable(`duplicates are refused: ${duplicate.reply?.status}`)
    if (isAccepted(duplicate) && session.isSame(first, duplicate)) return passed()
    return failed(`the duplicate got something else: ${inWords(duplicate)}`, ...both(first, duplicate))
  }
}

const otherKeyWhileRunning: Rule = {
  id: 'other-key-while-running',
  level: 'should',
  title: 'While a request runs, one with another key is carried out',
  source: DRAFT('2.2'),
  async check(session) {
    const { first, others } = await session.whileRunning(async () => [await session.send(session.request())])
    const [other] = others as [Exchange]
    if (!isAccepted(first)) return notDecidable(`the first request was not accepted: ${inWords(first)}`)
    if (isAccepted(other)) return passed()
    return failed(
      `it was refused: ${inWords(other)}`,
      shown('the first request', first),
      shown('one with another key while it ran', other)
    )
  }
}

async function duplicates(session: Session): Promise<{ first: Exchange; duplicate: Exchange }> {
  const { first, others } = await session.whileRunning(async (ask) => [await session.send(session.request(ask))])
  if (!isAccepted(first)) {
    throw new Ended(
      notDecidable(`the first request was not accepted: ${inWords(first)}`, shown('the first request', first))
    )
  }
  return { first, duplicate: others[0] as Exchange }
}

function both(first: Exchange, duplicate: Exchange) {
  return [shown('the first request', first), shown('the same while it ran', duplicate)]
}

export const RUNNING: readonly Rule[] = [conflictKeepsReply, inProgress409, retryAfter, otherKeyWhileRunning, waiting]
