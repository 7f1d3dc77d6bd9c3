import { Ended, failed, inWords, notDecidable, passed, shown } from '../finding.js'
import { type Exchange, header, type Reply } from '../http.js'
import type { Variant } from '../profile.js'
import { DRAFT, type Rule } from '../rule.js'
import { isAccepted, type Session } from '../session.js'

/* A retry gets the reply of the first request. */

const PRACTICE = 'common practice: Stripe, Adyen'

const sameStatus: Rule = {
  id: 'same-status',
  level: 'must',
  title: 'A retry gets the status of the first reply',
  source: `${DRAFT('2.6')}; ${PRACTICE}`,
  async check(session) {
    const { ask, exchange } = await session.first()
    const retry = await session.retry(session.request(ask))
    if (retry.reply?.status === exchange.reply?.status) return passed()
    return failed(`${exchange.reply?.status} became ${inWords(retry)}`, ...pair(exchange, retry))
  }
}

const sameBody: Rule = {
  id: 'same-body',
  level: 'must',
  title: 'A retry gets the body of the first reply',
  source: `${DRAFT('2.6')}; ${PRACTICE}`,
  check: async (session) => bodiesOf(session, {})
}

/** What of a reply tells what its body is, or where the result is to be found. */
const DESCRIBING = [
  'content-type',
  'content-encoding',
  'content-language',
  'content-disposition',
  'etag',
  'last-modified',
  'link',
  'location'
]

const sameHeaders: Rule = {
  id: 'same-headers',
  level: 'should',
  title: 'A retry gets the headers that belong to the reply, such as Content-Type and Location',
  source: 'RFC 9110 §8, §10.2.2 (what a reply means is in its headers too)',
  async check(session) {
    const { ask, exchange } = await session.first()
    const retry = await session.replay(session.request(ask))
    const lost = DESCRIBING.flatMap((name) => {
      const [first, later] = [header(exchange.reply, name), header(retry.reply, name)]
      return first === later ? [] : [`${name} was ${first ?? 'not there'}, and is ${later ?? 'not there'} in the retry`]
    })
    return lost.length === 0 ? passed() : failed(lost.join('; '), ...pair(exchange, retry))
  }
}

const replayMarked: Rule = {
  id: 'replay-marked',
  level: 'may',
  title: 'A header tells a replay from the first reply',
  source: 'common practice: Stripe (Idempotent-Replayed)',
  async check(session) {
    const { ask, exchange } = await session.first()
    const retry = await session.replay(session.request(ask))
    const names = (reply: Reply | null) => reply?.headers.map(([name]) => name) ?? []
    const { replayHeader } = session.profile
    const added = names(retry.reply).filter((name) => !names(exchange.reply).includes(name))
    const mark =
      replayHeader === undefined
        ? added.find((name) => /idempot|replay|cache|duplicate/.test(name))
        : replayHeader.toLowerCase()
    if (mark !== undefined && added.includes(mark)) return passed(`by ${mark}`)
    return failed(
      replayHeader === undefined ? 'no header of the replay says so' : `the replay alone should have ${replayHeader}`,
      ...pair(exchange, retry)
    )
  }
}

/** A reply of a kind that is easily spoilt. */
interface Kind {
  id: string
  title: string
  variant: 'binary' | 'stream' | 'large'
  /** Behind "the profile does not say". */
  what: string
  /** What is wrong with a reply that should be of this kind; `null` for nothing. */
  faultOf: (reply: Reply) => string | null
}

const LARGE_BYTES = 16_384

const byteForByte = ({ id, title, variant: name, what, faultOf }: Kind): Rule => ({
  id,
  level: 'may',
  title,
  source: 'RFC 9110 §6.4 (content is bytes)',
  async check(session) {
    const variant = session.variant(name, what)
    const { exchange } = await session.first({ variant })
    const fault = faultOf(exchange.reply as Reply)
    if (fault === null) return bodiesOf(session, { variant })
    const reason = `the reply to a request with "${name}" ${fault}`
    session.say(reason)
    return notDecidable(reason, shown('the request', exchange))
  }
})

