import { failed, inWords, notApplicable, notDecidable, passed, shown } from '../finding.js'
import { DRAFT, DRAFT_SECURITY, type Rule } from '../rule.js'
import { isAccepted, isRefused, type Session } from '../session.js'

/* What a key is, and what is none. */

const differentKeys: Rule = {
  id: 'different-keys',
  level: 'must',
  title: 'Keys that are different are different, in their last letter as well',
  source: DRAFT('2.2'),
  async check(session) {
    for (const [what, one, other] of alike(session)) {
      const { exchange } = await session.first({ key: session.written(one) })
      session.needsMarks(exchange)
      const second = await session.send(session.request({ key: session.written(other) }))
      if (isAccepted(second) && session.isSame(exchange, second)) {
        return failed(
          `keys that differ ${what} count as one`,
          shown('the first request', exchange),
          shown('one with another key', second)
        )
      }
    }
    return passed()
  }
}

/** Pairs of keys that somebody might take for one. */
function alike(session: Session): [what: string, one: string, other: string][] {
  const { format, maxLength } = session.profile.key
  const [uuid, second, third, fourth] = [session.uuid(), session.uuid(), session.uuid(), session.uuid()]
  const last = uuid.endsWith('0') ? '1' : '0'
  const pairs: [string, string, string][] = [['in their last digit', uuid, uuid.slice(0, -1) + last]]
  // The letter case of UUIDs is of no account (RFC 9562 §4).
  if (format === 'uuid') return pairs
  if (maxLength >= 42) {
    pairs.push(['in letter case', `${second}-order`, `${second}-ORDER`])
    pairs.push(['in what is added to one of them', third, `${third}:1`])
  }
  if (maxLength >= 64) {
    const long = fourth.padEnd(Math.min(maxLength, 255) - 1, '-')
    pairs.push([`in their last letter, the ${long.length + 1}th`, `${long}a`, `${long}b`])
  }
  return pairs
}

const emptyKeyNotExecuted: Rule = {
  id: 'empty-key-not-executed',
  level: 'must',
  title: 'A key that is none is refused, and not carried out as if there were no key',
  source: DRAFT_SECURITY,
  async check(session) {
    const keys = malformed(session)
    if (keys.length === 0) return notApplicable(`any text is a key, and ${OPTIONAL}`)
    for (const key of keys) {
      const { exchange, isRun } = await session.probe(session.request({ key }))
      if (isAccepted(exchange) || isRun) {
        return failed(`carried out with the key ${JSON.stringify(key)}`, shown('the request', exchange))
      }
    }
    return passed()
  }
}

const malformedKeyRefused: Rule = {
  id: 'malformed-key-refused',
  level: 'should',
  title: 'A key that is none, and two keys in one request, are refused with a 4xx',
  source: `RFC 9110 §5.3, §15.5; ${DRAFT('2.1')}`,
  async check(session) {
    const two = [session.key(), session.key()]
    for (const key of [...malformed(session), two]) {
      const exchange = await session.send(session.request({ key }))
      // What is accepted although it is no key is another rule's.
      if (isRefused(exchange) || (isAccepted(exchange) && key !== two)) continue
      const what = key === two ? 'two keys' : `the key ${JSON.stringify(key)}`
      return failed(`${what}: ${inWords(exchange)}`, shown('the request', exchange))
    }
    return passed()
  }
}

function malformed(session: Session): string[] {
  const { format, required } = session.profile.key
  // Where a key is not needed, an empty one may be taken for none.
  const keys = required ? [''] : []
  if (format === 'uuid') keys.push('not-a-uuid')
  if (format === 'structured') keys.push(`"${session.uuid()}`)
  return keys
}

const missingKeyNotExecuted: Rule = {
  id: 'missing-key-not-executed',
  level: 'must',
  title: 'A request without a key is not carried out, where a key is required',
  source: DRAFT('2.7'),
  async check(session) {
    if (!session.profile.key.required) return notApplicable(OPTIONAL)
    const { exchange, isRun } = await session.probe(session.request({ key: null }))
    if (isAccepted(exchange) || isRun) {
      return failed('it was carried out', shown('the request', exchange))
    }
    return passed()
  }
}

const missingKey400: Rule = {
  id: 'missing-key-400',
  level: 'should',
  title: 'A request without a key is refused with 400, where a key is required',
  source: DRAFT('2.7'),
  async check(session) {
    if (!session.profile.key.required) return notApplicable(OPTIONAL)
    const exchange = await session.send(session.request({ key: null }))
    if (isAccepted(exchange)) return notDecidable('it is not refused: see missing-key-not-executed')
    return exchange.reply?.status === 400
      ? passed()
      : failed(`refused otherwise: ${inWords(exchange)}`, shown('the request', exchange))
  }
}

const OPTIONAL = 'the profile does not say that keys are required ("key": { "required": true })'

const structuredKey: Rule = {
  id: 'structured-key',
  level: 'may',
  title: 'A key may be a quoted string',
  source: `${DRAFT('2.1')}; RFC 9651 §3.3.3`,
  async check(session) {
    const request = session.request({ key: `"${session.uuid()}"` })
    const first = await session.send(request)
    const retry = await session.retry(request)
    if (isAccepted(first) && isAccepted(retry) && session.isSame(first, retry)) return passed()
    return failed(
      `refused or not known again: ${inWords(retry)}`,
      shown('the first request', first),
      shown('the retry', retry)
    )
  }
}

export const KEYS: readonly Rule[] = [
  differentKeys,
  emptyKeyNotExecuted,
  missingKeyNotExecuted,
  missingKey400,
  malformedKeyRefused,
  structuredKey
]
