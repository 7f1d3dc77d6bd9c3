import { setTimeout as sleep } from 'node:timers/promises'
import { failed, inWords, notApplicable, notDecidable, passed, type Shown, shown } from '../finding.js'
import { type Exchange, header, json, send } from '../http.js'
import { isObject } from '../json-value.js'
import { DRAFT, type Rule } from '../rule.js'
import { isAccepted, isRefused, type Session } from '../session.js'

/* What clients are told: in refusals, and in documents. */

const problemDetails: Rule = {
  id: 'problem-details',
  level: 'should',
  title: 'A refusal says what the problem is, or links to where that is said',
  source: `${DRAFT('2.7')}; RFC 9457`,
  async check(session) {
    const refusals = await refused(session)
    if (refusals.length === 0) return notApplicable('nothing was refused')
    for (const { what, exchange } of refusals) {
      const fault = faultOf(exchange)
      if (fault !== null) return failed(`${what}: ${fault}`, shown(what, exchange))
    }
    return passed()
  }
}

async function refused(session: Session): Promise<Shown[]> {
  const { ask } = await session.first()
  const all = [
    shown(
      'a key with another payload',
      await session.send(session.request({ ...ask, body: session.others[0] ?? session.profile.otherBodies[0] }))
    )
  ]
  if (session.profile.key.required) all.push(shown('no key', await session.send(session.request({ key: null }))))
  if (session.profile.slow !== undefined) {
    const { others } = await session.whileRunning(async (slow) => [await session.send(session.request(slow))])
    all.push(shown('a duplicate while the first request runs', others[0] as Exchange))
  }
  return all.filter(({ exchange }) => isRefused(exchange))
}

/** What is wrong with a refusal; `null` for nothing. */
function faultOf({ reply }: Exchange): string | null {
  if (/rel="?describedby"?/.test(header(reply, 'link') ?? '')) return null
  const type = header(reply, 'content-type') ?? 'none'
  if (!/^application\/problem\+json\b/.test(type)) {
    return `neither application/problem+json nor a Link with rel="describedby" (its type is ${type})`
  }
  const problem = json(reply)
  if (!isObject(problem)) return 'its body is no object of JSON'
  if ('status' in problem && problem.status !== reply?.status) {
    return `the member "status" is ${problem.status}, and the status ${reply?.status}`
  }
  return typeof problem.title === 'string' || typeof problem.type === 'string'
    ? null
    : 'it has neither "type" nor "title"'
}

const expiry: Rule = {
  id: 'expiry',
  level: 'may',
  title: 'A key that has expired is a new one',
  source: DRAFT('2.3'),
  async check(session) {
    const { expiring, expiryMs } = session.profile
    if (expiryMs === undefined) return notApplicable('the profile does not say when keys expire ("expiryMs")')
    const { ask, exchange } = await session.first({ variant: expiring })
    session.needsMarks(exchange)
    const soon = await session.retry(session.request(ask))
    if (!isAccepted(soon) || !session.isSame(exchange, soon)) {
      return notDecidable(`before that it is no replay: ${inWords(soon)}`, shown('the retry', soon))
    }
    await sleep(expiryMs * 1.5)
    const late = await session.retry(session.request(ask))
    if (isAccepted(late) && !session.isSame(exchange, late)) return passed()
    return failed(
      `after ${expiryMs * 1.5} ms it was not carried out anew: ${inWords(late)}`,
      shown('the first request', exchange),
      shown('the same after its expiry', late)
    )
  }
}

const expiryPublished: Rule = {
  id: 'expiry-published',
  level: 'may',
  title: 'It is published how long keys are kept',
  source: DRAFT('2.3, §2.5'),
  async check({ base, profile, limits }) {
    const { documentation, key } = profile
    if (documentation === undefined) {
      return notDecidable('documents are not to be seen over HTTP: name a page in the profile ("documentation")')
    }
    const request = { method: 'GET', url: new URL(documentation, base), headers: [], body: '' }
    const page = await send(request, { timeout: limits.timeout })
    const text = String(page.reply?.body ?? '').toLowerCase()
    const says = text.includes(key.header.toLowerCase()) && /expir|ttl|lifetime|retain|kept for/.test(text)
    if (isAccepted(page) && says) return passed()
    return failed(`${request.url} says nothing of how long a key of ${key.header} is kept`, shown('the page', page))
  }
}

export const PUBLISHED: readonly Rule[] = [problemDetails, expiry, expiryPublished]