const binaryReply = byteForByte({
  id: 'binary-reply',
  title: 'A reply that is not text is replayed byte for byte',
  variant: 'binary',
  what: 'which replies are not text',
  faultOf: ({ body }) => (Buffer.from(body.toString()).equals(body) ? 'is text' : null)
})
const streamedReply = byteForByte({
  id: 'streamed-reply',
  title: 'A reply that was streamed is replayed',
  variant: 'stream',
  what: 'which replies are streamed',
  // What keeps replies may read a stream to its end first: that cannot be told from no stream.
  faultOf: () => null
})
const largeReply = byteForByte({
  id: 'large-reply',
  title: 'A large reply is replayed',
  variant: 'large',
  what: 'which replies are large',
  faultOf: ({ body }) => (body.length < LARGE_BYTES ? `has ${body.length} bytes only` : null)
})

const failureNotStuck: Rule = {
  id: 'failure-not-stuck',
  level: 'should',
  title: 'A request that has failed is not taken for one that runs',
  source: `${DRAFT('2.6')}; ${PRACTICE}`,
  async check(session) {
    const { request, exchange } = await failure(session)
    const retry = await session.retry(request)
    if (retry.reply === null || retry.reply.status === 409 || retry.reply.status === 425) {
      return failed(`${exchange.reply?.status}, and then for seconds: ${inWords(retry)}`, ...pair(exchange, retry))
    }
    return passed()
  }
}

const failureConsistent: Rule = {
  id: 'failure-consistent',
  level: 'should',
  title: 'The retries of a request that has failed all get its reply, or are all carried out',
  source: `${DRAFT('2.6')}; common practice: Stripe replays errors, others run again`,
  async check(session) {
    const { request, exchange } = await failure(session)
    if (!session.executions.exact) return notDecidable('whether failures were carried out is not to be seen in replies')
    const ran: boolean[] = []
    let last = exchange
    for (let n = 0; n < 4; n++) {
      const { exchanges, count } = await session.counted(async () => [await session.retry(request)])
      last = exchanges[0] as Exchange
      if (last.reply?.status === 409) return notDecidable('it counts as one that runs: see failure-not-stuck')
      if (count === 0 && !isReplyOf(exchange, last)) {
        return failed(`not carried out, and another reply: ${inWords(last)}`, ...pair(exchange, last))
      }
      ran.push(count !== 0)
    }
    if (new Set(ran).size === 1) return passed(ran[0] ? 'they are carried out' : 'they get the reply of the failure')
    return failed(
      `of 4 retries ${ran.filter(Boolean).length} were carried out, and the others were not`,
      ...pair(exchange, last)
    )
  }
}

function isReplyOf({ reply: first }: Exchange, { reply: retry }: Exchange): boolean {
  return retry?.status === first?.status && retry?.body.equals(first?.body as Buffer) === true
}

async function failure(session: Session) {
  const request = session.request({ variant: session.variant('fail', 'how to make the endpoint fail') })
  const exchange = await session.send(request)
  if (exchange.reply === null || exchange.reply.status < 500) {
    const reason = `a request with "fail" does not fail: ${inWords(exchange)}`
    session.say(reason)
    throw new Ended(notDecidable(reason, shown('the request', exchange)))
  }
  return { request, exchange }
}

async function bodiesOf(session: Session, { variant }: { variant?: Variant }) {
  const { ask, exchange } = await session.first({ variant })
  const retry = await session.retry(session.request(ask))
  if (!isAccepted(retry)) {
    const refused = `the retry was refused: ${inWords(retry)}`
    return variant === undefined
      ? notDecidable(refused, ...pair(exchange, retry))
      : failed(refused, ...pair(exchange, retry))
  }
  const [one, other] = [exchange.reply?.body as Buffer, retry.reply?.body as Buffer]
  if (one.equals(other)) return passed()
  const what = variant === undefined ? inWords(retry) : `${one.length} bytes became ${other.length}`
  return failed(`another body: ${what}`, ...pair(exchange, retry))
}

function pair(first: Exchange, retry: Exchange) {
  return [shown('the first request', first), shown('the retry', retry)]
}

export const REPLIES: readonly Rule[] = [
  sameStatus,
  sameBody,
  sameHeaders,
  failureNotStuck,
  failureConsistent,
  replayMarked,
  binaryReply,
  streamedReply,
  largeReply
]
