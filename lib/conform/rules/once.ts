import { setTimeout as sleep } from 'node:timers/promises'
import { failed, inWords, notDecidable, passed, shown } from '../finding.js'
import { Connection, type Exchange } from '../http.js'
import { DRAFT, type Rule } from '../rule.js'
import { inOrder, isAccepted, PATIENCE_MS, type Session } from '../session.js'

/* A request is carried out once. */

const RETRIES = 3
/** Where nothing makes the endpoint slow, duplicates have to meet by chance. */
const ROUNDS = 5
const HEELS = 20
const UNCOUNTED = 'executions cannot be counted: say in the profile how ("count")'

const sequentialOnce: Rule = {
  id: 'sequential-once',
  level: 'must',
  title: 'A request that is repeated after its reply is not carried out again',
  source: DRAFT('2.6'),
  async check(session) {
    const request = session.request()
    const { exchanges, count } = await session.counted(async () => {
      const all = [await session.send(request)]
      for (let n = 0; n < RETRIES; n++) all.push(await session.send(request))
      return all
    })
    return once(exchanges, count)
  }
}

const concurrentOnce: Rule = {
  id: 'concurrent-once',
  level: 'must',
  title: 'Of duplicates that come at the same time one is carried out',
  source: `${DRAFT('2.6')}; common practice: Stripe, Adyen`,
  async check(session) {
    for (let round = 0; round < (session.profile.slow === undefined ? ROUNDS : 1); round++) {
      const { exchanges, count } = await atOnce(session)
      if (count === null) return once(exchanges, count)
      if (count > 1) {
        const [one, another] = exchanges.filter(isAccepted) as [Exchange, Exchange]
        return failed(
          `of ${exchanges.length} at once ${count} were carried out`,
          ...(one === undefined ? [] : [shown(`one of the ${exchanges.length}`, one)]),
          ...(another === undefined ? [] : [shown('another one', another)])
        )
      }
    }
    return passed(session.executions.exact ? '' : 'as far as replies tell')
  }
}

const concurrentSameReply: Rule = {
  id: 'concurrent-same-reply',
  level: 'must',
  title: 'Duplicates that come at the same time and are not refused get the reply of the one that is carried out',
  source: DRAFT('2.6'),
  async check(session) {
    const { exchanges, count } = await atOnce(session)
    if (count !== null && count > 1) return notDecidable('more than one was carried out: see concurrent-once')
    const accepted = exchanges.filter(isAccepted)
    const [first, ...others] = accepted
    if (first === undefined)
      return notDecidable('none was accepted', ...exchanges.slice(0, 1).map((one) => shown('one of them', one)))
    const { request } = first
    const later = await session.replay(request)
    const other = [first, ...others].find((exchange) => !session.isSame(exchange, later))
    if (other === undefined) return passed()
    return failed(
      'one of them was accepted, and got another reply than a retry gets',
      shown('one of the duplicates', other),
      shown('a retry after all of them', later)
    )
  }
}

const clientGoneOnce: Rule = {
  id: 'client-gone-once',
  level: 'must',
  title: 'A request whose client has hung up is not carried out again when it is repeated',
  source: 'the purpose of the key (draft-ietf-httpapi-idempotency-key-header §1)',
  async check(session) {
    const { first, others, count } = await session.whileRunning(async (ask, hangUp) => {
      hangUp()
      const retries: Exchange[] = []
      const end = performance.now() + 4 * session.slowMs + PATIENCE_MS
      do {
        await sleep(50)
        retries.push(await session.send(session.request(ask)))
      } while (!isAccepted(retries.at(-1) as Exchange) && performance.now() < end)
      return retries
    })
    const last = others.at(-1) as Exchange
    if (!isAccepted(last)) {
      return failed(`the retry never gets the reply: ${inWords(last)}`, ...inOrder([first, last]))
    }
    if (count === null || count > 1) return once([first, last], count)
    return passed(session.executions.exact ? '' : 'as far as replies show it: that of the first request was not read')
  }
}

const retryOnHeels: Rule = {
  id: 'retry-on-heels',
  level: 'should',
  title: 'A retry that is sent the moment the reply has come gets that reply',
  source: DRAFT('2.6'),
  async check(session) {
    const connection = new Connection(session.base)
    try {
      for (let n = 0; n < HEELS; n++) {
        const request = session.request()
        const first = await session.send(request, { connection })
        const retry = await session.send(request, { connection })
        if (isAccepted(first) && !isAccepted(retry)) {
          return failed(
            `the reply had come, and its retry was refused: ${inWords(retry)}`,
            shown('the first request', first),
            shown('the same at once', retry)
          )
        }
      }
      return passed()
    } finally {
      connection.close()
    }
  }
}

function atOnce(session: Session) {
  const request = session.request({ variant: session.profile.slow })
  const duplicates = Array.from({ length: session.profile.concurrency })
  return session.counted(() => Promise.all(duplicates.map(() => session.send(request))))
}

function once(exchanges: readonly Exchange[], count: number | null) {
  if (count === null) {
    const [first] = exchanges
    const isRefusedAll = first !== undefined && !exchanges.some(isAccepted)
    const why = isRefusedAll ? `nothing was accepted: ${inWords(first)}` : UNCOUNTED
    return notDecidable(why, ...inOrder(exchanges).slice(0, 1))
  }
  if (count > 1) return failed(`it was carried out ${count} times`, ...inOrder(exchanges))
  if (count === 0) return notDecidable('it was not carried out at all', ...inOrder(exchanges).slice(0, 1))
  return passed()
}

export const ONCE: readonly Rule[] = [sequentialOnce, concurrentOnce, concurrentSameReply, clientGoneOnce, retryOnHeels]
